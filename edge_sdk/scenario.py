"""A simulated fleet as a TOML file: what devices there are, what happens to them, and what must come out.

`load_scenario` reads and checks the file; `edge_sdk.plan` makes of it what happens to each device. Times are hours
since the start of the simulation where a key ends in `_h`, seconds where it ends in `_s`.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_sdk.config import DeviceConfig
from edge_sdk.errors import ArtifactError, ConfigError
from edge_sdk.manifest import MANIFEST_NAME, Manifest, parse_manifest
from edge_sdk.policy import check_policy
from edge_sdk.streams import HOUR_S, Drift
from edge_sdk.worlds import DataConfig

Count = Annotated[int, Meta(ge=1)]
Hours = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
HourOfDay = Annotated[float, Meta(ge=0, lt=24)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class FleetConfig(_Section, frozen=True):
    """The fleet as a whole."""

    checkpoint: str
    """Folder of the checkpoint that every device starts with, relative to the scenario file."""
    devices: Count = 20
    """How many."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """Of all chance: the same seed gives the same simulation."""
    duration_h: Positive = 168.0
    """Length of the simulation, in hours of its own time."""
    tick_s: Positive = 300.0
    """Length of a tick, in seconds: samples come and devices act once in each."""
    predictions_per_h: Positive = 60.0
    """Predictions of a device in an hour."""
    settings: str = ""
    """A `device.toml` whose settings every device has, relative to the scenario file; its name, seed and broker do not
    count."""


class LabelConfig(_Section, frozen=True):
    """What becomes known of the truth, and when."""

    share: Share = 0.5
    """Part of the predictions whose truth is told."""
    delay_h: Hours = 0.0
    """Hours that a label takes at least."""
    delay_spread_h: Hours = 0.0
    """What it takes beyond that, on average (exponential), in hours."""
    noise: Share = 0.0
    """Part of the labels that are wrong by mistake: any other label; of numbers: the truth of any other sample."""
    error: Annotated[float, Meta(ge=0)] = 0.0
    """Of numbers: standard deviation of what every label is off by (Gaussian), in standard deviations of its target."""
    per_day: Annotated[int, Meta(ge=0)] = 0
    """Most labels of a device in 24 hours; 0: no limit."""
    source: str = ""
    """The source that labels name, which `config.feedback.sources` may weigh."""


class OutageConfig(_Section, frozen=True):
    """A time without a network, for all devices of the cohort at once."""

    at_h: Hours
    """When it begins, in hours since the start."""
    for_h: Positive
    """How many hours it lasts."""


class NetworkConfig(_Section, frozen=True):
    """When devices can reach the coordinator. What the network itself does is the business of `edge faults`."""

    online_share: Share = 1.0
    """Part of the time that a device is connected."""
    outage_h: Annotated[float, Meta(ge=0.01)] = 1.0
    """Mean length of the times when it is not (exponential), in hours."""
    outage: tuple[OutageConfig, ...] = ()
    """Further times without a network: [[cohort.network.outage]]."""


class BatteryConfig(_Section, frozen=True):
    """A battery and the daily hours at the charger. At charge 0 a device is off."""

    start: Share = 1.0
    """Charge at the start."""
    drain_per_h: Annotated[float, Meta(gt=0, le=1)] = 0.04
    """Charge that an hour takes."""
    charge_per_h: Annotated[float, Meta(gt=0, le=1)] = 0.3
    """Charge that an hour at the charger gives."""
    plug_from_h: HourOfDay = 22.0
    """Hour of the day at which it is plugged in."""
    plug_until_h: HourOfDay = 6.0
    """Hour of the day at which it is unplugged."""
    spread_h: Annotated[float, Meta(ge=0, le=24)] = 0.0
    """Each device's day begins up to so many hours later, drawn for each."""

    def __post_init__(self) -> None:
        """Check that there are hours at the charger.

        Raises:
            ValueError: There are none.
        """
        if self.plug_from_h == self.plug_until_h:
            raise ValueError("plug_from_h and plug_until_h must differ; leave the battery out for devices on mains")


