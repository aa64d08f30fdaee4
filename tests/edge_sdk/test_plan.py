"""Plans: what will happen to each device is decided by the seed, as often and as long as the scenario says."""

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.clock import ManualClock
from edge_sdk.errors import ConfigError
from edge_sdk.manifest import MANIFEST_NAME, REQUIRED, FileEntry, LatentSpec, Manifest, TargetSpec
from edge_sdk.plan import SkewedClock, plan_devices, prepare
from edge_sdk.scenario import Scenario
from edge_sdk.schema import InputSpec
from edge_sdk.streams import HOUR_S, Pool, World

HOURS = 200
POOL = Pool(np.arange(90, dtype=np.float32).reshape(30, 3), np.arange(30, dtype=np.int64) % 3)
WORLD = World("made", POOL, POOL, POOL, ("a", "b", "c"), InputSpec(shape=[3]), ("t", "u", "v"))


NUMBERS = Pool(POOL.x, np.stack([np.arange(30.0), -10 * np.arange(30.0)], axis=1))
MEASURED = World("made", NUMBERS, NUMBERS, NUMBERS, (), InputSpec(shape=[3]), ("t", "u", "v"), targets=("p", "q"))


def planned(*cohorts, world=WORLD, devices=10, seed=0, **options):
    """Plans of a fleet without a file."""
    scenario = msgspec.convert(
        {
            "fleet": {"checkpoint": "x", "devices": devices, "seed": seed, "duration_h": HOURS},
            "data": {"source": "sea"},
            "cohort": list(cohorts),
            "file": "made.toml",
            **options,
        },
        Scenario,
    )
    return plan_devices(scenario, world)


def one(seed=0, **cohort):
    (plan,) = planned({"name": "a", **cohort}, devices=1, seed=seed)
    return plan


# ---- who is who


def test_devices_are_named_and_seeded_apart():
    plans = planned({"name": "a", "count": 2}, {"name": "b"}, devices=13)
    assert [plan.name for plan in plans][:4] == ["a-0", "a-1", "b-00", "b-01"]
    assert [plan.config.device for plan in plans] == [plan.name for plan in plans]
    assert len({plan.config.seed for plan in plans}) == 13
    assert len({plan.rng("stream").random() for plan in plans}) == 13
    assert plans[0].rng("stream").random() != plans[0].rng("labels").random()


def test_a_scenario_without_cohorts_has_devices_all_alike():
    assert [plan.name for plan in planned(devices=2)] == ["device-0", "device-1"]


def busy(name, **options):
    return {
        "name": name,
        "drift": [{"effect": "noise", "at_h": 10, "spread_h": 20}],
        "network": {"online_share": 0.7},
        "battery": {"spread_h": 4},
        "clock": {"skew_s": 60, "drift_ppm": 100},
        "loss": {"share": 0.3},
        "poison": {"share": 0.3},
        **options,
    }


def test_the_same_seed_gives_the_same_plans_and_another_seed_others():
    assert planned(busy("a")) == planned(busy("a"))
    assert planned(busy("a")) != planned(busy("a"), seed=1)


def test_another_cohort_changes_nothing_for_a_device():
    alone = planned(busy("a"), devices=5)
    assert planned(busy("a", count=5), busy("b"), devices=9)[:5] == alone
    assert planned(busy("b"), busy("a", count=5), devices=9)[4:] == alone


def test_settings_go_from_the_simulation_over_the_fleet_to_the_cohort():
    first, second = planned(
        {"name": "a", "count": 1, "config": {"learn": {"learner": "sgd"}}, "predictions_per_h": 5},
        {"name": "b"},
        devices=2,
        config={"mode": "adapt", "learn": {"learner": "slda", "passes": 3}},
    )
    assert (first.config.mode, first.config.learn.learner, first.config.learn.passes) == ("adapt", "sgd", 3)
    assert (second.config.learn.learner, second.config.learn.executor, second.config.variant) == (
        "slda",
        "inline",
        "int8",
    )
    assert (first.config.drift.rows_per_day, second.config.drift.rows_per_day) == (120, 1_440)
    (plan,) = planned({"name": "a", "config": {"drift": {"rows_per_day": 7}}}, devices=1)
    assert plan.config.drift.rows_per_day == 7


