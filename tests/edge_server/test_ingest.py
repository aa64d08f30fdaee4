import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.messages import (
    MAX_SUMMARY_BYTES,
    Ack,
    Envelope,
    Event,
    Gap,
    MetricSummary,
    MonitorState,
    Report,
    State,
    Summary,
    Topics,
    encode,
    raw,
    to_counts,
)
from edge_sdk.transport import Message
from edge_server.ingest import Turn, Verdict, expected_seq, judge

TOPICS = Topics()
EVENT = Event(name="boot", release=1, head=0, detail={})


def new_turn(positions=None, *, known=("a",), accept_unknown=False):
    return Turn(topics=TOPICS, positions=positions or {}, known=set(known), accept_unknown=accept_unknown, now=100.0)


def envelope(seq, *, oldest=1, body=EVENT, kind="event", time=1.0, store_id="s"):
    body = body if isinstance(body, msgspec.Raw) else raw(body)
    return Envelope(store_id=store_id, seq=seq, oldest=oldest, time=time, kind=kind, body=body)


def send(turn, *envelopes, device="a", kind="event"):
    for entry in envelopes:
        turn.read(Message(TOPICS.up(device, kind), encode(entry)))


class TestRules:
    @pytest.mark.parametrize(
        ("last", "first", "seq", "oldest", "verdict"),
        [
            (None, 1, 1, 1, Verdict.ACCEPT),
            (None, 7, 7, 7, Verdict.ACCEPT),
            (None, 8, 8, 7, Verdict.AHEAD),
            (4, 5, 5, 1, Verdict.ACCEPT),
            (4, 4, 4, 1, Verdict.DUPLICATE),
            (4, 6, 6, 1, Verdict.AHEAD),
            (4, 9, 9, 9, Verdict.ACCEPT),
            (4, 10, 10, 9, Verdict.AHEAD),
            (4, 5, 8, 5, Verdict.ACCEPT),
            (4, 3, 8, 3, Verdict.ACCEPT),  # a gap over rows that were committed without the device knowing
            (4, 2, 4, 2, Verdict.DUPLICATE),
        ],
    )
    def test_a_row_is_accepted_only_when_it_covers_what_comes_next(self, last, first, seq, oldest, verdict):
        assert judge(last, first=first, seq=seq, oldest=oldest) is verdict

    @given(st.none() | st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
    def test_an_accepted_row_always_moves_the_position(self, last, first, seq, oldest):
        if judge(last, first=first, seq=seq, oldest=oldest) is Verdict.ACCEPT:
            assert first <= expected_seq(last, oldest) <= seq
            assert last is None or seq > last


class Line:
    """A lossy line between one outbox and the rules, with a coordinator that commits or crashes."""

    def __init__(self, rows):
        self.queue = [(n, n) for n in range(1, rows + 1)]  # (first, seq); a gap spans more than one
        self.position = {}
        self.stored, self.covered = [], set()

    def turn(self, numbers, *, commits, ack_arrives):
        turn = new_turn(self.position)
        oldest = self.queue[0][0] if self.queue else 0
        for number in numbers:
            first, seq = self.queue[number % len(self.queue)]
            body, kind = (EVENT, "event") if first == seq else (Gap(first, seq), "gap")
            send(turn, envelope(seq, oldest=oldest, body=body, kind=kind))
        if not commits:
            return
        self.position.update(turn.positions)
        self.stored += [row.seq for row in turn.events]
        for gap in turn.gaps:
            self.covered |= set(range(gap.first, gap.last + 1))
        for device, ack in turn.acks:
            assert device == "a"
            assert ack.seq <= self.position.get(("a", "s"), oldest - 1)
            if ack_arrives:
                self.queue = [(first, seq) for first, seq in self.queue if seq > ack.seq]

    def drop(self, start, count):
        """The outbox is full: some rows become one gap."""
        run = self.queue[start : start + count]
        if run:
            self.queue[start : start + count] = [(run[0][0], run[-1][1])]


class TestLossyLine:
    @given(st.integers(1, 12), st.data())
    def test_every_row_is_stored_exactly_once_in_order_or_reported_as_gap(self, rows, data):
        line = Line(rows)
        for _ in range(data.draw(st.integers(0, 8))):
            if not line.queue:
                break
            if data.draw(st.booleans()):
                line.drop(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 4)))
            # any subset, in any order, repeated: what losses, duplicates and reorderings make of it
            numbers = data.draw(st.lists(st.integers(0, 30), max_size=10))
            line.turn(numbers, commits=data.draw(st.booleans()), ack_arrives=data.draw(st.booleans()))
        for _ in range(rows + 1):  # then the line holds, and the outbox resends from its oldest row
            if line.queue:
                line.turn(range(len(line.queue)), commits=True, ack_arrives=True)

        assert not line.queue
        assert line.stored == sorted(set(line.stored))
        assert set(line.stored) | line.covered == set(range(1, rows + 1))
        assert not set(line.stored) & line.covered