class ClockConfig(_Section, frozen=True):
    """How wrong devices' clocks are."""

    skew_s: Hours = 0.0
    """Each clock is off by up to so many seconds either way, drawn for each."""
    drift_ppm: Hours = 0.0
    """Each clock runs up to so many millionths too fast or too slow, drawn for each."""


class LossConfig(_Section, frozen=True):
    """Devices that vanish for good."""

    share: Share = 0.0
    """Part of the cohort; at least one device if above 0."""
    from_h: Hours = 0.0
    """They vanish at times drawn from here on, in hours since the start."""
    until_h: Positive | None = None
    """To here; without it: to the end."""


class PoisonConfig(_Section, frozen=True):
    """Devices that are told lies."""

    share: Share = 0.0
    """Part of the cohort; at least one device if above 0."""
    kind: Literal["flip", "random", "target"] = "flip"
    """flip: every label becomes the next one, always the same way; random: any other; target: always `label`. Numbers
    have no next one, and no name: of them only random, the truth of any other sample."""
    label: str = ""
    """With target."""
    labels: Share = 1.0
    """Part of a poisoned device's labels that are lies."""
    from_h: Hours = 0.0
    """When the lies begin, in hours since the start."""

    def __post_init__(self) -> None:
        """Check that a target has its label.

        Raises:
            ValueError: It has none, or another kind has one.
        """
        if (self.kind == "target") != bool(self.label):
            raise ValueError('kind = "target" needs `label`, and no other kind has one')


class Cohort(_Section, frozen=True):
    """Devices to which the same happens."""

    name: Name
    """Letters, digits, "_", "." and "-"; devices are called after it: name-0, name-1, ..."""
    share: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Part of the fleet. One cohort may leave out both this and `count`: it has the rest."""
    count: Count | None = None
    """Number of devices, in place of `share`."""
    predictions_per_h: Positive | None = None
    """Predictions of a device in an hour; without it, the fleet's."""
    drift: tuple[Drift, ...] = ()
    """What happens to the data: [[cohort.drift]]."""
    label: LabelConfig = LabelConfig()
    network: NetworkConfig = NetworkConfig()
    battery: BatteryConfig | None = None
    """[cohort.battery]; without it devices are on mains."""
    clock: ClockConfig = ClockConfig()
    loss: LossConfig = LossConfig()
    poison: PoisonConfig = PoisonConfig()
    config: dict[str, Any] = {}
    """[cohort.config]: settings of the devices as in `device.toml`, over those of `[config]`."""


class Release(_Section, frozen=True):
    """A release that is pushed while the simulation runs."""

    checkpoint: str
    """Its folder, relative to the scenario file."""
    at_h: Hours
    """When it is pushed, in hours since the start."""
    bad: bool = False
    """Whether it is known to be bad, so that it must be stopped."""
    group: str = "default"
    """Which devices get it: those whose `config.group` is the same."""
    rollout: dict[str, Any] = {}
    """Rules of its rollout that differ from the coordinator's defaults, as in `[rollout]` of `coordinator.toml`."""


class ReleaseOutcome(NamedTuple):
    """How a release ended.

    Attributes:
        name: What to call it.
        bad: Whether it was known to be bad.
        status: Of its rollout: running, completed, rolling_back (it has been halted) or rolled_back.
    """

    name: str
    bad: bool
    status: str


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation found of what may be expected of it. None: nothing was measured."""

    accuracy: float | None = None
    """Share of right predictions from `min_accuracy_from_h` on, over all devices that are not poisoned."""
    error: float | None = None
    """Of numbers, in place of `accuracy`: mean error from `max_error_from_h` on, as `FleetReport.targets` has it."""
    false_alarms_per_device_day: float | None = None
    """Drift alarms raised while a device's data had never changed, by the device-days in which they had not."""
    bytes_per_device_day: float | None = None
    """Bytes that a device sent, payload, by the days it was there."""
    releases: tuple[ReleaseOutcome, ...] = ()


