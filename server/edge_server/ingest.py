"""From messages to rows: which are new, which are repeated, which came too early. No input or output.

Rows of one outbox are taken strictly in order. A row that comes too early is not kept: the answer repeats how
far the coordinator is, and the device sends again from there. So every row is stored exactly once, and an
acknowledgement never says more than what was committed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import NamedTuple

import msgspec

from edge_sdk.errors import ProtocolError
from edge_sdk.messages import (
    MAX_SUMMARY_BYTES,
    Ack,
    Envelope,
    Event,
    Gap,
    Need,
    Report,
    State,
    Summary,
    Topics,
    check_cells,
    check_name,
    decode,
    from_buckets,
    from_counts,
    unpack,
)
from edge_sdk.transport import Message

WILL = "lost"
"""Reason of a state that the broker publishes for a device that vanished: written when the device connected, so that
all but this may have changed since."""
_LARGEST = 2**63 - 1  # what the database can hold
_MAX_TEXT = 256
_MAX_UNKNOWN = 1000
_HOUR_S = 3600
_MAX_FEATURES = 64
_MAX_BINS = 64
_MAX_CELLS = 256
_MOMENTS_BYTES = 16


class Verdict(Enum):
    """What to do with a row."""

    ACCEPT = "accept"
    DUPLICATE = "duplicate"
    AHEAD = "ahead"


def expected_seq(last: int | None, oldest: int) -> int:
    """The number the next row must cover.

    Args:
        last: Last committed number of this outbox, or None if nothing is known of it.
        oldest: Lowest number the device still holds.
    """
    return oldest if last is None else max(last + 1, oldest)


def judge(last: int | None, *, first: int, seq: int, oldest: int) -> Verdict:
    """Whether a row that covers `first` to `seq` comes next.

    A gap may begin below what is expected: the device dropped rows without knowing yet that they were committed.
    What is new of it is taken, or the device could never get past it.
    """
    expected = expected_seq(last, oldest)
    if seq < expected:
        return Verdict.DUPLICATE
    return Verdict.AHEAD if first > expected else Verdict.ACCEPT


class ReportRow(NamedTuple):
    """A report that is to be stored, as it stands in the database.

    It holds no more than numbers and bytes: a thousand reports kept whole, each of some thirty objects, take three
    times as long to read as one after the other.
    """

    device: str
    store_id: str
    seq: int
    time: float
    received: float
    start: float
    release: int
    head: int
    mode: str
    predictions: int
    errors: int
    labelled: int
    correct: int
    alarms: int
    """Drift monitors that raise an alarm."""
    warnings: int
    p50_ms: float
    """Of one prediction in the window; 0: unknown, as the next."""
    p99_ms: float
    body: bytes


class Machine(NamedTuple):
    """What a device has left, in MB; None: unknown."""

    disk_free_mb: int | None
    memory_free_mb: int | None
    memory_total_mb: int | None


_UNTOLD = Machine(None, None, None)


class SummaryRow(msgspec.Struct, frozen=True):
    """A summary that is to be stored: the latest of its device and window stays."""

    device: str
    store_id: str
    seq: int
    time: float
    summary: Summary
    body: bytes

    @property
    def hour(self) -> int:
        """The hour in which its window ended, since the epoch."""
        return int(self.summary.end // _HOUR_S)


class EventRow(msgspec.Struct, frozen=True):
    """An event that is to be stored."""

    device: str
    store_id: str
    seq: int
    time: float
    event: Event

    @property
    def subject(self) -> int | None:
        """The release the event is about, where its detail names one."""
        release = self.event.detail.get("release")
        return release if type(release) is int and 0 <= release <= _LARGEST else None


class GapRow(msgspec.Struct, frozen=True):
    """Rows that will never come."""

    device: str
    store_id: str
    first: int
    last: int
    source: str
    """"device": it said so; "coordinator": it was concluded from the lowest number the device still holds."""


class RejectedRow(msgspec.Struct, frozen=True):
    """A row whose body cannot be read: kept as it came, so that it does not hold up those behind it."""

    device: str
    store_id: str
    seq: int
    time: float
    kind: str
    reason: str
    body: bytes


class Turn:
    """Reads the messages of one turn into rows that the store commits together.

    Args:
        topics: Names of the topics.
        positions: Last committed number by (device, store id), for the devices of this turn.
        known: Devices of this turn that are registered.
        accept_unknown: Whether others are taken in.
        now: Seconds since the epoch.
        revoked: Devices of this turn that are turned away, registered or not.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        positions: Mapping[tuple[str, str], int],
        known: AbstractSet[str],
        accept_unknown: bool,
        now: float,
        revoked: AbstractSet[str] = frozenset(),
    ) -> None:
        self.now = now
        self._revoked = revoked
        self.reports: list[ReportRow] = []
        self.summaries: list[SummaryRow] = []
        self.events: list[EventRow] = []
        self.gaps: list[GapRow] = []
        self.rejected: list[RejectedRow] = []
        self.states: dict[str, State] = {}
        self.needs: list[Need] = []
        self.seen: set[str] = set()
        self.joined: set[str] = set()
        self.latest: dict[str, ReportRow | EventRow] = {}
        """The last row of each device that says which release runs."""
        self.machines: dict[str, Machine] = {}
        """As the last report of each device tells, if it does."""
        self.positions: dict[tuple[str, str], int] = {}
        """Only those that moved."""
        self.counters: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.last_problem = ""
        self._topics, self._before, self._known = topics, positions, known
        self._accept_unknown = accept_unknown
        self._answers: dict[tuple[str, str], int] = {}

    @property
    def acks(self) -> list[tuple[str, Ack]]:
        """(device, acknowledgement) to send once the turn is committed: one for each outbox."""
        return [(device, Ack(store_id, seq)) for (device, store_id), seq in self._answers.items() if seq >= 0]

    def read(self, message: Message) -> None:
        """Take in one message. Whatever is wrong with it is counted; nothing is raised."""
        parsed = self._topics.parse_up(message.topic)
        if parsed is None:
            self._problem("malformed", f"unexpected topic {message.topic[:_MAX_TEXT]!r}")
            return
        device, kind = parsed
        if message.retain and device in self._revoked:  # said before it was revoked; the broker only repeats it
            return
        try:
            if not self._admit(device):
                return
            if kind in ("report", "event"):
                self._row(device, decode(message.payload, Envelope))
            elif kind == "need":
                self.needs.append(decode(message.payload, Need))
            elif kind == "state":
                if message.payload:  # an empty one clears what was retained
                    self._state(device, _checked_state(device, decode(message.payload, State)))
            else:
                self._problem("malformed", f"unexpected topic {message.topic[:_MAX_TEXT]!r}")
                return
        except ProtocolError as error:
            self._problem("malformed", f"{device[:_MAX_TEXT]}: {error}")
            return
        if kind != "state":  # retained states come again with every connection
            self.seen.add(device)

    def _state(self, device: str, state: State) -> None:
        before = self.states.get(device)
        if state.reason == WILL and before is not None:
            state = msgspec.structs.replace(before, online=False, reason=WILL)
        self.states[device] = state

    def _admit(self, device: str) -> bool:
        if device in self._revoked:
            self._problem("revoked_device", f"{device} was revoked, and the broker still lets it in")
            return False
        if device in self._known or device in self.joined:
            return True
        check_name(device)
        if self._accept_unknown:
            self.joined.add(device)
            return True
        self.counters["unknown_device"] += 1
        if device in self.unknown or len(self.unknown) < _MAX_UNKNOWN:
            self.unknown[device] += 1
        return False

    def _row(self, device: str, envelope: Envelope) -> None:
        if envelope.oldest > envelope.seq:
            raise ProtocolError(f"sequence number {envelope.seq} with oldest {envelope.oldest}")
        if len(envelope.store_id) > _MAX_TEXT:
            raise ProtocolError("store_id is too long")
        outbox = (device, envelope.store_id)
        last = self.positions.get(outbox, self._before.get(outbox))
        expected = expected_seq(last, envelope.oldest)
        content, reason = _content(envelope)
        first = envelope.seq
        if envelope.kind == "gap":
            # an unreadable gap still says that what is expected was dropped
            first = content.first if isinstance(content, Gap) else min(expected, envelope.seq)
        verdict = judge(last, first=first, seq=envelope.seq, oldest=envelope.oldest)
        if verdict is not Verdict.ACCEPT:
            self.counters[verdict.value] += 1
            # nothing below `oldest` exists any more: to a device we know nothing of, this means "begin there"
            self._answers[outbox] = envelope.oldest - 1 if last is None else last
            return
        if last is not None and expected > last + 1:
            self.gaps.append(GapRow(*outbox, last + 1, expected - 1, "coordinator"))
        body = bytes(envelope.body)
        if isinstance(content, Report):
            self._report(_report_row(outbox, envelope, content, body, self.now), content)
        elif isinstance(content, Summary):
            self.summaries.append(SummaryRow(*outbox, envelope.seq, envelope.time, content, body))
        elif isinstance(content, Event):
            event = EventRow(*outbox, envelope.seq, envelope.time, content)
            self.events.append(event)
            self.latest[device] = event
        elif isinstance(content, Gap):
            self.gaps.append(GapRow(*outbox, expected, envelope.seq, "device"))
        else:
            kind = envelope.kind[:_MAX_TEXT]
            self.rejected.append(RejectedRow(*outbox, envelope.seq, envelope.time, kind, reason, body))
            self._problem("rejected_body", f"{device}: {reason}")
        self.counters["accepted"] += 1
        self.positions[outbox] = self._answers[outbox] = envelope.seq

    def _report(self, row: ReportRow, report: Report) -> None:
        self.reports.append(row)
        self.latest[row.device] = row
        machine = Machine(report.disk_free_mb, report.memory_free_mb, report.memory_total_mb)
        if machine != _UNTOLD:
            self.machines[row.device] = machine

    def _problem(self, counter: str, text: str) -> None:
        self.counters[counter] += 1
        self.last_problem = text


