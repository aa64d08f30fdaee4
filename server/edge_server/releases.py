"""Releases: files kept by their content, and handed out in blocks.

A release is the manifest's digest; the manifest names every other file by its own. Taken in are checkpoints whose
sizes and hashes fit. `describe` makes what is signed of a release: the manifest's hash and size, and its index.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from tuf.api.metadata import TargetFile

from edge_sdk.clock import is_due
from edge_sdk.errors import IntegrityError, NotConnectedError, StoreError
from edge_sdk.files import replace_file, storage_error
from edge_sdk.index import MAX_PATCHED, Patch, ReleaseIndex, can_patch, hash_blocks, index_bytes, make_patch
from edge_sdk.manifest import MANIFEST_NAME, Manifest, digest_of, verify_checkpoint
from edge_sdk.messages import BLOCK_BYTES, Need, Topics, block_count, from_bitmap
from edge_sdk.transport import Transport
from edge_sdk.trust import target_path
from edge_server.errors import ReleaseError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_RELEASE = 2**53 - 1  # what JSON readers take for exact
_Block = tuple[str, int]
_PIECE_BYTES = 1 << 20
SMALL_BLOCKS = 8
"""A file of so many blocks fits into the window of every device, which then does not wait before it asks."""
_WORTH_IT = 0.8
"""A patch larger than this share of the file is not kept."""


class BlobStore:
    """Files by their SHA-256, in one folder.

    Args:
        folder: Where they are; made when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, data: bytes, digest: str) -> None:
        """Keep a file, durably. One that is here already is left alone.

        Raises:
            IntegrityError: The bytes do not have that hash.
            DiskFullError, StoreError: It cannot be written.
        """
        self._put((data,), len(data), digest)

    def put_file(self, path: Path, digest: str) -> None:
        """Keep a copy of a file, as `put`, without ever holding more of it than a piece.

        Raises:
            IntegrityError: It does not have that hash.
            DiskFullError, StoreError: It cannot be read or written.
        """
        try:
            with path.open("rb") as file:
                self._put(iter(lambda: file.read(_PIECE_BYTES), b""), path.stat().st_size, digest)
        except OSError as error:
            raise storage_error(error, f"cannot read {path.name}") from error

    def _put(self, pieces: Iterable[bytes], size: int, digest: str) -> None:
        if self.size(digest) == size:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"cannot make {self._folder}") from error
        replace_file(self._folder / digest, _checked(pieces, digest))

    def size(self, digest: str) -> int | None:
        """Size of the file with that hash in bytes; None if it is not here."""
        if not _DIGEST.fullmatch(digest):  # anything else could be a path
            return None
        try:
            return (self._folder / digest).stat().st_size
        except OSError:
            return None

    def path(self, digest: str) -> Path | None:
        """Where the file with that hash is; None if it is not here."""
        return None if self.size(digest) is None else self._folder / digest

    def read(self, digest: str) -> bytes:
        """A whole file.

        Raises:
            StoreError: It is not here, or cannot be read.
        """
        try:
            return (self._folder / digest).read_bytes()
        except OSError as error:
            raise storage_error(error, f"cannot read {digest[:12]}…") from error

    def block(self, digest: str, index: int) -> bytes:
        """Block `index` of a file that is here; the last one may be short.

        Raises:
            StoreError: It cannot be read.
        """
        try:
            with (self._folder / digest).open("rb") as file:
                return os.pread(file.fileno(), BLOCK_BYTES, index * BLOCK_BYTES)
        except OSError as error:
            raise storage_error(error, f"cannot read {digest[:12]}…") from error


