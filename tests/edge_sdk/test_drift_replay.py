"""`edge drift`: the monitors over files."""

import csv
import json
import re
import xml.etree.ElementTree as ET

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main
from edge_sdk.drift.page import page
from edge_sdk.drift.replay import Settings, replay
from edge_sdk.drift.table import Roles
from edge_sdk.errors import InputError
from edge_sdk.schema import InputSpec

HEADER = ["at", "temp", "humidity", "program", "said", "true"]
ROLES = Roles(time="at", prediction="said", label="true")
DRIFT_AT = 1200


def edge(*arguments):
    """Run `edge`; gives its result, whose exit code is the process's."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def machine(rng, count, *, drift_at=None, start=1_700_000_000.0):
    """Rows of a machine that becomes 4 degrees warmer, and whose humidity sensor fails now and then since."""
    for i in range(count):
        broken = drift_at is not None and i >= drift_at
        temp = rng.normal(24 if broken else 20, 3)
        humidity = rng.normal(50, 10)
        said = temp + humidity / 10 > 25
        true = temp + humidity / 10 + rng.normal(0, 1) > 25
        yield [
            start + 8.64 * i,
            f"{temp:.3f}",
            "" if rng.random() < (0.2 if broken else 0.01) else f"{humidity:.2f}",
            rng.choice(["idle", "run", "wash"]),
            "warm" if said else "cold",
            ("warm" if true else "cold") if rng.random() < 0.5 else "",
        ]


@pytest.fixture
def write(tmp_path):
    """Writes rows to a CSV file."""

    def make(name, rows):
        path = tmp_path / name
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows])
        return path

    return make


@pytest.fixture
def normal(write, rng):
    return write("normal.csv", machine(rng, 1500))


@pytest.fixture
def drifting(write, rng):
    return write("week.csv", machine(rng, 2000, drift_at=DRIFT_AT))


def test_a_drift_is_seen_soon_after_it_began_and_the_words_name_the_feature(drifting, normal):
    found = replay(drifting, normal, roles=ROLES)
    first = next(alarm for alarm in found.alarms if alarm.monitor == "input")
    assert DRIFT_AT < first.row <= DRIFT_AT + 128
    assert "temp" in first.words
    assert found.strips[0].name == "temp"
    assert first.time == pytest.approx(1_700_000_000 + 8.64 * (first.row - 1))


def test_normal_rows_raise_no_alarm(write, normal, rng):
    found = replay(write("calm.csv", machine(rng, 2000)), normal, roles=ROLES)
    assert not found.alarms
    assert found.settings.rows_per_day == pytest.approx(10_000, rel=1e-3)  # by the times
    assert all(len(trace.evidence) == len(found.ends) for trace in found.traces.values())


def test_a_table_without_predictions_is_watched_by_its_inputs_alone(drifting, normal):
    roles = Roles(ignore=("at", "said", "true"))
    found = replay(drifting, normal, roles=roles)
    assert any(alarm.monitor == "input" for alarm in found.alarms)
    assert "output" not in found.traces


def test_labels_are_watched_as_accuracy(write, rng):
    def rows(count, wrong):
        for row in machine(rng, count):
            if row[5] and rng.random() < wrong:
                row[5] = "cold" if row[4] == "warm" else "warm"
            yield row

    normal, now = write("normal.csv", rows(1500, 0)), write("now.csv", rows(1500, 0.5))
    found = replay(now, normal, roles=ROLES)
    assert {alarm.monitor for alarm in found.alarms} == {"accuracy"}


def test_a_larger_budget_never_raises_its_first_alarm_later(drifting, normal):
    found = replay(drifting, normal, roles=ROLES, settings=Settings(alarms_per_day=0.1))
    for name in found.traces:
        rows = [found.first_alarms(budget)[name] or 10**9 for budget in (0.01, 0.1, 1, 10)]
        assert rows == sorted(rows, reverse=True)


def test_too_short_a_reference_or_a_stream_without_rows_is_refused(write, rng, normal):
    with pytest.raises(InputError, match="has 150 rows; a reference needs at least 200"):
        replay(normal, write("short.csv", machine(rng, 150)))
    with pytest.raises(InputError, match="no rows"):
        replay(write("empty.csv", []), normal)


# ---- the page


def test_the_page_is_well_formed_needs_nothing_else_and_runs_nothing(drifting, normal):
    found = replay(drifting, normal, roles=ROLES)
    text = page(found)
    assert not re.search(r"<script|https?:|<link|@import|url\(", text)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)
    assert text.count("<svg") == len(found.traces) + len(found.strips)
    assert f"{found.alarms[0].row:,}" in text


def test_names_from_a_file_cannot_write_into_the_page(tmp_path, rng):
    path = tmp_path / "a<b>.csv"
    rows = [f"{x:.3f}" for x in rng.normal(0, 1, 300)]
    path.write_text("\n".join(["<script>alert(1)</script>", *rows]) + "\n")
    text = page(replay(path, path))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_feature_that_is_always_missing_is_told(tmp_path):
    path = tmp_path / "half.csv"
    path.write_text("\n".join(["x,y", *("1," for _ in range(300))]) + "\n")
    assert "always missing" in page(replay(path, path))


# ---- the commands


def test_replay_tells_draws_and_writes_json(drifting, normal, tmp_path):
    target = tmp_path / "out.html"
    arguments = ["--data", drifting, "--reference", normal, "--time", "at", "--prediction", "said", "--label", "true"]
    told = edge("drift", "replay", *arguments, "--html", target)
    assert told.exit_code == 0, told.output
    assert re.search(r"row 1[23]\d\d: input alarm, [a-z]+: .*temp", told.stdout)
    assert target.read_text().startswith("<!doctype html>")
    found = json.loads(edge("drift", "replay", *arguments, "--json", "--alarms-per-day", "1").stdout)
    assert found["alarms_per_day"] == 1
    assert found["alarms"][0]["row"] > DRIFT_AT


def test_replay_of_a_bad_file_says_where_and_exits_with_1(drifting, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text(drifting.read_text().replace("1700000008.64", "yesterday"))
    result = edge("drift", "replay", "--data", bad, "--reference", drifting, "--time", "at")
    assert result.exit_code == 1
    assert "bad.csv, row 2: expected a time" in result.stderr
    unknown = edge("drift", "replay", "--data", drifting, "--reference", drifting, "--time", "when")
    assert unknown.exit_code == 2


def test_suggestions_are_an_input_spec_that_takes_the_rows_they_came_from(normal):
    ignored = ["--ignore", "at", "--ignore", "said", "--ignore", "true"]
    toml = edge("drift", "suggest", "--data", normal, *ignored)
    assert toml.exit_code == 0, toml.output
    spec = msgspec.toml.decode(toml.stdout, type=InputSpec)
    found = json.loads(edge("drift", "suggest", "--data", normal, *ignored, "--format", "json").stdout)
    assert msgspec.convert(found["input"], InputSpec) == spec
    with normal.open() as file:
        for row in csv.DictReader(file):
            checked = spec.check({name: row[name] or None for name in ("temp", "humidity")} | {"program": "run"})
            assert np.isfinite(spec.apply(checked[None])).all()
    assert [feature["name"] for feature in found["features"]] == ["temp", "humidity", "program"]
    assert "# missing: " in toml.stdout


def test_suggestions_go_to_a_file_and_need_rows_enough(normal, tmp_path):
    target = tmp_path / "spec.toml"
    assert edge("drift", "suggest", "--data", normal, "--output", target).exit_code == 0
    assert target.read_text().startswith("# limits suggested from 1500 rows")
    short = tmp_path / "short.csv"
    short.write_text("x\n1\n2\n")
    result = edge("drift", "suggest", "--data", short)
    assert result.exit_code == 2
    assert "has 2 rows; limits need at least 200" in result.stderr
