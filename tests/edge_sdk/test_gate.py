"""The gate: who is promoted, who is refused and why, and that looking often does not raise its error rate."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_sdk.config import GateConfig
from edge_sdk.gate import is_healthy, judge, watch, watch_release
from edge_sdk.outcomes import Outcomes
from edge_sdk.stats import MeanEProcess, paired_evidence

CONFIG = GateConfig(max_wait_s=100.0)
FIRST = 6 * CONFIG.alpha / math.pi**2
"""Share of the error level that the first challenger may spend."""
BETTER, WORSE, BOTH, NEITHER = (False, True), (True, False), (True, True), (False, False)


def rows(*groups):
    """(champion right, challenger right) from `count * kind` groups, as two bool arrays."""
    pairs = np.array([kind for count, kind in groups for _ in range(count)], dtype=bool).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def says(right, labels):
    """Predictions that are right where told; -1, no row's label, elsewhere."""
    return np.where(right, labels, -1)


def made(said, labels, confidence=math.nan):
    """Outcomes of a classifier; the groups are the numbers that are labels of a row."""
    wrong, groups = said != labels, np.unique(labels)
    concerned = (labels[:, None] == groups) | (said[:, None] == groups)
    return Outcomes(wrong.astype(float), ~wrong, concerned & wrong[:, None], np.full(len(said), confidence))


def compare(champion, challenger, labels=None, factory=(), *, config=CONFIG, **more):
    """`judge` of two Outcomes; without labels all rows are of one group."""
    labels = np.zeros(len(champion.losses), np.int64) if labels is None else np.asarray(labels)
    groups = np.unique(labels)
    factory_champion, factory_challenger = rows(*factory)
    return judge(
        champion,
        challenger,
        groups=[f"no. {group}" for group in groups],
        members=labels[:, None] == groups,
        factory_champion=factory_champion,
        factory_challenger=factory_challenger,
        config=config,
        **{"waited_s": 0.0, **more},
    )


