"""Roll-ups equal what they are of, retention keeps a year bounded, and neither holds up the ingest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.messages import Envelope, Topics, encode, raw, to_buckets
from edge_sdk.sketch import QuantileSketch
from edge_sdk.transport import Message
from edge_server import retention
from edge_server.ingest import ReportRow, Turn
from edge_server.retention import tend
from edge_server.settings import RetentionSettings
from edge_server.store import Store
from edge_server.store_rollups import DAY, HOUR, MINUTE, SPANS, latency_ms

COUNTS = ("reports", "predictions", "errors", "labelled", "correct", "alarmed", "warned", "received_bytes")
FOR_EVER = RetentionSettings(reports_days=0, events_days=0, minutes_days=0, hours_days=0)


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "coordinator.db", durable=False)
    yield opened
    opened.close()


def row(device="a", seq=1, *, start=0.0, received=0.0, release=1, body=b"x" * 10, **counts):
    values = {"predictions": 5, "errors": 1, "labelled": 4, "correct": 3, "alarms": 0, "warnings": 0, **counts}
    return ReportRow(
        device, "s", seq, start, received, start, release, 0, "adapt", **values, p50_ms=1.0, p99_ms=2.0, body=body
    )


def add(store, rows):
    with store.transaction():
        store.ingest.write_reports(rows)


def tend_all(store, kept=FOR_EVER, now=0.0):
    while tend(store, kept, now):
        pass


def totals(store, span):
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in COUNTS)
    return store.read(f"SELECT {sums} FROM rollups WHERE span = ?", span)[0]


REPORTS = st.builds(
    dict,
    device=st.sampled_from(["a", "b", "c"]),
    start=st.floats(0, 3 * DAY),
    release=st.integers(0, 2),
    predictions=st.integers(0, 1000),
    errors=st.integers(0, 10),
    labelled=st.integers(0, 100),
    correct=st.integers(0, 100),
    alarms=st.integers(0, 2),
    warnings=st.integers(0, 2),
    body=st.binary(max_size=20),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(REPORTS, max_size=40), st.integers(1, 7), st.integers(0, 40))
def test_sums_over_every_span_equal_the_sums_over_the_reports(tmp_path_factory, reports, limit, pause):
    store = Store(tmp_path_factory.mktemp("rollups") / "coordinator.db", durable=False)
    try:
        rows = [row(seq=seq, **report) for seq, report in enumerate(reports)]
        for part in (rows[:pause], rows[pause:]):  # some come later, and belong to sums that are there
            add(store, part)
            with store.transaction():
                while store.rollups.add_reports(limit):
                    pass
        expected = (
            len(rows),
            *(sum(getattr(report, name) for report in rows) for name in COUNTS[1:5]),
            sum(report.alarms > 0 for report in rows),
            sum(report.warnings > 0 for report in rows),
            sum(len(report.body) for report in rows),
        )
        for span in SPANS:
            assert totals(store, span) == expected
            fleet = store.rollups.of_fleet(span=span, since=0, until=4 * DAY)
            assert sum(record.predictions for record in fleet) == expected[1]
            for record in fleet:
                within = [r for r in rows if r.start // span * span == record.start and r.release == record.release]
                assert record.reports == len(within)
    finally:
        store.close()


def test_a_report_is_added_once_however_often_the_coordinator_looks(store):
    add(store, [row(seq=1), row(seq=2, start=61.0)])
    tend_all(store)
    tend_all(store)
    assert [record.reports for record in store.rollups.of_device("a", span=MINUTE, since=0, until=DAY)] == [1, 1]
    assert totals(store, DAY)[0] == 2


def test_a_failure_within_a_step_changes_nothing(store, monkeypatch):
    add(store, [row(seq=1)])

    def fail(*_args, **_more):
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(store.rollups, "drop_sums", fail)
        with pytest.raises(RuntimeError):
            tend(store, RetentionSettings(), 0.0)
    assert totals(store, DAY)[0] == 0
    tend_all(store)
    assert totals(store, DAY)[0] == 1


def test_reports_go_when_their_time_has_come_and_their_sums_stay(store):
    kept = RetentionSettings(reports_days=1, events_days=1, minutes_days=1, hours_days=2)
    add(store, [row(seq=seq, start=seq * HOUR, received=seq * HOUR) for seq in range(72)])
    tend_all(store, kept, now=72 * HOUR)
    assert store.read("SELECT min(seq), count(*) FROM reports") == [(48, 24)]
    assert store.read("SELECT min(start) FROM rollups WHERE span = 60") == [(48 * HOUR,)]
    assert store.read("SELECT min(start) FROM rollups WHERE span = 3600") == [(24 * HOUR,)]
    assert totals(store, DAY)[0] == 72


def test_numbers_are_never_given_twice_though_all_reports_are_old(store):
    kept = RetentionSettings(reports_days=1)
    add(store, [row(seq=seq) for seq in range(1, 4)])
    tend_all(store, kept, now=10 * DAY)
    assert store.read("SELECT count(*) FROM reports") == [(1,)], "the newest says where the next one goes"
    add(store, [row(seq=9, received=10.0 * DAY)])
    tend_all(store, kept, now=10 * DAY)
    assert totals(store, DAY)[0] == 4


def test_what_was_not_added_up_is_not_deleted(store, monkeypatch):
    monkeypatch.setattr(retention, "REPORTS", 2)
    add(store, [row(seq=seq) for seq in range(7)])
    kept = RetentionSettings(reports_days=1)
    seen = []
    more = True
    while more:
        more = tend(store, kept, now=10 * DAY)
        seen.append(totals(store, DAY)[0])
    assert seen[:3] == [2, 4, 6]
    assert totals(store, DAY)[0] == 7


def test_latencies_of_an_hour_are_added_over_its_summaries(store, summary):
    topics = Topics()
    turn = Turn(topics=topics, positions={}, known={"a"}, accept_unknown=False, now=1.0)
    everything = QuantileSketch()
    for seq, start in enumerate((0.0, 1800.0, 3600.0), start=1):
        sketch = QuantileSketch()
        sketch.add([seq, 10.0 * seq])
        everything.merge(sketch)
        body = summary(start=start, end=start + 1800, latency=to_buckets(*sketch.to_wire()))
        envelope = Envelope(store_id="s", seq=seq, oldest=1, time=start, kind="summary", body=raw(body))
        turn.read(Message(topics.up("a", "report"), encode(envelope)))
    with store.transaction():
        store.ingest.write(turn)
    add(store, [row(seq=9)])
    tend_all(store)
    hours = store.rollups.of_device("a", span=HOUR, since=0, until=DAY)
    assert [(record.start, record.reports) for record in hours] == [(0, 1), (3600, 0)]
    (day,) = store.rollups.of_device("a", span=DAY, since=0, until=DAY)
    assert latency_ms([day], 0.9) == latency_ms(hours, 0.9) == everything.quantile(0.9)
    assert latency_ms(store.rollups.of_device("a", span=MINUTE, since=0, until=DAY), 0.9) is None


def test_a_year_of_many_devices_stays_bounded(store):
    kept = RetentionSettings(reports_days=2, events_days=2, minutes_days=1, hours_days=7)
    devices = [f"device-{number}" for number in range(20)]
    sizes = []
    for day in range(365):
        for part in range(2):
            at = day * DAY + part * DAY / 2
            add(store, [row(name, 2 * day + part, start=at, received=at) for name in devices])
        tend_all(store, kept, now=(day + 1) * DAY)
        counted = dict(store.read("SELECT span, count(*) FROM rollups GROUP BY span"))
        sizes.append((store.read("SELECT count(*) FROM reports")[0][0], counted[MINUTE], counted[HOUR]))
    assert sizes[-1] == sizes[30] == (80, 40, 280)
    assert counted[DAY] == 365 * len(devices)
    assert totals(store, DAY)[0] == 365 * 2 * len(devices)


@pytest.mark.parametrize(
    ("run", "index"),
    [
        (lambda store: store.rollups.of_device("a", span=HOUR, since=0, until=9), "device=? AND span=?"),
        (lambda store: store.rollups.of_fleet(span=HOUR, since=0, until=9), "span=? AND start>? AND start<?"),
        (lambda store: store.rollups.drop_sums(HOUR, before=9, limit=1), "span=? AND start<?"),
        (lambda store: store.rollups.drop_rows("reports", before=9, limit=1), "rowid<?"),
        (lambda store: store.rollups.add_reports(1), "rowid>?"),
        (lambda store: store.rollups.add_summaries(1), "rowid>?"),
        (lambda store: store.rollups.add_up_days(before=9 * DAY, limit=1), "span=? AND hour<?"),
        (lambda store: store.rollups.drop_summaries(before=9 * DAY, limit=1), "span=? AND hour<?"),
        (lambda store: store.reports.last("a"), "device=?"),
        (lambda store: store.reports.summaries("a"), "device=?"),
    ],
)
def test_queries_of_what_grows_use_an_index(store, run, index):
    asked = []
    store.conn.set_trace_callback(asked.append)
    run(store)
    store.conn.set_trace_callback(None)
    plans = [step[3] for sql in asked for step in store.read(f"EXPLAIN QUERY PLAN {sql}")]
    grown = [plan for plan in plans if any(name in plan for name in ("rollups", "reports", "summaries"))]
    assert any(index in plan for plan in grown), grown
    assert not [plan for plan in grown if plan.startswith("SCAN") and "INDEX" not in plan], grown
