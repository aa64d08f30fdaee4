"""What waits in memory: bounded, counted, and one name for one prediction."""

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DuplicateIdError, StoppedError
from edge_sdk.manifest import Manifest
from edge_sdk.pending import Label, LoggedPrediction, Pending, Taught
from edge_sdk.schema import InputSpec
from edge_sdk.slots import Version

ROOM = 10**9
VERSION = Version("a", 1, "digest")
NOTHING = np.zeros(0, dtype=np.float32)
MANIFEST = Manifest(name="m", release=1, created="", labels=["1"], input=InputSpec(shape=[1]), files={})


def prediction(name):
    return LoggedPrediction(name, 1.0, NOTHING, NOTHING.astype(np.uint8), NOTHING, "1", ("1",), VERSION, MANIFEST, 0.1)


def taught(label):
    return Taught(NOTHING.astype(np.uint8), label, 1.0, "trunk")


def test_own_ids_are_unique_and_begin_with_the_prefix():
    pending = Pending(10, "store-1-", max_bytes=ROOM)
    assert [pending.new_id(None) for _ in range(3)] == ["store-1-1", "store-1-2", "store-1-3"]


def test_an_id_of_the_app_is_refused_while_it_waits_and_free_again_afterwards():
    pending = Pending(10, "p-", max_bytes=ROOM)
    assert pending.new_id("order-7") == "order-7"
    with pytest.raises(DuplicateIdError, match="order-7"):
        pending.new_id("order-7")
    pending.release(["order-7"])
    assert pending.new_id("order-7") == "order-7"


def test_ids_of_an_earlier_life_are_in_use():
    pending = Pending(10, "p-", max_bytes=ROOM)
    pending.reserve(["order-7"])
    with pytest.raises(DuplicateIdError):
        pending.new_id("order-7")


def test_a_drain_gives_everything_once_in_order():
    pending = Pending(10, "p-", max_bytes=ROOM)
    for name in "ab":
        pending.log([prediction(name)])
    pending.label(Label("a", "1", 2.0))
    pending.teach([taught("2"), taught("3")])
    pending.reject()
    pending.fail()
    pending.fail()
    batch = pending.drain()
    assert [row.id for row in batch.predictions] == ["a", "b"]
    assert batch.labels == [Label("a", "1", 2.0)]
    assert [row.label for row in batch.taught] == ["2", "3"]
    assert (batch.rejected_inputs, batch.errors, batch.rows_lost, batch.labels_lost) == (1, 2, 0, 0)
    assert len(batch) == 5
    assert not pending.drain()


def test_counts_alone_are_worth_a_drain():
    pending = Pending(10, "p-", max_bytes=ROOM)
    pending.reject()
    assert pending.drain()
    pending.fail()
    assert pending.drain()


def test_a_prediction_that_had_to_go_frees_its_id():
    pending = Pending(1, "p-", max_bytes=ROOM)
    for name in ("first", "second"):
        pending.log([prediction(pending.new_id(name))])
    assert pending.new_id("first") == "first"
    with pytest.raises(DuplicateIdError):
        pending.new_id("second")


@given(
    bound=st.integers(1, 5),
    actions=st.lists(st.sampled_from(["log", "label", "teach", "drain"]), max_size=60),
)
def test_memory_is_bounded_and_what_went_is_counted(bound, actions):
    pending, given_in, out, lost = Pending(bound, "p-", max_bytes=ROOM), Counter(), Counter(), Counter()

    def drain():
        batch = pending.drain()
        assert max(len(batch.predictions), len(batch.labels), len(batch.taught)) <= bound
        out.update(log=len(batch.predictions), label=len(batch.labels) + len(batch.taught))
        lost.update(log=batch.rows_lost, label=batch.labels_lost)

    for action in actions:
        if action == "drain":
            drain()
        elif action == "log":
            pending.log([prediction(pending.new_id(None))])
            given_in["log"] += 1
        elif action == "label":
            pending.label(Label("a", "1", 1.0))
            given_in["label"] += 1
        else:
            pending.teach([taught("1"), taught("2")])
            given_in["label"] += 2
    drain()
    for kind in ("log", "label"):
        assert given_in[kind] == out[kind] + lost[kind]


def test_what_is_forgotten_is_not_drained_and_its_id_is_free():
    pending = Pending(10, "p-", max_bytes=ROOM)
    for name in "ab":
        pending.log([prediction(pending.new_id(name))])
        pending.label(Label(name, "1", 1.0))
    pending.teach([taught("1")])
    assert pending.forget({"a", "unknown"}) == 2
    batch = pending.drain()
    assert [row.id for row in batch.predictions] == [label.id for label in batch.labels] == ["b"]
    assert len(batch.taught) == 1
    assert pending.new_id("a") == "a"


def test_the_oldest_go_first():
    pending = Pending(2, "p-", max_bytes=ROOM)
    for name in "abc":
        pending.log([prediction(name)])
        pending.label(Label(name, "1", 1.0))
    batch = pending.drain()
    assert [row.id for row in batch.predictions] == [label.id for label in batch.labels] == ["b", "c"]


def test_threads_lose_nothing_and_share_no_id():
    pending, names, everything = Pending(100_000, "p-", max_bytes=ROOM), [], []
    go = threading.Barrier(5)

    def work():
        go.wait(10)
        for _ in range(500):
            name = pending.new_id(None)
            names.append(name)
            pending.log([prediction(name)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.wait(10)
    while any(thread.is_alive() for thread in threads):
        everything += pending.drain().predictions
    for thread in threads:
        thread.join()
    everything += pending.drain().predictions
    assert len(set(names)) == 2_000
    assert sorted(row.id for row in everything) == sorted(names)


def test_memory_is_bounded_in_bytes_as_well_and_the_oldest_go():
    row = prediction("a").memory_bytes
    pending = Pending(10, "p-", max_bytes=3 * row)
    for name in "abcd":
        pending.new_id(name)
        pending.log([prediction(name)])
    assert pending.new_id("a") == "a"  # free again
    batch = pending.drain()
    assert [row.id for row in batch.predictions] == ["b", "c", "d"]
    assert (batch.rows_lost, batch.memory_bytes) == (1, 3 * row)
    pending.log([prediction("e")])  # there is room again
    assert pending.forget({"e"}) == 1
    assert pending.drain().memory_bytes == 0


def test_rows_with_large_thumbnails_count_for_what_they_take():
    large = prediction("a")._replace(x=np.zeros(10_000, np.float32))
    assert large.memory_bytes == prediction("a").memory_bytes + 40_000


def test_a_process_that_was_forked_off_gives_nothing_that_nobody_would_write(monkeypatch):
    pending = Pending(10, "p-", max_bytes=ROOM)
    pending._lock.acquire()  # as a thread of the parent may have held it
    monkeypatch.setattr("edge_sdk.pending.getpid", lambda: 1)
    for give in (
        lambda: pending.log([prediction("a")]),
        lambda: pending.label(Label("a", "1", 2.0)),
        lambda: pending.teach([taught("2")]),
        lambda: pending.new_id("a"),
    ):
        with pytest.raises(StoppedError, match="forked from the one that owns the device"):
            give()