def verdict(live=(), labels=None, factory=(), **more):
    """`judge` of two classifiers, from `count * kind` groups of rows."""
    right = rows(*live)
    labels = np.zeros(len(right[0]), np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    champion, challenger = (made(says(one, labels), labels) for one in right)
    return compare(champion, challenger, labels, factory, **more)


def values(errors, tolerance=1.0):
    """Outcomes of a regression with one target, from the errors of its rows."""
    square = errors**2
    wrong = np.abs(errors) > tolerance
    return Outcomes(square / (square + tolerance**2), ~wrong, wrong[:, None], np.full(len(errors), math.nan))


def test_a_clearly_better_challenger_is_promoted():
    result = verdict([(12, BETTER), (30, BOTH)], factory=[(40, BOTH)])
    assert result.outcome == "promote"
    assert result.reason == "better on 12 rows, worse on 0"
    assert (result.rows, result.factory_rows) == (42, 40)
    assert result.champion == pytest.approx(30 / 42)
    assert result.challenger == 1.0
    assert result.champion_factory == result.challenger_factory == 1.0
    assert result.evidence >= 1 / FIRST
    assert result.worst_group == pytest.approx(-12 / 42)


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
    assert early.reason.endswith(" of 32.9")
    assert late.outcome == "reject"
    assert late.reason == "not proven better within 100 s"


def test_evidence_counts_even_when_the_wait_is_over():
    assert verdict([(20, BETTER)], waited_s=1e9).outcome == "promote"


def test_losses_finer_than_right_and_wrong_are_evidence():
    off = np.linspace(0.2, 0.9, 60)
    result = compare(values(off), values(off / 2))
    assert (result.champion, result.challenger) == (1.0, 1.0)
    assert result.outcome == "promote"
    assert compare(values(off / 2), values(off)).reason == "worse than the champion"


# ---- several challengers


def test_challengers_that_follow_each_other_share_the_error_level():
    spent = [verdict(challengers_before=k).alpha for k in range(1000)]
    assert spent[0] == pytest.approx(FIRST)
    assert spent == sorted(spent, reverse=True)
    assert sum(spent) < CONFIG.alpha
    assert sum(spent) == pytest.approx(CONFIG.alpha, rel=1e-3)


def test_a_later_challenger_needs_more_evidence():
    live = [(9, BETTER)]
    assert verdict(live).outcome == "promote"
    assert verdict(live, challengers_before=4).outcome == "need_more"
    assert verdict([(14, BETTER)], challengers_before=4).outcome == "promote"


# ---- harm


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
    assert result.reason == "harms 'no. 1': 0.333 of accuracy lost on 30 rows"
    assert result.worst_group == pytest.approx(1 / 3)
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
    result = compare(made(champion, labels), made(challenger, labels), labels)
    assert result.outcome == "promote"
    assert (result.champion, result.challenger) == pytest.approx((40 / 120, 104 / 120))


def test_taking_other_rows_for_a_label_harms_it():
    labels = np.repeat([0, 1, 2], 40)
    champion = np.where(labels == 0, -1, labels)
    challenger = np.where((labels == 2) & (np.arange(120) % 2 == 0), 1, labels)
    result = compare(made(champion, labels), made(challenger, labels), labels)
    assert result.outcome == "reject"
    assert result.reason == "harms 'no. 1': 0.500 of accuracy lost on 40 rows"


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


def test_harm_to_one_slice_is_rejected_and_its_name_not_told():
    live = [(100, BETTER), (20, BOTH), (10, WORSE)]
    slices = [""] * 100 + ["ward 7"] * 30
    result = verdict(live, slices=slices)
    assert (result.outcome, result.reason) == ("reject", "harms a slice: 0.333 of accuracy lost on 30 rows")
    assert result.worst_slice == pytest.approx(1 / 3)
    assert verdict(live, slices=slices, config=GateConfig(slice_margin=0.4)).outcome == "promote"
    assert verdict(live, slices=[""] * 130).outcome == "promote", "rows without a name are no slice"
    assert verdict([(130, BETTER)], slices=slices).worst_slice == -1.0


def test_small_slices_are_pooled():
    live = [(100, BETTER), *([(1, BOTH), (2, WORSE)] * 8)]
    slices = ["big"] * 100 + [str(number) for number in range(8) for _ in range(3)]
    result = verdict(live, slices=slices)
    assert result.reason == "harms small slices together: 0.667 of accuracy lost on 24 rows"
    assert verdict([*live, (10, BETTER)], slices=[*["", *slices[1:100]], *[""] * 34]).outcome == "promote"


def test_a_challenger_that_misjudges_itself_is_rejected_though_it_is_better():
    labels = np.zeros(120, np.int64)
    champion = made(says(np.arange(120) % 5 != 0, labels), labels, 0.8)
    better = says(np.arange(120) % 20 != 0, labels)
    assert compare(champion, made(better, labels, 0.95)).outcome == "promote"
    assert compare(champion, made(better, labels, 0.86)).outcome == "promote"
    result = compare(champion, made(better, labels, 0.84))
    assert (result.outcome, result.reason) == ("reject", "calibration error 0.110, before 0.000")
    assert (result.champion_calibration, result.challenger_calibration) == pytest.approx((0, 0.11))


def test_calibration_is_not_judged_by_few_rows_nor_where_there_is_no_confidence():
    right = np.arange(399) % 5 != 0
    labels = np.zeros(399, np.int64)
    champion, boastful = made(says(right, labels), labels, 0.8), made(says(right, labels), labels, 1.0)
    cut = [Outcomes(o.losses[:99], o.right[:99], o.errors[:99], o.confidence[:99]) for o in (champion, boastful)]
    assert compare(*cut).outcome == "need_more"
    assert compare(*cut).challenger_calibration == 0.0
    assert compare(champion, boastful).outcome == "reject"
    fine = GateConfig(calibration_margin=0.05)
    assert compare(champion, boastful, config=fine).outcome == "need_more", "noise could make a rise by 0.05"
    off = np.full(150, 0.5)
    assert compare(values(off), values(off)).challenger_calibration == 0.0


def test_a_slower_head_is_rejected_unless_the_difference_is_negligible():
    good = [(50, BETTER)]
    assert verdict(good, latency_ms=(1.0, 1.5)).outcome == "promote"
    assert verdict(good, latency_ms=(0.01, 0.11)).outcome == "promote"
    result = verdict(good, latency_ms=(1.0, 1.51))
    assert (result.outcome, result.reason) == ("reject", "slower: 1.51 ms, before 1 ms")
    assert (result.champion_ms, result.challenger_ms) == (1.0, 1.51)
    assert verdict(good, latency_ms=(0.01, 0.12)).outcome == "reject"


# ---- weights


def test_rows_count_by_weight():
    live = [(10, BETTER), (10, WORSE), (10, BOTH)]
    weights = np.repeat([1.0, 0.1, 0.1], 10)
    result = verdict(live, weights=weights)
    assert (result.champion, result.challenger) == pytest.approx((2 / 12, 11 / 12))
    assert result.worst_group == pytest.approx(-9 / 12)
    assert result.evidence > 1 > verdict(live).evidence
    assert verdict(live, weights=np.ones(30)) == verdict(live)


@pytest.mark.parametrize("weight", [0.0, 1.5, -1.0, math.nan])
def test_weights_out_of_bounds_are_refused(weight):
    with pytest.raises(ValueError, match="relative to the largest"):
        verdict([(2, BOTH)], weights=np.array([1.0, weight]))


def test_arrays_that_do_not_belong_together_are_refused():
    two, three = (made(np.zeros(n, np.int64), np.zeros(n, np.int64)) for n in (2, 3))
    with pytest.raises(ValueError, match=r"challenger: expected rows by groups \(2, 1\), got \(3, 1\)"):
        compare(two, three)
    with pytest.raises(ValueError, match="1 weights and 0 slices for 2 rows"):
        compare(two, two, weights=np.ones(1))
    with pytest.raises(ValueError, match="2 weights and 3 slices for 2 rows"):
        compare(two, two, slices=["a"] * 3)


# ---- any order of events


class Trial(RuleBasedStateMachine):
    """A challenger on trial: rows come in any order, and the gate looks after each of them."""

    def __init__(self):
        super().__init__()
        self.live, self.labels, self.slices, self.factory, self.waited_s = [], [], [], [], 0.0
        self.latency_ms = (1.0, 1.0)

    @rule(
        kind=st.sampled_from([BETTER, BETTER, WORSE, BOTH, NEITHER]),
        label=st.integers(0, 3),
        part=st.sampled_from(["", "a", "b", "c"]),
        count=st.integers(1, 30),
    )
    def judge_rows_come(self, kind, label, part, count):
        self.live.append((count, kind))
        self.labels += [label] * count
        self.slices += [part] * count

    @rule(kind=st.sampled_from([BETTER, WORSE, BOTH]), count=st.integers(1, 30))
    def factory_rows_differ(self, kind, count):
        self.factory.append((count, kind))

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds):
        self.waited_s += seconds

    @rule(latency_ms=st.sampled_from([1.0, 1.4, 1.6]))
    def the_heads_are_timed(self, latency_ms):
        self.latency_ms = (1.0, latency_ms)

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 50))
    def rows_on_which_both_agree_are_no_evidence(self, count):
        before = self.verdict().evidence
        self.judge_rows_come(BOTH, 0, "", count)
        assert self.verdict().evidence == pytest.approx(before, rel=1e-5)

    def verdict(self):
        return verdict(
            self.live,
            self.labels,
            self.factory,
            slices=self.slices,
            waited_s=self.waited_s,
            latency_ms=self.latency_ms,
        )

    def harm_holds(self, parts, margin):
        """Whether a part of enough rows lost too much, told anew for rows that are right or take no other's label."""
        before, after = (one.astype(int) for one in rows(*self.live))
        parts = np.array(parts)
        small = [part for part in set(parts) - {""} if (parts == part).sum() < CONFIG.min_class_rows]
        for own in [parts == part for part in set(parts) - {"", *small}] + [np.isin(parts, small)]:
            lost = (before - after)[own]
            enough = len(lost) >= CONFIG.min_class_rows
            if enough and lost.mean() > margin and paired_evidence(lost) >= 5:
                return True
        return False

    @invariant()
    def the_outcome_follows_from_the_numbers(self):
        result = self.verdict()
        forgotten = result.champion_factory - result.challenger_factory
        harm = (
            forgotten > CONFIG.factory_margin
            or self.latency_ms[1] > 1.5
            or (self.live and self.harm_holds([str(label) for label in self.labels], CONFIG.class_margin))
            or (self.live and self.harm_holds(self.slices, CONFIG.slice_margin))
        )
        assert result == self.verdict()
        assert result.rows == len(self.labels)
        if harm:
            assert result.outcome == "reject"
        elif result.outcome == "promote":
            assert result.evidence >= 1 / FIRST - 1e-5
            assert result.challenger > result.champion
        elif result.outcome == "need_more":
            assert self.waited_s < CONFIG.max_wait_s
            assert result.evidence < 1 / FIRST + 1e-5
        if self.waited_s >= CONFIG.max_wait_s:
            assert result.outcome != "need_more"

    @invariant()
    def never_are_both_better_than_the_other(self):
        swapped = [(count, kind[::-1]) for count, kind in self.live]
        if self.verdict().outcome == "promote":
            assert verdict(swapped, self.labels).outcome == "reject"


