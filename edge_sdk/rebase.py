"""Carrying a personal head over to a new base. Pure decisions.

With the same trunk a latent means the same before and after, so the personal head, the replay buffer and the judge
rows stay valid, and both heads can be asked about the same rows. With another trunk a new personal head is trained on
rows that were translated or encoded anew (`edge_sdk.shadow`), and chosen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from edge_sdk.config import DeviceConfig
from edge_sdk.head import Head
from edge_sdk.learn.ewc import Importance, consolidate
from edge_sdk.stats import paired_evidence
from edge_sdk.types import BoolArray, FloatArray


@dataclass(frozen=True)
class Rebase:
    """Which head to run on the new base, and why.

    Attributes:
        head: The personal head to install, or None for the one the base came with.
        reason: With the numbers it rests on.
    """

    head: Head | None
    reason: str
    importance: Importance | None = None
    """What EWC is to hold on to with the personal head; None: what the new base came with."""


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


def with_importance_of(known: Importance, personal: Head, shipped: Importance, carried: Head) -> Importance:
    """What EWC holds on to on a new base with the same trunk: what it held on to before, and what the base came with.

    Args:
        known: So far, of the personal head's outputs.
        personal: The head in use; linear.
        shipped: Of the new base.
        carried: `with_labels_of` of the personal head: its outputs are the result's.
    """
    last = carried.depth - 1

    def ordered(weights: dict[str, FloatArray]) -> dict[str, FloatArray]:
        result = dict(weights)
        for key in (f"W{last}", f"b{last}"):
            result[key] = np.zeros_like(carried.weights[key])
            for place, label in enumerate(personal.labels[: weights[key].shape[-1]]):
                result[key][..., carried.labels.index(label)] = weights[key][..., place]
        return result

    before = Importance(ordered(known.anchor), ordered(known.fisher))
    # two quadratic penalties are one, around the mean of their anchors weighed by importance
    grown = consolidate(shipped, carried.weights, before.fisher, mode="checkpoint", decay=1.0)
    return consolidate(grown, before.anchor, before.fisher, mode="offline", decay=1.0)


class Right(NamedTuple):
    """Whether versions are right on rows that none of them was trained on.

    `old`: bool [K], of the version in use, and `exact`: bool [N], which K of the N rows it saw as the new trunk did.
    `shipped`, `personal`: bool [N], of the new base's own head and of the one trained here. `factory_shipped`,
    `factory_personal`: bool [M], on the new base's factory rows.
    """

    old: BoolArray
    exact: BoolArray
    shipped: BoolArray
    personal: BoolArray
    factory_shipped: BoolArray
    factory_personal: BoolArray


class Settled(NamedTuple):
    """What a device does with a new base that has another trunk, and why."""

    outcome: Literal["personal", "shipped", "stay"]
    reason: str


def choose_version(right: Right, config: DeviceConfig) -> Settled:
    """New base with the head trained here, new base as shipped, or the old release if both are clearly worse.

    The head trained here serves if it is right at least as often on the device's rows and forgets no more of the
    factory's than `gate.factory_margin`, or than it gains on the device's: there is no way back to what was. The old
    release stays if there is evidence, at `gate.alpha`, that either way costs more than `update.max_accuracy_drop`;
    only rows whose input passed both trunks count for that.
    """
    numbers, forgotten = "there are no judge rows to compare on", 0.0
    personal = bool(len(right.shipped))
    if personal:
        numbers = (
            f"head trained here {right.personal.mean():.3f}, shipped head {right.shipped.mean():.3f} on"
            f" {len(right.shipped)} rows"
        )
        personal = bool(right.personal.mean() >= right.shipped.mean())
    if personal and len(right.factory_shipped):
        forgotten = float(right.factory_shipped.mean() - right.factory_personal.mean())
        if forgotten > max(config.gate.factory_margin, float(right.personal.mean() - right.shipped.mean())):
            personal, numbers = False, f"it forgets {forgotten:.3f} of accuracy on factory data; {numbers}"
    limit, level = config.update.max_accuracy_drop, 1 / config.gate.alpha
    old = right.old.astype(np.float64)
    if len(old) and limit < 1:
        ways = [one[right.exact] for one in (right.shipped, right.personal)]
        if all(paired_evidence(old - way, margin=limit) >= level for way in ways):
            best = max(float(way.mean()) for way in ways)
            reason = f"both heads do worse than the release in use: at best {best:.3f}, before {old.mean():.3f}"
            return Settled("stay", f"{reason} on {len(old)} rows")
    return Settled("personal", f"kept: {numbers}") if personal else Settled("shipped", f"dropped: {numbers}")
