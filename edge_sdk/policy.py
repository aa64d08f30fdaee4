"""Learn now? Pure decisions from what the device knows, with their reasons.

`decide` weighs what calls for learning; `obstacle` says what in the machine stands against it, before and during.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import msgspec

from edge_sdk.config import DeviceConfig, PolicyConfig, ResourceConfig, Trigger
from edge_sdk.errors import ConfigError

DAY_S = 86_400
LEARNER_MB = 40.0
"""What the process of the default learner takes, nearly all of it Python and numpy."""
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Signals:
    """What may be a reason to learn.

    Attributes:
        alarms: Names of the drift monitors whose alarm is up.
        fresh_rows: Labelled samples not learned from yet.
        accuracy: Recent live accuracy, or None while too few labels have come.
        calibration: Recent expected calibration error, or None while too few labels have come.
        since_last_s: Since learning last ended, or None if it never ran.
        demand: Why it should start whatever triggers and cool-down say, or "".
        new_labels: Labels that the head would grow by.
        metrics: What the app's own metrics call for learning by, in words.
    """

    alarms: tuple[str, ...]
    fresh_rows: int
    accuracy: float | None
    calibration: float | None
    since_last_s: float | None
    demand: str
    new_labels: int = 0
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResourceState:
    """What the machine can spare. None: unknown, which never forbids.

    Attributes:
        battery: Charge, 0 to 1.
        on_mains: Whether it is plugged in.
        temperature_c: Hottest sensor.
        free_mb: Memory that can be used.
        cpu_load: Load average of the last minute by number of cores; 1: all are busy.
        cores: How many `cpu_load` is over.
        local_minute: Minutes since midnight, local time, 0 to 1439.
        total_mb: All memory of the machine.
    """

    battery: float | None = None
    on_mains: bool | None = None
    temperature_c: float | None = None
    free_mb: float | None = None
    cpu_load: float | None = None
    cores: int = 1
    local_minute: int | None = None
    total_mb: float | None = None


class Spent(msgspec.Struct, frozen=True):
    """What learning took on one day (UTC); `spend` adds to it."""

    day: int = 0
    """Days since the epoch."""
    seconds: float = 0.0
    """CPU time."""
    joules: float = 0.0
    """CPU time times the power of a busy core: an estimate."""
    flash_bytes: int = 0
    """Written to the disk."""
    latest: int = 0
    """The latest day there ever was; differs from `day` once the clock was set back."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to learn now, and why or why not."""

    learn: bool
    reason: str
    wanted: bool = False
    """There was a reason to learn; if `learn` is False, `reason` says what stood against it."""
    triggers: tuple[str, ...] = ()
    """Which ones called for it, as named in `PolicyConfig.triggers`; "demand" if somebody asked."""


def decide(signals: Signals, obstacle: str, config: PolicyConfig) -> Decision:
    """Decide on learning: a reason, enough new rows, the cool-down over, and nothing in its way.

    Args:
        signals: What may be a reason.
        obstacle: What `obstacle` says; "" if the machine can spare what learning takes.
        config: Which triggers, and their limits.
    """
    reasons = _reasons(signals, config)
    called = {name for group in config.triggers if all(name in reasons for name in group) for name in group}
    fired: dict[str, str] = {name: why for name, why in reasons.items() if name in called}
    if signals.demand:
        fired["demand"] = signals.demand
    if not fired:
        return Decision(learn=False, reason="nothing calls for it")
    why = "; ".join(fired.values())
    waits = obstacle
    if signals.fresh_rows < config.min_fresh_rows:
        waits = f"{config.min_fresh_rows} new labelled rows, has {signals.fresh_rows}"
    elif not signals.demand and signals.since_last_s is not None and signals.since_last_s < config.cooldown_s:
        waits = f"cool-down of {config.cooldown_s:g} s"
    reason = f"{why}: waits for {waits}" if waits else why
    return Decision(learn=not waits, reason=reason, wanted=True, triggers=tuple(fired))


def _reasons(signals: Signals, config: PolicyConfig) -> dict[Trigger, str]:
    """Each trigger that calls for learning, and what it says."""
    reasons: dict[Trigger, str] = {}
    if signals.alarms:
        reasons["drift"] = "; ".join(f"{name} drift" for name in signals.alarms)
    if signals.accuracy is not None and signals.accuracy < config.accuracy_target:
        reasons["accuracy"] = f"accuracy {signals.accuracy:.3f} below {config.accuracy_target:g}"
    error, target = signals.calibration, config.calibration_target
    if target and error is not None and error > target:
        reasons["calibration"] = f"calibration error {error:.3f} above {target:g}"
    if signals.metrics:
        reasons["metric"] = "; ".join(signals.metrics)
    if signals.new_labels:  # by number: a label may say whose data it is
        reasons["new_label"] = "1 new label" if signals.new_labels == 1 else f"{signals.new_labels} new labels"
    if signals.fresh_rows >= config.volume_rows:
        reasons["volume"] = f"{signals.fresh_rows} new labelled rows"
    due = signals.since_last_s is None or signals.since_last_s >= config.schedule_s
    if config.schedule_s and signals.fresh_rows and due:
        reasons["schedule"] = "schedule"
    return reasons


