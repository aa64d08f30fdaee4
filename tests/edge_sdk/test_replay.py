"""Replay buffers: the contract of all, and which rows each of them keeps."""

from collections import Counter, defaultdict
from copy import deepcopy
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_sdk.checks import CheckFailed, check_buffer
from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.replay import BUFFERS, BalancedBuffer, HerdingBuffer, RecentBuffer, ReservoirBuffer, capacity_for
from edge_sdk.replay.base import ROW_OVERHEAD

KINDS = sorted(BUFFERS)


@pytest.mark.parametrize("kind", KINDS)
def test_buffer_keeps_the_contract(kind):
    for seed in range(3):
        check_buffer(BUFFERS[kind], seed=seed)


class Overfull(ReservoirBuffer):
    def add(self, latent, label):
        self.capacity += 1
        self._latents = np.concatenate([self._latents, latent[None]])
        self._labels = np.append(self._labels, label)
        return super().add(latent, label)


class Elsewhere(ReservoirBuffer):
    def add(self, latent, label):
        slot = super().add(latent, label)
        return None if slot is None else (slot + 1) % self.capacity


class Lazy(ReservoirBuffer):
    def add(self, latent, label):
        if len(self) < self.capacity - 1 or len(self) == self.capacity:
            return super().add(latent, label)
        self.seen[label] = self.seen.get(label, 0) + 1
        return None


class Leaking(ReservoirBuffer):
    @property
    def labels(self):
        return self._labels[: self._size]


class Trusting(ReservoirBuffer):
    def put(self, slot, latent, label):
        super().put(max(0, min(slot, self._size, self.capacity - 1)), latent, label)


class Moody(ReservoirBuffer):
    def _replace(self, latent, label):
        slot = int(np.random.default_rng().integers(3 * self.capacity))
        return slot if slot < self.capacity else None


class Hoarder(ReservoirBuffer):
    hoard = np.zeros((0, 4), dtype=np.uint8)

    def add(self, latent, label):
        self.hoard = np.append(self.hoard, latent[None], axis=0)
        return super().add(latent, label)

    @property
    def nbytes(self):
        return super().nbytes + 100 * self.hoard.nbytes


class Uncounted(ReservoirBuffer):
    def remove(self, slot):
        self.seen[int(self._labels[slot])] -= 1
        return super().remove(slot)


class Gap(ReservoirBuffer):
    def _move(self, source, target):
        pass


class Quiet(ReservoirBuffer):
    def remove(self, slot):
        super().remove(slot)


class Negative(ReservoirBuffer):
    def remove(self, slot):
        return super().remove(slot % max(1, len(self)))


class Forgetful(RecentBuffer):
    def _arrays(self):
        return {**super()._arrays(), "number": np.arange(len(self))}


class Dated(ReservoirBuffer):
    def _arrays(self):
        return {**super()._arrays(), "id": np.array(id(self))}


class Hasty(ReservoirBuffer):
    def restore(self, state):
        self.seen = {}
        super().restore(state)


class Gullible(ReservoirBuffer):
    def state(self):
        return np.array([self.seen.get(label, 0) for label in range(6)]).tobytes()

    def restore(self, state):
        if len(state) != 48:
            raise IntegrityError("not a state")
        self.seen = {label: int(n) for label, n in enumerate(np.frombuffer(state, dtype=np.int64)) if n}


@pytest.mark.parametrize(
    ("broken", "broken_rule"),
    [
        (Overfull, "below the capacity"),
        (Elsewhere, "next slot"),
        (Lazy, "while there is room"),
        (Leaking, "are copies"),
        (Trusting, "of an empty buffer"),
        (Moody, "same chance"),
        (Hoarder, "within its bytes"),
        (Uncounted, "whatever becomes of them"),
        (Gap, "remove\\(\\) moves it"),
        (Quiet, "old slot of the row that moved"),
        (Negative, "remove\\(-1\\) of"),
        (Forgetful, "goes on as the one that was saved"),
        (Dated, "equal bytes of state"),
        (Hasty, "refused changes nothing"),
        (Gullible, "refused, or read as it was"),
    ],
)
def test_contract_suite_finds_a_broken_buffer(broken, broken_rule):
    with pytest.raises(CheckFailed, match=broken_rule):
        check_buffer(broken)


