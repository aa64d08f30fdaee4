"""What is known of the fleet as a whole: reads the records, asks pure functions, keeps the state of the drift test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from edge_sdk.clock import Clock, is_due
from edge_sdk.drift.reference import Reference
from edge_sdk.errors import ArtifactError, ConfigError
from edge_sdk.manifest import REFERENCE_NPZ, Manifest, parse_manifest
from edge_sdk.messages import Report
from edge_sdk.messages import Summary as SummaryMessage
from edge_sdk.stats import share_of
from edge_server.fleet import Baseline, merge_summaries
from edge_server.fleet_drift import ALL, Finding, FleetDrift, Observed, Onset, advance, parse_suspects
from edge_server.fleet_views import FleetView
from edge_server.fleet_words import Local, advice, in_words, local_drift
from edge_server.freshness import Cell, Freshness, freshness
from edge_server.labels import FIELDS, parse
from edge_server.releases import BlobStore
from edge_server.settings import Settings
from edge_server.store import Store

ROWS_A_TURN = 5_000
"""Reports read in one turn: so many take about 50 ms."""
_STATE = "drift"
_DAY_S = 86_400.0
_HOURS_S = 2 * 3600.0
"""A summary of more is one of a day."""


class _Kept(msgspec.Struct):
    """What goes from one window to the next; persisted in the transaction that closes a window."""

    drift: FleetDrift = FleetDrift()
    report: int = 0
    """Number of the last report that was counted."""
    event: int = 0


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Findings that most likely have one cause."""

    episode: int
    cohort: str
    """That is named: the one in which most devices raised an alarm, or all."""
    scope: str
    kind: str
    raised: float
    """Seconds since the epoch."""
    words: str
    advice: str
    findings: list[Finding]
    """Strongest first."""


class DriftReport(msgspec.Struct, frozen=True, kw_only=True):
    """Drift of the fleet, and of single devices."""

    end: float
    """Of the last window, seconds since the epoch; 0: there was none yet."""
    false_alarms_per_day: float
    """That the test may raise."""
    causes: list[Cause]
    local: Local
    """In the windows of the look-back."""


