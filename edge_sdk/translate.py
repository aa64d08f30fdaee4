"""A map from the latents of one trunk to those of another, fitted to inputs that passed both. No labels are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdk.errors import EmptyBufferError
from edge_sdk.head import dequantize
from edge_sdk.manifest import LatentSpec
from edge_sdk.types import DoubleArray, FloatArray, LatentArray

_STRENGTHS = 10.0 ** np.arange(-4, 3)
"""Of the ridge, relative to the mean square of the old latents' directions."""


def quantize(values: FloatArray, spec: LatentSpec) -> LatentArray:
    """Model units float32 [N, D] to uint8 [N, D], as ONNX QuantizeLinear does: the inverse of `head.dequantize`."""
    result: LatentArray = np.clip(np.rint(values / np.float32(spec.scale)) + spec.zero_point, 0, 255).astype(np.uint8)
    return result


@dataclass(frozen=True)
class LatentMap:
    """An affine map from old to new latents.

    Attributes:
        weights: float64 [D old, D new].
        bias: float64 [D new].
        old: How the old latents are stored.
        new: How the new ones are.
        error: Share of the new latents' variance that it leaves unexplained on rows that it was not fitted to; 0 is
            perfect, and 1 no better than their mean.
    """

    weights: DoubleArray
    bias: DoubleArray
    old: LatentSpec
    new: LatentSpec
    error: float

    def __call__(self, latents: LatentArray) -> LatentArray:
        """Old latents uint8 [N, D old] as new ones uint8 [N, D new]."""
        values = dequantize(latents, self.old).astype(np.float64) @ self.weights + self.bias
        return quantize(values.astype(np.float32), self.new)


def fit_map(old: LatentArray, new: LatentArray, *, old_spec: LatentSpec, new_spec: LatentSpec) -> LatentMap:
    """The ridge map whose strength has the least error when each row is predicted from all others.

    Args:
        old: uint8 [N, D old], what the old trunk made of N inputs.
        new: uint8 [N, D new], what the new trunk made of the same inputs.
        old_spec: How the old latents are stored.
        new_spec: How the new ones are.

    Raises:
        EmptyBufferError: No rows.

    Source:
        Hoerl & Kennard 1970, doi:10.1080/00401706.1970.10488634; the error of leaving one out in closed form: Allen
        1974, "The relationship between variable selection and data augmentation" (PRESS).

    Example:
        >>> rows = np.arange(40, dtype=np.uint8).reshape(20, 2)
        >>> spec = LatentSpec(dim=2, scale=0.1, zero_point=0)
        >>> bool((fit_map(rows, rows, old_spec=spec, new_spec=spec)(rows) == rows).all())
        True
    """
    if not len(old):
        raise EmptyBufferError("a map between trunks needs at least one input that passed both")
    x, y = (dequantize(part, spec).astype(np.float64) for part, spec in ((old, old_spec), (new, new_spec)))
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    left, singular, right = np.linalg.svd(x - x_mean, full_matrices=False)
    square, known = singular**2, left.T @ (y - y_mean)
    scale, variance = float(square.mean()) or 1.0, float(((y - y_mean) ** 2).sum())
    best: tuple[float, DoubleArray] | None = None
    for strength in _STRENGTHS * scale:
        shrink = square / (square + strength)
        # one over the rows is the share of the mean, which is fitted, too
        leverage = np.minimum((left**2) @ shrink + 1 / len(x), 1 - 1e-9)
        missed = (y - y_mean - (left * shrink) @ known) / (1 - leverage)[:, None]
        error = float((missed**2).sum())
        if best is None or error < best[0]:
            best = error, singular / (square + strength)
    assert best is not None
    weights = (right.T * best[1]) @ known
    return LatentMap(weights, y_mean - x_mean @ weights, old_spec, new_spec, best[0] / variance if variance else 0.0)
