import math

import msgspec
import numpy as np
import pytest

from edge_server.gates import DeviceMetrics, Sums, read, readings, share
from edge_server.plan import Gate, RolloutPlan
from edge_server.power import detectable_effect, required_rows
from edge_server.rollout import failure

PLAN = RolloutPlan(release=2, stages=(20, 100), min_labelled=100, max_accuracy_drop=0.05)


def fleet(count=10, on=0, **changes):
    """Devices, the first `on` of them on the candidate."""
    return [
        DeviceMetrics(device=f"d{i}", on_candidate=i < on, switched=i < on, reports=10, seconds=3000.0, **changes)
        for i in range(count)
    ]


def scored(entries, before, after, *, labelled=200):
    return [
        msgspec.structs.replace(
            entry,
            labelled=labelled,
            correct=round(labelled * after),
            labelled_before=labelled,
            correct_before=round(labelled * before),
        )
        for entry in entries
    ]


def valued(entries, metric, after, before=None):
    return [msgspec.structs.replace(entry, values={metric: (after, before or Sums())}) for entry in entries]


def windows(count, ms, spread=0.3):
    """Logarithms of latencies that are `ms` in the middle."""
    middle = math.log(ms)
    return Sums(count, count * middle, count * (middle**2 + spread**2))


def verdict(gate, metrics, *, level=0.01, paired=False):
    treated = [entry for entry in metrics if entry.on_candidate]
    control = [entry for entry in metrics if not entry.on_candidate]
    return read(gate, treated, control, level, release=2, paired=paired)


class TestAccuracy:
    def test_a_loss_is_harm_and_the_reason_has_the_numbers(self):
        reason = failure(PLAN, scored(fleet(on=2)[:2], 0.9, 0.6) + scored(fleet()[2:], 0.9, 0.9))
        assert "accuracy on release 2 is 60.0%" in reason
        assert "400 labelled, 2 devices" in reason
        assert "before 90.0%" in reason
        assert "control changed by +0.0%" in reason

    def test_a_loss_that_everybody_has_is_not_blamed_on_the_release(self):
        assert failure(PLAN, scored(fleet(on=2)[:2], 0.9, 0.6) + scored(fleet()[2:], 0.9, 0.6)) is None

    def test_a_fleet_that_gets_better_does_not_raise_the_bar(self):
        assert failure(PLAN, scored(fleet(on=2)[:2], 0.8, 0.8) + scored(fleet()[2:], 0.6, 0.9)) is None

    def test_a_loss_within_what_is_tolerated_passes(self):
        assert failure(PLAN, scored(fleet(on=2), 0.9, 0.87)) is None

    def test_in_the_last_stage_the_earlier_devices_are_the_control_group(self):
        earlier = [msgspec.structs.replace(entry, switched=False) for entry in fleet(on=10)[:2]]
        later = scored(fleet(on=10)[2:], 0.9, 0.6)
        assert failure(PLAN, scored(earlier, 0.9, 0.6) + later) is None
        assert "control changed by -5.0%" in failure(PLAN, scored(earlier, 0.9, 0.85) + later)

    def test_too_few_labels_decide_nothing_and_harm_does_not_wait_for_the_sample(self):
        assert failure(PLAN, scored(fleet(on=2)[:2], 0.9, 0.0, labelled=4)) is None
        assert failure(PLAN, scored(fleet(on=2)[:2], 0.9, 0.0, labelled=40)) is not None, "100 are wanted to pass"

    def test_a_change_of_mix_is_no_change(self):
        good, bad = fleet(on=2)[:2]
        metrics = [
            msgspec.structs.replace(good, labelled=100, correct=99, labelled_before=1000, correct_before=990),
            msgspec.structs.replace(bad, labelled=1000, correct=500, labelled_before=100, correct_before=50),
        ]
        assert failure(PLAN, metrics) is None

    def test_devices_that_differ_much_prove_less(self):
        """Half of the control group gained and half lost: that the canaries lost as much says nothing."""
        alike = scored(fleet(12, on=2)[:2], 0.9, 0.7) + scored(fleet(12)[2:], 0.9, 0.9)
        mixed = scored(fleet(12, on=2)[:2], 0.9, 0.7)
        mixed += scored(fleet(12)[2:7], 0.9, 0.6) + scored(fleet(12)[7:], 0.7, 1.0)
        assert failure(PLAN, alike) is not None
        assert failure(PLAN, mixed) is None

    def test_devices_without_the_labels_of_the_plan_are_no_control_group(self):
        others = [msgspec.structs.replace(entry, eligible=False) for entry in scored(fleet()[2:], 0.9, 0.6)]
        assert failure(PLAN, scored(fleet(on=2)[:2], 0.9, 0.6) + others) is not None

    def test_better_has_to_be_shown_against_a_control_group_that_got_better_as_well(self):
        gate = Gate(metric="accuracy", proof="better", margin=0.02)
        alone = scored(fleet(on=5)[:5], 0.8, 0.9) + scored(fleet()[5:], 0.8, 0.8)
        with_all = scored(fleet(on=5)[:5], 0.8, 0.9) + scored(fleet()[5:], 0.8, 0.9)
        assert verdict(gate, alone).verdict == "pass"
        assert verdict(gate, with_all).verdict == "wait"

    def test_not_worse_takes_more_than_no_evidence_of_harm(self):
        gate = Gate(metric="accuracy", proof="not_worse", margin=0.05)
        few = scored(fleet(on=2, count=4)[:2], 0.9, 0.9, labelled=40) + scored(fleet(4)[2:], 0.9, 0.9, labelled=40)
        many = scored(fleet(on=5)[:5], 0.9, 0.9, labelled=2000) + scored(fleet()[5:], 0.9, 0.9, labelled=2000)
        assert verdict(gate, few).verdict == "wait"
        assert verdict(gate, many).verdict == "pass"