def row(number):
    return np.frombuffer(int(number).to_bytes(4, "big"), dtype=np.uint8)


def number(latent):
    return int.from_bytes(latent.tobytes(), "big")


def numbers(buffer, label=None):
    return [number(x) for x, y in zip(buffer.latents, buffer.labels, strict=True) if label in (None, y)]


def fill(kind, labels, *, capacity, rng):
    buffer = BUFFERS[kind](capacity, 4, rng=rng)
    for i, label in enumerate(labels):
        buffer.add(row(i), int(label))
    return buffer


def reread(buffer, *, rng=None, capacity=None, kind=None, state=True):
    """The same rows and state in a new buffer."""
    again = (kind or type(buffer))(capacity or buffer.capacity, buffer.latents.shape[1], rng=rng)
    for slot, (latent, label) in enumerate(zip(buffer.latents, buffer.labels, strict=True)):
        if slot < again.capacity:
            again.put(slot, latent, int(label))
    if state:
        again.restore(buffer.state())
    return again


# ---- uniform within a class


def chi_square_limit(df, z=3.09):
    """The 99.9 % point (Wilson & Hilferty 1931)."""
    return df * (1 - 2 / (9 * df) + z * np.sqrt(2 / (9 * df))) ** 3


def inclusion(make, labels, *, capacity, runs, rng):
    """For each label: chi-square of how often each of its rows was kept over its limit; above 1 is not uniform.

    A uniform sample of n of N rows includes a row with variance p (1 - p), p = n / N, and its sum over rows is fixed.
    """
    labels = np.array(labels)
    kept = np.zeros((runs, len(labels)))
    for run in range(runs):
        buffer = make(capacity, 4, rng=rng)
        for i, label in enumerate(labels.tolist()):
            buffer.add(row(i), label)
        kept[run, numbers(buffer)] = 1
    ratios = {}
    for label in set(labels.tolist()):
        own = kept[:, labels == label]
        many = own.shape[1]
        p = own.mean(axis=1)
        variance = (p * (1 - p)).sum() * many / (many - 1)
        statistic = ((own.sum(axis=0) - p.sum()) ** 2).sum() / variance if variance else 0.0
        ratios[label] = statistic / chi_square_limit(many - 1)
    return ratios


CHANGING = [0] * 40 + [1] * 60 + [0, 1, 2] * 20 + [2] * 40 + [0] * 30 + [3] * 3 + [1, 2] * 15
"""The largest class changes with every stretch, and each comes again once it is no longer the largest."""


class Greedy(BalancedBuffer):
    """A class below the largest takes a place for certain, though it has lost rows before."""

    def _giver(self, label):
        counts = np.bincount(self._labels, minlength=label + 1)
        return int(counts.argmax()) if counts[label] < counts.max() else label


@pytest.mark.parametrize("capacity", [10, 23])
def test_balanced_buffer_is_uniform_within_each_class_when_the_largest_changes(capacity, rng):
    ratios = inclusion(BalancedBuffer, CHANGING, capacity=capacity, runs=400, rng=rng)
    assert max(ratios.values()) < 1, ratios
    assert max(inclusion(Greedy, CHANGING, capacity=capacity, runs=100, rng=rng).values()) > 2


def sets(make, labels, *, capacity, runs, rng):
    """As `inclusion`, for which set of a label's rows is kept, among all sets of as many rows."""
    kept = defaultdict(Counter)
    for _ in range(runs):
        buffer = make(capacity, 4, rng=rng)
        for i, label in enumerate(labels):
            buffer.add(row(i), label)
        for label in set(labels):
            own = frozenset(numbers(buffer, label))
            kept[label, len(own)][own] += 1
    ratios = {}
    for (label, size), found in kept.items():
        many, total = comb(labels.count(label), size), found.total()
        if many > 1 and total >= 5 * many:
            statistic = (sum(count**2 for count in found.values()) * many / total) - total
            ratios[label, size] = statistic / chi_square_limit(many - 1)
    return ratios


