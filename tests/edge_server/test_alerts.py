"""When people are told, and when not: grouping, hysteresis, silences, and nothing that flaps."""

from itertools import pairwise
from math import log2

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_server.alerts import Alert, Condition, Rule, Silence, advance
from edge_server.runbook import RUNBOOK

RULES = {"offline": Rule(raise_after=2, resolve_after=3)}
MINUTE = 60.0


class Desk:
    """Looks every minute, and remembers as the store does."""

    def __init__(self, rules=RULES):
        self.rules, self.now, self.alerts, self.silences, self.notices = rules, 0.0, {}, [], []

    def look(self, *conditions, times=1):
        told = []
        for _ in range(times):
            self.now += MINUTE
            open_ = [a for a in self.alerts.values() if a.status != "resolved" or a.resolved > self.now - 86_400]
            changed, notices = advance(open_, conditions, self.silences, self.rules, self.now)
            for alert in changed:
                number = alert.id or len(self.alerts) + 1
                self.alerts[number] = msgspec.structs.replace(alert, id=number)
            told += notices
        self.notices += told
        return [(notice.reason, notice.alert.cause) for notice in told]

    def silence(self, *, minutes=60, kind="*", cause="*", device="*"):
        silence = Silence(
            id=len(self.silences) + 1, kind=kind, cause=cause, device=device, until=self.now + minutes * MINUTE,
            actor="me", reason="works", created=self.now,
        )  # fmt: skip
        self.silences.append(silence)


def offline(*members, cause="group default", severity="warning", kind="offline"):
    return Condition(kind=kind, cause=cause, severity=severity, words=f"{len(members)} away", members=members)


@pytest.fixture
def desk():
    return Desk()


class TestHysteresis:
    def test_it_is_raised_after_some_looks_and_told_once(self, desk):
        assert desk.look(offline("a")) == []
        assert desk.look(offline("a")) == [("raised", "group default")]
        assert desk.look(offline("a"), times=50) == []

    def test_what_is_over_before_it_was_raised_is_never_told(self, desk):
        for _ in range(20):
            assert desk.look(offline("a")) == []
            assert desk.look() == []

    def test_it_is_resolved_after_some_more_looks_and_told_once(self, desk):
        desk.look(offline("a"), times=2)
        assert desk.look(times=2) == []
        assert desk.look() == [("resolved", "group default")]
        assert desk.look(times=50) == []

    def test_a_gap_shorter_than_that_changes_nothing(self, desk):
        desk.look(offline("a"), times=2)
        for _ in range(10):
            assert desk.look(times=2) == []
            assert desk.look(offline("a")) == []

    def test_what_comes_back_needs_ever_longer_to_be_resolved(self, desk):
        lengths = []
        for _ in range(4):
            desk.look(offline("a"), times=2)
            quiet = 0
            while desk.look() == []:
                quiet += 1
            lengths.append(quiet + 1)
        assert lengths == [3, 6, 12, 24]
        assert len(desk.alerts) == 1, "it is one alert that comes back"

    def test_a_day_later_it_is_a_new_alert(self, desk):
        desk.look(offline("a"), times=2)
        desk.look(times=3)
        desk.now += 86_400
        desk.look(offline("a"), times=2)
        assert [alert.status for alert in desk.alerts.values()] == ["resolved", "firing"]

    @given(st.lists(st.booleans(), min_size=1, max_size=400))
    def test_whatever_a_condition_does_it_is_told_of_rarely(self, holds):
        desk = Desk()
        for there in holds:
            desk.look(*([offline("a")] if there else []))
        raised = sum(notice.reason == "raised" for notice in desk.notices)
        assert raised <= 1 + log2(1 + len(holds) / 3)
        reasons = [notice.reason for notice in desk.notices]
        assert all(a != b for a, b in pairwise(reasons)), "raised and resolved take turns"

    @given(st.lists(st.booleans(), max_size=60))
    def test_two_looks_in_a_row_raise_it_and_enough_without_it_resolve_it(self, holds):
        desk = Desk()
        for there in holds:
            desk.look(*([offline("a")] if there else []))
        desk.look(offline("a"), times=2)
        assert [a.status for a in desk.alerts.values()] == ["firing"]
        desk.look(times=3 * 2**8)
        assert {a.status for a in desk.alerts.values()} == {"resolved"}
        assert desk.notices[-1].reason == "resolved"