def _report_row(outbox: tuple[str, str], envelope: Envelope, report: Report, body: bytes, now: float) -> ReportRow:
    alarms = warnings = 0
    for monitor in report.monitors:
        alarms += monitor.alarm
        warnings += monitor.warning
    return ReportRow(
        *(*outbox, envelope.seq, envelope.time, now, report.start, report.release, report.head, report.mode),
        *(report.predictions, report.errors, report.labelled, report.correct, alarms, warnings),
        *(report.p50_ms, report.p99_ms, body),
    )


def _content(envelope: Envelope) -> tuple[Report | Summary | Event | Gap | None, str]:
    """The body, or None and the reason why it cannot be stored as what it claims to be."""
    try:
        if envelope.kind == "report":
            return _checked_report(unpack(envelope.body, Report)), ""
        if envelope.kind == "summary":
            return _checked_summary(unpack(envelope.body, Summary), len(bytes(envelope.body))), ""
        if envelope.kind == "event":
            return _checked_event(unpack(envelope.body, Event)), ""
        if envelope.kind == "gap":
            return _checked_gap(unpack(envelope.body, Gap), envelope.seq), ""
        return None, f"unknown kind {envelope.kind[:_MAX_TEXT]!r}"
    except ProtocolError as error:
        return None, str(error)


