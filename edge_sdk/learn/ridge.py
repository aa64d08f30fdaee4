"""Ridge regression in closed form: the cheap model that stands in for a learner where many are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdk.types import AnyArray, DoubleArray, FloatArray, IndexArray

_STRENGTH = 0.2
"""Of the penalty, relative to the weight of all rows: directions with less variance than this shrink most."""


def standardise(features: FloatArray) -> FloatArray:
    """Features with mean 0 and standard deviation 1 each, float32 [N, D]; those that never change become 0."""
    deviation = features.std(axis=0)
    scale = np.where(deviation > 1e-6, deviation, np.inf)
    result: FloatArray = ((features - features.mean(axis=0)) / scale).astype(np.float32)
    return result


def one_hot(labels: IndexArray, count: int) -> FloatArray:
    """float32 [N, C]: 1 at the label of each row."""
    result: FloatArray = np.eye(count, dtype=np.float32)[labels]
    return result


@dataclass(frozen=True)
class Sums:
    """Weighted sums over rows, all that a ridge needs of them. Those of different rows add up.

    Attributes:
        gram: float64 [D + 1, D + 1], sum of w x xᵀ, where x ends in a 1 for the intercept.
        cross: float64 [D + 1, T], sum of w x yᵀ.
    """

    gram: DoubleArray
    cross: DoubleArray

    @classmethod
    def of(cls, features: FloatArray, targets: AnyArray, weights: FloatArray) -> Sums:
        """Of standardised features float32 [N, D], targets float32 [N, T] and weights float32 [N], >= 0."""
        x = np.concatenate([features, np.ones((len(features), 1), dtype=np.float32)], axis=1)
        weighted = x * weights[:, None]
        return cls((x.T @ weighted).astype(np.float64), (weighted.T @ targets).astype(np.float64))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.cross + other.cross)

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.gram - other.gram, self.cross - other.cross)

    def solve(self) -> DoubleArray:
        """Coefficients float64 [D + 1, T]; the last row is the intercept, which is not penalised.

        Source:
            Hoerl & Kennard 1970, "Ridge regression", doi:10.1080/00401706.1970.10488634.
        """
        penalty = np.full(len(self.gram), _STRENGTH * self.gram[-1, -1] + 1e-6)
        penalty[-1] = 1e-6
        result: DoubleArray = np.linalg.solve(self.gram + np.diag(penalty), self.cross)
        return result


def predict(coefficients: DoubleArray, features: FloatArray) -> FloatArray:
    """float32 [N, T] for standardised features float32 [N, D]."""
    result: FloatArray = (features @ coefficients[:-1] + coefficients[-1]).astype(np.float32)
    return result
