"""The benchmarks run, and the committed tables say what the committed results say."""

import json
from pathlib import Path

import drift
import forgetting
import pytest
from drift_tables import markdown as drift_markdown
from forgetting_tables import markdown

pytestmark = pytest.mark.torch
BENCHMARKS = Path(forgetting.__file__).parent


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgetting")
    arguments = ["--digits", "--quick", "--seeds", "0", "--only", "incremental", "--cache", str(folder / "cache"),
                 "--out", str(folder / "found.json")]  # fmt: skip
    forgetting.main(arguments)
    return folder, arguments


def test_learning_new_classes_with_moments_beats_learning_them_naively(quick):
    folder, _ = quick
    found = json.loads((folder / "found.json").read_text())
    accuracy = {line["method"]: line["accuracy"] for line in found["incremental"] if not line["rows"]}
    assert accuracy["hybrid, defaults"] > accuracy["naive"] + 0.1
    assert all(not line["diverged"] for line in found["incremental"])


def test_the_tables_say_what_stood_in_and_what_was_not_measured(quick):
    folder, _ = quick
    text = (folder / "found.md").read_text()
    assert "digits (stand-in)" in text
    assert "Not measured in this run: it takes `--peers PYTHON`" in text


def test_what_has_been_measured_is_not_measured_again(quick, monkeypatch):
    folder, arguments = quick
    before = (folder / "found.json").read_bytes()
    monkeypatch.setattr(forgetting, "run", lambda *_: pytest.fail("measured again"))
    forgetting.main(arguments)
    assert (folder / "found.json").read_bytes() == before


def test_the_committed_tables_are_those_of_the_committed_results():
    results = json.loads((BENCHMARKS / "forgetting.json").read_text())
    assert (BENCHMARKS / "forgetting.md").read_text() == markdown(results)


@pytest.fixture(scope="module")
def drift_quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    drift.main(["--quick", "--only", "state", "concepts", "--cache", str(folder), "--out", str(folder / "drift.json")])
    return json.loads((folder / "drift.json").read_text()), (folder / "drift.md").read_text()


def test_the_state_of_the_drift_monitors_does_not_grow_with_the_rows(drift_quick):
    lines = drift_quick[0]["state"]
    assert lines[-1]["rows"] >= 50_000
    assert len({line["bytes"] for line in lines[1:]}) == 1


def test_dummies_stand_beside_the_scores_of_the_drift_monitors(drift_quick):
    found, text = drift_quick
    delays = {(line["who"], line["stream"]): line["delay"][0] for line in found["concepts"]["lines"]}
    for stream in ("SEA", "STAGGER", "Sine"):
        assert delays["dummy: always", stream] < delays["ours", stream] < delays["dummy: never", stream]
    assert found["concepts"]["rate"]["dummy: never"][0] == 0
    assert "A smoke test" in text
    assert "no peers in this run" in text


def test_the_committed_drift_tables_are_those_of_the_committed_results():
    results = json.loads((BENCHMARKS / "drift.json").read_text())
    assert (BENCHMARKS / "drift.md").read_text() == drift_markdown(results)
    assert not results["facts"]["quick"]
    assert results["facts"]["seeds from"] >= 1000
