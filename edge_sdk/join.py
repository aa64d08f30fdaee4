"""Labels meet their predictions: memory to disk in one transaction, and what of it may be learned from."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.pending import Batch, Label, LoggedPrediction, Pending
from edge_sdk.reporter import Counters, Window
from edge_sdk.serving import Served
from edge_sdk.store import LoggedRow, Role, Store
from edge_sdk.tasks import is_right
from edge_sdk.types import LatentArray

_REMEMBERED_IDS = 10_000
_ROW_BYTES = 120
_SAMPLE_BYTES = 200


class Judged(NamedTuple):
    """A live labelled row that the version in use had predicted: what it is judged by."""

    latent: LatentArray
    label: str
    correct: bool


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
        self._labelled: deque[str] = deque(maxlen=_REMEMBERED_IDS)

    @property
    def unsaved(self) -> bool:
        """Whether something waits that could not be written."""
        return bool(self._unsaved)

    def drain(self) -> bool:
        """Take over what came since the last call; True if there is anything to write."""
        if batch := self._pending.drain():
            self._unsaved.append(batch)
            while len(self._unsaved) > 1 and sum(map(len, self._unsaved)) > self._config.join.max_pending:
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
        joined.rows = [row for batch in self._unsaved for row in batch.predictions]
        self._store.add_rows(
            [
                LoggedRow(
                    row.id,
                    row.time,
                    row.latent.tobytes(),
                    row.said,
                    row.version.release,
                    row.version.head,
                    row.manifest.trunk_id,
                )
                for row in joined.rows
            ]
        )
        self._join([label for batch in self._unsaved for label in batch.labels], joined, current)
        taught = [row for batch in self._unsaved for row in batch.taught]
        for number, sample in enumerate(taught):
            key = f"taught-{counters.labelled}-{number}"
            self._keep(key, sample.label, sample.latent.tobytes(), sample.trunk, sample.time)
        join = self._config.join
        joined.gone = self._store.trim_rows(older_than=now - join.window_s, max_bytes=join.max_bytes)
        self._tally(joined, len(taught))
        return joined

    def written(self, joined: Joined) -> None:
        """The transaction was committed."""
        self._unsaved = []
        self._labelled.extend(joined.ids)
        self._pending.release([*joined.ids, *joined.gone])

    def _join(self, labels: list[Label], joined: Joined, current: Served | None) -> None:
        waiting = self._store.take_rows([label.id for label in labels])
        done = {*self._labelled}
        for label in labels:
            row = waiting.pop(label.id, None)
            if row is None:
                duplicate = label.id in done
                joined.counters.duplicates += duplicate
                joined.counters.unmatched += not duplicate
                joined.unmatched += not duplicate
                continue
            done.add(label.id)
            joined.ids.append(label.id)
            if current is None:
                continue
            if (row.release, row.head) == (current.version.release, current.version.head):
                latent = np.frombuffer(row.latent, dtype=np.uint8)
                joined.live.append(Judged(latent, label.label, is_right(row.predicted, label.label, current.manifest)))
            if current.manifest.learns and row.latent:
                self._keep(label.id, label.label, row.latent, row.trunk, row.time)

    def _keep(self, key: str, label: str, latent: bytes, trunk: str, time: float) -> None:
        """A labelled sample is to be learned from, or to judge by; its id decides, once and for all."""
        role: Role = "judge" if _share_of(key) < self._config.replay.judge_share else "fresh"
        self._store.add_sample(time=time, latent=latent, label=label, role=role, trunk=trunk)

    def _tally(self, joined: Joined, taught: int) -> None:
        counters, window = joined.counters, joined.window
        window.count(
            [label for row in joined.rows for label in row.present],
            [float(row.scores.max()) for row in joined.rows if row.present],
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
        for name in ("rejected_inputs", "errors", "rows_lost", "labels_lost"):
            setattr(counters, name, getattr(counters, name) + sum(getattr(batch, name) for batch in self._unsaved))
        size = sum(len(row.latent) + _ROW_BYTES for row in joined.rows) + _SAMPLE_BYTES * (len(joined.ids) + taught)
        counters.written_bytes += size
        window.written_bytes += size


def _share_of(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
