"""Simulated fleets whose model predicts numbers: a table of one's own, judged by how much predictions are off."""

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_quantize import Dataset, build_checkpoint
from edge_sdk.cli import main
from edge_sdk.errors import ConfigError, LabelError
from edge_sdk.fleet_compare import compare
from edge_sdk.fleet_page import page
from edge_sdk.fleet_report import ALL, load_report, summary_lines
from edge_sdk.fleet_tally import error_band
from edge_sdk.manifest import MANIFEST_NAME, TargetSpec, parse_manifest
from edge_sdk.plan import prepare
from edge_sdk.schema import InputSpec
from edge_sdk.shard import Shard
from edge_sdk.simulate import Fleet
from edge_sdk.worlds import DataConfig, open_world

TOML = """
[fleet]
checkpoint = "made"
devices = 4
duration_h = 16
tick_s = 1800
predictions_per_h = 120

[data]
source = "table"
path = "plant.csv"
target_columns = ["heat", "power"]

[config]
mode = "adapt"
policy = { cooldown_s = 3600, min_fresh_rows = 40 }
gate = { factory_margin = 1.0, max_wait_s = 7200 }
replay.factory_rows = 0

[[cohort]]
name = "steady"
label = { share = 0.5, error = 0.02, noise = 0.01 }

[[cohort]]
name = "meter"
count = 2
label = { share = 0.8 }
drift = [{ effect = "shift", size = 1.5, at_h = 5 }]

[expect]
max_error = 0.5
max_error_from_h = 12
"""


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    """A folder with a table, the scenario, and a model that was made of the part that devices never see."""
    import torch
    from torch import nn

    folder = tmp_path_factory.mktemp("plant")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (1_500, 3)).round(4)
    heat, power = 20 + 5 * x[:, 0] + 2 * x[:, 1], 900 - 300 * x[:, 2]
    rows = np.column_stack([x, heat, power + rng.normal(0, 20, len(x))])
    lines = ["t,u,v,heat,power", *(",".join(f"{cell:.4f}" for cell in row) for row in rows)]
    (folder / "plant.csv").write_text("\n".join(lines) + "\n")
    (folder / "scenario.toml").write_text(TOML)
    world = open_world(DataConfig(source="table", path=str(folder / "plant.csv"), target_columns=("heat", "power")))
    x, y = world.factory.x, world.factory.y
    mean, std = y.mean(axis=0), y.std(axis=0)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    inputs, truth = torch.from_numpy(x), torch.from_numpy(((y - mean) / std).astype(np.float32))
    for _ in range(20):
        for chosen in torch.randperm(len(truth)).split(64):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(inputs[chosen]), truth[chosen]).backward()
            optimizer.step()
    build_checkpoint(
        net.eval(), Dataset(x[:450], y[:450], x[450:], y[450:]), labels=["heat", "power"], name="plant", release=1,
        target=folder / "made", created="2026-01-01T00:00:00Z", input_spec=InputSpec(shape=[3]), task="regression",
        targets=[TargetSpec(float(m), float(s), float(s) / 2) for m, s in zip(mean, std, strict=True)],
        measure_memory=False,
    )  # fmt: skip
    return folder


def run(folder, **options):
    with Fleet(prepare(folder / "scenario.toml"), **options) as fleet:
        return fleet.run()


@pytest.fixture(scope="module")
def story(plant):
    """One run, for tests that only look at it."""
    return run(plant, workers=1)


pytestmark = pytest.mark.torch


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(plant, story):
    again = run(plant, workers=2)
    assert again.event_log() == story.event_log()
    assert msgspec.json.encode(again.lasting()) == msgspec.json.encode(story.lasting())


def test_a_meter_that_is_off_is_noticed_and_learned(story):
    steady, meter = story.devices[:2], story.devices[2:]
    for device in meter:
        assert device.alarms > device.false_alarms
        assert device.promotions > 0
        assert device.before < 0.3
        assert device.under > 1
        assert device.after < 0.5 * device.under
        assert device.forgotten == device.original - device.before > 0.5
    for device in steady:
        assert not device.alarms
        assert device.error < 0.3
        assert device.forgotten < 0.1
    assert not story.unmet
    assert story.measured.accuracy is None
    assert 0 < story.measured.error <= 0.5


