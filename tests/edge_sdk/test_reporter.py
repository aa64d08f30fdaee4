"""What a device tells of itself: nothing twice, nothing lost, and no cell so small that it tells of single samples."""

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.config import DeviceConfig, ReportConfig
from edge_sdk.errors import ProtocolError
from edge_sdk.messages import Ack, Desired, Envelope, Event, Report, State, decode, encode, from_cells
from edge_sdk.reporter import Counters, Identity, Reporter, Window, build_report
from edge_sdk.store import Store
from edge_sdk.transport import MemoryBroker, MemoryTransport

CONFIG = ReportConfig(min_count=10)


def approx(latency):
    return pytest.approx(latency, rel=0.021)


def report_of(window, totals=None, *, now=100.0, carry=True, **facts):
    given = {
        "mode": "adapt",
        "monitors": [],
        "replay_rows": 7,
        "fresh_rows": 5,
        "rss_mb": 81.26,
    }
    return build_report(window, totals or Counters(), now=now, carry=carry, config=CONFIG, **{**given, **facts})


def window_of(*, labelled=0, correct=0, **predicted):
    window = Window(start=40.0, release=3, head=2, labelled=labelled, correct=correct)
    for label, count in predicted.items():
        window.count([label] * count, [0.75] * count, [2.0] * count)
    return window


def test_a_report_tells_the_window_and_the_totals():
    window = window_of(labelled=20, correct=15, a=30, b=12)
    window.unmatched, window.rejected_inputs, window.errors, window.written_bytes = 4, 3, 2, 999
    totals = Counters(promotions=1, rejections=2, rollbacks=3, labels_lost=4, outbox_dropped=5, predictions=10_000)
    report, after = report_of(window, totals)
    assert (report.start, report.end, report.release, report.head, report.mode) == (40.0, 100.0, 3, 2, "adapt")
    assert (report.predictions, report.predicted) == (42, {"a": 30, "b": 12})
    assert (report.labelled, report.correct) == (20, 15)
    assert (report.unmatched, report.rejected_inputs, report.errors, report.written_bytes) == (4, 3, 2, 999)
    assert (report.promotions, report.rejections, report.rollbacks) == (1, 2, 3)
    assert (report.labels_lost, report.outbox_dropped) == (4, 5)
    assert (report.mean_confidence, report.p50_ms, report.p95_ms) == (0.75, approx(2.0), approx(2.0))
    assert (report.replay_rows, report.fresh_rows, report.rss_mb) == (7, 5, 81.3)
    assert report.temperature_c is None
    assert report_of(window, totals, temperature_c=48.46)[0].temperature_c == 48.5
    assert after == Window(start=100.0, release=3, head=2)


def test_small_cells_are_merged_or_suppressed():
    assert report_of(window_of(a=30, b=6, c=4))[0].predicted == {"a": 30, "other": 10}
    assert report_of(window_of(a=30, b=9))[0].predicted == {"other": 39}
    assert report_of(window_of(a=9))[0].predicted == {}


def test_the_confidence_of_few_predictions_is_not_told():
    assert report_of(window_of(a=9))[0].mean_confidence == 0.0
    assert report_of(window_of(a=10))[0].mean_confidence == 0.75
    assert report_of(Window(start=0.0))[0].p95_ms == 0.0


def test_scores_of_few_labels_wait_until_enough_have_come_together():
    first, window = report_of(window_of(labelled=9, correct=4, a=50))
    assert (first.labelled, first.correct) == (0, 0)
    assert (window.labelled, window.correct, window.predictions) == (9, 4, 0)
    window.labelled += 1
    second, window = report_of(window, now=200.0)
    assert (second.labelled, second.correct, second.start) == (10, 4, 100.0)
    assert window == Window(start=200.0, release=3, head=2)


def test_scores_are_not_carried_over_to_another_version():
    report, window = report_of(window_of(labelled=9, correct=4), carry=False)
    assert (report.labelled, report.correct) == (0, 0)
    assert window == Window(start=100.0, release=3, head=2)


def test_building_a_report_changes_neither_window_nor_totals():
    window, totals = window_of(labelled=5, correct=5, a=12), Counters(promotions=1)
    before = msgspec.json.encode([window, totals])
    report_of(window, totals)
    assert msgspec.json.encode([window, totals]) == before


