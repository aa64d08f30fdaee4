"""Whether devices drift one by one, or the fleet as one: alarms of many devices against what chance allows. Pure.

Devices raise alarms for themselves, each with a budget of false ones. Here new alarms of each monitor are counted in
windows, over cohorts of devices. A few are local drift: personalise those devices. More at once than the devices' own
budgets and drift of single devices allow is drift of the fleet: a new base is due.

The test is that of `surge`, one stream for each cohort and monitor. In it a device may raise an alarm with the chance
that its own budget allows (rows over the monitor's threshold) plus a rate of local drift, assumed or learned from the
stream's past, whichever is larger. The threshold counts all streams, so that without a drift of the fleet all of them
together raise at most `alarms_per_day` alarms a day on average.

Windows are cut by when the coordinator received things: what devices tell late never changes a window of the past.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edge_server.surge import evidence, fold, sign_p

Scope = Literal["fleet", "scattered"]
"""Alike on the devices, or many devices at once and each in its own way."""

ALL = "all"
"""The cohort of every device."""
MONITORS = 5
"""Of one device, at most."""
_PRIOR_DAYS = 100.0
_MEMORY_S = 30 * 86_400.0
_DAY_S = 86_400.0
_AGREE = 2 / 3
_SHARE = 0.5
_FEW = 3
_EXAMPLES = 10
_SEVERAL = 2
_SEVERAL_SHARE = 0.05
_MAX_SHARED = 64
_MAX_NAMED = 200
_OVER = 0.5


class DriftRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How drift of the fleet is told from chance and from drift of single devices.

    Attributes:
        alarms_per_day: False alarms of the fleet a day, over all cohorts and monitors together.
        window_s: Alarms are counted over so many seconds.
        local_per_day: So often, at least, a device may drift by itself, for each monitor; more is learned.
        correlation: How much devices may have in common within a window without a drift of the fleet. With 0.01, and
            many devices, about a tenth of them has to raise an alarm in one window.
        cohorts: What devices are told apart by: "group", "release", "hw", or a label.
        min_devices: Smaller cohorts are not tested by themselves.
        max_cohorts: Of the largest.
        look_back: Windows that evidence and words are told of.
    """

    alarms_per_day: Annotated[float, Meta(gt=0, le=1)] = 0.01
    window_s: Annotated[float, Meta(gt=0)] = 3600.0
    local_per_day: Annotated[float, Meta(ge=0)] = 0.02
    correlation: Annotated[float, Meta(ge=0, lt=1)] = 0.01
    cohorts: tuple[str, ...] = ("group", "hw", "release")
    min_devices: Annotated[int, Meta(ge=2)] = 5
    max_cohorts: Annotated[int, Meta(ge=1)] = 32
    look_back: Annotated[int, Meta(ge=1)] = 24


class Onset(msgspec.Struct, frozen=True):
    """A device's monitor raised its alarm."""

    device: str
    monitor: str
    time: float
    """By the device's clock, seconds since the epoch."""
    kind: str = ""
    """quality, covariate, prior, concept, or nothing."""
    suspects: tuple[str, ...] = ()
    """What carried it, strongest first, with "+" or "-" behind it for the direction."""
    words: str = ""


