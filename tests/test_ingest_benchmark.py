"""The ingest benchmark commits all that is published, and its committed tables say what its results say."""

import json
from pathlib import Path

import ingest as benchmark
import pytest

COMMITTED = Path(benchmark.__file__).with_suffix(".json")


@pytest.mark.mosquitto
def test_every_report_is_committed_and_every_commit_acknowledged(tmp_path):
    out = tmp_path / "found.json"
    benchmark.main(["--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    committed = [run for run in found["runs"] if run["way"] == "commit"]
    assert [run["shape"] for run in committed] == list(benchmark.SHAPES)
    for run in committed:
        assert run["rows"] == found["reports"]
        assert run["dropped"] == 0
        assert 0 < run["acks"] <= run["rows"]
    beyond = found["overload"]
    assert (beyond["lost"], beyond["dropped"]) == (0, 0)
    assert beyond["sent"] > 2_000
    assert beyond["most_mb"] >= beyond["before_mb"] > 0
    assert "| rows lost |" in out.with_suffix(".md").read_text()
    assert all(shape in out.with_suffix(".md").read_text() for shape in benchmark.SHAPES)


def test_the_committed_tables_are_those_of_the_committed_results():
    assert COMMITTED.with_suffix(".md").read_text() == benchmark.markdown(json.loads(COMMITTED.read_text()))