class TestTurn:
    def test_rows_in_order_are_stored_and_answered_once(self):
        turn = new_turn()
        send(turn, envelope(1), envelope(2), envelope(3))
        assert [row.seq for row in turn.events] == [1, 2, 3]
        assert turn.acks == [("a", Ack("s", 3))]

    def test_a_row_ahead_is_not_stored_and_the_last_committed_is_repeated(self):
        turn = new_turn({("a", "s"): 4})
        send(turn, envelope(6))
        assert turn.events == []
        assert turn.acks == [("a", Ack("s", 4))]

    def test_a_duplicate_is_acknowledged_again(self):
        turn = new_turn({("a", "s"): 4})
        send(turn, envelope(3))
        assert turn.events == []
        assert turn.acks == [("a", Ack("s", 4))]

    def test_an_unknown_outbox_that_begins_late_is_told_where_to_begin(self):
        turn = new_turn()
        send(turn, envelope(9, oldest=7))
        assert turn.acks == [("a", Ack("s", 6))]

    def test_rows_that_vanished_become_a_gap(self):
        turn = new_turn({("a", "s"): 4})
        send(turn, envelope(9, oldest=9))
        assert [(gap.first, gap.last, gap.source) for gap in turn.gaps] == [(5, 8, "coordinator")]
        assert [row.seq for row in turn.events] == [9]

    def test_a_gap_records_only_what_is_new_of_it(self):
        turn = new_turn({("a", "s"): 4})
        send(turn, envelope(8, oldest=3, kind="gap", body=Gap(3, 8)))
        assert [(gap.first, gap.last, gap.source) for gap in turn.gaps] == [(5, 8, "device")]
        assert turn.acks == [("a", Ack("s", 8))]

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            ("report", msgspec.Raw(msgspec.msgpack.encode("nonsense"))),
            ("report", EVENT),
            ("event", msgspec.Raw(msgspec.msgpack.encode([1, 2]))),
            ("event", Event(name="", release=1, head=0, detail={})),
            ("event", Event(name="boot", release=-1, head=0, detail={})),
            ("event", Event(name="boot", release=2**63, head=0, detail={})),
            ("gap", Gap(5, 1)),
            ("gap", msgspec.Raw(msgspec.msgpack.encode({}))),
            ("from the future", EVENT),
        ],
    )
    def test_a_body_that_cannot_be_read_does_not_hold_up_those_behind_it(self, kind, body):
        turn = new_turn()
        send(turn, envelope(1, kind=kind, body=body), envelope(2))
        assert [row.seq for row in turn.rejected] == [1]
        assert [row.seq for row in turn.events] == [2]
        assert turn.acks == [("a", Ack("s", 2))]
        assert turn.counters["rejected_body"] == 1

    @pytest.mark.parametrize(
        "changes",
        [
            {"labelled": 5, "correct": 6},
            {"predictions": -1},
            {"release": 2**63},
            {"mean_confidence": math.nan},
            {"start": math.inf},
        ],
    )
    def test_a_report_with_impossible_numbers_is_rejected(self, report, changes):
        turn = new_turn()
        send(turn, envelope(1, kind="report", body=report(**changes)), kind="report")
        assert turn.reports == []
        assert len(turn.rejected) == 1

    @pytest.mark.parametrize(
        "changes",
        [
            {"rows": -1},
            {"end": math.inf},
            {"end": 1e300},
            {"bins": 5},
            {"bins": 2**40},
            {"counts": b"\xff"},
            {"missing": to_counts([0])},
            {"moments": bytes(31)},
            {"confidence": b"\x80"},
            {"classes": {"a": -1}},
            {"metrics": [MetricSummary("click", 10, math.nan, 0.0, 0.0, 0.0, b"", b"")]},
            {"metrics": [MetricSummary("click", -10, 0.0, 0.0, 0.0, 0.0, b"", b"")]},
            {"monitors": [MonitorState("input", math.inf, 1.0, warning=False, alarm=False)]},
            {"metrics": [MetricSummary("click", 10, 0.0, 0.0, 0.0, 0.0, b"", b"\x00\x00")]},
            {"latency": b"\x80"},
            {"latency": bytes(MAX_SUMMARY_BYTES)},
            {"features": ["x"] * 65, "bins": 0, "counts": b"", "missing": bytes(65), "moments": bytes(16 * 65)},
        ],
    )
    def test_a_summary_with_impossible_numbers_is_rejected(self, summary, changes):
        turn = new_turn()
        send(turn, envelope(1, kind="summary", body=summary(**changes)), kind="report")
        assert turn.summaries == []
        assert len(turn.rejected) == 1

    def test_a_summary_is_kept_as_it_came_and_says_nothing_of_what_runs(self, summary):
        turn = new_turn()
        send(turn, envelope(1, kind="summary", body=summary(end=7201.0)), kind="report")
        (row,) = turn.summaries
        assert msgspec.msgpack.decode(row.body, type=Summary) == summary(end=7201.0)
        assert row.hour == 2
        assert turn.latest == {}
        assert turn.acks == [("a", Ack("s", 1))]

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"\x02\x90",
            b"\x01garbage",
            b"\x01" + b"x" * 130_000,
            encode(envelope(1, time=math.nan)),
            encode(envelope(1, time=1e300)),
            encode(envelope(-1)),
            encode(envelope(5, oldest=6)),
            encode(envelope(2**63)),
            encode(envelope(1, store_id="s" * 257)),
        ],
    )
    def test_malformed_messages_are_counted_and_change_nothing(self, payload):
        turn = new_turn()
        turn.read(Message(TOPICS.up("a", "event"), payload))
        assert turn.counters == {"malformed": 1}
        assert (turn.events, turn.acks, turn.seen) == ([], [], set())

    @given(st.binary(max_size=200), st.sampled_from(["report", "event", "need", "state", "what"]))
    def test_no_payload_whatever_raises(self, payload, kind):
        new_turn().read(Message(TOPICS.up("a", kind), b"\x01" + payload))

    @pytest.mark.parametrize("topic", ["edge/d/a/dn/ack", "other", "edge/d//up/event", "edge/d/-x/up/event"])
    def test_unexpected_topics_are_counted(self, topic):
        turn = new_turn(accept_unknown=True)
        turn.read(Message(topic, encode(envelope(1))))
        assert turn.counters == {"malformed": 1}

    def test_unknown_devices_are_turned_away_and_counted(self):
        turn = new_turn()
        send(turn, envelope(1), device="stranger")
        assert turn.events == []
        assert turn.acks == []
        assert turn.unknown == {"stranger": 1}

    def test_the_list_of_strangers_is_bounded(self):
        turn = new_turn()
        for i in range(1100):
            send(turn, envelope(1), device=f"d{i}")
        assert len(turn.unknown) == 1000
        assert turn.counters["unknown_device"] == 1100

    def test_unknown_devices_join_when_that_is_allowed(self):
        turn = new_turn(accept_unknown=True)
        send(turn, envelope(1), device="stranger")
        assert turn.joined == {"stranger"}
        assert len(turn.events) == 1

    def test_a_state_must_be_of_the_device_whose_topic_it_came_on(self):
        turn = new_turn()
        fields = dict.fromkeys(("store_id", "reason", "digest", "mode", "sdk"), "x")
        state = State(device="b", time=1.0, online=True, boot=1, release=1, head=0, group="default", **fields)
        turn.read(Message(TOPICS.up("a", "state"), encode(state)))
        assert turn.states == {}
        turn.read(Message(TOPICS.up("a", "state"), encode(msgspec.structs.replace(state, device="a"))))
        assert turn.states["a"].release == 1
        assert turn.seen == set(), "a retained state says nothing about now"

    def test_an_event_names_its_release_only_by_a_whole_number(self):
        turn = new_turn()
        for seq, release in enumerate([3, True, "3", -1, 2**63], start=1):
            send(turn, envelope(seq, body=Event(name="x", release=1, head=0, detail={"release": release})))
        assert [row.subject for row in turn.events] == [3, None, None, None, None]

    def test_reports_are_kept_as_they_came(self, report):
        turn = new_turn()
        send(turn, envelope(1, kind="report", body=report(release=4)), kind="report")
        (row,) = turn.reports
        assert msgspec.msgpack.decode(row.body, type=Report) == report(release=4)
        assert turn.latest["a"] is row
