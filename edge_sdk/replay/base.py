"""The interface of every replay buffer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeAlias

import numpy as np

from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.types import AnyArray, IndexArray, LatentArray

Chance: TypeAlias = "np.random.Generator | Callable[[], np.random.Generator]"
"""Source of chance, or what makes it once it is needed: numpy.random takes 7 MB, and many a device does without."""

ROW_OVERHEAD = 96
"""Bytes that a stored row costs beside its latent: label, slot, time and age, in memory and in the database."""


def capacity_for(max_bytes: int, latent_dim: int) -> int:
    """How many rows fit into `max_bytes`; 0 bytes are a buffer that stays empty.

    Raises:
        ValueError: There are bytes, but not enough for one row.
    """
    rows = max_bytes // (latent_dim + ROW_OVERHEAD)
    if rows < 1 and max_bytes != 0:
        raise ValueError(f"a buffer of {max_bytes} bytes holds no row of {latent_dim + ROW_OVERHEAD} bytes")
    return rows


class ReplayBuffer(ABC):
    """A bounded set of labelled latents in numbered slots, without holes.

    `add` says which slot a row went to, and `remove` which row moved, so that the caller can persist just that. Which
    rows are kept is the subclass's only decision, and only while there is no room.

    Rows are removed because somebody asked to forget some, or all of some age, whether the buffer had kept them or
    not. So a row that is removed takes along those it stood for: of `seen` rows of a label with n kept, seen / n.

    Contract (held by `edge_sdk.checks.check_buffer`): never more rows than the capacity; every row is kept while there
    is room; a row that `add` placed is found in its slot until another takes it or `remove` moves it; rows, `state` and
    the same chance give the same decisions; `nbytes` is at most `capacity * (latent_dim + ROW_OVERHEAD)`, and
    `label_bytes` more for each label.

    Args:
        capacity: Most rows; 0: it stays empty.
        latent_dim: Width of a latent.
        rng: For decisions that chance makes.

    Raises:
        ValueError: The capacity is negative.
    """

    def __init__(self, capacity: int, latent_dim: int, *, rng: Chance) -> None:
        if capacity < 0:
            raise ValueError(f"a buffer has room for no fewer than 0 rows, got {capacity}")
        self.capacity = capacity
        self._chance = rng
        self._latents = np.zeros((capacity, latent_dim), dtype=np.uint8)
        self._labels = np.full(capacity, -1, dtype=np.int64)
        self._size = 0
        self.seen: dict[int, int] = {}
        """Rows offered or put back so far, for each label."""
        self._gone: dict[int, float] = {}
        """How many of them went with the rows that were removed."""

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

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays it holds."""
        return self._latents.nbytes + self._labels.nbytes

    @property
    def label_bytes(self) -> int:
        """Bytes of them for each label that has rows, beyond those of the rows."""
        return 0

    def add(self, latent: LatentArray, label: int) -> int | None:
        """Offer one row, uint8 [D].

        Returns:
            The slot it went to (the row that was there is gone), or None if it was not kept.
        """
        self._see(latent, label)
        slot: int | None = None
        if self._size < self.capacity:
            slot = self._size
        elif self.capacity:
            slot = self._replace(latent, label)
        if slot is not None:
            self._place(slot, latent, label)
        return slot

    def put(self, slot: int, latent: LatentArray, label: int) -> None:
        """Place a row in a slot: how a persisted buffer is read back (slots in ascending order), before `restore`.

        Without a state to restore, the buffer goes on as one that has seen just these rows.

        Raises:
            ValueError: The slot is not one of the filled ones or the next.
        """
        if not 0 <= slot <= self._size or slot >= self.capacity:
            raise ValueError(f"slot {slot} of a buffer with {self._size} of {self.capacity} rows")
        self._see(latent, label)
        self._place(slot, latent, label)

    def remove(self, slot: int) -> int | None:
        """Forget a row. The last one moves into its slot; the place that is free then goes to the next row that comes.

        `seen` stays as it is.

        Returns:
            The slot that the row which moved had, or None if it was the last one that went.

        Raises:
            ValueError: There is no row in the slot.
        """
        if not 0 <= slot < self._size:
            raise ValueError(f"there is no row in slot {slot}: the buffer has {self._size} rows")
        self._unsee(self._latents[slot], int(self._labels[slot]))
        last = self._size - 1
        self._move(last, slot)
        self._latents[last], self._labels[last] = 0, -1  # nothing of it stays in memory
        self._size = last
        return None if slot == last else last

    def state(self) -> bytes:
        """What it remembers beside its rows; equal content gives equal bytes."""
        return npz_bytes(self._arrays())

    def restore(self, state: bytes) -> None:
        """Remember what `state` gave, once all rows have been put back.

        Rows beyond a smaller capacity may be missing. A state of a buffer of another kind serves too: what it does not
        tell is taken from the rows.

        Raises:
            IntegrityError: It is damaged, or not the state of these rows. The buffer stays as it was, and can go on as
                one that has seen just its rows.
        """
        self._restore(load_npz(state))

    def _arrays(self) -> dict[str, AnyArray]:
        labels = sorted(self.seen)
        return {
            "labels": np.array(labels, dtype=np.int64),
            "seen": np.array([self.seen[label] for label in labels], dtype=np.int64),
            "gone": np.array([self._gone.get(label, 0.0) for label in labels], dtype=np.float64),
        }

    def _restore(self, arrays: Mapping[str, AnyArray]) -> None:
        labels = checked(arrays, "labels", "int64", (None,))
        seen = checked(arrays, "seen", "int64", labels.shape)
        gone = checked(arrays, "gone", "float64", labels.shape)
        population = dict(zip(labels.tolist(), (seen - gone).tolist(), strict=True))
        for label, rows in zip(*np.unique(self.labels, return_counts=True), strict=True):
            known = population.get(int(label), 0)
            if known < rows - 0.5:  # it is a difference of rounded sums
                raise IntegrityError(f"a buffer state that knows of {known:g} rows of label {label}; there are {rows}")
        self.seen = dict(zip(labels.tolist(), seen.tolist(), strict=True))
        self._gone = dict(zip(labels.tolist(), gone.tolist(), strict=True))

    def _see(self, latent: LatentArray, label: int) -> None:  # noqa: ARG002 - for those who remember more
        self.seen[label] = self.seen.get(label, 0) + 1

    def _unsee(self, latent: LatentArray, label: int) -> None:  # noqa: ARG002 - for those who remember more
        """Called while the row is still there."""
        stood_for = self._population(label) / np.count_nonzero(self._labels == label)
        self._gone[label] = self._gone.get(label, 0.0) + stood_for

    def _population(self, label: int) -> float:
        """How many rows those kept of this label stand for."""
        return self.seen.get(label, 0) - self._gone.get(label, 0.0)

    def _place(self, slot: int, latent: LatentArray, label: int) -> None:
        self._latents[slot] = latent
        self._labels[slot] = label
        self._size = max(self._size, slot + 1)

    def _move(self, source: int, target: int) -> None:
        self._latents[target] = self._latents[source]
        self._labels[target] = self._labels[source]

    @abstractmethod
    def _replace(self, latent: LatentArray, label: int) -> int | None:
        """The full buffer's decision: which slot this row takes, or None to drop it. It is counted in `seen`."""


def checked(arrays: Mapping[str, AnyArray], name: str, dtype: str, shape: tuple[int | None, ...]) -> AnyArray:
    """An array of a state, if it is one of finite numbers, none below 0, of this dtype and shape (None: any length).

    Raises:
        IntegrityError: It is not there, or something else.
    """
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.ndim != len(shape):
        raise IntegrityError(f"a buffer state needs {dtype} {name!r} with {len(shape)} dimensions")
    if any(wanted not in (None, got) for wanted, got in zip(shape, array.shape, strict=True)):
        raise IntegrityError(f"{name!r} of a buffer state has shape {array.shape}, expected {shape}")
    if array.size and not (np.isfinite(array).all() and array.min() >= 0):
        raise IntegrityError(f"{name!r} of a buffer state holds values that are negative or not finite")
    return array
