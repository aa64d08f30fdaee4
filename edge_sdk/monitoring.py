"""The drift monitors of the version in use: fed, persisted, renewed, and their alarms told."""

from __future__ import annotations

import logging
import math
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
from edge_sdk.join import Joined, Judged
from edge_sdk.manifest import REFERENCE_NPZ, Manifest
from edge_sdk.messages import MonitorState, Summary
from edge_sdk.pending import LoggedPrediction
from edge_sdk.serving import Served
from edge_sdk.store import Store
from edge_sdk.tasks import loss_of

logger = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]
_SAVE_S = 300.0
"""The evidence takes up to 100 kB: written every minute, it would wear flash memory by 150 MB a day."""


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
        self._announced: dict[str, float] = {}
        """When each warning and alarm that is up was told of."""
        self._told_at: dict[str, float] = {}
        """When an alarm of each monitor was last told of, whether it is still up or not."""
        self._saved_at = 0.0
        self._block_began = self._block_ended = 0.0
        self.changed_at: float | None = None
        """Time of the rows that raised the first warning on the version in use: what is older looked different."""

    @property
    def alarms(self) -> list[str]:
        """Names of the monitors whose alarm is up, but for an accuracy that has risen."""
        monitors = self._monitors
        if monitors is None:
            return []
        return [name for name in monitors.alarming() if not (name == "accuracy" and monitors.improved)]

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

    @property
    def diagnosis(self) -> str:
        """What kind of change raised the alarms, in words; "" without alarm."""
        found = self._monitors.diagnosis() if self._monitors else None
        return f"{found.kind}: {found.words}" if found else ""

    @property
    def estimate(self) -> tuple[float | None, str]:
        """Accuracy that confidences foretell, without labels, and why it is not known; see `DriftMonitors.estimate`."""
        return self._monitors.estimate() if self._monitors else (None, "no release is installed yet")

    @property
    def scores(self) -> dict[str, Any]:
        """Running scores of labelled predictions, see `Prequential.scores`."""
        return self._monitors.scores if self._monitors else {}

    def take_summary(self, **facts: Any) -> Summary | None:
        """Close the summary of the inputs and begin another one; None if there is nothing to tell.

        Args:
            facts: As in `drift.summary.Summary.message`.
        """
        monitors = self._monitors
        if monitors is None or not monitors.summary.rows:
            return None
        message = monitors.summary.message(monitors=self.states(), **facts)
        monitors.begin_summary(facts["end"])
        return message

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
        self._monitors.begin_summary(now)
        self._served, self._unfolded, self._announced, self.changed_at = served, [], {}, None
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
        told = msgspec.json.decode(self._store.get("announced") or b"{}", type=_Told)
        self._announced, self._told_at, self.changed_at = told.announced, told.told_at, told.changed_at
        return True

    def see(self, joined: Joined) -> None:
        """Show what was written, and tell of new warnings and alarms."""
        monitors, served = self._monitors, self._served
        if monitors is None or served is None:
            return
        if joined.live:
            self._fold_labels(monitors, joined.live, served.manifest)
        self._unfolded += [row for row in joined.rows if row.version == served.version]
        size = self._config.block_rows
        while len(self._unfolded) >= size:
            block, self._unfolded = self._unfolded[:size], self._unfolded[size:]
            self._block_began, self._block_ended = block[0].time, block[-1].time
            learns = bool(len(block[0].latent))
            monitors.fold(
                np.stack([row.x for row in block]),
                np.stack([row.scores for row in block]),
                np.stack([row.latent for row in block]) if learns else None,
                np.array([row.time for row in block]),
                said=[label for row in block for label in row.present],
                latency_ms=np.array([row.latency_ms for row in block]),
            )
            self._announce(monitors)
            self._clear(monitors)
        self._announce(monitors)

    def _fold_labels(self, monitors: DriftMonitors, rows: list[Judged], manifest: Manifest) -> None:
        more: dict[str, Any] = {"slices": [row.slice for row in rows]}
        if manifest.task == "regression":
            more["losses"] = np.array([loss_of(row.said, row.label, manifest) for row in rows])
        elif manifest.task == "classification":
            place = {label: i for i, label in enumerate(self._served.labels if self._served else ())}
            more |= {"truths": np.array([place.get(row.label, -1) for row in rows]),
                     "said": np.array([place.get(row.said, -1) for row in rows])}  # fmt: skip
        monitors.fold_labels(np.array([row.correct for row in rows]), **more)

    def _clear(self, monitors: DriftMonitors) -> None:
        """Take down alarms that nothing has spoken for since long."""
        for name in monitors.clear(self._config.clear_rows):
            self._announced = {key: at for key, at in self._announced.items() if key not in (name, f"warning {name}")}
            with self._store.transaction():
                self._emit("drift_cleared", {"monitor": name})
        if not monitors.warnings():
            self.changed_at = None

    def save(self, now: float) -> None:
        """Persist the evidence; inside a transaction."""
        if self._monitors is not None:
            self._store.put("monitors", self._monitors.to_bytes())
            told = _Told(self._announced, self._told_at, self.changed_at)
            self._store.put("announced", msgspec.json.encode(told))
            self._saved_at = now

    def save_if_due(self, now: float) -> bool:
        """Persist the evidence every five minutes, to spare the flash; inside a transaction. True if it did."""
        due = is_due(now, self._saved_at, _SAVE_S)
        if due:
            self.save(now)
        return due

    def _announce(self, monitors: DriftMonitors) -> None:
        """Tell of warnings and alarms that are new; of one that comes back within the cool-down, say nothing."""
        keys = [*(f"warning {name}" for name in monitors.warnings()), *monitors.alarming()]
        fresh = [key for key in keys if key not in self._announced]
        if not fresh:
            return
        alarms = {alarm.monitor: alarm for alarm in monitors.alarms()}
        now, found = self._block_ended, monitors.diagnosis()
        with self._store.transaction():
            for key in fresh:
                if key not in alarms:
                    self._emit("drift_warning", {"monitor": key.removeprefix("warning ")})
                elif now - self._told_at.get(key, -math.inf) >= self._config.cooldown_s:
                    alarm = alarms[key]
                    self._emit(
                        "drift_alarm",
                        {
                            "monitor": alarm.monitor,
                            "evidence": alarm.evidence,
                            "threshold": alarm.threshold,
                            "suspects": ", ".join(f"{name} {shift:+.2f}" for name, shift in alarm.suspects),
                            "kind": found.kind if found else "",
                            "words": found.words if found else "",
                        },
                    )
        self._announced |= dict.fromkeys(fresh, now)
        self._told_at |= {key: now for key in fresh if key in alarms}
        if self.changed_at is None:
            self.changed_at = self._block_began


class _Told(msgspec.Struct):
    """What people were told; persisted."""

    announced: dict[str, float] = {}
    told_at: dict[str, float] = {}
    changed_at: float | None = None
