"""Data whose drift is known: what simulations and tests feed to devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_sdk.types import FloatArray, IndexArray

Transform = Callable[[FloatArray, np.random.Generator], FloatArray]
"""float32 [N, ...] to float32 [N, ...]."""


def unchanged(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
    """No drift."""
    return x


def rotation(degrees: float) -> Transform:
    """Rotate images [N, C, H, W] about their centre, bilinear, zero outside."""
    angle = np.deg2rad(degrees)

    def rotate(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        height, width = x.shape[-2:]
        rows, columns = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2,
                                    indexing="ij")  # fmt: skip
        source_r = np.cos(angle) * rows + np.sin(angle) * columns + (height - 1) / 2
        source_c = -np.sin(angle) * rows + np.cos(angle) * columns + (width - 1) / 2
        top, left = np.floor(source_r).astype(int), np.floor(source_c).astype(int)
        result = np.zeros(x.shape)  # in double precision, so that no pixel leaves the range of its neighbours
        for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (1 - np.abs(source_r - top - r)) * (1 - np.abs(source_c - left - c))
            inside = (top + r >= 0) & (top + r < height) & (left + c >= 0) & (left + c < width)
            picked = x[..., np.clip(top + r, 0, height - 1), np.clip(left + c, 0, width - 1)]
            result += picked * np.where(inside, weight, 0)
        return result.astype(np.float32)

    return rotate


def darkening(factor: float) -> Transform:
    """Multiply by `factor` (0 to 1), as a lens that gets dirty or a light that fails."""

    def darken(x: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG001
        return (x * np.float32(factor)).astype(np.float32)

    return darken


def noise(sigma: float, *, low: float = 0.0, high: float = 1.0) -> Transform:
    """Add Gaussian noise of standard deviation `sigma`, clipped to [low, high]."""

    def disturb(x: FloatArray, rng: np.random.Generator) -> FloatArray:
        return np.clip(x + rng.normal(0, sigma, x.shape), low, high).astype(np.float32)

    return disturb


@dataclass(frozen=True)
class Pool:
    """Labelled samples to draw from: x float32 [N, ...], y int64 [N]."""

    x: FloatArray
    y: IndexArray

    def only(self, labels: set[int]) -> Pool:
        """The samples of some labels."""
        kept = np.isin(self.y, sorted(labels))
        return Pool(self.x[kept], self.y[kept])


class DriftingStream:
    """Draws samples from a pool; from `drift_at` on they are transformed, and new labels may appear.

    Args:
        pool: Where samples come from, with replacement.
        rng: Source of chance.
        base_labels: Those drawn before the drift.
        drift_at: Time of the drift, in the unit of `draw`'s `time`.
        transform: What the drift does to inputs.
        new_labels: Labels that appear with the drift.
        new_share: Their share of the samples then.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        rng: np.random.Generator,
        base_labels: set[int],
        drift_at: float,
        transform: Transform = unchanged,
        new_labels: frozenset[int] = frozenset(),
        new_share: float = 0.2,
    ) -> None:
        self._rng = rng
        self._base, self._new = pool.only(base_labels), pool.only(set(new_labels))
        self._new_share = new_share if new_labels else 0.0
        self.drift_at = drift_at
        self.transform = transform
        self.new_labels = new_labels

    @property
    def drifts(self) -> bool:
        """Whether anything changes at `drift_at`."""
        return self.transform is not unchanged or bool(self.new_labels)

    def draw(self, count: int, time: float) -> tuple[FloatArray, IndexArray]:
        """`count` samples as they look at `time`: x float32 [count, ...], y int64 [count]."""
        drifted = time >= self.drift_at
        fresh = self._rng.random(count) < (self._new_share if drifted else 0.0)
        old = self._rng.integers(len(self._base.y), size=count)
        new = self._rng.integers(max(1, len(self._new.y)), size=count)
        x, y = self._base.x[old].copy(), self._base.y[old].copy()
        if fresh.any():
            x[fresh], y[fresh] = self._new.x[new[fresh]], self._new.y[new[fresh]]
        return (self.transform(x, self._rng) if drifted else x), y
