"""Push a base model from the coordinator: a canary first, then everyone, over a real broker on loopback."""

import tempfile
from pathlib import Path

from demo import factory
from edge_sdk import Fleet
from edge_sdk.plan import prepare
from edge_server.broker import EmbeddedBroker
from edge_server.simulation import open_coordinator

SCENARIO = """
fleet = { checkpoint = "release-1", devices = 5, duration_h = 2, tick_s = 300, predictions_per_h = 480 }
data = { source = "digits", labels = ["0", "1", "2", "3", "4", "5", "6", "7"] }
config.update.trust = "none" # unsigned, which a device has to be told: docs/releases.md shows how to sign

[[release]]
checkpoint = "release-2"
at_h = 0.5
rollout = { stages = [20, 100], soak_s = 300, min_labelled = 10 }
"""

with tempfile.TemporaryDirectory() as folder, EmbeddedBroker() as broker:
    home, digits = Path(folder), factory.load(seed=0)
    factory.release_1(digits, home / "release-1", seed=0)
    factory.release_2(digits, home / "release-1", home / "release-2", seed=0)
    (home / "scenario.toml").write_text(SCENARIO)
    url = f"mqtt://{broker.host}:{broker.port}"
    with Fleet(prepare(home / "scenario.toml"), broker=url, coordinator=open_coordinator) as fleet:
        report = fleet.run(
            on_tick=lambda now: print(f"{now.time_s / 60:3.0f} min: releases {[d.release for d in now.devices]}")
        )
    for release in report.releases:
        for hours, status, reason in release.history:
            print(f"{release.name} at {hours:.2f} h: {status}, {reason}")