def test_each_device_drifts_at_a_time_of_its_own():
    plans = planned(busy("a"), devices=50)
    starts = [plan.drifts[0].at_h for plan in plans]
    assert min(starts) >= 10
    assert max(starts) <= 30
    assert len(set(starts)) == 50
    assert {plan.drifts[0].spread_h for plan in plans} == {0}


def test_drifts_of_the_fleet_come_before_those_of_the_cohort():
    plans = planned({"name": "a", "drift": [{"effect": "offset"}]}, devices=1, drift=[{"effect": "noise"}])
    assert [drift.effect for drift in plans[0].drifts] == ["noise", "offset"]


@given(st.floats(0.1, 10_000), st.lists(st.floats(0, 1e5), max_size=20))
def test_predictions_add_up_whatever_the_ticks(rate, cuts):
    plan = one(predictions_per_h=rate)
    times = [0.0, *sorted(cuts), 1e5]
    counts = [plan.predictions(a, b) for a, b in pairwise(times)]
    assert min(counts) >= 0
    assert sum(counts) == plan.predictions(0, 1e5)
    assert sum(counts) == pytest.approx(1e5 / 3600 * rate, abs=1)


# ---- network, loss, clocks


def offline_share(plan):
    return sum(min(end, HOURS * HOUR_S) - start for start, end in plan.offline) / (HOURS * HOUR_S)


def test_devices_are_online_for_their_share_of_the_time():
    plans = planned({"name": "a", "network": {"online_share": 0.75, "outage_h": 2}}, devices=60)
    assert np.mean([offline_share(plan) for plan in plans]) == pytest.approx(0.25, abs=0.03)
    lengths = [end - start for plan in plans for start, end in plan.offline]
    assert np.mean(lengths) == pytest.approx(2 * HOUR_S, rel=0.1)
    assert all(a[1] < b[0] for plan in plans for a, b in pairwise(plan.offline))


def test_outages_begin_and_end_on_time_also_where_they_overlap():
    plan = one(network={"outage": [{"at_h": 5, "for_h": 2}, {"at_h": 6, "for_h": 3}, {"at_h": 20, "for_h": 1}]})
    online = [plan.online(hour * HOUR_S) for hour in (0, 4.99, 5, 7.5, 8.99, 9, 19.9, 20, 21)]
    assert online == [True, True, False, False, False, True, True, False, True]


def test_a_device_may_never_be_online():
    plan = one(network={"online_share": 0.0})
    assert not any(plan.online(hour * HOUR_S) for hour in range(HOURS))


def test_the_share_of_lost_and_of_poisoned_devices_is_kept_exactly():
    plans = planned(
        {"name": "a", "loss": {"share": 0.2, "from_h": 50, "until_h": 60}, "poison": {"share": 0.1}}, devices=40
    )
    lost = [plan for plan in plans if plan.lost_at_s < math.inf]
    assert len(lost) == 8
    assert all(50 * HOUR_S <= plan.lost_at_s <= 60 * HOUR_S for plan in lost)
    assert all(plan.is_on(49 * HOUR_S) and not plan.is_on(61 * HOUR_S) for plan in lost)
    assert sum(plan.poison is not None for plan in plans) == 4
    few = planned({"name": "a", "loss": {"share": 0.01}}, devices=3)
    assert sum(plan.lost_at_s < math.inf for plan in few) == 1


def test_clocks_are_wrong_within_their_bounds():
    plans = planned({"name": "a", "clock": {"skew_s": 60, "drift_ppm": 1_000}}, devices=40)
    skews = [plan.clock_ahead(0) for plan in plans]
    assert -60 <= min(skews) < 0 < max(skews) <= 60
    plan = plans[0]
    clock = ManualClock(1_000)
    wrong = SkewedClock(clock, plan)
    assert wrong.now() == pytest.approx(1_000 + plan.skew_s)
    clock.advance(HOUR_S)
    assert wrong.now() == pytest.approx(1_000 + HOUR_S * (1 + plan.clock_rate) + plan.skew_s)
    assert one().clock_ahead(1e6) == 0


