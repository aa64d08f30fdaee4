"""The gate: who is promoted, who is refused and why, and that looking often does not raise its error rate."""

import math

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_sdk.config import GateConfig
from edge_sdk.gate import is_healthy, judge, watch, watch_release

CONFIG = GateConfig(max_wait_s=100.0)
BETTER, WORSE, BOTH, NEITHER = (False, True), (True, False), (True, True), (False, False)


def rows(*groups):
    """(champion right, challenger right) from `count * kind` groups, as two bool arrays."""
    pairs = np.array([kind for count, kind in groups for _ in range(count)], dtype=bool).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def verdict(live=(), labels=None, factory=(), *, waited_s=0.0, config=CONFIG):
    champion, challenger = rows(*live)
    factory_champion, factory_challenger = rows(*factory)
    labels = np.zeros(len(champion), np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    champion, challenger = says(champion, labels), says(challenger, labels)
    return judge(champion, challenger, labels, factory_champion, factory_challenger, waited_s=waited_s, config=config)


def says(right, labels):
    """Predictions that are right where told; -1, no row's label, elsewhere."""
    return np.where(right, labels, -1)


def test_a_clearly_better_challenger_is_promoted():
    result = verdict([(12, BETTER), (30, BOTH)], factory=[(40, BOTH)])
    assert result.outcome == "promote"
    assert result.reason == "better on 12 rows, worse on 0"
    assert (result.rows, result.factory_rows) == (42, 40)
    assert result.champion == pytest.approx(30 / 42)
    assert result.challenger == 1.0
    assert result.champion_factory == result.challenger_factory == 1.0
    assert result.evidence >= 1 / CONFIG.alpha


def test_a_challenger_that_is_worse_is_rejected_before_the_wait_is_over():
    config = GateConfig(class_margin=1.0)
    result = verdict([(12, WORSE), (30, BOTH)], config=config)
    assert (result.outcome, result.reason) == ("reject", "worse than the champion")


@pytest.mark.parametrize(
    "live", [[], [(500, BOTH)], [(500, NEITHER)], [(3, BETTER), (20, BOTH)], [(9, BETTER), (9, WORSE)]]
)
def test_without_evidence_more_rows_are_needed_until_the_wait_is_over(live):
    early, late = verdict(live, waited_s=99.9), verdict(live, waited_s=100.0)
    assert early.outcome == "need_more"
    assert early.reason.startswith("evidence ")
    assert late.outcome == "reject"
    assert late.reason == "not proven better within 100 s"


def test_evidence_counts_even_when_the_wait_is_over():
    assert verdict([(20, BETTER)], waited_s=1e9).outcome == "promote"


def test_forgetting_the_factorys_data_is_rejected_however_good_the_challenger_is_here():
    good = [(50, BETTER)]
    kept = verdict(good, factory=[(96, BOTH), (4, WORSE)])
    lost = verdict(good, factory=[(94, BOTH), (6, WORSE)])
    assert kept.outcome == "promote"
    assert lost.outcome == "reject"
    assert lost.reason == "forgets: 0.060 of accuracy lost on factory data"
    assert verdict(good, factory=[(90, BOTH), (6, WORSE), (4, BETTER)]).outcome == "promote"


def test_harm_to_one_label_is_rejected_though_the_others_gain():
    live = [(100, BETTER), (20, BOTH), (10, WORSE)]
    labels = [0] * 100 + [1] * 30
    result = verdict(live, labels)
    assert result.outcome == "reject"
    assert result.reason == "harms label 1: 0.333 of accuracy lost on 30 rows"
    assert verdict(live, labels, config=GateConfig(class_margin=0.4)).outcome == "promote"


def test_harm_within_the_margin_or_without_evidence_is_tolerated():
    labels = [0] * 100 + [1] * 60
    assert verdict([(100, BETTER), (54, BOTH), (6, WORSE)], labels).outcome == "promote"
    labels = [0] * 100 + [1] * 20
    assert verdict([(100, BETTER), (10, BOTH), (5, BETTER), (5, WORSE)], labels).outcome == "promote"
    assert verdict([(100, BETTER), (17, BOTH), (3, WORSE)], labels).outcome == "promote"


def test_a_champion_that_calls_everything_by_one_name_is_not_held_to_be_good_at_that_label():
    labels = np.repeat([0, 1, 2], 40)
    champion = np.zeros(120, np.int64)
    challenger = np.where(np.arange(120) % 5 == 0, 1, labels)
    none = np.zeros(0, dtype=bool)
    result = judge(champion, challenger, labels, none, none, waited_s=0.0, config=CONFIG)
    assert result.outcome == "promote"
    assert (result.champion, result.challenger) == pytest.approx((40 / 120, 104 / 120))


def test_taking_other_rows_for_a_label_harms_it():
    labels = np.repeat([0, 1, 2], 40)
    champion = np.where(labels == 0, -1, labels)
    challenger = np.where((labels == 2) & (np.arange(120) % 2 == 0), 1, labels)
    none = np.zeros(0, dtype=bool)
    result = judge(champion, challenger, labels, none, none, waited_s=0.0, config=CONFIG)
    assert result.outcome == "reject"
    assert result.reason == "harms label 1: 0.500 of accuracy lost on 40 rows"


def test_rare_labels_are_pooled_before_harm_is_judged():
    live = [(100, BETTER), *([(1, BOTH), (2, WORSE)] * 8)]
    labels = [0] * 100 + [label for label in range(1, 9) for _ in range(3)]
    result = verdict(live, labels)
    assert result.outcome == "reject"
    assert result.reason == "harms rare labels together: 0.667 of accuracy lost on 24 rows"


def test_too_few_rows_of_rare_labels_forbid_nothing():
    live = [(100, BETTER), (19, WORSE)]
    assert verdict(live, [0] * 100 + [1] * 10 + [2] * 9).outcome == "promote"
    assert verdict(live, [0] * 100 + [1] * 19).outcome == "promote"


def test_the_verdict_does_not_depend_on_how_labels_are_numbered():
    live = [(30, BETTER), (30, BOTH), (10, WORSE)]
    labels = np.array([0] * 30 + [1] * 40)
    first, second = verdict(live, labels), verdict(live, 7 - 3 * labels)
    assert first.outcome == second.outcome == "reject"
    assert (first.evidence, first.rows) == (second.evidence, second.rows)


class Trial(RuleBasedStateMachine):
    """A challenger on trial: rows come in any order, and the gate looks after each of them."""

    def __init__(self):
        super().__init__()
        self.live, self.labels, self.factory, self.waited_s = [], [], [], 0.0

    @rule(kind=st.sampled_from([BETTER, WORSE, BOTH, NEITHER]), label=st.integers(0, 3), count=st.integers(1, 30))
    def judge_rows_come(self, kind, label, count):
        self.live.append((count, kind))
        self.labels += [label] * count

    @rule(kind=st.sampled_from([BETTER, WORSE, BOTH]), count=st.integers(1, 30))
    def factory_rows_differ(self, kind, count):
        self.factory.append((count, kind))

    @rule(seconds=st.floats(0, 60))
    def time_passes(self, seconds):
        self.waited_s += seconds

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 50))
    def rows_on_which_both_agree_are_no_evidence(self, count):
        before = self.verdict().evidence
        self.judge_rows_come(BOTH, 0, count)
        assert self.verdict().evidence == pytest.approx(before, rel=1e-5)

    def verdict(self):
        return verdict(self.live, self.labels, self.factory, waited_s=self.waited_s)

    @invariant()
    def the_outcome_follows_from_the_numbers(self):
        result = self.verdict()
        forgotten = result.champion_factory - result.challenger_factory
        assert result == self.verdict()
        assert result.rows == len(self.labels)
        if result.outcome == "promote":
            assert result.evidence >= 1 / CONFIG.alpha
            assert result.challenger > result.champion
            assert forgotten <= CONFIG.factory_margin
        elif result.outcome == "need_more":
            assert self.waited_s < CONFIG.max_wait_s
            assert result.evidence < 1 / CONFIG.alpha
        if forgotten > CONFIG.factory_margin or self.waited_s >= CONFIG.max_wait_s:
            assert result.outcome != "need_more"

    @invariant()
    def never_are_both_better_than_the_other(self):
        swapped = [(count, kind[::-1]) for count, kind in self.live]
        if self.verdict().outcome == "promote":
            assert verdict(swapped, self.labels).outcome == "reject"