def test_a_window_keeps_all_latencies_in_little_room(rng):
    latencies = rng.lognormal(0.5, 0.4, 3_000)
    window = Window(start=0.0)
    for part in np.split(latencies, 30):
        window.count(["a"] * 100, [0.5] * 100, part.tolist())
    assert window.predictions == 3_000
    assert len(msgspec.json.encode(window)) < 1_500  # it is written at every flush
    report, _ = report_of(window)
    told = (report.p50_ms, report.p95_ms, report.p99_ms)
    assert told == tuple(approx(x) for x in np.percentile(latencies, [50, 95, 99]))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("predict"), st.dictionaries(st.sampled_from("abcd"), st.integers(1, 30), max_size=4)),
        st.tuples(st.just("label"), st.tuples(st.integers(0, 15), st.integers(0, 15))),
        st.tuples(st.just("report"), st.none()),
        st.tuples(st.just("swap"), st.none()),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(STEPS)
def test_nothing_is_counted_twice_or_lost_over_any_sequence_of_windows(steps):
    window = Window(start=0.0)
    reports, now = [], 0.0
    predicted, labelled, correct, dropped, dropped_correct = 0, 0, 0, 0, 0
    for step, argument in steps:
        now += 1
        if step == "predict":
            labels = [label for label, count in argument.items() for _ in range(count)]
            window.count(labels, [0.5] * len(labels), [1.0] * len(labels))
            predicted += len(labels)
        elif step == "label":
            right, wrong = argument
            window.labelled, window.correct = window.labelled + right + wrong, window.correct + right
            labelled, correct = labelled + right + wrong, correct + right
        elif step == "restart":
            window = msgspec.json.decode(msgspec.json.encode(window), type=Window)
        else:
            if step == "swap" and window.labelled < CONFIG.min_count:
                dropped, dropped_correct = dropped + window.labelled, dropped_correct + window.correct
            report, window = report_of(window, now=now, carry=step == "report")
            reports.append(report)
    assert sum(r.predictions for r in reports) + window.predictions == predicted
    assert sum(r.labelled for r in reports) + window.labelled + dropped == labelled
    assert sum(r.correct for r in reports) + window.correct + dropped_correct == correct
    assert all(r.labelled == 0 or r.labelled >= CONFIG.min_count for r in reports)
    assert all(count >= CONFIG.min_count for r in reports for count in r.predicted.values())
    assert all(sum(r.predicted.values()) <= r.predictions for r in reports)
    assert all(first.end == second.start for first, second in pairwise(reports))
    assert window.start == (reports[-1].end if reports else 0.0)


# ---- the reporter


class Updates:
    """Remembers what the update client would be given."""

    def __init__(self):
        self.blocks, self.desired, self.waiting = [], [], ""

    def take_block(self, digest, index, data):
        self.blocks.append((digest, index, data))

    def hear(self, payload, now):
        self.desired.append(decode(payload, Desired))

    def look_again(self, now):
        if self.waiting:
            raise ProtocolError(self.waiting)


@pytest.fixture
def broker():
    return MemoryBroker()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "edge.db", durability="normal")
    yield store
    store.close()


@pytest.fixture
def make_reporter(store, broker, clock):
    def make(**config):
        return Reporter(
            store, store_id="s1", boot=2, transport=MemoryTransport(broker), clock=clock,
            config=DeviceConfig(device="dev", **config),
        )  # fmt: skip

    return make


@pytest.fixture
def watcher(broker):
    transport = MemoryTransport(broker)
    transport.connect()
    transport.subscribe("#")
    return transport


def envelopes(watcher):
    return [decode(m.payload, Envelope) for m in watcher.receive() if m.topic.endswith(("/event", "/report"))]


def emit(reporter, store, *names):
    with store.transaction():
        for name in names:
            reporter.emit(name, {"reason": "test"})


def tell(reporter, clock):
    reporter.report(
        clock.now(), carry=True, monitors=[], replay_rows=0, fresh_rows=0, rss_mb=0.0,
    )  # fmt: skip


def test_events_raise_their_counters_and_are_recorded_here_too(make_reporter, store):
    reporter = make_reporter()
    emit(
        reporter,
        store,
        "drift_alarm",
        "drift_warning",
        "promoted",
        "rejected",
        "head_rolled_back",
        "release_rolled_back",
    )
    totals = reporter.counters
    assert (totals.alarms, totals.promotions, totals.rejections, totals.rollbacks) == (1, 1, 1, 2)
    assert [entry.name for entry in store.history()][:2] == ["drift_alarm", "drift_warning"]
    assert make_reporter().counters == totals