# ---- battery


def test_a_device_on_mains_has_no_battery():
    plan = one()
    assert plan.battery(HOUR_S) == (None, True)
    state = plan.resources(25.5 * HOUR_S)
    assert (state.battery, state.on_mains, state.local_minute) == (None, True, 90)


def test_a_battery_drains_by_day_and_charges_at_night():
    plan = one(battery={"start": 0.9, "drain_per_h": 0.05, "charge_per_h": 0.2, "plug_from_h": 20, "plug_until_h": 4})
    seen = [plan.battery(hour * HOUR_S) for hour in (0, 0.25, 0.5, 4, 10, 19.99, 20, 22, 24, 28)]
    charges, plugged = zip(*seen, strict=True)
    assert charges == pytest.approx([0.9, 0.95, 1, 1, 0.7, 0.2005, 0.2, 0.6, 1, 1])
    assert plugged == (True, True, True, False, False, False, True, True, True, False)


def test_an_empty_battery_turns_the_device_off_until_it_is_plugged_in():
    plan = one(battery={"start": 0.2, "drain_per_h": 0.1, "charge_per_h": 0.5, "plug_from_h": 12, "plug_until_h": 13})
    assert [plan.is_on(hour * HOUR_S) for hour in (0, 1.9, 2, 11.9, 12, 12.5, 17.9, 18.1)] == [
        True, True, False, False, True, True, True, False,
    ]  # fmt: skip


@given(
    st.floats(0, 1), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 23), st.floats(0.1, 23), st.floats(0, 24),
    st.floats(0, HOURS),
)  # fmt: skip
def test_a_charge_stays_between_empty_and_full(start, drain, charge, plug_from, length, spread, hour):
    until = (plug_from + length) % 24
    plan = one(battery={"start": start, "drain_per_h": drain, "charge_per_h": charge, "plug_from_h": plug_from,
                        "plug_until_h": until, "spread_h": spread})  # fmt: skip
    level, plugged = plan.battery(hour * HOUR_S)
    assert -1e-9 <= level <= 1 + 1e-9
    later, still = plan.battery((hour + 0.01) * HOUR_S)
    if plugged == still:
        assert (later >= level - 1e-9) if plugged else (later <= level + 1e-9)
    assert abs(later - level) <= 0.01 * max(drain, charge) + 1e-9


# ---- labels


def told(count=4_000, time_h=0.0, **cohort):
    plan = one(**cohort)
    y = np.arange(count, dtype=np.int64) % 3
    return y, plan.late_labels(WORLD).draw(y, time_h * HOUR_S)


def test_labels_come_for_their_share_and_are_right_by_default():
    y, said = told(label={"share": 0.25})
    assert len(said) / 4_000 == pytest.approx(0.25, abs=0.03)
    assert all(label.label == "abc"[y[label.row]] and label.due_s == 0 for label in said)


def test_labels_are_late_by_at_least_their_delay_and_on_average_by_the_spread_more():
    _, said = told(time_h=3, label={"share": 1, "delay_h": 2, "delay_spread_h": 4})
    delays = np.array([label.due_s for label in said]) / HOUR_S - 3
    assert delays.min() >= 2
    assert delays.mean() == pytest.approx(6, rel=0.1)


def test_noise_makes_its_share_of_labels_wrong():
    y, said = told(label={"share": 1, "noise": 0.2})
    wrong = [label.label for label in said if label.label != "abc"[y[label.row]]]
    assert len(wrong) / 4_000 == pytest.approx(0.2, abs=0.03)
    assert set(wrong) == {"a", "b", "c"}


def test_the_budget_of_labels_is_kept_each_day():
    labels = one(label={"share": 1, "per_day": 10}).late_labels(WORLD)
    y = np.zeros(4, np.int64)
    counts = [len(labels.draw(y, hour * HOUR_S)) for hour in (0, 1, 2, 3, 24, 25)]
    assert counts == [4, 4, 2, 0, 4, 4]


