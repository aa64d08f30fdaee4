"""The trial of a challenger: its job, how it does against the champion on rows that neither knows, what it leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig, GateConfig
from edge_sdk.errors import IntegrityError
from edge_sdk.experience import Chosen, Experience
from edge_sdk.gate import ProbationVerdict, Verdict, is_healthy, judge, watch
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob
from edge_sdk.learn.ewc import Importance, consolidate, fisher_diagonal
from edge_sdk.manifest import Manifest
from edge_sdk.outcomes import Outcomes, group_names, members, outcomes
from edge_sdk.progress import AdaptState
from edge_sdk.skew import Skew
from edge_sdk.slots import Slots, Version
from edge_sdk.store import Sample, stack
from edge_sdk.tasks import as_scores
from edge_sdk.types import LatentArray

logger = logging.getLogger(__name__)

_LATENCY_RUNS = 31


class Trial:
    """What a challenger of the version in use is made of, what it proves, and what it leaves behind.

    Args:
        version: In use; its head is the champion.
        manifest: Of its release.
        experience: Its labelled rows.
        slots: The versions on disk.
        config: Of the device.
    """

    def __init__(
        self, version: Version, manifest: Manifest, experience: Experience, *, slots: Slots, config: DeviceConfig
    ) -> None:
        self._version, self._manifest, self._experience = version, manifest, experience
        self._slots, self._config = slots, config

    def job(self, *, may_grow: Callable[[str], bool], since: float, attempt: int) -> tuple[LearnJob, Chosen]:
        """A learning job from what waits; as `Experience.job`."""
        champion, importance = self._slots.head(self._version), self.importance()
        return self._experience.job(champion, importance, may_grow=may_grow, since=since, attempt=attempt)

    def importance(self) -> Importance:
        """What EWC holds on to."""
        try:
            return self._slots.importance(self._version) or self._experience.importance
        except IntegrityError as error:
            logger.warning("EWC holds on to what the release came with: %s", error)
            return self._experience.importance

    def judge(self, challenger: Head, *, waited_s: float, challengers_before: int) -> tuple[Verdict, Outcomes]:
        """The gate's verdict, and how the challenger does on the judge rows.

        Args:
            challenger: May take the champion's place.
            waited_s: Since it is on trial.
            challengers_before: That gave way to it.
        """
        champion, rows = self._slots.head(self._version), self._experience.judge_rows
        factory, manifest = self._experience.factory, self._manifest
        names = (*champion.labels, *(label for label in challenger.labels if label not in champion.labels))
        groups = group_names(rows.truths, names, manifest)
        before, after = (
            head_outcomes(head, rows.latents, rows.truths, manifest, groups) for head in (champion, challenger)
        )
        verdict = judge(
            before,
            after,
            groups=groups,
            members=members(rows.truths, groups, manifest),
            factory_champion=factory.right(champion),
            factory_challenger=factory.right(challenger),
            waited_s=waited_s,
            config=self._config.gate,
            slices=rows.slices,
            weights=rows.weights,
            challengers_before=challengers_before,
            # a simulation must give the same verdict each time, and its machine is not the device's
            latency_ms=None if self._config.learn.executor == "inline" else _latency_ms(champion, challenger),
        )
        return verdict, after

    def skew(self, challenger: Head, chosen: Chosen, judged: Outcomes, known: Skew) -> Skew:
        """The challenger's scores on what it was trained on and on what it is judged by.

        Args:
            challenger: As it is now.
            chosen: What it was made of.
            judged: How it does on the judge rows.
            known: What an earlier look at it gave: its scores on what it was trained on stay the same.
        """
        trained = known.training
        if not trained.rows:
            samples = self._learned(chosen)
            latents = stack([sample.latent for sample in samples], self._manifest.latent.dim)
            learned = head_outcomes(challenger, latents, [sample.label for sample in samples], self._manifest)
            trained = Skew().add("training", learned.right).training
        return Skew(training=trained).add("judge", judged.right)

    def consolidated(self, challenger: Head, chosen: Chosen) -> Importance | None:
        """What EWC will hold on to once the challenger serves; None: what the checkpoint came with."""
        learn, known = self._config.learn, self.importance()
        if learn.consolidation == "checkpoint":
            return None
        learned = self._learned(chosen)
        if not learned:
            return known
        latents = stack([sample.latent for sample in learned], self._manifest.latent.dim)
        fisher = fisher_diagonal(challenger, dequantize(latents, self._manifest.latent), task=self._manifest.task)
        return consolidate(known, challenger.weights, fisher, mode=learn.consolidation, decay=learn.decay)

    def _learned(self, chosen: Chosen) -> list[Sample]:
        """The fresh samples that a challenger was trained on, without those that say what a label is not."""
        keys, samples = chosen.learned, self._experience.fresh()
        return [sample for sample in samples if sample.key in keys and sample.weight > 0]


def head_outcomes(
    head: Head, latents: LatentArray, truths: list[str], manifest: Manifest, groups: Sequence[str] = ()
) -> Outcomes:
    """How a head does on rows.

    Args:
        head: Any on the release's latents.
        latents: uint8 [N, D].
        truths: In stored form.
        manifest: Of the release.
        groups: To count apart; those that truths and labels make, if none are given.
    """
    scores = as_scores(head.logits(dequantize(latents, manifest.latent)), manifest)
    return outcomes(scores, head.labels, truths, groups or group_names(truths, head.labels, manifest), manifest)


def _latency_ms(champion: Head, challenger: Head) -> tuple[float, float]:
    """Median time of one row in each head, taken in turns."""
    row = np.zeros((1, champion.latent_dim), dtype=np.float32)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_LATENCY_RUNS):
        for head, found in zip((champion, challenger), times, strict=True):
            started = time.perf_counter()
            head.logits(row)
            found.append(time.perf_counter() - started)
    return float(np.median(times[0]) * 1e3), float(np.median(times[1]) * 1e3)


def judge_probation(state: AdaptState, now: float, config: GateConfig) -> ProbationVerdict:
    """Whether the head that was promoted may stay."""
    return watch(
        np.array(state.before),
        np.array(state.after),
        waited_s=now - state.since,
        healthy=is_healthy(state.errors, state.predictions),
        alpha=config.alpha,
        rows=config.probation_rows,
        seconds=config.probation_s,
    )


def without_small_scores(verdict: Verdict, config: DeviceConfig) -> Verdict:
    """Scores over so few rows that they say too much about single samples do not leave the device."""
    few = config.report.min_count
    if verdict.rows < few:
        verdict = msgspec.structs.replace(
            verdict, champion=0.0, challenger=0.0, champion_calibration=0.0, challenger_calibration=0.0
        )
    if min(verdict.rows, config.gate.min_class_rows) < few:
        verdict = msgspec.structs.replace(verdict, worst_group=0.0, worst_slice=0.0)
    if verdict.factory_rows < few:
        verdict = msgspec.structs.replace(verdict, champion_factory=0.0, challenger_factory=0.0)
    return verdict
