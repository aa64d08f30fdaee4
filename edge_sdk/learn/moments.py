"""Sums over labelled rows from which a discriminant or a regression follows in closed form: no row is kept.

They add up: what the factory saw and what the device saw are two of them, and a row is taken out by subtraction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edge_sdk.errors import IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.learn.ridge import one_hot
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, Task

_MOST = 100.0
_AT_ONCE = 256
RESIDUE = 1e-6
"""Share of the mass up to which a label's own is what rounding left of it after a subtraction."""


@dataclass(frozen=True)
class Moments:
    """Weighted sums over rows with features x [F] and targets y [C] (one-hot, 0 or 1, or standardised values).

    Attributes:
        labels: Of the targets, in order.
        rows: How many rows they came from, whatever each counted.
        mass: Sum of the weights.
        x: float64 [F], weighted sum of x.
        xx: float64 [F, F], of the outer products of x.
        y: float64 [C], of y.
        xy: float64 [F, C], of the outer products of x and y.
    """

    labels: tuple[str, ...]
    rows: float
    mass: float
    x: DoubleArray
    xx: DoubleArray
    y: DoubleArray
    xy: DoubleArray

    @classmethod
    def none(cls, labels: Sequence[str], width: int) -> Moments:
        """Of no rows."""
        count = len(labels)
        return cls(tuple(labels), 0.0, 0.0, np.zeros(width), np.zeros((width, width)), np.zeros(count),
                   np.zeros((width, count)))  # fmt: skip

    @classmethod
    def of(cls, features: AnyArray, targets: AnyArray, weights: AnyArray, labels: Sequence[str]) -> Moments:
        """Of the given rows.

        Args:
            features: float [N, F].
            targets: int64 [N], numbers of labels; or float [N, C].
            weights: float [N], >= 0.
            labels: C of them.
        """
        w = np.asarray(weights, dtype=np.float64)
        y = np.asarray(one_hot(targets, len(labels)) if np.ndim(targets) == 1 else targets, dtype=np.float64)
        found = cls.none(labels, features.shape[1])
        for rows in _parts(len(w)):  # of wide features, what is in between would take as much memory as the result
            x = np.asarray(features[rows], dtype=np.float64)
            weighted = x * w[rows, None]
            for columns in _parts(x.shape[1]):
                found.x[columns] += weighted[:, columns].sum(axis=0)
                found.xx[columns] += weighted[:, columns].T @ x
                found.xy[columns] += weighted[:, columns].T @ y[rows]
        return replace(found, rows=float(np.count_nonzero(w)), mass=float(w.sum()), y=w @ y)

    @property
    def known(self) -> AnyArray:
        """Which labels have rows; bool [C]. Not for a regression."""
        result: AnyArray = self.y > RESIDUE * abs(self.mass)
        return result

    def __add__(self, other: Moments) -> Moments:
        return self._combined(other, 1.0)

    def __sub__(self, other: Moments) -> Moments:
        return self._combined(other, -1.0)

    def _combined(self, other: Moments, sign: float) -> Moments:
        self._check_labels(other)
        return Moments(self.labels, self.rows + sign * other.rows, self.mass + sign * other.mass,
                       self.x + sign * other.x, self.xx + sign * other.xx, self.y + sign * other.y,
                       self.xy + sign * other.xy)  # fmt: skip

    def _check_labels(self, other: Moments) -> None:
        if self.labels != other.labels:
            raise ValueError(f"moments of {self.labels} and of {other.labels}: bring them in line with `aligned`")

    def absorb(self, other: Moments, *, sign: Literal[-1, 1] = 1) -> Moments:
        """The sum, or the difference, in this one's arrays: of wide features each is megabytes. Use only the result."""
        self._check_labels(other)
        for name in ("x", "xx", "y", "xy"):
            own = getattr(self, name)
            (np.add if sign > 0 else np.subtract)(own, getattr(other, name), out=own)
        return replace(self, rows=self.rows + sign * other.rows, mass=self.mass + sign * other.mass)

    def faded(self, factor: float) -> Moments:
        """As if every row counted `factor` times as much."""
        return Moments(self.labels, self.rows, factor * self.mass, factor * self.x, factor * self.xx, factor * self.y,
                       factor * self.xy)  # fmt: skip

    def aligned(self, labels: Sequence[str]) -> Moments:
        """The same for another list of labels: those it does not have are new and have no rows.

        Raises:
            ValueError: A label that has rows would be lost.
        """
        if lost := [
            label for label, known in zip(self.labels, self.known, strict=True) if known and label not in labels
        ]:
            raise ValueError(f"the moments know {lost[0]!r}, which is not among the labels")
        place = {label: i for i, label in enumerate(self.labels)}
        y, xy = np.zeros(len(labels)), np.zeros((len(self.x), len(labels)))
        for i, label in enumerate(labels):
            if label in place:
                y[i], xy[:, i] = self.y[place[label]], self.xy[:, place[label]]
        return Moments(tuple(labels), self.rows, self.mass, self.x, self.xx, y, xy)

    # ---- on disk: half of the symmetric matrix, in single precision

    def arrays(self) -> dict[str, AnyArray]:
        """What is stored, without the labels; 4 bytes for each of F (F + 1) / 2 + F (C + 1) + C numbers and a few."""
        width = len(self.x)
        upper = np.empty(width * (width + 1) // 2, np.float32)
        for i, place in _upper_rows(width):  # numpy's indices of a triangle are larger than the matrix
            upper[place] = self.xx[i, i:]
        sums = {key: value.astype(np.float32) for key, value in (("x", self.x), ("y", self.y), ("xy", self.xy))}
        return {"size": np.array([self.rows, self.mass]), "xx": upper, **sums}

    @classmethod
    def of_arrays(cls, arrays: dict[str, AnyArray], labels: Sequence[str]) -> Moments:
        """Of what `arrays` gave.

        Raises:
            IntegrityError: Something is missing, not finite, or does not fit.
        """
        try:
            x, y, xy = (np.array(arrays[key], dtype=np.float64) for key in ("x", "y", "xy"))
            upper = np.asarray(arrays["xx"])
            rows, mass = (float(value) for value in arrays["size"])
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"the moments are damaged: {error}") from error
        if x.ndim != 1 or upper.shape != (x.size * (x.size + 1) // 2,):
            raise IntegrityError("the moments are damaged: their parts do not fit each other")
        if y.shape != (len(labels),) or xy.shape != (len(x), len(labels)):
            raise IntegrityError(f"the moments are not those of {len(labels)} labels")
        if not all(np.isfinite(part).all() for part in (x, upper, y, xy, [rows, mass])):
            raise IntegrityError("the moments hold NaN or infinity")
        xx = np.empty((len(x), len(x)))
        for i, place in _upper_rows(len(x)):
            xx[i, i:] = xx[i:, i] = upper[place]
        return cls(tuple(labels), rows, mass, x, xx, y, xy)

    def to_bytes(self) -> bytes:
        """As .npz."""
        return npz_bytes({**self.arrays(), "labels": np.array(self.labels, dtype=np.str_)})

    @classmethod
    def load(cls, source: bytes | Path) -> Moments:
        """Read what `to_bytes` wrote.

        Raises:
            IntegrityError: It is damaged.
        """
        arrays = load_npz(source)
        if "labels" not in arrays or arrays["labels"].ndim != 1:
            raise IntegrityError("the moments have no list of labels")
        return cls.of_arrays(arrays, [str(label) for label in arrays["labels"]])


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))


