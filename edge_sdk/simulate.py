"""Simulated fleets. Each device is the real one; only clock, transport, executor and data source differ."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from edge_sdk.clock import ManualClock
from edge_sdk.device import EdgeDevice
from edge_sdk.errors import TransportError
from edge_sdk.streams import DriftingStream, Pool

_WAIT_S = 0.002


class FleetTimeoutError(TransportError):
    """A tick did not settle: something that was sent never arrived. A retry may help on a loaded machine."""


class Coordinator(Protocol):
    """What a fleet needs of its coordinator."""

    def pump(self) -> int:
        """Take in what came, answer it; returns how many messages and blocks were handled."""
        ...

    def advance(self) -> Any:
        """Let rollouts take one turn."""
        ...

    def desired_revision(self, group: str) -> int:
        """Of the group's desired state; 0 before the first."""
        ...


class SimulatedDevice:
    """A device with a life: samples come, predictions are made, labels for some of them come later.

    Args:
        device: The real device.
        stream: Where its samples come from.
        label_names: Name of each label number.
        rng: Source of chance.
        rows_per_tick: Predictions in a tick.
        label_share: Share of predictions that are ever labelled.
        label_delay: Ticks until a label comes.
    """

    def __init__(
        self,
        device: EdgeDevice,
        stream: DriftingStream,
        *,
        label_names: list[str],
        rng: np.random.Generator,
        rows_per_tick: int = 40,
        label_share: float = 0.5,
        label_delay: int = 2,
    ) -> None:
        self.device, self.stream, self._names, self._rng = device, stream, label_names, rng
        self._rows, self._share, self._delay = rows_per_tick, label_share, label_delay
        self._due: list[tuple[int, str, str]] = []

    def live(self, tick: int) -> tuple[int, int]:
        """One tick of life; returns (predictions made, right ones), as only the simulation can know."""
        due, self._due = [d for d in self._due if d[0] <= tick], [d for d in self._due if d[0] > tick]
        for _, row_id, label in due:
            self.device.observe(row_id, label)
        if not self.device.ready:
            return 0, 0
        x, y = self.stream.draw(self._rows, tick)
        right = 0
        for prediction, label_number in zip(self.device.predict_batch(x), y, strict=True):
            label = self._names[label_number]
            right += prediction.label == label
            if self._rng.random() < self._share:
                self._due.append((tick + self._delay, prediction.id, label))
        return len(y), right

    def accuracy(self, pool: Pool, *, drifted: bool) -> float:
        """Accuracy of the version in use on samples apart from the stream, as they are or as they look drifted.

        Without the drift's new labels these are the factory's own data: what must not be forgotten.
        """
        x, y = pool.x, pool.y
        if not drifted or not self.stream.new_labels:
            kept = np.isin(y, sorted(self.stream.new_labels), invert=True)
            x, y = x[kept], y[kept]
        if drifted:
            x = self.stream.transform(x, np.random.default_rng(0))
        return self.device.evaluate(x, [self._names[i] for i in y])


@dataclass
class TickResult:
    """One device in one tick."""

    tick: int
    device: str
    predictions: int
    right: int
    release: int
    head: int


class DeviceSummary(msgspec.Struct, frozen=True):
    """One device over a whole run. Accuracies are on samples that no model was trained on."""

    device: str
    drifts: bool
    before: float
    """On the original data, before the drift."""
    under: float
    """On the drifted data, with the version that met the drift."""
    after: float
    """On the drifted data, at the end."""
    original: float
    """On the original data, at the end: `before - original` is the forgetting."""
    alarms: int
    promotions: int
    rejections: int
    rollbacks: int
    release: int
    head: int
    bytes_sent: int
    """Payload of reports and events."""


class FleetReport(msgspec.Struct, frozen=True):
    """What happened. The same seed gives the same report."""

    seed: int
    ticks: int
    devices: list[DeviceSummary]
    timeline: dict[str, list[list[float]]]
    """Per device: [tick, share of right predictions, release, head] for each tick with predictions."""
    events: list[tuple[int, str, str, dict[str, Any]]]
    """(tick, device, name, detail), by tick and device."""


