"""What will happen to each device of a simulated fleet, decided by the seed before the first tick.

`prepare` reads and checks a scenario, opens its data, and works out one `DevicePlan` for each device. An engine only
has to follow the plans. Times are seconds since the start.
"""

from __future__ import annotations

import bisect
import math
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edge_sdk.clock import Clock
from edge_sdk.config import DeviceConfig
from edge_sdk.errors import ConfigError
from edge_sdk.manifest import Manifest
from edge_sdk.policy import ResourceState
from edge_sdk.scenario import (
    BatteryConfig,
    Cohort,
    LabelConfig,
    NetworkConfig,
    PoisonConfig,
    Scenario,
    checkpoint_manifest,
    cohort_sizes,
    device_config,
    fault,
    load_scenario,
    named_cohorts,
)
from edge_sdk.streams import HOUR_S, Drift, ScriptedStream, World
from edge_sdk.types import AnyArray, Truth
from edge_sdk.worlds import open_world

DAY_S = 86_400.0


# ---- what happens to one device


class LateLabel(NamedTuple):
    """What somebody says about a prediction.

    Attributes:
        row: Place of the sample in what was drawn.
        due_s: When it is said.
        label: What is said, which may be wrong.
    """

    row: int
    due_s: float
    label: Truth


class LateLabels:
    """Who tells a device the truth, or not: late, by mistake wrong, within a budget, or lying.

    Args:
        plan: The device's.
        world: The data.
    """

    def __init__(self, plan: DevicePlan, world: World) -> None:
        self._label, self._poison, self._world = plan.label, plan.poison, world
        self._others = plan.labels or world.labels  # that a wrong one is taken from
        self._rng, self._errors = plan.rng("labels"), plan.rng("errors")
        self._day, self._told = -1, 0

    def draw(self, y: AnyArray, time_s: float) -> list[LateLabel]:
        """What will be said about samples drawn at a time.

        Args:
            y: What each sample really is at that time (a concept drift included), as in `Pool`.
            time_s: When it was predicted; never earlier than in the call before.
        """
        truths = self._world.truths(y)
        seen = self._seen(y) if self._label.error else truths
        told, late, wrong, lies, which = self._rng.random((5, len(y)))  # always as many: one setting moves no other
        day = int(time_s // DAY_S)
        if day != self._day:
            self._day, self._told = day, 0
        said = []
        for row in np.flatnonzero(told < self._label.share).tolist():
            if self._label.per_day and self._told >= self._label.per_day:
                break
            self._told += 1
            label = seen[row]
            if wrong[row] < self._label.noise:
                label = self._other(label, which[row])
            if self._poison is not None and time_s >= self._poison.from_h * HOUR_S and lies[row] < self._poison.labels:
                label = self._lie(truths[row], which[row])
            delay_h = self._label.delay_h - self._label.delay_spread_h * math.log1p(-late[row])
            said.append(LateLabel(row, time_s + delay_h * HOUR_S, label))
        return said

    def _seen(self, y: AnyArray) -> list[Truth]:
        """Numbers as somebody reads them off."""
        off = self._errors.normal(0, self._label.error, y.shape) * self._world.spreads
        return self._world.truths(y + off)

    def _lie(self, truth: Truth, chance: float) -> Truth:
        assert self._poison is not None
        if self._poison.kind == "target":
            return self._poison.label
        if self._poison.kind == "random":
            return self._other(truth, chance)
        place = self._others.index(truth) if truth in self._others else -1
        return self._others[(place + 1) % len(self._others)]

    def _other(self, truth: Truth, chance: float) -> Truth:
        if self._world.targets:
            row = int(chance * len(self._world.pool.y))
            return self._world.truths(self._world.pool.y[row : row + 1])[0]
        others = [label for label in self._others if label != truth]
        return others[int(chance * len(others))] if others else truth


@dataclass(frozen=True)
class DevicePlan:
    """Everything that will happen to one device. Times are in seconds since the start.

    Attributes:
        name: Of the device.
        cohort: Name of its cohort.
        number: Its number in the cohort, from 0.
        config: Its settings, name and seed included.
        drifts: Its script, with the beginnings that were drawn for it.
        labels: Those that occur until a drift brings others; empty: all.
        predictions_per_h: Its rate.
        label: How its labels come.
        poison: How it is lied to; None: it is not.
        offline: Times without a network, in order and apart: (from, to).
        lost_at_s: From when on it is gone; infinite: never.
        skew_s: By how much its clock is ahead at the start.
        clock_rate: What a second adds to that.
        power: Charge at the times at which its course bends, in order: (time, charge, whether it is at the charger from
            then on); empty: it is on mains.
    """

    name: str
    cohort: str
    number: int
    config: DeviceConfig
    drifts: tuple[Drift, ...]
    labels: tuple[str, ...]
    predictions_per_h: float
    label: LabelConfig
    poison: PoisonConfig | None
    offline: tuple[tuple[float, float], ...]
    lost_at_s: float
    skew_s: float
    clock_rate: float
    power: tuple[tuple[float, float, bool], ...]
    seed: int

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of its own for each purpose, from its beginning.

        It depends on the seed, the cohort's name and the number in it: other cohorts and purposes change nothing.
        """
        return _rng(self.seed, self.cohort, self.number, purpose)

    def stream(self, world: World) -> ScriptedStream:
        """Its samples."""
        return ScriptedStream(world, rng=self.rng("stream"), drifts=self.drifts, labels=self.labels or None)

    def late_labels(self, world: World) -> LateLabels:
        """Who tells it the truth."""
        return LateLabels(self, world)

    def predictions(self, from_s: float, to_s: float) -> int:
        """Predictions due from one time to another; they add up over ticks of any length."""
        per_s = self.predictions_per_h / HOUR_S
        return math.floor(to_s * per_s + 1e-9) - math.floor(from_s * per_s + 1e-9)

    def online(self, time_s: float) -> bool:
        """Whether the network is there. A device that is off or lost has no use for it."""
        place = bisect.bisect_right(self.offline, (time_s, math.inf)) - 1
        return place < 0 or time_s >= self.offline[place][1]

    def is_on(self, time_s: float) -> bool:
        """Whether the device runs: it is not lost, and its battery is not empty."""
        return time_s < self.lost_at_s and self.battery(time_s) != (0.0, False)

    def battery(self, time_s: float) -> tuple[float | None, bool]:
        """Charge (0 to 1; None: no battery) and whether it is plugged in."""
        if not self.power:
            return None, True
        place = max(0, bisect.bisect_right(self.power, time_s, key=lambda knot: knot[0]) - 1)
        start, charge, plugged = self.power[place]
        if place + 1 < len(self.power):
            end, next_charge, _ = self.power[place + 1]
            charge += (next_charge - charge) * (time_s - start) / (end - start)
        return charge, plugged

    def resources(self, time_s: float) -> ResourceState:
        """What its resource reader tells. The time of day is the simulation's, whatever the machine's time zone."""
        charge, plugged = self.battery(time_s)
        return ResourceState(battery=charge, on_mains=plugged, local_minute=int(time_s // 60) % 1440)

    def clock_ahead(self, time_s: float) -> float:
        """Seconds by which its clock is ahead (below 0: behind)."""
        return self.skew_s + self.clock_rate * time_s


class SkewedClock:
    """A device's own clock, as wrong as its plan says.

    Args:
        clock: The simulation's.
        plan: The device's.
        started: The simulation's time at the start; None: now.
    """

    def __init__(self, clock: Clock, plan: DevicePlan, *, started: float | None = None) -> None:
        self._clock, self._plan = clock, plan
        self._started = clock.now() if started is None else started

    def now(self) -> float:
        """Seconds since the epoch, as the device believes."""
        now = self._clock.now()
        return now + self._plan.clock_ahead(now - self._started)

    def timer(self) -> float:
        """What the simulation's clock measures."""
        return self._clock.timer()


def _rng(seed: int, *path: str | int) -> np.random.Generator:
    return np.random.default_rng([seed, *(zlib.crc32(part.encode()) if isinstance(part, str) else part
                                          for part in path)])  # fmt: skip


# ---- from the file to the plans


@dataclass(frozen=True)
class Prepared:
    """A scenario that can run.

    Attributes:
        scenario: The file; its paths are absolute.
        manifest: Of the checkpoint that devices start with.
        world: The data.
        devices: What happens to each device, cohort by cohort.
    """

    scenario: Scenario
    manifest: Manifest
    world: World
    devices: tuple[DevicePlan, ...]


def prepare(path: Path, *, devices: int | None = None, seed: int | None = None) -> Prepared:
    """Read a scenario, open its data and plan every device.

    Args:
        path: The TOML file.
        devices: In place of `fleet.devices`.
        seed: In place of `fleet.seed`.

    Raises:
        ConfigError: Anything is wrong with it; the message names the file, the key and what to do.
        MissingExtraError: A package that has the data is not installed.
    """
    scenario = load_scenario(path)
    given = {"devices": devices, "seed": seed}
    changes = {key: value for key, value in given.items() if value is not None}
    return prepare_scenario(msgspec.structs.replace(scenario, fleet=msgspec.structs.replace(scenario.fleet, **changes)))


def prepare_scenario(scenario: Scenario) -> Prepared:
    """The same for a scenario that was read, or made in code with absolute paths. Errors as there."""
    manifest = checkpoint_manifest(scenario, "fleet.checkpoint", scenario.fleet.checkpoint)
    try:
        world = open_world(scenario.data, spec=manifest.input)
    except ConfigError as error:
        raise ConfigError(f"{scenario.file}: {error}" if scenario.file else str(error)) from error
    _check_model(scenario, manifest, world)
    return Prepared(scenario, manifest, world, tuple(plan_devices(scenario, world)))


def plan_devices(scenario: Scenario, world: World) -> list[DevicePlan]:
    """What will happen to each device of a fleet: decided by the seed alone.

    Raises:
        ConfigError: A drift, a poison or a number of devices does not fit; the message names the file and the key.
    """
    plans = []
    for (key, cohort), size in zip(named_cohorts(scenario), cohort_sizes(scenario), strict=True):
        _check_world(scenario, cohort, key, world)
        config = device_config(scenario, cohort, key)
        # parts of the cohort: not each with a chance, so that the share is kept in small ones as well
        lost = _part(scenario.fleet.seed, cohort.name, "lost", cohort.loss.share, size)
        poisoned = _part(scenario.fleet.seed, cohort.name, "poisoned", cohort.poison.share, size)
        for number in range(size):
            name = f"{cohort.name}-{number:0{len(str(size - 1))}}"
            plan = _plan(scenario, cohort, msgspec.structs.replace(config, device=name), number)
            plans.append(replace(plan, lost_at_s=plan.lost_at_s if number in lost else math.inf,
                                 poison=plan.poison if number in poisoned else None))  # fmt: skip
    return plans


def _plan(scenario: Scenario, cohort: Cohort, config: DeviceConfig, number: int) -> DevicePlan:
    """The plan of a device that is lost and poisoned, if its cohort has such devices."""
    seed, duration_s = scenario.fleet.seed, scenario.fleet.duration_h * HOUR_S

    def rng(purpose: str) -> np.random.Generator:
        return _rng(seed, cohort.name, number, purpose)

    starts, clock = rng("drifts"), rng("clock").uniform(-1, 1, 2)
    drifts = tuple(
        msgspec.structs.replace(drift, at_h=drift.at_h + drift.spread_h * starts.random(), spread_h=0.0)
        for drift in (*scenario.drift, *cohort.drift)
    )
    until_h = scenario.fleet.duration_h if cohort.loss.until_h is None else cohort.loss.until_h
    power = () if cohort.battery is None else _power(cohort.battery, rng("battery"), duration_s)
    return DevicePlan(
        name=config.device,
        cohort=cohort.name,
        number=number,
        config=msgspec.structs.replace(config, seed=int(rng("config").integers(2**31))),
        drifts=drifts,
        labels=scenario.data.labels,
        predictions_per_h=cohort.predictions_per_h or scenario.fleet.predictions_per_h,
        label=cohort.label,
        poison=cohort.poison,
        offline=_offline(cohort.network, rng("network"), duration_s),
        lost_at_s=rng("loss").uniform(cohort.loss.from_h, until_h) * HOUR_S,
        skew_s=float(clock[0] * cohort.clock.skew_s),
        clock_rate=float(clock[1] * cohort.clock.drift_ppm * 1e-6),
        power=power,
        seed=seed,
    )


def _part(seed: int, cohort: str, purpose: str, share: float, size: int) -> set[int]:
    """Numbers of a part of a cohort; at least one if the share is above 0."""
    count = max(1, round(share * size)) if share else 0
    return set(_rng(seed, cohort, purpose).permutation(size)[:count].tolist())


def _offline(network: NetworkConfig, rng: np.random.Generator, duration_s: float) -> tuple[tuple[float, float], ...]:
    """Times without a network, in order and apart: an alternating renewal process, and the scripted outages."""
    times = [(outage.at_h * HOUR_S, (outage.at_h + outage.for_h) * HOUR_S) for outage in network.outage]
    if network.online_share == 0:
        return ((0.0, math.inf),)
    if network.online_share < 1:
        off = network.outage_h * HOUR_S
        on = off * network.online_share / (1 - network.online_share)
        time, is_on = 0.0, bool(rng.random() < network.online_share)
        while time < duration_s:
            end = time + rng.exponential(on if is_on else off)
            if not is_on:
                times.append((time, end))
            time, is_on = end, not is_on
    merged: list[tuple[float, float]] = []
    for start, end in sorted(times):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _power(
    battery: BatteryConfig, rng: np.random.Generator, duration_s: float
) -> tuple[tuple[float, float, bool], ...]:
    """The knots of the charge, which is linear between them; the last one holds the charge at the end."""
    late = battery.spread_h * rng.random()
    length = (battery.plug_until_h - battery.plug_from_h) % 24
    bends = [(24 * day + battery.plug_from_h + late + hours) * HOUR_S
             for day in range(-2, math.ceil(duration_s / DAY_S) + 1) for hours in (0, length)]  # fmt: skip
    plugged = sum(bend <= 0 for bend in bends) % 2 == 1  # plugged in and unplugged by turns
    bends = [bend for bend in bends if 0 < bend < duration_s] + [duration_s]
    time, charge = 0.0, battery.start
    knots = []
    for bend in bends:
        knots.append((time, charge, plugged))
        rate = (battery.charge_per_h if plugged else -battery.drain_per_h) / HOUR_S
        full = time + ((1.0 if plugged else 0.0) - charge) / rate  # when it is full, or empty
        if time < full < bend:
            knots.append((full, 1.0 if plugged else 0.0, plugged))
        charge = float(plugged) if full <= bend else charge + rate * (bend - time)
        time, plugged = bend, not plugged
    return (*knots, (time, charge, not plugged))


# ---- checks


def _check_model(scenario: Scenario, manifest: Manifest, world: World) -> None:
    _check_task(scenario, manifest, world)
    taken, given = manifest.input.shape, world.spec.shape
    if len(taken) != len(given) or any(size not in (-1, got) for size, got in zip(taken, given, strict=True)):
        raise fault(scenario.file, "fleet.checkpoint", f"{manifest.name} takes samples of shape {taken}; "
                     f"{scenario.data.source} (data.source) gives {given}")  # fmt: skip
    if not world.targets and not set(manifest.labels) & set(world.labels):
        raise fault(scenario.file, "fleet.checkpoint", f"{manifest.name} knows none of the data's labels "
                     f"({', '.join(world.labels[:10])}), but {', '.join(manifest.labels[:10])}")  # fmt: skip


def _check_task(scenario: Scenario, manifest: Manifest, world: World) -> None:
    """The model predicts what the data tell, and what is expected fits it."""
    if manifest.task not in ("classification", "regression"):
        raise fault(scenario.file, "fleet.checkpoint", f"{manifest.name} has task={manifest.task}; simulations take "
                     "classifiers and regressions: try this one on an EdgeDevice with a ManualClock")  # fmt: skip
    numbers = manifest.task == "regression"
    what = "numbers" if numbers else "labels"
    told, given = (", ".join(names[:10]) for names in (manifest.labels, world.targets or world.labels))
    if numbers != bool(world.targets):
        hint = "; name a table's columns of numbers in data.target_columns" if numbers else ""
        raise fault(scenario.file, "fleet.checkpoint", f"{manifest.name} predicts {what} ({told}); "
                     f"{scenario.data.source} (data.source) gives {'labels' if numbers else 'numbers'} ({given}){hint}",
                    )  # fmt: skip
    if numbers and tuple(manifest.labels) != world.targets:
        raise fault(scenario.file, "fleet.checkpoint", f"{manifest.name} predicts {told}; the data give {given}, and "
                     "the order counts (data.target_columns)")  # fmt: skip
    wrong, right = ("min_accuracy", "max_error") if numbers else ("max_error", "min_accuracy")
    if getattr(scenario.expect, wrong) is not None:
        raise fault(scenario.file, f"expect.{wrong}", f"{manifest.name} predicts {what}; state expect.{right}")


def _check_world(scenario: Scenario, cohort: Cohort, key: str, world: World) -> None:
    """What a cohort says about the data is true of them."""
    fleet_wide = len(scenario.drift)
    try:
        ScriptedStream(world, rng=np.random.default_rng(0), drifts=(*scenario.drift, *cohort.drift),
                       labels=scenario.data.labels or None)  # fmt: skip
    except ValueError as error:
        place, _, text = str(error).partition(": ")
        if not (match := re.fullmatch(r"drift\[(\d+)\]", place)):
            raise fault(scenario.file, "data.labels", str(error)) from error
        number = int(match[1])
        at = f"drift[{number}]" if number < fleet_wide else f"{key}.drift[{number - fleet_wide}]"
        raise fault(scenario.file, at, text) from error
    if world.targets and cohort.poison.share and cohort.poison.kind != "random":
        raise fault(scenario.file, f"{key}.poison.kind", f"{cohort.poison.kind!r} is for labels; the truths of "
                     f'{world.name} are numbers: say kind = "random"')  # fmt: skip
    if cohort.label.error and not world.targets:
        raise fault(scenario.file, f"{key}.label.error", f"it is for numbers; the truths of {world.name} are labels: "
                     "say how many are wrong (noise)")  # fmt: skip
    if cohort.poison.label and cohort.poison.label not in world.labels:
        raise fault(scenario.file, f"{key}.poison.label", f"no label {cohort.poison.label!r}; the data have "
                     f"{', '.join(world.labels[:20])}")  # fmt: skip
