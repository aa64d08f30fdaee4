"""What learning on a device starts from, beside the head: factory memory, Fisher information and moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from edge_sdk.errors import ConfigError, IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head, Weights, dequantize
from edge_sdk.learn.ewc import fisher_diagonal
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import FISHER_NPZ, HEAD_NPZ, MEMORY_NPZ, MOMENTS_NPZ, Manifest
from edge_sdk.tasks import standardise
from edge_sdk.types import AnyArray, IndexArray, LatentArray, Task

MIN_PER_CLASS = 40
"""The device splits factory memory into rows to replay and rows to judge by, and needs 20 of each."""
FISHER_ROWS = 4096
MOMENTS_ROWS = 20_000
"""More tell hardly more of means and a covariance, and what a device learns would weigh too little beside them."""
MIN_MOMENTS_ROWS = 50
_REGRESSION_CELLS = 10
"""Factory memory of a regression has as many rows of each tenth of its first target as others have of a label."""
_PART = 2048


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much ships of what the factory saw."""

    per_class: int = MIN_PER_CLASS
    """Rows of each label; all of them where there are fewer."""
    max_bytes: int = 1 << 20
    moments_bytes: int = 1 << 20
    """Most that moments may take; where they would take more, devices take them from the factory memory."""

    def __post_init__(self) -> None:
        """Check the bound.

        Raises:
            ValueError: Fewer than 40 rows a class.
        """
        if self.per_class < MIN_PER_CLASS:
            raise ValueError(f"per_class must be at least {MIN_PER_CLASS}, got {self.per_class}")