class Observed(msgspec.Struct, frozen=True):
    """One device in one window.

    Attributes:
        device: Its name.
        cohorts: Those that it belongs to.
        hours: That its reports cover.
        budget: False alarms that its reports allow, by monitor: rows over threshold.
        up: Monitors whose alarm was up at the end.
        onsets: Alarms raised.
    """

    device: str
    cohorts: tuple[str, ...]
    hours: float
    budget: Mapping[str, float]
    up: frozenset[str] = frozenset()
    onsets: tuple[Onset, ...] = ()


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """One window of one stream."""

    end: float
    devices: int
    """Heard of."""
    at_risk: int
    """Whose alarm was not up already."""
    budget: float
    """False alarms that the devices' own budgets allow."""
    expected: float
    """Alarms that these and local drift allow."""
    alarmed: int
    up: int
    """Devices whose alarm was up at the end."""
    named: dict[str, int] = {}
    """Alarms by what they name among their suspects, with its direction."""
    leading: dict[str, int] = {}
    """Alarms by their strongest suspect, with its direction."""
    kinds: dict[str, int] = {}
    examples: tuple[str, ...] = ()


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Drift of many devices, and what speaks for it."""

    cohort: str
    monitor: str
    scope: Scope
    kind: str
    """As most of the devices say: quality, covariate, prior, concept, or nothing."""
    features: tuple[str, ...]
    """Features, outputs or labels that carry it, strongest first, with "+" or "-" for the direction."""
    shared: tuple[str, ...] = ()
    """All that several devices name, most often named first."""
    raised: float
    """Seconds since the epoch, as the next."""
    since: float
    """Begin of the first window that speaks for it."""
    alarmed: int
    """Devices that raised the alarm since then."""
    at_risk: int
    expected: float
    """Alarms that chance and local drift allow."""
    evidence: float
    """Natural logarithm of the e-detector, as the next."""
    threshold: float
    agreement: float
    """Share of the alarms that name the strongest feature with its direction, 0 to 1."""
    p_direction: float
    """How likely so many of those that name it would agree in direction by chance."""
    peak_share: float
    """Most devices whose alarm was up at once, 0 to 1."""
    examples: tuple[str, ...]
    """Some of the devices."""
    episode: int = 0
    """Findings that began within `look_back` windows of each other have the same number: most likely one cause."""


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """One monitor in one cohort."""

    wealth: tuple[float, ...] = ()
    """Logarithms of the e-detectors, one a tilt; empty: 0."""
    alarms: float = 0.0
    """Seen outside drifts of the fleet, older ones faded; so the days below."""
    days: float = 0.0
    """Device days at risk."""
    windows: tuple[Tally, ...] = ()
    finding: Finding | None = None
    """The drift that goes on."""


class FleetDrift(msgspec.Struct, frozen=True, kw_only=True):
    """All streams, by cohort and monitor with a tab between the two."""

    end: float = 0.0
    """Of the last window, seconds since the epoch."""
    streams: dict[str, Stream] = {}
    episodes: int = 0
    """So many so far."""

    @property
    def findings(self) -> list[Finding]:
        """What goes on, strongest evidence first."""
        found = [stream.finding for stream in self.streams.values() if stream.finding is not None]
        return sorted(found, key=lambda finding: (-finding.evidence, finding.cohort, finding.monitor))


def advance(state: FleetDrift, observed: Iterable[Observed], rules: DriftRules, *, end: float) -> FleetDrift:
    """Take one window into account.

    Args:
        state: Before it.
        observed: The devices that were heard of in it, each once; read once.
        rules: See `DriftRules`.
        end: Of the window, seconds since the epoch.
    """
    sums: dict[str, _Sum] = {}
    sizes: Counter[str] = Counter()
    for device in observed:
        cohorts = (ALL, *device.cohorts)
        sizes.update(cohorts)
        onsets = {onset.monitor: onset for onset in reversed(device.onsets)}
        for monitor in {*device.budget, *onsets}:
            for cohort in cohorts:
                sums.setdefault(f"{cohort}\t{monitor}", _Sum()).add(device, monitor, onsets.get(monitor))
    kept = _kept(sizes, rules)
    tested = {name: total for name, total in sums.items() if name.partition("\t")[0] in kept}
    threshold = math.log(max(1, len(kept)) * MONITORS * _DAY_S / rules.window_s / rules.alarms_per_day)
    streams = {name: stream for name, stream in state.streams.items() if name in tested or _remembered(stream, end)}
    for name, total in sorted(tested.items()):
        streams[name] = _advance(streams.get(name, Stream()), name, total, rules, end=end, threshold=threshold)
    return _numbered(FleetDrift(end=end, streams=streams, episodes=state.episodes), rules)


def _numbered(state: FleetDrift, rules: DriftRules) -> FleetDrift:
    """New findings join an episode that began not long ago, or begin one."""
    recent = [finding for finding in state.findings if finding.episode and finding.raised >= state.end - _span(rules)]
    number = max((finding.episode for finding in recent), default=state.episodes + 1)
    streams = {
        name: msgspec.structs.replace(stream, finding=msgspec.structs.replace(stream.finding, episode=number))
        if stream.finding is not None and not stream.finding.episode
        else stream
        for name, stream in state.streams.items()
    }
    used = any(stream.finding is not None and stream.finding.episode == number for stream in streams.values())
    return FleetDrift(end=state.end, streams=streams, episodes=max(state.episodes, number if used else 0))


def _span(rules: DriftRules) -> float:
    return rules.look_back * rules.window_s


def _kept(sizes: Counter[str], rules: DriftRules) -> set[str]:
    """The largest cohorts; of those with the same devices as all others none is left out, as that is not known here."""
    large = [name for name, size in sizes.items() if size >= rules.min_devices]
    return set(sorted(large, key=lambda name: (-sizes[name], name != ALL, name))[: rules.max_cohorts])


def _remembered(stream: Stream, end: float) -> bool:
    return bool(stream.windows) and end - stream.windows[-1].end < _MEMORY_S


class _Sum:
    """What one window brought to one stream."""

    def __init__(self) -> None:
        self.devices = self.at_risk = self.alarmed = self.up = 0
        self.budget = self.hours = 0.0
        self.named: Counter[str] = Counter()
        self.leading: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.examples: list[str] = []

    def add(self, device: Observed, monitor: str, onset: Onset | None) -> None:
        self.devices += 1
        is_up = monitor in device.up
        self.up += is_up or onset is not None
        if onset is None and is_up:
            return  # it cannot raise it again
        self.at_risk += 1
        self.budget += device.budget.get(monitor, 0.0)
        self.hours += device.hours
        if onset is None:
            return
        self.alarmed += 1
        self.kinds[onset.kind] += 1
        self.leading.update(onset.suspects[:1])
        if len(self.named) < _MAX_NAMED:
            self.named.update(set(onset.suspects))
        if len(self.examples) < _EXAMPLES:
            self.examples.append(device.device)


def _advance(stream: Stream, name: str, total: _Sum, rules: DriftRules, *, end: float, threshold: float) -> Stream:
    days = total.hours / 24
    rate = max(
        rules.local_per_day,
        (rules.local_per_day * _PRIOR_DAYS + stream.alarms) / (_PRIOR_DAYS + stream.days),
    )
    expected = total.budget + rate * days
    tally = Tally(
        end=end,
        devices=total.devices,
        at_risk=total.at_risk,
        budget=total.budget,
        expected=expected,
        alarmed=total.alarmed,
        up=total.up,
        named=dict(total.named),
        leading=dict(total.leading),
        kinds=dict(total.kinds),
        examples=tuple(total.examples),
    )
    windows = (*stream.windows, tally)[-rules.look_back :]
    wealth = fold(stream.wealth, total.alarmed, total.at_risk, expected, rules.correlation)
    found = evidence(wealth)
    finding = _followed(stream.finding, tally)
    if found >= threshold:
        cohort, _, monitor = name.partition("\t")
        fresh = describe(cohort, monitor, windows, found=found, threshold=threshold)
        finding = fresh if finding is None else msgspec.structs.replace(
            fresh,
            raised=finding.raised,
            since=finding.since,
            episode=finding.episode,
            peak_share=max(finding.peak_share, fresh.peak_share),
        )  # fmt: skip
        wealth = ()
    fade = math.exp(-rules.window_s / _MEMORY_S)
    alarms, seen = stream.alarms * fade, stream.days * fade
    if finding is None:
        # a device's own false alarms are in its budget already
        alarms, seen = alarms + max(0.0, total.alarmed - total.budget), seen + days
    return Stream(wealth=wealth, alarms=alarms, days=seen, windows=windows, finding=finding)


def _followed(finding: Finding | None, tally: Tally) -> Finding | None:
    """What goes on still goes on, until fewer than half as many devices as at most have their alarm up."""
    if finding is None or not tally.devices:
        return finding
    share = tally.up / tally.devices
    if share < _OVER * finding.peak_share:
        return None
    return msgspec.structs.replace(finding, peak_share=max(share, finding.peak_share))


def describe(cohort: str, monitor: str, windows: Sequence[Tally], *, found: float, threshold: float) -> Finding:
    """What the windows in which more devices than expected raised an alarm have in common."""
    windows = _speaking(windows)
    named, leading, kinds = (
        sum((Counter(getattr(w, field)) for w in windows), Counter[str]()) for field in ("named", "leading", "kinds")
    )
    alarmed, at_risk = sum(w.alarmed for w in windows), max(w.at_risk for w in windows)
    order = sorted(named, key=lambda name: (-(leading[name] + named[name]), name))
    features = tuple(name for name in order if named[name] >= _SHARE * named[order[0]])[:_FEW]
    several = max(_SEVERAL, _SEVERAL_SHARE * alarmed)
    agreement, p = 0.0, 1.0
    if features:
        same, other = named[features[0]], named[_opposite(features[0])]
        agreement = same / alarmed
        p = sign_p(same, other)
    examples = dict.fromkeys(name for w in windows for name in w.examples)
    return Finding(
        cohort=cohort,
        monitor=monitor,
        scope="fleet" if agreement >= _AGREE else "scattered",
        kind=kinds.most_common(1)[0][0] if kinds else "",
        features=features,
        shared=tuple(name for name in order if named[name] >= several)[:_MAX_SHARED],
        raised=windows[-1].end,
        since=windows[0].end,
        alarmed=alarmed,
        at_risk=at_risk,
        expected=sum(w.expected for w in windows),
        evidence=found,
        threshold=threshold,
        agreement=agreement,
        p_direction=p,
        peak_share=max(w.up / w.devices for w in windows if w.devices),
        examples=tuple(examples)[:_EXAMPLES],
    )


def _speaking(windows: Sequence[Tally]) -> Sequence[Tally]:
    """The latest windows whose sum of alarms is furthest above what was expected."""
    excess = np.cumsum([w.alarmed - w.expected for w in reversed(windows)])
    return windows[len(windows) - 1 - int(excess.argmax()) :]


def _opposite(name: str) -> str:
    return name[:-1] + ("-" if name.endswith("+") else "+")


def parse_suspects(text: str) -> tuple[str, ...]:
    """The suspects of a `drift_alarm`, "acc_x +0.31, acc_y -0.20", as "acc_x+" and "acc_y-"; strongest first."""
    found = []
    for part in text.split(", "):
        name, _, shift = part.rpartition(" ")
        if name and shift[:1] in ("+", "-"):
            found.append(name + shift[0])
    return tuple(found)