class TestOtherMetrics:
    def test_errors_beyond_those_of_the_control_group_are_harm(self):
        metrics = fleet(on=2, predictions=100, errors=50)[:2] + fleet(predictions=100)[2:]
        assert "100 of 300 predictions on release 2 failed" in failure(PLAN, metrics)
        assert failure(PLAN, fleet(on=2, predictions=100, errors=50)) is None, "all have them"
        assert failure(PLAN, fleet(on=0, predictions=100, errors=50)) is None

    @pytest.mark.parametrize("metric", ["crashes", "rollbacks", "drift"])
    def test_events_beyond_those_of_the_control_group_are_harm(self, metric):
        gate = Gate(metric=metric, margin=1.0, min_sample=5)
        quiet, loud = Sums(10, 0, 0), Sums(10, 12, 12)
        calm = valued(fleet(on=3), metric, quiet)
        bad = valued(fleet(on=3)[:3], metric, loud) + valued(fleet()[3:], metric, quiet)
        assert verdict(gate, calm).verdict == "pass"
        found = verdict(gate, bad)
        assert found.verdict == "harm"
        assert metric in found.reason
        assert verdict(gate, valued(fleet(on=3), metric, loud)).verdict == "pass", "all have them"

    def test_the_margin_of_events_is_by_device_and_day(self):
        """Reports of five minutes: 288 a day. One event in each is far beyond ten a day, and within 500."""
        metrics = valued(fleet(on=5)[:5], "drift", Sums(100, 100, 100)) + valued(fleet()[5:], "drift", Sums(100, 0, 0))
        assert verdict(Gate(metric="drift", margin=10.0), metrics).verdict == "harm"
        assert verdict(Gate(metric="drift", margin=500.0), metrics).verdict == "pass"

    def test_a_latency_beyond_the_devices_own_is_harm(self):
        gate = Gate(metric="p99_ms", margin=0.2)
        fast, slow = windows(40, 5.0), windows(40, 9.0)
        assert verdict(gate, valued(fleet(on=2), "p99_ms", fast, fast)).verdict == "pass"
        metrics = valued(fleet(on=2)[:2], "p99_ms", slow, fast) + valued(fleet()[2:], "p99_ms", fast, fast)
        found = verdict(gate, metrics)
        assert found.verdict == "harm"
        assert "p99_ms on release 2 is 9 ms, before 5 ms (80 reports for p99_ms, 2 devices)" in found.reason
        assert "5 ms in the control group" in found.reason
        assert found.worse == pytest.approx(0.8)
        assert 0 < found.radius < 0.5

    def test_a_fleet_that_gets_slower_is_not_blamed_on_the_release(self):
        gate = Gate(metric="p99_ms", margin=0.2)
        metrics = valued(fleet(on=2), "p99_ms", windows(40, 9.0), windows(40, 5.0))
        assert verdict(gate, metrics).verdict != "harm"

    def test_slower_within_what_is_tolerated_passes(self):
        gate = Gate(metric="p50_ms", margin=0.5, proof="not_worse")
        metrics = valued(fleet(on=2)[:2], "p50_ms", windows(99, 5.5), windows(99, 5.0))
        metrics += valued(fleet()[2:], "p50_ms", windows(99, 5.0), windows(99, 5.0))
        assert verdict(gate, metrics).verdict == "pass"

    def test_absurd_latencies_are_told_without_harm_to_the_coordinator(self):
        still, absurd = windows(40, 1e-300, spread=0.0), windows(40, 1e300, spread=0.0)
        metrics = valued(fleet(on=2)[:2], "p99_ms", absurd, still) + valued(fleet()[2:], "p99_ms", still, still)
        found = verdict(Gate(metric="p99_ms"), metrics)
        assert found.verdict == "harm"
        assert math.isfinite(found.worse + found.radius)

    def test_equal_latencies_prove_no_more_than_their_figures_are_exact(self):
        gate = Gate(metric="p99_ms")
        still, slower = windows(10, 1.0, spread=0.0), windows(10, 1.01, spread=0.0)
        metrics = valued(fleet(on=2)[:2], "p99_ms", slower, still) + valued(fleet()[2:], "p99_ms", still, still)
        assert verdict(gate, metrics).verdict != "harm"

    @pytest.mark.parametrize(("better", "outcome"), [("higher", "harm"), ("lower", "pass")])
    def test_the_apps_own_metric_has_a_direction(self, better, outcome):
        gate = Gate(metric="metric:clicks", better=better, margin=0.05)
        high, low = Sums(500, 250.0, 200.0), Sums(500, 100.0, 60.0)
        metrics = valued(fleet(on=3)[:3], "metric:clicks", low, high) + valued(fleet()[3:], "metric:clicks", high, high)
        found = verdict(gate, metrics)
        assert found.verdict == outcome
        assert "clicks on release 2 is 0.2, before 0.5" in found.reason

    def test_in_shadow_pairs_are_judged_and_disagreement_has_a_limit(self):
        plan = RolloutPlan(release=2, strategy="shadow", max_disagreement=0.1, min_labelled=50)

        def shadowed(disagreed, won, lost):
            values = {
                "disagreement": (share(1000, disagreed), Sums()),
                "accuracy": (Sums(300, won - lost, won + lost), Sums()),
            }
            return [DeviceMetrics(device="a", in_shadow=True, values=values), DeviceMetrics(device="b")]

        def verdicts(*counts):
            return [reading.verdict for reading in readings(plan, shadowed(*counts), shadowing=True)]

        assert verdicts(50, 10, 8) == ["pass", "pass"]
        assert verdicts(50, 2, 60) == ["harm", "pass"]
        assert verdicts(400, 10, 8) == ["pass", "harm"]

    def test_a_gate_waits_for_its_sample(self):
        gate = Gate(metric="metric:clicks", min_sample=100)
        found = verdict(gate, valued(fleet(on=2), "metric:clicks", Sums(20, 10, 10), Sums(20, 10, 10)))
        assert (found.verdict, found.sample, found.wanted) == ("wait", 40, 100)


