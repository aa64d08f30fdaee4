"""The base checkpoint: a folder of plain files and the manifest that describes them.

Never code, never pickle. The folder's identity is the SHA-256 of its `manifest.json`, which in turn names the
SHA-256 and size of every other file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

from edge_sdk.errors import IncompatibleError, IntegrityError
from edge_sdk.files import sha256_file
from edge_sdk.schema import InputSpec
from edge_sdk.types import Task, Variant

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
TRUNK_INT8 = "trunk.int8.onnx"
TRUNK_FP32 = "trunk.fp32.onnx"
HEAD_ONNX = "head.onnx"
HEAD_NPZ = "head.npz"
FISHER_NPZ = "fisher.npz"
MEMORY_NPZ = "memory.npz"
MOMENTS_NPZ = "moments.npz"
"""Optional: without it the moments are those of the factory memory."""
SELFTEST_NPZ = "selftest.npz"
REFERENCE_NPZ = "reference.npz"
CARD = "card.md"
MODEL_INT8 = "model.int8.onnx"
MODEL_FP32 = "model.fp32.onnx"
REQUIRED = (TRUNK_INT8, TRUNK_FP32, HEAD_ONNX, HEAD_NPZ, FISHER_NPZ, MEMORY_NPZ, SELFTEST_NPZ, REFERENCE_NPZ, CARD)
"""Of a model that is split."""
REQUIRED_WHOLE = (MODEL_FP32, SELFTEST_NPZ, REFERENCE_NPZ, CARD)
"""Of one that is not (adapt=none)."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and hash of one file of the folder."""

    size: int
    sha256: str


class LatentSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the trunk's uint8 output is read: value = (q - zero_point) * scale."""

    dim: int = 0
    """Width; 0: the model is not split (adapt=none)."""
    scale: float = 1.0
    zero_point: int = 0


class HeadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trainable part: dense layers with ReLU between them; the task says what follows the last one."""

    hidden: list[int] = []
    """Widths of the hidden layers; empty for a linear head."""


class TargetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One target of a regression, whose head puts out standardised numbers: value = number * std + mean."""

    mean: float
    std: float
    tolerance: float
    """Absolute error, in the target's units, up to which a prediction counts as right."""


class StateSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a recurrent model carries from one call to the next; zeros at first."""

    input: str
    """Name of the graph's input."""
    output: str
    """Name of the output that becomes the next call's input."""
    shape: list[int]
    """As the graph takes it, batch dimension included and 1."""
    dtype: Literal["float32", "int64", "int32", "uint8"] = "float32"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What is in the checkpoint and how to use it. Fields this version does not know are ignored."""

    schema: int = SCHEMA
    name: str
    release: int
    """Monotonic: a device never goes to a lower number on its own."""
    parent: str | None = None
    """Digest of the checkpoint this one was made from."""
    created: str
    task: Task = "classification"
    adapt: Literal["head", "none", "full"] = "head"
    labels: list[str]
    """One for each output: labels, or the names of the regression's targets; none for a raw model."""
    input: InputSpec
    more_inputs: list[InputSpec] = []
    """Further inputs of a model with adapt=none."""
    state: list[StateSpec] = []
    """Of a recurrent model with adapt=none."""
    targets: list[TargetSpec] = []
    """Of a regression, in the order of `labels`."""
    thresholds: list[float] = []
    """Of a multi-label model, in the order of `labels`: the probability from which a label counts as present."""
    latent: LatentSpec = LatentSpec()
    head: HeadSpec = HeadSpec()
    serve: Literal["auto", "fp32"] = "auto"
    """What a device without a wish of its own serves: the faster variant that is right there, or float because INT8 was
    found to lose too much."""
    files: dict[str, FileEntry]
    metrics: dict[str, float] = {}
    toolchain: dict[str, str] = {}

    @cached_property
    def trunk_id(self) -> str:
        """Equal for two checkpoints exactly when one can read the other's rows: latents, and truths about them.

        A label that a classification does not know is a new one. Of other tasks a truth speaks of all outputs at once,
        so that it cannot be read where there are others.
        """
        parts = [self.files[name].sha256 for name in self.model_files.values()]
        outputs = "" if self.task == "classification" else repr((self.task, self.labels))
        return hashlib.sha256("".join([*parts, repr(self.latent), outputs]).encode()).hexdigest()

    @cached_property
    def model_files(self) -> dict[Variant, str]:
        """The file that holds the trunk, or the whole model, in each variant there is; INT8 first."""
        names: dict[Variant, str] = (
            {"int8": MODEL_INT8, "fp32": MODEL_FP32}
            if self.adapt == "none"
            else {"int8": TRUNK_INT8, "fp32": TRUNK_FP32}
        )
        return {variant: name for variant, name in names.items() if name in self.files}

    @property
    def learns(self) -> bool:
        """Whether a device learns on it."""
        return self.adapt == "head" and self.task != "raw"

    @property
    def required(self) -> tuple[str, ...]:
        """The files that a checkpoint of this kind cannot do without."""
        return REQUIRED_WHOLE if self.adapt == "none" else REQUIRED


