"""What the device tells of itself, and what it hears: counts over a window, never a single input, latent or label."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from edge_sdk import __version__
from edge_sdk.clock import Clock, is_due
from edge_sdk.config import DeviceConfig, ReportConfig
from edge_sdk.errors import NotConnectedError, ProtocolError
from edge_sdk.messages import (
    Ack,
    Event,
    MonitorState,
    Report,
    ShadowTally,
    State,
    Summary,
    Topics,
    decode,
    encode,
    to_cells,
)
from edge_sdk.outbox import Outbox
from edge_sdk.sketch import QuantileSketch
from edge_sdk.stats import suppress_small
from edge_sdk.store import Store
from edge_sdk.transport import Message, NoTransport, Transport
from edge_sdk.types import Mode
from edge_sdk.update import UpdateClient

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TOTALS = {
    "drift_alarm": "alarms",
    "promoted": "promotions",
    "rejected": "rejections",
    "head_rolled_back": "rollbacks",
    "release_rolled_back": "rollbacks",
}
"""Which counter an event raises."""
_MAX_CELLS_KEPT = 1000
_MAX_ORDERS = 64
_LATEST = 253_402_300_799.0  # the end of the year 9999
_MAX_CELLS = 100
_SCORES = ("accuracy", "precision", "recall", "f1", "loss", "calibration_error")


class Counters(msgspec.Struct):
    """Totals since the store was made; persisted."""

    predictions: int = 0
    labelled: int = 0
    unmatched: int = 0
    duplicates: int = 0
    late_truths: int = 0
    """Truths of predictions that a guess had been learned from already."""
    other_trunk: int = 0
    """Labels of predictions that another trunk made than that in use now: kept, and learned from only by that one."""
    capped: int = 0
    labels_lost: int = 0
    rows_lost: int = 0
    rejected_inputs: int = 0
    errors: int = 0
    promotions: int = 0
    rejections: int = 0
    rollbacks: int = 0
    alarms: int = 0
    outbox_dropped: int = 0
    bad_messages: int = 0
    bytes_sent: int = 0
    written_bytes: int = 0
    month: int = 0
    """The calendar month (UTC, as 202611) that the next counts."""
    month_bytes: int = 0
    """Sent in it, topics and repetitions included."""
    month_capped: bool = False
    """`report.monthly_bytes` was reached in it: no reports until the next."""


class Window(msgspec.Struct):
    """What has come together since the last report; persisted, so that a restart loses nothing of it."""

    start: float
    release: int = 0
    head: int = 0
    """The version that it tells of."""
    predictions: int = 0
    confidence: float = 0.0
    """Sum."""
    labelled: int = 0
    correct: int = 0
    unmatched: int = 0
    rejected_inputs: int = 0
    errors: int = 0
    written_bytes: int = 0
    predicted: dict[str, int] = {}
    latency: tuple[list[int], list[int], int] = ([], [], 0)
    """Milliseconds, as a `QuantileSketch` puts them: this is written at every flush."""
    confusion: dict[str, int] = {}
    """Labelled predictions by truth and answer, a tab between the two."""

    def confuse(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Add labelled predictions of a classification: the truth and what was said."""
        cells = Counter(self.confusion)
        for truth, said in pairs:
            cell = f"{truth}\t{said}"
            cells[cell if cell in cells or len(cells) < _MAX_CELLS_KEPT else "other"] += 1
        self.confusion = dict(cells)

    def count(self, labels: list[str], confidences: list[float], latencies: list[float]) -> None:
        """Add predictions: what they said, how sure they were, and how long each took in milliseconds."""
        self.predictions += len(latencies)
        self.confidence += float(sum(confidences))
        self.predicted = dict(Counter(self.predicted) + Counter(labels))
        sketch = QuantileSketch.from_wire(*self.latency)
        sketch.add(np.array(latencies))
        self.latency = sketch.to_wire()


class Standing(msgspec.Struct, frozen=True):
    """What commands have set until further notice; persisted."""

    mode: Mode | None = None
    configured_mode: Mode | None = None
    """What `mode` took the place of: once the setting says something else, it counts again."""
    paused: bool = False
    paused_at: float = 0.0
    paused_s: float = 0.0
    """0: until resumed."""
    interval_s: float = 0.0
    """0: as configured."""