def test_events_and_reports_are_sent_in_order_with_what_served(make_reporter, store, watcher, clock):
    reporter = make_reporter()
    reporter.serve(Identity(release=4, head=1, digest="d"), clock.now())
    reporter.connect()
    emit(reporter, store, "promoted")
    reporter.window.count(["a"] * 20, [0.5] * 20, [1.0] * 20)
    clock.advance(300)
    tell(reporter, clock)
    assert reporter.send(clock.now()) == 2
    first, second = envelopes(watcher)
    event, report = msgspec.msgpack.decode(first.body, type=Event), msgspec.msgpack.decode(second.body, type=Report)
    assert (first.seq, first.store_id, second.seq) == (1, "s1", 2)
    assert (event.name, event.release, event.head, event.detail) == ("promoted", 4, 1, {"reason": "test"})
    assert (report.predictions, report.release, report.head) == (20, 4, 1)
    assert reporter.window.predictions == 0
    assert reporter.counters.bytes_sent > 0


def test_what_a_version_left_unreported_is_reported_as_its_own(make_reporter, store, watcher, clock):
    reporter = make_reporter()
    reporter.serve(Identity(release=1), clock.now())
    reporter.connect()
    reporter.window.count(["a"] * 20, [0.5] * 20, [1.0] * 20)
    with store.transaction():
        reporter.save()
    reporter = make_reporter()  # killed between the flip and its record
    reporter.connect()
    reporter.serve(Identity(release=2), clock.now(), monitors=[], replay_rows=0, fresh_rows=0, rss_mb=0.0)
    reporter.send(clock.now())
    (envelope,) = envelopes(watcher)
    report = msgspec.msgpack.decode(envelope.body, type=Report)
    assert (report.release, report.predictions) == (1, 20)
    assert (reporter.window.release, reporter.window.predictions) == (2, 0)


def test_acknowledged_messages_are_forgotten_and_others_sent_again(make_reporter, store, broker, watcher, clock):
    reporter = make_reporter()
    reporter.connect()
    emit(reporter, store, "drift_alarm", "promoted", "confirmed")
    reporter.send(clock.now())
    for ack in (Ack(store_id="another", seq=3), Ack(store_id="s1", seq=2)):
        watcher.publish(reporter.topics.down("dev", "ack"), encode(ack))
    assert reporter.listen(Updates()) == 2
    assert reporter.outbox.pending == 1
    sent = reporter.counters.bytes_sent
    watcher.receive()
    assert reporter.send(clock.now()) == 0
    clock.advance(30)
    reporter.send(clock.now())
    assert [envelope.seq for envelope in envelopes(watcher)] == [3]
    assert reporter.counters.bytes_sent == sent


def test_without_a_network_nothing_is_queued(store, clock):
    from edge_sdk.transport import NoTransport

    reporter = Reporter(store, store_id="s", boot=1, transport=NoTransport(), clock=clock, config=DeviceConfig())
    emit(reporter, store, "promoted")
    tell(reporter, clock)
    assert reporter.outbox.pending == 0
    assert reporter.counters.promotions == 1


def test_blocks_and_desired_state_reach_the_update_client_and_nonsense_is_counted(make_reporter, watcher):
    reporter = make_reporter(group="g")
    reporter.connect()
    updates, topics = Updates(), reporter.topics
    desired = Desired(revision=5, base=None, candidate=None, salt="", threshold=0, revoked=[])
    watcher.publish(topics.desired("g"), encode(desired), retain=True)
    watcher.publish(topics.desired("g"), b"\xff nonsense")
    watcher.publish(topics.desired("g"), b"", retain=True)
    watcher.publish(topics.down("dev", "ack"), b"{")
    assert reporter.listen(updates) == 4
    assert updates.desired == [desired]
    assert reporter.counters.bad_messages == 2
    updates.waiting = "nothing vouches for what waits"
    reporter.listen(updates)
    assert reporter.counters.bad_messages == 3


def test_every_connection_begins_with_a_birth_and_a_break_leaves_the_will(make_reporter, broker, watcher):
    reporter = make_reporter()
    reporter.identity = Identity(release=4, head=1, digest="d")
    reporter.connect()
    reporter.listen(Updates())
    broker.stop()
    broker.start()
    reporter.listen(Updates())
    reporter.close()
    states = [decode(m.payload, State) for m in watcher.receive() if m.topic.endswith("/state")]
    assert (states[-1].online, states[-1].reason) == (False, "stopped")
    births = [state for state in states if state.online]
    assert births
    assert all((b.device, b.boot, b.release, b.head, b.digest) == ("dev", 2, 4, 1, "d") for b in births)


def test_window_and_totals_survive_a_restart(make_reporter, store):
    reporter = make_reporter()
    reporter.window.count(["a", "b"], [0.5, 0.75], [1.0, 2.0])
    reporter.window.labelled = 3
    with store.transaction():
        reporter.save()
    assert make_reporter().window == reporter.window