class Expect(_Section, frozen=True):
    """What must come out; `edge simulate --ci` fails otherwise."""

    min_accuracy: Share | None = None
    """Share of right predictions, over all devices that are not poisoned."""
    min_accuracy_from_h: Hours = 0.0
    """From when on they count, in hours since the start."""
    max_error: Hours | None = None
    """Of numbers, in place of `min_accuracy`: mean absolute error, in standard deviations of each target as the
    checkpoint has them, over all devices that are not poisoned."""
    max_error_from_h: Hours = 0.0
    """From when on it counts, in hours since the start."""
    max_false_alarms_per_device_day: Hours | None = None
    """Drift alarms of devices whose data have not changed yet, by their device-days."""
    max_bytes_per_device_day: Hours | None = None
    """Bytes that a device sends in a day, payload."""
    bad_releases_stop: bool = True
    """Whether every release with `bad = true` must be halted or rolled back."""
    good_releases_complete: bool = False
    """Whether every other release must be completed."""

    def unmet(self, found: Measured) -> list[str]:
        """What did not come out as it must, a line for each, beginning with the key. What was not measured is unmet."""
        lines = []
        for key, value, least in (
            ("min_accuracy", found.accuracy, True),
            ("max_error", found.error, False),
            ("max_false_alarms_per_device_day", found.false_alarms_per_device_day, False),
            ("max_bytes_per_device_day", found.bytes_per_device_day, False),
        ):
            limit = getattr(self, key)
            if limit is None:
                continue
            if value is None:
                lines.append(f"expect.{key}: {limit:g} was stated, nothing was measured")
            elif not (value >= limit if least else value <= limit):
                lines.append(f"expect.{key}: {limit:g} was stated, {value:.6g} came out")
        for release in found.releases:
            if release.bad and self.bad_releases_stop and release.status not in ("rolling_back", "rolled_back"):
                lines.append(f"expect.bad_releases_stop: {release.name} is bad and ended as {release.status!r}")
            if not release.bad and self.good_releases_complete and release.status != "completed":
                lines.append(f"expect.good_releases_complete: {release.name} is good and ended as {release.status!r}")
        return lines


class Scenario(_Section, frozen=True):
    """A whole scenario file."""

    fleet: FleetConfig
    data: DataConfig
    about: str = ""
    """What it shows, in a sentence; stands in the report."""
    config: dict[str, Any] = {}
    """[config]: settings of every device, as in `device.toml`, over those that simulations start from."""
    drift: tuple[Drift, ...] = ()
    """What happens to the data of every device, before its cohort's own drifts: [[drift]]."""
    cohort: tuple[Cohort, ...] = ()
    """[[cohort]]; without one, all devices are alike and called device-0, device-1, ..."""
    release: tuple[Release, ...] = ()
    """[[release]]."""
    expect: Expect = Expect()
    file: str = ""
    """Set by `load_scenario`; no key."""


SIMULATED: dict[str, Any] = {
    "variant": "int8",
    "durability": "normal",
    "learn": {"executor": "inline"},
    "update": {"quiet_s": 0.0},
}
"""Settings that simulations start from: nothing that depends on the machine, no child processes, no waiting for
disks, nor for others to ask for a block, as the clock stands still meanwhile."""
_OWN = ("device", "seed", "broker")
"""Settings that the simulation itself makes."""


# ---- reading


