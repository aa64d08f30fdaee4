"""Whole devices in a swarm, on a network that is slow and loses lines: all is delivered, once."""

import sqlite3
import time
from contextlib import closing

import pytest

from edge_sdk.faults import FaultProxy, Faults
from edge_sdk.swarm import Swarm
from edge_server import Coordinator, Settings

DEADLINE_S = 60
BAD = Faults(latency_s=0.01, jitter_s=0.02, loss=0.05, retransmit_s=0.05, life_s=1.0, refuse=0.2, bandwidth=2_000_000)
NAMES = ("dev-1", "dev-2", "dev-3")


def live_until(condition, clock, coordinator, devices, swarm):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, [device.waits_for(1) for device in devices]
        clock.advance(1)
        coordinator.pump()
        for device in devices:
            device.step()
        swarm.until(lambda: False, 0.01)


def stored_numbers(tmp_path, device):
    select = "SELECT seq FROM reports WHERE device = :device UNION ALL SELECT seq FROM events WHERE device = :device"
    with closing(sqlite3.connect(tmp_path / "coordinator" / "coordinator.db")) as database:
        return [row[0] for row in database.execute(f"{select} ORDER BY seq", {"device": device})]


@pytest.mark.torch
def test_a_fleet_installs_a_release_and_reports_once_through_a_bad_network(
    embedded_broker, make_device, checkpoint, tmp_path, clock, digits
):
    with (
        FaultProxy((embedded_broker.host, embedded_broker.port), faults=BAD, seed=1) as proxy,
        Swarm(embedded_broker.host, embedded_broker.port) as near,
        Swarm(proxy.host, proxy.port, retry_s=(0.05, 0.2)) as far,
    ):
        coordinator = Coordinator(
            tmp_path / "coordinator",
            transport=near.transport("coordinator"),
            clock=clock,
            settings=Settings(accept_unknown=True),
        )
        coordinator.start()
        assert near.until(lambda: near.connected == 1, DEADLINE_S)
        coordinator.push(checkpoint)
        devices = [make_device(name, checkpoint=None, device=name, transport=far.transport(name)) for name in NAMES]
        for device in devices:
            device.connect()

        def until(condition):
            live_until(condition, clock, coordinator, devices, far)

        until(lambda: all(device.ready for device in devices))
        for _ in range(5):
            for device in devices:
                for x in digits.life.x[:5]:
                    device.predict(x)
            clock.advance(300)
            for device in devices:
                device.step()
        until(lambda: not any(device.waits_for(coordinator.desired_revision()) for device in devices))
        assert proxy.accepted > len(NAMES)  # this seed refuses one of the first three connections
        for device in devices:
            device.stop()
        coordinator.close()
    for name in NAMES:
        numbers = stored_numbers(tmp_path, name)
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= 5
