"""The transport benchmark runs, keeps what it sends, and its committed tables say what its results say."""

import json
from pathlib import Path

import pytest
import transport as benchmark

COMMITTED = Path(benchmark.__file__).with_suffix(".json")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("transport") / "found.json"
    benchmark.main(["--quick", "--brokers", "iotcore", "--out", str(out)])
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_everything_that_was_due_was_sent_and_delivered(quick):
    for run in quick[0]["runs"]:
        assert run["sent"] == run["asked"] == run["devices"] * 2
        assert run["kept"] == 1.0
        assert run["connected"] == run["devices"]


def test_the_tables_have_every_run_and_what_was_expected(quick):
    found, table = quick
    assert table.count("| iotcore |") == len(found["runs"]) == 3
    assert all(what in table for what in benchmark.EXPECTED)


def test_a_run_that_did_not_connect_is_in_the_table_as_not_met():
    run = {"broker": "mosquitto", "devices": 5_000, "interval_s": 1.0, "threads": False, "connected": 1_000}
    assert benchmark.line(run).endswith("| **no** |\n")


def test_the_committed_tables_are_those_of_the_committed_results():
    assert COMMITTED.with_suffix(".md").read_text() == benchmark.markdown(json.loads(COMMITTED.read_text()))