class Window:
    """The reports and alarms of one window, by device."""

    def __init__(self) -> None:
        self._hours: dict[str, float] = {}
        self._budget: dict[str, dict[str, float]] = {}
        self._up: dict[str, frozenset[str]] = {}
        self._onsets: dict[str, list[Onset]] = {}
        self._cells: dict[tuple[str, int, int, int], Cell] = {}

    def add_report(self, device: str, report: Report) -> None:
        """Count what the report allows of false alarms."""
        self._hours[device] = self._hours.get(device, 0.0) + max(0.0, report.end - report.start) / 3600
        budget = self._budget.setdefault(device, {})
        for monitor in report.monitors:
            if monitor.threshold > 0:
                budget[monitor.name] = budget.get(monitor.name, 0.0) + report.predictions / monitor.threshold
        self._up[device] = frozenset(monitor.name for monitor in report.monitors if monitor.alarm)
        if report.release:
            key = (device, report.release, report.head, int(report.start // _DAY_S))
            cell = self._cells.get(key) or Cell(*key, 0, 0, 0, report.start)
            self._cells[key] = Cell(
                *key,
                cell.predictions + report.predictions,
                cell.labelled + report.labelled,
                cell.correct + report.correct,
                min(cell.start, report.start),
            )

    def add_onset(self, onset: Onset) -> None:
        """Count an alarm."""
        self._onsets.setdefault(onset.device, []).append(onset)

    @property
    def cells(self) -> list[Cell]:
        """What versions did on a day."""
        return list(self._cells.values())

    def observed(self, cohorts: Mapping[str, tuple[str, ...]]) -> Iterator[Observed]:
        """Every device that is known and was heard of."""
        for device in sorted(self._hours.keys() | self._onsets.keys()):
            if device in cohorts:
                yield Observed(
                    device,
                    cohorts[device],
                    self._hours.get(device, 0.0),
                    self._budget.get(device, {}),
                    self._up.get(device, frozenset()),
                    tuple(self._onsets.get(device, ())),
                )


class Insight:
    """The analysis of the fleet. To be used by one thread at a time.

    Args:
        store: The records.
        blobs: Files of the releases, for their references.
        settings: Of the coordinator.
        clock: Where the time comes from.
    """

    def __init__(self, store: Store, blobs: BlobStore, *, settings: Settings, clock: Clock) -> None:
        self._store, self._blobs, self._clock = store, blobs, clock
        self._rules, self._costs = settings.fleet, settings.costs
        self._window: tuple[_Kept, Window, int, int] | None = None
        self._ended: float | None = None

    # ---- the drift test

    def turn(self) -> bool:
        """Go on with the window that is due, at most `ROWS_A_TURN` reports; True: a window was closed.

        Raises:
            StoreError: Nothing was kept; the window will be closed later.
        """
        now = self._clock.now()
        if self._window is None:
            if self._ended is not None and not is_due(now, self._ended, self._rules.window_s):
                return False
            if (kept := self._begun(now)) is None:
                return False
            self._window = kept, Window(), *self._store.fleet.marks()
        kept, window, to, events = self._window
        rows = self._store.fleet.reports(after=kept.report, to=to, limit=ROWS_A_TURN)
        for number, device, report in rows:
            window.add_report(device, report)
            kept.report = number
        if len(rows) == ROWS_A_TURN:
            return False
        self._window = None
        for device, at, detail in self._store.fleet.events_between("drift_alarm", after=kept.event, to=events):
            window.add_onset(_onset(device, at, detail))
        with self._store.transaction():
            kept.drift = advance(kept.drift, window.observed(self._cohorts()), self._rules, end=now)
            kept.event = events
            self._store.fleet.add_cells(window.cells)
            self._store.fleet.keep(_STATE, msgspec.json.encode(kept))
        self._ended = now
        return True

    def _begun(self, now: float) -> _Kept | None:
        """What the window begins with; None: not yet. What came before the first one is not looked at."""
        kept = self._kept()
        if not kept.drift.end:
            kept.report, kept.event = self._store.fleet.marks()
            kept.drift = FleetDrift(end=now)
            with self._store.transaction():
                self._store.fleet.keep(_STATE, msgspec.json.encode(kept))
        self._ended = kept.drift.end
        return kept if is_due(now, self._ended, self._rules.window_s) else None

    def _kept(self) -> _Kept:
        body = self._store.fleet.state(_STATE)
        return msgspec.json.decode(body, type=_Kept) if body else _Kept()

    def _cohorts(self) -> dict[str, tuple[str, ...]]:
        """Of each device, such as "group=default"."""
        return {
            device: tuple(f"{name}={told[name]}" for name in self._rules.cohorts if told.get(name))
            for device, told in self._store.fleet.members().items()
        }

    def drift(self) -> DriftReport:
        """What goes on, as of the last window."""
        state, cohorts = self._kept().drift, self._cohorts()
        since = state.end - self._rules.look_back * self._rules.window_s
        found = [_onset(*row) for row in self._store.fleet.events_since("drift_alarm", received=since)]
        return DriftReport(
            end=state.end,
            false_alarms_per_day=self._rules.alarms_per_day,
            causes=causes(state.findings),
            local=local_drift((onset for onset in found if onset.device in cohorts), state, cohorts),
        )

    # ---- the data

    def view(
        self,
        *,
        by: str = ALL,
        since: float,
        until: float | None = None,
        where: str = "",
        sample: int | None = None,
    ) -> list[FleetView]:
        """The fleet's summaries added up, by group and reference.

        Args:
            by: "all", "hour", "day", "device", "release", "group", "hw", or a label.
            since: Seconds since the epoch.
            until: The same; None: now.
            where: Only devices of which this label query is true; "": all.
            sample: At most so many devices, always the same ones: a summary takes a quarter of a millisecond.

        Raises:
            ConfigError: Nobody is told apart by that, or it is no query.
        """
        members = self._store.fleet.members()
        known = {ALL, "hour", "day", "device", *FIELDS, *(name for told in members.values() for name in told)}
        if by not in known:
            raise ConfigError(f"devices cannot be told apart by {by!r}; there are {', '.join(sorted(known))}")
        until = self._clock.now() if until is None else until
        query = parse(self._store.segments.spell_out(where)) if where else None
        chosen = [name for name, told in members.items() if query is None or query.matches(told)]
        if sample is not None:
            chosen = sorted(chosen, key=lambda name: share_of(name, "fleet view"))[:sample]
        baselines: dict[str, Baseline] = {}

        def baseline(reference: str, release: int) -> Baseline:
            baselines[reference] = self._baseline(reference, release)
            return baselines[reference]

        summaries = self._store.fleet.summaries(chosen, since=since, until=until)
        found = merge_summaries(summaries, _grouping(by, members), baseline)
        return [found[key].view(key[0], baselines[key[1]]) for key in sorted(found)]

    def _baseline(self, reference: str, release: int) -> Baseline:
        manifest = self._manifest(release)
        entry = manifest.files.get(REFERENCE_NPZ) if manifest else None
        path = self._blobs.path(entry.sha256) if entry else None
        if path is None:
            return Baseline()
        try:
            found = Reference.load(path)
        except ArtifactError:
            return Baseline()
        return Baseline(found if found.digest == reference else None)

    def _manifest(self, release: int) -> Manifest | None:
        records = self._store.releases.find(number=release)
        path = self._blobs.path(records[0].digest) if records else None
        return parse_manifest(path.read_bytes()) if path else None

    # ---- freshness

    def freshness(self) -> Freshness:
        """Accuracy by age of the model, and what a new base would bring and cost."""
        now = self._clock.now()
        newest = self._store.releases.find()
        manifest = self._manifest(newest[0].release) if newest else None
        size = newest[0].size + sum(entry.size for entry in manifest.files.values()) if manifest else 0
        return freshness(
            self._store.fleet.cells(),
            built={record.release: record.pushed for record in self._store.releases.find(limit=1_000)},
            release_bytes=size,
            devices=len(self._store.fleet.members()),
            costs=self._costs,
            now=now,
        )


def causes(findings: Iterable[Finding]) -> list[Cause]:
    """Findings by episode, newest first: each with the cohort that most of its devices are told by."""
    episodes: dict[int, list[Finding]] = {}
    for finding in findings:
        episodes.setdefault(finding.episode, []).append(finding)
    return [_cause(number, own) for number, own in sorted(episodes.items(), reverse=True)]


def _cause(number: int, findings: list[Finding]) -> Cause:
    whole = [finding for finding in findings if finding.cohort == ALL]
    narrow = max(findings, key=lambda finding: (finding.alarmed / finding.at_risk, finding.evidence))
    headline = whole[0] if whole else narrow
    if whole and narrow.alarmed / narrow.at_risk >= 2 * headline.alarmed / headline.at_risk:
        headline = narrow
    return Cause(
        episode=number,
        cohort=headline.cohort,
        scope=headline.scope,
        kind=headline.kind,
        raised=min(finding.raised for finding in findings),
        words=in_words(headline),
        advice=advice(headline),
        findings=findings,
    )


def _onset(device: str, at: float, detail: str) -> Onset:
    told = msgspec.json.decode(detail)
    kind, words, suspects, monitor = (str(told.get(key, "")) for key in ("kind", "words", "suspects", "monitor"))
    return Onset(device, monitor, at, kind, parse_suspects(suspects), words)


def _grouping(by: str, members: Mapping[str, Mapping[str, str]]) -> Callable[[str, SummaryMessage], Iterable[str]]:
    match by:
        case "all":
            return lambda _device, _message: (ALL,)
        case "device":
            return lambda device, _message: (device,)
        case "release":
            return lambda _device, message: (f"release={message.release}",)
        case "hour" | "day":
            return lambda _device, message: (_when(message, by),)
        case _:
            return lambda device, _message: (f"{by}={value}",) if (value := members[device].get(by)) else ()


def _when(message: SummaryMessage, by: str) -> str:
    """The hour or the day of a summary; of one that tells of a day, the day."""
    form = "%Y-%m-%d %H:00" if by == "hour" and message.end - message.start < _HOURS_S else "%Y-%m-%d"
    # of the middle: an hour that ends at 10:00:01 is that from 9 to 10
    return time.strftime(form, time.gmtime((message.start + message.end) / 2))
