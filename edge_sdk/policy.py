"""Learn now? A pure decision from what the device knows, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.config import PolicyConfig


@dataclass(frozen=True, slots=True)
class Signals:
    """What may be a reason to learn.

    Attributes:
        alarms: Names of the drift monitors whose alarm is up.
        fresh_rows: Labelled samples not learned from yet.
        accuracy: Recent live accuracy, or None while too few labels have come.
        since_last_s: Since learning last ended, or None if it never ran.
        demand: Why it should start whatever the cool-down says, or "".
    """

    alarms: tuple[str, ...]
    fresh_rows: int
    accuracy: float | None
    since_last_s: float | None
    demand: str


@dataclass(frozen=True, slots=True)
class ResourceState:
    """What the machine can spare. None: unknown, which never forbids.

    Attributes:
        battery: Charge, 0 to 1.
        on_mains: Whether it is plugged in.
        temperature_c: Hottest sensor.
        free_mb: Memory that can be used.
    """

    battery: float | None = None
    on_mains: bool | None = None
    temperature_c: float | None = None
    free_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to learn now, and why or why not."""

    learn: bool
    reason: str
    wanted: bool = False
    """There was a reason to learn; if `learn` is False, `reason` says what stood against it."""


def decide(signals: Signals, resources: ResourceState, config: PolicyConfig) -> Decision:
    """Decide on learning: a reason, enough new rows, the cool-down over, and resources to spare."""
    reasons = _reasons(signals, config)
    if not reasons:
        return Decision(learn=False, reason="nothing calls for it")
    why = "; ".join(reasons)
    if signals.fresh_rows < config.min_fresh_rows:
        return _wait(why, f"{signals.fresh_rows} of {config.min_fresh_rows} new labelled rows")
    if not signals.demand and signals.since_last_s is not None and signals.since_last_s < config.cooldown_s:
        return _wait(why, f"cool-down of {config.cooldown_s:g} s")
    if obstacle := _obstacle(resources, config):
        return _wait(why, obstacle)
    return Decision(learn=True, reason=why, wanted=True)


def _reasons(signals: Signals, config: PolicyConfig) -> list[str]:
    reasons = [f"{name} drift" for name in signals.alarms]
    if signals.accuracy is not None and signals.accuracy < config.accuracy_target:
        reasons.append(f"accuracy {signals.accuracy:.3f} below {config.accuracy_target:g}")
    if signals.fresh_rows >= config.volume_rows:
        reasons.append(f"{signals.fresh_rows} new labelled rows")
    due = signals.since_last_s is None or signals.since_last_s >= config.schedule_s
    if config.schedule_s and signals.fresh_rows and due:
        reasons.append("schedule")
    if signals.demand:
        reasons.append(signals.demand)
    return reasons


def _obstacle(resources: ResourceState, config: PolicyConfig) -> str:
    if resources.on_mains is False and resources.battery is not None and resources.battery < config.min_battery:
        return f"battery at {resources.battery:.0%}, learning needs {config.min_battery:.0%}"
    if resources.temperature_c is not None and resources.temperature_c > config.max_temperature_c:
        return f"{resources.temperature_c:.0f} °C, learning stops at {config.max_temperature_c:.0f}"
    if resources.free_mb is not None and resources.free_mb < config.min_free_mb:
        return f"{resources.free_mb:.0f} MB free, learning needs {config.min_free_mb:.0f}"
    return ""


def _wait(why: str, obstacle: str) -> Decision:
    return Decision(learn=False, reason=f"{why}: waits for {obstacle}", wanted=True)
