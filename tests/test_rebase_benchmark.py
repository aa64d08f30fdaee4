"""The benchmark of a change of trunk runs, and its committed table says what its results say."""

import json
import logging
from pathlib import Path

import pytest
import rebase as benchmark

pytestmark = pytest.mark.torch
COMMITTED = Path(benchmark.__file__).with_suffix(".json")


@pytest.fixture(autouse=True)
def logged():
    """The benchmark turns warnings off for its whole process."""
    yield
    logging.disable(logging.NOTSET)


def test_what_was_learned_crosses_over_by_translation_and_by_encoding_anew(tmp_path, monkeypatch):
    ways = ("plain new base", "translated, 100 inputs", "re-encoded")
    monkeypatch.setattr(benchmark, "WAYS", {way: benchmark.WAYS[way] for way in ways})
    benchmark.main(["--digits", "--seeds", "1", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path)])
    own = {line["way"]: line["own"] for line in json.loads((tmp_path / "rebase.json").read_text())["lines"]}
    assert set(ways) < set(own)
    assert min(own["translated, 100 inputs"], own["re-encoded"]) > own["plain new base"] + 0.3
    assert all(f"| {way} |" in (tmp_path / "rebase.md").read_text() for way in own)


def test_the_committed_table_is_that_of_the_committed_results():
    found = json.loads(COMMITTED.read_text())
    assert COMMITTED.with_suffix(".md").read_text() == benchmark.page(found["source"], found["lines"])
