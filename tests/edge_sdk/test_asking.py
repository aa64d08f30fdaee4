"""Labels that the device asks for: within a budget, for a time, and none twice; the same after a restart."""

import pytest

from edge_sdk.asking import Asking
from edge_sdk.config import FeedbackConfig
from edge_sdk.errors import DiskFullError
from edge_sdk.store import LoggedRow

DAY_S = 86_400.0


class Asker:
    """A device's requests, with predictions that wait for their labels."""

    def __init__(self, rig, **feedback):
        self.rig = rig(feedback=FeedbackConfig(**feedback))
        self.told = []
        self.restart()

    def restart(self):
        self.asking = Asking(self.rig.store, self.rig.config, self.emit)

    def emit(self, name, detail):
        self.told.append((name, detail))
        self.rig.emit(name, detail)

    def predict(self, count, *, moved=True, prefix="p", trunk=None):
        rows = [
            LoggedRow(f"{prefix}{i}", self.rig.now + i, self.rig.latent(i % 3, moved=moved).tobytes(), "a", 1, 0,
                      trunk or self.rig.manifest.trunk_id)
            for i in range(count)
        ]  # fmt: skip
        with self.rig.store.transaction():
            self.rig.store.add_rows(rows)

    def ask(self, count):
        return self.asking.ask(
            count, self.rig.now, experience=self.rig.experience, head=self.rig.head, manifest=self.rig.manifest
        )


@pytest.fixture
def asker(rig):
    return lambda **feedback: Asker(rig, **feedback)


def ids(requests):
    return [request.id for request in requests]


def test_what_is_asked_says_what_was_predicted_how_sure_the_model_is_now_and_until_when(asker):
    one = asker(request_ttl_s=100.0)
    one.predict(12)
    requests = one.ask(5)
    assert len(set(ids(requests))) == 5
    assert {request.predicted for request in requests} == {"a"}
    assert {request.expires for request in requests} == {one.rig.now + 100}
    assert all(0 <= request.uncertainty <= 1 for request in requests)
    assert one.asking.waiting == 5
    assert one.asking.waiting_ids == set(ids(requests))


def test_rows_that_nothing_labelled_resembles_are_asked_for_first(asker):
    one = asker()
    one.predict(30, moved=False, prefix="like the factory's ")
    one.predict(6, prefix="new ")
    assert all(name.startswith("new") for name in ids(one.ask(4)))


def test_rows_of_another_trunk_are_not_asked_for(asker):
    one = asker()
    one.predict(5, trunk="another")
    assert one.ask(5) == []


@pytest.mark.parametrize("count", [0, -1])
def test_none_are_asked_for_if_none_are_wanted_or_there_are_none(asker, count):
    one = asker()
    assert one.ask(5) == []
    one.predict(5)
    assert one.ask(count) == []
    assert one.rig.store.get("requests") is None


def test_a_days_budget_is_kept_across_restarts_and_renewed_after_24_hours(asker):
    one = asker(requests_per_day=5)
    one.predict(30)
    assert len(one.ask(3)) == 3
    one.restart()
    assert len(one.ask(10)) == 2
    assert one.ask(10) == []
    one.restart()
    one.rig.now += DAY_S - 1
    assert one.ask(10) == []
    one.rig.now += 2
    one.asking.turn(one.rig.now, [])
    assert len(one.ask(10)) == 5


def test_without_a_budget_nothing_is_asked(asker):
    one = asker(requests_per_day=0)
    one.predict(5)
    assert one.ask(5) == []


@pytest.mark.parametrize("turns", [True, False], ids=["noticed", "not noticed yet"])
def test_nothing_is_asked_twice_answered_or_not_also_after_a_restart(asker, turns):
    one = asker(requests_per_day=100, request_ttl_s=100.0)
    one.predict(12)
    first = ids(one.ask(4))
    one.restart()
    second = ids(one.ask(4))
    assert not {*first} & {*second}
    one.rig.now += 200  # nobody answered
    if turns:
        one.asking.turn(one.rig.now, [])
    one.restart()
    third = ids(one.ask(12))
    assert sorted([*first, *second, *third]) == sorted(f"p{i}" for i in range(12))
    one.restart()
    assert one.ask(12) == []


def test_an_answer_ends_the_wait(asker):
    one = asker()
    one.predict(6)
    first, second, *_ = ids(one.ask(4))
    one.asking.turn(one.rig.now, [first, second, "something else"])
    one.restart()
    assert one.asking.waiting == 2
    assert one.told == []


def test_requests_that_nobody_answers_expire_and_that_is_told_once(asker):
    one = asker(request_ttl_s=100.0)
    one.predict(6)
    answered, *_ = ids(one.ask(3))
    one.asking.turn(one.rig.now, [answered])
    one.rig.now += 99
    one.asking.turn(one.rig.now, [])
    assert (one.asking.waiting, one.told) == (2, [])
    one.rig.now += 1
    for _ in range(2):
        one.asking.turn(one.rig.now, [])
        one.restart()
    assert (one.asking.waiting, one.told) == (0, [("requests_expired", {"count": 2})])


def test_what_is_forgotten_is_no_longer_asked_for(asker):
    one = asker()
    one.predict(6)
    first, *others = ids(one.ask(3))
    with one.rig.store.transaction():
        one.asking.forget({first, "unknown"})
    one.restart()
    assert one.asking.waiting_ids == {*others}


def test_on_a_full_disk_nothing_is_asked_and_no_budget_spent(asker):
    one = asker(requests_per_day=3, request_ttl_s=100.0)
    one.predict(6)
    one.rig.full = 1
    with pytest.raises(DiskFullError):
        one.ask(3)
    assert one.asking.waiting == 0
    assert len(one.ask(3)) == 3
    one.rig.now += 100
    one.rig.full = 1
    with pytest.raises(DiskFullError):
        one.asking.turn(one.rig.now, [])
    one.asking.turn(one.rig.now, [])
    assert one.told == [("requests_expired", {"count": 3})] * 2  # the first was taken back with its transaction
    assert one.rig.events() == ["requests_expired"]
