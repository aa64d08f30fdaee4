"""Reservoir sampling: every row ever offered is kept with equal probability."""

from __future__ import annotations

from edge_sdk.replay.base import ReplayBuffer


class ReservoirBuffer(ReplayBuffer):
    """A uniform sample of the stream.

    Source:
        Vitter 1985, "Random sampling with a reservoir", algorithm R, doi:10.1145/3147.3165.
    """

    def _replace(self, label: int) -> int | None:  # noqa: ARG002 - uniform over labels
        slot = int(self._rng.integers(sum(self.seen.values())))
        return slot if slot < self.capacity else None