def _checked(pieces: Iterable[bytes], digest: str) -> Iterator[bytes]:
    """The same pieces; the last one is followed by an error if all together do not have that hash."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
        yield piece
    if found.hexdigest() != digest:
        raise IntegrityError(f"a file changed while it was read: its SHA-256 is no longer {digest[:12]}…")


def check(folder: Path) -> tuple[Manifest, bytes]:
    """Check a checkpoint folder, and return its manifest, parsed and as it is.

    Raises:
        IntegrityError: A file is missing, or differs from the manifest.
        IncompatibleError: The manifest is of a newer form.
        ReleaseError: Its release number cannot be one.
        StoreError: It cannot be read.
    """
    try:
        manifest = verify_checkpoint(folder)
        data = (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise storage_error(error, f"cannot read {folder}") from error
    if not 1 <= manifest.release <= _MAX_RELEASE:
        raise ReleaseError(f"release numbers lie in 1 to {_MAX_RELEASE}, the manifest says {manifest.release}")
    return manifest, data


def take_in(folder: Path, manifest: Manifest, data: bytes, blobs: BlobStore) -> None:
    """Keep the files of a checkpoint folder by their content; arguments as `check` gave them.

    Raises:
        IntegrityError: A file has changed since.
        DiskFullError, StoreError: A file cannot be kept.
    """
    for name, entry in manifest.files.items():
        blobs.put_file(folder / name, entry.sha256)
    blobs.put(data, digest_of(data))


def describe(manifest: Manifest, data: bytes, blobs: BlobStore, before: Sequence[Manifest] = ()) -> TargetFile:
    """What is to be signed of a release. Its index, and patches from earlier releases, are kept as files of it.

    Args:
        manifest: Of a release that was taken in.
        data: The manifest as it is.
        blobs: Where its files are.
        before: Releases that devices may have.

    Raises:
        StoreError: A file cannot be read or kept.
    """
    patches = [patch for earlier in before for patch in _patches(manifest, earlier, blobs)]
    known = {entry.sha256 for entry in manifest.files.values()} | {patch.digest for patch in patches}
    index = index_bytes(
        ReleaseIndex(
            release=manifest.release,
            block_bytes=BLOCK_BYTES,
            blocks={digest: _hash_blocks(blobs, digest) for digest in sorted(known)},
            patches=patches,
        )
    )
    blobs.put(index, digest_of(index))
    target = TargetFile(len(data), {"sha256": digest_of(data)}, target_path(manifest.release))
    target.unrecognized_fields["custom"] = {"index": {"sha256": digest_of(index), "length": len(index)}}
    return target


def _hash_blocks(blobs: BlobStore, digest: str) -> bytes:
    """As `index.hash_blocks`, of a file that may be too large to be held in memory."""
    size = blobs.size(digest)
    if size is None:
        raise StoreError(f"a file of the release is missing: SHA-256 {digest[:12]}…")
    return b"".join(hash_blocks(blobs.block(digest, index), BLOCK_BYTES) for index in range(block_count(size)))


def _patches(manifest: Manifest, before: Manifest, blobs: BlobStore) -> Iterator[Patch]:
    """Patches for the files of equal name that changed, where they are much smaller than the file."""
    for name, entry in sorted(manifest.files.items()) if can_patch() else ():
        old = before.files.get(name)
        if old is None or old.sha256 == entry.sha256 or blobs.size(old.sha256) is None:
            continue
        if not 0 < old.size <= MAX_PATCHED or not BLOCK_BYTES < entry.size <= MAX_PATCHED:
            continue
        patch = make_patch(blobs.read(old.sha256), blobs.read(entry.sha256))
        if len(patch) <= _WORTH_IT * entry.size:
            blobs.put(patch, digest_of(patch))
            yield Patch(entry.sha256, old.sha256, digest_of(patch), len(patch))


class BlockServer:
    """Sends the blocks that devices ask for. What several ask for together goes out once, to all of them.

    A block of a large file that has just gone out is on its way to whoever asks for it a moment later, and does not go
    out again. That of a small file does, once for all who were late: they wait for nothing else.

    Args:
        blobs: Where the files are.
        topics: Names of the topics.
        max_queued: Most blocks waiting; what exceeds it is dropped, and asked for again.
        repeat_s: So long a block of a large file is on its way, in seconds; one of a small file waits a fifth of it.
    """

    def __init__(self, blobs: BlobStore, topics: Topics, *, max_queued: int, repeat_s: float) -> None:
        self._blobs, self._topics, self._max_queued, self._repeat_s = blobs, topics, max_queued, repeat_s
        self._queue: dict[_Block, float] = {}  # in order, and when it last went out
        self._sent: dict[_Block, float] = {}  # the last to go out at the end
        self.refused = 0
        """Requests for files that are not here, or of another size, since this process started."""

    @property
    def queued(self) -> int:
        """Blocks waiting."""
        return len(self._queue)

    def ask(self, need: Need, now: float) -> None:
        """Queue the blocks of a request that came at `now`, in seconds since the epoch."""
        size = self._blobs.size(need.digest)
        if size is None or size != need.size:
            self.refused += 1
            return
        count = block_count(size)
        for index in sorted(from_bitmap(need.blocks, count)):
            block = need.digest, index
            sent = self._sent.get(block, -math.inf)
            if block in self._queue or (count > SMALL_BLOCKS and not is_due(now, sent, self._repeat_s)):
                continue
            if len(self._queue) >= self._max_queued:
                return
            self._queue[block] = sent

    def serve(self, transport: Transport, limit: int, now: float) -> int:
        """Publish up to `limit` blocks, first asked first; returns how many went out.

        Raises:
            StoreError: A file cannot be read; its block is dropped.
        """
        ready = (block for block, last in self._queue.items() if is_due(now, last, self._repeat_s / 5))
        sent = 0
        for block in list(islice(ready, limit)):
            del self._queue[block]
            try:
                transport.publish(self._topics.block(*block), self._blobs.block(*block))
            except NotConnectedError:
                # devices ask anew with every connection
                self._queue.clear()
                self._sent.clear()
                break
            self._sent.pop(block, None)
            self._sent[block] = now
            sent += 1
        while self._sent and is_due(now, self._sent[oldest := next(iter(self._sent))], self._repeat_s):
            del self._sent[oldest]
        return sent