TestTrial = Trial.TestCase
TestTrial.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


# ---- error rates, looked at after every row

RUNS, LENGTH = 400, 2_000


def evidence_paths(gains):
    """The evidence that `judge` would find after each row: float [R, T] of R runs."""
    wealth = [np.log1p(bet * gains).cumsum(axis=1) for bet in MeanEProcess(0.0, low=-1.0)._bets]
    return np.exp(np.logaddexp.reduce(wealth)) / len(wealth)


def drawn(rng, better, worse):
    """Gains of 1 and -1 with the given chances, numbers or one for each row: [R, T]."""
    chance = rng.random((RUNS, LENGTH))
    return np.where(chance < better, 1.0, np.where(chance < better + worse, -1.0, 0.0))


def regression_gains(rng, spread):
    """Of two models whose errors are exchangeable and go together: half of each is noise that nobody predicts."""
    shared, first, second = rng.standard_t(3, (3, RUNS, LENGTH)) * spread
    return losses(shared + first) - losses(shared + second)


def losses(errors):
    return errors**2 / (errors**2 + 1)


def after_a_loss_all_is_staked(rng):
    """Fair, but the next gain is large after a loss and small after a gain."""
    signs = rng.choice([-1.0, 1.0], (RUNS, LENGTH))
    stakes = np.where(np.pad(signs, ((0, 0), (1, 0)))[:, :-1] < 0, 1.0, 0.2)
    return signs * stakes


