"""What a learner is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from edge_sdk.config import LearnConfig
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes, replace_file
from edge_sdk.head import Head, Weights
from edge_sdk.manifest import LatentSpec
from edge_sdk.types import IndexArray, LatentArray

JOB_NPZ = "job.npz"
JOB_JSON = "job.json"
CHALLENGER = "challenger.npz"
RESULT_JSON = "result.json"


@dataclass(frozen=True)
class LearnJob:
    """Everything a learner needs; a pure function of it gives the challenger.

    Attributes:
        champion: Where learning starts, already grown to all labels.
        anchor: Weights that EWC holds on to, same shapes.
        fisher: Importance of each of them, >= 0.
        fresh_latents: uint8 [N, D], what is new.
        fresh_labels: int64 [N].
        replay_latents: uint8 [M, D], what must not be forgotten; M may be 0.
        replay_labels: int64 [M].
        latent: How latents are read.
        config: Learning rate, lambda, batch mix, passes.
        seed: Of all chance in the learner.
    """

    champion: Head
    anchor: Weights
    fisher: Weights
    fresh_latents: LatentArray
    fresh_labels: IndexArray
    replay_latents: LatentArray
    replay_labels: IndexArray
    latent: LatentSpec
    config: LearnConfig
    seed: int

    def save(self, folder: Path) -> None:
        """Write the job as two files, for a learner in another process."""
        arrays = {f"champion.{key}": value for key, value in self.champion.weights.items()}
        arrays |= {f"anchor.{key}": value for key, value in self.anchor.items()}
        arrays |= {f"fisher.{key}": value for key, value in self.fisher.items()}
        rows = {
            "fresh_latents": self.fresh_latents,
            "fresh_labels": self.fresh_labels,
            "replay_latents": self.replay_latents,
            "replay_labels": self.replay_labels,
        }
        replace_file(folder / JOB_NPZ, npz_bytes({**arrays, **rows}))
        header = JobHeader(list(self.champion.labels), self.latent, self.config, self.seed)
        replace_file(folder / JOB_JSON, msgspec.json.encode(header))

    @classmethod
    def load(cls, folder: Path) -> LearnJob:
        """Read what `save` wrote.

        Raises:
            IntegrityError: A file is missing or damaged, or its parts do not fit each other.
        """
        try:
            header = msgspec.json.decode((folder / JOB_JSON).read_bytes(), type=JobHeader)
            arrays = load_npz(folder / JOB_NPZ)
            parts: dict[str, Weights] = {"champion": {}, "anchor": {}, "fisher": {}}
            for key, value in arrays.items():
                part, _, name = key.partition(".")
                if name:
                    parts[part][name] = value
            job = cls(
                champion=Head(parts["champion"], tuple(header.labels)),
                anchor=parts["anchor"],
                fisher=parts["fisher"],
                fresh_latents=arrays["fresh_latents"],
                fresh_labels=arrays["fresh_labels"],
                replay_latents=arrays["replay_latents"],
                replay_labels=arrays["replay_labels"],
                latent=header.latent,
                config=header.config,
                seed=header.seed,
            )
        except (OSError, KeyError, msgspec.MsgspecError) as error:
            raise IntegrityError(f"the learning job in {folder.name} is damaged: {error}") from error
        if not job.fits:
            raise IntegrityError(f"the learning job in {folder.name} is damaged: its rows do not fit its head")
        return job

    @property
    def fits(self) -> bool:
        """Whether rows, labels, anchor and Fisher information are those of the champion."""
        shapes = {key: value.shape for key, value in self.champion.weights.items()}
        rows = ((self.fresh_latents, self.fresh_labels), (self.replay_latents, self.replay_labels))
        return all(
            {key: value.shape for key, value in part.items()} == shapes for part in (self.anchor, self.fisher)
        ) and all(
            latents.shape == (len(labels), self.champion.latent_dim)
            and bool(((labels >= 0) & (labels < len(self.champion.labels))).all())
            for latents, labels in rows
        )


class JobHeader(msgspec.Struct, frozen=True):
    """The part of a job that is not arrays."""

    labels: list[str]
    latent: LatentSpec
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


class Learner(Protocol):
    """Trains a challenger. Pure: the same job gives the same bytes."""

    def __call__(self, job: LearnJob) -> tuple[Head, LearnResult]:
        """The challenger and how it came about.

        Raises:
            EmptyBufferError: The job has no fresh rows.
            DivergedError: Loss or weights became non-finite.
        """
        ...


def batch_indices(
    fresh: int, replay: int, config: LearnConfig, rng: np.random.Generator
) -> list[tuple[IndexArray, IndexArray]]:
    """The micro-batches of one pass: every fresh row once, each batch filled up with replayed rows drawn at random."""
    order = rng.permutation(fresh)
    batches = []
    for start in range(0, fresh, config.new_per_batch):
        new = order[start : start + config.new_per_batch]
        old = rng.integers(replay, size=config.replayed_per_batch) if replay else np.empty(0, dtype=np.int64)
        batches.append((new, old))
    return batches