def test_balanced_buffer_keeps_every_set_of_a_class_of_as_many_rows_with_equal_probability(rng):
    labels = [0] * 4 + [1] * 5 + [0, 1, 2, 0, 2, 1, 2, 2]
    ratios = sets(BalancedBuffer, labels, capacity=5, runs=4_000, rng=rng)
    assert {label for label, _ in ratios} == {0, 1, 2}
    assert max(ratios.values()) < 1, ratios
    assert max(sets(Greedy, labels, capacity=5, runs=1_000, rng=rng).values()) > 2


@pytest.mark.parametrize("kind", ["balanced", "reservoir"])
def test_every_row_of_one_class_is_kept_with_equal_probability(kind, rng):
    assert inclusion(BUFFERS[kind], [0] * 100, capacity=20, runs=600, rng=rng)[0] < 1


def test_reservoir_keeps_every_row_with_equal_probability_whatever_its_label(rng):
    kept = np.zeros(len(CHANGING))
    for _ in range(600):
        kept[numbers(fill("reservoir", CHANGING, capacity=25, rng=rng))] += 1
    p = 25 / len(CHANGING)
    statistic = ((kept - 600 * p) ** 2).sum() / (600 * p * (1 - p))
    assert statistic < chi_square_limit(len(CHANGING) - 1)


def test_a_restart_in_the_middle_leaves_the_sample_uniform(rng):
    class Restarted(BalancedBuffer):
        def add(self, latent, label):
            if sum(self.seen.values()) == 120:
                self.__dict__ = reread(self, rng=rng).__dict__
            return super().add(latent, label)

    assert max(inclusion(Restarted, CHANGING, capacity=23, runs=200, rng=rng).values()) < 1


def test_reservoir_keeps_labels_in_the_proportion_of_the_stream(rng):
    counts = np.zeros(2)
    for _ in range(50):
        buffer = fill("reservoir", rng.choice(2, 1_000, p=[0.9, 0.1]), capacity=40, rng=rng)
        counts += np.bincount(buffer.labels, minlength=2)
    assert counts[1] / counts.sum() == pytest.approx(0.1, abs=0.03)


# ---- balance


@pytest.mark.parametrize("kind", ["balanced", "herding"])
def test_balanced_buffer_keeps_every_row_of_a_rare_class(kind, rng):
    labels = rng.choice(3, 3_000, p=[0.8, 0.197, 0.003])
    buffer = fill(kind, labels, capacity=60, rng=rng)
    rare = [i for i, label in enumerate(labels) if label == 2]
    assert 0 < len(rare) < 20
    assert sorted(numbers(buffer, 2)) == rare


@pytest.mark.parametrize("kind", ["balanced", "herding"])
def test_balanced_buffer_shares_its_places_evenly(kind, rng):
    buffer = fill(kind, rng.choice(4, 4_000, p=[0.7, 0.2, 0.07, 0.03]), capacity=62, rng=rng)
    counts = np.bincount(buffer.labels, minlength=4)
    assert counts.sum() == 62
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("kind", ["balanced", "herding"])
def test_balanced_buffer_makes_room_for_a_class_that_comes_late(kind, rng):
    buffer = fill(kind, [*rng.integers(0, 4, 2_000), *([9] * 30)], capacity=40, rng=rng)
    counts = np.bincount(buffer.labels, minlength=10)
    assert counts[9] >= 8
    assert (counts[:4] >= 7).all()


