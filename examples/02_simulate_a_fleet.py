"""Simulate a fleet before you ship a setting: the real device code, in the time of a clock that you advance.

Four devices meet four drifts; no network is needed, and the same seed gives the same result.
"""

import tempfile
from pathlib import Path

import numpy as np

from demo import factory
from edge_sdk import DeviceConfig, EdgeDevice, Fleet, ManualClock, SimulatedDevice, streams
from edge_sdk.config import DriftConfig, LearnConfig, PolicyConfig
from edge_sdk.resources import FixedReader

DRIFTS = {
    "steady": streams.unchanged,
    "tilted": streams.rotation(25),
    "dirty-lens": streams.darkening(0.4),
    "bad-sensor": streams.noise(0.3),
}

with tempfile.TemporaryDirectory() as folder:
    digits = factory.load(seed=0)
    factory.release_1(digits, Path(folder) / "checkpoint", seed=0)
    clock, trunks, fleet = ManualClock(), {}, []
    for number, (name, drift) in enumerate(DRIFTS.items()):
        config = DeviceConfig(
            device=name,
            mode="adapt",
            variant="int8",
            learn=LearnConfig(executor="inline"),
            policy=PolicyConfig(cooldown_s=600),
            drift=DriftConfig(alarms_per_day=1, rows_per_day=11_520),
        )
        home, rng = Path(folder) / name, np.random.default_rng([0, number])
        device = EdgeDevice(home, checkpoint=Path(folder) / "checkpoint", config=config, clock=clock, trunks=trunks,
                            resources=FixedReader(), rng=rng)  # fmt: skip
        stream = streams.DriftingStream(digits.life, rng=rng, base_labels=factory.BASE, drift_at=6, transform=drift)
        fleet.append(SimulatedDevice(device, stream, label_names=factory.LABELS, rng=rng))

    simulation = Fleet(fleet, clock=clock)
    simulation.run(30)
    score = digits.score.only(factory.BASE)
    for simulated in fleet:
        status = simulated.device.status()
        print(
            f"{status.device:11} drifted {simulated.accuracy(score, drifted=True):.3f}  "
            f"original {simulated.accuracy(score, drifted=False):.3f}  alarms {status.counters.alarms}  "
            f"promoted {status.counters.promotions}"
        )
    simulation.close()
