"""Summaries of a day added up say what its hours said, are added up once, and stay bounded."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.clock import ManualClock
from edge_sdk.messages import Envelope, MetricSummary, Topics, encode, raw, to_buckets, to_counts
from edge_sdk.messages import Summary as SummaryMessage
from edge_sdk.sketch import QuantileSketch
from edge_sdk.transport import Message
from edge_server import store_rollups
from edge_server.fleet import Baseline, merge_summaries
from edge_server.ingest import Turn
from edge_server.insight import Insight
from edge_server.releases import BlobStore
from edge_server.retention import tend
from edge_server.settings import RetentionSettings, Settings
from edge_server.store import Store
from edge_server.store_rollups import DAY, HOUR, latency_ms
from edge_server.summaries import add_up

KEPT = RetentionSettings(summaries_days=2.0, day_summaries_days=30.0)
LATE = 10 * DAY


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "coordinator.db", durable=False)
    yield opened
    opened.close()


def sketch(values):
    made = QuantileSketch()
    made.add(np.asarray(values, float))
    return to_buckets(*made.to_wire())


def told(seed, *, start, end=None, release=1, head=0, reference="ref", bins=8, unit=10, untold=False, metric=True):
    """An hour of a device with two features."""
    rng = np.random.default_rng(seed)
    moments = np.sort(rng.normal(size=(2, 4)).astype("<f4") ** 2, axis=1)[:, [1, 0, 0, 3]]
    if untold:
        moments[1] = np.nan
    clicks = rng.normal(5, 3, size=20)
    return SummaryMessage(
        start=start,
        end=start + HOUR if end is None else end,
        release=release,
        head=head,
        reference=reference,
        unit=unit,
        rows=unit * int(rng.integers(10, 50)),
        features=["x", "y"],
        bins=bins,
        counts=to_counts(rng.integers(0, 300, 2 * bins).tolist()),
        missing=to_counts(rng.integers(0, 3, 2).tolist()),
        moments=moments.tobytes(),
        confidence=to_counts(rng.integers(0, 5, 64).tolist()),
        classes={"a": unit * int(rng.integers(1, 9)), f"class {seed % 3}": unit},
        latency=sketch(rng.gamma(3, size=30)),
        metrics=[
            MetricSummary(
                *("clicks", unit * 20, float(clicks.mean()), float(clicks.std())),
                *(float(clicks.min()), float(clicks.max()), sketch(clicks[clicks >= 0]), sketch(-clicks[clicks < 0])),
            )
        ]
        if metric
        else [],
        monitors=[],
    )


def take_in(store, messages, *, device="a", now=1.0):
    topics = Topics()
    last = store.read("SELECT coalesce(max(last_seq), 0) FROM positions WHERE device = ?", device)[0][0]
    turn = Turn(topics=topics, positions={(device, "s"): last}, known={device}, accept_unknown=False, now=now)
    for seq, message in enumerate(messages, start=last + 1):
        envelope = Envelope(store_id="s", seq=seq, oldest=1, time=message.end, kind="summary", body=raw(message))
        turn.read(Message(topics.up(device, "report"), encode(envelope)))
    assert len(turn.summaries) == len(messages)
    with store.transaction():
        store.ingest.write(turn)


def tend_all(store, now=LATE, kept=KEPT):
    turns = 1
    while tend(store, kept, now):
        turns += 1
    return turns


def views(store, devices=("a",)):
    """What the fleet's views say, by day and by release."""
    groups = (
        lambda device, _message: ("all", device),
        lambda _device, message: (str(int((message.start + message.end) / 2 // DAY)), f"release {message.release}"),
    )
    return [
        {key: summary.view(key[0], Baseline()) for key, summary in merge_summaries(
            store.fleet.summaries(devices, since=0, until=99 * DAY), group, lambda *_: Baseline()).items()}
        for group in groups
    ]  # fmt: skip


def check_same(before, after):
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        for key, view in old.items():
            _check_view(msgspec.to_builtins(view), msgspec.to_builtins(new[key]))


def _check_view(old, new):
    if isinstance(old, dict):
        assert old.keys() == new.keys()
        for name, value in old.items():
            _check_view(value, new[name])
    elif isinstance(old, list):
        assert len(old) == len(new)
        for one, other in zip(old, new, strict=True):
            _check_view(one, other)
    elif isinstance(old, float):
        assert new == pytest.approx(old, rel=2e-6, abs=1e-6)  # moments are float32
    else:
        assert new == old


HOURS = st.lists(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 10_000),
            "hour": st.integers(0, 71),
            "device": st.sampled_from(["a", "b"]),
            "release": st.integers(1, 2),
            "head": st.integers(0, 1),
            "reference": st.sampled_from(["ref", "ref", "other"]),
            "bins": st.sampled_from([8, 16]),
            "unit": st.sampled_from([10, 10, 25]),
            "untold": st.booleans(),
            "metric": st.booleans(),
        }
    ),
    max_size=30,
    unique_by=lambda entry: (entry["device"], entry["hour"]),
)