@pytest.mark.parametrize("kind", ["balanced", "herding"])
def test_a_class_that_was_forgotten_in_part_gets_its_places_back(kind, rng):
    buffer = fill(kind, [0, 1, 2] * 100, capacity=30, rng=rng)
    for _ in range(8):
        buffer.remove(int(np.flatnonzero(buffer.labels == 0)[0]))
    for i in range(300, 320):
        buffer.add(row(i), 1)
    assert np.bincount(buffer.labels).tolist() == [2, 18, 10]
    for i in range(320, 400):
        buffer.add(row(i), i % 2 * 2)
    assert np.ptp(np.bincount(buffer.labels)) <= 1


@pytest.mark.parametrize("kind", ["balanced", "herding"])
def test_more_labels_than_places_share_them_as_rows_do_in_a_reservoir(kind, rng):
    kept = np.zeros(60)
    for _ in range(400):
        kept[fill(kind, range(60), capacity=12, rng=rng).labels] += 1
    assert ((kept - 80) ** 2).sum() / (80 * 0.8) < chi_square_limit(59)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=13, max_size=120),
    capacity=st.integers(4, 12),
    kind=st.sampled_from(["balanced", "herding"]),
    seed=st.integers(0, 2**32),
)
def test_balanced_buffer_never_lets_a_smaller_class_shrink(labels, capacity, kind, seed):
    buffer = BUFFERS[kind](capacity, 4, rng=np.random.default_rng(seed))
    for i, label in enumerate(labels):
        before = np.bincount(buffer.labels, minlength=4)
        buffer.add(row(i), label)
        after = np.bincount(buffer.labels, minlength=4)
        lost = np.flatnonzero(after < before)
        assert len(lost) <= 1
        assert (before[lost] == before.max()).all()


# ---- herding


def mean_error(buffer, rows):
    return float(np.linalg.norm(buffer.latents.mean(axis=0) - rows.mean(axis=0)))


@pytest.mark.parametrize("trend", [0, 40])
def test_herding_keeps_the_mean_of_what_came_far_better_than_chance(trend, rng):
    means = 128 + np.linspace(-trend, trend, 1_000)[:, None]
    rows = np.clip(rng.normal(means, 40, (1_000, 16)), 0, 255).astype(np.uint8)
    errors = {}
    for kind in ("herding", "balanced"):
        buffer = BUFFERS[kind](30, 16, rng=rng)
        for latent in rows:
            buffer.add(latent, 0)
        errors[kind] = mean_error(buffer, rows)
    assert errors["herding"] < errors["balanced"] / 4


@settings(deadline=None)
@given(
    latents=st.lists(st.binary(min_size=2, max_size=2), min_size=2, max_size=40),
    capacity=st.integers(1, 8),
)
def test_herding_drops_the_row_without_which_the_mean_is_nearest(latents, capacity):
    buffer, came = HerdingBuffer(capacity, 2, rng=np.random.default_rng(0)), []
    for latent in (np.frombuffer(x, dtype=np.uint8) for x in latents):
        came.append(latent)
        candidates = np.concatenate([buffer.latents, latent[None]]).astype(float)
        buffer.add(latent, 0)
        if len(candidates) > capacity:
            running = np.mean(came, axis=0)
            without = [np.delete(candidates, i, axis=0).mean(axis=0) for i in range(len(candidates))]
            best = min(np.linalg.norm(mean - running) for mean in without)
            assert np.linalg.norm(buffer.latents.mean(axis=0) - running) == pytest.approx(best, abs=1e-2)


def test_herding_takes_the_mean_of_what_is_left_when_rows_are_forgotten(rng):
    rows = np.concatenate([rng.integers(0, 20, (100, 8)), rng.integers(200, 255, (100, 8))]).astype(np.uint8)
    buffer = HerdingBuffer(200, 8, rng=rng)
    for latent in rows:
        buffer.add(latent, 0)
    for slot in reversed(range(100)):
        buffer.remove(slot)
    assert np.allclose(buffer._means[0], rows[100:].mean(axis=0), atol=0.5)