@pytest.mark.parametrize(
    ("poison", "lies"),
    [
        ({"kind": "flip"}, {("a", "b"), ("b", "c"), ("c", "a")}),
        ({"kind": "target", "label": "b"}, {("a", "b"), ("b", "b"), ("c", "b")}),
        ({"kind": "random"}, {(a, b) for a in "abc" for b in "abc" if a != b}),
    ],
)
def test_poisoned_devices_are_lied_to_from_the_beginning_of_the_lies(poison, lies):
    for hour, expected in ((4.9, {(label, label) for label in "abc"}), (5, lies)):
        y, said = told(time_h=hour, label={"share": 1}, poison={"share": 1, "from_h": 5, **poison})
        assert {("abc"[y[label.row]], label.label) for label in said} == expected


def test_poison_may_be_a_part_of_the_labels():
    y, said = told(label={"share": 1}, poison={"share": 1, "labels": 0.3})
    assert np.mean([label.label != "abc"[y[label.row]] for label in said]) == pytest.approx(0.3, abs=0.03)


def test_wrong_labels_are_labels_that_occur():
    plans = planned(
        {"name": "a", "label": {"share": 1, "noise": 1}}, devices=1, data={"source": "sea", "labels": ["a", "b"]}
    )
    said = plans[0].late_labels(WORLD).draw(np.zeros(50, np.int64), 0)
    assert {label.label for label in said} == {"b"}


def test_other_settings_do_not_change_which_labels_come():
    _, plain = told(label={"share": 0.3})
    _, noisy = told(label={"share": 0.3, "noise": 0.5, "delay_h": 3})
    assert [label.row for label in plain] == [label.row for label in noisy]


# ---- numbers in place of labels


def told_numbers(**cohort):
    (plan,) = planned({"name": "a", **cohort}, devices=1, world=MEASURED)
    y = np.tile(NUMBERS.y, (100, 1))
    said = plan.late_labels(MEASURED).draw(y, 0)
    return y[[label.row for label in said]], np.array([label.label for label in said])


def test_numbers_are_told_as_they_are_by_default():
    truths, said = told_numbers(label={"share": 0.25})
    assert len(said) / 3_000 == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(truths, said)


def test_each_number_may_be_read_off_with_an_error_in_its_own_spread():
    truths, said = told_numbers(label={"share": 1, "error": 0.1})
    np.testing.assert_allclose((said - truths).std(axis=0), 0.1 * NUMBERS.y.std(axis=0), rtol=0.1)
    np.testing.assert_allclose((said - truths).mean(axis=0), 0, atol=0.01 * NUMBERS.y.std(axis=0).max())


@pytest.mark.parametrize(
    ("cohort", "share"),
    [({"label": {"share": 1, "noise": 0.2}}, 0.2),
     ({"label": {"share": 1}, "poison": {"share": 1, "kind": "random", "labels": 0.6}}, 0.6)],
)  # fmt: skip
def test_a_wrong_number_is_that_of_another_sample(cohort, share):
    truths, said = told_numbers(**cohort)
    assert (truths != said).any(axis=1).mean() == pytest.approx(share, abs=0.05)
    np.testing.assert_array_equal(said[:, 1], -10 * said[:, 0])  # both are of the same one


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"drift": [{"effect": "labels", "labels": {"a": 0.5}}]}, "drift[0]: effect 'labels' is for labels"),
        ({"cohort": [{"name": "a", "drift": [{"effect": "swap", "cycle": ["a", "b"]}]}]}, "cohort[0].drift[0]: effect"),
        ({"cohort": [{"name": "a", "poison": {"share": 0.5}}]}, "cohort[0].poison.kind: 'flip' is for labels"),
        ({"cohort": [{"name": "a", "poison": {"share": 0.5, "kind": "target", "label": "b"}}]},
         "cohort[0].poison.kind: 'target' is for labels"),
    ],
)  # fmt: skip
def test_what_means_nothing_to_numbers_is_an_error_with_file_and_key(options, key):
    with pytest.raises(ConfigError) as caught:
        planned(**options, world=MEASURED)
    assert str(caught.value).startswith(f"made.toml: {key}")


