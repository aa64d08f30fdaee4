"""The interface of every replay buffer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import numpy as np

from edge_sdk.types import IndexArray, LatentArray

ROW_OVERHEAD = 96
"""Bytes that a stored row costs beside its latent: label, slot and time, in memory and in the database."""


def capacity_for(max_bytes: int, latent_dim: int) -> int:
    """How many rows fit into `max_bytes`.

    Raises:
        ValueError: Not even one does.
    """
    rows = max_bytes // (latent_dim + ROW_OVERHEAD)
    if rows < 1:
        raise ValueError(f"a buffer of {max_bytes} bytes holds no row of {latent_dim + ROW_OVERHEAD} bytes")
    return rows


class ReplayBuffer(ABC):
    """A bounded set of labelled latents in numbered slots.

    `add` says which slot a row went to, so that the caller can persist just that. Which rows are kept is the
    subclass's only decision.

    Contract (held by `edge_sdk.checks.check_buffer`): never more rows than the capacity; `add` returns a slot below
    it or None; a row that `add` placed is found in its slot.

    Args:
        capacity: Most rows.
        latent_dim: Width of a latent.
        rng: Source of chance, or what makes it once it is needed: numpy.random takes 7 MB, and a device that has not
            learned yet does without.
    """

    def __init__(
        self, capacity: int, latent_dim: int, *, rng: np.random.Generator | Callable[[], np.random.Generator]
    ) -> None:
        if capacity < 1:
            raise ValueError(f"a buffer needs room for at least one row, got {capacity}")
        self.capacity = capacity
        self._chance = rng
        self._latents = np.zeros((capacity, latent_dim), dtype=np.uint8)
        self._labels = np.full(capacity, -1, dtype=np.int64)
        self._size = 0
        self.seen: dict[int, int] = {}
        """Rows offered so far, for each label."""

    @cached_property
    def _rng(self) -> np.random.Generator:
        return self._chance() if callable(self._chance) else self._chance

    def __len__(self) -> int:
        return self._size

    @property
    def latents(self) -> LatentArray:
        """uint8 [n, D], by slot; a copy."""
        return self._latents[: self._size].copy()

    @property
    def labels(self) -> IndexArray:
        """int64 [n], by slot; a copy."""
        return self._labels[: self._size].copy()

    def add(self, latent: LatentArray, label: int) -> int | None:
        """Offer one row, uint8 [D].

        Returns:
            The slot it went to (the row that was there is gone), or None if it was not kept.
        """
        self.seen[label] = self.seen.get(label, 0) + 1
        slot = self._size if self._size < self.capacity else self._replace(label)
        if slot is None:
            return None
        self.put(slot, latent, label)
        return slot

    def put(self, slot: int, latent: LatentArray, label: int) -> None:
        """Place a row in a slot: how a persisted buffer is read back (slots in ascending order).

        Raises:
            ValueError: The slot is not one of the filled ones or the next.
        """
        if not 0 <= slot <= self._size or slot >= self.capacity:
            raise ValueError(f"slot {slot} of a buffer with {self._size} of {self.capacity} rows")
        self._latents[slot] = latent
        self._labels[slot] = label
        self._size = max(self._size, slot + 1)

    @abstractmethod
    def _replace(self, label: int) -> int | None:
        """The full buffer's decision: which slot a row of this label takes, or None to drop the row."""
