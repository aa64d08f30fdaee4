"""Inputs that are kept on disk, encrypted."""

import stat
import sys

import pytest

from edge_sdk.errors import ConfigError, IntegrityError, MissingExtraError
from edge_sdk.seal import Seal
from edge_sdk.store import Store

SECRET = b"PK what somebody wrote"


def on_disk(tmp_path):
    return b"".join(path.read_bytes() for path in tmp_path.glob("edge.db*"))


@pytest.fixture
def key(tmp_path):
    return tmp_path / "inputs.key"


def keep(store, name="p-1"):
    with store.transaction():
        store.add_inputs([(name, SECRET)], keep=10)


def test_what_is_kept_is_read_back_with_the_key_and_nowhere_to_be_seen(tmp_path, key):
    store = Store(tmp_path / "edge.db", seal=Seal(key))
    keep(store)
    store.close()
    assert SECRET not in on_disk(tmp_path)
    store = Store(tmp_path / "edge.db", seal=Seal(key))
    assert store.input_of("p-1") == SECRET
    assert store.input_of("p-2") is None
    store.close()


def test_the_key_is_its_owners_alone(key):
    Seal(key)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="open to others"):
        Seal(key)


def test_a_file_that_is_no_key_is_refused(key):
    key.touch(mode=0o600)
    with pytest.raises(ConfigError, match="has 0 bytes, not 32"):
        Seal(key)


def test_inputs_from_before_the_key_are_encrypted_at_the_next_start(tmp_path, key):
    store = Store(tmp_path / "edge.db")
    keep(store)
    store.close()
    assert SECRET in on_disk(tmp_path)
    store = Store(tmp_path / "edge.db", seal=Seal(key))
    assert SECRET not in on_disk(tmp_path)
    assert store.input_of("p-1") == SECRET
    store.close()


@pytest.mark.parametrize("why", ["no key", "another key", "another name", "damaged"])
def test_what_cannot_be_decrypted_is_told_apart(tmp_path, key, why):
    store = Store(tmp_path / "edge.db", seal=Seal(key))
    keep(store)
    if why == "another name":
        store.execute("UPDATE inputs SET id = 'p-2'")
    if why == "damaged":
        store.execute("UPDATE inputs SET x = substr(x, 1, 40)")
    store.close()
    if why == "another key":
        key.unlink()
    store = Store(tmp_path / "edge.db", seal=None if why == "no key" else Seal(key))
    with pytest.raises(IntegrityError, match="set update.inputs_key_file" if why == "no key" else "another key"):
        store.input_of("p-2" if why == "another name" else "p-1")
    store.close()


def test_without_the_package_the_line_to_install_it_is_told(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-sdk\[encrypt\]'"):
        Seal(key)
    assert not key.exists()