# ---- the whole


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"cohort": [{"name": "a", "drift": [{"effect": "noise"}, {"effect": "blur"}]}]}, "cohort[0].drift[1]: effect"),
        ({"drift": [{"effect": "swap", "cycle": ["a", "z"]}]}, "drift[0]: no label 'z'"),
        ({"cohort": [{"name": "a", "poison": {"kind": "target", "label": "z"}}]}, "cohort[0].poison.label: no label"),
        ({"data": {"source": "sea", "labels": ["z"]}}, "data.labels: no label 'z'"),
        ({"cohort": [{"name": "a", "label": {"error": 0.1}}]}, "cohort[0].label.error: it is for numbers"),
        ({"drift": [{"effect": "shift"}]}, "drift[0]: effect 'shift' is for numbers"),
    ],
)
def test_what_does_not_fit_the_data_is_an_error_with_file_and_key(options, key):
    with pytest.raises(ConfigError) as caught:
        planned(**options)
    assert str(caught.value).startswith(f"made.toml: {key}")


@pytest.fixture
def file(tmp_path):
    """A scenario on river's SEA, beside the manifest of a model that takes it."""

    def write(*, devices=4, source="sea", more="", **options):
        files = dict.fromkeys(REQUIRED, FileEntry(1, "0" * 64))
        manifest = Manifest(
            name="made", release=1, created="2026-01-01T00:00:00Z", files=files, latent=LatentSpec(dim=4),
            **{"labels": ["no", "yes"], "input": InputSpec(shape=[3]), **options},
        )  # fmt: skip
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
        path = tmp_path / "scenario.toml"
        path.write_text(
            f'[fleet]\ncheckpoint = "one"\ndevices = {devices}\n[data]\nsource = "{source}"\nrows = 200\n{more}'
        )
        return path

    return write


def test_prepare_gives_all_that_an_engine_needs(file):
    ready = prepare(file())
    assert (ready.manifest.release, ready.world.name, len(ready.devices)) == (1, "sea", 4)
    x, y = ready.devices[0].stream(ready.world).draw(5, 0)
    assert (x.shape, y.shape) == ((5, 3), (5,))
    assert len(prepare(file(), devices=7, seed=3).devices) == 7
    assert prepare(file(), seed=3).devices[0].config.seed != ready.devices[0].config.seed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"input": InputSpec(shape=[4])},
            "fleet.checkpoint: made takes samples of shape [4]; sea (data.source) gives [3]",
        ),
        ({"labels": ["x", "y"]}, "fleet.checkpoint: made knows none of the data's labels (no, yes), but x, y"),
        ({"task": "multilabel", "thresholds": [0.5, 0.5]}, "fleet.checkpoint: made has task=multilabel"),
        (
            {"labels": ["y"], "task": "regression", "targets": [TargetSpec(0, 1, 1)]},
            "fleet.checkpoint: made predicts numbers (y); sea (data.source) gives labels (no, yes); name a table's",
        ),
        (
            {"source": "friedman", "input": InputSpec(shape=[10])},
            "fleet.checkpoint: made predicts labels (no, yes); friedman (data.source) gives numbers (y)",
        ),
        (
            {
                "source": "friedman",
                "input": InputSpec(shape=[10]),
                "labels": ["z"],
                "task": "regression",
                "targets": [TargetSpec(0, 1, 1)],
            },
            "fleet.checkpoint: made predicts z; the data give y, and the order counts",
        ),
        (
            {
                "source": "friedman",
                "input": InputSpec(shape=[10]),
                "labels": ["y"],
                "task": "regression",
                "targets": [TargetSpec(0, 1, 1)],
                "more": "[expect]\nmin_accuracy = 0.5\n",
            },
            "expect.min_accuracy: made predicts numbers; state expect.max_error",
        ),
        ({"more": "[expect]\nmax_error = 0.5\n"}, "expect.max_error: made predicts labels; state expect.min_accuracy"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(file, options, says):
    path = file(**options)
    with pytest.raises(ConfigError) as caught:
        prepare(path)
    assert str(caught.value).startswith(f"{path}: {says}")