def test_what_a_report_says_of_errors_adds_up(plant, story):
    manifest = parse_manifest((plant / "made" / MANIFEST_NAME).read_bytes())
    assert story.targets == {"heat": manifest.targets[0].std, "power": manifest.targets[1].std}
    assert set(story.scores) == {ALL, "steady", "meter"}
    for curve in story.scores.values():
        known = [row for row in zip(curve.low, curve.value, curve.high, strict=True) if None not in row]
        assert known
        assert all(0 <= low <= value <= high for low, value, high in known)
    before, after = (story.scores["meter"].value[tick] for tick in (8, 10))  # the drift acts at the end of tick 9
    assert after > 1 > before
    errors = [device.error for device in story.devices[2:]]
    assert np.mean(errors) == pytest.approx(np.mean(story.scores["meter"].value), abs=1e-3)
    assert story.kept["meter"].value[0] == pytest.approx(np.mean([d.before for d in story.devices[2:]]), abs=1e-4)
    assert "off by" in summary_lines(story)[0]


def test_a_page_of_errors_draws_them_from_zero_and_names_their_unit(story):
    drawn = page(story)
    assert "Error over time" in drawn
    assert f"heat: {story.targets['heat']:.4g}" in drawn
    assert "rises is forgotten" in drawn
    assert not any(word in drawn for word in ("Accuracy over time", "nan,", "None", "<script"))


def test_reports_of_errors_are_compared_and_not_with_those_of_labels(story):
    rows = {row.name: row for row in compare(story, story)}
    assert rows["error after learning"].first < rows["error under drift"].first
    assert 0 < rows["within tolerance"].first < 1
    assert not any(row.clear for row in rows.values())
    labels = msgspec.structs.replace(story, targets={})
    with pytest.raises(ConfigError, match="one report is about heat, power, the other about labels"):
        compare(story, labels)


def test_the_command_fails_in_ci_where_errors_are_larger_than_stated(plant, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_sdk.simulate._fitting_workers", lambda _: 1)
    text = TOML.replace("duration_h = 16", "duration_h = 2").replace("at_h = 5", "at_h = 1")
    text = text.replace("max_error = 0.5\nmax_error_from_h = 12", "max_error = 0.001")
    path = plant / "short.toml"
    path.write_text(text)
    made = CliRunner().invoke(main, ["simulate", str(path), "--ci", "--json", str(tmp_path / "o.json")])
    assert made.exit_code == 1
    assert "not met: expect.max_error: 0.001 was stated" in made.stderr
    assert "off by" in made.stderr
    assert load_report(tmp_path / "o.json").measured.error > 0.001


def test_a_device_tells_by_how_much_each_target_is_off(plant, tmp_path):
    prepared = prepare(plant / "scenario.toml", devices=3)
    shard = Shard(prepared, range(1), tmp_path)
    shard.devices[0].open()
    device, score = shard.devices[0].device, prepared.world.score
    values = np.stack([prediction.values for prediction in device.predict_batch(score.x)])
    np.testing.assert_allclose(device.mean_error(score.x, score.y), np.abs(values - score.y).mean(axis=0), rtol=1e-6)
    with pytest.raises(LabelError, match="one finite number for each of heat, power"):
        device.mean_error(score.x[:1], ["heat"])
    shard.close()


def test_the_band_of_errors_is_that_of_devices_and_no_narrower_than_that_of_rows():
    rng = np.random.default_rng(0)
    rows = np.abs(rng.normal(0, 1, (8, 400)))
    made = np.full(8, 400)
    mean, low, high = error_band(rows.sum(axis=1), (rows**2).sum(axis=1), made)
    assert mean == pytest.approx(rows.mean())
    assert high - low >= 2 * 1.96 * rows.std() / np.sqrt(rows.size) - 1e-12
    rows[:4] += 1  # devices differ
    _, low, high = error_band(rows.sum(axis=1), (rows**2).sum(axis=1), made)
    assert (high - low) / 2 == pytest.approx(1.96 * rows.mean(axis=1).std(ddof=1) / np.sqrt(8), rel=0.01)
    one = error_band(rows[:1].sum(axis=1), (rows[:1] ** 2).sum(axis=1), made[:1])
    assert one[1] < one[0] < one[2]
    assert error_band(np.zeros(2), np.zeros(2), np.zeros(2, int)) is None
