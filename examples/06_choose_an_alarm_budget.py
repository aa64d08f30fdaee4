"""Choose how often the drift monitors may cry wolf, before anything is shipped: replay a week of logged rows.

A pump's temperature rises by a third of its usual spread on the third day. How soon that is seen depends on one number,
the false alarms that are tolerated a day. `edge drift replay` does the same on CSV files from the command line, and
`edge drift suggest` suggests limits. Runs offline, in a second.
"""

import csv
import tempfile
from pathlib import Path

import numpy as np

from edge_sdk.drift.page import page
from edge_sdk.drift.replay import Settings, replay
from edge_sdk.drift.table import Roles

MINUTES = 24 * 60


def write(path: Path, days: int, *, warmer_from: int | None = None, seed: int) -> Path:
    """A row a minute, as an app may have logged them."""
    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["time", "temperature", "vibration", "program"])
        for minute in range(days * MINUTES):
            warmer = 1.0 if warmer_from is not None and minute >= warmer_from * MINUTES else 0.0
            row = [rng.normal(60 + warmer, 3), rng.exponential(0.4), rng.choice(["idle", "fill", "empty"])]
            table.writerow([1_767_225_600 + 60 * minute, *row])
    return path


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    normal = write(folder / "normal.csv", 2, seed=0)
    week = write(folder / "week.csv", 7, warmer_from=3, seed=1)
    for alarms_per_day in (0.01, 0.1, 1.0):
        settings = Settings(alarms_per_day=alarms_per_day)
        found = replay(week, normal, roles=Roles(time="time"), settings=settings)
        first = min((alarm.row for alarm in found.alarms), default=None)
        late = "never seen" if first is None else f"seen {(first - 3 * MINUTES) / 60:.1f} hours after it began"
        print(f"{alarms_per_day:>4} false alarms a day: {late}")
    for alarm in found.alarms:
        print(f"row {alarm.row}, {alarm.monitor}: {alarm.words}")
    (folder / "week.html").write_text(page(found))
    print(f"drawn in {len((folder / 'week.html').read_text()) // 1000} kB of HTML")