def test_herding_remembers_no_mean_of_a_label_without_rows(rng):
    buffer = fill("herding", range(500), capacity=5, rng=rng)
    assert sorted(buffer._means) == sorted(buffer.labels)
    buffer.put(0, row(0), 1_000)
    while len(buffer):
        assert sorted(buffer._means) == sorted(buffer.labels)
        buffer.remove(0)
    assert buffer._means == {}
    assert fill("herding", [0, 1, 2], capacity=0, rng=rng).nbytes == 0


# ---- recent


@settings(deadline=None)
@given(
    steps=st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=120),
    capacity=st.integers(1, 8),
)
def test_recent_buffer_holds_the_newest_rows_that_were_not_removed(steps, capacity):
    buffer, expected = RecentBuffer(capacity, 4, rng=None), []
    for i, step in enumerate(steps):
        if step is not None and expected:
            slot = step % len(expected)
            expected.remove(number(buffer.latents[slot]))
            buffer.remove(slot)
        else:
            buffer.add(row(i), i % 3)
            expected = [*expected, i][-capacity:]
        assert sorted(numbers(buffer)) == expected


# ---- all of them


@settings(deadline=None)
@given(
    capacity=st.integers(0, 12),
    labels=st.lists(st.integers(0, 5), max_size=120),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
)
def test_a_buffer_is_full_as_soon_as_it_can_be_and_holds_only_rows_it_was_given(capacity, labels, kind, seed):
    buffer = fill(kind, labels, capacity=capacity, rng=np.random.default_rng(seed))
    assert len(buffer) == min(capacity, len(labels))
    assert len(set(numbers(buffer))) == len(buffer)
    assert [labels[i] for i in numbers(buffer)] == buffer.labels.tolist()
    assert sum(buffer.seen.values()) == len(labels)


class BufferMachine(RuleBasedStateMachine):
    """A buffer beside a list of what it should hold, and beside one that is restored again and again."""

    @initialize(kind=st.sampled_from(KINDS), capacity=st.integers(0, 6), seed=st.integers(0, 9))
    def start(self, kind, capacity, seed):
        self.chance = np.random.default_rng(seed)
        self.buffer = BUFFERS[kind](capacity, 4, rng=self.chance)
        self.twin = reread(self.buffer, rng=deepcopy(self.chance))
        self.held, self.offered = [], 0

    @rule(label=st.integers(0, 4))
    def add(self, label):
        self.offered += 1
        slot = self.buffer.add(row(self.offered), label)
        assert slot == self.twin.add(row(self.offered), label)
        if len(self.held) < self.buffer.capacity:
            assert slot == len(self.held)
            self.held.append((self.offered, label))
        elif slot is not None:
            self.held[slot] = self.offered, label

    @precondition(lambda self: self.held)
    @rule(place=st.integers(0, 100))
    def remove(self, place):
        slot, last = place % len(self.held), len(self.held) - 1
        moved = self.buffer.remove(slot)
        assert moved == self.twin.remove(slot) == (last if slot < last else None)
        self.held[slot] = self.held[last]
        self.held.pop()

    @rule()
    def restart(self):
        self.twin = reread(self.twin, rng=deepcopy(self.chance))

    @invariant()
    def all_is_kept(self):
        held = list(zip(numbers(self.buffer), self.buffer.labels.tolist(), strict=True))
        assert held == self.held
        assert np.array_equal(self.twin.latents, self.buffer.latents)
        assert self.twin.state() == self.buffer.state()
        assert sum(self.buffer.seen.values()) == self.offered
        for label, rows in Counter(label for _, label in held).items():
            assert self.buffer._population(label) >= rows - 1e-6

    @invariant()
    def it_stays_within_its_bytes(self):
        labels = len(set(self.buffer.labels.tolist()))
        assert self.buffer.nbytes <= self.buffer.capacity * (4 + ROW_OVERHEAD) + labels * self.buffer.label_bytes


BufferMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBufferMachine = BufferMachine.TestCase


