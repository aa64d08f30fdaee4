"""The benchmark of releases runs, and its committed tables say what its results say."""

import json
from pathlib import Path

import pytest
import releases as benchmark

COMMITTED = Path(benchmark.__file__).with_suffix(".json")
SIZE = 20 * 65_536 + 1


@pytest.mark.mosquitto
def test_a_small_fleet_gets_the_release_and_no_large_block_twice(tmp_path):
    out = tmp_path / "found.json"
    benchmark.main(["--devices", "4", "--size", str(SIZE), "--rounds", "1", "--patience", "60", "--out", str(out)])
    plain, ours = json.loads(out.read_text())["runs"]
    assert (plain["way"], ours["way"]) == ("plain", "ours")
    assert plain["large_blocks"] == 20
    assert 20 <= ours["large_blocks"] <= 30, "each device asked for itself"
    assert all(run["seconds"] > 0 and run["broker_mb"] > 0 for run in (plain, ours))
    assert all(what in out.with_suffix(".md").read_text() for what in benchmark.EXPECTED)


def test_the_committed_tables_are_those_of_the_committed_results():
    assert COMMITTED.with_suffix(".md").read_text() == benchmark.markdown(json.loads(COMMITTED.read_text()))