def better_only_where_rows_count_little(rng):
    """Common rows of weight 0.2 gain, rare ones of weight 1 lose as much together."""
    rare = rng.random((RUNS, LENGTH)) < 0.1
    gain = np.where(rare, -1.0, rng.random((RUNS, LENGTH)) < 0.1 / (0.2 * 0.9))
    return gain * np.where(rare, 1.0, 0.2)


RAMP = np.linspace(0.01, 0.45, LENGTH)
SEASON = 0.15 + 0.1 * np.sin(np.arange(LENGTH) / 50)


@pytest.mark.parametrize(
    "gains",
    [
        lambda rng: drawn(rng, 0.01, 0.01),
        lambda rng: drawn(rng, 0.1, 0.1),
        lambda rng: drawn(rng, 0.45, 0.45),
        lambda rng: drawn(rng, 0.1, 0.12),
        lambda rng: drawn(rng, RAMP, RAMP),
        lambda rng: drawn(rng, RAMP[::-1], RAMP[::-1]),
        lambda rng: drawn(rng, SEASON, SEASON),
        lambda rng: regression_gains(rng, 0.3),
        lambda rng: regression_gains(rng, 3.0),
        lambda rng: regression_gains(rng, np.linspace(0.2, 5, LENGTH)),
        after_a_loss_all_is_staked,
        better_only_where_rows_count_little,
    ],
    ids=[
        "rarely differ", "differ", "always differ", "worse", "accuracy falls", "accuracy rises", "seasons",
        "small errors", "large errors", "errors grow", "depends on the past", "weights",
    ],
)  # fmt: skip
def test_a_challenger_no_better_is_promoted_in_less_than_alpha_of_runs(rng, gains):
    paths = evidence_paths(gains(rng))
    assert (paths.max(axis=1) >= 1 / FIRST).mean() <= CONFIG.alpha


def test_what_is_simulated_is_what_the_gate_finds(rng):
    gains = rng.choice([-1, 0, 1], 300, p=[0.15, 0.6, 0.25])
    paths = evidence_paths(gains[None])[0]
    kinds = [{-1: WORSE, 0: BOTH, 1: BETTER}[gain] for gain in gains]
    for n in (1, 10, 50, 100, 200, 300):
        result = verdict([(1, kind) for kind in kinds[:n]])
        assert result.evidence == pytest.approx(paths[n - 1], rel=1e-4, abs=1e-6)
    off = rng.normal(0, 1, (2, 100))
    result = compare(values(off[0]), values(off[1]))
    assert result.evidence == pytest.approx(evidence_paths((losses(off[0]) - losses(off[1]))[None])[0, -1], rel=1e-4)


