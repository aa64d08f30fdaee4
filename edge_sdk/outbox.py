"""The only queue of the device: what it tells is stored before it is sent, and kept until acknowledged."""

from __future__ import annotations

import msgspec

from edge_sdk.clock import is_due
from edge_sdk.config import ReportConfig
from edge_sdk.errors import NotConnectedError, ProtocolError
from edge_sdk.messages import MAX_MESSAGE_BYTES, Ack, Envelope, Event, Gap, Report, Summary, Topics, encode
from edge_sdk.store import OutboxRow, Store
from edge_sdk.transport import Transport

_WINDOW = 50
"""Messages under way at once."""
_MAX_BODY = MAX_MESSAGE_BYTES - 200


class Outbox:
    """Sends rows in order, resends what is not acknowledged, and tells the coordinator what it had to drop.

    `put` and `acknowledge` belong inside a transaction of the store.

    Args:
        store: Where the rows are.
        store_id: Random name of this database; with the sequence number it identifies a message.
        device: This device's name.
        topics: Of the coordinator's prefix.
        transport: How to send.
        config: Bounds and times.
    """

    def __init__(
        self,
        store: Store,
        store_id: str,
        *,
        device: str,
        topics: Topics,
        transport: Transport,
        config: ReportConfig,
    ) -> None:
        self._store, self._store_id = store, store_id
        self._device, self._topics, self._transport, self._config = device, topics, transport, config
        self._sent = 0
        self._sent_on = 0
        self._oldest = 0
        self._stuck_since = 0.0
        self._bytes_sent = self._bytes_moved = 0
        self._counted = 0
        self._allowance, self._allowed_at = float(_WINDOW), 0.0

    @property
    def pending(self) -> int:
        """Rows that are not acknowledged."""
        return self._store.outbox_size()[0]

    def take_bytes_sent(self) -> int:
        """Payload bytes of messages sent since the last call; a message sent again is not counted again."""
        size, self._bytes_sent = self._bytes_sent, 0
        return size

    def take_bytes_moved(self) -> int:
        """Bytes of topics and payloads sent since the last call, each time that a message was sent."""
        size, self._bytes_moved = self._bytes_moved, 0
        return size

    def put(self, message: Report | Summary | Event, time: float) -> int:
        """Store a message and return how many rows had to go to make room.

        The oldest summaries go first, then reports, events last. A run of dropped rows becomes one gap, so that what
        the coordinator sees stays without holes.

        Raises:
            ProtocolError: The message is too large ever to be sent.
        """
        kind = type(message).__name__.lower()
        body = msgspec.msgpack.encode(message)
        if len(body) > _MAX_BODY:
            raise ProtocolError(f"a {kind} of {len(body)} bytes; at most {_MAX_BODY} can be sent")
        self._store.append(kind, time, body)
        return self._shrink(time)

    def drop_reports(self, time: float) -> int:
        """All reports and summaries that wait become gaps, so that events need not wait behind them; how many did."""
        rows = [row for row in self._store.outbox() if row.kind in ("report", "summary")]
        for row in rows:
            self._store.replace_with_gap([row], time, b"")
        self._merge_gaps(time)
        return len(rows)

    def acknowledge(self, ack: Ack) -> None:
        """Forget what the coordinator has committed; an acknowledgement of another database is ignored."""
        if ack.store_id == self._store_id:
            self._store.acknowledge(ack.seq)

    def send(self, now: float) -> int:
        """Send what is due; returns how many messages went out."""
        if not self._transport.connected:
            return 0
        count, _, oldest = self._store.outbox_size()
        if not count:
            return 0
        if oldest != self._oldest:
            self._oldest, self._stuck_since = oldest, now
        stuck = self._sent >= oldest and is_due(now, self._stuck_since, self._config.resend_s)
        if self._sent_on != self._transport.connections or stuck:
            self._sent, self._stuck_since = 0, now  # begin again at the oldest, whatever was sent after it
        start = max(self._sent, oldest - 1)
        window_end = oldest + _WINDOW
        sent = 0
        for row in self._store.outbox(after=start, limit=self._most(now)):
            if row.first >= window_end:
                break
            try:
                self._publish(row, oldest)
            except NotConnectedError:
                break
            self._sent, self._sent_on = row.seq, self._transport.connections
            sent += 1
        self._allowance -= sent
        return sent

    def _most(self, now: float) -> int:
        """Messages that may go out now: a fleet that comes back after an outage must not drown its coordinator."""
        rate = self._config.max_per_s
        if not rate:
            return _WINDOW
        passed = max(0.0, now - self._allowed_at)  # none, if the clock was set back
        self._allowance, self._allowed_at = min(_WINDOW, self._allowance + passed * rate), now
        return int(self._allowance)

    def _publish(self, row: OutboxRow, oldest: int) -> None:
        envelope = Envelope(
            store_id=self._store_id,
            seq=row.seq,
            oldest=oldest,
            time=row.time,
            kind=row.kind,
            body=msgspec.Raw(row.body),
        )
        happened = row.kind in ("event", "gap")
        topic = self._topics.up(self._device, "event" if happened else "report")
        payload = encode(envelope)
        self._transport.publish(topic, payload)
        self._bytes_moved += len(topic) + len(payload)
        if row.seq > self._counted:
            self._counted = row.seq
            self._bytes_sent += len(payload)

    def _shrink(self, time: float) -> int:
        dropped = 0
        for kind in ("summary", "report", "event"):
            while self._is_full() and (gone := self._drop(kind, time)):
                dropped += gone
        return dropped

    def _is_full(self) -> bool:
        count, size, _ = self._store.outbox_size()
        return count > self._config.outbox_rows or size > self._config.outbox_bytes

    def _drop(self, kind: str, time: float) -> int:
        """The oldest messages of a kind become gaps, the newest message of all excepted; returns how many did.

        Makes some room at once, so that a full outbox is not reshaped at every message. A gap between two messages that
        stay takes as much room as what it stands for: then there is more to drop.
        """
        count, size, _ = self._store.outbox_size()
        goal_rows, goal_bytes = int(self._config.outbox_rows * 0.9), int(self._config.outbox_bytes * 0.9)
        dropped = 0
        for row in self._store.outbox()[:-1]:
            if count <= goal_rows and size <= goal_bytes:
                break
            if row.kind == kind:
                self._store.replace_with_gap([row], time, b"")
                count, size, dropped = count - 1, size - len(row.body), dropped + 1
        self._merge_gaps(time)
        return dropped

    def _merge_gaps(self, time: float) -> None:
        run: list[OutboxRow] = []
        for row in [*self._store.outbox(), None]:
            if row is not None and row.kind == "gap":
                run.append(row)
                continue
            if run:
                self._store.replace_with_gap(run, time, msgspec.msgpack.encode(Gap(run[0].first, run[-1].seq)))
            run = []
