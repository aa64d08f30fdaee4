"""The manifest: what is damaged or dangerous is refused, what is unknown is ignored."""

import contextlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ArtifactError, IncompatibleError, IntegrityError
from edge_sdk.manifest import (
    HEAD_NPZ,
    MANIFEST_NAME,
    REQUIRED,
    TRUNK_INT8,
    FileEntry,
    HeadSpec,
    LatentSpec,
    Manifest,
    describe_folder,
    digest_of,
    manifest_bytes,
    parse_manifest,
    verify_checkpoint,
)
from edge_sdk.schema import InputSpec, Scale


def make_manifest(files=None, **changes):
    fields = {
        "name": "digits",
        "release": 3,
        "created": "2026-01-01T00:00:00Z",
        "labels": ["0", "1"],
        "input": InputSpec(shape=[1, 8, 8], low=0.0, preprocess=[Scale([8.0], [8.0])]),
        "latent": LatentSpec(dim=32, scale=0.05, zero_point=3),
        "head": HeadSpec(hidden=[16]),
        "files": files or {name: FileEntry(1, digest_of(name.encode())) for name in REQUIRED},
        "metrics": {"accuracy": 0.97},
        **changes,
    }
    return Manifest(**fields)


def edited(**changes):
    return json.dumps({**json.loads(manifest_bytes(make_manifest())), **changes}).encode()


@pytest.fixture
def checkpoint(tmp_path):
    for name in REQUIRED:
        (tmp_path / name).write_bytes(f"content of {name}".encode())
    (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(make_manifest(describe_folder(tmp_path, REQUIRED))))
    return tmp_path


def test_a_whole_checkpoint_is_verified(checkpoint):
    manifest = verify_checkpoint(checkpoint)
    assert manifest.release == 3
    assert set(manifest.files) == set(REQUIRED)


@pytest.mark.parametrize("name", REQUIRED)
def test_an_altered_file_is_found(checkpoint, name):
    path = checkpoint / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=rf"{name} has SHA-256"):
        verify_checkpoint(checkpoint)


def test_a_truncated_file_is_found(checkpoint):
    path = checkpoint / HEAD_NPZ
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=rf"{HEAD_NPZ} has 18 bytes, the manifest says 19"):
        verify_checkpoint(checkpoint)


def test_a_missing_file_is_found(checkpoint):
    (checkpoint / TRUNK_INT8).unlink()
    with pytest.raises(IntegrityError, match=rf"{TRUNK_INT8} is missing"):
        verify_checkpoint(checkpoint)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(IntegrityError, match="is it a checkpoint folder"):
        verify_checkpoint(tmp_path)


def test_more_files_than_the_manifest_names_do_no_harm(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"name": "x"}',
        edited(release="3"),
        edited(labels=None),
        edited(task="poetry"),
    ],
)
def test_what_is_not_a_manifest_is_refused(data):
    with pytest.raises(IntegrityError, match="damaged or not a manifest"):
        parse_manifest(data)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/passwd", "a/b", "", ".", "..", "sub/../x", MANIFEST_NAME],
)
def test_names_outside_the_folder_are_refused(name):
    files = {**json.loads(edited())["files"], name: {"size": 1, "sha256": "0" * 64}}
    with pytest.raises(IntegrityError, match="outside its folder"):
        parse_manifest(edited(files=files))


@pytest.mark.parametrize(
    "entry",
    [
        {"size": -1, "sha256": "0" * 64},
        {"size": 1, "sha256": "0" * 63},
        {"size": 1, "sha256": "0" * 65},
        {"size": 1, "sha256": "G" * 64},
        {"size": 1, "sha256": "A" * 64},
    ],
)
def test_an_impossible_size_or_hash_is_refused(entry):
    files = {**json.loads(edited())["files"], HEAD_NPZ: entry}
    with pytest.raises(IntegrityError, match="not valid"):
        parse_manifest(edited(files=files))


@pytest.mark.parametrize("name", REQUIRED)
def test_every_required_file_must_be_named(name):
    files = {key: value for key, value in json.loads(edited())["files"].items() if key != name}
    with pytest.raises(IntegrityError, match=f"lacks {name}"):
        parse_manifest(edited(files=files))