def test_a_chain_of_challengers_no_better_leads_to_a_promotion_in_less_than_alpha_of_runs(rng):
    """Five follow each other on the same judge rows; each is judged by all rows so far, after every new one."""
    champion = rng.random((RUNS, LENGTH)) < 0.8
    promoted = np.zeros(RUNS, dtype=bool)
    for k, start in enumerate((0, 60, 180, 420, 900)):
        anew = rng.random((RUNS, LENGTH)) < 0.4
        challenger = np.where(anew, rng.random((RUNS, LENGTH)) < 0.8, champion)
        paths = evidence_paths(challenger.astype(float) - champion)
        end = (60, 180, 420, 900, LENGTH)[k]
        promoted |= (paths[:, start:end] >= 1 / verdict(challengers_before=k).alpha).any(axis=1)
    assert promoted.mean() <= CONFIG.alpha


@pytest.mark.parametrize(
    ("gain", "differ", "usual"),
    [(0.1, 0.2, 150), (0.1, 0.3, 230), (0.05, 0.1, 270), (0.05, 0.15, 480), (0.03, 0.07, 600)],
)
def test_a_better_challenger_is_promoted_within_the_usual_number_of_rows(rng, gain, differ, usual):
    paths = evidence_paths(drawn(rng, (differ + gain) / 2, (differ - gain) / 2))
    proved = paths >= 1 / FIRST
    assert np.median(np.where(proved.any(axis=1), proved.argmax(axis=1) + 1, 10 * LENGTH)) <= usual
    assert proved.any(axis=1).mean() >= 0.95


def test_finer_losses_need_fewer_rows_than_right_and_wrong(rng):
    shared, first, second = rng.standard_normal((3, RUNS, 600)) * 0.43
    before, after = shared + first, 0.8 * (shared + second)
    by_loss = evidence_paths(losses(before) - losses(after))
    by_right = evidence_paths((np.abs(before) > 1).astype(float) - (np.abs(after) > 1))
    assert (by_loss[:, 299] >= 1 / FIRST).mean() > 0.8
    assert (by_right[:, 299] >= 1 / FIRST).mean() < (by_loss[:, 299] >= 1 / FIRST).mean() - 0.1


def trial(rng, *, hurt=0.0):
    """Verdict on a challenger that is right on 0.82 of rows instead of 0.7, but on label 0 `hurt` less than before.

    The gate looks after every tenth row, at most 600.
    """
    labels = rng.integers(0, 5, 600)
    chance = rng.random((2, 600))
    chance[1] = np.where(rng.random(600) < 0.6, chance[0], chance[1])
    wanted = np.where((labels == 0) & (hurt > 0), 0.7 - hurt, 0.82)
    other = (labels + rng.integers(1, 5, 600)) % 5
    said = np.where(chance[0] < 0.7, labels, other), np.where(chance[1] < wanted, labels, other)
    for n in range(30, 601, 10):
        found = compare(made(said[0][:n], labels[:n]), made(said[1][:n], labels[:n]), labels[:n])
        if found.outcome != "need_more":
            break
    return found


def test_a_truly_better_challenger_is_seldom_refused_for_harm(rng):
    ends = [trial(rng) for _ in range(60)]
    assert sum(end.outcome == "promote" for end in ends) >= 54
    assert sum(end.reason.startswith("harms") for end in ends) <= 4


def test_true_harm_to_one_label_is_usually_caught(rng):
    ends = [trial(rng, hurt=0.5) for _ in range(60)]
    assert sum(end.reason.startswith("harms 'no. 0'") for end in ends) >= 40
    assert sum(end.outcome == "promote" for end in ends) <= 15


@pytest.mark.parametrize("shape", [(3, 1), (6, 4)])
def test_equal_calibration_is_refused_in_few_runs_though_it_is_looked_at_from_a_hundred_rows_on(rng, shape):
    refused = 0
    for _ in range(60):
        confidence = rng.beta(*shape, (2, 400))
        right = rng.random((2, 400)) < confidence
        labels = np.zeros(400, np.int64)
        for n in range(100, 401, 20):
            pair = [
                replace(made(says(r[:n], labels[:n]), labels[:n]), confidence=p[:n])
                for r, p in zip(right, confidence, strict=True)
            ]
            refused += compare(*pair, config=GateConfig(class_margin=1.0)).reason.startswith("calibration")
    assert refused <= 2


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


def test_probation_watches_losses_as_well_as_right_and_wrong():
    def told(before, after):
        return watch(before, after, waited_s=0.0, healthy=True, alpha=0.05, rows=60, seconds=1e3)

    low, high = np.full(40, 0.2), np.full(40, 0.6)
    assert told(low, high).outcome == "rollback"
    assert told(low, high).reason == "live loss 0.600, before it 0.200"
    assert told(high, low).outcome == told(low, low).outcome == "need_more"
    assert told(np.repeat(high, 2), np.repeat(low, 2)).outcome == "confirm"


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
