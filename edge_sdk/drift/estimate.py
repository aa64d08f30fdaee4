"""How often a model is right, estimated from its confidence alone."""

from __future__ import annotations

import numpy as np

from edge_sdk.types import AnyArray, FloatArray

MAX_STEPS = 64


def fit_confidence(confidence: AnyArray, right: AnyArray) -> FloatArray:
    """Table of P(right | confidence), which never falls as confidence grows.

    Args:
        confidence: float [N] in [0, 1], N >= 1.
        right: bool [N].

    Returns:
        float32 [2, T], T <= 64: the least confidence of each step, and the share that was right from there on.

    Source:
        Zadrozny & Elkan 2002, "Transforming classifier scores into accurate multiclass probability estimates",
        doi:10.1145/775047.775151; pool adjacent violators as in Ayer et al. 1955, doi:10.1214/aoms/1177728423.
    """
    order = np.argsort(confidence, kind="stable")
    sorted_, hits = np.asarray(confidence, np.float32)[order], np.asarray(right, np.float64)[order]
    # like confidences stay together; quantiles bound the table
    edges = np.unique(sorted_[np.linspace(0, len(sorted_) - 1, MAX_STEPS).astype(np.int64)])
    starts = np.searchsorted(sorted_, edges)
    blocks: list[tuple[float, float, int]] = []  # least confidence, sum, count
    for first, total, count in zip(edges, np.add.reduceat(hits, starts), np.diff([*starts, len(sorted_)]), strict=True):
        block = (float(first), float(total), int(count))
        while blocks and blocks[-1][1] * block[2] >= block[1] * blocks[-1][2]:  # not below this one's share: pool
            before = blocks.pop()
            block = (before[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    return np.array([[first for first, _, _ in blocks], [total / count for _, total, count in blocks]], np.float32)


def estimate(table: FloatArray, confidences: AnyArray) -> float:
    """The share of answers that are right, from their confidences; NaN for none.

    Holds while inputs and classes are as they were: it says nothing once an input or output alarm is up, and must
    never decide about a model.

    Args:
        table: From `fit_confidence`.
        confidences: float [N] in [0, 1]; NaN is left out.
    """
    known = np.asarray(confidences, np.float32)
    known = known[~np.isnan(known)]
    if not len(known):
        return float("nan")
    steps = np.maximum(np.searchsorted(table[0], known, side="right") - 1, 0)
    return float(table[1][steps].mean(dtype=np.float64))