def test_unknown_fields_are_ignored():
    assert parse_manifest(edited(colour="blue", later={"x": [1]})) == make_manifest()


def test_a_newer_schema_asks_for_an_update():
    with pytest.raises(IncompatibleError, match="manifest schema 2, this SDK reads 1; update the SDK"):
        parse_manifest(edited(schema=2))


def test_equal_content_gives_equal_bytes():
    data = manifest_bytes(make_manifest())
    assert data == manifest_bytes(parse_manifest(data))
    assert data.endswith(b"}\n")
    reordered = dict(reversed(make_manifest().files.items()))
    assert manifest_bytes(make_manifest(reordered)) == data


names = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    name=names,
    release=st.integers(0, 2**53),
    labels=st.lists(names, min_size=1, max_size=5, unique=True),
    scale=st.floats(1e-6, 1e6),
    metrics=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=4),
)
def test_manifests_survive_the_round_trip(name, release, labels, scale, metrics):
    manifest = make_manifest(name=name, release=release, labels=labels, latent=LatentSpec(8, scale, 0), metrics=metrics)
    assert parse_manifest(manifest_bytes(manifest)) == manifest


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_manifest_parses_or_is_refused(position, byte):
    data = bytearray(manifest_bytes(make_manifest()))
    data[position % len(data)] = byte
    with contextlib.suppress(ArtifactError):
        parse_manifest(bytes(data))


def test_the_trunk_id_changes_exactly_when_latents_do():
    manifest = make_manifest()
    assert make_manifest(release=9, labels=["a"], head=HeadSpec()).trunk_id == manifest.trunk_id
    assert make_manifest(latent=LatentSpec(32, 0.06, 3)).trunk_id != manifest.trunk_id
    for name in ("trunk.int8.onnx", "trunk.fp32.onnx"):
        files = {**manifest.files, name: FileEntry(1, "f" * 64)}
        assert make_manifest(files).trunk_id != manifest.trunk_id
    other_head = {**manifest.files, HEAD_NPZ: FileEntry(1, "f" * 64)}
    assert make_manifest(other_head).trunk_id == manifest.trunk_id


def test_one_trunk_with_other_outputs_shares_no_rows():
    """What is stored of a row is its latent and its truth, which means something else for another task or outputs."""
    known = make_manifest()
    assert known.trunk_id == "bec9e9b79825863c7e73250400d3c761dafbf03dbec5def3b0f54ad838a5ce27"
    ids = {known.trunk_id}
    for task in ("multilabel", "regression"):
        ids |= {
            make_manifest(task=task, labels=labels).trunk_id for labels in (["a"], ["a", "b"], ["b", "a"], ["a, b"])
        }
        assert make_manifest(task=task, labels=["a"], release=9).trunk_id in ids
    assert len(ids) == 9


def test_nested_specs_refuse_typos():
    latent = {"dim": 8, "scale": 0.1, "zero_point": 0, "zeropoint": 1}
    with pytest.raises(IntegrityError, match="zeropoint"):
        parse_manifest(edited(latent=latent))


FIRST_READS = """
import importlib, sys, threading
from pathlib import Path
import edge_sdk.manifest, edge_sdk.schema
sys.setswitchinterval(1e-6)
data = Path(sys.argv[1]).read_bytes()
for _ in range(50):
    importlib.reload(edge_sdk.schema)  # new types, which nothing has been read of yet
    importlib.reload(edge_sdk.manifest)
    go = threading.Barrier(8)
    threads = [threading.Thread(target=lambda: (go.wait(), edge_sdk.manifest.parse_manifest(data))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_threads_may_read_their_first_manifest_at_once(tmp_path):
    """A type that msgspec first meets in two threads at once ended one start of a hundred."""
    (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(make_manifest()))
    done = subprocess.run([sys.executable, "-c", FIRST_READS, tmp_path / MANIFEST_NAME], timeout=60, check=False)
    assert done.returncode == 0
