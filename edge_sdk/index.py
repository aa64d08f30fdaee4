"""The index of a signed release: the hash of every block, and patches from earlier releases.

A file beside the release, named in its signed metadata by size and SHA-256. With it a damaged block is noticed when it
arrives, and a device that has an earlier release may fetch a patch instead of a file.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from edge_sdk.errors import IncompatibleError, IntegrityError, MissingExtraError
from edge_sdk.messages import block_count

SCHEMA = 1
HASH_BYTES = 32
MAX_INDEX = 8_000_000
MAX_PATCHED = 64_000_000
"""Patches are made and applied in memory: larger files always travel whole."""
_MAGIC = b"BSDIFF40"
_HEADER = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Patch(msgspec.Struct, frozen=True):
    """How one file of the release is made from one of an earlier release. All names are SHA-256."""

    target: str
    source: str
    digest: str
    """Of the patch, which travels as any other file."""
    size: int
    """Of the patch."""
    form: str = "bsdiff4"


class ReleaseIndex(msgspec.Struct, frozen=True, kw_only=True):
    """The index. Fields that this version does not know are ignored."""

    schema: int = SCHEMA
    release: int
    block_bytes: int
    blocks: dict[str, bytes] = {}
    """By a file's SHA-256 the SHA-256 of its blocks, 32 bytes each (in JSON as base64)."""
    patches: list[Patch] = []

    def hashes(self, digest: str, size: int, block_bytes: int) -> list[bytes]:
        """The hashes of a file's blocks; none if they are not known, or of blocks of another size."""
        data = self.blocks.get(digest, b"")
        if block_bytes != self.block_bytes or len(data) != HASH_BYTES * block_count(size, block_bytes):
            return []
        return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


_READ = msgspec.json.Decoder(ReleaseIndex)
"""Built here: msgspec learns of a type when it first reads one, and two threads that do so at once end the process."""


def parse_index(data: bytes) -> ReleaseIndex:
    """The index in `data`.

    Raises:
        IntegrityError: It is none.
        IncompatibleError: It is of a newer form.
    """
    try:
        index = _READ.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"not the index of a release: {error}") from error
    if index.schema != SCHEMA:
        raise IncompatibleError(f"index schema {index.schema}, this SDK reads {SCHEMA}; update the SDK")
    for patch in index.patches:  # they become names of files
        if not all(_DIGEST.fullmatch(name) for name in (patch.target, patch.source, patch.digest)) or patch.size <= 0:
            raise IntegrityError("the index of a release names a patch by what is no SHA-256, or of no size")
    return index


def index_bytes(index: ReleaseIndex) -> bytes:
    """The index as it is written: equal content gives equal bytes."""
    return msgspec.json.encode(index, order="sorted") + b"\n"


def hash_blocks(data: bytes, block_bytes: int) -> bytes:
    """The SHA-256 of each block, one after another."""
    starts = range(0, len(data), block_bytes)
    return b"".join(hashlib.sha256(memoryview(data)[i : i + block_bytes]).digest() for i in starts)


def can_patch() -> bool:
    """Whether patches can be made and applied here."""
    try:
        import bsdiff4  # noqa: F401, PLC0415 - an extra
    except ImportError:
        return False
    return True


def make_patch(source: bytes, target: bytes) -> bytes:
    """What makes `target` of `source`.

    Raises:
        MissingExtraError: bsdiff4 is not installed.
    """
    try:
        import bsdiff4  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("making patches", "server") from error
    return bytes(bsdiff4.diff(source, target))


def apply_patch(source: Path, patch: Path, *, digest: str, size: int) -> bytes:
    """The file that a patch makes of `source`.

    Raises:
        IntegrityError: The patch is damaged, or what it makes has another size or SHA-256.
        MissingExtraError: bsdiff4 is not installed.
    """
    try:
        import bsdiff4  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("applying patches", "delta") from error
    data = patch.read_bytes()
    # its own word for the size of what it makes, before any memory is taken for it
    promised = int.from_bytes(data[24:_HEADER], "little", signed=True)
    if data[:8] != _MAGIC or promised != size or size > MAX_PATCHED:
        raise IntegrityError(f"a patch that promises {promised} bytes, not {size}")
    try:
        made = bytes(bsdiff4.patch(source.read_bytes(), data))
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise IntegrityError(f"the patch cannot be applied: {error}") from error
    if hashlib.sha256(made).hexdigest() != digest:
        raise IntegrityError(f"what the patch makes does not have the SHA-256 {digest[:12]}…")
    return made
