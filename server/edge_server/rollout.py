"""Staged rollouts as a pure state machine: numbers and the time in, the next state out.

    queued ──the group is free──► running ──every stage passed──► completed
                                     └──gate failed, time-out, abort──► rolling_back
                                                 nobody reports it, or time-out──► rolled_back

A running one may be held: by a person who paused it, by an approval that is wanted, or by the hours at which nothing
may be installed. Held, it tells no further device and begins no stage; gates still halt it.

Storage and network call `advance`; it calls nothing. The same metrics at the same times give the same states.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import msgspec

from edge_sdk.messages import cohort
from edge_server.gates import DeviceMetrics, Reading, readings
from edge_server.plan import RolloutPlan, count_devices, opens_at, stage_size
from edge_server.power import Power

MAX_TOLD = 20_000
"""So many devices have room in one message, with room for two more lists."""
Status = Literal["queued", "running", "completed", "rolling_back", "rolled_back"]


class Step(msgspec.Struct, frozen=True):
    """One entry of a rollout's history."""

    time: float
    status: Status
    stage: int
    reason: str


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rollout is. Everything `advance` needs to go on after a restart.

    Attributes:
        status: See the module.
        stage: Position in the plan's stages.
        shadowing: The release runs beside the one in use, before the first stage.
        stage_started: Seconds since the epoch; of the halt once it is being rolled back.
        baseline_since: Figures before are taken from reports begun after this: the stage before, so that the
            control group's past and that of the others are the same times. 0 in the first stage.
        soaking_since: When all reachable devices of the stage first ran the release, or ran it in shadow.
        told: Devices that were told to run the release (or to run it in shadow), in the order in which they were.
        offered: Those that are being told now.
        everyone: All devices of the group are told.
        running: Devices that have it, or have it in shadow, of those that it is for.
        size: So many may in this stage.
        paused: By a person.
        approved: Stages before this one may begin.
        held_since: Since when nothing may go on; None: it may.
        held_s: How long nothing could in this stage before that: it does not count for the time-out.
        waits: What it waits for, in words; "" once it has ended.
        gates: How they stood at the last look.
        reason: Why it is in this status, with the numbers.
        history: What happened, oldest first.
        power: Of an A/B test: what it could be expected to see when it was started.
    """

    status: Status
    stage: int = 0
    shadowing: bool = False
    stage_started: float
    baseline_since: float = 0.0
    soaking_since: float | None = None
    told: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    everyone: bool = False
    running: int = 0
    size: int = 0
    paused: bool = False
    approved: int = 0
    held_since: float | None = None
    held_s: float = 0.0
    waits: str = ""
    gates: tuple[Reading, ...] = ()
    reason: str = ""
    history: tuple[Step, ...] = ()
    power: Power | None = None

    @property
    def is_active(self) -> bool:
        """Whether the group is still busy with this rollout, or will be."""
        return self.status in ("queued", "running", "rolling_back")


# ---- what a person or the registry does


def queue(behind: int, now: float) -> RolloutState:
    """The state of a rollout that waits for another one, of that number, to end."""
    state = RolloutState(status="queued", stage_started=now, waits=f"waits for rollout {behind} to end")
    return _note(state, f"queued behind rollout {behind}", now)


def begin(
    plan: RolloutPlan, metrics: Sequence[DeviceMetrics], *, has_base: bool, now: float, history: tuple[Step, ...] = ()
) -> RolloutState:
    """The first state of a rollout that is under way.

    A group without a base has nothing to compare with and nothing to go back to: the release becomes its base
    at once, for all; unless it is meant for some of the devices only.

    Args:
        plan: What it was started with.
        metrics: One entry for every device of the group.
        has_base: Whether the group has a release already.
        now: Seconds since the epoch.
        history: What happened while it was queued.
    """
    if not has_base and not plan.where:
        state = RolloutState(status="completed", stage=len(plan.stages) - 1, stage_started=now, history=history)
        return _note(state, "first release of the group: offered to all at once", now)
    shadowing = plan.strategy == "shadow"
    state = RolloutState(status="running", stage_started=now, shadowing=shadowing, history=history)
    return _go_on(_note(state, _stage_words(plan, 0, shadowing=shadowing), now), plan, metrics, now)


def halt(state: RolloutState, reason: str, now: float) -> RolloutState:
    """Withdraw the release: nobody new gets it, and devices that run it are told to leave it."""
    ended = "rolled_back" if state.status == "queued" else "rolling_back"
    changed = msgspec.structs.replace(
        state, status=ended, stage_started=now, told=(), offered=(), everyone=False, paused=False, held_since=None,
        waits="" if ended == "rolled_back" else "waits for the devices that run it to leave it",
    )  # fmt: skip
    return _note(changed, reason, now)


def pause(state: RolloutState, reason: str, now: float) -> RolloutState:
    """Tell no further device and begin no stage until `resume`; gates still halt it."""
    held = now if state.held_since is None else state.held_since
    changed = msgspec.structs.replace(
        state,
        paused=True,
        held_since=held,
        offered=state.offered if state.shadowing else (),
        everyone=False,
        waits="waits for a person to resume it",
    )
    return _note(changed, reason, now)


def resume(state: RolloutState, now: float) -> RolloutState:
    """Go on after `pause`."""
    return _note(msgspec.structs.replace(state, paused=False, waits="resumed"), "resumed", now)


def approve(state: RolloutState, reason: str, now: float) -> RolloutState:
    """Let the stage that waits for it begin: its times count from now."""
    changed = msgspec.structs.replace(
        state, approved=state.stage + 1, stage_started=now, soaking_since=None, held_since=None, held_s=0.0,
        waits="approved",
    )  # fmt: skip
    return _note(changed, reason, now)


def awaits_approval(state: RolloutState, plan: RolloutPlan) -> bool:
    """Whether a person must let the stage begin."""
    return (
        state.status == "running"
        and not state.shadowing
        and plan.needs_approval(state.stage)
        and state.approved <= state.stage
    )


# ---- time


def advance(state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], now: float) -> RolloutState:
    """The next state, or the same one if nothing is to change.

    Args:
        state: The state so far.
        plan: What it was started with.
        metrics: One entry for every device of the group.
        now: Seconds since the epoch.
    """
    if state.status == "running":
        last = state.stage + 1 == len(plan.stages)
        found = tuple(readings(plan, metrics, shadowing=state.shadowing, last=last))
        if reason := _failure(plan, metrics, found):
            return halt(msgspec.structs.replace(state, gates=found), reason, now)
        return _go_on(msgspec.structs.replace(state, gates=found), plan, metrics, now)
    if state.status == "rolling_back":
        return _advance_rollback(state, plan, metrics, now)
    return state


def failure(plan: RolloutPlan, metrics: Sequence[DeviceMetrics], *, shadowing: bool = False) -> str | None:
    """Why the release must not go on, with the numbers, or None."""
    return _failure(plan, metrics, readings(plan, metrics, shadowing=shadowing))


def _failure(plan: RolloutPlan, metrics: Sequence[DeviceMetrics], found: Sequence[Reading]) -> str | None:
    if reason := _too_many_failures(plan, metrics):
        return reason
    return next((reading.reason for reading in found if reading.verdict == "harm"), None)


def _go_on(state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], now: float) -> RolloutState:
    """A running rollout in which no gate has failed."""
    pool = _pool(plan, metrics)
    running = sum(_has_it(entry, state) for entry in pool)
    state = msgspec.structs.replace(state, running=running, size=allowed(plan, state, len(pool)))
    if held := _held(state, plan, now):
        since = now if state.held_since is None else state.held_since
        offered = tuple(_staying(state, {entry.device: entry for entry in pool}))
        return msgspec.structs.replace(state, held_since=since, offered=offered, everyone=False, waits=held)
    if state.held_since is not None:
        state = msgspec.structs.replace(state, held_s=state.held_s + now - state.held_since, held_since=None)
    state = _tell(state, plan, metrics)
    lacks = _lacks(state, plan, metrics)
    settled = not lacks
    if settled and state.soaking_since is None:
        state = msgspec.structs.replace(state, soaking_since=now)
    soak = plan.shadow_s if state.shadowing else plan.soak_s
    until = (state.soaking_since if state.soaking_since is not None else now) + soak
    if settled and now < until:
        lacks.append(f"it runs {'in shadow ' if state.shadowing else ''}until {_when(until)}")
    lacks += [_gate_lacks(reading) for reading in state.gates if reading.verdict == "wait"]
    if not state.gates:
        lacks.append("nothing is known of it yet")
    if not lacks:
        return _next_stage(state, plan, metrics, now)
    if now - state.stage_started - state.held_s >= plan.timeout_s:
        what = "the time in shadow" if state.shadowing else f"stage {state.stage + 1}"
        return halt(state, f"{what} timed out after {plan.timeout_s:g} s: {'; '.join(lacks)}", now)
    return msgspec.structs.replace(state, waits="; ".join(lacks))


def _held(state: RolloutState, plan: RolloutPlan, now: float) -> str:
    """Why nothing may go on, or ""."""
    if state.paused:
        return "waits for a person to resume it"
    if awaits_approval(state, plan):
        return f"waits for a person to approve stage {state.stage + 1}"
    if (opens := opens_at(plan, now)) > now:
        return f"waits for its hours, which begin at {_when(opens)}"
    return ""


def _lacks(state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> list[str]:
    """Which devices have not followed yet."""
    told = set(state.told)
    pool = _pool(plan, metrics)
    group = pool if state.everyone else [entry for entry in pool if entry.device in told]
    runs = [entry for entry in pool if _has_it(entry, state)]
    # a tolerated failure will not come back and must not hold up the others
    missing = [
        entry.device for entry in group if entry.reachable and not _has_it(entry, state) and not entry.has_failed
    ]
    if missing:
        return [f"{len(missing)} reachable devices do not run it, {len(runs)} do: {_names(missing)}"]
    return [] if runs else ["no device runs it"]


def _gate_lacks(reading: Reading) -> str:
    if reading.sample < reading.wanted:
        what = "labelled predictions" if reading.metric == "accuracy" else f"values for {reading.metric}"
        return f"{reading.sample:.0f} of {reading.wanted} {what}"
    return f"not shown yet: {reading.reason}"


def _next_stage(state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], now: float) -> RolloutState:
    running = sum(_has_it(entry, state) for entry in metrics if entry.eligible)
    labelled = next((reading.sample for reading in state.gates if reading.metric == "accuracy"), 0)
    what = "the time in shadow" if state.shadowing else f"stage {state.stage + 1}"
    passed = f"{what} passed with {count_devices(running)} and {labelled:.0f} labelled predictions"
    anew = msgspec.structs.replace(
        state, stage_started=now, soaking_since=None, told=() if state.shadowing else state.told, offered=(),
        held_since=None, held_s=0.0, gates=(), shadowing=False,
    )  # fmt: skip
    if state.shadowing:
        return _go_on(_note(anew, f"{passed}; next {_stage_words(plan, 0)}", now), plan, metrics, now)
    if state.stage + 1 == len(plan.stages):
        ended = msgspec.structs.replace(
            anew, status="completed", stage_started=state.stage_started, told=(), everyone=False, waits="",
            gates=state.gates,
        )  # fmt: skip
        return _note(ended, passed, now)
    following = msgspec.structs.replace(anew, stage=state.stage + 1, baseline_since=state.stage_started)
    following = _note(following, f"{passed}; next {plan.told_stage(state.stage + 1)}", now)
    return _go_on(following, plan, metrics, now)


def _advance_rollback(
    state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], now: float
) -> RolloutState:
    left = [entry.device for entry in metrics if entry.on_candidate]
    if left and now - state.stage_started < plan.timeout_s:
        waits = f"waits for {count_devices(len(left))} to leave it: {_names(left)}"
        return state if waits == state.waits else msgspec.structs.replace(state, waits=waits)
    # the release stays revoked, so a device that comes back later still leaves it
    rest = f"; {_names(left)} did not report leaving it" if left else ""
    return _note(msgspec.structs.replace(state, status="rolled_back", waits=""), state.reason + rest, now)


# ---- who is told


def _tell(state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> RolloutState:
    """Tell as many devices as the stage and the limit of parallel downloads allow."""
    pool = _pool(plan, metrics)
    last = not state.shadowing and state.stage == len(plan.stages) - 1
    if last and not (plan.where or plan.held_out or plan.max_parallel):
        return msgspec.structs.replace(state, everyone=True, offered=())
    known = {entry.device: entry for entry in pool}
    limit = min(plan.max_parallel or MAX_TOLD, MAX_TOLD)
    told_before = set(state.told)
    reached = {entry.device for entry in pool if entry.device in told_before or _has_it(entry, state)}
    if not state.shadowing:
        reached |= {entry.device for entry in metrics if entry.on_candidate}

    def waits(name: str) -> bool:
        """Told and still to install it. While downloads are limited, a device that is away takes nobody's place."""
        entry = known.get(name)
        if entry is None or _has_it(entry, state) or entry.has_failed:
            return False
        return entry.reachable or not plan.max_parallel

    offered, staying = [name for name in state.offered if waits(name)], _staying(state, known)
    known_to = set(offered)
    new = [name for name in state.told if name not in known_to and waits(name)][: limit - len(offered)]
    again, spare = len(new), allowed(plan, state, len(pool)) - len(reached)
    barred = {cohort(plan.salt, entry.device) for entry in metrics if entry.device not in known}
    order = sorted((cohort(plan.salt, entry.device), entry.device) for entry in pool)
    for number, same in groupby(order, key=lambda item: item[0]):
        names = [name for _, name in same if name not in reached]
        if not names or number in barred:  # devices of one number cannot be told apart
            continue
        if not all(known[name].reachable for name in names):
            continue  # their turn comes when they are back: a canary that is off says nothing
        if len(names) > spare or len(offered) + len(new) + len(names) > limit:
            break
        spare -= len(names)
        new += names
    told = (*state.told, *new[again:])
    # those that are done stay in the message until there are others to tell: every new message goes to all
    withdrawn = any(not waits(name) and not _is_done(name, known, state) for name in state.offered)
    if new or withdrawn:
        state = msgspec.structs.replace(state, told=told, offered=(*staying, *offered, *new))
    return msgspec.structs.replace(state, everyone=False)


