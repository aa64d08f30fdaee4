"""What a learner is given and what it gives back."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.errors import ConfigError, EmptyBufferError, IntegrityError, MissingExtraError
from edge_sdk.files import load_npz, npz_bytes, replace_file
from edge_sdk.head import Head, Weights
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import LatentSpec
from edge_sdk.types import AnyArray, FloatArray, LatentArray, Task

JOB_NPZ = "job.npz"
JOB_JSON = "job.json"
CHALLENGER = "challenger.npz"
RESULT_JSON = "result.json"


@dataclass(frozen=True)
class Rows:
    """Labelled samples.

    Attributes:
        latents: uint8 [N, D].
        targets: int64 [N], numbers of labels (classification); float32 [N, C], 0 or 1 (multi-label); float32 [N, T],
            standardised (regression).
        weights: float32 [N], how much each counts. Below zero, of a classification alone: the label is *not* this one.
    """

    latents: LatentArray
    targets: AnyArray
    weights: FloatArray

    def __len__(self) -> int:
        return len(self.latents)

    def __add__(self, other: Rows) -> Rows:
        """These, and then the others."""
        return Rows(
            np.concatenate([self.latents, other.latents]),
            np.concatenate([self.targets, other.targets]),
            np.concatenate([self.weights, other.weights]),
        )

    def take(self, rows: AnyArray) -> Rows:
        """Some of them, by position or mask."""
        return Rows(self.latents[rows], self.targets[rows], self.weights[rows])


@dataclass(frozen=True)
class LearnJob:
    """Everything a learner needs; a pure function of it gives the challenger.

    Attributes:
        champion: Where learning starts, already grown to all labels.
        base: The checkpoint's own head, grown likewise.
        anchor: Weights that EWC holds on to, same shapes.
        fisher: Importance of each of them, >= 0.
        fresh: What is new.
        replay: What must not be forgotten; may be empty.
        moments: Of all that was known before the fresh rows, for the same labels; what the last layer of `base` is
            given are its features. Of no features for a learner that does not read them, see `needs_moments`.
        fresh_mass: float32 [N], how much each fresh row adds to the moments, >= 0.
        latent: How latents are read.
        task: What the outputs mean.
        config: Which learner, and its settings.
        seed: Of all chance in the learner.
    """

    champion: Head
    base: Head
    anchor: Weights
    fisher: Weights
    fresh: Rows
    replay: Rows
    moments: Moments
    fresh_mass: FloatArray
    latent: LatentSpec
    task: Task
    config: LearnConfig
    seed: int

    def counted(self) -> LearnJob:
        """The job without the rows whose weight is 0: to a learner they are as if they were not there.

        Raises:
            EmptyBufferError: No fresh row counts.
        """
        fresh, replay = (np.flatnonzero(rows.weights) for rows in (self.fresh, self.replay))
        if not len(fresh):
            raise EmptyBufferError("there are no fresh rows to learn from")
        return replace(
            self, fresh=self.fresh.take(fresh), replay=self.replay.take(replay), fresh_mass=self.fresh_mass[fresh]
        )

    def save(self, folder: Path) -> None:
        """Write the job as two files, for a learner in another process."""
        parts = {"champion": self.champion.weights, "base": self.base.weights, "anchor": self.anchor,
                 "fisher": self.fisher, "fresh": vars(self.fresh), "replay": vars(self.replay),
                 "moments": self.moments.arrays()}  # fmt: skip
        arrays = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
        replace_file(folder / JOB_NPZ, npz_bytes({**arrays, "fresh_mass": self.fresh_mass}))
        header = _Header(list(self.champion.labels), self.latent, self.task, self.config, self.seed)
        replace_file(folder / JOB_JSON, msgspec.json.encode(header))

    @classmethod
    def load(cls, folder: Path) -> LearnJob:
        """Read what `save` wrote.

        Raises:
            IntegrityError: A file is missing or damaged, or its parts do not fit each other.
        """
        try:
            header = msgspec.json.decode((folder / JOB_JSON).read_bytes(), type=_Header)
            parts: dict[str, dict[str, AnyArray]] = {}
            for key, value in load_npz(folder / JOB_NPZ).items():
                part, _, name = key.partition(".")
                parts.setdefault(part, {})[name] = value
            labels = tuple(header.labels)
            job = cls(
                champion=Head(parts["champion"], labels),
                base=Head(parts["base"], labels),
                anchor=parts["anchor"],
                fisher=parts["fisher"],
                fresh=Rows(**parts["fresh"]),
                replay=Rows(**parts["replay"]),
                moments=Moments.of_arrays(parts["moments"], labels),
                fresh_mass=parts["fresh_mass"][""],
                latent=header.latent,
                task=header.task,
                config=header.config,
                seed=header.seed,
            )
        except (OSError, KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
            raise IntegrityError(f"the learning job in {folder.name} is damaged: {error}") from error
        if not job.fits:
            raise IntegrityError(f"the learning job in {folder.name} is damaged: its rows do not fit its head")
        return job

    @property
    def fits(self) -> bool:
        """Whether base, anchor, Fisher information, rows and moments are those of the champion."""
        champion = self.champion
        shapes = {key: value.shape for key, value in champion.weights.items()}
        others = (self.base.weights, self.anchor, self.fisher)
        width = champion.weights[f"W{champion.depth - 1}"].shape
        return (
            all({key: value.shape for key, value in part.items()} == shapes for part in others)
            and all(self._reads(rows) for rows in (self.fresh, self.replay))
            and self.fresh_mass.shape == (len(self.fresh),)
            and self.moments.xy.shape in (width, (0, width[1]))
        )

    def _reads(self, rows: Rows) -> bool:
        count, outputs = len(rows), len(self.champion.labels)
        if rows.latents.shape != (count, self.champion.latent_dim) or rows.weights.shape != (count,):
            return False
        if self.task == "classification":
            targets = rows.targets
            return targets.shape == (count,) and bool(((targets >= 0) & (targets < outputs)).all())
        return rows.targets.shape == (count, outputs)


class _Header(msgspec.Struct, frozen=True):
    """The part of a job that is not arrays."""

    labels: list[str]
    latent: LatentSpec
    task: Task
    config: LearnConfig
    seed: int


class LearnResult(msgspec.Struct, frozen=True):
    """What a learner says about its run."""

    error: str = ""
    """Empty, or why there is no challenger."""
    steps: int = 0
    first_loss: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0
    """CPU time."""
    rows: int = 0
    """Fresh rows learned from, of those that the job has."""
    note: str = ""
    """What else a person should know of the run."""
    wrong: list[int] = []
    """Positions of fresh rows left out because their label contradicts what the others say."""


Between = Callable[[], None]
"""Called between micro-batches: learning pauses there."""


def nothing_between() -> None:
    """No pause."""


class Learner(Protocol):
    """Trains a challenger. Pure: the same job gives the same bytes.

    Contract (held by `edge_sdk.checks.check_learner`): the challenger has the champion's labels and shapes; the job is
    only read; rows of weight 0 have no influence; `between` is called before every micro-batch and may raise.
    """

    def __call__(self, job: LearnJob, *, between: Between = nothing_between) -> tuple[Head, LearnResult]:
        """The challenger and how it came about.

        Raises:
            EmptyBufferError: The job has no fresh rows that count.
            DivergedError: Loss or weights became non-finite.
        """
        ...


LEARNERS = {
    "slda": "edge_sdk.learn.slda:train_slda",
    "hybrid": "edge_sdk.learn.hybrid:train_hybrid",
    "sgd": "edge_sdk.learn.sgd:train_sgd",
    "torch": "edge_sdk.learn.torch_learner:train_torch",
}
"""By the name used in the configuration."""


_WITHOUT_MOMENTS = ("sgd", "torch")


def needs_moments(name: str) -> bool:
    """Whether the learner of a configuration reads moments; an app's own may."""
    return name not in _WITHOUT_MOMENTS


def check_learner_name(name: str) -> None:
    """See that the learner of a configuration can be found, and import nothing of it: torch is large.

    Raises:
        ConfigError: There is none of this name, or no such module.
        MissingExtraError: It needs torch, which is not installed.
    """
    module, _, function = LEARNERS.get(name, name).partition(":")
    if not (module and function):
        raise ConfigError(f"learn.learner: {name!r} is none of {', '.join(LEARNERS)} and no module:function")
    try:
        if module not in sys.modules and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}")
    except (ImportError, ValueError) as error:  # ValueError: a relative name
        raise ConfigError(f"learn.learner: {name!r} cannot be imported: {error}") from error
    if name == "torch" and "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        raise MissingExtraError('learn.learner = "torch"', "train")


def load_learner(name: str) -> Learner:
    """The learner of a configuration: one of `LEARNERS`, or `module:function` of the app's own.

    Raises:
        ConfigError: There is none of this name, or it cannot be imported.
        MissingExtraError: It needs torch, which is not installed.
    """
    check_learner_name(name)
    module, _, function = LEARNERS.get(name, name).partition(":")
    try:
        found: Learner = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative name
        raise ConfigError(f"learn.learner: {name!r} cannot be imported: {error}") from error
    return found
