"""The index of a release: hashes of blocks, and patches."""

import hashlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import IncompatibleError, IntegrityError, MissingExtraError
from edge_sdk.index import (
    Patch,
    ReleaseIndex,
    apply_patch,
    can_patch,
    hash_blocks,
    index_bytes,
    make_patch,
    parse_index,
)

OLD = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(2000))
NEW = OLD[:50_000] + b"changed" + OLD[50_007:]


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def patched(tmp_path):
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "patch").write_bytes(make_patch(OLD, NEW))
    return lambda **changes: apply_patch(
        tmp_path / "old", tmp_path / "patch", **{"digest": digest_of(NEW), "size": len(NEW)} | changes
    )


def test_an_index_comes_back_as_it_was_and_its_bytes_are_fixed():
    index = ReleaseIndex(
        release=2,
        block_bytes=64,
        blocks={"ab" * 32: hash_blocks(bytes(100), 64)},
        patches=[Patch("ab" * 32, "cd" * 32, "ef" * 32, 7)],
    )
    assert parse_index(index_bytes(index)) == index
    assert index_bytes(index) == index_bytes(parse_index(index_bytes(index)))


@given(st.binary(max_size=300))
def test_no_bytes_make_an_index_raise_anything_else(data):
    with pytest.raises(IntegrityError):
        parse_index(data)


@pytest.mark.parametrize("changes", [{"digest": "../../etc/x"}, {"source": ""}, {"target": "AB" * 32}, {"size": 0}])
def test_a_patch_with_an_impossible_name_or_size_is_refused(changes):
    patch = {"target": "ab" * 32, "source": "cd" * 32, "digest": "ef" * 32, "size": 7} | changes
    index = ReleaseIndex(release=2, block_bytes=64, patches=[Patch(**patch)])
    with pytest.raises(IntegrityError, match="names a patch"):
        parse_index(index_bytes(index))


def test_an_index_of_a_newer_form_says_so():
    with pytest.raises(IncompatibleError, match="schema 2"):
        parse_index(b'{"schema": 2, "release": 1, "block_bytes": 64}')


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200])
def test_every_block_has_its_hash(size):
    data = bytes(range(200))[:size]
    index = ReleaseIndex(release=1, block_bytes=64, blocks={"a": hash_blocks(data, 64)})
    blocks = [data[i : i + 64] for i in range(0, size, 64)]
    assert index.hashes("a", size, 64) == [hashlib.sha256(block).digest() for block in blocks]


def test_hashes_of_other_blocks_are_not_used():
    index = ReleaseIndex(release=1, block_bytes=64, blocks={"a": hash_blocks(bytes(200), 64)})
    assert index.hashes("a", 200, 128) == []
    assert index.hashes("a", 500, 64) == []
    assert index.hashes("b", 200, 64) == []


def test_a_patch_makes_the_new_file_and_is_small(patched, tmp_path):
    assert patched() == NEW
    assert (tmp_path / "patch").stat().st_size < len(NEW) / 100


def test_a_patch_that_makes_something_else_is_refused(patched, tmp_path):
    with pytest.raises(IntegrityError, match="does not have the SHA-256"):
        patched(digest="ab" * 32)
    (tmp_path / "old").write_bytes(OLD[::-1])
    with pytest.raises(IntegrityError):
        patched()


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "size"])
def test_a_damaged_patch_is_refused(patched, tmp_path, damage):
    data = (tmp_path / "patch").read_bytes()
    spoilt = {"cut": data[:40], "empty": b"", "noise": data[:32] + bytes(len(data) - 32)}.get(damage)
    if spoilt is None:  # claims to make a file that no memory holds
        spoilt = data[:24] + (2**40).to_bytes(8, "little") + data[32:]
    (tmp_path / "patch").write_bytes(spoilt)
    with pytest.raises(IntegrityError):
        patched()


def test_without_bsdiff4_the_error_names_the_extra(patched, monkeypatch):
    monkeypatch.setitem(sys.modules, "bsdiff4", None)
    assert not can_patch()
    with pytest.raises(MissingExtraError, match=r"edge-sdk\[delta\]"):
        patched()
    with pytest.raises(MissingExtraError, match=r"edge-sdk\[server\]"):
        make_patch(OLD, NEW)
