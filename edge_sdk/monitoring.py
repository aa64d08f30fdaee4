"""The drift monitors of the version in use: fed, persisted, renewed, and their alarms told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.clock import is_due
from edge_sdk.config import DriftConfig
from edge_sdk.drift.monitors import DriftMonitors
from edge_sdk.drift.reference import Reference
from edge_sdk.errors import IntegrityError
from edge_sdk.join import Joined
from edge_sdk.manifest import REFERENCE_NPZ
from edge_sdk.messages import MonitorState
from edge_sdk.pending import LoggedPrediction
from edge_sdk.serving import Served
from edge_sdk.store import Store

logger = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]
_SAVE_S = 60.0


class Monitoring:
    """Shows the monitors what was written, in whole blocks.

    Args:
        store: The device's database; evidence survives a restart.
        config: Alarm budget and block size.
        emit: Records an event inside the current transaction of the store.
    """

    def __init__(self, store: Store, config: DriftConfig, emit: Emit) -> None:
        self._store, self._config, self._emit = store, config, emit
        self._monitors: DriftMonitors | None = None
        self._served: Served | None = None
        self._unfolded: list[LoggedPrediction] = []
        self._announced: set[str] = set()
        self._saved_at = 0.0
        self._block_began = 0.0
        self.changed_at: float | None = None
        """Time of the rows that raised the first warning on the version in use: what is older looked different."""

    @property
    def alarms(self) -> list[str]:
        """Names of the monitors whose alarm is up."""
        return [alarm.monitor for alarm in self._monitors.alarms()] if self._monitors else []

    @property
    def warnings(self) -> list[str]:
        """Names of the monitors at or above their warning level."""
        return self._monitors.warnings() if self._monitors else []

    def states(self) -> list[MonitorState]:
        """Every monitor, for a report."""
        if self._monitors is None:
            return []
        return [
            MonitorState(name, round(d.evidence, 3), d.threshold, d.warning, d.drift_detected)
            for name, d in self._monitors.detectors.items()
        ]

    def attach(self, served: Served, folder: Path, now: float) -> None:
        """Watch a version: with the evidence of an earlier run if it was this version's, else from the beginning.

        Args:
            served: The version.
            folder: Its release's checkpoint folder.
            now: Seconds since the epoch.
        """
        key = f"{served.version.digest}/{served.version.head}".encode()
        restart = self._served is None
        # anew from the checkpoint also on a way back: what the version before took for normal is not normal to this one
        self._monitors = DriftMonitors(
            Reference.load(folder / REFERENCE_NPZ),
            tuple(served.manifest.labels),
            run_length=self._config.rows_per_day / self._config.alarms_per_day,
            rereference_rows=self._config.rereference_rows,
        )
        self._served, self._unfolded, self._announced, self.changed_at = served, [], set(), None
        if restart and self._store.get("monitors_of") == key and self._restore(self._monitors):
            self._saved_at = now
            return
        if served.version.head:
            # a learned head is judged by how it does here, not by how the factory's did there
            self._monitors.rereference(served.labels)
        with self._store.transaction():
            self._store.put("monitors_of", key)
            self.save(now)
            if served.version.head:
                self._emit("rereferenced", {"reason": f"head {served.version.head} serves"})

    def _restore(self, monitors: DriftMonitors) -> bool:
        saved = self._store.get("monitors")
        if saved is None:
            return False
        try:
            monitors.restore(saved)
        except IntegrityError as error:
            logger.warning("the evidence of the run before is lost: %s", error)
            return False
        announced, self.changed_at = msgspec.json.decode(self._store.get("announced") or b"[[], null]")
        self._announced = set(announced)
        return True

    def see(self, joined: Joined) -> None:
        """Show what was written, and tell of new warnings and alarms."""
        monitors, served = self._monitors, self._served
        if monitors is None or served is None:
            return
        if joined.live:
            monitors.fold_labels(np.array([row.correct for row in joined.live]))
        self._unfolded += [row for row in joined.rows if row.version == served.version]
        size = self._config.block_rows
        while len(self._unfolded) >= size:
            block, self._unfolded = self._unfolded[:size], self._unfolded[size:]
            self._block_began = block[0].time
            monitors.fold(np.stack([row.x for row in block]), np.stack([row.scores for row in block]))
        self._announce(monitors)

    def save(self, now: float) -> None:
        """Persist the evidence; inside a transaction."""
        if self._monitors is not None:
            self._store.put("monitors", self._monitors.to_bytes())
            self._store.put("announced", msgspec.json.encode((sorted(self._announced), self.changed_at)))
            self._saved_at = now

    def save_if_due(self, now: float) -> bool:
        """Persist the evidence once a minute, to spare the flash; inside a transaction. True if it did."""
        due = is_due(now, self._saved_at, _SAVE_S)
        if due:
            self.save(now)
        return due

    def _announce(self, monitors: DriftMonitors) -> None:
        news: dict[str, tuple[str, dict[str, Any]]] = {
            f"warning {name}": ("drift_warning", {"monitor": name}) for name in monitors.warnings()
        }
        for alarm in monitors.alarms():
            what = ", ".join(f"{name} {shift:+.2f}" for name, shift in alarm.suspects)
            detail = {"monitor": alarm.monitor, "evidence": alarm.evidence, "threshold": alarm.threshold}
            news[alarm.monitor] = ("drift_alarm", {**detail, "suspects": what})
        fresh = [key for key in news if key not in self._announced]
        if fresh:
            with self._store.transaction():
                for key in fresh:
                    self._emit(*news[key])
            self._announced.update(fresh)
            if self.changed_at is None:
                self.changed_at = self._block_began