@dataclass(frozen=True)
class Identity:
    """What serves, as it is told to the coordinator."""

    release: int = 0
    head: int = 0
    digest: str = ""


class Reporter:
    """Speaks for the device: events, reports, birth and last will; and listens for it.

    Args:
        store: The device's database.
        store_id: Its random name.
        boot: How often the device has started.
        transport: Connection to the broker.
        clock: Source of time.
        config: Of the device.
        hardware: What it runs on, unless the settings say.
    """

    def __init__(
        self,
        store: Store,
        *,
        store_id: str,
        boot: int,
        transport: Transport,
        clock: Clock,
        config: DeviceConfig,
        hardware: str = "",
    ) -> None:
        self._hardware = config.hardware or hardware
        self._store, self._store_id, self._boot = store, store_id, boot
        self._transport, self._clock, self._config = transport, clock, config
        self._networked = not isinstance(transport, NoTransport)
        self._connections = 0
        self.topics = Topics(config.prefix)
        standing = _load(store, "standing", Standing) or Standing()
        if standing.configured_mode not in (None, config.mode):
            standing = msgspec.structs.replace(standing, mode=None, configured_mode=None)
        self.standing = standing
        self.mode: Mode = standing.mode or config.mode
        self._orders: list[bytes] = []
        self.identity = Identity()
        """What serves now."""
        self.counters = _load(store, "counters", Counters) or Counters()
        self.window = _load(store, "window", Window) or Window(start=clock.now())
        self.outbox = Outbox(
            store, store_id, device=config.device, topics=self.topics, transport=transport, config=config.report
        )

    def stand(self, **changes: Any) -> None:
        """Change what commands have set until further notice: fields of `Standing`."""
        standing = msgspec.structs.replace(self.standing, **changes)
        if "mode" in changes:
            standing = msgspec.structs.replace(standing, configured_mode=self._config.mode)
        with self._store.transaction():
            self._store.put("standing", msgspec.json.encode(standing))
        self.standing = standing
        if standing.mode is not None and "mode" in changes:
            self.mode = standing.mode

    def learning_paused(self, now: float) -> bool:
        """Whether a command forbids to learn. A pause for a time ends at the latest when the clock is set back."""
        standing = self.standing
        return standing.paused and not (standing.paused_s and is_due(now, standing.paused_at, standing.paused_s))

    def take_orders(self) -> list[bytes]:
        """Payloads of commands that came since the last call."""
        orders, self._orders = self._orders, []
        return orders

    def report_due(self, now: float, on_mains: Callable[[], bool | None]) -> bool:
        """Whether it is time for a report.

        Args:
            now: Seconds since the epoch.
            on_mains: Asked only when it matters; None: unknown.
        """
        rules, since = self._config.report, self.window.start
        interval = self.standing.interval_s or rules.interval_s
        if rules.metered:
            interval = max(interval, rules.metered_interval_s)
        if self.capped(now) or not is_due(now, since, interval):
            return False
        return not rules.battery_interval_s or is_due(now, since, rules.battery_interval_s) or on_mains() is not False

    def capped(self, now: float) -> bool:
        """Whether this month's bytes are spent: reports and summaries had better not be made."""
        return self.counters.month_capped and self.counters.month == _month(now)

    def save(self) -> None:
        """Persist counters and window; inside a transaction."""
        self._store.put("counters", msgspec.json.encode(self.counters))
        self._store.put("window", msgspec.json.encode(self.window))

    def emit(self, name: str, detail: dict[str, Any]) -> None:
        """Record an event here and for the coordinator; inside a transaction."""
        now = self._clock.now()
        self._store.record(now, name, detail)
        if name in _TOTALS:
            setattr(self.counters, _TOTALS[name], getattr(self.counters, _TOTALS[name]) + 1)
        if self._networked:
            event = Event(name=name, release=self.identity.release, head=self.identity.head, detail=detail)
            self.counters.outbox_dropped += self.outbox.put(event, now)
        self.save()

    def serve(self, identity: Identity, now: float, **facts: Any) -> None:
        """Another version serves: what came together of the one before is reported as its own.

        `facts`: as in `report`.
        """
        window = self.window
        if (window.release, window.head) != (identity.release, identity.head):
            if window.release:
                self.report(now, carry=False, **facts)
            self.window = Window(start=now, release=identity.release, head=identity.head)
        self.identity = identity

    def report(self, now: float, *, carry: bool, **facts: Any) -> None:
        """Close the window and put its report into the outbox. `facts`: see `build_report`."""
        report, window = build_report(
            self.window,
            self.counters,
            now=now,
            mode=self.mode,
            carry=carry,
            config=self._config.report,
            **facts,
        )
        with self._store.transaction():
            self.queue(report, now)
            self._store.put("window", msgspec.json.encode(window))
        self.window = window

    def queue(self, message: Report | Summary, now: float) -> None:
        """Put it into the outbox, unless nobody is there to take it or the month is spent; inside a transaction."""
        if self._networked and not self.capped(now):
            self.counters.outbox_dropped += self.outbox.put(message, now)

    def connect(self) -> None:
        """Connect and listen for acknowledgements and the desired state."""
        # before the connection, so that it does not count as one until both are in force
        self._transport.subscribe(self.topics.down(self._config.device, "ack"))
        self._transport.subscribe(self.topics.down(self._config.device, "cmd"))
        self._transport.subscribe(self.topics.desired(self._config.group))
        self._transport.connect(self._state(online=False, reason="lost"))

    def close(self) -> None:
        """Say goodbye and disconnect."""
        self.tell_state(online=False, reason="stopped")
        self._transport.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._transport.connected

    def tell_state(self, *, online: bool = True, reason: str = "birth") -> None:
        """Publish the retained state, if there is a connection; a new one begins with it anyway."""
        message = self._state(online=online, reason=reason)
        try:
            self._transport.publish(message.topic, message.payload, retain=True)
        except NotConnectedError:
            logger.debug("%s: no connection, the next one begins with a birth", self._config.device)

    def listen(self, client: UpdateClient) -> int:
        """Take in all that has come; returns how many messages. Blocks and desired state go to the update client.

        Raises:
            StoreError: Something could not be written; what the coordinator sent will come again.
        """
        if self._transport.connected and self._transport.connections != self._connections:
            self._connections = self._transport.connections
            self.tell_state()
        messages = self._transport.receive()
        highest: Ack | None = None
        for message in messages:
            try:
                highest = self._take(message, client) or highest
            except ProtocolError as error:
                self._ignore(message.topic, error)
        try:
            client.look_again(self._clock.now())
        except ProtocolError as error:
            self._ignore(self.topics.desired(self._config.group), error)
        if highest is not None:
            with self._store.transaction():
                self.outbox.acknowledge(highest)
        return len(messages)

    def send(self, now: float) -> int:
        """Send what is due; returns how many messages went out."""
        sent = self.outbox.send(now)
        self.counters.bytes_sent += self.outbox.take_bytes_sent()
        self._account(now)
        return sent

    def _account(self, now: float) -> None:
        """Count what was sent towards the month's limit, and keep to it."""
        counters, limit = self.counters, self._config.report.monthly_bytes
        moved = self.outbox.take_bytes_moved()
        if counters.month != _month(now):
            if not moved:
                return
            counters.month, counters.month_bytes, counters.month_capped = _month(now), 0, False
        counters.month_bytes += moved
        if limit and counters.month_bytes >= limit and not counters.month_capped:
            counters.month_capped = True
            with self._store.transaction():
                counters.outbox_dropped += self.outbox.drop_reports(now)
                self.emit("data_cap_reached", {"bytes": counters.month_bytes, "limit": limit})

    def _ignore(self, topic: str, error: ProtocolError) -> None:
        logger.warning("%s: %s was ignored: %s", self._config.device, topic, error)
        self.counters.bad_messages += 1

    def _take(self, message: Message, client: UpdateClient) -> Ack | None:
        if (block := self.topics.parse_block(message.topic)) is not None:
            client.take_block(*block, message.payload)
        elif message.topic == self.topics.down(self._config.device, "ack"):
            return decode(message.payload, Ack)
        elif message.topic == self.topics.down(self._config.device, "cmd"):
            if len(self._orders) < _MAX_ORDERS:  # the others come again
                self._orders.append(message.payload)
        elif message.topic == self.topics.desired(self._config.group) and message.payload:
            client.hear(message.payload, self._clock.now())
        return None

    def _state(self, *, online: bool, reason: str) -> Message:
        state = State(
            device=self._config.device,
            store_id=self._store_id,
            time=self._clock.now(),
            online=online,
            reason=reason,
            boot=self._boot,
            release=self.identity.release,
            head=self.identity.head,
            digest=self.identity.digest,
            group=self._config.group,
            mode=self.mode,
            sdk=__version__,
            hardware=self._hardware,
        )
        return Message(self.topics.up(self._config.device, "state"), encode(state), retain=True)