_READ = msgspec.json.Decoder(Manifest)
"""Built here: msgspec learns of a type when it first reads one, and two threads that do so at once end the process."""


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises:
        IntegrityError: It is not valid JSON of the manifest's form, or names a file outside the folder.
        IncompatibleError: It was written by a newer major schema.
    """
    try:
        manifest = _READ.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{MANIFEST_NAME} is damaged or not a manifest: {error}") from error
    if manifest.schema != SCHEMA:
        raise IncompatibleError(f"manifest schema {manifest.schema}, this SDK reads {SCHEMA}; update the SDK")
    for name, entry in manifest.files.items():
        if name != Path(name).name or name in ("", ".", "..", MANIFEST_NAME):
            raise IntegrityError(f"{MANIFEST_NAME} names a file outside its folder: {name!r}")
        if entry.size < 0 or len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise IntegrityError(f"{MANIFEST_NAME}: size or hash of {name} is not valid")
    if missing := [name for name in manifest.required if name not in manifest.files]:
        raise IntegrityError(f"{MANIFEST_NAME} lacks {', '.join(missing)}")
    if problem := _contradiction(manifest):
        raise IntegrityError(f"{MANIFEST_NAME} contradicts itself: {problem}")
    return manifest


def _contradiction(manifest: Manifest) -> str:
    """What of the task does not fit the rest, or nothing."""
    task, count = manifest.task, len(manifest.labels)
    if len(set(manifest.labels)) != count:
        return "a label appears more than once"
    problems = {
        f"adapt={manifest.adapt} with a latent of {manifest.latent.dim} values": (manifest.adapt == "none")
        != (manifest.latent.dim == 0),
        "task=raw with adapt other than none": task == "raw" and manifest.adapt != "none",
        f"task={task} with {count} labels": (task == "raw") != (count == 0),
        f"task={task} with {len(manifest.targets)} targets": len(manifest.targets)
        != (count if task == "regression" else 0),
        f"task={task} with {len(manifest.thresholds)} thresholds": len(manifest.thresholds)
        != (count if task == "multilabel" else 0),
        "a model that is split has one input and no state": manifest.adapt != "none"
        and bool(manifest.more_inputs or manifest.state),
        "a target needs std > 0 and tolerance >= 0": any(
            not (target.std > 0 and target.tolerance >= 0) for target in manifest.targets
        ),
    }
    return next((problem for problem, is_so in problems.items() if is_so), "")


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is written: indented JSON with sorted keys, so that equal content gives equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


def digest_of(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def describe_folder(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and hash of the named files, for a manifest."""
    return {name: FileEntry((folder / name).stat().st_size, sha256_file(folder / name)) for name in sorted(names)}


def verify_checkpoint(folder: Path, *, serves: Variant | None = None) -> Manifest:
    """Check every file against the manifest and return it.

    Args:
        folder: A checkpoint.
        serves: Spare the hash of the other variant's model, which a device that serves this one never opens; it must
            be there in full. Half of a start's time goes to hashing, and the float model is the largest file.

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
        if serves is not None and name == manifest.model_files.get("fp32" if serves == "int8" else "int8"):
            continue
        if (digest := sha256_file(file)) != entry.sha256:
            raise IntegrityError(f"{name} has SHA-256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…")
    return manifest
