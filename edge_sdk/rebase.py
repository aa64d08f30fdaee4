"""Carrying a personal head over to a new base. Pure decisions; here for bases that share their trunk.

With the same trunk a latent means the same before and after, so the personal head, the replay buffer and the judge
rows stay valid, and both heads can be asked about the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_sdk.head import Head
from edge_sdk.types import BoolArray


@dataclass(frozen=True)
class Rebase:
    """Which head to run on the new base, and why.

    Attributes:
        head: The personal head to install, or None for the one the base came with.
        reason: With the numbers it rests on.
    """

    head: Head | None
    reason: str


def choose_head(shipped: Head, personal: Head, right: Callable[[Head], BoolArray]) -> Rebase:
    """Keep what was learned, or take what was shipped, by accuracy on the device's and the factory's judge rows.

    Args:
        shipped: The new base's own head.
        personal: The head in use, on the same trunk.
        right: Whether a head is right on each of the rows that neither head was trained on.

    Returns:
        The personal head, grown by what it does not know of the new base's labels, unless the shipped one is better.
    """
    carried = with_labels_of(personal, shipped)
    own, new = right(carried), right(shipped)
    if not len(own):
        return Rebase(carried, "kept: there are no judge rows to compare on")
    numbers = f"personal head {own.mean():.3f}, shipped head {new.mean():.3f} on {len(own)} rows"
    if new.mean() > own.mean():
        return Rebase(None, f"dropped: {numbers}")
    return Rebase(carried, f"kept: {numbers}")


def with_labels_of(personal: Head, shipped: Head) -> Head:
    """The personal head, ordered as the shipped one and with its labels first.

    Labels that the personal head lacks are taken from the shipped head if both are linear and of the same latent, and
    start unlikely otherwise. Labels that only the personal head knows stay at the end.
    """
    own = [label for label in personal.labels if label not in shipped.labels]
    order = [*shipped.labels, *own]
    missing = [label for label in order if label not in personal.labels]
    grown = personal.grown([*personal.labels, *missing])
    last = grown.depth - 1
    w, b = grown.weights[f"W{last}"].copy(), grown.weights[f"b{last}"].copy()
    if grown.depth == 1 == shipped.depth:
        for label in missing:
            source, target = shipped.labels.index(label), grown.labels.index(label)
            w[:, target], b[target] = shipped.weights["W0"][:, source], shipped.weights["b0"][source]
    columns = [grown.labels.index(label) for label in order]
    weights = {**grown.weights, f"W{last}": np.ascontiguousarray(w[:, columns]), f"b{last}": b[columns]}
    return Head(weights, tuple(order))
