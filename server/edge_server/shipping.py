"""Releases on their way: told to groups in stages, held, withdrawn.

Whatever changes what a group should run stores the new desired state in the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from edge_sdk.clock import Clock
from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.messages import Desired, Offer, check_name, decode, encode
from edge_server import rollout as machine
from edge_server.catalog import Catalog
from edge_server.desired import Kept, changed, compose, renumbered
from edge_server.errors import ReleaseError, RolloutError, UnknownRolloutError
from edge_server.gates import DeviceMetrics
from edge_server.labels import keys_of, parse, segments_of
from edge_server.plan import RolloutPlan, RolloutRules
from edge_server.power import Power, power_of
from edge_server.records import GroupRecord, ReleaseRecord, RolloutRecord
from edge_server.settings import Settings
from edge_server.store import Store

_MOVING = {"release", "mode"}
"""What of a device a rollout itself may change: it would lose those that it was for."""
Select = Callable[[str, str], Collection[str] | None]
"""Names of a group's devices with the labels of a query; None: all of them."""


class Shipping:
    """Owns rollouts, and what groups are told to run.

    Args:
        store: The coordinator's database.
        catalog: The releases that are here.
        settings: Of the coordinator.
        clock: Where the time comes from.
        select: Says which devices of a group have the labels of a query.
    """

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        *,
        settings: Settings,
        clock: Clock,
        select: Select,
    ) -> None:
        self._store, self._catalog = store, catalog
        self._settings, self._clock, self._select = settings, clock, select

    def push(self, folder: Path, *, group: str, plan: RolloutRules | None, actor: str, force: str = "") -> int:
        """See `Registry.push`."""
        _check_group(group)
        return self._ship(self._catalog.take_in(folder), group=group, plan=plan, actor=actor, force=force)

    def ship(self, number: int, *, group: str, plan: RolloutRules | None, actor: str, force: str = "") -> int:
        """See `Registry.ship`."""
        _check_group(group)
        return self._ship(self._catalog.find(number), group=group, plan=plan, actor=actor, force=force)

    def _ship(self, release: ReleaseRecord, *, group: str, plan: RolloutRules | None, actor: str, force: str) -> int:
        self._catalog.require_won(release, force)
        full_plan = _plan(plan or self._settings.rollout, release.release, group)
        target = self._catalog.to_sign(release)
        with self._store.transaction():
            self._catalog.record(release)
            rollout = self._start(full_plan, actor, force)
            if target is not None:  # the last that can fail: nobody is offered what is not signed
                self._catalog.sign(target)
            return rollout

    # ---- rollouts

    def _start(self, plan: RolloutPlan, actor: str, force: str) -> int:
        named = segments_of(plan.where)
        plan = msgspec.structs.replace(plan, where=self._store.segments.spell_out(plan.where), segments=named)
        if plan.where and (moving := keys_of(parse(plan.where)) & _MOVING):
            raise ConfigError(
                f"where = {plan.where!r}: {', '.join(sorted(moving))} changes while a rollout goes on; choose by labels"
            )
        if plan.timeout_s <= plan.soak_s:  # refused here alone: plans that were begun must be read again
            raise ConfigError(
                f"timeout_s must be above soak_s, or no stage can pass; got {plan.timeout_s:g} and {plan.soak_s:g}"
            )
        now, group = self._clock.now(), self._store.groups.get(plan.group)
        if plan.strategy == "ab" and group.base is None:
            raise RolloutError(f"group {plan.group!r} has no release yet: there is nothing to compare with")
        busy = self._in_the_way(plan)
        if busy is not None and self._settings.collisions == "refuse":
            raise RolloutError(
                f"group {plan.group!r} is busy with rollout {busy.id} of release "
                f"{busy.plan.release} ({busy.state.status}): wait for its end, abort it, or set collisions to queue"
            )
        power = self._power(plan)
        if power is not None and not power.enough and plan.on_small == "refuse":
            raise RolloutError(f"{power.words}; make the group or the effect larger, or set on_small to warn")
        if busy is not None:
            state = machine.queue(busy.id, now)
        else:
            metrics = self._metrics(plan, None, now)
            state = machine.begin(plan, metrics, has_base=group.base is not None, now=now)
        if power is not None:
            step = machine.Step(now, state.status, state.stage, power.words)
            state = msgspec.structs.replace(state, history=(step, *state.history), power=power)
        rollout = RolloutRecord(id=self._store.rollouts.next_id(), started=now, plan=plan, state=state)
        self._save(rollout)
        detail = {"release": plan.release, "group": plan.group, "rollout": rollout.id}
        self._store.audit.add(now, actor, "release pushed", detail | ({"forced": force} if force else {}))
        return rollout.id

    def _in_the_way(self, plan: RolloutPlan, *, before: int | None = None) -> RolloutRecord | None:
        """The rollout that this one would collide with: the newest that is not over and is for some of its devices.

        Args:
            plan: Of the new one.
            before: Only those with a number below it.

        Raises:
            ReleaseError: The group had this release, or a newer one.
        """
        busy = None
        for earlier in self._store.rollouts.find(group=plan.group, before=before):
            if not self._overlap(plan, earlier.plan):
                continue
            if earlier.state.is_active:
                busy = busy or earlier
            widened = (
                earlier.plan.release == plan.release
                and earlier.plan.where != plan.where
                and earlier.state.status == "completed"
            )
            if plan.release <= earlier.plan.release and not widened:
                raise ReleaseError(
                    f"group {plan.group!r} had release {earlier.plan.release} already: push one above it, "
                    f"not {plan.release}"
                )
        return busy

    def _overlap(self, plan: RolloutPlan, other: RolloutPlan) -> bool:
        """Whether some device may be told by both."""
        mine, theirs = (self._select(each.group, each.where) for each in (plan, other))
        if mine is None or theirs is None or plan.where == other.where:
            return True
        return not set(mine).isdisjoint(theirs)

    def reach(self, plan: RolloutPlan) -> int:
        """See `Registry.reach`."""
        return sum(entry.eligible for entry in self._metrics(plan, None, self._clock.now()))

    def calculate(self, release: int, *, group: str, plan: RolloutRules | None) -> Power | None:
        """See `Registry.power`."""
        _check_group(group)
        return self._power(_plan(plan or self._settings.rollout, self._catalog.find(release).release, group))

    def _power(self, plan: RolloutPlan) -> Power | None:
        """What an A/B test of this plan can be expected to see; None: it is none."""
        if plan.strategy != "ab":
            return None
        metrics = self._metrics(plan, None, self._clock.now())
        return power_of(plan, metrics, self._store.metrics.pace(plan, now=self._clock.now()))

    def advance(self) -> list[RolloutRecord]:
        """See `Registry.advance`."""
        moved = []
        with self._store.transaction():
            now = self._clock.now()
            for rollout in sorted(self._store.rollouts.find(active=True), key=lambda record: record.id):
                state = self._next(rollout, now)
                if state == rollout.state:
                    continue
                self._save(msgspec.structs.replace(rollout, state=state))
                if len(state.history) > len(rollout.state.history) or state.offered != rollout.state.offered:
                    moved.append(msgspec.structs.replace(rollout, state=state))
                if state.status != rollout.state.status:
                    detail = {"rollout": rollout.id, "release": rollout.plan.release, "reason": state.reason}
                    self._store.audit.add(now, "coordinator", f"rollout {state.status.replace('_', ' ')}", detail)
            for group in self._store.groups.all():
                if self._parts_of(group):
                    self._tell(group.name)
        return moved

    def _next(self, rollout: RolloutRecord, now: float) -> machine.RolloutState:
        state, plan = rollout.state, rollout.plan
        if state.status == "queued":
            busy = self._in_the_way(plan, before=rollout.id)
            if busy is not None:
                return msgspec.structs.replace(state, waits=f"waits for rollout {busy.id} to end")
            base = self._store.groups.get(plan.group).base
            metrics = self._metrics(plan, None, now)
            begun = machine.begin(plan, metrics, has_base=base is not None, now=now, history=state.history)
            return msgspec.structs.replace(begun, power=state.power)
        return machine.advance(state, plan, self._metrics(plan, state, now), now)

    def _metrics(self, plan: RolloutPlan, state: machine.RolloutState | None, now: float) -> list[DeviceMetrics]:
        return self._store.metrics.read(plan, state, now=now, eligible=self._select(plan.group, plan.where))

    def abort(self, number: int, *, reason: str, actor: str) -> None:
        """See `Registry.abort`."""
        text = f"aborted: {reason}" if reason else "aborted"
        self._act(number, actor, "rollout aborted", reason, lambda record, now: machine.halt(record.state, text, now))

    def pause(self, number: int, *, reason: str, actor: str) -> None:
        """See `Registry.pause`."""

        def act(record: RolloutRecord, now: float) -> machine.RolloutState:
            if record.state.paused or record.state.status == "queued":
                raise RolloutError(f"rollout {number} is {'paused already' if record.state.paused else 'only queued'}")
            return machine.pause(record.state, f"paused: {reason}" if reason else "paused", now)

        self._act(number, actor, "rollout paused", reason, act)

    def resume(self, number: int, *, actor: str) -> None:
        """See `Registry.resume`."""

        def act(record: RolloutRecord, now: float) -> machine.RolloutState:
            if not record.state.paused:
                raise RolloutError(f"rollout {number} is not paused")
            return self._next(msgspec.structs.replace(record, state=machine.resume(record.state, now)), now)

        self._act(number, actor, "rollout resumed", "", act)

    def approve(self, number: int, *, reason: str, actor: str) -> None:
        """See `Registry.approve`."""

        def act(record: RolloutRecord, now: float) -> machine.RolloutState:
            if not machine.awaits_approval(record.state, record.plan):
                raise RolloutError(
                    f"rollout {number} waits for no approval: {record.state.waits or record.state.status}"
                )
            words = f"stage {record.state.stage + 1} approved by {actor}" + (f": {reason}" if reason else "")
            return self._next(msgspec.structs.replace(record, state=machine.approve(record.state, words, now)), now)

        self._act(number, actor, "rollout approved", reason, act)

    def _act(
        self,
        number: int,
        actor: str,
        action: str,
        reason: str,
        act: Callable[[RolloutRecord, float], machine.RolloutState],
    ) -> None:
        with self._store.transaction():
            record, now = self.find(number), self._clock.now()
            if record.state.status not in ("queued", "running"):
                verb = action.removeprefix("rollout ")
                raise RolloutError(f"rollout {number} is {record.state.status}: only a running one can be {verb}")
            self._save(msgspec.structs.replace(record, state=act(record, now)))
            self._store.audit.add(
                now, actor, action, {"rollout": number, "stage": record.state.stage + 1, "reason": reason}
            )

    def find(self, number: int) -> RolloutRecord:
        """The rollout of that number.

        Raises:
            UnknownRolloutError: There is none.
        """
        found = self._store.rollouts.find(number=number)
        if not found:
            raise UnknownRolloutError(f"there is no rollout {number}")
        return found[0]

    # ---- what groups are told

    def _save(self, rollout: RolloutRecord) -> None:
        """Store a rollout and what follows from it for its group."""
        self._store.rollouts.save(rollout)
        group = self._store.groups.get(rollout.plan.group)
        base, revoked = group.base, set(group.revoked)
        if rollout.state.status == "completed" and not rollout.plan.where:
            base = rollout.plan.release
        elif rollout.state.status == "rolling_back":
            revoked.add(rollout.plan.release)
        self._tell(group.name, base=base, revoked=revoked)

    def _tell(self, name: str, *, base: int | None = None, revoked: Collection[int] | None = None) -> None:
        """Store what a group is to run, if that has changed."""
        group = self._store.groups.get(name)
        base = group.base if base is None else base
        gone = set(group.revoked if revoked is None else revoked)
        running = [r for r in self._store.rollouts.find(group=name, active=True) if r.state.status == "running"]
        kept = [self._still_missing(record) for record in self._parts_of(group)]
        told = {record.plan.release for record in running} | {entry.release for entry in kept}
        offers = {number: self._offer(number) for number in told | ({base} if base is not None else set())}
        before = decode(group.desired, Desired) if group.desired else None
        message = compose(
            revision=group.revision, base=base, revoked=gone, running=running, kept=kept, offers=offers, before=before
        )
        if (new := changed(message, before, self._clock.now())) is None:
            return
        self._store.groups.save(
            msgspec.structs.replace(
                group, revision=new.revision, base=base, revoked=tuple(sorted(gone)), desired=encode(new)
            )
        )

    def tell_again(self) -> None:
        """Give what every group is told the next revision: this may be an older copy of what told them last.

        Raises:
            StoreError: Nothing changed.
        """
        with self._store.transaction():
            for group in self._store.groups.all():
                if group.desired:
                    new = renumbered(decode(group.desired, Desired), self._clock.now())
                    self._store.groups.save(msgspec.structs.replace(group, revision=new.revision, desired=encode(new)))

    def _parts_of(self, group: GroupRecord) -> list[RolloutRecord]:
        return self._store.rollouts.parts(group.name, above=group.base or 0)

    def _still_missing(self, record: RolloutRecord) -> Kept:
        plan = record.plan
        names = self._select(plan.group, plan.where) or ()
        having = self._store.metrics.at_least(plan.group, plan.release)
        return Kept(plan.release, plan.salt, tuple(sorted(set(names) - having)))

    def _offer(self, release: int) -> Offer:
        record = self._store.releases.find(number=release)[0]
        return Offer(record.release, record.digest, record.size)


def _check_group(name: str) -> None:
    try:
        check_name(name, "group")
    except ProtocolError as error:
        raise ConfigError(str(error)) from error


def _plan(rules: RolloutRules, release: int, group: str) -> RolloutPlan:
    if isinstance(rules, RolloutPlan):
        if (rules.release, rules.group) != (release, group):
            raise RolloutError(
                f"the plan is for release {rules.release} and group {rules.group!r}, "
                f"the push for {release} and {group!r}"
            )
        return rules
    return RolloutPlan(release=release, group=group, **msgspec.structs.asdict(rules))
