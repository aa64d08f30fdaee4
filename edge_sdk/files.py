"""Durable file operations, with a seam where tests can kill the process.

Everything that must survive a power cut goes through `replace_file`: written beside its target,
flushed to disk, renamed into place, and the folder flushed as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np

from edge_sdk.errors import DiskFullError, EdgeError, IntegrityError, StoreError

_LOST = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO})
_crash_hook: Callable[[str], None] | None = None
_flushes = True


def crashpoint(name: str) -> None:
    """Mark an instant at which power may fail. Does nothing unless a test has set a hook."""
    if _crash_hook is not None:
        _crash_hook(name)


def set_crash_hook(hook: Callable[[str], None] | None) -> None:
    """Let `hook(name)` run at every crash point (tests kill the process in it). None removes it."""
    global _crash_hook  # noqa: PLW0603 - one process, one power supply
    _crash_hook = hook


@contextmanager
def without_flushing() -> Iterator[None]:
    """Do not wait for the disk within: for simulations, whose files nobody needs after a power cut. For the process."""
    global _flushes  # noqa: PLW0603 - one process, one disk
    before, _flushes = _flushes, False
    try:
        yield
    finally:
        _flushes = before


def is_flushing() -> bool:
    """Whether this process waits for the disk at all: False within `without_flushing`."""
    return _flushes


def flush(descriptor: int) -> None:
    """Wait until a file is on the disk."""
    if _flushes:
        os.fsync(descriptor)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    if not _flushes:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes | Iterable[bytes], *, mode: int = 0o644, durable: bool = True) -> None:
    """Write `data` to `path` so that a reader sees the old bytes or the new, never a mixture.

    Args:
        path: The file.
        data: Its new content, or the pieces of it. What they raise goes on, and the old file is untouched.
        mode: Its permissions.
        durable: Whether to wait for the disk. If not, a power cut may bring back old bytes, or lose the file.

    Raises:
        DiskFullError: No room; the old file is untouched.
        StoreError: The file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            if durable:
                flush(file.fileno())
        crashpoint(f"written:{path.name}")
        temporary.replace(path)
        crashpoint(f"renamed:{path.name}")
        if durable:
            fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise storage_error(error, f"cannot write {path.name}") from error
    except EdgeError:
        temporary.unlink(missing_ok=True)
        raise


def storage_error(error: OSError, what: str) -> StoreError:
    """The typed error for a failed file operation: full disks are told from all others."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"{what}: {error.strerror}; free some space")
    return StoreError(f"{what}: {error.strerror or error}")


def is_damage(error: BaseException | None) -> bool:
    """Whether a failed read says that something is lost or wrong.

    False if it, or what led to it, will pass: a full disk, too many open files, too little memory.
    """
    while error is not None:
        passes = isinstance(error, OSError) and error.errno is not None and error.errno not in _LOST
        if passes or isinstance(error, StoreError | MemoryError):
            return False
        error = error.__cause__
    return True


def remove_tree(folder: Path) -> None:
    """Delete a folder and all in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
        crashpoint(f"removed:{folder.name}")


def lock_folder(folder: Path) -> IO[str]:
    """Take a folder for this process until the returned file is closed.

    Raises:
        StoreError: Another process has it, or it cannot be written.
    """
    try:
        file = (folder / "lock").open("a")
    except OSError as error:
        raise storage_error(error, f"{folder} cannot be written") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StoreError(f"{folder} is in use by another process; it has one owner at a time") from error
    return file


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def npz_bytes(arrays: dict[str, Any]) -> bytes:
    """The arrays as one uncompressed .npz; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    # numpy stamps every entry with a fixed date, so that the bytes depend on the arrays alone
    np.savez(buffer, allow_pickle=False, **{key: np.asarray(arrays[key]) for key in sorted(arrays)})
    return buffer.getvalue()


def load_npz(source: Path | bytes) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """All arrays of an .npz, without ever unpickling.

    Raises:
        IntegrityError: The file is not a readable .npz of plain arrays.
    """
    name = source.name if isinstance(source, Path) else "npz"
    try:
        content = io.BytesIO(source if isinstance(source, bytes) else source.read_bytes())
        with zipfile.ZipFile(content) as members:
            return {entry.removesuffix(".npy"): _array(members.read(entry)) for entry in members.namelist()}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise IntegrityError(f"{name} is not a readable .npz of plain arrays: {error}") from error
    except Exception as error:  # zipfile and zlib raise classes of their own
        raise IntegrityError(f"{name} is damaged: {error}") from error


def _array(data: bytes) -> np.ndarray[Any, np.dtype[Any]]:
    """An array in the .npy format.

    Source:
        https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    if not data.startswith(b"\x93NUMPY"):
        raise ValueError("an entry is no array")
    size = 10 + int.from_bytes(data[8:10], "little") if data[6] == 1 else 12 + int.from_bytes(data[8:12], "little")
    dtype, order, shape = _form(data[:size])
    if not dtype.itemsize:  # texts, all of them empty
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, offset=size).reshape(shape, order=order).copy(order)


@lru_cache(maxsize=512)
def _form(header: bytes) -> tuple[np.dtype[Any], Literal["C", "F"], tuple[int, ...]]:
    """What the header of an .npy says. numpy takes a tenth of a millisecond to read one, and the same ones recur."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        raise ValueError("an entry holds Python objects")
    return dtype, "F" if fortran else "C", shape


def pack_arrays(arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> bytes:
    """Plain arrays as MessagePack: a twentieth of the time of `npz_bytes`, for what is written often."""
    parts = {key: (a.dtype.str, a.shape, a.tobytes()) for key, a in arrays.items()}
    return msgspec.msgpack.encode(parts)


def unpack_arrays(data: bytes) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """What `pack_arrays` was given.

    Raises:
        IntegrityError: The data is damaged.
    """
    try:
        parts = _PACKED.decode(data)
        return {
            key: np.frombuffer(raw, np.dtype(kind)).reshape(shape).copy() for key, (kind, shape, raw) in parts.items()
        }
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise IntegrityError(f"the stored arrays are damaged: {error}") from error


_PACKED = msgspec.msgpack.Decoder(dict[str, tuple[str, tuple[int, ...], bytes]])
