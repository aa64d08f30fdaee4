"""Which labels to ask for: the rows whose labels are worth most, and how many may be asked for in a day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from edge_sdk.config import FeedbackConfig
from edge_sdk.types import DoubleArray, FloatArray, IndexArray, LatentArray, Task

_DAY_S = 86_400.0
_MAX_ASKED = 1_000
_MAX_ROWS = 2_000
_MAX_KNOWN = 1_000
_LANDMARKS = 256
_LEAST_UNCERTAINTY = 0.3
"""What a row counts of which the model is sure: it is sure of what it has never seen, too."""


class LabelRequest(msgspec.Struct, frozen=True):
    """A prediction whose label would be worth most; answer it with `observe`.

    Attributes:
        id: Of the prediction.
        predicted: What was predicted, in stored form.
        uncertainty: 0 (sure) to 1 (no idea); 1 where there are no probabilities.
        expires: Seconds since the epoch, after which it is not asked for any longer.
    """

    id: str
    predicted: str
    uncertainty: float
    expires: float


class Request(msgspec.Struct, frozen=True):
    """A label that was asked for."""

    id: str
    time: float
    waiting: bool = True
    """Neither answered nor expired; what no longer waits is remembered for the budget's sake."""


class Requests(msgspec.Struct, frozen=True):
    """All labels asked for that still wait or count; persisted as it is. Methods return a new one.

    No more than `requests_per_day` are asked for in any 24 hours. When the clock is set back, what was asked for counts
    as if it were just asked, so that the budget is late by 24 hours at most. At most 1000 are remembered, and no more
    can wait.
    """

    asked: list[Request] = []

    def open(self, now: float, config: FeedbackConfig) -> list[Request]:
        """Those that wait for their answer, in the order asked."""
        return [request for request in self.asked if request.waiting and now - request.time < config.request_ttl_s]

    def left(self, now: float, config: FeedbackConfig) -> int:
        """How many more may be asked for now."""
        today = sum(now - request.time <= _DAY_S for request in self.asked)
        return max(0, min(config.requests_per_day - today, _MAX_ASKED - len(self.asked)))

    def ask(self, ids: Sequence[str], now: float, config: FeedbackConfig) -> Requests:
        """With these predictions asked for; those that wait already are left alone.

        Raises:
            ValueError: They are more than `left`.
        """
        waiting = {request.id for request in self.asked if request.waiting}
        new = [Request(name, now) for name in dict.fromkeys(ids) if name not in waiting]
        if len(new) > (left := self.left(now, config)):
            raise ValueError(f"{len(new)} labels are more than the {left} that may still be asked for; ask for fewer")
        return Requests([*_not_after(self.asked, now), *new])

    def answered(self, ids: Iterable[str]) -> Requests:
        """With these answered; others are of no interest."""
        done = {*ids}
        return Requests(
            [msgspec.structs.replace(each, waiting=each.waiting and each.id not in done) for each in self.asked]
        )

    def expire(self, now: float, config: FeedbackConfig) -> tuple[Requests, list[str]]:
        """Without those that no longer wait or count, and the ids of those whose time is up.

        To be called at every step: it is what makes room, and what notices a clock that was set back.
        """
        asked = _not_after(self.asked, now)
        late = {each.id for each in asked if each.waiting and now - each.time >= config.request_ttl_s}
        closed = [msgspec.structs.replace(each, waiting=each.waiting and each.id not in late) for each in asked]
        kept = [each for each in closed if each.waiting or now - each.time <= _DAY_S]
        return Requests(kept), [each.id for each in asked if each.waiting and each.id in late]