def _upper_rows(width: int) -> Iterator[tuple[int, slice]]:
    """The rows of the upper half of a symmetric matrix, and where each lies in a list of that half."""
    end = 0
    for i in range(width):
        start, end = end, end + width - i
        yield i, slice(start, end)


def fresh_mass(factory: Moments, targets: AnyArray, weights: AnyArray, task: Task) -> FloatArray:
    """How much each fresh row adds to the moments, so that one experience counts for as much as the factory's data.

    Of a classification each label's fresh rows count together for as much as one of the factory's labels does on
    average; otherwise all of them for as much as all of the factory's. A row counts at most 100 times, so that a
    handful does not move what rests on thousands; rows that say which label does *not* apply count nothing.

    Args:
        factory: Moments that came with the checkpoint.
        targets: As in `edge_sdk.learn.base.Rows`.
        weights: float32 [N], as there.
        task: What the targets are.

    Returns:
        float32 [N].
    """
    weights = np.maximum(np.asarray(weights, dtype=np.float64), 0.0)
    if task == "classification":
        goal = factory.y[factory.known].mean() if factory.known.any() else float(len(weights))
        share = np.bincount(targets, weights=weights, minlength=len(factory.labels))[targets]
    else:
        goal, share = factory.mass or float(len(weights)), np.full(len(weights), weights.sum())
    times = np.minimum(_MOST, goal / np.maximum(share, 1e-9))
    mass: FloatArray = (weights * times).astype(np.float32)
    return mass
