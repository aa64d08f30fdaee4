"""Class-balanced reservoir: rare labels keep their rows, frequent ones share the rest."""

from __future__ import annotations

import numpy as np

from edge_sdk.replay.base import ReplayBuffer
from edge_sdk.types import LatentArray


class BalancedBuffer(ReplayBuffer):
    """As many rows of each label as of any other, as far as there are any, and of each label a uniform sample.

    A label gets a place of the largest class while that has at least two rows more; otherwise its rows share the
    places it has, as in a reservoir. The largest class never grows, and one that was once within a row of it stays so:
    a class grows only while it holds all of its rows that ever came. Hence, whatever the order of labels, of all sets
    of as many rows of a label as are kept, each is as likely as any other to be the one that is.

    Exactly so as long as no row is removed (balance comes first: a class that lost rows grows by those that come next)
    and there are no more labels than places (then labels instead of rows share the places as in a reservoir).

    Source:
        Chrysakis & Moens 2020, "Online continual learning from imbalanced data", algorithm 1 (class-balancing
        reservoir sampling), proceedings.mlr.press/v119/chrysakis20a.html. There a class is marked as full instead.
    """

    def _replace(self, latent: LatentArray, label: int) -> int | None:  # noqa: ARG002 - a latent's content is no reason
        giver = self._giver(label)
        rows = np.flatnonzero(self._labels == giver)
        if giver == label and self._rng.random() * self._population(label) >= len(rows):
            return None
        return int(self._rng.choice(rows))

    def _giver(self, label: int) -> int:
        """The class that a row of this label takes a place from: its own, unless another can better do without."""
        counts = np.bincount(self._labels, minlength=label + 1)
        largest = int(counts.argmax())
        if counts[label] + 1 < counts[largest]:
            return largest
        if counts[largest] == 1 and not counts[label] and self._rng.random() * len(self.seen) < self.capacity:
            return int(self._rng.choice(self._labels))
        return label
