"""The base checkpoint: a folder of plain files and the manifest that describes them.

Never code, never pickle. The folder's identity is the SHA-256 of its `manifest.json`, which in turn names the
SHA-256 and size of every other file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from edge_sdk.errors import IncompatibleError, IntegrityError
from edge_sdk.files import sha256_file
from edge_sdk.schema import InputSpec

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
TRUNK_INT8 = "trunk.int8.onnx"
TRUNK_FP32 = "trunk.fp32.onnx"
HEAD_ONNX = "head.onnx"
HEAD_NPZ = "head.npz"
FISHER_NPZ = "fisher.npz"
MEMORY_NPZ = "memory.npz"
SELFTEST_NPZ = "selftest.npz"
REFERENCE_NPZ = "reference.npz"
CARD = "card.md"
REQUIRED = (TRUNK_INT8, TRUNK_FP32, HEAD_ONNX, HEAD_NPZ, FISHER_NPZ, MEMORY_NPZ, SELFTEST_NPZ, REFERENCE_NPZ, CARD)


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and hash of one file of the folder."""

    size: int
    sha256: str


class LatentSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the trunk's uint8 output is read: value = (q - zero_point) * scale."""

    dim: int
    scale: float
    zero_point: int


class HeadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trainable part: dense layers with ReLU between them, softmax at the end."""

    hidden: list[int] = []
    """Widths of the hidden layers; empty for a linear head."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the checkpoint and how to use it. Fields this version does not know are ignored."""

    schema: int = SCHEMA
    name: str
    release: int
    """Monotonic: a device never goes to a lower number on its own."""
    parent: str | None = None
    """Digest of the checkpoint this one was made from."""
    created: str
    task: Literal["classification", "multilabel", "regression"] = "classification"
    adapt: Literal["head", "none", "full"] = "head"
    labels: list[str]
    input: InputSpec
    latent: LatentSpec
    head: HeadSpec
    files: dict[str, FileEntry]
    metrics: dict[str, float] = {}
    toolchain: dict[str, str] = {}

    @property
    def trunk_id(self) -> str:
        """Equal for two checkpoints exactly when their latents mean the same."""
        parts = [self.files[TRUNK_INT8].sha256, self.files[TRUNK_FP32].sha256, repr(self.latent)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises:
        IntegrityError: It is not valid JSON of the manifest's form, or names a file outside the folder.
        IncompatibleError: It was written by a newer major schema.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{MANIFEST_NAME} is damaged or not a manifest: {error}") from error
    if manifest.schema != SCHEMA:
        raise IncompatibleError(f"manifest schema {manifest.schema}, this SDK reads {SCHEMA}; update the SDK")
    for name, entry in manifest.files.items():
        if name != Path(name).name or name in ("", ".", "..", MANIFEST_NAME):
            raise IntegrityError(f"{MANIFEST_NAME} names a file outside its folder: {name!r}")
        if entry.size < 0 or len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise IntegrityError(f"{MANIFEST_NAME}: size or hash of {name} is not valid")
    if missing := [name for name in REQUIRED if name not in manifest.files]:
        raise IntegrityError(f"{MANIFEST_NAME} lacks {', '.join(missing)}")
    return manifest


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is written: indented JSON with sorted keys, so that equal content gives equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


def digest_of(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def describe_folder(folder: Path, names: tuple[str, ...] = REQUIRED) -> dict[str, FileEntry]:
    """Size and hash of the named files, for a manifest."""
    return {name: FileEntry((folder / name).stat().st_size, sha256_file(folder / name)) for name in sorted(names)}


def verify_checkpoint(folder: Path) -> Manifest:
    """Check every file against the manifest and return it.

    Raises:
        IntegrityError: A file is missing, or its size or hash differs.
        IncompatibleError: The manifest's schema is newer than this SDK.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise IntegrityError(f"{folder.name} has no {MANIFEST_NAME}; is it a checkpoint folder?")
    manifest = parse_manifest(path.read_bytes())
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise IntegrityError(f"{name} is missing")
        if (size := file.stat().st_size) != entry.size:
            raise IntegrityError(f"{name} has {size} bytes, the manifest says {entry.size}")
        if (digest := sha256_file(file)) != entry.sha256:
            raise IntegrityError(f"{name} has SHA-256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…")
    return manifest
