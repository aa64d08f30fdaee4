"""What a group is told to run: pure, from where its rollouts are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import msgspec

from edge_sdk.messages import THRESHOLD_ALL, Desired, Offer, Part, cohort, from_places, to_places
from edge_server.records import RolloutRecord
from edge_server.rollout import MAX_TOLD


class Kept(NamedTuple):
    """A release that went to some devices of the group only: it stays theirs, also of those that come later."""

    release: int
    salt: str
    missing: tuple[str, ...]
    """Devices that it is for and that have neither it nor a newer one."""


def compose(
    *,
    revision: int,
    base: int | None,
    revoked: Collection[int],
    running: Iterable[RolloutRecord],
    kept: Iterable[Kept],
    offers: Mapping[int, Offer],
    before: Desired | None,
) -> Desired:
    """The message to a group.

    Args:
        revision: Of the message before; `changed` raises it if something else has changed.
        base: Release for all; None before the first.
        revoked: Releases that nobody may run.
        running: The group's rollouts under way.
        kept: See there.
        offers: Of every release that may be named.
        before: The message before: a list in it that says enough is not shortened, for every new one goes to all.
    """
    candidate, salt, parts = None, "", []
    for rollout in running:
        plan, state = rollout.plan, rollout.state
        if state.everyone:
            candidate, salt = offers[plan.release], plan.salt
            continue
        parts.append(
            Part(
                offer=offers[plan.release],
                salt=plan.salt,
                devices=_devices(state.offered, plan.salt),
                shadow_s=plan.shadow_s if state.shadowing else 0.0,
            )
        )
    under_way = {part.salt for part in parts}
    known = {part.salt: part for part in before.parts if part.salt not in under_way} if before is not None else {}
    for entry in kept:
        if entry.release in revoked or (base is not None and entry.release <= base):
            continue
        # a part comes before the candidate: while that is for everyone, nobody is told the older one
        devices = b"" if candidate is not None else _devices(entry.missing[:MAX_TOLD], entry.salt)
        old = known.get(entry.salt)
        named = set(from_places(old.devices)) if old is not None and not old.shadow_s else set()
        if candidate is None and old is not None and named.issuperset(from_places(devices)):
            devices = old.devices
        parts.append(Part(offer=offers[entry.release], salt=entry.salt, devices=devices, shadow_s=0.0))
    return Desired(
        revision=revision,
        base=None if base is None else offers[base],
        candidate=candidate,
        salt=salt,
        threshold=THRESHOLD_ALL if candidate else 0,
        revoked=sorted(revoked),
        parts=sorted(parts, key=lambda part: (-part.offer.release, part.salt)),
    )


def changed(message: Desired, before: Desired | None, now: float) -> Desired | None:
    """The message with the next revision if it says something else than the one before."""
    if before is not None and msgspec.structs.replace(message, revision=before.revision) == before:
        return None
    return renumbered(message, now)


def renumbered(message: Desired, now: float) -> Desired:
    """The message with the next revision.

    It is the time in seconds, unless that is not above the one before: so a coordinator that was restored from a copy,
    or began anew, goes on above all that it has said before, and devices do not take it for somebody who repeats it.
    """
    return msgspec.structs.replace(message, revision=max(message.revision + 1, int(now)))


def _devices(names: Iterable[str], salt: str) -> bytes:
    return to_places(cohort(salt, name) for name in names)