TestTrial = Trial.TestCase
TestTrial.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize(
    ("discordant", "shift"),
    [(0.02, 0.0), (0.2, 0.0), (0.9, 0.0), (0.3, -0.1)],
    ids=["rarely", "often", "always", "worse"],
)
def test_a_challenger_no_better_is_promoted_in_at_most_alpha_of_runs_though_the_gate_looks_after_every_row(
    discordant, shift
):
    """Harm does not end a run here, so that nothing hides a promotion."""
    config = GateConfig(alpha=0.1, class_margin=1.0)
    runs, length = 120, 120
    promoted = 0
    for seed in range(runs):
        rng = np.random.default_rng([23, seed])
        up = (discordant + shift) / 2
        kinds = rng.choice(3, length, p=[up, discordant - up, 1 - discordant])
        champion, challenger = kinds != 0, kinds != 1
        labels = np.zeros(length, np.int64)
        champion, challenger = says(champion, labels), says(challenger, labels)
        none = np.zeros(0, dtype=bool)
        promoted += any(
            judge(champion[:n], challenger[:n], labels[:n], none, none, waited_s=0.0, config=config).outcome
            == "promote"
            for n in range(1, length + 1)
        )
    assert promoted <= config.alpha * runs


def test_a_better_challenger_is_promoted_soon():
    needed = []
    for seed in range(50):
        rng = np.random.default_rng([29, seed])
        kinds = rng.choice(3, 300, p=[0.3, 0.05, 0.65])
        live = [says(right, np.zeros(300, np.int64)) for right in (kinds != 0, kinds != 1)]
        none = np.zeros(0, dtype=bool)
        for n in range(1, 301):
            labels = np.zeros(n, np.int64)
            if judge(live[0][:n], live[1][:n], labels, none, none, waited_s=0.0, config=CONFIG).outcome == "promote":
                needed.append(n)
                break
    assert len(needed) == 50
    assert np.median(needed) <= 50