def test_a_reservoir_that_forgot_everything_is_uniform_over_what_comes_then(rng):
    kept = np.zeros(60)
    for _ in range(400):
        buffer = fill("reservoir", [0, 1] * 100, capacity=12, rng=rng)
        while len(buffer):
            buffer.remove(0)
        for i in range(60):
            buffer.add(row(i), 0)
        kept[numbers(buffer)] += 1
    assert ((kept - 80) ** 2).sum() / (80 * 0.8) < chi_square_limit(59)


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_row_leaves_the_memory(kind, rng):
    buffer = fill(kind, [0, 0, 1], capacity=5, rng=rng)
    buffer.put(1, np.array([222, 173, 190, 239], dtype=np.uint8), 0)
    buffer.remove(1)
    assert np.array([222, 173, 190, 239], dtype=np.uint8).tobytes() not in buffer._latents.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_read_back_without_its_state_goes_on_as_one_that_saw_just_its_rows(kind, rng):
    buffer = fill(kind, [0, 1] * 500, capacity=20, rng=rng)
    again = reread(buffer, rng=rng, state=False)
    assert again.seen == {label: int(n) for label, n in enumerate(np.bincount(buffer.labels))}
    kept = sum(again.add(row(2_000 + i), i % 2) is not None for i in range(20))
    assert kept >= 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_the_state_of_another_kind_serves_when_the_configuration_changes(before, kind, rng):
    buffer = fill(before, [0, 1] * 500, capacity=20, rng=rng)
    again = reread(buffer, rng=rng, kind=BUFFERS[kind])
    assert again.seen == buffer.seen
    again.add(row(2_000), 0)
    assert len(again) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_buffer_takes_the_state_of_a_larger_one(kind, rng):
    buffer = fill(kind, [0, 1, 2] * 100, capacity=20, rng=rng)
    again = reread(buffer, rng=rng, capacity=2)
    assert again.seen == buffer.seen
    for i in range(50):
        again.add(row(400 + i), 2)
    assert len(again) == 2


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("balanced", "seen", np.array([1, 0], dtype=np.int64)),
        ("balanced", "seen", np.array([10, 10], dtype=np.float64)),
        ("balanced", "seen", np.array([10], dtype=np.int64)),
        ("balanced", "gone", np.array([0.0, np.nan])),
        ("balanced", "gone", np.array([0.0, -1.0])),
        ("balanced", "gone", np.array([0.0, 9.0])),
        ("balanced", "labels", np.array([0, 2], dtype=np.int64)),
        ("balanced", "labels", None),
        ("recent", "number", np.arange(3)),
        ("herding", "mean_labels", None),
        ("herding", "means", np.zeros((2, 5), dtype=np.float32)),
        ("herding", "means", np.full((2, 4), np.inf, dtype=np.float32)),
    ],
)
def test_a_state_that_is_not_of_these_rows_is_refused_and_changes_nothing(kind, name, value, rng):
    buffer = fill(kind, [0, 1] * 5, capacity=6, rng=rng)
    arrays = {**load_npz(buffer.state()), name: value}
    again = reread(buffer, rng=rng, state=False)
    before = again.state()
    with pytest.raises(IntegrityError, match="buffer state"):
        again.restore(npz_bytes({key: array for key, array in arrays.items() if array is not None}))
    assert again.state() == before


def test_reservoir_decisions_survive_a_restart(rng):
    """With its state the buffer goes on as one that has seen the whole stream."""
    restored = reread(fill("reservoir", [0] * 10_000, capacity=10, rng=rng), rng=rng)
    kept = sum(restored.add(row(i), 0) is not None for i in range(1_000))
    assert kept < 10


def test_capacity_counts_all_bytes_of_a_row():
    assert capacity_for(100_000, 32) == 100_000 // (32 + ROW_OVERHEAD)
    assert capacity_for(32 + ROW_OVERHEAD, 32) == 1
    assert capacity_for(0, 32) == 0
    for too_few in (32 + ROW_OVERHEAD - 1, 1, -1):
        with pytest.raises(ValueError, match="holds no row"):
            capacity_for(too_few, 32)
