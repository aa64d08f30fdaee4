"""Which of the fresh rows are learned from: a window of the newest, and a representative part of too many."""

from __future__ import annotations

import numpy as np

from edge_sdk.learn.ridge import Sums, one_hot, predict, standardise
from edge_sdk.types import AnyArray, DoubleArray, FloatArray, IndexArray, LatentArray, Task

_FOLDS = 4
_STEP = 2**0.5
_RUN_ROWS = 512


def fixed_window(times: DoubleArray, rows: int) -> IndexArray:
    """The newest `rows` rows, oldest of them first; int64. Of rows with the same time the later ones are newer."""
    order: IndexArray = np.argsort(times, kind="stable")
    return order[max(0, len(order) - rows) :]


def dynamic_window(
    features: FloatArray,
    targets: AnyArray,
    weights: FloatArray,
    times: DoubleArray,
    *,
    task: Task,
    min_rows: int,
    max_rows: int,
) -> IndexArray:
    """As many of the newest rows as predict the very newest best, oldest first; int64.

    Windows of `min_rows`, and of sqrt(2) times as many up to `max_rows` or all rows, are compared: a ridge model is
    fitted to each, and scored by its squared error on the newest `min_rows` rows, which are cross-fitted, so that each
    window is tried with rows of the present in it and none is scored on what it was fitted to.

    The longest window wins whose loss is within one standard error (of the difference, row by row) of the best one's.
    Longer windows differ from shorter ones by old rows alone: those that do measurable harm go, and those that do none
    are kept, because they lower the variance of whatever is learned.

    Args:
        features: float32 [N, D].
        targets: int64 [N] (classification), 0/1 [N, C] (multi-label), or float [N, T] (regression).
        weights: float32 [N]; rows with a weight of 0 or less have no say, but count as rows.
        times: float64 [N], seconds.
        task: Of the model.
        min_rows: Of the shortest window, >= 1.
        max_rows: Of the longest, >= 1.

    Source:
        Windows chosen by held-out error: Klinkenberg & Joachims 2000, "Detecting concept drift with support vector
        machines" (ICML). One standard error: Breiman et al. 1984, "Classification and regression trees", section 3.4.3.
    """
    window = fixed_window(times, max_rows)
    sizes = _sizes(min_rows, len(window))
    if len(sizes) < 2:
        return window
    x, weight = standardise(features[window]), np.maximum(weights[window], 0)
    y = targets[window]
    y = one_hot(y, int(y.max()) + 1) if task == "classification" else standardise(y.astype(np.float32))
    newest = np.arange(len(window))[-min_rows:]
    folds = [newest[fold::_FOLDS] for fold in range(_FOLDS)]
    held_out = [Sums.of(x[rows], y[rows], weight[rows]) for rows in folds]
    total, begin, losses = sum(held_out[1:], start=held_out[0]), len(window) - min_rows, []
    for size in sizes:
        older = slice(len(window) - size, begin)
        total, begin = total + Sums.of(x[older], y[older], weight[older]), len(window) - size
        loss = np.zeros(len(window))
        for rows, own in zip(folds, held_out, strict=True):
            loss[rows] = ((predict((total - own).solve(), x[rows]) - y[rows]) ** 2).sum(axis=1)
        losses.append(loss[newest][weight[newest] > 0])
    if len(losses[0]) < 2:
        return window
    best = min(losses, key=lambda loss: float(loss.mean()))
    excess = [loss - best for loss in losses]
    errors = [rows.std(ddof=1) / len(rows) ** 0.5 for rows in excess]
    size = max(size for size, rows, error in zip(sizes, excess, errors, strict=True) if rows.mean() <= error)
    return window[len(window) - size :]


def representative(latents: LatentArray, labels: IndexArray, count: int) -> tuple[IndexArray, FloatArray]:
    """`count` of N rows that stand for all of them, and how many rows each stands for.

    The places are shared evenly among the labels, except that no label has more than it has rows. Within a label rows
    are herded: each next one brings the mean of those taken nearest to the mean of all, in runs of at most 512 rows
    in the order given, so that each run of time is represented and the cost grows with N alone.

    Measured with skewed labels on handwriting and on Gaussian clusters, each label's rows weighted as returned: herding
    gave 0 to 2 points more accuracy than rows at random, k-center 0 to 2 fewer. Even places gave as much accuracy as
    proportional ones (-0.3 to +2 points), and 2 points more where every label counts the same.

    Args:
        latents: uint8 [N, D], oldest first.
        labels: int64 [N]; what else should be kept in proportion, such as sets of labels, can be numbered likewise.
        count: At least the number of different labels.

    Returns:
        Positions, int64 ascending, at most `count`; and float32, >= 1, their weights: of each label's rows they sum to
        as many as there were.

    Raises:
        ValueError: There are more labels than `count`.

    Source:
        Welling 2009, "Herding dynamical weights to learn", doi:10.1145/1553374.1553517; as in Rebuffi et al. 2017,
        "iCaRL", arXiv:1611.07725.
    """
    if len(labels) <= count:
        return np.arange(len(labels)), np.ones(len(labels), dtype=np.float32)
    names, sizes = np.unique(labels, return_counts=True)
    if len(names) > count:
        raise ValueError(f"{count} rows cannot stand for {len(names)} labels; ask for one row of each or more")
    weights = np.zeros(len(labels), dtype=np.float32)
    for name, size, places in zip(names, sizes, _shared(sizes, count), strict=True):
        runs = np.array_split(np.flatnonzero(labels == name), -(-size // _RUN_ROWS))
        for run, part in zip(runs, _shared(np.array([len(run) for run in runs]), places), strict=True):
            weights[run[_herded(latents[run].astype(np.float32), part)]] = size / places
    rows = np.flatnonzero(weights)
    return rows, weights[rows]


def _herded(x: FloatArray, count: int) -> list[int]:
    """Positions of `count` rows of float32 [N, D] whose mean stays near that of all."""
    centred = x - x.mean(axis=0)
    norms = (centred**2).sum(axis=1)
    total, taken = np.zeros(x.shape[1], dtype=np.float32), list[int]()
    for _ in range(count):
        nearest = int((norms + 2 * (centred @ total)).argmin())
        taken.append(nearest)
        norms[nearest] = np.inf
        total += centred[nearest]
    return taken


def _shared(sizes: IndexArray, count: int) -> list[int]:
    """`count` places shared evenly among groups, none of which takes more than its size."""
    places = [0] * len(sizes)
    for rank, group in enumerate(np.argsort(sizes, kind="stable")):
        places[group] = min(int(sizes[group]), (count - sum(places)) // (len(sizes) - rank))
    return places


def _sizes(least: int, most: int) -> list[int]:
    """Lengths of the windows that are tried, ascending."""
    sizes, size = [], float(least)
    while size < most:
        sizes.append(round(size))
        size *= _STEP
    return [*sizes, most]