def build_report(
    window: Window,
    totals: Counters,
    *,
    now: float,
    mode: str,
    monitors: list[MonitorState],
    replay_rows: int,
    fresh_rows: int,
    rss_mb: float,
    carry: bool,
    config: ReportConfig,
    scores: Mapping[str, Any] | None = None,
    temperature_c: float | None = None,
    shadow: Sequence[ShadowTally] = (),
    disk_free_mb: float | None = None,
    memory_free_mb: float | None = None,
    memory_total_mb: float | None = None,
) -> tuple[Report, Window]:
    """The report of a window, and the window to go on with.

    Scores of fewer than `min_count` labels, and label cells below it, say too much about single samples: the cells
    are merged, and the scores wait in the new window until enough have come together. Without `carry` they are
    dropped: the next window belongs to another version.
    """
    enough = window.labelled >= config.min_count
    telling = window.predictions >= config.min_count
    mean_confidence = round(window.confidence / window.predictions, 4) if telling else 0.0
    latency = QuantileSketch.from_wire(*window.latency)
    labels, confusion = to_cells(_told_cells(window.confusion, config.min_count) if enough else {})
    report = Report(
        start=window.start,
        end=now,
        release=window.release,
        head=window.head,
        mode=mode,
        predictions=window.predictions,
        labelled=window.labelled if enough else 0,
        correct=window.correct if enough else 0,
        unmatched=window.unmatched,
        rejected_inputs=window.rejected_inputs,
        errors=window.errors,
        mean_confidence=mean_confidence,
        p50_ms=round(latency.quantile(0.5), 4),
        p95_ms=round(latency.quantile(0.95), 4),
        predicted=suppress_small(window.predicted, min_count=config.min_count),
        monitors=monitors,
        replay_rows=replay_rows,
        fresh_rows=fresh_rows,
        promotions=totals.promotions,
        rejections=totals.rejections,
        rollbacks=totals.rollbacks,
        labels_lost=totals.labels_lost,
        outbox_dropped=totals.outbox_dropped,
        rss_mb=round(rss_mb, 1),
        written_bytes=window.written_bytes,
        labels=labels,
        confusion=confusion,
        scores=_told_scores(scores or {}, config.min_count),
        p99_ms=round(latency.quantile(0.99), 4),
        temperature_c=None if temperature_c is None else round(temperature_c, 1),
        shadow=list(shadow),
        disk_free_mb=_whole(disk_free_mb),
        memory_free_mb=_whole(memory_free_mb),
        memory_total_mb=_whole(memory_total_mb),
    )
    carried = Window(start=now, release=window.release, head=window.head)
    if carry and not enough:
        carried.labelled, carried.correct = window.labelled, window.correct
        carried.confusion = dict(window.confusion)
    return report, carried


def _whole(value: float | None) -> int | None:
    return None if value is None else max(0, round(value))


def _told_cells(cells: dict[str, int], min_count: int) -> dict[str, int]:
    """The largest cells; what is too small, or one too many, is merged."""
    largest = sorted(cells, key=lambda cell: (-cells[cell], cell))
    kept = {cell: cells[cell] for cell in largest[:_MAX_CELLS]}
    if rest := sum(cells[cell] for cell in largest[_MAX_CELLS:]):
        kept["other"] = kept.get("other", 0) + rest
    return suppress_small(kept, min_count=min_count)


def _told_scores(scores: Mapping[str, Any], min_count: int) -> dict[str, float]:
    """Those over all rows, of `Prequential.scores`; none while they rest on too few."""
    if scores.get("rows", 0) < min_count:
        return {}
    return {name: round(float(scores[name]), 4) for name in _SCORES if scores.get(name) is not None}


def _month(now: float) -> int:
    date = time.gmtime(min(max(now, 0.0), _LATEST))
    return 100 * date.tm_year + date.tm_mon


def _load(store: Store, key: str, kind: type[T]) -> T | None:
    data = store.get(key)
    return None if data is None else msgspec.json.decode(data, type=kind)