def uncertainty(probabilities: FloatArray, task: Task) -> FloatArray:
    """How little the model knows of each row, float32 [N] in [0, 1].

    Classification: entropy by that of a uniform guess. Multi-label: the largest entropy of a label's presence, in bits.
    Otherwise 1: there are no probabilities to go by.

    Args:
        probabilities: float32 [N, C]; read for classification and multi-label only.
        task: Of the model.
    """
    p = np.clip(probabilities.astype(np.float64), 1e-12, 1.0)
    match task:
        case "classification":
            values = -(p * np.log(p)).sum(axis=1) / np.log(max(2, p.shape[1]))
        case "multilabel":
            q = np.clip(1 - p, 1e-12, 1.0)
            values = -(p * np.log2(p) + q * np.log2(q)).min(axis=1, initial=0.0)
        case _:
            values = np.ones(len(p))
    result: FloatArray = np.clip(values, 0, 1).astype(np.float32)
    return result


def choose_requests(
    latents: LatentArray,
    probabilities: FloatArray,
    ids: Sequence[str],
    times: DoubleArray,
    known_latents: LatentArray,
    *,
    task: Task,
    count: int,
) -> list[int]:
    """Positions of the rows whose labels are worth most, best first; at most `count`, never one twice.

    One after the other the row is taken with the largest

        (0.3 + 0.7 uncertainty) * distance * sqrt(density)

    where the distance is that to the nearest row which is labelled or already taken (k-center greedy: what is like
    something known teaches little), and the density is the mean over rows of exp(-d² / median d²) (what is like nothing
    else stands for itself alone, and may be an error). A row equal to a labelled one is never taken.

    The cost is bounded: only the 2000 newest rows are candidates (of the same time, those with the larger id), of known
    rows 1000 are read and of candidates 256 measure the density, both at even distances.

    Args:
        latents: uint8 [N, D] of predictions that wait for their label.
        probabilities: float32 [N, C] as they were predicted; not read for regression.
        ids: Of the N predictions, so that the choice does not depend on their order.
        times: float64 [N], seconds.
        known_latents: uint8 [M, D] of labelled rows; M may be 0.
        task: Of the model.
        count: Most rows.

    Source:
        Distance: Sener & Savarese 2018, "Active learning for convolutional neural networks: A core-set approach",
        arXiv:1708.00489. Uncertainty times density: Settles & Craven 2008, "An analysis of active learning strategies
        for sequence labeling tasks", doi:10.3115/1613715.1613855.
    """
    rows = sorted(range(len(ids)), key=lambda i: (times[i], ids[i]), reverse=True)[:_MAX_ROWS]
    if not rows or count <= 0:
        return []
    x = latents[rows].astype(np.float32)
    apart = _squared_distances(x, x[_evenly(len(x), _LANDMARKS)])
    density = np.exp(-apart / max(float(np.median(apart[::4])), 1.0)).mean(axis=1)
    worth = _LEAST_UNCERTAINTY + (1 - _LEAST_UNCERTAINTY) * uncertainty(probabilities[rows], task)
    factor = worth**2 * density
    if len(known_latents):
        known = known_latents[_evenly(len(known_latents), _MAX_KNOWN)].astype(np.float32)
        nearest = _squared_distances(x, known).min(axis=1)
    else:
        nearest = np.full(len(x), max(float(apart.max()), 1.0), dtype=np.float32)
    chosen: list[int] = []
    while len(chosen) < min(count, len(x)):
        best = int((factor * nearest).argmax())
        if nearest[best] <= 0:
            break
        chosen.append(best)
        nearest = np.minimum(nearest, _squared_distances(x, x[best : best + 1])[:, 0])
    return [rows[i] for i in chosen]


def _not_after(asked: Iterable[Request], now: float) -> list[Request]:
    """None from the future: the clock was set back since."""
    return [each if each.time <= now else msgspec.structs.replace(each, time=now) for each in asked]


def _evenly(size: int, count: int) -> IndexArray:
    """Positions of `count` of `size` rows, or of all."""
    return np.arange(min(size, count)) * size // min(size, count)


def _squared_distances(a: FloatArray, b: FloatArray) -> FloatArray:
    """float32 [N, M]; what rounding cannot tell from 0 is 0."""
    squares = np.einsum("nd,nd->n", a, a)[:, None]  # without the squares of all elements in memory
    result: FloatArray = a @ (-2 * b.T)
    result += (b**2).sum(axis=1)
    result += squares
    result[result <= 1e-6 * squares] = 0
    return result
