"""Class-balanced reservoir: rare labels keep their rows, frequent ones share the rest."""

from __future__ import annotations

import numpy as np

from edge_sdk.replay.base import ReplayBuffer


class BalancedBuffer(ReplayBuffer):
    """Takes from the largest class, and samples uniformly within a class that is itself the largest.

    Source:
        Chrysakis & Moens 2020, "Online continual learning from imbalanced data", algorithm 1 (class-balancing
        reservoir sampling), proceedings.mlr.press/v119/chrysakis20a.html.
    """

    def _replace(self, label: int) -> int | None:
        counts = np.bincount(self._labels, minlength=label + 1)
        if counts[label] < counts.max():
            largest = np.flatnonzero(counts == counts.max())
            victims = np.flatnonzero(self._labels == self._rng.choice(largest))
            return int(self._rng.choice(victims))
        if self._rng.random() < counts[label] / self.seen[label]:
            return int(self._rng.choice(np.flatnonzero(self._labels == label)))
        return None
