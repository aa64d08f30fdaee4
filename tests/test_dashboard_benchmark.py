"""The benchmark of the dashboard measures what it says, and its committed table says what its results say."""

import json
from pathlib import Path

import dashboard as benchmark
import pytest

COMMITTED = Path(benchmark.__file__).with_suffix(".json")


@pytest.mark.browser
def test_a_page_is_painted_and_its_map_drawn_after_the_server_has_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PAGES", ("/",))
    benchmark.main(["--devices", "60", "--repeats", "1", "--out", str(tmp_path / "found.json")])
    [found] = json.loads((tmp_path / "found.json").read_text())["runs"]["/"]
    assert 0 < found["server_ms"] < found["painted_ms"]
    assert found["server_ms"] < found["map_ms"]
    assert "60 devices" in (tmp_path / "found.md").read_text()


def test_the_committed_table_is_that_of_the_committed_results():
    results = json.loads(COMMITTED.read_text())
    assert COMMITTED.with_suffix(".md").read_text() == benchmark.markdown(results)
    assert results["devices"] == 10_000