def _heard(logs):
    """Twenty devices, the first four on the release since report 30."""

    def sums(part):
        return Sums(part.size, float(part.sum()), float((part**2).sum()))

    return [
        DeviceMetrics(
            device=str(i), on_candidate=i < 4, switched=True, values={"p99_ms": (sums(own[30:]), sums(own[:30]))}
        )
        for i, own in enumerate(logs)
    ]


class TestErrorLevel:
    @pytest.mark.parametrize(("accuracy", "spread"), [(0.9, 0.0), (0.6, 0.0), (0.9, 0.05)])
    def test_a_release_that_changes_nothing_is_seldom_halted_however_often_one_looks(self, accuracy, spread):
        """Each device has an accuracy of its own; one look after every report of 20 labels, 100 of them."""
        rng = np.random.default_rng(7)
        gate, level, runs, halted = Gate(metric="accuracy", min_sample=50), 0.05, 120, 0
        for _ in range(runs):
            own = np.clip(rng.normal(accuracy, spread, 20), 0.05, 0.99)
            before = rng.binomial(200, own)
            total = np.zeros(20, dtype=int)
            for look in range(1, 101):
                total += rng.binomial(20, own)
                metrics = [
                    DeviceMetrics(
                        device=str(i), on_candidate=i < 4, switched=True, labelled=20 * look, correct=int(total[i]),
                        labelled_before=200, correct_before=int(before[i]),
                    )
                    for i in range(20)
                ]  # fmt: skip
                if verdict(gate, metrics, level=level).verdict == "harm":
                    halted += 1
                    break
        assert halted <= 0.05 * runs + 3 * (0.05 * 0.95 * runs) ** 0.5

    @pytest.mark.parametrize(("slower", "halts"), [(1.0, (0, 8)), (2.0, (36, 40))])
    def test_latencies_that_wander_are_no_harm_and_a_release_twice_as_slow_is_found_within_twenty_reports(
        self, slower, halts
    ):
        """Each report resembles the one before; one look after every report, 40 runs."""
        rng = np.random.default_rng(11)
        gate, halted = Gate(metric="p99_ms", margin=0.0 if slower == 1 else 0.2), 0
        for _ in range(40):
            logs = np.zeros((20, 50))
            for report in range(1, 50):
                logs[:, report] = 0.7 * logs[:, report - 1] + rng.normal(0, 0.14, 20)
            logs += rng.normal(2, 0.5, (20, 1))
            logs[:4, 30:] += math.log(slower)
            halted += any(verdict(gate, _heard(logs[:, :look]), level=0.05).verdict == "harm" for look in range(31, 51))
        assert halts[0] <= halted <= halts[1]

    def test_a_real_loss_is_found_with_the_rows_that_the_power_calculation_asks_for(self):
        rows = required_rows(0.8, effect=0.1, level=0.025, power=0.8, control_share=0.5)
        rng = np.random.default_rng(3)
        gate, seen, runs = Gate(metric="accuracy", proof="better"), 0, 60
        for _ in range(runs):
            metrics = [
                DeviceMetrics(
                    device=str(i), on_candidate=i < 10, switched=True, labelled=round(rows / 10),
                    correct=int(rng.binomial(round(rows / 10), 0.9 if i < 10 else 0.8)),
                    labelled_before=5000, correct_before=4000,
                )
                for i in range(20)
            ]  # fmt: skip
            seen += verdict(gate, metrics, level=0.025).verdict == "pass"
        assert seen >= 0.65 * runs

    def test_more_power_or_a_smaller_effect_take_more_rows(self):
        usual = required_rows(0.9, effect=0.02, level=0.025, power=0.8, control_share=0.5)
        assert required_rows(0.9, effect=0.01, level=0.025, power=0.8, control_share=0.5) > 3 * usual
        assert required_rows(0.9, effect=0.02, level=0.025, power=0.95, control_share=0.5) > usual
        assert required_rows(0.9, effect=0.02, level=0.005, power=0.8, control_share=0.5) > usual
        assert required_rows(0.9, effect=0.02, level=0.025, power=0.8, control_share=0.1) > usual

    def test_the_rows_that_an_effect_takes_show_that_effect(self):
        test = {"level": 0.025, "power": 0.8, "control_share": 0.3}
        rows = required_rows(0.9, effect=0.02, **test)
        assert detectable_effect(0.9, rows=rows, **test) <= 0.02 < detectable_effect(0.9, rows=rows - 1, **test)
