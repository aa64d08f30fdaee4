"""Push a base model from the coordinator: a canary first, then everyone, over a real broker on loopback."""

import tempfile
from pathlib import Path

import numpy as np

from demo import factory
from edge_sdk import DeviceConfig, EdgeDevice, Fleet, ManualClock, MqttTransport, SimulatedDevice, streams
from edge_sdk.config import UpdateConfig
from edge_sdk.resources import FixedReader
from edge_server import Coordinator, RolloutRules, Settings
from edge_server.broker import EmbeddedBroker

with tempfile.TemporaryDirectory() as folder, EmbeddedBroker() as broker:
    home, clock, digits = Path(folder), ManualClock(), factory.load(seed=0)
    factory.release_1(digits, home / "release-1", seed=0)
    factory.release_2(digits, home / "release-1", home / "release-2", seed=0)

    coordinator = Coordinator(
        home / "coordinator",
        transport=MqttTransport(broker.host, broker.port, client_id="coordinator"),
        clock=clock,
        settings=Settings(accept_unknown=True),
    )
    coordinator.start()
    coordinator.push(home / "release-1")  # the first release of a group goes to all at once

    fleet = []
    for number in range(5):
        rng = np.random.default_rng(number)
        # unsigned, which a device has to be told: docs/releases.md shows how to sign
        config = DeviceConfig(device=f"device-{number}", variant="int8", update=UpdateConfig(trust="none"))
        transport = MqttTransport(broker.host, broker.port, client_id=config.device)
        device = EdgeDevice(home / config.device, config=config, transport=transport, clock=clock,
                            resources=FixedReader(), rng=rng)  # fmt: skip
        stream = streams.DriftingStream(digits.life, rng=rng, base_labels=factory.BASE, drift_at=1e9)
        fleet.append(SimulatedDevice(device, stream, label_names=factory.LABELS, rng=rng))
    simulation = Fleet(fleet, clock=clock, coordinator=coordinator)
    simulation.connect()
    simulation.run(6)

    coordinator.push(home / "release-2", plan=RolloutRules(stages=(20, 100), soak_s=300, min_labelled=10))
    for _ in range(12):
        simulation.tick()
        releases = [simulated.device.status().release for simulated in fleet]
        print(f"tick {simulation.tick_number:2}: releases {releases}, rollout {coordinator.rollouts()[0].state.status}")
    print(coordinator.rollouts()[0].state.reason)
    simulation.close()
    coordinator.close()
