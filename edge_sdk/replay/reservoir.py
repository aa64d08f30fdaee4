"""Reservoir sampling: every row ever offered is kept with equal probability."""

from __future__ import annotations

import math

from edge_sdk.replay.base import ReplayBuffer
from edge_sdk.types import LatentArray


class ReservoirBuffer(ReplayBuffer):
    """A uniform sample of the stream.

    Exactly so as long as no row is removed; a place that `remove` leaves free goes to a row that is newer than most.

    Source:
        Vitter 1985, "Random sampling with a reservoir", algorithm R, doi:10.1145/3147.3165.
    """

    def _replace(self, latent: LatentArray, label: int) -> int | None:  # noqa: ARG002 - uniform over all rows
        population = sum(self.seen.values()) - math.fsum(self._gone.values())
        slot = int(self._rng.random() * population)
        return slot if slot < self.capacity else None
