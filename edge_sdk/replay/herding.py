"""Herding: of each label the rows whose mean is nearest to the mean of all that came."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_sdk.replay.balanced import BalancedBuffer
from edge_sdk.replay.base import Chance, checked
from edge_sdk.types import AnyArray, FloatArray, LatentArray


class HerdingBuffer(BalancedBuffer):
    """As many rows of each label as `BalancedBuffer` keeps, and of each label those that stand for its mean.

    The row that goes is the one without which the mean of the class is nearest to the running mean of all its rows:
    of n rows x with the sum S and the running mean m, the one for which |(S - x) / (n - 1) - m| is smallest. It may be
    the new row itself. Costs O(n D) for each row offered to a full buffer, and 4 D bytes for each label.

    Source:
        Welling 2009, "Herding dynamical weights to learn", doi:10.1145/1553374.1553517; Rebuffi et al. 2017, "iCaRL:
        incremental classifier and representation learning", algorithm 4, doi:10.1109/CVPR.2017.587. They choose among
        all rows of a class at once; here a row that has gone does not come back.
    """

    def __init__(self, capacity: int, latent_dim: int, *, rng: Chance) -> None:
        super().__init__(capacity, latent_dim, rng=rng)
        self._means: dict[int, FloatArray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays it holds."""
        return super().nbytes + sum(mean.nbytes for mean in self._means.values())

    @property
    def label_bytes(self) -> int:
        """Bytes of a running mean."""
        return 4 * self._latents.shape[1]

    def add(self, latent: LatentArray, label: int) -> int | None:
        """Offer one row, uint8 [D].

        Returns:
            The slot it went to (the row that was there is gone), or None if it was not kept.
        """
        slot = super().add(latent, label)
        self._drop_mean_without_rows(label)
        return slot

    def _replace(self, latent: LatentArray, label: int) -> int | None:
        giver = self._giver(label)
        slots = np.flatnonzero(self._labels == giver)
        rows = self._latents[slots]
        if giver == label:
            rows = np.append(rows, latent[None], axis=0)
        # |(S - x) / (n - 1) - m| is smallest for the x nearest to S - (n - 1) m
        wanted = rows.sum(axis=0, dtype=np.int64) - (len(rows) - 1) * self._means[giver].astype(np.float64)
        x = rows.astype(np.float32)
        gone = int((np.einsum("nd,nd->n", x, x) - 2 * (x @ wanted.astype(np.float32))).argmin())
        return int(slots[gone]) if gone < len(slots) else None

    def _see(self, latent: LatentArray, label: int) -> None:
        super()._see(latent, label)
        mean = self._means.setdefault(label, latent.astype(np.float32))
        mean += (latent - mean) / np.float32(self._population(label))

    def _unsee(self, latent: LatentArray, label: int) -> None:
        super()._unsee(latent, label)
        mean, others = self._means[label], np.count_nonzero(self._labels == label) - 1
        if others:  # the mean of what is left, if each row stands for as many
            self._means[label] = np.clip(mean + (mean - latent) / np.float32(others), 0, 255)
        else:
            del self._means[label]

    def _place(self, slot: int, latent: LatentArray, label: int) -> None:
        before = int(self._labels[slot])
        super()._place(slot, latent, label)
        self._drop_mean_without_rows(before)

    def _drop_mean_without_rows(self, label: int) -> None:
        """So that there are never more means than rows, however many labels come."""
        if label not in self._labels:
            self._means.pop(label, None)

    def _arrays(self) -> dict[str, AnyArray]:
        labels = sorted(self._means)
        means = np.array([self._means[label] for label in labels], dtype=np.float32)
        return {
            **super()._arrays(),
            "mean_labels": np.array(labels, dtype=np.int64),
            "means": means.reshape(len(labels), self._latents.shape[1]),
        }

    def _restore(self, arrays: Mapping[str, AnyArray]) -> None:
        means: dict[int, FloatArray] = {}
        if "means" in arrays:
            labels = checked(arrays, "mean_labels", "int64", (None,))
            rows = checked(arrays, "means", "float32", (len(labels), self._latents.shape[1]))
            means = {
                label: row.copy() for label, row in zip(labels.tolist(), rows, strict=True) if label in self._means
            }
        super()._restore(arrays)
        self._means |= means