@dataclass(frozen=True)
class Start:
    """Files that learning starts from; none of a model that is served whole.

    Attributes:
        files: Their content, by name.
        memory_rows: Rows in the factory memory.
        moments_rows: Rows that the moments are sums over; 0: no moments ship.
        no_moments: Why not.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    memory_rows: int = 0
    moments_rows: int = 0
    no_moments: str = ""


def learning_start(
    head: Head, latents: LatentArray, y: AnyArray, *, manifest: Manifest, memory: Memory, rng: np.random.Generator
) -> Start:
    """Factory memory, Fisher information and moments of a head.

    Args:
        head: The head that ships.
        latents: uint8 [N, D], of all rows it was trained on.
        y: Their truth, as `Dataset.checked` returns it.
        manifest: Its task, latent and targets are used.
        memory: How much ships.
        rng: Draws rows.

    Raises:
        ConfigError: The factory memory does not fit its bound.
    """
    chosen = rng.permutation(len(latents))[:FISHER_ROWS]
    fisher = fisher_diagonal(head, dequantize(latents[chosen], manifest.latent), task=manifest.task)
    truth = y.astype(np.uint8) if manifest.task == "multilabel" else y  # eight times smaller than as int64
    kept = memory_rows(truth, latents.shape[1], manifest.task, memory, rng)
    files = {
        FISHER_NPZ: npz_bytes(fisher),
        MEMORY_NPZ: npz_bytes({"latents": latents[kept], "labels": truth[kept]}),
    }
    if reason := _no_moments(head, len(latents), memory):
        return Start(files, len(kept), no_moments=reason)
    rows = moments_rows(len(latents), kept, rng)
    files[MOMENTS_NPZ] = moments_of(head, latents[rows], y[rows], manifest=manifest).to_bytes()
    return Start(files, len(kept), len(rows))


def memory_rows(y: AnyArray, dim: int, task: Task, memory: Memory, rng: np.random.Generator) -> IndexArray:
    """Which training rows ship as factory memory, drawn at random; int64, sorted.

    Classification: the same number of each label. Multi-label: so many that have each label, and so many that have
    none. Regression: so many of each tenth of the first target.

    Args:
        y: As it ships: int64 [N], uint8 [N, C] or float32 [N, T].
        dim: Width of the latent.
        task: What y means.
        memory: How many, and how large at most.
        rng: Draws them.

    Raises:
        ConfigError: They do not fit the bound.
    """
    if task == "classification":
        groups = [np.flatnonzero(y == label) for label in range(int(y.max()) + 1)]
    elif task == "multilabel":
        groups = [np.flatnonzero(y[:, label]) for label in range(y.shape[1])] + [np.flatnonzero(~y.any(axis=1))]
    else:
        groups = np.array_split(np.argsort(y[:, 0], kind="stable"), _REGRESSION_CELLS)
    kept = np.unique(np.concatenate([rng.permutation(rows)[: memory.per_class] for rows in groups]))
    size = len(kept) * (dim + y[:1].nbytes)
    if size > memory.max_bytes:
        raise ConfigError(
            f"factory memory of {memory.per_class} rows a class takes {size} bytes, max_bytes is "
            f"{memory.max_bytes}; raise it, or lower per_class (not below {MIN_PER_CLASS})"
        )
    return kept.astype(np.int64)


def moments_rows(count: int, kept: IndexArray, rng: np.random.Generator) -> IndexArray:
    """Which of `count` training rows the moments are sums over; int64, sorted.

    Those of the factory memory are among them: no rare label is missed, and a device can take out, by subtraction,
    the rows it judges by.
    """
    if count <= MOMENTS_ROWS:
        return np.arange(count)
    others = np.setdiff1d(np.arange(count), kept)
    return np.sort(np.concatenate([kept, rng.permutation(others)[: max(0, MOMENTS_ROWS - len(kept))]]))


def moments_of(head: Head, latents: LatentArray, y: AnyArray, *, manifest: Manifest) -> Moments:
    """Moments of labelled latents, each with weight 1: features are what the head's last layer is given.

    Args:
        head: Its hidden layers are used.
        latents: uint8 [N, D].
        y: Their truth, as `Dataset.checked` returns it. A regression's values are standardised.
        manifest: Its latent and targets are used.
    """
    targets = standardise(y, manifest) if manifest.task == "regression" else y
    total = Moments.none(head.labels, _width(head))
    for start in range(0, len(latents), _PART):  # so that not all rows are there in double precision at once
        part = slice(start, start + _PART)
        features = head.hidden(dequantize(latents[part], manifest.latent))
        total += Moments.of(features, targets[part], np.ones(len(features)), head.labels)
    return total


def _no_moments(head: Head, rows: int, memory: Memory) -> str:
    """Why moments do not ship, or nothing."""
    if rows < MIN_MOMENTS_ROWS:
        return f"{rows} training rows, they take {MIN_MOMENTS_ROWS}"
    width, outputs = _width(head), len(head.labels)
    size = 4 * (width * (width + 1) // 2 + width * (outputs + 1) + outputs)
    if size > memory.moments_bytes:
        return f"of {width} values they take {size} bytes, moments_bytes is {memory.moments_bytes}"
    return ""


def _width(head: Head) -> int:
    """Of what the last layer is given."""
    return int(head.weights[f"W{head.depth - 1}"].shape[0])


# ---- check


def check_learning(folder: Path, manifest: Manifest) -> str:
    """Whether all that learning starts from fits the head; what it is, in a few words.

    Args:
        folder: A checkpoint that has been verified, and learns.
        manifest: Its manifest.

    Raises:
        IntegrityError: A file is damaged or does not fit; the message names it.
    """
    head = Head.load(folder / HEAD_NPZ)
    if list(head.labels) != manifest.labels or head.latent_dim != manifest.latent.dim:
        raise IntegrityError(f"{HEAD_NPZ}: {head.latent_dim} values for {len(head.labels)} labels, the manifest says "
                             f"{manifest.latent.dim} for {len(manifest.labels)}, by name")  # fmt: skip
    rows = _check_memory(load_npz(folder / MEMORY_NPZ), manifest)
    _check_fisher(load_npz(folder / FISHER_NPZ), head)
    if MOMENTS_NPZ not in manifest.files:
        return f"{rows} rows of factory memory, no moments"
    moments = Moments.load(folder / MOMENTS_NPZ)
    if list(moments.labels) != manifest.labels or len(moments.x) != _width(head) or moments.mass <= 0:
        raise IntegrityError(f"{MOMENTS_NPZ}: {moments.rows:g} rows of {len(moments.x)} values, labels "
                             f"{', '.join(moments.labels)}: the head's last layer takes {_width(head)} values for "
                             f"{', '.join(head.labels)}")  # fmt: skip
    return f"{rows} rows of factory memory, moments of {moments.rows:g}"


def _check_memory(arrays: dict[str, AnyArray], manifest: Manifest) -> int:
    if missing := {"latents", "labels"} - arrays.keys():
        raise IntegrityError(f"{MEMORY_NPZ} lacks {', '.join(sorted(missing))}")
    latents, labels = arrays["latents"], arrays["labels"]
    outputs = len(manifest.labels)
    if latents.dtype != np.uint8 or latents.ndim != 2 or latents.shape[1] != manifest.latent.dim or not len(latents):
        raise IntegrityError(f"{MEMORY_NPZ}: latents are {latents.dtype} {latents.shape}, expected rows of uint8 "
                             f"{manifest.latent.dim}")  # fmt: skip
    shape = (len(latents),) if manifest.task == "classification" else (len(latents), outputs)
    if manifest.task == "regression":
        fits = labels.dtype.kind == "f" and bool(np.isfinite(labels).all())
    else:
        most = outputs if manifest.task == "classification" else 2
        fits = labels.dtype.kind in "iu" and bool(((labels >= 0) & (labels < most)).all())
    if labels.shape != shape or not fits:
        raise IntegrityError(f"{MEMORY_NPZ}: labels {labels.dtype} {labels.shape} are not the truth of {len(latents)} "
                             f"rows of a {manifest.task} with {outputs} outputs")  # fmt: skip
    return len(latents)


def _check_fisher(fisher: Weights, head: Head) -> None:
    expected = {key: value.shape for key, value in head.weights.items()}
    if {key: value.shape for key, value in fisher.items()} != expected:
        raise IntegrityError(f"{FISHER_NPZ}: its arrays are not those of the head")
    for key, value in fisher.items():
        if not (np.isfinite(value).all() and (value >= 0).all()):
            raise IntegrityError(f"{FISHER_NPZ}: {key} holds numbers that are negative or not finite")
