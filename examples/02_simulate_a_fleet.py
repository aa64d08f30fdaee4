"""Simulate a fleet before you ship a setting: the real device code, in the time of a clock that is advanced.

Four cohorts meet four drifts; no network is needed, and the same seed gives the same result. `edge simulate` does the
same from the command line, and draws what came out.
"""

import tempfile
from pathlib import Path

from demo import factory
from edge_sdk import Fleet
from edge_sdk.fleet_report import summary_lines
from edge_sdk.plan import prepare

SCENARIO = """
fleet = { checkpoint = "checkpoint", devices = 4, duration_h = 8, tick_s = 600, predictions_per_h = 240 }
data = { source = "digits", labels = ["0", "1", "2", "3", "4", "5", "6", "7"] }

[config]
mode = "adapt"
policy.cooldown_s = 1800

[[cohort]]
name = "steady"

[[cohort]]
name = "tilted"
count = 1
drift = [{ effect = "rotation", size = 25, at_h = 2 }]

[[cohort]]
name = "dirty-lens"
count = 1
drift = [{ effect = "darkening", size = 0.4, at_h = 2, course = "incremental", over_h = 2 }]

[[cohort]]
name = "bad-sensor"
count = 1
drift = [{ effect = "noise", size = 0.3, at_h = 2 }]
"""

with tempfile.TemporaryDirectory() as folder:
    factory.release_1(factory.load(seed=0), Path(folder) / "checkpoint", seed=0)
    path = Path(folder) / "scenario.toml"
    path.write_text(SCENARIO)
    with Fleet(prepare(path)) as fleet:
        report = fleet.run()
print(*summary_lines(report), sep="\n")
for device in report.devices:
    print(f"{device.device:14} drifted {device.after or 0:.3f}, original {device.original:.3f}, "
          f"alarms {device.alarms}, promoted {device.promotions}")  # fmt: skip
