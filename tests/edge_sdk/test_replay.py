"""Replay buffers: the contract of both, and which rows each of them keeps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.checks import CheckFailed, check_buffer
from edge_sdk.replay import BUFFERS, BalancedBuffer, ReservoirBuffer, capacity_for
from edge_sdk.replay.base import ROW_OVERHEAD

CHI_SQUARE_99_DF99 = 134.64


@pytest.mark.parametrize("kind", sorted(BUFFERS))
def test_buffer_keeps_the_contract(kind):
    for seed in range(5):
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
        return None if len(self) == self.capacity - 1 else super().add(latent, label)


class Leaking(ReservoirBuffer):
    @property
    def labels(self):
        return self._labels[: self._size]


class Trusting(ReservoirBuffer):
    def put(self, slot, latent, label):
        super().put(max(0, min(slot, self._size, self.capacity - 1)), latent, label)


class Moody(ReservoirBuffer):
    def _replace(self, label):
        slot = int(np.random.default_rng().integers(3 * self.capacity))
        return slot if slot < self.capacity else None


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (Overfull, "below the capacity"),
        (Elsewhere, "found in its slot"),
        (Lazy, "while there is room"),
        (Leaking, "are copies"),
        (Trusting, "of an empty buffer"),
        (Moody, "same chance"),
    ],
)
def test_contract_suite_finds_a_broken_buffer(broken, rule):
    with pytest.raises(CheckFailed, match=rule):
        check_buffer(broken)


def row(number):
    return np.frombuffer(int(number).to_bytes(4, "big"), dtype=np.uint8)


def number(latent):
    return int.from_bytes(latent.tobytes(), "big")


def fill(kind, labels, *, capacity, rng):
    buffer = BUFFERS[kind](capacity, 4, rng=rng)
    for i, label in enumerate(labels):
        buffer.add(row(i), int(label))
    return buffer


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("kind", sorted(BUFFERS))
def test_every_row_of_one_class_is_kept_with_equal_probability(kind, rng):
    """Chi-square over 100 rows of a stream for 20 places; inclusion without replacement only lowers the statistic."""
    kept = np.zeros(100)
    for _ in range(600):
        buffer = fill(kind, np.zeros(100), capacity=20, rng=rng)
        kept[[number(latent) for latent in buffer.latents]] += 1
    assert chi_square(kept) < CHI_SQUARE_99_DF99


def test_reservoir_keeps_labels_in_the_proportion_of_the_stream(rng):
    counts = np.zeros(2)
    for _ in range(50):
        buffer = fill("reservoir", rng.choice(2, 1_000, p=[0.9, 0.1]), capacity=40, rng=rng)
        counts += np.bincount(buffer.labels, minlength=2)
    assert counts[1] / counts.sum() == pytest.approx(0.1, abs=0.03)


def test_balanced_buffer_keeps_every_row_of_a_rare_class(rng):
    labels = rng.choice(3, 3_000, p=[0.8, 0.197, 0.003])
    buffer = fill("balanced", labels, capacity=60, rng=rng)
    rare = {i for i, label in enumerate(labels) if label == 2}
    assert 0 < len(rare) < 20
    assert rare == {number(latent) for latent, label in zip(buffer.latents, buffer.labels, strict=True) if label == 2}


def test_balanced_buffer_shares_its_places_evenly(rng):
    buffer = fill("balanced", rng.choice(4, 4_000, p=[0.7, 0.2, 0.07, 0.03]), capacity=60, rng=rng)
    counts = np.bincount(buffer.labels, minlength=4)
    assert counts.sum() == 60
    assert counts.max() - counts.min() <= 2


def test_balanced_buffer_makes_room_for_a_class_that_comes_late(rng):
    buffer = fill("balanced", [*rng.integers(0, 4, 2_000), *([9] * 30)], capacity=40, rng=rng)
    counts = np.bincount(buffer.labels, minlength=10)
    assert counts[9] >= 8
    assert (counts[:4] >= 7).all()


@settings(deadline=None)
@given(
    capacity=st.integers(1, 12),
    labels=st.lists(st.integers(0, 5), max_size=120),
    kind=st.sampled_from(sorted(BUFFERS)),
    seed=st.integers(0, 2**32),
)
def test_a_buffer_is_full_as_soon_as_it_can_be_and_holds_only_rows_it_was_given(capacity, labels, kind, seed):
    buffer = fill(kind, labels, capacity=capacity, rng=np.random.default_rng(seed))
    assert len(buffer) == min(capacity, len(labels))
    numbers = [number(latent) for latent in buffer.latents]
    assert len(set(numbers)) == len(numbers)
    assert [labels[i] for i in numbers] == buffer.labels.tolist()
    assert sum(buffer.seen.values()) == len(labels)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=13, max_size=120),
    capacity=st.integers(4, 12),
    seed=st.integers(0, 2**32),
)
def test_balanced_buffer_never_lets_a_smaller_class_shrink(labels, capacity, seed):
    buffer = BalancedBuffer(capacity, 4, rng=np.random.default_rng(seed))
    for i, label in enumerate(labels):
        before = np.bincount(buffer.labels, minlength=4)
        buffer.add(row(i), label)
        after = np.bincount(buffer.labels, minlength=4)
        lost = np.flatnonzero(after < before)
        assert len(lost) <= 1
        assert (before[lost] == before.max()).all()


def test_reservoir_decisions_survive_a_restart(rng):
    """With `seen` restored the buffer goes on as one that has seen the whole stream."""
    restored = ReservoirBuffer(10, 4, rng=rng)
    for slot in range(10):
        restored.put(slot, row(slot), 0)
    restored.seen = {0: 10_000}
    kept = sum(restored.add(row(i), 0) is not None for i in range(1_000))
    assert kept < 10


def test_capacity_counts_all_bytes_of_a_row():
    assert capacity_for(100_000, 32) == 100_000 // (32 + ROW_OVERHEAD)
    assert capacity_for(32 + ROW_OVERHEAD, 32) == 1
    with pytest.raises(ValueError, match="holds no row"):
        capacity_for(32 + ROW_OVERHEAD - 1, 32)
