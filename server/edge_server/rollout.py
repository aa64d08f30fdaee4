"""Staged rollouts as a pure state machine: numbers and the time in, the next state out.

    running ──every stage passed──► completed
       └──gate failed, time-out, abort──► rolling_back ──nobody reports it, or time-out──► rolled_back

Storage and network call `advance`; it calls nothing. The same metrics at the same times give the same states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from edge_sdk.messages import THRESHOLD_ALL, Desired, Offer, cohort
from edge_sdk.stats import wilson_interval

Status = Literal["running", "completed", "rolling_back", "rolled_back"]


class RolloutRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How carefully a release goes out. Every default is usable.

    Attributes:
        stages: Share of the group that may run the release in each stage, percent, rising, ending in 100.
        soak_s: Time that a stage goes on after all its reachable devices run the release.
        timeout_s: A stage that has not passed by then is halted; a rollback is closed by then.
        reachable_s: A device whose last row is older than this holds nobody up.
        min_labelled: Labelled predictions a stage must gather on the release; 0 judges health alone.
        max_accuracy_drop: Loss of accuracy that is tolerated, 0 to 1.
        max_failures: Devices that may fail to install the release or leave it by themselves.
        max_error_rate: Share of predictions on the release that may end in an error, 0 to 1.
        baseline_reports: Reports that make up a device's accuracy before.
    """

    stages: tuple[int, ...] = (10, 100)
    soak_s: float = 3600.0
    timeout_s: float = 7 * 86400.0
    reachable_s: float = 7200.0
    min_labelled: int = 50
    max_accuracy_drop: float = 0.02
    max_failures: int = 0
    max_error_rate: float = 0.05
    baseline_reports: int = 10

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.stages), self.stages, strict=False))
        if not self.stages or not rising or self.stages[-1] != 100:
            raise ValueError(f"stages must be rising percentages that end in 100, got {list(self.stages)}")
        for name in ("soak_s", "min_labelled", "max_failures"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("timeout_s", "reachable_s", "baseline_reports"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_accuracy_drop", "max_error_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0 to 1, got {getattr(self, name)}")


class RolloutPlan(RolloutRules, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One release on its way to one group, by these rules."""

    release: int
    group: str = "default"

    @property
    def salt(self) -> str:
        """Shuffles the devices anew for every rollout, so that the same ones are not always first."""
        return f"{self.group}-{self.release}"


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
        stage_started: Seconds since the epoch; of the halt once it is being rolled back.
        baseline_since: Accuracy before is taken from reports begun after this: the stage before, so that the
            control group's past and that of the others are the same times. 0 in the first stage.
        soaking_since: When all reachable devices of the stage first ran the release.
        threshold: Devices whose cohort number is below may run it.
        reason: Why it is in this status, with the numbers.
        history: What happened, oldest first.
    """

    status: Status
    stage: int = 0
    stage_started: float
    baseline_since: float = 0.0
    soaking_since: float | None = None
    threshold: int = 0
    reason: str = ""
    history: tuple[Step, ...] = ()

    @property
    def is_active(self) -> bool:
        """Whether the group is still busy with this rollout."""
        return self.status in ("running", "rolling_back")


class DeviceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What the committed reports and events say about one device of the group.

    Attributes:
        device: Its name.
        on_candidate: Its last row came from the release that is being rolled out.
        switched: It runs the candidate, and did not before this stage.
        reachable: Its last row is recent.
        failed: The last it said about the release is that it could not be installed.
        rolled_back: The last it said about the release is that it left it.
        predictions: Since the stage began; of a device that runs the candidate, only those on it. So are
            the next three.
        errors: Predictions that ended in an error.
        labelled: Labelled predictions.
        correct: Those that were right.
        labelled_before: In its last reports before those, on what it ran when the stage began.
        correct_before: Those that were right.
    """

    device: str
    on_candidate: bool = False
    switched: bool = False
    reachable: bool = True
    failed: bool = False
    rolled_back: bool = False
    predictions: int = 0
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    labelled_before: int = 0
    correct_before: int = 0

    @property
    def has_failed(self) -> bool:
        """Whether it tried the candidate and does not run it."""
        return self.failed or self.rolled_back


def begin(plan: RolloutPlan, metrics: Sequence[DeviceMetrics], *, has_base: bool, now: float) -> RolloutState:
    """The first state of a rollout.

    A group without a base has nothing to compare with and nothing to go back to: the release becomes its base
    at once, for all.
    """
    if not has_base:
        state = RolloutState(status="completed", stage=len(plan.stages) - 1, stage_started=now)
        return _note(state, "first release of the group: offered to all at once", now)
    state = RolloutState(status="running", stage_started=now, threshold=stage_threshold(plan, 0, metrics))
    return _note(state, f"stage 1 of {len(plan.stages)}: {plan.stages[0]} % of the group", now)


def advance(state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], now: float) -> RolloutState:
    """The next state, or the same one if nothing is to change.

    Args:
        state: The state so far.
        plan: What it was started with.
        metrics: One entry for every device of the group.
        now: Seconds since the epoch.
    """
    if state.status == "running":
        return _advance_running(state, plan, metrics, now)
    if state.status == "rolling_back":
        return _advance_rollback(state, plan, metrics, now)
    return state


def halt(state: RolloutState, reason: str, now: float) -> RolloutState:
    """Withdraw the release: nobody new gets it, and devices that run it are told to leave it."""
    changed = msgspec.structs.replace(state, status="rolling_back", stage_started=now, threshold=0)
    return _note(changed, reason, now)


def failure(plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> str | None:
    """Why the release must not go on, with the numbers, or None."""
    return _too_many_failures(plan, metrics) or _too_many_errors(plan, metrics) or _less_accurate(plan, metrics)


def stage_size(plan: RolloutPlan, stage: int, devices: int) -> int:
    """How many of `devices` may run the release in a stage."""
    return min(devices, max(1, -(-devices * plan.stages[stage] // 100)))


def stage_threshold(plan: RolloutPlan, stage: int, metrics: Sequence[DeviceMetrics]) -> int:
    """The cohort number below which devices may run the release in a stage.

    Devices that run it already keep their place even when others join before them in the order, so that the
    stage's size holds.
    """
    if plan.stages[stage] == 100:
        return THRESHOLD_ALL
    spare = stage_size(plan, stage, len(metrics)) - sum(entry.on_candidate for entry in metrics)
    threshold = 0
    for place, on_candidate in sorted((cohort(plan.salt, entry.device), entry.on_candidate) for entry in metrics):
        if not on_candidate:
            if spare <= 0:
                break
            spare -= 1
        threshold = place + 1
    return threshold


def desired(
    *,
    revision: int,
    base: Offer | None,
    candidate: Offer | None,
    salt: str,
    threshold: int,
    revoked: Sequence[int],
) -> Desired:
    """What a group is told; `candidate` only counts while `threshold` is above 0."""
    offered = candidate if threshold > 0 else None
    return Desired(
        revision=revision,
        base=base,
        candidate=offered,
        salt=salt if offered else "",
        threshold=threshold if offered else 0,
        revoked=sorted(revoked),
    )


def _advance_running(
    state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], now: float
) -> RolloutState:
    if reason := failure(plan, metrics):
        return halt(state, reason, now)
    threshold = stage_threshold(plan, state.stage, metrics)
    running = sum(entry.on_candidate for entry in metrics)
    missing = [
        entry.device
        for entry in metrics
        # a tolerated failure will not come back and must not hold up the others
        if cohort(plan.salt, entry.device) < threshold
        and entry.reachable
        and not entry.on_candidate
        and not entry.has_failed
    ]
    settled = running > 0 and not missing
    soaking_since = now if state.soaking_since is None and settled else state.soaking_since
    labelled = _labelled([entry for entry in metrics if entry.on_candidate])
    soaked = soaking_since is not None and now - soaking_since >= plan.soak_s
    if settled and soaked and labelled >= plan.min_labelled:
        return _next_stage(state, plan, metrics, labelled=labelled, now=now)
    if now - state.stage_started >= plan.timeout_s:
        lacks = []
        if not settled:
            lacks.append(f"{len(missing)} reachable devices do not run it, {running} do")
        elif not soaked:
            lacks.append(f"it has not run for {plan.soak_s:g} s")
        if labelled < plan.min_labelled:
            lacks.append(f"{labelled} of {plan.min_labelled} labelled predictions")
        return halt(state, f"stage {state.stage + 1} timed out after {plan.timeout_s:g} s: {'; '.join(lacks)}", now)
    return msgspec.structs.replace(state, threshold=threshold, soaking_since=soaking_since)


def _next_stage(
    state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], *, labelled: int, now: float
) -> RolloutState:
    running = sum(entry.on_candidate for entry in metrics)
    passed = f"stage {state.stage + 1} passed with {running} devices and {labelled} labelled predictions"
    if state.stage + 1 == len(plan.stages):
        return _note(msgspec.structs.replace(state, status="completed", threshold=0), passed, now)
    following = msgspec.structs.replace(
        state,
        stage=state.stage + 1,
        stage_started=now,
        baseline_since=state.stage_started,
        soaking_since=None,
        threshold=stage_threshold(plan, state.stage + 1, metrics),
    )
    return _note(following, f"{passed}; next {plan.stages[state.stage + 1]} % of the group", now)


def _advance_rollback(
    state: RolloutState, plan: RolloutPlan, metrics: Sequence[DeviceMetrics], now: float
) -> RolloutState:
    left = [entry.device for entry in metrics if entry.on_candidate]
    if left and now - state.stage_started < plan.timeout_s:
        return state
    # the release stays revoked, so a device that comes back later still leaves it
    rest = f"; {_names(left)} did not report leaving it" if left else ""
    return _note(msgspec.structs.replace(state, status="rolled_back"), state.reason + rest, now)


def _too_many_failures(plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> str | None:
    bad = [entry for entry in metrics if entry.has_failed]
    if len(bad) <= plan.max_failures:
        return None
    failed = sum(entry.failed for entry in bad)
    return (
        f"{len(bad)} devices do not keep release {plan.release} ({failed} failed to install, "
        f"{len(bad) - failed} went back by themselves; at most {plan.max_failures} may): "
        f"{_names([entry.device for entry in bad])}"
    )


def _too_many_errors(plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> str | None:
    errors = sum(entry.errors for entry in metrics if entry.on_candidate)
    tried = errors + sum(entry.predictions for entry in metrics if entry.on_candidate)
    low, _ = wilson_interval(errors, tried)
    if low <= plan.max_error_rate:
        return None
    return f"{errors} of {tried} predictions on release {plan.release} failed; at most {plan.max_error_rate:.1%} may"


def _less_accurate(plan: RolloutPlan, metrics: Sequence[DeviceMetrics]) -> str | None:
    """Compare the candidate's devices with themselves before, less what happened to the control group meanwhile.

    The control group are the devices still on the old release. In the last stage there are hardly any: then it is
    those that ran the candidate before the stage, for which nothing has changed but the world either.
    """
    least = max(1, plan.min_labelled)
    scored = [entry for entry in metrics if entry.labelled and entry.labelled_before]
    treated = [entry for entry in scored if entry.on_candidate]
    control = [entry for entry in scored if not entry.on_candidate and not entry.has_failed]
    if _labelled(control) < least:
        control = [entry for entry in treated if not entry.switched]
        treated = [entry for entry in treated if entry.switched]
    if _labelled(treated) < least:
        return None
    before, after = _accuracy_before(treated), _accuracy(treated)
    change = _accuracy(control) - _accuracy_before(control) if _labelled(control) >= least else 0.0
    # a fleet that got better does not raise the bar; one that got worse lowers it
    expected = before + min(0.0, change)
    _, high = wilson_interval(sum(entry.correct for entry in treated), _labelled(treated))
    if high >= expected - plan.max_accuracy_drop:
        return None
    return (
        f"accuracy on release {plan.release} is {after:.1%} (at most {high:.1%}, {_labelled(treated)} labelled, "
        f"{len(treated)} devices), before {before:.1%}; control changed by {change:+.1%} "
        f"({_labelled(control)} labelled, {len(control)} devices); "
        f"a drop of {plan.max_accuracy_drop:.1%} is tolerated"
    )


def _labelled(entries: Sequence[DeviceMetrics]) -> int:
    return sum(entry.labelled for entry in entries)


def _accuracy(entries: Sequence[DeviceMetrics]) -> float:
    return sum(entry.correct for entry in entries) / _labelled(entries)


def _accuracy_before(entries: Sequence[DeviceMetrics]) -> float:
    """Accuracy before, with each device weighing as much as it does after: a change of mix is no change."""
    weighted = sum(entry.labelled * entry.correct_before / entry.labelled_before for entry in entries)
    return weighted / _labelled(entries)


def _names(devices: Sequence[str]) -> str:
    shown = ", ".join(sorted(devices)[:5])
    return shown if len(devices) <= 5 else f"{shown} and {len(devices) - 5} more"


def _note(state: RolloutState, reason: str, now: float) -> RolloutState:
    step = Step(now, state.status, state.stage, reason)
    return msgspec.structs.replace(state, reason=reason, history=(*state.history, step))
