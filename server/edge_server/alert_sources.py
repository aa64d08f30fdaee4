"""What holds now, read from the records: the conditions that alerts are made of."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from edge_sdk.errors import ProtocolError
from edge_sdk.messages import Report, unpack
from edge_sdk.stats import wilson_interval
from edge_server.alert_settings import AlertSettings
from edge_server.alerts import Condition, Severity
from edge_server.errors import SigningError
from edge_server.fleet_drift import ALL
from edge_server.insight import DriftReport
from edge_server.keys import Repository
from edge_server.plan import count_devices
from edge_server.rollout import awaits_approval
from edge_server.store import Store
from edge_server.store_alerts import DeviceEvent

_DAY_S = 86_400.0
_URGENT_DAYS = 7.0
_SERIOUS = ("quality", "concept")

_BAD: dict[str, tuple[str, ...]] = {
    "update_failed": ("release_failed", "release_refused", "release_untrusted"),
    "rollback": ("release_rolled_back", "head_rolled_back", "rollback_refused"),
    "clock_untrusted": ("clock_untrusted",),
    "metadata_expiry": ("metadata_expired",),
    "desired_refused": ("desired_refused",),
    "disk_full": ("release_delayed",),
    "outbox_gaps": ("store_lost",),
}
"""Events that are alerts."""
_GOOD: dict[str, tuple[str, ...]] = {
    "update_failed": ("release_activated",),
    "rollback": ("release_confirmed", "confirmed"),
    "clock_untrusted": ("release_activated",),
    "metadata_expiry": ("release_activated",),
    "desired_refused": (),
    "disk_full": ("release_activated",),
    "outbox_gaps": (),
}
"""Events after which they are over."""
_WORDS = {
    "update_failed": "could not take it",
    "rollback": "went back",
    "clock_untrusted": "have a clock that cannot be trusted, and install nothing",
    "metadata_expiry": "find the signed metadata expired, and install nothing",
    "desired_refused": "were told what to run by somebody else, or by an older copy of the coordinator",
    "disk_full": "have no room for a release",
    "outbox_gaps": "lost their database",
}


class Now(msgspec.Struct, frozen=True, kw_only=True):
    """What only the running coordinator knows."""

    lag_s: float = 0.0
    """Age of the newest row that it took in."""
    problem: str = ""
    """Why signed metadata could not be renewed."""


class Sources:
    """Reads the records.

    Args:
        home: The coordinator's folder, for the room on its disk.
        store: The records.
        repository: The signed metadata.
        drift: What is known of drift.
        settings: See `AlertSettings`.
    """

    def __init__(
        self,
        home: Path,
        *,
        store: Store,
        repository: Repository,
        drift: Callable[[], DriftReport],
        settings: AlertSettings,
    ) -> None:
        self._home, self._store, self._repository = home, store, repository
        self._drift, self._settings = drift, settings

    def conditions(self, now: float, known: Now) -> list[Condition]:
        """All that hold, each kind and cause once."""
        found = [
            *self._offline(now),
            *self._events(now),
            *self._reports(now),
            *self._disks(now),
            *self._accuracy(),
            *self._rollouts(now),
            *self._waiting(now),
            *drift_conditions(self._drift(), self._group_of),
            *self._certificates(now),
            *self._metadata(known),
            *self._coordinator(known),
        ]
        return _joined(found)

    def _offline(self, now: float) -> Iterator[Condition]:
        days = self._settings.offline_s / _DAY_S
        rows = self._store.alerts.offline(before=now - self._settings.offline_s)
        yield from _by_group("device_offline", rows, f"not heard of for {days:.3g} days or more")

    def _events(self, now: float) -> Iterator[Condition]:
        names = tuple(dict.fromkeys(name for table in (_BAD, _GOOD) for part in table.values() for name in part))
        events = self._store.alerts.events(names, since=now - self._settings.hold_s)
        yield from event_conditions(events)
        lost = self._store.alerts.gaps(since=now - self._settings.hold_s)
        rows = sum(count for _, _, count in lost)
        yield from _by_group(
            "outbox_gaps", [(group, device) for group, device, _ in lost], f"dropped {rows} rows that were never sent"
        )

    def _reports(self, now: float) -> Iterator[Condition]:
        """Clocks that are ahead, and processes that have grown."""
        ahead, large = [], []
        limit = self._settings.max_rss_mb
        for group, device, seconds, body in self._store.alerts.last_reports(since=now - _DAY_S):
            if seconds > self._settings.clock_ahead_s:
                ahead.append((group, device))
            if limit and _memory(body) > limit:
                large.append((group, device))
        yield from _by_group(
            "clock_untrusted", ahead, f"have a clock {self._settings.clock_ahead_s:.0f} s or more ahead"
        )
        yield from _by_group("memory_low", large, f"take more than {limit:.0f} MB of memory")

    def _disks(self, now: float) -> Iterator[Condition]:
        least = self._settings.min_device_disk_mb
        machines = self._store.devices.machines(since=now - _DAY_S)
        low = [(group, device) for group, device, free, *_ in machines if free is not None and free < least]
        yield from _by_group("disk_low", low, f"have less than {least:.0f} MB left on their disk")

    def _accuracy(self) -> Iterator[Condition]:
        floor = self._settings.accuracy_floor
        low = [
            (group, device)
            for group, device, right, labelled in self._store.alerts.scored()
            if wilson_interval(right, labelled)[1] < floor
        ]
        yield from _by_group("accuracy_below", low, f"are right in less than {100 * floor:.0f} % of their answers")

    def _rollouts(self, now: float) -> Iterator[Condition]:
        newest: dict[str, bool] = {}
        for rollout in self._store.rollouts.find():
            seen, newest[rollout.plan.group] = newest.get(rollout.plan.group, False), True
            state = rollout.state
            if seen or state.status not in ("rolling_back", "rolled_back") or state.reason.startswith("aborted"):
                continue
            if state.status == "rolled_back" and now - state.stage_started > self._settings.hold_s:
                continue
            yield Condition(
                kind="rollout_halted",
                cause=f"rollout {rollout.id}",
                severity="critical",
                words=f"rollout {rollout.id} of release {rollout.plan.release} to {rollout.plan.group}: {state.reason}",
            )

    def _waiting(self, now: float) -> Iterator[Condition]:
        """Rollouts that go no further without a person."""
        for rollout in self._store.rollouts.find(active=True):
            state, of = rollout.state, f"release {rollout.plan.release} to {rollout.plan.group}"
            since = now - (now if state.held_since is None else state.held_since)
            if state.paused and since >= self._settings.paused_s:
                cause, words = "paused", f"has been paused for {since / 3600:.0f} hours"
            elif awaits_approval(state, rollout.plan) and not state.paused:
                cause, words = f"stage {state.stage + 1}", f"waits for a person to approve stage {state.stage + 1}"
            else:
                continue
            yield Condition(
                kind="rollout_waits",
                cause=f"rollout {rollout.id}: {cause}",
                severity="warning",
                words=f"rollout {rollout.id} of {of} {words}",
            )

    def _certificates(self, now: float) -> Iterator[Condition]:
        days = self._settings.certificate_days
        ending = [record.device for record in self._store.certificates.to_renew(before=now + days * _DAY_S)]
        rows = [(self._group_of(device), device) for device in ending]
        yield from _by_group("certificate_expiry", rows, f"have a certificate that ends within {days:.3g} days")

    def _metadata(self, known: Now) -> Iterator[Condition]:
        if known.problem:
            yield Condition(kind="metadata_expiry", cause="signing", severity="critical", words=known.problem)
        if not self._repository.exists:
            return
        try:
            days = self._repository.root_left_s() / _DAY_S
        except SigningError as error:
            yield Condition(kind="metadata_expiry", cause="root", severity="critical", words=str(error))
            return
        if days < self._settings.root_days:
            severity: Severity = "critical" if days < _URGENT_DAYS else "warning"
            yield Condition(
                kind="metadata_expiry",
                cause="root",
                severity=severity,
                words=f"the root is good for {days:.0f} more days: edge-coordinator keys renew",
            )

    def _coordinator(self, known: Now) -> Iterator[Condition]:
        if known.lag_s > self._settings.behind_s:
            yield Condition(
                kind="coordinator_behind",
                cause="coordinator",
                severity="critical",
                words=f"the newest rows taken in were {known.lag_s:.0f} s old",
            )
        free_mb = shutil.disk_usage(self._home).free / 1e6
        if free_mb < self._settings.min_disk_mb:
            yield Condition(
                kind="disk_full",
                cause="coordinator",
                severity="critical",
                words=f"{free_mb:.0f} MB are left on the coordinator's disk",
            )

    def _group_of(self, device: str) -> str:
        record = self._store.devices.get(device)
        return record.group if record else ""


def event_conditions(events: Iterable[DeviceEvent]) -> Iterator[Condition]:
    """Of devices whose last word about something was a bad one.

    Args:
        events: Oldest first.
    """
    last: dict[tuple[str, str], DeviceEvent] = {}
    for event in events:
        for kind, bad in _BAD.items():
            if event.name in bad:
                last[kind, event.device] = event
            elif event.name in _GOOD[kind]:
                last.pop((kind, event.device), None)
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (kind, device), event in last.items():
        members[kind, _cause(kind, event)].append(device)
    for (kind, cause), devices in members.items():
        yield Condition(
            kind=kind,
            cause=cause,
            severity="info" if cause.startswith("learned heads") else "warning",
            words=f"{cause}: {count_devices(len(devices))} {_WORDS[kind]}",
            members=tuple(sorted(devices)),
        )


def _cause(kind: str, event: DeviceEvent) -> str:
    if event.name == "head_rolled_back":
        return f"learned heads in group {event.group}"
    if kind in ("update_failed", "rollback") and event.subject is not None:
        return f"release {event.subject}"
    return f"group {event.group}"


def drift_conditions(report: DriftReport, group_of: Callable[[str], str]) -> Iterator[Condition]:
    """Of what the drift test found."""
    for cause in report.causes:
        yield Condition(
            kind="drift_fleet",
            cause=f"episode {cause.episode}",
            severity="critical" if cause.scope == "fleet" else "warning",
            words=f"{'all devices' if cause.cohort == ALL else cause.cohort}: {cause.words} {cause.advice}",
            members=tuple(dict.fromkeys(name for finding in cause.findings for name in finding.examples)),
        )
    own: dict[tuple[str, Severity], dict[str, str]] = defaultdict(dict)
    for onset in report.local.onsets:
        # of one broken sensor a person has to know; of other drift of one device the device takes care
        severity: Severity = "warning" if onset.kind in _SERIOUS else "info"
        own[group_of(onset.device), severity].setdefault(onset.device, onset.words or onset.monitor)
    for (group, severity), devices in own.items():
        name, words = next(iter(devices.items()))
        yield Condition(
            kind="drift_local",
            cause=f"group {group}" if severity == "info" else f"group {group}: data or answers",
            severity=severity,
            words=f"{count_devices(len(devices))} of group {group} drift by themselves "
            f"({report.local.expected:.1f} false alarms expected in the fleet); {name}: {words}",
            members=tuple(sorted(devices)),
        )


def _by_group(
    kind: str, rows: Iterable[tuple[str, str]], words: str, *, severity: Severity = "warning"
) -> Iterator[Condition]:
    members: dict[str, list[str]] = defaultdict(list)
    for group, device in rows:
        members[group].append(device)
    for group, devices in members.items():
        yield Condition(
            kind=kind,
            cause=f"group {group}",
            severity=severity,
            words=f"group {group}: {count_devices(len(devices))} {words}",
            members=tuple(devices),
        )


def _joined(conditions: Iterable[Condition]) -> list[Condition]:
    """One for each kind and cause: two sources may tell of one."""
    found: dict[tuple[str, str], Condition] = {}
    for condition in conditions:
        key = (condition.kind, condition.cause)
        if (before := found.get(key)) is not None:
            condition = msgspec.structs.replace(  # noqa: PLW2901
                before,
                words=f"{before.words}; {condition.words}",
                members=tuple(dict.fromkeys((*before.members, *condition.members))),
            )
        found[key] = condition
    return list(found.values())


def _memory(body: bytes) -> float:
    try:
        return unpack(body, Report).rss_mb
    except ProtocolError:
        return 0.0