def load_scenario(path: Path) -> Scenario:
    """The scenario in a TOML file; what it leaves out has its default. Its paths are made absolute.

    Raises:
        ConfigError: The file cannot be read, is not TOML, has an unknown, misspelt or impossible value, or names files
            that are not there; the message names the file, the key and what to do.
    """
    raw = _read_toml(path, str(path))
    if "file" in raw:
        raise fault(str(path), "file", "unknown key; leave it out")
    scenario = _convert(raw, Scenario, str(path))
    scenario = _absolute(msgspec.structs.replace(scenario, file=str(path)), path.parent)
    cohorts = named_cohorts(scenario)
    cohort_sizes(scenario)
    groups = {device_config(scenario, cohort, key).group for key, cohort in cohorts}
    _check_times(scenario)
    _check_releases(scenario, groups)
    return scenario


def _read_toml(path: Path, file: str, key: str = "") -> dict[str, Any]:
    where = f"{path}: " if key else ""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fault(file, key, f"{where}{error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise fault(file, key, f"{where}not TOML: {error}") from error
    _check_finite(raw, file, key)
    return raw


def _check_finite(value: Any, file: str, key: str) -> None:
    """TOML knows nan and inf; no setting means anything by them, and a week of infinite length would never end."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_finite(part, file, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _check_finite(part, file, f"{key}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise fault(file, key, f"{value} is no number that could be meant; give a finite one")


# ---- checks


def fault(file: str, key: str, text: str) -> ConfigError:
    """The error that a key of a scenario file is to blame for."""
    return ConfigError(f"{file}: {key}: {text}" if key else f"{file}: {text}")


def named_cohorts(scenario: Scenario) -> list[tuple[str, Cohort]]:
    """Cohorts and the keys to blame for them; one of all devices if there is none."""
    found = [(f"cohort[{number}]", cohort) for number, cohort in enumerate(scenario.cohort)]
    return found or [("config", Cohort(name="device"))]


def cohort_sizes(scenario: Scenario) -> list[int]:
    """Devices of each cohort. Shares are rounded so that they add up: the largest remainders are rounded up.

    Raises:
        ConfigError: They do not make the fleet.
    """
    file, devices, cohorts = scenario.file, scenario.fleet.devices, [cohort for _, cohort in named_cohorts(scenario)]
    names = [cohort.name for cohort in cohorts]
    for number, cohort in enumerate(cohorts):
        if cohort.share is not None and cohort.count is not None:
            raise fault(file, f"cohort[{number}].count", "share is there as well; leave one of them out")
        if cohort.name in names[:number]:
            raise fault(file, f"cohort[{number}].name", f"{cohort.name!r} is the name of another cohort too")
    rest = [number for number, cohort in enumerate(cohorts) if cohort.share is None and cohort.count is None]
    if len(rest) > 1:
        raise fault(file, f"cohort[{rest[1]}].share", "missing; only one cohort may have the rest of the fleet")
    counts = sum(cohort.count or 0 for cohort in cohorts)
    shares = sum(cohort.share or 0 for cohort in cohorts)
    wanted = counts + shares * devices
    if wanted > devices + 1e-6 * devices or (not rest and wanted < devices - 1e-6 * devices):
        hint = "lower them" if wanted > devices else "raise them, or leave out one cohort's to give it the rest"
        raise fault(file, "cohort", f"counts and shares make {wanted:g} of {devices} devices (fleet.devices); {hint}")
    exact = [cohort.count or (cohort.share or 0) * devices for cohort in cohorts]
    sizes = [math.floor(number + 1e-9) for number in exact]
    short = (devices if not rest else counts + round(shares * devices)) - sum(sizes)
    for number in sorted(range(len(sizes)), key=lambda i: (sizes[i] - exact[i], i))[: max(0, short)]:
        sizes[number] += 1
    for number in rest:
        sizes[number] = devices - sum(sizes)
    for number, size in enumerate(sizes):
        if size < 1:
            raise fault(file, f"cohort[{number}].share", f"of {devices} devices it has none; raise fleet.devices")
    return sizes


def device_config(scenario: Scenario, cohort: Cohort, key: str) -> DeviceConfig:
    """Settings of a cohort's devices: those of `fleet.settings`, the simulation's, [config] and [cohort.config].

    Raises:
        ConfigError: One of them is unknown or impossible, or is not the scenario's to say.
    """
    rate = cohort.predictions_per_h or scenario.fleet.predictions_per_h
    parts = [("config", scenario.config)]
    parts += [(f"{key}.config", cohort.config)] if key != "config" else []
    merged = _merge(_settings(scenario), SIMULATED, {"drift": {"rows_per_day": rate * 24}})
    for at, given in parts:
        if own := [name for name in _OWN if name in given]:
            raise fault(scenario.file, f"{at}.{own[0]}", "is made by the simulation; leave it out")
        _convert(given, DeviceConfig, scenario.file, at)
        merged = _merge(merged, given)
    config = _convert(merged, DeviceConfig, scenario.file, parts[-1][0])
    try:
        check_policy(config)
    except ConfigError as error:
        raise fault(scenario.file, parts[-1][0], str(error)) from error
    return config


def _settings(scenario: Scenario) -> dict[str, Any]:
    """What `fleet.settings` says, but for what the simulation makes."""
    if not scenario.fleet.settings:
        return {}
    given = _read_toml(Path(scenario.fleet.settings), scenario.file, "fleet.settings")
    given = {name: value for name, value in given.items() if name not in _OWN}
    _convert(given, DeviceConfig, scenario.file, "fleet.settings")
    return given


def _merge(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested tables put together; the last one that says something is right."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            result[key] = _merge(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def _check_times(scenario: Scenario) -> None:
    """What lies beyond the end never happens: a slip."""
    end = scenario.fleet.duration_h
    times = [(f"drift[{i}].at_h", drift.at_h) for i, drift in enumerate(scenario.drift)]
    times += [(f"release[{i}].at_h", release.at_h) for i, release in enumerate(scenario.release)]
    times += [(f"expect.{key}", getattr(scenario.expect, key)) for key in ("min_accuracy_from_h", "max_error_from_h")]
    for number, cohort in enumerate(scenario.cohort):
        times += [(f"cohort[{number}].drift[{i}].at_h", drift.at_h) for i, drift in enumerate(cohort.drift)]
        times += [
            (f"cohort[{number}].network.outage[{i}].at_h", outage.at_h)
            for i, outage in enumerate(cohort.network.outage)
        ]
        times += [(f"cohort[{number}].{part}.from_h", from_h)
                  for part, from_h in (("loss", cohort.loss.from_h), ("poison", cohort.poison.from_h))]  # fmt: skip
        until_h = cohort.loss.until_h
        if until_h is not None and not cohort.loss.from_h <= until_h <= end:
            raise fault(
                scenario.file,
                f"cohort[{number}].loss.until_h",
                f"{until_h:g} must lie between from_h ({cohort.loss.from_h:g}) and fleet.duration_h ({end:g})",
            )
    for key, time in times:
        if time >= end:
            raise fault(scenario.file, key, f"{time:g} h is not before the end: fleet.duration_h is {end:g}")
    if scenario.fleet.tick_s > end * HOUR_S:
        raise fault(scenario.file, "fleet.tick_s", f"a tick of {scenario.fleet.tick_s:g} s is longer than duration_h")


def _check_releases(scenario: Scenario, groups: set[str]) -> None:
    """Releases are there, go to somebody, and come in the order of their numbers."""
    base = checkpoint_manifest(scenario, "fleet.checkpoint", scenario.fleet.checkpoint)
    newest = dict.fromkeys(groups, base.release)
    for number, release in sorted(enumerate(scenario.release), key=lambda pair: pair[1].at_h):
        key = f"release[{number}]"
        if release.group not in newest:
            raise fault(scenario.file, f"{key}.group", f"no device is in group {release.group!r}; there is "
                         f"{', '.join(map(repr, sorted(groups)))}")  # fmt: skip
        manifest = checkpoint_manifest(scenario, f"{key}.checkpoint", release.checkpoint)
        if manifest.release <= newest[release.group]:
            raise fault(scenario.file, f"{key}.checkpoint", f"it is release {manifest.release}, which is not newer "
                         f"than release {newest[release.group]} before it; give it a higher number")  # fmt: skip
        newest[release.group] = manifest.release


def checkpoint_manifest(scenario: Scenario, key: str, folder: str) -> Manifest:
    """The manifest in a folder that a key names.

    Raises:
        ConfigError: There is none, or it cannot be used.
    """
    try:
        return parse_manifest((Path(folder) / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise fault(scenario.file, key, f"no checkpoint in {folder} ({MANIFEST_NAME}: {error.strerror}); make one with "
                     "edge-quantize, or see examples/scenarios") from error  # fmt: skip
    except ArtifactError as error:
        raise fault(scenario.file, key, f"{folder}: {error}") from error


def _absolute(scenario: Scenario, folder: Path) -> Scenario:
    """Paths relative to the scenario's folder become absolute."""

    def made(path: str) -> str:
        return str((folder / path).resolve()) if path else ""

    replace = msgspec.structs.replace
    fleet = scenario.fleet
    return replace(
        scenario,
        fleet=replace(fleet, checkpoint=made(fleet.checkpoint), settings=made(fleet.settings)),
        data=replace(scenario.data, path=made(scenario.data.path)),
        release=tuple(replace(release, checkpoint=made(release.checkpoint)) for release in scenario.release),
    )


# ---- errors that name the key

_T = typing.TypeVar("_T")


def _convert(raw: dict[str, Any], kind: type[_T], file: str, at: str = "") -> _T:
    """`raw` as a struct.

    Args:
        raw: What the TOML file says.
        kind: The struct.
        file: For messages.
        at: The key under which it stands.

    Raises:
        ConfigError: It does not fit; the message names the file, the key and what would be right.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `")
        path = re.sub(r"^\$\.?", "", place.rstrip("`").split("` in `")[-1])
        key, text = _explain(text, path.replace("[...]", ""), kind)  # a value of a table of any names
        raise fault(file, ".".join(part for part in (at, key) if part), text) from error


def _explain(text: str, path: str, kind: Any) -> tuple[str, str]:
    """The key that is at fault, and what would be right."""
    found = _type_at(kind, path)
    if match := re.fullmatch(r"Object (contains unknown|missing required) field `(.+)`", text):
        key = f"{path}.{match[2]}" if path else match[2]
        if match[1] == "missing required":
            return key, "missing; it has no default"
        known = [name for name in typing.get_type_hints(found) if name != "file"] if found else []
        close = difflib.get_close_matches(match[2], known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(known)}"
        return key, f"unknown key; {hint}"
    if text.startswith("Invalid enum value") and (choices := typing.get_args(found)):
        said = text.removeprefix("Invalid enum value ")
        close = difflib.get_close_matches(said.strip("'"), [str(choice) for choice in choices], 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return path, f"{said} is none of them; {hint}It is one of {', '.join(repr(choice) for choice in choices)}"
    return path, text[:1].lower() + text[1:].replace("`", "")


def _type_at(kind: Any, path: str) -> Any:
    """The type that stands at a path such as cohort[0].drift[1].course; None: that cannot be told."""
    for name, _ in re.findall(r"([A-Za-z_]+)|(\[)", path):
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next((part for part in typing.get_args(kind) if part is not type(None)), None)
        if name and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            kind = typing.get_type_hints(kind).get(name)
        elif not name and typing.get_origin(kind) in (tuple, list, dict):
            kind = [part for part in typing.get_args(kind) if part is not Ellipsis][-1]
        else:
            return None
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next((part for part in typing.get_args(kind) if part is not type(None)), None)
    return kind