def obstacle(
    state: ResourceState,
    spent: Spent,
    now: float,
    config: ResourceConfig,
    *,
    learning: bool = False,
    waiting: bool = False,
) -> str:
    """Why learning must not begin or go on now, with value and limit; "" if it may.

    Args:
        state: What the machine can spare.
        spent: What the day's learning took so far.
        now: Seconds since the epoch.
        config: The limits.
        learning: A job is under way, at work or paused. What the learner itself takes is then no reason to stop it:
            one core while it works, and `LEARNER_MB` of memory.
        waiting: The last answer was an obstacle. Learning then goes on only once there is a margin (5 % of battery,
            3 °C, 10 % of memory, 0.1 of load), so that it does not stop and go around a limit.

    Raises:
        ConfigError: `quiet_hours` cannot be read; `check_policy` finds this beforehand.
    """
    on_battery = state.on_mains is False
    if on_battery and config.require_mains:
        return "on battery, learning needs mains"
    battery = min(config.min_battery + 0.05 * waiting, 1.0)
    if on_battery and state.battery is not None and state.battery < battery:
        return f"battery at {state.battery:.0%}, learning needs {battery:.0%}"
    stops = "goes on" if waiting else "stops"
    hottest = config.max_temperature_c - 3 * waiting
    if state.temperature_c is not None and state.temperature_c > hottest:
        return f"{state.temperature_c:.0f} °C, learning {stops} at {hottest:.0f}"
    memory = config.min_free_mb * (1.1 if waiting else 1.0) - LEARNER_MB * learning
    if state.free_mb is not None and state.free_mb < memory:
        return f"{state.free_mb:.0f} MB free, learning needs {memory:.0f}"
    most = max(config.max_cpu_load - 0.1, config.max_cpu_load / 2) if waiting else config.max_cpu_load
    own = 1 / state.cores if learning and not waiting else 0.0
    if config.max_cpu_load and state.cpu_load is not None and state.cpu_load - own > most:
        return f"load of {state.cpu_load - own:.2f}, learning {stops} at {most:.2f}"
    return _quiet(state.local_minute, config) or _used_up(_today(spent, now), config)


def _quiet(minute: int | None, config: ResourceConfig) -> str:
    for text in config.quiet_hours:
        start, end = _quiet_minutes(text)
        if minute is not None and (start <= minute < end if start < end else minute >= start or minute < end):
            return f"quiet hours {text}, it is {minute // 60:02}:{minute % 60:02}"
    return ""


def _used_up(today: Spent, config: ResourceConfig) -> str:
    for used, limit, what in (
        (today.seconds, config.seconds_per_day, "s of learning"),
        (today.joules, config.joules_per_day, "J of learning"),
        (today.flash_bytes, config.flash_bytes_per_day, "bytes written"),
    ):
        if limit and used >= limit:
            return f"{used:.0f} of {limit:.0f} {what} today"
    return ""


def spend(spent: Spent, now: float, *, watts: float, seconds: float = 0.0, flash_bytes: int = 0) -> Spent:
    """What the day took, and this as well.

    A new day (UTC) starts at zero. A clock that is set back changes nothing: what is used stays used, also when it is
    put right on the same day, as on a board that wakes up in 1970. On later days that it had passed before, it starts
    at zero as on any other.

    Args:
        spent: Before.
        now: Seconds since the epoch.
        watts: Power of a busy core.
        seconds: CPU time to add.
        flash_bytes: Written bytes to add.
    """
    today = _today(spent, now)
    return msgspec.structs.replace(
        today,
        seconds=today.seconds + seconds,
        joules=today.joules + seconds * watts,
        flash_bytes=today.flash_bytes + flash_bytes,
    )


def _today(spent: Spent, now: float) -> Spent:
    day = int(now // DAY_S)
    if day > spent.day and day != spent.latest:
        return Spent(day=day, latest=max(day, spent.latest))
    return msgspec.structs.replace(spent, day=day)


def check_policy(config: DeviceConfig) -> None:
    """Check what the types of the settings leave open.

    Raises:
        ConfigError: A list of triggers is empty, or quiet hours are not of the form "HH:MM-HH:MM".
    """
    if () in config.policy.triggers:
        raise ConfigError(
            'policy.triggers: one of its lists is empty; name what must call for learning, as in [["drift", "volume"]]'
        )
    for text in config.resources.quiet_hours:
        _quiet_minutes(text)


@cache
def _quiet_minutes(text: str) -> tuple[int, int]:
    """Start and end in minutes since midnight."""
    match = _HOURS.fullmatch(text)
    hours = [int(part) for part in match.groups()] if match else [0] * 4
    start, end = 60 * hours[0] + hours[1], 60 * hours[2] + hours[3]
    if start == end:
        raise ConfigError(f'resources.quiet_hours: {text!r} is not of the form "HH:MM-HH:MM" with two different times')
    return start, end
