"""The outbox: in order, bounded, sent until acknowledged, and without a hole in what the coordinator sees."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.config import ReportConfig
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import MAX_MESSAGE_BYTES, Ack, Envelope, Event, Gap, Report, Summary, Topics, decode, unpack
from edge_sdk.outbox import Outbox
from edge_sdk.store import Store
from edge_sdk.transport import MemoryBroker, MemoryTransport

TOPICS = Topics()
WINDOW = 50
START = 1_000.0


@dataclass
class World:
    """One outbox, and the other end of its line."""

    store: Store
    outbox: Outbox
    broker: MemoryBroker
    transport: MemoryTransport
    listener: MemoryTransport
    envelopes: list[Envelope] = field(default_factory=list)

    def put(self, *kinds, size=0):
        dropped = 0
        for kind in kinds:
            with self.store.transaction():
                dropped += self.outbox.put(MAKE[kind](size=size), START)
        return dropped

    def acknowledge(self, seq, store_id="store-1"):
        with self.store.transaction():
            self.outbox.acknowledge(Ack(store_id, seq))

    def send(self, now=START):
        """Send, and return the numbers that arrived."""
        count = self.outbox.send(now)
        arrived = [decode(message.payload, Envelope) for message in self.listener.receive()]
        self.envelopes += arrived
        assert count == len(arrived)
        return [envelope.seq for envelope in arrived]

    @property
    def held(self):
        return [(row.kind, row.first, row.seq) for row in self.store.outbox()]


@pytest.fixture
def make(tmp_path):
    opened = []

    def make_world(*, connected=True, **limits):
        broker = MemoryBroker()
        transport, listener = MemoryTransport(broker), MemoryTransport(broker)
        listener.subscribe(TOPICS.up("dev-1", "+"))
        listener.connect()
        if connected:
            transport.connect()
        opened.append(Store(tmp_path / "edge.db", durability="normal"))
        return World(opened[-1], new_outbox(opened[-1], transport, ReportConfig(**limits)), broker, transport, listener)

    yield make_world
    for store in opened:
        store.close()


def new_outbox(store, transport, config):
    return Outbox(store, "store-1", device="dev-1", topics=TOPICS, transport=transport, config=config)


def event(name="promoted", size=0):
    return Event(name=name, release=1, head=0, detail={"reason": "x" * size})


def report(size=0):
    return Report(
        start=0.0, end=1.0, release=1, head=0, mode="adapt" + "x" * size, predictions=3, labelled=0, correct=0,
        unmatched=0, rejected_inputs=0, errors=0, mean_confidence=0.5, p50_ms=0.1, p95_ms=0.2, predicted={},
        monitors=[], replay_rows=0, fresh_rows=0, promotions=0, rejections=0, rollbacks=0, labels_lost=0,
        outbox_dropped=0, rss_mb=1.0, written_bytes=0,
    )  # fmt: skip


def summary(size=0):
    return Summary(
        start=0.0, end=1.0, release=1, head=0, reference="", unit=10, rows=0, features=[], bins=0, counts=b"",
        missing=b"", moments=b"", confidence=b"", classes={}, latency=bytes(size), metrics=[], monitors=[],
    )  # fmt: skip


MAKE = {"event": event, "report": report, "summary": summary}


# ---- sending


def test_a_summary_goes_out_beside_the_reports_and_is_the_first_to_be_dropped(make):
    world = make(outbox_rows=3)
    assert world.put("report", "summary", "event") == 0
    world.outbox.send(START)
    message = world.listener.receive()[1]
    assert message.topic == TOPICS.up("dev-1", "report")
    envelope = decode(message.payload, Envelope)
    assert (envelope.kind, unpack(envelope.body, Summary)) == ("summary", summary())
    assert world.put("event") == 2
    assert [kind for kind, _, _ in world.held] == ["gap", "event", "event"]


def test_messages_go_out_in_order_on_their_topics_with_what_they_need(make):
    world = make()
    world.put("event", "report", "event")
    assert world.outbox.send(START) == 3
    messages = world.listener.receive()
    assert [message.topic for message in messages] == [
        TOPICS.up("dev-1", kind) for kind in ("event", "report", "event")
    ]
    assert not any(message.retain for message in messages)
    envelopes = [decode(message.payload, Envelope) for message in messages]
    assert [(e.store_id, e.seq, e.oldest, e.kind) for e in envelopes] == [
        ("store-1", 1, 1, "event"), ("store-1", 2, 1, "report"), ("store-1", 3, 1, "event"),
    ]  # fmt: skip
    assert unpack(envelopes[0].body, Event) == event()
    assert unpack(envelopes[1].body, Report) == report()


def test_what_was_sent_is_not_sent_again_at_once(make):
    world = make()
    world.put("event", "event")
    assert world.send() == [1, 2]
    assert world.send(START + 29) == []
    world.put("report")
    assert world.send(START + 29) == [3]


def test_at_most_a_window_is_under_way(make):
    world = make()
    world.put(*["event"] * (WINDOW + 10))
    assert world.send() == list(range(1, WINDOW + 1))
    assert world.send() == []
    world.acknowledge(3)
    assert world.send() == [WINDOW + 1, WINDOW + 2, WINDOW + 3]


def test_after_silence_all_that_is_not_acknowledged_is_sent_again(make):
    world = make(resend_s=30.0)
    world.put("event", "event", "event")
    world.send()
    world.acknowledge(1)
    assert world.send(START + 29.9) == [], "an acknowledgement is progress, from which the time is counted anew"
    assert world.send(START + 30) == []
    assert world.send(START + 59.9) == [2, 3]
    assert world.envelopes[-1].oldest == 2


def test_new_messages_do_not_put_off_sending_a_lost_one_again(make):
    world = make(resend_s=30.0)
    world.put("event")
    assert world.send() == [1]
    for number, seconds in enumerate((10, 20, 29), start=2):
        world.put("event")
        assert world.send(START + seconds) == [number]
    assert world.send(START + 30) == [1, 2, 3, 4]
    assert world.send(START + 59) == []


def test_after_a_reconnect_all_that_is_not_acknowledged_is_sent_again(make):
    world = make()
    world.put("event", "event")
    world.send()
    world.acknowledge(1)
    world.broker.stop()
    world.put("event")
    assert world.send() == []
    world.broker.start()
    assert world.send() == [2, 3]
    assert world.send() == []


def test_a_clock_that_was_set_back_sends_again_rather_than_never(make):
    world = make()
    world.put("event")
    world.send()
    assert world.send(START - 1e6) == [1]


def test_without_a_connection_nothing_is_sent_and_all_is_kept(make):
    world = make(connected=False)
    world.put("event", "report")
    assert world.send() == []
    assert world.outbox.pending == 2
    world.transport.connect()
    assert world.send() == [1, 2]


def test_a_line_that_breaks_while_sending_costs_nothing(make, monkeypatch):
    world = make()
    world.put("event", "event", "event")
    publish, left = world.transport.publish, [None]

    def publish_one(*message):
        if not left:
            world.broker.stop()
        else:
            left.pop()
        publish(*message)

    monkeypatch.setattr(world.transport, "publish", publish_one)
    assert world.outbox.send(START) == 1
    monkeypatch.undo()
    world.broker.start()
    assert world.send() == [1, 2, 3]


def test_a_restart_sends_from_the_oldest_that_is_not_acknowledged(make):
    world = make()
    world.put("event", "event", "event")
    world.send()
    world.acknowledge(2)
    world.outbox = new_outbox(world.store, world.transport, ReportConfig())
    assert world.send() == [3]
    world.put("event")
    assert world.send() == [4]


def test_bytes_sent_are_counted_once_a_message(make):
    world = make()
    world.put("event", "report")
    world.send()
    first = world.outbox.take_bytes_sent()
    assert first > 0
    assert world.send(START + 60) == [1, 2]
    assert world.outbox.take_bytes_sent() == 0
    world.put("event")
    world.send()
    assert 0 < world.outbox.take_bytes_sent() < first


# ---- acknowledging


def test_an_acknowledgement_is_cumulative(make):
    world = make()
    world.put("event", "event", "event")
    world.acknowledge(2)
    assert world.held == [("event", 3, 3)]
    world.acknowledge(1)
    assert world.held == [("event", 3, 3)]


def test_an_acknowledgement_of_another_database_is_ignored(make):
    world = make()
    world.put("event", "event")
    world.acknowledge(2, store_id="store-0")
    assert world.outbox.pending == 2


def test_an_acknowledgement_of_what_was_never_sent_does_no_harm(make):
    world = make()
    world.put("event")
    world.acknowledge(1_000)
    world.put("event")
    assert world.send() == [2]


# ---- the bound


def test_the_oldest_reports_go_first_and_become_one_gap(make):
    world = make(outbox_rows=5)
    dropped = world.put("event", "report", "report", "report", "event", "event")
    assert dropped == 2
    assert world.held == [
        ("event", 1, 1), ("gap", 2, 3), ("report", 4, 4), ("event", 5, 5), ("event", 6, 6),
    ]  # fmt: skip
    (gap,) = [row for row in world.store.outbox() if row.kind == "gap"]
    assert unpack(gap.body, Gap) == Gap(2, 3)


def test_events_go_last(make):
    world = make(outbox_rows=5)
    world.put(*["event"] * 3, *["report"] * 40)
    assert [row for row in world.held if row[0] == "event"] == [("event", i, i) for i in (1, 2, 3)]
    world.put(*["event"] * 40)
    assert {kind for kind, _, _ in world.held} == {"gap", "event"}
    assert world.held[0] == ("gap", 1, 80)


def test_the_bound_in_bytes_holds(make):
    world = make(outbox_bytes=10_000)
    for _ in range(50):
        world.put("report", size=1_000)
        assert world.store.outbox_size()[1] <= 10_000
    assert world.held[0][:2] == ("gap", 1)


def test_the_newest_message_is_never_dropped(make):
    world = make(outbox_bytes=200, outbox_rows=1)
    world.put("event", "event", size=500)
    assert world.held == [("gap", 1, 1), ("event", 2, 2)]


def test_rows_between_events_do_not_pile_up_as_gaps(make):
    world = make(outbox_rows=10)
    for _ in range(40):
        world.put("report", "event")
        assert world.outbox.pending <= 10


def test_a_gap_is_sent_and_acknowledged_like_a_message(make):
    world = make(outbox_rows=4)
    world.put(*["report"] * 9)
    last = world.send()
    first = world.envelopes[0]
    assert (first.kind, unpack(first.body, Gap)) == ("gap", Gap(1, first.seq))
    assert first.oldest == 1
    world.acknowledge(last[-1])
    assert world.outbox.pending == 0


def test_a_long_gap_does_not_stop_what_follows_it(make):
    world = make(outbox_rows=4)
    world.put(*["report"] * 200)
    for _ in range(4):
        if sent := world.send():
            world.acknowledge(sent[-1])
    assert world.outbox.pending == 0
    assert world.envelopes[-1].seq == 200


@pytest.mark.parametrize("kind", ["event", "report"])
def test_a_message_too_large_ever_to_be_sent_is_refused_and_nothing_is_kept(make, kind):
    world = make()
    with pytest.raises(ProtocolError, match="at most"):
        world.put(kind, size=MAX_MESSAGE_BYTES)
    assert world.outbox.pending == 0


def test_the_largest_message_that_is_taken_can_be_sent(make):
    world = make()
    size = MAX_MESSAGE_BYTES
    while not world.outbox.pending:
        size -= 10
        try:
            world.put("event", size=size)
        except ProtocolError:
            assert size > MAX_MESSAGE_BYTES - 1_000
    assert world.send() == [1]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(["event", "report"]), st.integers(0, 300)),
        st.tuples(st.just("acknowledge"), st.floats(0, 1)),
        st.tuples(st.just("send")),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps, rows=st.integers(1, 12), size=st.integers(60, 5_000))
def test_rows_and_gaps_cover_every_number_exactly_once_whatever_happens(tmp_path_factory, steps, rows, size):
    store = Store(tmp_path_factory.mktemp("outbox") / "edge.db", durability="normal")
    broker = MemoryBroker()
    transport, listener = MemoryTransport(broker), MemoryTransport(broker)
    transport.connect()
    listener.connect()
    config = ReportConfig(outbox_rows=rows, outbox_bytes=size)
    world = World(store, new_outbox(store, transport, config), broker, transport, listener)
    last = acknowledged = 0
    kinds = {}
    dropped = 0
    for now, step in enumerate(steps):
        if step[0] == "put":
            last += 1
            kinds[last] = step[1]
            dropped += world.put(step[1], size=step[2])
        elif step[0] == "acknowledge":
            acknowledged = max(acknowledged, int(last * step[1]))
            world.acknowledge(acknowledged)
        elif step[0] == "send":
            world.outbox.send(START + 100.0 * now)
        else:
            world.outbox = new_outbox(store, transport, config)
        covered = [number for _, first, seq in world.held for number in range(first, seq + 1)]
        if acknowledged < last:
            assert covered == list(range(covered[0], last + 1))  # no hole, nothing twice, up to the last
            assert covered[0] <= acknowledged + 1
        else:
            assert covered == []
        for row in store.outbox():
            if row.kind == "gap":
                assert unpack(row.body, Gap) == Gap(row.first, row.seq)
            else:
                assert (row.first, row.kind) == (row.seq, kinds[row.seq])
        count, total, _ = store.outbox_size()
        assert count <= max(rows, 2)
        assert total <= size or [row.kind for row in store.outbox()[:-1]] in ([], ["gap"])
    assert dropped <= last
    store.close()


# ---- rate and budget


def test_after_an_outage_messages_go_out_at_a_limited_rate(make):
    world = make(max_per_s=10.0)
    world.put(*["event"] * 200)
    assert len(world.send()) == WINDOW  # a first burst
    world.acknowledge(WINDOW)
    assert world.send() == []
    assert len(world.send(START + 1)) == 10
    assert len(world.send(START + 1.5)) == 5
    assert world.send(START - 1000) == []  # a clock set back gives no allowance
    world.acknowledge(65)
    assert len(world.send(START + 3600)) == WINDOW


def test_dropping_reports_leaves_the_events_and_no_hole(make):
    world = make()
    world.put("event", "report", "summary", "event", "report")
    assert world.outbox.drop_reports(START) == 3
    assert world.held == [("event", 1, 1), ("gap", 2, 3), ("event", 4, 4), ("gap", 5, 5)]
    assert world.send() == [1, 3, 4, 5]
    assert unpack(world.envelopes[1].body, Gap) == Gap(2, 3)


def test_bytes_moved_count_topics_and_repetitions(make):
    world = make(resend_s=30)
    world.put("event")
    world.send()
    once = world.outbox.take_bytes_moved()
    assert once > world.outbox.take_bytes_sent() > 0
    world.send(START + 31)
    assert world.outbox.take_bytes_moved() == once