def _checked_report(report: Report) -> Report:
    if check_cells(report.labels, report.confusion) + len(report.scores) > _MAX_CELLS:
        raise ProtocolError(f"more than {_MAX_CELLS} cells and scores")
    if report.correct > report.labelled:
        raise ProtocolError(f"{report.correct} correct of {report.labelled} labelled")
    return report


def _checked_summary(summary: Summary, size: int) -> Summary:
    if size > MAX_SUMMARY_BYTES:
        raise ProtocolError(f"a summary of {size} bytes; at most {MAX_SUMMARY_BYTES} are stored")
    features = len(summary.features)
    if features > _MAX_FEATURES or summary.bins > _MAX_BINS or len(summary.moments) != _MOMENTS_BYTES * features:
        raise ProtocolError(f"{features} features in {summary.bins} bins with {len(summary.moments)} bytes of moments")
    for name, counts, expected in (
        ("counts", summary.counts, features * summary.bins),
        ("missing", summary.missing, features),
    ):
        if (got := len(from_counts(counts))) != expected:
            raise ProtocolError(f"{got} {name} of {features} features in {summary.bins} bins")
    from_counts(summary.confidence)
    from_buckets(summary.latency)
    for metric in summary.metrics:
        from_buckets(metric.above)
        from_buckets(metric.below)
    return summary


def _checked_event(event: Event) -> Event:
    if not event.name or len(event.name) > _MAX_TEXT:
        raise ProtocolError("an event without a name, or with one too long")
    for key, value in event.detail.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ProtocolError(f"{key[:_MAX_TEXT]!r} of {event.name} is not finite")
    return event


def _checked_gap(gap: Gap, seq: int) -> Gap:
    if not gap.first <= gap.last == seq:
        raise ProtocolError(f"a gap from {gap.first} to {gap.last} in row {seq}")
    return gap


def _checked_state(device: str, state: State) -> State:
    if state.device != device:
        raise ProtocolError(f"a state of {state.device[:_MAX_TEXT]!r}")
    if any(isinstance(value, str) and len(value) > _MAX_TEXT for value in msgspec.structs.astuple(state)):
        raise ProtocolError("a text is too long")
    check_name(state.group, "group")
    return state