class TestGrouping:
    def test_many_devices_with_one_cause_are_one_alert(self, desk):
        assert desk.look(offline(*"abcdefgh"), times=2) == [("raised", "group default")]
        (alert,) = desk.alerts.values()
        assert (alert.count, alert.members) == (8, tuple("abcdefgh"))

    def test_other_causes_are_other_alerts(self, desk):
        told = desk.look(offline("a"), offline("b", cause="group north"), times=2)
        assert told == [("raised", "group default"), ("raised", "group north")]

    def test_many_more_devices_are_told_and_a_few_are_not(self, desk):
        desk.look(offline("a"), times=2)
        assert desk.look(offline(*"abcdef")) == []
        assert desk.look(offline(*"abcdefg")) == [("more", "group default")]

    def test_it_is_told_again_when_it_gets_worse_and_not_when_it_gets_better(self, desk):
        desk.look(offline("a"), times=2)
        assert desk.look(offline("a", severity="critical")) == [("worse", "group default")]
        assert desk.look(offline("a"), offline("b", cause="x")) == []
        assert desk.look(offline("a", severity="critical")) == []

    def test_of_thousands_of_devices_some_are_named_and_all_counted(self, desk):
        desk.look(offline(*(f"d{i}" for i in range(5000))), times=2)
        (alert,) = desk.alerts.values()
        assert (alert.count, len(alert.members)) == (5000, 50)


class TestSilence:
    def test_it_keeps_notices_back_and_the_alert_is_there(self, desk):
        desk.silence(kind="off*", minutes=60)
        assert desk.look(offline("a"), times=10) == []
        (alert,) = desk.alerts.values()
        assert (alert.status, alert.silence) == ("firing", 1)

    def test_when_it_ends_and_the_condition_holds_people_are_told(self, desk):
        desk.silence(minutes=30)
        desk.look(offline("a"), times=28)
        assert desk.look(offline("a"), times=5) == [("raised", "group default")]

    def test_when_all_is_over_before_its_end_nobody_hears_of_it(self, desk):
        desk.silence(minutes=30)
        desk.look(offline("a"), times=5)
        assert desk.look(times=60) == []

    def test_devices_that_are_silenced_are_left_out_of_their_group(self, desk):
        desk.silence(device="test-*")
        assert desk.look(offline("test-1", "test-2"), times=5) == []
        assert desk.look(offline("test-1", "pump-1"), times=1) == [("raised", "group default")]
        (alert,) = desk.alerts.values()
        assert alert.members == ("pump-1",)

    def test_it_concerns_only_what_it_matches(self, desk):
        desk.silence(cause="group north")
        assert desk.look(offline("a"), times=2) == [("raised", "group default")]


def test_what_a_person_has_closed_stays_quiet_until_it_comes_anew(desk):
    desk.look(offline("a"), times=2)
    desk.alerts[1] = msgspec.structs.replace(desk.alerts[1], closed_by="me")
    assert desk.look(offline("a", severity="critical"), times=5) == []
    assert desk.look(times=5) == []
    assert desk.look(offline("a"), times=2) == [("raised", "group default")]


def test_an_alert_that_goes_on_as_it_was_is_not_written_again(desk):
    desk.look(offline("a"), times=2)
    changed, _ = advance(desk.alerts.values(), [offline("a")], [], RULES, desk.now + 60)
    assert changed == []


def test_a_restart_between_any_two_looks_changes_nothing(desk):
    other = Desk()
    for there in (1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0):
        conditions = [offline("a")] if there else []
        assert desk.look(*conditions) == other.look(*conditions)
        other.alerts = {n: msgspec.json.decode(msgspec.json.encode(a), type=Alert) for n, a in other.alerts.items()}


def test_every_kind_has_its_page_in_the_run_book():
    for kind, entry in RUNBOOK.items():
        assert kind.replace("_", "").isalpha()
        assert entry.title
        assert entry.meaning.endswith(".")
        assert entry.todo
