"""The checkpoint folder: everything a device needs to serve, watch and learn, in plain files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np

from edge_quantize.card import CardFacts, CardText, render_card
from edge_quantize.compare import VARIANTS, Accuracy, encode, predict
from edge_quantize.data import Dataset
from edge_quantize.errors import ParityError
from edge_quantize.quantize import Trunks, head_graph
from edge_sdk import __version__
from edge_sdk.drift.reference import Reference
from edge_sdk.errors import ConfigError, IncompatibleError
from edge_sdk.files import fsync_folder, npz_bytes, replace_file, storage_error
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.ewc import fisher_diagonal
from edge_sdk.manifest import (
    CARD,
    FISHER_NPZ,
    HEAD_NPZ,
    HEAD_ONNX,
    MANIFEST_NAME,
    MEMORY_NPZ,
    REFERENCE_NPZ,
    SELFTEST_NPZ,
    TRUNK_FP32,
    TRUNK_INT8,
    HeadSpec,
    Manifest,
    describe_folder,
    digest_of,
    manifest_bytes,
    verify_checkpoint,
)
from edge_sdk.runtime import OnnxRuntime, self_test
from edge_sdk.schema import InputSpec
from edge_sdk.types import FloatArray, IndexArray, LatentArray

MIN_PER_CLASS = 40
"""The device splits factory memory into rows to replay and rows to judge by, and needs 20 of each."""
SELFTEST_ROWS = 32
FISHER_ROWS = 4096
_TOOLS = ("numpy", "onnx", "onnxruntime", "torch")


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much factory memory ships."""

    per_class: int = MIN_PER_CLASS
    """Rows of each label; all of them where there are fewer."""
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        """Check the bound.

        Raises:
            ValueError: Fewer than 40 rows a class.
        """
        if self.per_class < MIN_PER_CLASS:
            raise ValueError(f"per_class must be at least {MIN_PER_CLASS}, got {self.per_class}")


