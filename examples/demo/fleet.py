"""The demo's fleet: fourteen devices, each with a drift of its own, on a real broker."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from demo import factory
from edge_sdk import DeviceConfig, EdgeDevice, ManualClock, MqttTransport, SimulatedDevice, streams
from edge_sdk.config import DriftConfig, GateConfig, LearnConfig, PolicyConfig, ReportConfig, UpdateConfig
from edge_sdk.resources import FixedReader

TICK_S = 300.0
ROWS_PER_TICK = 40
DRIFT_AT = 7

DRIFTS: dict[str, tuple[streams.Transform, frozenset[int]]] = {
    "clean-1": (streams.unchanged, frozenset()),
    "clean-2": (streams.unchanged, frozenset()),
    "rotated-20": (streams.rotation(20), frozenset()),
    "rotated-25": (streams.rotation(25), frozenset()),
    "rotated-30": (streams.rotation(30), frozenset()),
    "rotated-40": (streams.rotation(40), frozenset()),
    "dark-50": (streams.darkening(0.5), frozenset()),
    "dark-35": (streams.darkening(0.35), frozenset()),
    "dark-25": (streams.darkening(0.25), frozenset()),
    "noisy-20": (streams.noise(0.2), frozenset()),
    "noisy-30": (streams.noise(0.3), frozenset()),
    "noisy-40": (streams.noise(0.4), frozenset()),
    "eights": (streams.unchanged, frozenset({8})),
    "nines": (streams.unchanged, frozenset({9})),
}


def config(name: str, seed: int) -> DeviceConfig:
    """A device that may promote, and that sees as many rows a day as the simulation gives it."""
    return DeviceConfig(
        device=name,
        mode="adapt",
        variant="int8",
        durability="normal",
        seed=seed,
        learn=LearnConfig(executor="inline"),
        policy=PolicyConfig(cooldown_s=2 * TICK_S, volume_rows=250),
        drift=DriftConfig(rows_per_day=ROWS_PER_TICK * 86_400 / TICK_S, alarms_per_day=1.0),
        gate=GateConfig(max_wait_s=20 * TICK_S),
        report=ReportConfig(interval_s=TICK_S),
        # a device's own probation looks at health alone here, so that what stops the bad release is seen to be the
        # coordinator's comparison of reported accuracies; a demo of one process needs no signatures
        update=UpdateConfig(trust="none", max_accuracy_drop=1.0),
    )


def build(home: Path, digits: factory.Digits, clock: ManualClock, port: int, seed: int) -> list[SimulatedDevice]:
    """All devices, without a model: the coordinator sends them their first release."""
    trunks: dict[str, object] = {}
    devices = []
    for number, (name, (transform, new_labels)) in enumerate(DRIFTS.items()):
        device = EdgeDevice(
            home / name,
            config=config(name, seed + number),
            transport=MqttTransport("127.0.0.1", port, client_id=name),
            clock=clock,
            trunks=trunks,
            resources=FixedReader(),
            rng=np.random.default_rng([seed, number, 1]),
        )
        stream = streams.DriftingStream(
            digits.life,
            rng=np.random.default_rng([seed, number, 2]),
            base_labels=factory.BASE,
            drift_at=DRIFT_AT,
            transform=transform,
            new_labels=new_labels,
        )
        devices.append(
            SimulatedDevice(
                device,
                stream,
                label_names=factory.LABELS,
                rng=np.random.default_rng([seed, number, 3]),
                rows_per_tick=ROWS_PER_TICK,
            )
        )
    return devices