def _staying(state: RolloutState, known: dict[str, DeviceMetrics]) -> list[str]:
    """Those that would leave the shadow if they were not told any longer; who serves a release keeps it."""
    return [name for name in state.offered if state.shadowing and name in known and known[name].in_shadow]


def _is_done(name: str, known: dict[str, DeviceMetrics], state: RolloutState) -> bool:
    return name in known and (_has_it(known[name], state) or known[name].has_failed)


def allowed(plan: RolloutPlan, state: RolloutState, devices: int) -> int:
    """How many of the devices that are not held out may run the release now, or run it in shadow."""
    if state.shadowing:
        return min(devices, max(1, -(-devices * plan.shadow_percent // 100)))
    return stage_size(plan, state.stage, devices)


def _pool(plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> list[DeviceMetrics]:
    """The devices that the release is for until it is completed."""
    return [entry for entry in metrics if entry.eligible and not plan.in_control(entry.device)]


def _has_it(entry: DeviceMetrics, state: RolloutState) -> bool:
    return entry.in_shadow if state.shadowing else entry.on_candidate


# ---- words


def _too_many_failures(plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> str | None:
    bad = [entry for entry in metrics if entry.has_failed]
    if len(bad) <= plan.max_failures:
        return None
    failed = sum(entry.failed for entry in bad)
    return (
        f"release {plan.release} was not kept by {count_devices(len(bad))} ({failed} failed to install, "
        f"{len(bad) - failed} went back by themselves; at most {plan.max_failures} may): "
        f"{_names([entry.device for entry in bad])}"
    )


def _stage_words(plan: RolloutPlan, stage: int, *, shadowing: bool = False) -> str:
    if shadowing:
        return f"in shadow on {plan.shadow_percent} % of the group for {plan.shadow_s:g} s"
    return f"stage {stage + 1} of {len(plan.stages)}: {plan.told_stage(stage)}"


def _names(devices: Sequence[str]) -> str:
    shown = ", ".join(sorted(devices)[:5])
    return shown if len(devices) <= 5 else f"{shown} and {len(devices) - 5} more"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(math.ceil(seconds / 60) * 60))


def _note(state: RolloutState, reason: str, now: float) -> RolloutState:
    step = Step(now, state.status, state.stage, reason)
    return msgspec.structs.replace(state, reason=reason, history=(*state.history, step))