def test_no_message_holds_anything_of_a_sample(make_reporter, store, watcher, clock, rng):
    """Inputs and latents are arrays: no list of numbers may leave."""
    reporter = make_reporter()
    reporter.connect()
    emit(reporter, store, "promoted")
    values = rng.random(20).tolist()
    reporter.window.count(["a"] * 20, values, values)
    tell(reporter, clock)
    reporter.send(clock.now())
    for envelope in envelopes(watcher):
        for value in msgspec.msgpack.decode(envelope.body):
            if isinstance(value, list | tuple | bytes):  # nothing was labelled: no confusion
                assert not value
    assert np.isfinite(reporter.counters.bytes_sent)


# ---- confusion, scores, intervals


def test_confusion_is_told_without_small_cells_and_waits_with_its_labels():
    window = window_of(labelled=40, correct=30, a=40)
    window.confuse([("a", "a")] * 25 + [("b", "b")] * 11 + [("a", "b")] * 3 + [("b", "a")])
    report, carried = report_of(window)
    assert from_cells(report.labels, report.confusion) == {"a\ta": 25, "other": 15}  # 4 alone could be told apart
    assert carried.confusion == {}
    few = window_of(labelled=3, correct=3, a=3)
    few.confuse([("a", "a")] * 3)
    report, carried = report_of(few)
    assert (report.confusion, carried.confusion) == (b"", {"a\ta": 3})


def test_confusion_of_many_labels_stays_small():
    window = window_of(labelled=40_000, correct=0, a=10)
    window.confuse([(f"l{i}", f"l{j}") for i in range(40) for j in range(40) for _ in range(12)])
    assert len(window.confusion) <= 1001
    report, _ = report_of(window)
    told = from_cells(report.labels, report.confusion)
    assert len(told) <= 101
    assert sum(told.values()) == 40 * 40 * 12


def test_scores_are_told_over_all_rows_once_there_are_enough():
    scores = {"rows": 50.0, "accuracy": 0.91234, "f1": None, "classes": {"a": {}}, "slices": {"yard": {}}}
    assert report_of(window_of(), scores=scores)[0].scores == {"accuracy": 0.9123}
    assert report_of(window_of(), scores={**scores, "rows": 9.0})[0].scores == {}
    assert report_of(window_of(), scores={})[0].scores == {}


@pytest.mark.parametrize(
    ("settings", "on_mains", "ordered_s", "interval_s"),
    [
        ({}, None, 0.0, 300.0),
        ({"metered": True}, True, 0.0, 3600.0),
        ({"battery_interval_s": 900.0}, False, 0.0, 900.0),
        ({"battery_interval_s": 900.0}, True, 0.0, 300.0),
        ({"battery_interval_s": 900.0}, None, 0.0, 300.0),
        ({"battery_interval_s": 900.0, "metered": True}, False, 0.0, 3600.0),
        ({}, None, 20.0, 20.0),
        ({"metered": True}, None, 20.0, 3600.0),
    ],
)
def test_the_interval_follows_link_battery_and_orders(tmp_path, clock, settings, on_mains, ordered_s, interval_s):
    store = Store(tmp_path / "edge.db", durability="normal")
    config = DeviceConfig(device="dev-1", report=ReportConfig(**settings))
    reporter = Reporter(
        store, store_id="s", boot=1, transport=MemoryTransport(MemoryBroker()), clock=clock, config=config
    )
    reporter.stand(interval_s=ordered_s)
    start = reporter.window.start
    assert not reporter.report_due(start + interval_s - 1, lambda: on_mains)
    assert reporter.report_due(start + interval_s, lambda: on_mains)
    store.close()


def test_a_pause_ends_in_time_or_when_it_is_resumed(tmp_path, clock):
    store = Store(tmp_path / "edge.db", durability="normal")
    config = DeviceConfig(device="dev-1")
    reporter = Reporter(
        store, store_id="s", boot=1, transport=MemoryTransport(MemoryBroker()), clock=clock, config=config
    )
    now = clock.now()
    assert not reporter.learning_paused(now)
    reporter.stand(paused=True, paused_at=now, paused_s=60.0)
    assert [reporter.learning_paused(now + at) for at in (0, 59, 60, -1)] == [True, True, False, False]
    reporter.stand(paused=True, paused_at=now, paused_s=0.0)
    assert reporter.learning_paused(now + 1e9)
    reporter.stand(paused=False)
    assert not reporter.learning_paused(now)
    store.close()