def pack_checkpoint(
    target: Path,
    *,
    trunks: Trunks,
    head: Head,
    data: Dataset,
    input_spec: InputSpec,
    name: str,
    release: int,
    created: str,
    parent: Path | None = None,
    seed: int = 0,
    memory: Memory | None = None,
    card: CardText | None = None,
) -> Manifest:
    """Write a checkpoint folder and check it as a device would.

    The same arguments give the same bytes. The folder appears under its name only when it is complete and has
    passed its own self-test.

    Args:
        target: The folder to make; must not exist.
        trunks: From `quantize_trunk`, or of another checkpoint.
        head: The head to ship. Its labels are the checkpoint's.
        data: Rows in the app's units.
        input_spec: The input contract with its preprocessing.
        name: What the model is called.
        release: Number of the release, >= 1 and above the parent's.
        created: When, as ISO 8601 text; given, so that nothing depends on the clock.
        parent: Folder of the checkpoint this one replaces.
        seed: For the samples drawn.
        memory: How much factory memory ships.
        card: What only a person can say about the model.

    Raises:
        ConfigError: The target exists, a label repeats, the release number is not above the parent's, or memory
            does not fit its bound.
        DataError: The rows cannot be used.
        IncompatibleError: The head does not fit the trunk's latent.
        ParityError: INT8 and FP32 agree on no held-out row.
        SelfTestError: The packed model does not reproduce its own outputs.
    """
    refuse_existing(target)
    if repeated := [label for i, label in enumerate(head.labels) if label in head.labels[:i]]:
        raise ConfigError(f"labels must differ: {repeated[0]!r} appears more than once")
    if head.latent_dim != trunks.latent.dim:
        raise IncompatibleError(f"the head takes {head.latent_dim} values, the trunk puts out {trunks.latent.dim}")
    data = data.checked(input_spec, head.labels)
    draft = Manifest(
        name=name,
        release=release,
        parent=_parent_digest(parent, release),
        created=created,
        labels=list(head.labels),
        input=input_spec,
        latent=trunks.latent,
        head=HeadSpec([head.weights[f"b{i}"].shape[0] for i in range(head.depth - 1)]),
        files={},
        toolchain=_toolchain(),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise storage_error(error, f"cannot create {target}") from error
    try:
        manifest = _write(staging, draft, trunks, head, data, np.random.default_rng(seed), memory or Memory(), card)
        verify_checkpoint(staging)
        for variant in VARIANTS:
            self_test(staging, manifest, OnnxRuntime(staging, variant=variant), variant=variant)
        staging.chmod(0o755)
        try:
            staging.rename(target)
            fsync_folder(target.parent)
        except OSError as error:
            raise storage_error(error, f"cannot create {target}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def refuse_existing(target: Path) -> None:
    """Checkpoints are never overwritten.

    Raises:
        ConfigError: `target` exists.
    """
    if target.exists():
        raise ConfigError(f"{target} already exists; checkpoints are never overwritten, choose another")


def repack_checkpoint(
    parent: Path,
    target: Path,
    *,
    head: Head,
    data: Dataset,
    release: int,
    created: str,
    seed: int = 0,
    memory: Memory | None = None,
    card: CardText | None = None,
) -> Manifest:
    """A new release on the same trunk: its files are byte-identical, so devices keep what they learned.

    Fisher information, factory memory, self-test and reference are taken anew from `data`.

    Args:
        parent: The checkpoint whose trunk, input contract and name are kept.
        target: The folder to make; must not exist.
        head: The new head, trained on this trunk's latents (`encode`). It may have more labels.
        data: Rows in the app's units.
        release: Above the parent's.
        created: When, as ISO 8601 text.
        seed: For the samples drawn.
        memory: How much factory memory ships.
        card: What only a person can say about the model.

    Raises:
        IntegrityError: The parent is damaged.
        EdgeError: As in `pack_checkpoint`.
    """
    base = verify_checkpoint(parent)
    return pack_checkpoint(
        target,
        trunks=Trunks.of_checkpoint(parent, base),
        head=head,
        data=data,
        input_spec=base.input,
        name=base.name,
        release=release,
        created=created,
        parent=parent,
        seed=seed,
        memory=memory,
        card=card,
    )


def _write(
    folder: Path,
    draft: Manifest,
    trunks: Trunks,
    head: Head,
    data: Dataset,
    rng: np.random.Generator,
    memory: Memory,
    card: CardText | None,
) -> Manifest:
    """Fill the folder, the manifest last."""
    replace_file(folder / TRUNK_INT8, trunks.int8)
    replace_file(folder / TRUNK_FP32, trunks.fp32)
    replace_file(folder / HEAD_ONNX, head_graph(head, trunks.latent))
    replace_file(folder / HEAD_NPZ, head.to_bytes())

    train_latents = encode(folder, data.train_x, spec=draft.input)
    chosen = rng.permutation(len(train_latents))[:FISHER_ROWS]
    fisher = fisher_diagonal(head, dequantize(train_latents[chosen], trunks.latent))
    replace_file(folder / FISHER_NPZ, npz_bytes(fisher))
    kept = _memory_rows(data.train_y, len(head.labels), train_latents.shape[1], memory, rng)
    replace_file(folder / MEMORY_NPZ, npz_bytes({"latents": train_latents[kept], "labels": data.train_y[kept]}))

    int8, fp32 = (encode(folder, data.holdout_x, spec=draft.input, variant=variant) for variant in VARIANTS)
    probabilities, probabilities_fp32 = predict(folder, int8), predict(folder, fp32)
    replace_file(folder / SELFTEST_NPZ, _selftest(data.holdout_x, int8, fp32, probabilities, probabilities_fp32, rng))
    correct = probabilities.argmax(1) == data.holdout_y
    replace_file(folder / REFERENCE_NPZ, Reference.build(data.holdout_x, probabilities, correct).to_bytes())

    facts = CardFacts(
        train_rows=len(data.train_y),
        memory_rows=len(kept),
        int8=Accuracy.of(correct),
        fp32=Accuracy.of(probabilities_fp32.argmax(1) == data.holdout_y),
        agreement=float((probabilities.argmax(1) == probabilities_fp32.argmax(1)).mean()),
        by_label={label: Accuracy.of(correct[data.holdout_y == i]) for i, label in enumerate(head.labels)},
    )
    replace_file(folder / CARD, render_card(draft, facts, card or CardText()).encode())
    metrics = {
        "int8_accuracy": facts.int8.value,
        "int8_accuracy_low": facts.int8.low,
        "int8_accuracy_high": facts.int8.high,
        "fp32_accuracy": facts.fp32.value,
        "agreement": facts.agreement,
        "holdout_rows": float(facts.int8.rows),
    }
    manifest = msgspec.structs.replace(draft, files=describe_folder(folder), metrics=metrics)
    replace_file(folder / MANIFEST_NAME, manifest_bytes(manifest))
    return manifest


def _memory_rows(y: IndexArray, classes: int, dim: int, memory: Memory, rng: np.random.Generator) -> IndexArray:
    """Which training rows ship as factory memory: the same number of each class, drawn at random."""
    rows = [np.flatnonzero(y == label) for label in range(classes)]
    kept = np.concatenate([rng.permutation(of_label)[: memory.per_class] for of_label in rows])
    size = len(kept) * (dim + y.itemsize)
    if size > memory.max_bytes:
        raise ConfigError(
            f"factory memory of {memory.per_class} rows a class takes {size} bytes, max_bytes is "
            f"{memory.max_bytes}; raise it, or lower per_class (not below {MIN_PER_CLASS})"
        )
    return np.sort(kept)


def _selftest(
    x: FloatArray,
    int8: LatentArray,
    fp32: LatentArray,
    probabilities: FloatArray,
    probabilities_fp32: FloatArray,
    rng: np.random.Generator,
) -> bytes:
    """Rows on which a healthy device must reproduce the label with either trunk.

    Rows where the variants disagree, or where two labels are nearly tied, would fail on a healthy device.
    """
    agreeing = np.flatnonzero(probabilities.argmax(1) == probabilities_fp32.argmax(1))
    if not len(agreeing):
        raise ParityError("INT8 and FP32 agree on no held-out row; calibrate on rows like those the model will see")
    top = np.sort(probabilities[agreeing], axis=1)
    margin = top[:, -1] - (top[:, -2] if top.shape[1] > 1 else 0)
    clear = agreeing[np.argsort(-margin, kind="stable")][: max(SELFTEST_ROWS, len(agreeing) // 2)]
    rows = np.sort(rng.permutation(clear)[:SELFTEST_ROWS])
    return npz_bytes(
        {
            "x": x[rows],
            "latents_int8": int8[rows],
            "latents_fp32": fp32[rows],
            "probabilities": probabilities[rows],
        }
    )


def _toolchain() -> dict[str, str]:
    versions = {"edge-sdk": __version__}
    for tool in _TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):  # packing alone does without torch
            versions[tool] = metadata.version(tool)
    return versions


def _parent_digest(parent: Path | None, release: int) -> str | None:
    if release < 1:
        raise ConfigError(f"release must be 1 or more, got {release}")
    if parent is None:
        return None
    base = verify_checkpoint(parent)
    if release <= base.release:
        raise ConfigError(f"release {release} does not follow the parent's release {base.release}; choose a higher one")
    return digest_of((parent / MANIFEST_NAME).read_bytes())