@settings(max_examples=15, deadline=None)
@given(HOURS, st.integers(0, 30))
def test_views_of_days_say_what_those_of_hours_said(tmp_path_factory, hours, pause):
    store = Store(tmp_path_factory.mktemp("summaries") / "coordinator.db", durable=False)
    try:
        for part in (hours[:pause], hours[pause:]):  # devices that were away tell of days that were added up already
            for entry in part:
                facts = dict(entry)
                device, start = facts.pop("device"), facts.pop("hour") * HOUR + 1.0
                take_in(store, [told(start=start, **facts)], device=device)
            before = views(store, ("a", "b"))
            tend_all(store)
            check_same(before, views(store, ("a", "b")))
        assert not store.read("SELECT 1 FROM summaries WHERE span != ?", DAY)
        agree = ("device", "release", "head", "reference", "bins", "unit", "untold")
        kinds = {(entry["hour"] // 24, *(entry[name] for name in agree)) for entry in hours}
        assert store.read("SELECT count(*) FROM summaries") == [(len(kinds),)]
    finally:
        store.close()


def test_the_hours_of_a_day_become_one_row_when_their_time_has_come(store):
    take_in(store, [told(hour, start=hour * HOUR) for hour in range(72)])
    tend_all(store, now=3 * DAY + HOUR)
    spans = "SELECT span, count(*), min(hour), max(hour), min(start) FROM summaries GROUP BY span ORDER BY span"
    assert store.read(spans) == [(HOUR, 48, 25, 72, DAY), (DAY, 1, 24, 24, 0.0)]
    tend_all(store, now=4 * DAY)
    assert store.read(spans) == [(HOUR, 24, 49, 72, 2.0 * DAY), (DAY, 2, 24, 48, 0.0)]


def test_by_hour_a_day_that_was_added_up_is_shown_as_a_day(store, tmp_path):
    with store.transaction():
        store.devices.add("a", group="default", credential="x", now=0.0)
    take_in(store, [told(hour, start=hour * HOUR) for hour in (*range(24), 24 * 3, 24 * 3 + 1)])
    insight = Insight(store, BlobStore(tmp_path / "blobs"), settings=Settings(), clock=ManualClock(LATE))
    assert len(insight.view(by="hour", since=0.0)) == 26
    tend_all(store, now=4 * DAY)
    groups = [view.group for view in insight.view(by="hour", since=0.0)]
    assert groups == ["1970-01-01", "1970-01-04 00:00", "1970-01-04 01:00"]
    assert [view.group for view in insight.view(by="day", since=0.0)] == ["1970-01-01", "1970-01-04"]


def test_latencies_are_added_to_the_sums_once_though_summaries_become_one(store):
    hours = [told(hour, start=hour * HOUR) for hour in range(24)]
    take_in(store, hours)
    tend_all(store, now=1.0)
    sums = store.rollups.of_device("a", span=DAY, since=0, until=DAY)
    tend_all(store)
    assert store.rollups.of_device("a", span=DAY, since=0, until=DAY) == sums
    assert latency_ms(sums, 0.5) is not None


def test_numbers_are_never_given_twice_though_every_summary_is_too_old(store):
    take_in(store, [told(hour, start=hour * HOUR) for hour in range(3)])
    tend_all(store, now=90 * DAY)
    assert store.read("SELECT rowid FROM summaries") == [(3,)], "the newest says where the next one goes"
    take_in(store, [told(9, start=80.0 * DAY)])
    tend_all(store, now=90 * DAY)
    assert store.read("SELECT rowid, span FROM summaries") == [(4, DAY)]
    assert len(store.rollups.of_device("a", span=DAY, since=0, until=99 * DAY)) == 2


def test_what_cannot_be_added_stays_as_it_came(store, summary):
    unreadable = [summary(start=hour * HOUR, end=(hour + 1.0) * HOUR) for hour in range(2)]  # of 4 bins
    overlapping = [told(1, start=5 * HOUR, end=8 * HOUR, release=2), told(2, start=5 * HOUR, head=1),
                   told(3, start=7 * HOUR, head=1)]  # fmt: skip
    metrics = [MetricSummary("m", 10, 1e300, 1e300, 0.0, 1e300, b"", b"")]
    extreme = [msgspec.structs.replace(told(seed, start=seed * HOUR), metrics=metrics) for seed in (12, 13)]
    long = [told(20, start=0.0, end=4.0 * DAY)]
    without_unit = [msgspec.structs.replace(told(21, start=21.0 * HOUR), unit=0)]
    take_in(store, [*unreadable, *overlapping, *extreme, *long, *without_unit])
    before = views(store)
    tend_all(store)
    check_same(before, views(store))
    bodies = [body for (body,) in store.read("SELECT body FROM summaries")]
    told_before = (*unreadable, *overlapping, *extreme, *long, *without_unit)
    assert sorted(bodies) == sorted(bytes(raw(message)) for message in told_before)
    assert not store.read("SELECT 1 FROM summaries WHERE span != ?", DAY)


def test_a_summary_with_a_deviation_beyond_all_numbers_does_no_harm_to_the_view(store):
    odd = msgspec.structs.replace(
        told(1, start=0.0), metrics=[MetricSummary("m", 10, 0.0, 1e200, 0.0, 1e200, b"", b"")]
    )
    take_in(store, [odd, told(2, start=HOUR)])
    (view,) = {key: found for key, found in views(store)[0].items() if key[0] == "all"}.values()
    assert (view.skipped, view.rows) == (1, told(2, start=HOUR).rows)


def test_a_year_of_summaries_stays_bounded_and_each_turn_short(store):
    devices = [f"device-{number}" for number in range(3)]
    sizes, turns = [], []
    for day in range(120):
        for device in devices:
            take_in(store, [told(part, start=(day + part / 2) * DAY) for part in range(2)], device=device)
        turns.append(tend_all(store, now=(day + 1) * DAY))
        sizes.append(store.read("SELECT count(*) FROM summaries")[0][0])
    # of the last two days all hours, of the 28 before them the days
    assert sizes[-1] == sizes[40] == len(devices) * (2 * 2 + 28)
    assert max(turns) <= 3


def test_a_device_that_tells_of_very_many_is_added_up_in_parts(store, monkeypatch):
    added = []
    monkeypatch.setattr(store_rollups, "add_up", lambda told: added.append(len(told)) or add_up(told))
    minutes = [told(minute, start=minute * 120.0, end=(minute + 1) * 120.0) for minute in range(450)]
    take_in(store, minutes)
    before = views(store)
    tend_all(store)
    check_same(before, views(store))
    assert store.read("SELECT count(*), sum(span) FROM summaries") == [(1, DAY)]
    assert max(added) <= 100


def test_sums_of_sums_are_the_sum_of_all():
    hours = [told(hour, start=hour * HOUR) for hour in range(6)]
    (whole,) = add_up(hours)
    parts = [part.message for some in (hours[:2], hours[2:]) for part in add_up(some)]
    (again,) = add_up(parts)
    exact = ("start", "end", "rows", "counts", "missing", "confidence", "classes", "latency")
    assert [getattr(again.message, name) for name in exact] == [getattr(whole.message, name) for name in exact]
