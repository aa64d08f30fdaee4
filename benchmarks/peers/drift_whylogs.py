"""whylogs' profile, which keeps sketches of every column; it comes without numpy. See drift_worker.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

from drift_worker import serve
from whylogs.core import DatasetProfile

profile = DatasetProfile()


def cost(rows: str) -> float:
    """Seconds a row of `track`, of a JSON file with a list of dicts."""
    given = json.loads(Path(rows).read_text())
    begun = time.perf_counter()
    for row in given:
        profile.track(row)
    return (time.perf_counter() - begun) / len(given)


def state() -> int:
    """Bytes of the profile as it is sent."""
    return len(profile.view().serialize())


if __name__ == "__main__":
    serve(cost=cost, state=state)
