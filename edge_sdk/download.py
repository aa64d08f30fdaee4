"""A file that arrives in blocks: written in place, checked, and gone on with after a crash where it was."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.errors import IntegrityError, StoreError
from edge_sdk.files import crashpoint, flush, fsync_folder, replace_file, storage_error
from edge_sdk.messages import block_count, from_bitmap, to_bitmap

logger = logging.getLogger(__name__)
_READ_BYTES = 1 << 20


class Download:
    """One blob on its way: blocks written in place, so that after a crash only those are fetched that are not there.

    With signed hashes of the blocks the disk itself says which those are: each is checked when it comes, and again
    after a restart. Without them a map is kept, written only after the blocks it names were flushed, so that after a
    power cut it never promises too much; a block that is on disk but not in the map is merely fetched again. So nobody
    waits for the map itself.

    Args:
        folder: Where the file will be, under its SHA-256.
        digest: SHA-256 of the file.
        size: Of the file, in bytes.
        block_bytes: Size of every block but the last.
        hashes: SHA-256 of each block, 32 bytes, if signed metadata says so; else none.
    """

    def __init__(self, folder: Path, digest: str, size: int, block_bytes: int, hashes: Sequence[bytes] = ()) -> None:
        self.digest, self.size, self.block_bytes = digest, size, block_bytes
        self._hashes = hashes
        self._descriptor: int | None = None
        self.count = block_count(size, block_bytes)
        self.path = folder / digest
        self._part = folder / f"{digest}.part"
        self._map = folder / f"{digest}.map"
        self._have: set[int] = set()
        self._unflushed: set[int] = set()
        self._sha256, self._hashed = hashlib.sha256(), 0  # of the first blocks, as long as they come in order
        if not self._part.exists():
            return
        if hashes:
            self._have = self._sound_blocks()
        elif self._map.exists():
            self._have = from_bitmap(self._map.read_bytes(), self.count)

    def _sound_blocks(self) -> set[int]:
        with self._part.open("rb") as file:
            return {
                index
                for index, expected in enumerate(self._hashes)
                if hashlib.sha256(file.read(self.block_bytes)).digest() == expected
            }

    @property
    def complete(self) -> bool:
        """Whether every block is here."""
        return len(self._have) + len(self._unflushed) == self.count

    @property
    def unflushed(self) -> int:
        """Blocks that a crash would take."""
        return len(self._unflushed)

    def missing(self) -> list[int]:
        """Blocks that are not here, in order."""
        return [i for i in range(self.count) if i not in self._have and i not in self._unflushed]

    def write(self, index: int, payload: bytes) -> bool:
        """Put a block in its place; False if it is not one that is missing, or not the one that was signed.

        Raises:
            DiskFullError, StoreError: It cannot be written.
        """
        expected = min(self.block_bytes, self.size - index * self.block_bytes)
        if index in self._have or index in self._unflushed or len(payload) != expected or index >= self.count:
            return False
        if self._hashes and hashlib.sha256(payload).digest() != self._hashes[index]:
            logger.warning("block %d of %s is damaged and is fetched again", index, self.digest[:12])
            return False
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT, 0o644)
            written = 0
            while written < len(payload):  # a disk that is nearly full takes a part of it first
                written += os.pwrite(self._descriptor, payload[written:], index * self.block_bytes + written)
        except OSError as error:
            raise storage_error(error, f"block {index} of {self.digest[:12]} cannot be written") from error
        if self._hashes:
            self._have.add(index)
            return True
        self._unflushed.add(index)
        if index == self._hashed:
            self._sha256.update(payload)
            self._hashed += 1
        return True

    def close(self) -> None:
        """Let go of the file; it is opened again for the next block."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def flush(self) -> None:
        """Make the blocks written so far safe, and note them.

        Raises:
            DiskFullError, StoreError: They cannot be; they will be fetched again.
        """
        if not self._unflushed:
            return
        try:
            self._flush_part()
        except StoreError:
            self._unflushed.clear()
            raise
        crashpoint("blocks:flushed")
        replace_file(self._map, to_bitmap(self._have | self._unflushed, self.count), durable=False)
        self._have |= self._unflushed
        self._unflushed.clear()

    def _flush_part(self) -> None:
        try:
            descriptor = os.open(self._part, os.O_RDONLY)
            try:
                flush(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error(error, f"{self.digest[:12]} cannot be flushed") from error

    def finish(self) -> None:
        """Check the hash, unless every block was found to be the signed one, and give the file its name.

        Raises:
            IntegrityError: The hash differs; all blocks are thrown away.
            DiskFullError, StoreError: It cannot be flushed.
        """
        self.close()
        if self.size == 0:
            self._part.touch()
        if self._hashes:
            self._flush_part()
        elif self._digest_of_part() != self.digest:
            self._part.unlink()
            self._map.unlink(missing_ok=True)
            self._have.clear()
            self._sha256, self._hashed = hashlib.sha256(), 0
            raise IntegrityError(f"the blocks of {self.digest[:12]}… do not have its SHA-256")
        self._part.replace(self.path)
        crashpoint("blocks:finished")
        self._map.unlink(missing_ok=True)
        fsync_folder(self.path.parent)

    def _digest_of_part(self) -> str:
        """SHA-256 of the file: what was hashed as it came, and the rest from the disk."""
        with self._part.open("rb") as file:
            file.seek(self._hashed * self.block_bytes)
            while chunk := file.read(_READ_BYTES):
                self._sha256.update(chunk)
        return self._sha256.hexdigest()