# ---- probation


def watched(live, *, waited_s=0.0, healthy=True):
    before, after = rows(*live)
    return watch(before, after, waited_s=waited_s, healthy=healthy, alpha=0.05, rows=60, seconds=1_000.0)


def test_probation_ends_with_enough_labels_or_enough_time():
    assert watched([]).outcome == "need_more"
    assert watched([(59, BOTH)]).reason == "59 of 60 labels"
    assert watched([(60, BOTH)]).outcome == "confirm"
    assert watched([(30, BOTH), (15, WORSE), (15, BETTER)]).outcome == "confirm"
    unproven = watched([(5, BOTH)], waited_s=1_000.0)
    assert unproven.outcome == "confirm"
    assert unproven.reason == "unproven: healthy, but only 5 labels came"


def test_probation_rolls_back_what_is_worse_in_live_use():
    result = watched([(12, WORSE), (10, BOTH)])
    assert result.outcome == "rollback"
    assert result.reason == f"live accuracy {10 / 22:.3f}, before it 1.000"
    assert watched([(100, BOTH), (12, WORSE)], waited_s=1e6).outcome == "rollback"


def test_a_version_that_fails_in_use_is_rolled_back_without_any_label():
    for live in ([], [(60, BETTER)]):
        result = watched(live, healthy=False)
        assert (result.outcome, result.reason) == ("rollback", "the new version fails in use")


@pytest.mark.parametrize("discordant", [0.1, 0.5])
def test_probation_rolls_back_an_equal_version_in_at_most_alpha_of_runs(discordant):
    runs = 200
    rolled_back = 0
    for seed in range(runs):
        kinds = np.random.default_rng([31, seed]).choice(3, 59, p=[discordant / 2, discordant / 2, 1 - discordant])
        before, after = kinds != 0, kinds != 1
        rolled_back += any(
            watch(before[:n], after[:n], waited_s=0, healthy=True, alpha=0.1, rows=60, seconds=1e9).outcome
            == "rollback"
            for n in range(1, 60)
        )
    assert rolled_back <= 0.1 * runs


@pytest.mark.parametrize(
    ("errors", "predictions", "healthy"),
    [(0, 0, True), (2, 2, True), (3, 3, False), (3, 59, False), (3, 60, True), (50, 1_000, True), (51, 1_000, False)],
)
def test_a_few_errors_are_not_yet_unhealthy(errors, predictions, healthy):
    assert is_healthy(errors, predictions) is healthy


def released(right, wrong, *, accuracy_before=0.9, waited_s=0.0, healthy=True, order=1):
    correct = np.array([True] * right + [False] * wrong)[::order]
    return watch_release(
        correct, accuracy_before=accuracy_before, waited_s=waited_s, healthy=healthy,
        alpha=0.05, max_drop=0.1, rows=100, seconds=1_000.0,
    )  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_a_release_is_rolled_back_when_its_accuracy_falls_below_what_is_tolerated(order):
    result = released(20, 20, order=order)
    assert result.outcome == "rollback"
    assert result.reason == "live accuracy 0.500, before it 0.900"


def test_a_release_that_holds_its_accuracy_is_confirmed():
    assert released(50, 8).outcome == "need_more"
    assert released(50, 8).reason == "58 of 100 labels"
    assert released(88, 12).outcome == "confirm"
    assert released(82, 18).outcome == "confirm"


@pytest.mark.parametrize("accuracy_before", [math.nan, 0.05, 0.1])
def test_without_a_known_accuracy_before_only_health_counts(accuracy_before):
    assert released(0, 60, accuracy_before=accuracy_before).outcome == "need_more"
    assert released(0, 100, accuracy_before=accuracy_before).outcome == "confirm"
    assert released(0, 0, accuracy_before=accuracy_before, healthy=False).outcome == "rollback"


def test_a_healthy_release_without_labels_is_kept_as_unproven():
    result = released(3, 0, waited_s=1_000.0)
    assert (result.outcome, result.reason) == ("confirm", "unproven: healthy, but only 3 labels came")


def test_an_unhealthy_release_is_rolled_back():
    result = released(100, 0, healthy=False)
    assert (result.outcome, result.reason) == ("rollback", "the new release fails in use")


def test_a_release_at_the_tolerated_drop_is_rolled_back_in_at_most_alpha_of_runs():
    runs = 150
    rolled_back = 0
    for seed in range(runs):
        correct = np.random.default_rng([37, seed]).random(99) < 0.8
        rolled_back += any(
            watch_release(
                correct[:n],
                accuracy_before=0.9,
                waited_s=0,
                healthy=True,
                alpha=0.1,
                max_drop=0.1,
                rows=100,
                seconds=1e9,
            ).outcome
            == "rollback"
            for n in range(1, 100)
        )
    assert rolled_back <= 0.1 * runs
