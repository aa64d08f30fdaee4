"""Durable writes: the old bytes or the new, whatever happens in between."""

import errno
import io
import os
import signal
import subprocess
import sys
import zipfile

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DiskFullError, IntegrityError, StoreError
from edge_sdk.files import (
    crashpoint,
    load_npz,
    npz_bytes,
    remove_tree,
    replace_file,
    set_crash_hook,
    sha256_file,
    storage_error,
)

OLD, NEW = b"old" * 1000, b"new" * 2000


class PowerCutError(Exception):
    pass


@pytest.fixture
def crash_hook():
    yield set_crash_hook
    set_crash_hook(None)


def run_child(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], timeout=60, check=False)


def test_replace_file_writes_and_overwrites(tmp_path):
    path = tmp_path / "state"
    replace_file(path, OLD)
    assert path.read_bytes() == OLD
    replace_file(path, NEW)
    assert path.read_bytes() == NEW
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_never_readable_by_others(tmp_path, crash_hook):
    modes = []
    crash_hook(lambda _name: modes.extend(file.stat().st_mode & 0o777 for file in tmp_path.iterdir()))
    replace_file(tmp_path / "password", b"x", mode=0o600)
    assert modes == [0o600, 0o600]


@pytest.mark.parametrize(("point", "expected"), [("written:state", OLD), ("renamed:state", NEW)])
def test_a_power_cut_leaves_the_old_bytes_or_the_new(tmp_path, crash_hook, point, expected):
    path = tmp_path / "state"
    replace_file(path, OLD)

    def cut(name):
        if name == point:
            raise PowerCutError

    crash_hook(cut)
    with pytest.raises(PowerCutError):
        replace_file(path, NEW)
    assert path.read_bytes() == expected

    crash_hook(None)
    replace_file(path, NEW)  # what the cut left behind is in nobody's way
    assert path.read_bytes() == NEW
    assert list(tmp_path.iterdir()) == [path]


def test_every_crashpoint_of_replace_file_is_tested(tmp_path, crash_hook):
    seen = []
    crash_hook(seen.append)
    replace_file(tmp_path / "state", NEW)
    assert seen == ["written:state", "renamed:state"]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from edge_sdk.files import replace_file, set_crash_hook
set_crash_hook(lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == sys.argv[2] else None)
replace_file(Path(sys.argv[1]), b"new" * 2000)
"""


@pytest.mark.parametrize(("point", "expected"), [("written:state", OLD), ("renamed:state", NEW)])
def test_a_killed_process_leaves_the_old_bytes_or_the_new(tmp_path, point, expected):
    path = tmp_path / "state"
    replace_file(path, OLD)
    assert run_child(KILLED_WRITER, path, point).returncode == -signal.SIGKILL
    assert path.read_bytes() == expected


FULL_DISK_WRITER = """
import resource, signal, sys
from pathlib import Path
from edge_sdk.errors import DiskFullError
from edge_sdk.files import replace_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    replace_file(Path(sys.argv[1]), b"new" * 2000)
except DiskFullError as error:
    sys.exit(17 if "free some space" in str(error) else 1)
"""


def test_a_full_disk_is_a_typed_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    replace_file(path, OLD)
    assert run_child(FULL_DISK_WRITER, path).returncode == 17
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_left_is_a_full_disk(code):
    assert isinstance(storage_error(OSError(code, os.strerror(code)), "cannot write"), DiskFullError)


def test_other_failures_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(StoreError, match=r"cannot write state: No such file") as caught:
        replace_file(tmp_path / "missing" / "state", b"x")
    assert not isinstance(caught.value, DiskFullError)
    assert isinstance(caught.value.__cause__, OSError)


def test_remove_tree_removes_what_is_there(tmp_path, crash_hook):
    seen = []
    crash_hook(seen.append)
    folder = tmp_path / "slot"
    remove_tree(folder)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"x")
    remove_tree(folder)
    assert not folder.exists()
    assert seen == ["removed:slot"]


def test_a_crashpoint_does_nothing_on_a_device():
    crashpoint("anywhere")


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_equal_arrays_give_equal_bytes_in_any_order():
    arrays = {"b": np.arange(5, dtype=np.uint8), "a": np.ones((2, 3), np.float32), "n": 7}
    data = npz_bytes(arrays)
    assert data == npz_bytes(dict(reversed(arrays.items())))
    loaded = load_npz(data)
    assert sorted(loaded) == ["a", "b", "n"]
    for key, value in arrays.items():
        np.testing.assert_array_equal(loaded[key], value)
        assert loaded[key].dtype == np.asarray(value).dtype


@given(hnp.arrays(st.sampled_from(["<f4", ">f8", "<i8", "|u1", "|b1", "<U3", "<f2"]),
                  hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)), st.sampled_from("CF"))  # fmt: skip
def test_an_npz_gives_back_what_numpy_would(array, order):
    data = npz_bytes({"a": np.asarray(array, order=order), "b": np.array(["", ""])})
    mine = load_npz(data)
    with np.load(io.BytesIO(data)) as found:
        assert mine.keys() == {*found.files}
        for name, value in mine.items():
            np.testing.assert_array_equal(value, found[name], strict=True)
            assert value.flags.f_contiguous == found[name].flags.f_contiguous
            assert value.flags.writeable


def test_an_npz_is_read_from_a_file_too(tmp_path):
    path = tmp_path / "head.npz"
    path.write_bytes(npz_bytes({"a": np.arange(3)}))
    np.testing.assert_array_equal(load_npz(path)["a"], np.arange(3))
    with pytest.raises(IntegrityError, match=r"gone\.npz"):
        load_npz(tmp_path / "gone.npz")


class Exploit:
    def __reduce__(self):
        return os._exit, (66,)


@pytest.mark.parametrize("wrap", ["object array", "bare pickle", "pickle in the archive"])
def test_pickles_are_refused(wrap):
    buffer = io.BytesIO()
    array = np.array([Exploit()], dtype=object)
    if wrap == "object array":
        np.savez(buffer, a=array)
    elif wrap == "bare pickle":
        array.dump(buffer)
    else:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.npy", array.dumps())
    with pytest.raises(IntegrityError):
        load_npz(buffer.getvalue())


def test_damaged_bytes_are_refused_or_leave_plain_arrays(rng):
    """Whatever happens to the bytes: an IntegrityError, or arrays (the manifest's hash tells those); nothing else."""
    good = npz_bytes({"W0": np.arange(200, dtype=np.float32), "labels": np.array(["a", "b"])})
    for end in range(0, len(good), 7):
        with pytest.raises(IntegrityError):
            load_npz(good[:end])
    for _ in range(500):
        damaged = bytearray(good)
        for position in rng.integers(0, len(good), size=3):
            damaged[position] = rng.integers(0, 256)
        try:
            arrays = load_npz(bytes(damaged))
        except IntegrityError:
            continue
        assert all(isinstance(value, np.ndarray) for value in arrays.values())


def test_a_single_array_is_not_an_npz():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    with pytest.raises(IntegrityError):
        load_npz(buffer.getvalue())
