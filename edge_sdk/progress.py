"""How far the learning transaction has come: one record of the database, so that a restart continues where it was."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.join import Judged
from edge_sdk.learn.base import LearnResult
from edge_sdk.outcomes import Outcomes
from edge_sdk.policy import Spent
from edge_sdk.skew import Skew
from edge_sdk.slots import Version
from edge_sdk.stats import calibration_error
from edge_sdk.store import Lineage, Store

logger = logging.getLogger(__name__)

Phase = Literal["idle", "training", "judging", "probation"]
_KEY = "adaptation"
_RECENT = 200
_MIN_RECENT = 30
_DAY_S = 86_400.0


class Recent(msgspec.Struct, frozen=True, array_like=True):
    """A live labelled row: whether it was right, and if that is known, how sure the model was and how right."""

    right: bool
    confidence: float | None = None
    success: float = 0.0
    """1 less its loss: what the confidence foretells. Of a multi-label model a part of the labels may be right."""


class AdaptState(msgspec.Struct):
    """Where the transaction stands; persisted."""

    phase: Phase = "idle"
    reason: str = ""
    since: float = 0.0
    """When the phase began."""
    attempts: int = 0
    """Learning jobs ever started; makes the seed of each."""
    superseded: int = 0
    """Challengers that gave way to the present one: they share the error level."""
    last_ended: float | None = None
    parent: Version | None = None
    rows: int = 0
    """Fresh samples that the challenger knows."""
    replayed: int = 0
    result: LearnResult = LearnResult()
    """Of the learner."""
    before: list[float] = []
    """On probation: losses of the version before."""
    after: list[float] = []
    predictions: int = 0
    errors: int = 0
    """Both on probation."""
    recent: list[Recent] = []
    """Of the latest live predictions."""
    skew: Skew = Skew()
    """Of the head in use."""
    trained: Skew = Skew()
    """Of the challenger."""
    promoted_at: float | None = None
    demand: str = ""
    """Why learning should start whatever the cool-down says."""
    waits: str = ""
    """Why learning that is wanted does not start, or has stopped."""
    decision: str = ""
    """The last decision that was noted."""
    obstacle: str = ""
    """What stood against learning at the last look."""
    spent: Spent = Spent()
    asked: list[str] = []
    """New labels that were told of."""
    accepted: list[str] = []
    refused: list[str] = []
    """What a person said about them."""
    retained_at: float = 0.0

    def begin(self, phase: Phase, now: float) -> None:
        """Enter a phase: what belonged to the one before goes."""
        self.phase, self.since = phase, now
        self.before, self.after, self.waits = [], [], ""
        self.predictions = self.errors = 0
        if phase == "training":
            self.trained, self.result = Skew(), LearnResult()

    def note_live(self, rows: list[Judged], now: float, scored: Outcomes | None, before: Outcomes | None) -> None:
        """Take note of live labelled rows.

        Args:
            rows: At least one.
            now: Seconds since the epoch.
            scored: The rows scored anew by the head in use; None if it is not known here.
            before: The same by the head before it, on probation.
        """
        if scored is None:
            self.recent = [*self.recent, *(Recent(row.correct) for row in rows)][-_RECENT:]
            return
        found = zip(scored.confidence.round(3).tolist(), (1 - scored.losses).round(3).tolist(), strict=True)
        seen = [
            Recent(row.correct, sure, success) if math.isfinite(sure) else Recent(row.correct)
            for row, (sure, success) in zip(rows, found, strict=True)
        ]
        self.recent = [*self.recent, *seen][-_RECENT:]
        right, held = np.array([(row.correct, row.holdout) for row in rows], dtype=np.bool_).T
        if self.promoted_at is not None and now - self.promoted_at <= _DAY_S:
            self.skew = self.skew.add_live(right[~held], scored.right[~held])
        if held.any():
            self.skew = self.skew.add("holdout", right[held])
        if before is not None:
            self.before += before.losses.tolist()
            self.after += scored.losses.tolist()

    @property
    def on_trial(self) -> bool:
        """Whether there is a challenger, or one is being made."""
        return self.phase in ("training", "judging")

    @property
    def accuracy(self) -> float | None:
        """Live accuracy over the latest labels, or None below 30 of them."""
        return float(np.mean([row.right for row in self.recent])) if len(self.recent) >= _MIN_RECENT else None

    @property
    def calibration(self) -> float | None:
        """Expected calibration error over the latest labels, or None below 30 of them."""
        sure = [(row.confidence, row.success) for row in self.recent if row.confidence is not None]
        if len(sure) < _MIN_RECENT:
            return None
        confidence, success = np.array(sure).T
        return calibration_error(confidence, success)

    def lineage(
        self,
        outcome: str,
        verdict: dict[str, Any],
        *,
        version: Version,
        wrong: int,
        head: int | None,
        config: DeviceConfig,
    ) -> Lineage:
        """How the challenger came to be.

        Args:
            outcome: What became of it.
            verdict: Its numbers, or just the reason.
            version: In use.
            wrong: How many of its rows were found to be wrong.
            head: Its number, if it was promoted.
            config: Of the device.
        """
        parent, result = self.parent or version, self.result
        detail = {
            **verdict,
            "trigger": self.reason,
            "fresh": self.rows,
            "used": result.rows,
            "wrong": wrong,
            "replayed": self.replayed,
            "seed": config.seed * 1_000_003 + self.attempts - 1,
            "steps": result.steps,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
            "cpu_s": result.seconds,
            "note": result.note,
            "config": msgspec.to_builtins(config.learn),
        }
        return Lineage(self.since, parent.release, parent.head, head, outcome, detail)

    def since_last(self, now: float) -> float | None:
        """Seconds since the last learning ended; None ends the cool-down, as a clock that was set back does."""
        return None if self.last_ended is None or now < self.last_ended else now - self.last_ended

    def save(self, store: Store) -> None:
        """Persist it; inside a transaction."""
        store.put(_KEY, msgspec.json.encode(self))


def saved_state(store: Store) -> AdaptState:
    """What `AdaptState.save` wrote; a new one if there is none, or one of an earlier version."""
    data = store.get(_KEY)
    try:
        return msgspec.json.decode(data, type=AdaptState) if data else AdaptState()
    except msgspec.MsgspecError as error:
        logger.warning("how far learning had come is lost; it begins anew: %s", error)
        return AdaptState()
