"""A checkpoint that comes over HTTP as a tar archive: received and unpacked in pieces, in a folder of its own."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from edge_sdk.errors import DiskFullError
from edge_sdk.files import remove_tree, storage_error
from edge_server.errors import UploadError, UploadTooLargeError

TAR = "application/x-tar"
_BLOCK = 512
_PIECE_BYTES = 1 << 20
_MAX_MEMBERS = 256
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE)
"""They hold times and the like of the file that follows."""


class Uploads:
    """Where archives lie until they are taken in.

    Args:
        folder: For them alone. What is in it comes from a server that was killed, and is deleted.
        max_bytes: Of an archive.
        min_free_bytes: So many must stay free on the disk.
    """

    def __init__(self, folder: Path, *, max_bytes: int, min_free_bytes: float) -> None:
        self._folder, self._max_bytes, self._min_free_bytes = folder, max_bytes, min_free_bytes
        remove_tree(folder)

    @asynccontextmanager
    async def unpacked(self, request: Request) -> AsyncIterator[Path]:
        """The folder with the files of the archive that a request carries; it is gone afterwards.

        Raises:
            UploadTooLargeError: It has more bytes than are taken.
            UploadError: It is no archive of a folder of plain files, or ended early.
            DiskFullError: There is no room for it.
            StoreError: It cannot be kept.
        """
        expected = self._expected(request)
        try:
            self._folder.mkdir(exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=self._folder))
        except OSError as error:
            raise storage_error(error, f"cannot make a folder in {self._folder}") from error
        try:
            archive, files = work / "archive.tar", work / "files"
            # archive and files lie side by side for a while, and so do files and the coordinator's own copies
            self._require_room(2 * expected)
            try:
                with archive.open("wb") as file:
                    await self._receive(request, file)
                await run_in_threadpool(unpack, archive, files)
                archive.unlink()
            except OSError as error:
                raise storage_error(error, "cannot keep the upload") from error
            yield files
        finally:
            await run_in_threadpool(shutil.rmtree, work, ignore_errors=True)

    def _expected(self, request: Request) -> int:
        """Bytes that the request announces; 0: it does not say."""
        told = request.headers.get("content-length", "0")
        expected = int(told) if told.isascii() and told.isdigit() else 0
        self._check_size(expected)
        return expected

    async def _receive(self, request: Request, file: BinaryIO) -> None:
        received = 0
        try:
            async for piece in request.stream():
                received += len(piece)
                self._check_size(received)
                self._require_room(received)  # as much again is needed to unpack it
                await run_in_threadpool(file.write, piece)
        except ClientDisconnect as error:
            raise UploadError(f"the upload ended after {received} bytes, before it was complete") from error

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise UploadTooLargeError(
                f"a checkpoint of more than {self._max_bytes} bytes is not taken over HTTP: push it on the "
                "coordinator's machine, or raise http.max_upload_bytes"
            )

    def _require_room(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free - size < self._min_free_bytes:
            raise DiskFullError(
                f"the upload takes {size} bytes more for a while, {self._min_free_bytes:.0f} must stay free "
                f"(alerts.min_disk_mb), and there are {free}"
            )


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a tar archive into a new folder.

    Only plain files at the top are taken: no links, no devices, no folders, nothing that is compressed. So an archive
    can neither write elsewhere nor take more room than it has itself.

    Raises:
        UploadError: It is none, or holds something else, or ends early.
        OSError: A file cannot be read or written.

    Source:
        POSIX.1-2001, pax: ustar interchange format. Extended headers are skipped, as a checkpoint's names are short.
    """
    folder.mkdir()
    with archive.open("rb") as source:
        for member in _members(source):
            name = member.name.removeprefix("./")
            if member.isdir() and name in ("", "."):
                continue
            if member.type not in _FILES or name != Path(name).name or name in ("", ".", "..") or "\0" in name:
                raise UploadError(
                    f"the archive holds {member.name[:200]!r}, which is no plain file at its top: make it with "
                    "tar -C CHECKPOINT -cf - ."
                )
            if (folder / name).exists():
                raise UploadError(f"the archive holds {name[:200]!r} twice")
            left = member.size
            with (folder / name).open("xb") as target:
                while left and (piece := source.read(min(left, _PIECE_BYTES))):
                    target.write(piece)
                    left -= len(piece)
            if left:
                raise UploadError(f"the archive ends within {name[:200]!r}, {left} bytes early")


def _members(source: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive; the source stands behind each when it is given."""
    count = 0
    while len(block := source.read(_BLOCK)) == _BLOCK and block.strip(b"\0"):
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise UploadError(f"the body is no tar archive, or a compressed or damaged one: {error}") from error
        count += 1
        if count > _MAX_MEMBERS or member.size < 0:
            raise UploadError(f"the archive holds more than {_MAX_MEMBERS} entries, or one of a size below 0")
        begin = source.tell()
        if member.type not in _EXTENSIONS:
            yield member
        source.seek(begin + -(-member.size // _BLOCK) * _BLOCK)
    if not count:
        raise UploadError("the body is no tar archive: it is empty, or shorter than one header")
