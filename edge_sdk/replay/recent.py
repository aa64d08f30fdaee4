"""A window: the newest rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_sdk.errors import IntegrityError
from edge_sdk.replay.base import Chance, ReplayBuffer, checked
from edge_sdk.types import AnyArray, LatentArray


class RecentBuffer(ReplayBuffer):
    """The newest rows, whatever their labels: each takes the place of the oldest one."""

    def __init__(self, capacity: int, latent_dim: int, *, rng: Chance) -> None:
        super().__init__(capacity, latent_dim, rng=rng)
        self._number = np.zeros(capacity, dtype=np.int64)  # of each row, in the order they came

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays it holds."""
        return super().nbytes + self._number.nbytes

    def _replace(self, latent: LatentArray, label: int) -> int | None:  # noqa: ARG002 - all rows are alike
        return int(self._number.argmin())

    def _place(self, slot: int, latent: LatentArray, label: int) -> None:
        super()._place(slot, latent, label)
        self._number[slot] = sum(self.seen.values())

    def _move(self, source: int, target: int) -> None:
        super()._move(source, target)
        self._number[target] = self._number[source]

    def _arrays(self) -> dict[str, AnyArray]:
        return {**super()._arrays(), "number": self._number[: len(self)]}

    def _restore(self, arrays: Mapping[str, AnyArray]) -> None:
        number = checked(arrays, "number", "int64", (None,)) if "number" in arrays else self._number
        if len(number) < len(self):
            raise IntegrityError(f"a buffer state that knows of {len(number)} rows; there are {len(self)}")
        super()._restore(arrays)
        self._number[: len(self)] = number[: len(self)]
