"""The contract of a `ReplayBuffer`."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edge_sdk.checks.common import require, require_raises
from edge_sdk.errors import IntegrityError
from edge_sdk.replay.base import ROW_OVERHEAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_sdk.replay import ReplayBuffer
    from edge_sdk.types import LatentArray


def check_buffer(make: Callable[..., ReplayBuffer], *, seed: int = 0) -> None:
    """Check a `ReplayBuffer`.

    Args:
        make: Gives an empty buffer when called as the class is: `make(capacity, latent_dim, rng=rng)`.
        seed: Of the rows offered to it.

    Raises:
        CheckFailed: A rule is broken.
    """
    dim = 4
    for capacity in (0, 1, 7, 50):
        chance = np.random.default_rng([seed, capacity])
        again = make(capacity, dim, rng=deepcopy(chance))
        buffer = make(capacity, dim, rng=chance)
        require(len(buffer) == 0 and buffer.latents.shape == (0, dim), "a new buffer is empty")
        rows = _BufferRows(np.random.default_rng(seed), capacity, dim)
        for _ in range(8 * capacity + 20):
            latent, label = rows.draw()
            slot = rows.offer(buffer, latent, label)
            require(slot == again.add(latent, label), "the same rows and the same chance give the same slots")
        for _ in range(2 * capacity):
            rows.remove(buffer)
            rows.offer(buffer, *rows.draw())
        _check_buffer_state(buffer, partial(make, capacity, dim), chance, rows)
        while len(buffer):
            rows.remove(buffer)
        for _ in range(capacity + 20):
            rows.offer(buffer, *rows.draw())
        _check_buffer_put(buffer, make(capacity, dim, rng=chance), dim)
    require_raises(ValueError, lambda: make(-1, dim, rng=np.random.default_rng(seed)), "a capacity below 0 is refused")


class _BufferRows:
    """Rows offered to a buffer, and which of them it should hold in each slot."""

    def __init__(self, rng: np.random.Generator, capacity: int, dim: int) -> None:
        self._rng, self._capacity, self._dim = rng, capacity, dim
        self.held: list[tuple[bytes, int]] = []
        self._offered: dict[int, int] = {}

    def draw(self) -> tuple[LatentArray, int]:
        return self._rng.integers(0, 256, self._dim, dtype=np.uint8), int(self._rng.choice([0, 0, 0, 1, 1, 5]))

    def offer(self, buffer: ReplayBuffer, latent: LatentArray, label: int) -> int | None:
        given = latent.copy()
        slot = buffer.add(given, label)
        require(np.array_equal(latent, given), "add() leaves the row as it was")
        given[:] = 0  # the caller's array is the caller's
        self._offered[label] = self._offered.get(label, 0) + 1
        if len(self.held) < self._capacity:
            require(slot == len(self.held), "while there is room, every row goes to the next slot")
            self.held.append((latent.tobytes(), label))
        elif slot is not None:
            require(0 <= slot < self._capacity, "add() returns a slot below the capacity, or None")
            self.held[slot] = latent.tobytes(), label
        self._compare(buffer)
        return slot

    def remove(self, buffer: ReplayBuffer) -> None:
        slot, last = int(self._rng.integers(len(self.held))), len(self.held) - 1
        moved = buffer.remove(slot)
        require(moved == (None if slot == last else last), "remove() returns the old slot of the row that moved")
        self.held[slot] = self.held[last]
        self.held.pop()
        self._compare(buffer)
        for outside in (-1, len(self.held)):
            require_raises(ValueError, partial(buffer.remove, outside), f"remove({outside}) of {len(self.held)} rows")

    def _compare(self, buffer: ReplayBuffer) -> None:
        latents, labels = buffer.latents, buffer.labels
        require(len(buffer) <= self._capacity, "a buffer never holds more rows than its capacity")
        require(len(buffer) == len(latents) == len(labels), "len(), `latents` and `labels` agree")
        held = [(latent.tobytes(), int(label)) for latent, label in zip(latents, labels, strict=True)]
        require(held == self.held, "a row is found in its slot until another takes it or remove() moves it")
        latents[:], labels[:] = 0, -7
        require(not len(labels) or bool((buffer.labels != -7).all()), "`latents` and `labels` are copies")
        require(buffer.seen == self._offered, "`seen` counts the rows offered, whatever becomes of them")
        budget = self._capacity * (self._dim + ROW_OVERHEAD) + len({label for _, label in held}) * buffer.label_bytes
        require(buffer.nbytes <= budget, f"a buffer stays within its bytes: {buffer.nbytes} of {budget}")


def _check_buffer_state(
    buffer: ReplayBuffer, make: Callable[..., ReplayBuffer], chance: np.random.Generator, rows: _BufferRows
) -> None:
    state = buffer.state()
    restored = _put_back(buffer, make(rng=deepcopy(chance)))
    without = restored.state()
    for damaged in (b"", b"state", state[:-10], state[: len(state) // 2]):
        require_raises(IntegrityError, partial(restored.restore, damaged), "a damaged state is refused")
    require(restored.state() == without, "a state that is refused changes nothing")
    restored.restore(state)
    require(restored.state() == state == buffer.state(), "equal content gives equal bytes of state")
    for position in range(0, len(state), max(1, len(state) // 64)):
        flipped = state[:position] + bytes([state[position] ^ 0x10]) + state[position + 1 :]
        with suppress(IntegrityError):
            restored.restore(flipped)
            require(restored.state() == state, f"a damaged state is refused, or read as it was: byte {position}")
    for _ in range(4 * buffer.capacity + 4):
        latent, label = rows.draw()
        slot = rows.offer(buffer, latent, label)
        require(slot == restored.add(latent, label), "a restored buffer goes on as the one that was saved")
    require(restored.state() == buffer.state(), "a restored buffer goes on as the one that was saved")


def _put_back(buffer: ReplayBuffer, into: ReplayBuffer) -> ReplayBuffer:
    for slot, (latent, label) in enumerate(zip(buffer.latents, buffer.labels, strict=True)):
        into.put(slot, latent, int(label))
    return into


def _check_buffer_put(buffer: ReplayBuffer, restored: ReplayBuffer, dim: int) -> None:
    row = np.full(dim, 9, dtype=np.uint8)
    for slot in (-1, 1, buffer.capacity):
        require_raises(ValueError, partial(restored.put, slot, row, 0), f"slot {slot} of an empty buffer")
    _put_back(buffer, restored)
    require(
        np.array_equal(restored.latents, buffer.latents) and np.array_equal(restored.labels, buffer.labels),
        "put() in ascending order restores a buffer",
    )
    require(sum(restored.seen.values()) == len(buffer), "a row that is put back counts as seen")
    require_raises(ValueError, partial(restored.put, buffer.capacity, row, 0), "put() at the capacity is refused")
    if len(buffer):
        restored.put(0, row, 3)
        require(
            len(restored) == len(buffer) and int(restored.labels[0]) == 3 and np.array_equal(restored.latents[0], row),
            "put() into a filled slot takes the place of the row that was there",
        )
