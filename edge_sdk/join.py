"""Labels meet their predictions: memory to disk in one transaction, and what of it may be learned from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.feedback import HourlyCap, from_reward, source_weight
from edge_sdk.pending import Batch, Label, LoggedPrediction, Pending
from edge_sdk.reporter import Counters, Window
from edge_sdk.serving import Served
from edge_sdk.stats import share_of
from edge_sdk.store import LoggedRow, NewSample, Store
from edge_sdk.tasks import is_right
from edge_sdk.types import FloatArray, LatentArray

_REMEMBERED_IDS = 10_000
_CAP = "cap"
_TRUSTED = 0.5
"""Labels of a source that counts less are learned from; like guesses, they say nothing of the version in use."""


class Judged(NamedTuple):
    """A live labelled row that the version in use had predicted: what it is judged by."""

    latent: LatentArray
    label: str
    correct: bool
    holdout: bool = False
    said: str = ""
    """What was predicted."""
    slice: str = ""
    id: str = ""
    """Of the prediction."""


@dataclass
class Joined:
    """What one flush wrote. Counters and window are those to go on with, once it is on disk."""

    counters: Counters
    window: Window
    rows: list[LoggedPrediction] = field(default_factory=list)
    errors: int = 0
    unmatched: int = 0
    ids: list[str] = field(default_factory=list)
    """Predictions that met their label."""
    gone: list[str] = field(default_factory=list)
    """Predictions whose label will not be waited for any longer."""
    live: list[Judged] = field(default_factory=list)
    written_bytes: int = 0
    """About so many, to the database, since the flush before: what this one takes is known once it is on disk."""
    capped: int = 0
    """Labels beyond what their source may contribute in an hour."""
    samples: list[NewSample] = field(default_factory=list)
    """What is learned from, or judged by."""
    cap: HourlyCap = field(default_factory=HourlyCap)


class Joiner:
    """Holds what was drained from memory until it is on disk, however often that has to be tried.

    Args:
        store: The device's database.
        pending: What `predict` and `observe` fill.
        config: Of the device.
    """

    def __init__(self, store: Store, pending: Pending, config: DeviceConfig) -> None:
        self._store, self._pending, self._config = store, pending, config
        self._unsaved: list[Batch] = []
        saved = store.get(_CAP)
        self._cap = msgspec.json.decode(saved, type=HourlyCap) if saved else HourlyCap()
        self.judges_full = False
        """No more rows may judge for now: new ones are learned from instead."""
        self.requested: frozenset[str] = frozenset()
        """Predictions whose labels were asked for: chosen for being hard, they say nothing of the others."""
        self.on_trial: frozenset[int] = frozenset()
        """Keys of the fresh samples that a job or its challenger knows."""
        self._told_bytes = 0
        self._labelled: deque[str] = deque(maxlen=_REMEMBERED_IDS)

    @property
    def unsaved(self) -> bool:
        """Whether something waits that could not be written."""
        return bool(self._unsaved)

    def lost_now(self) -> str:
        """What would be lost if this process ended here, in words; nothing: ""."""
        labels = sum(len(batch.labels) + len(batch.taught) for batch in self._unsaved)
        predictions = sum(len(batch.predictions) for batch in self._unsaved)
        return f"{labels} labels and {predictions} predictions" if labels or predictions else ""

    def drain(self) -> bool:
        """Take over what came since the last call; True if there is anything to write."""
        if batch := self._pending.drain():
            self._unsaved.append(batch)
            join = self._config.join
            while len(self._unsaved) > 1 and (
                sum(map(len, self._unsaved)) > join.max_pending
                or sum(batch.memory_bytes for batch in self._unsaved) > join.max_pending_bytes
            ):
                lost = self._unsaved.pop(0)  # while nothing can be written, memory stays bounded
                self._unsaved[0].rows_lost += lost.rows_lost + len(lost.predictions)
                self._unsaved[0].labels_lost += lost.labels_lost + len(lost.labels) + len(lost.taught)
                self._pending.release([row.id for row in lost.predictions])
        return self.unsaved

    def write(self, now: float, current: Served | None, counters: Counters, window: Window) -> Joined:
        """Log predictions and join labels; inside a transaction, and without touching anything in memory.

        Args:
            now: Seconds since the epoch.
            current: What serves.
            counters: Totals so far.
            window: What the next report has so far.
        """
        joined = Joined(msgspec.structs.replace(counters), msgspec.structs.replace(window))
        joined.cap = self._cap.copy()
        joined.rows = [row for batch in self._unsaved for row in batch.predictions]
        join = self._config.join
        logged = joined.rows
        if join.log_fraction < 1:
            logged = [row for row in joined.rows if share_of(row.id, "log") < join.log_fraction]
            joined.gone = list({row.id for row in joined.rows} - {row.id for row in logged})
        self._store.add_rows([self._logged(row) for row in logged])
        self._join([label for batch in self._unsaved for label in batch.labels], joined, current, now)
        taught = [row for batch in self._unsaved for row in batch.taught]
        for number, row in enumerate(taught):
            weight = source_weight(row.source, self._config.feedback)
            refused = row.label in self._pending.refused
            if weight and not refused and self._admitted(row.source, joined, now):
                sample = NewSample(row.time, row.latent.tobytes(), row.label, "fresh", row.trunk,
                                   source=row.source, slice=row.slice, weight=weight)  # fmt: skip
                joined.samples.append(self._with_role(sample, f"taught-{counters.labelled}-{number}"))
        self._store.add_samples(joined.samples)
        self._store.put(_CAP, msgspec.json.encode(joined.cap))
        joined.gone += self._store.trim_rows(older_than=now - join.window_s, max_bytes=join.max_bytes)
        self._tally(joined, len(taught))
        if current is not None and current.manifest.task == "classification":
            joined.window.confuse((row.label, row.said) for row in joined.live)
        return joined

    def written(self, joined: Joined) -> None:
        """The transaction was committed."""
        self._unsaved = []
        self._cap = joined.cap
        self._told_bytes += joined.written_bytes
        self._labelled.extend(joined.ids)
        self._pending.release([*joined.ids, *joined.gone])

    def _logged(self, row: LoggedPrediction) -> LoggedRow:
        return LoggedRow(
            row.id,
            row.time,
            row.latent.tobytes(),
            row.said,
            row.version.release,
            row.version.head,
            row.manifest.trunk_id,
            row.slice,
            1 / self._config.join.log_fraction,
            row.holdout,
        )

    def _join(self, labels: list[Label], joined: Joined, current: Served | None, now: float) -> None:
        truths = self._store.take_rows([label.id for label in labels if label.trusted])
        # a row that meets a guess still waits for its truth
        others = self._store.look_at_rows([label.id for label in labels if not label.trusted])
        done = {*self._labelled, *(name for name, row in others.items() if row.guess is not None)}
        guesses: list[tuple[str, float]] = []
        for label in sorted(labels, key=lambda label: not label.trusted):  # of one row the truth, not a guess about it
            row = truths.pop(label.id, None) if label.trusted else others.pop(label.id, None)
            if row is None or (row.guess is not None and not label.trusted):
                duplicate = label.id in done
                joined.counters.duplicates += duplicate
                joined.counters.unmatched += not duplicate
                joined.unmatched += not duplicate
                continue
            done.add(label.id)
            joined.ids.append(label.id)
            counts, weight = source_weight(label.source, self._config.feedback), 0.0
            # a label that counts nothing is counted: it is to say nothing of the version in use, either
            if current is not None and counts and self._admitted(label.source, joined, now):
                weight = self._use(label, row, counts, joined, current)
            if not label.trusted:
                guesses.append((label.id, weight))
        self._store.set_guesses(guesses)

    def _use(self, label: Label, row: LoggedRow, counts: float, joined: Joined, current: Served) -> float:
        """A label that its source may give says how the version in use did, and is learned from or judges.

        Returns:
            What it counts for learning; 0: nothing.
        """
        if label.label in self._pending.refused:
            return 0.0
        fair = label.trusted and counts >= _TRUSTED and row.id not in self.requested
        if fair and (row.release, row.head) == (current.version.release, current.version.head):
            latent = np.frombuffer(row.latent, dtype=np.uint8)
            right = is_right(row.predicted, label.label, current.manifest)
            joined.live.append(Judged(latent, label.label, right, row.holdout, row.predicted, row.slice, row.id))
        truth, weight = label.label, label.weight
        if label.reward is not None:
            truth, weight = from_reward(row.predicted, label.reward)
        weight *= row.weight * counts
        never_learned = row.holdout and (self.judges_full or not fair)  # and it cannot judge
        if not (current.manifest.learns and row.latent and weight) or never_learned:
            return 0.0
        joined.counters.other_trunk += row.trunk != current.manifest.trunk_id
        unseen, says_more = self._supersede(row, truth, joined) if row.guess else (True, True)
        if not says_more:
            return 0.0
        sample = NewSample(row.time, row.latent, truth, "fresh", row.trunk, row.id, label.source, row.slice, weight,
                           bool(row.translated))  # fmt: skip
        joined.samples.append(self._with_role(sample, row.id, row.holdout) if fair and unseen else sample)
        return weight

    def _supersede(self, row: LoggedRow, truth: str, joined: Joined) -> tuple[bool, bool]:
        """A truth takes the place of the guess that came before it, unless that was learned from already.

        What was learned from stays in the replay buffer and in the sums, and the truth is learned from as well, if it
        says something else.

        Returns:
            Whether no model has seen the row, so that it may judge; and whether the truth says more than the guess did.
        """
        guesses = [sample for sample, _ in self._store.samples_of([row.id]) if sample.time == row.time]
        known = [sample for sample in guesses if sample.role == "replay" or sample.key in self.on_trial]
        fresh = [sample.key for sample in guesses if sample.role == "fresh"]
        unseen = bool(fresh) and not known
        joined.counters.late_truths += not unseen
        says_more = not any(sample.label == truth and sample.weight > 0 for sample in known)
        if says_more:
            self._store.delete_samples(fresh)
        return unseen, says_more

    def _admitted(self, source: str, joined: Joined, now: float) -> bool:
        admitted = joined.cap.admit(source, now, self._config.feedback)
        joined.capped += not admitted
        return admitted

    def _with_role(self, sample: NewSample, key: str, holdout: bool = False) -> NewSample:  # noqa: FBT001, FBT002
        """A labelled sample is to be learned from, or to judge by; its id decides, once and for all.

        What the app did not act on always judges: no other label is as free of the model's own influence.
        """
        judges = holdout or share_of(key) < self._config.replay.judge_share
        return sample._replace(role="judge") if judges and not self.judges_full else sample

    def _tally(self, joined: Joined, taught: int) -> None:
        counters, window = joined.counters, joined.window
        window.count(
            [label for row in joined.rows for label in row.present],
            _highest([row.scores for row in joined.rows if row.present]),
            [row.latency_ms for row in joined.rows],
        )
        window.labelled += len(joined.live)
        window.correct += sum(row.correct for row in joined.live)
        window.unmatched += joined.unmatched
        window.rejected_inputs += sum(batch.rejected_inputs for batch in self._unsaved)
        joined.errors = sum(batch.errors for batch in self._unsaved)
        window.errors += joined.errors
        counters.predictions += len(joined.rows)
        counters.labelled += len(joined.ids) + taught
        counters.capped += joined.capped
        for name in ("rejected_inputs", "errors", "rows_lost", "labels_lost"):
            setattr(counters, name, getattr(counters, name) + sum(getattr(batch, name) for batch in self._unsaved))
        joined.written_bytes = self._store.written_bytes - self._told_bytes
        counters.written_bytes += joined.written_bytes
        window.written_bytes += joined.written_bytes


def _highest(scores: list[FloatArray]) -> list[float]:
    """The highest score of each row: rows of one version are looked at together, which takes a tenth of the time."""
    found: list[float] = []
    for _, rows in groupby(scores, key=len):
        found += np.array(list(rows)).max(axis=1).tolist()
    return found