class Fleet:
    """Devices and, if there is one, their coordinator, in ticks of one clock.

    A tick ends when every outbox is acknowledged, every device knows its desired state, and no transfer is under way:
    what happens depends on the seed alone, also over a real network.

    Args:
        devices: Their order is the order in which they act.
        clock: Shared by all of them and the coordinator.
        coordinator: Answers them; None: they work alone.
        tick_s: Seconds of simulated time in a tick.
        settle_timeout_s: Real seconds after which a tick that does not settle fails.
    """

    def __init__(
        self,
        devices: Iterable[SimulatedDevice],
        *,
        clock: ManualClock,
        coordinator: Coordinator | None = None,
        tick_s: float = 300.0,
        settle_timeout_s: float = 30.0,
    ) -> None:
        self.devices = list(devices)
        self.clock, self._coordinator = clock, coordinator
        self._tick_s, self._timeout_s = tick_s, settle_timeout_s
        self.tick_number = 0
        self.started = clock.now()
        self.results: list[TickResult] = []
        self.events: list[tuple[int, str, str, dict[str, Any]]] = []
        self._told: dict[str, int] = {}

    def connect(self) -> None:
        """Connect every device and let the first exchange settle.

        Raises:
            FleetTimeoutError: A device finds no broker.
        """
        for simulated in self.devices:
            simulated.device.connect()
        deadline = time.monotonic() + self._timeout_s
        while missing := [s.device.name for s in self.devices if not s.device.connected]:
            if time.monotonic() > deadline:
                raise FleetTimeoutError(f"no connection to the broker: {', '.join(missing[:5])}")
            threading.Event().wait(_WAIT_S)
        for simulated in self.devices:
            simulated.device.step()
        self.settle()

    def tick(self) -> list[TickResult]:
        """One tick: life, one turn of each device, the network, the rollouts, the network."""
        self.clock.advance(self._tick_s)
        self.tick_number += 1
        lived = [simulated.live(self.tick_number) for simulated in self.devices]
        for simulated in self.devices:
            simulated.device.step()
        self.settle()
        if self._coordinator is not None:
            self._coordinator.advance()
            self.settle()
        results = []
        for simulated, (predictions, right) in zip(self.devices, lived, strict=True):
            status = simulated.device.status()
            results.append(TickResult(self.tick_number, status.device, predictions, right, status.release, status.head))
            self._collect_events(simulated.device)
        self.results += results
        return results

    def run(self, ticks: int, *, on_tick: Callable[[list[TickResult]], None] | None = None) -> None:
        """Run so many ticks."""
        for _ in range(ticks):
            results = self.tick()
            if on_tick is not None:
                on_tick(results)

    def settle(self) -> None:
        """Let messages travel until nobody waits for any.

        Raises:
            FleetTimeoutError: It takes longer than it may; the message says who waits for what.
        """
        if self._coordinator is None:
            return
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._coordinator.pump()
            waiting = [simulated.device for simulated in self.devices if self._waits(simulated.device)]
            if not waiting:
                return
            before = [self._waits(device) for device in waiting]
            for device in waiting:
                device.step()
            if time.monotonic() > deadline:
                raise FleetTimeoutError(f"tick {self.tick_number} did not settle: {waiting[0].name} {before[0]}")
            if [self._waits(device) for device in waiting] == before:
                threading.Event().wait(_WAIT_S)  # the network has its own time, whatever the clock says

    def summary(self, simulated: SimulatedDevice, pool: Pool, *, before: float, under: float) -> DeviceSummary:
        """A device at the end of the run.

        Args:
            simulated: The device.
            pool: Samples apart from its stream, to score on.
            before: Its accuracy on the original data before the drift.
            under: Its accuracy on the drifted data with the version that met it.
        """
        status = simulated.device.status()
        counters = status.counters
        return DeviceSummary(
            device=status.device,
            drifts=simulated.stream.drifts,
            before=before,
            under=under,
            after=simulated.accuracy(pool, drifted=True),
            original=simulated.accuracy(pool, drifted=False),
            alarms=counters.alarms,
            promotions=counters.promotions,
            rejections=counters.rejections,
            rollbacks=counters.rollbacks,
            release=status.release,
            head=status.head,
            bytes_sent=counters.bytes_sent,
        )

    def close(self) -> None:
        """Stop every device."""
        for simulated in self.devices:
            simulated.device.stop()

    def _waits(self, device: EdgeDevice) -> str:
        """What a device waits for, or ""."""
        revision = self._coordinator.desired_revision(device.config.group) if self._coordinator else 0
        return device.waits_for(revision)

    def _collect_events(self, device: EdgeDevice) -> None:
        for entry in device.history(limit=1_000, after=self._told.get(device.name, 0)):
            self.events.append((self.tick_number, device.name, entry.name, entry.detail))
            self._told[device.name] = entry.key

    def timeline(self) -> dict[str, list[list[float]]]:
        """Per device, for each tick with predictions: [tick, share of right ones, release, head]."""
        lines: dict[str, list[list[float]]] = {simulated.device.name: [] for simulated in self.devices}
        for result in self.results:
            if result.predictions:
                share = result.right / result.predictions
                lines[result.device].append([result.tick, share, result.release, result.head])
        return lines
