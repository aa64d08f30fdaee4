"""The device under good and bad input: one typed error or one recorded state each, and serving goes on."""

import json
import os
import shutil
import threading
from collections import Counter

import numpy as np
import pytest

from edge_sdk.clock import ManualClock
from edge_sdk.config import BrokerConfig, JoinConfig, LearnConfig, ReportConfig, check_config
from edge_sdk.errors import (
    ConfigError,
    DtypeError,
    DuplicateIdError,
    InputError,
    IntegrityError,
    LabelError,
    ModelError,
    NonFiniteError,
    ProtocolError,
    RangeError,
    RollbackRefusedError,
    ShapeError,
    StoppedError,
    StoreError,
    UnknownLabelError,
)
from edge_sdk.head import Head, dequantize, softmax
from edge_sdk.messages import Ack, Envelope, Event, Report, Topics, decode, encode, unpack
from edge_sdk.policy import ResourceState
from edge_sdk.resources import FixedReader
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
YEAR = 365 * 86_400


class SettableClock(ManualClock):
    """A clock that can also be set back."""

    def set(self, now):
        self._now = now


@pytest.fixture
def clock():
    return SettableClock()


class Coordinator:
    """The least that a device needs: it takes envelopes and acknowledges them."""

    def __init__(self, broker):
        self.topics = Topics()
        self.transport = MemoryTransport(broker)
        for kind in ("report", "event", "state"):
            self.transport.subscribe(self.topics.up("+", kind))
        self.transport.connect()
        self.arrived = Counter()
        self.bodies = {}
        self.states = []

    def pump(self, *, acknowledge=True):
        for message in self.transport.receive():
            device, kind = self.topics.parse_up(message.topic)
            if kind == "state":
                self.states.append(message.payload)
                continue
            envelope = decode(message.payload, Envelope)
            self.arrived[envelope.seq] += 1
            self.bodies[envelope.seq] = envelope
            if acknowledge:
                ack = Ack(envelope.store_id, envelope.seq)
                self.transport.publish(self.topics.down(device, "ack"), encode(ack))

    def reports(self):
        return [unpack(e.body, Report) for _, e in sorted(self.bodies.items()) if e.kind == "report"]

    def events(self):
        return [unpack(e.body, Event).name for _, e in sorted(self.bodies.items()) if e.kind == "event"]


def samples(device):
    """All labelled samples on disk as (time of the prediction, label)."""
    return device._store.conn.execute("SELECT time, label FROM samples ORDER BY time").fetchall()


def events(device, name):
    return [entry for entry in device.history(limit=2_000) if entry.name == name]


def promote(device, head):
    """Let a head serve as learning would."""
    number = device._slots.write_head(device._slots.pointer.current.slot, head)
    device._slots.promote(number)
    report = device.step()
    assert report.swapped, report.problem
    return number


def current_head(device):
    return device._slots.head(device._slots.pointer.current)


def tilted(head, seed):
    """The head with another bias: other probabilities for every input."""
    bias = np.random.default_rng(seed).normal(0, 3, head.weights["b0"].shape).astype(np.float32)
    return Head({**head.weights, "b0": head.weights["b0"] + bias}, head.labels)


# ---- serving


def test_predictions_name_the_version_and_the_label_of_the_highest_probability(make_device, digits):
    device = make_device()
    prediction = device.predict(digits.life.x[0])
    assert (prediction.release, prediction.head) == (1, 0)
    assert prediction.labels == tuple("01234567") == device.labels
    assert prediction.label == prediction.labels[int(np.argmax(prediction.probabilities))]
    assert prediction.probabilities.sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        prediction.probabilities[0] = 1


def test_a_batch_gives_what_single_predictions_give(make_device, digits):
    device = make_device()
    batch = device.predict_batch(digits.life.x[:5])
    for prediction, x in zip(batch, digits.life.x, strict=False):
        np.testing.assert_allclose(prediction.probabilities, device.predict(x).probabilities, atol=1e-6)
    assert len({prediction.id for prediction in batch}) == 5


def test_evaluation_is_neither_logged_nor_learned_from(make_device, digits):
    device = make_device()
    known = digits.score.only(set(range(8)))
    names = [str(y) for y in known.y]
    assert device.evaluate(known.x, names) > 0.8
    device.step()
    status = device.status()
    assert (status.counters.predictions, status.fresh_rows, status.judge_rows) == (0, 0, 0)


def test_evaluation_with_too_few_labels_is_a_label_error(make_device, digits):
    with pytest.raises(LabelError, match="3 samples need as many labels, got 2"):
        make_device().evaluate(digits.score.x[:3], ["1", "2"])


BAD_INPUTS = {
    "text": (np.full((1, 8, 8), "a"), DtypeError),
    "objects": (np.full((1, 8, 8), None), DtypeError),
    "complex": (np.ones((1, 8, 8), complex), DtypeError),
    "ragged": ([[1.0], [1.0, 2.0]], InputError),
    "shape": (np.ones((8, 8)), ShapeError),
    "scalar": (1.0, ShapeError),
    "nan": (np.full((1, 8, 8), np.nan), NonFiniteError),
    "infinity": (np.full((1, 8, 8), np.inf), NonFiniteError),
    "high": (np.full((1, 8, 8), 255.0), RangeError),
    "low": (np.full((1, 8, 8), -0.5), RangeError),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_an_impossible_input_is_a_typed_error_counted_and_serving_goes_on(make_device, digits, kind):
    device = make_device()
    x, error = BAD_INPUTS[kind]
    with pytest.raises(error):
        device.predict(x)
    with pytest.raises(InputError):
        device.predict_batch([x])
    assert device.predict(digits.life.x[0]).release == 1
    assert device.step().problem == ""
    counters = device.status().counters
    assert (counters.rejected_inputs, counters.predictions, counters.errors) == (2, 1, 0)


def test_an_empty_batch_is_a_shape_error(make_device):
    with pytest.raises(ShapeError, match="at least one sample"):
        make_device().predict_batch(np.zeros((0, 1, 8, 8)))


def test_an_engine_that_fails_is_counted_and_the_id_is_free_again(make_device, digits, monkeypatch):
    device = make_device()

    def fail(_):
        raise ModelError("the engine failed")

    with monkeypatch.context() as broken:
        broken.setattr(device._served.model.trunk, "latents", fail)
        with pytest.raises(ModelError):
            device.predict(digits.life.x[0], id="mine")
    assert device.predict(digits.life.x[0], id="mine").id == "mine"
    device.step()
    assert device.status().counters.errors == 1


# ---- labels


def test_a_label_joins_its_prediction_however_late(make_device, digits, clock):
    device = make_device()
    prediction = device.predict(digits.life.x[0])
    device.step()
    clock.advance(86_400)
    device.observe(prediction.id, "3")
    assert device.step().labelled == 1
    assert [label for _, label in samples(device)] == ["3"]


def test_an_unknown_label_may_become_one_where_it_is_allowed(make_device, digits):
    device = make_device()
    device.observe(device.predict(digits.life.x[0]).id, "nine")
    assert device.step().labelled == 1


def test_an_unknown_label_is_refused_where_it_is_not_allowed(make_device, digits):
    device = make_device(learn=LearnConfig(executor="inline", new_labels="refuse"))
    prediction = device.predict(digits.life.x[0])
    with pytest.raises(UnknownLabelError, match="new_labels = refuse"):
        device.observe(prediction.id, "nine")
    with pytest.raises(UnknownLabelError):
        device.learn(digits.life.x[:1], ["nine"])
    device.observe(prediction.id, "7")
    assert device.step().labelled == 1


def test_one_label_more_than_the_most_is_refused(make_device, digits):
    device = make_device(learn=LearnConfig(executor="inline", max_labels=8))
    with pytest.raises(UnknownLabelError, match="max_labels = 8"):
        device.observe(device.predict(digits.life.x[0]).id, "nine")


@pytest.mark.parametrize("label", ["", 7, None])
def test_a_label_that_is_no_text_is_refused(make_device, digits, label):
    device = make_device()
    with pytest.raises(UnknownLabelError, match="non-empty string"):
        device.observe(device.predict(digits.life.x[0]).id, label)


@pytest.mark.parametrize("id", ["", 7, b"a", ["a"], "\ud800"])
def test_an_id_that_the_store_cannot_keep_is_refused_and_keeps_nothing_else_from_the_disk(make_device, digits, id):  # noqa: A002
    device = make_device()
    for call in (
        lambda: device.predict(digits.life.x[0], id=id),
        lambda: device.observe(id, "7"),
        lambda: device.reward(id, 1.0),
        lambda: device.forget([id]),
    ):
        with pytest.raises(LabelError, match="a prediction id is"):
            call()
    device.observe(device.predict(digits.life.x[0]).id, "3")
    report = device.step()
    assert (report.labelled, report.problem) == (1, "")


def test_a_label_for_nothing_is_refused(make_device):
    with pytest.raises(LabelError, match="a prediction id is"):
        make_device().observe(None, "7")


def test_an_id_of_the_app_is_its_own_until_its_label_has_come(make_device, digits):
    device = make_device()
    device.predict(digits.life.x[0], id="mine")
    for _ in range(2):  # in memory, and then on disk
        with pytest.raises(DuplicateIdError):
            device.predict(digits.life.x[1], id="mine")
        device.step()
    device.observe("mine", "3", durable=True)
    assert device.predict(digits.life.x[1], id="mine").id == "mine"


def test_an_id_of_the_app_is_remembered_over_a_restart(make_device, digits):
    device = make_device()
    device.predict(digits.life.x[0], id="mine")
    device.stop()
    device = make_device()
    with pytest.raises(DuplicateIdError):
        device.predict(digits.life.x[1], id="mine")
    device.observe("mine", "3", durable=True)
    assert len(samples(device)) == 1


def test_ids_differ_over_restarts(make_device, digits):
    first = make_device()
    ids = {first.predict(x).id for x in digits.life.x[:3]}
    first.stop()
    second = make_device()
    assert not ids & {second.predict(x).id for x in digits.life.x[:3]}


def test_a_second_label_and_one_of_nobody_are_counted_and_kept_out(make_device, digits):
    device = make_device()
    prediction = device.predict(digits.life.x[0])
    device.observe(prediction.id, "3")
    device.observe(prediction.id, "4")
    device.step()
    device.observe(prediction.id, "5")
    device.observe("nobody", "5")
    assert device.step().unmatched == 1
    counters = device.status().counters
    assert (counters.labelled, counters.duplicates, counters.unmatched) == (1, 2, 1)
    assert [label for _, label in samples(device)] == ["3"]


def test_a_label_after_its_row_went_by_age_is_counted_unmatched(make_device, digits, clock):
    device = make_device(join=JoinConfig(window_s=100))
    prediction = device.predict(digits.life.x[0], id="mine")
    device.step()
    clock.advance(101)
    device.predict(digits.life.x[1])
    device.step()
    device.observe(prediction.id, "3")
    assert device.step().unmatched == 1
    assert device.status().counters.unmatched == 1
    assert device.predict(digits.life.x[0], id="mine").id == "mine"


def test_a_label_after_its_row_went_for_want_of_room_is_counted_unmatched(make_device, digits, clock):
    device = make_device(join=JoinConfig(max_bytes=152 * 10))  # ten rows with latents of 32 bytes
    ids = []
    for x in digits.life.x[:12]:
        clock.advance(1)
        ids.append(device.predict(x).id)
    device.step()
    for name in ids:
        device.observe(name, "3")
    report = device.step()
    assert (report.labelled, report.unmatched) == (10, 2)


def test_what_memory_has_no_room_for_is_counted(make_device, digits):
    device = make_device(join=JoinConfig(max_pending=10))
    for x in digits.life.x[:12]:
        device.observe(device.predict(x).id, "3")
    device.step()
    counters = device.status().counters
    assert (counters.predictions, counters.rows_lost, counters.labels_lost) == (10, 2, 2)


def test_a_disk_that_stays_full_does_not_take_all_memory(make_device, digits, monkeypatch):
    device = make_device(join=JoinConfig(max_pending_bytes=20_000))

    def no_room(rows):
        raise StoreError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(device._store, "add_rows", no_room)
        for x in digits.life.x[:60]:
            device.predict(x)
            device.step()
    device.step()
    counters = device.status().counters
    assert counters.predictions + counters.rows_lost == 60
    assert 5 < counters.predictions < 20


def test_a_device_is_left_to_the_process_that_made_it(make_device, digits):
    device = make_device()
    prediction = device.predict(digits.life.x[0])
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (lambda: device.observe(prediction.id, "3"), device.step, device.status):
            try:
                call()
            except StoppedError:
                refused += 1
        device.stop()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    device.observe(prediction.id, "3", durable=True)
    assert device.counters.labelled == 1


def test_a_durable_label_is_on_disk_without_a_thread(make_device, digits):
    device = make_device()
    device.observe(device.predict(digits.life.x[0]).id, "3", durable=True)
    assert len(samples(device)) == 1


def test_a_durable_label_is_on_disk_with_a_thread(make_device, digits, clock):
    device = make_device(flush_interval_s=0.01)
    with device:
        for i, x in enumerate(digits.life.x[:5]):
            clock.advance(1)
            device.observe(device.predict(x).id, "3", durable=True)
            with device._step_lock:
                assert len(samples(device)) == i + 1


def test_a_durable_label_does_not_wait_for_the_next_turn_of_the_thread(make_device, digits):
    with make_device(flush_interval_s=3_600.0) as device:
        for x in digits.life.x[:3]:
            device.observe(device.predict(x).id, "3", durable=True)
        assert device.counters.labelled == 3


def test_taught_samples_are_kept_and_bad_ones_are_refused_whole(make_device, digits):
    device = make_device()
    device.learn(digits.life.x[:3], ["1", "2", "nine"])
    with pytest.raises(LabelError, match="3 samples need as many labels, got 2"):
        device.learn(digits.life.x[:3], ["1", "2"])
    with pytest.raises(UnknownLabelError):
        device.learn(digits.life.x[:2], ["1", ""])
    with pytest.raises(ShapeError):
        device.learn(digits.life.x[0], ["1"])
    device.step()
    assert [label for _, label in samples(device)] == ["1", "2", "nine"]
    counters = device.status().counters
    assert (counters.labelled, counters.predictions) == (3, 0)


# ---- checkpoints


def test_without_a_checkpoint_there_is_a_model_error_until_one_is_installed(make_device, digits):
    device = make_device(checkpoint=None)
    assert not device.ready
    assert device.status().release == 0
    for call in (
        lambda: device.predict(digits.life.x[0]),
        lambda: device.observe("some", "3"),
        lambda: device.learn(digits.life.x[:1], ["3"]),
        lambda: device.evaluate(digits.life.x[:1], ["3"]),
        lambda: device.labels,
        device.rollback,
        device.reset_to_base,
        device.learn_now,
    ):
        with pytest.raises(ModelError, match="no release is installed yet"):
            call()
    assert device.step().problem == ""
    device.stop()
    device = make_device()
    assert device.ready
    assert device.predict(digits.life.x[0]).release == 1


def alter(folder):
    file = folder / "trunk.int8.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")


def truncate(folder):
    file = folder / "memory.npz"
    file.write_bytes(file.read_bytes()[:-100])


def remove(folder):
    (folder / "head.npz").unlink()


def garble_manifest(folder):
    (folder / "manifest.json").write_bytes(b"{")


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


DAMAGE = [alter, truncate, remove, garble_manifest, remove_manifest]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_an_integrity_error_and_a_good_one_works_after_it(
    make_device, checkpoint, tmp_path, digits, damage
):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(folder)
    with pytest.raises(IntegrityError):
        make_device(checkpoint=folder)
    assert make_device().predict(digits.life.x[0]).release == 1


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_beside_a_release_that_works_is_recorded_and_serving_goes_on(
    make_device, build_cached, tmp_path, digits, damage
):
    make_device().stop()
    folder = shutil.copytree(build_cached, tmp_path / "copy")
    damage(folder)
    device = make_device(checkpoint=folder)
    assert device.predict(digits.life.x[0]).release == 1
    (event,) = events(device, "release_refused")
    assert "came with the app" in event.detail["reason"]
    device.stop()
    assert make_device(checkpoint=build_cached).status().release == 2


def test_a_missing_checkpoint_folder_is_an_integrity_error(make_device, tmp_path):
    with pytest.raises(IntegrityError, match=r"no manifest\.json"):
        make_device(checkpoint=tmp_path / "nowhere")


@pytest.fixture(scope="module")
def build_cached(build):
    """Release 2, on another trunk."""
    return build(release=2, seed=1)


def test_a_checkpoint_older_than_the_installed_release_is_not_installed(make_device, build_cached, digits):
    make_device(checkpoint=build_cached).stop()
    device = make_device()
    assert device.predict(digits.life.x[0]).release == 2
    assert len(events(device, "release_activated")) == 1


def test_the_app_s_checkpoint_is_not_installed_again_after_it_was_left(make_device, build_cached):
    make_device().stop()
    device = make_device(checkpoint=build_cached)
    assert device.rollback().release == 1
    device.stop()
    assert make_device(checkpoint=build_cached).status().release == 1


def test_a_folder_has_one_owner(make_device, digits):
    device = make_device()
    with pytest.raises(StoreError, match="in use by another process"):
        make_device()
    assert device.predict(digits.life.x[0]).release == 1
    device.stop()
    assert make_device().boot == 2


def test_a_device_name_that_cannot_stand_in_a_topic_is_refused(make_device):
    with pytest.raises((ConfigError, ProtocolError), match="use 1 to 64 letters"):
        make_device(device="a/b")


# ---- versions


def test_rollback_and_reset_swap_the_head_and_are_recorded(make_device, digits):
    device = make_device()
    before = device.predict(digits.life.x[0]).probabilities
    number = promote(device, tilted(current_head(device), 1))
    assert device.predict(digits.life.x[0]).head == number
    assert device.rollback().head == 0
    np.testing.assert_array_equal(device.predict(digits.life.x[0]).probabilities, before)
    with pytest.raises(RollbackRefusedError):
        device.rollback()
    number = promote(device, tilted(current_head(device), 2))
    assert device.predict(digits.life.x[0]).head == number
    assert device.reset_to_base().head == 0
    np.testing.assert_array_equal(device.predict(digits.life.x[0]).probabilities, before)
    reasons = [event.detail["reason"] for event in events(device, "head_rolled_back")]
    assert reasons == ["asked for", "reset to the release's own head"]


def test_a_reset_with_nothing_to_drop_changes_nothing(make_device):
    make_device().stop()
    device = make_device()
    promote(device, tilted(current_head(device), 1))
    device.reset_to_base()
    assert device.reset_to_base().head == 0
    assert len(events(device, "head_rolled_back")) == 1
    assert device.rollback().head == 1


def test_every_prediction_belongs_to_one_version_during_a_thousand_swaps(make_device, digits):
    device = make_device(mode="monitor")
    x = digits.life.x[0]
    served = device._served
    features = dequantize(served.model.trunk.latents(x[None]), served.manifest.latent)
    heads = {0: current_head(device)}
    done, permits = threading.Event(), threading.Semaphore(0)
    errors, found = [], [[] for _ in range(4)]

    def hammer(results):
        try:
            while permits.acquire() and not done.is_set():
                results.append(device.predict(x))
                results += device.predict_batch(np.stack([x, x]))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            errors.append(error)

    threads = [threading.Thread(target=hammer, args=(results,)) for results in found]
    for thread in threads:
        thread.start()
    try:
        for seed in range(1_000):
            head = tilted(heads[0], seed)
            permits.release(12)  # enough to last over the swap
            heads[promote(device, head)] = head
    finally:
        done.set()
        permits.release(len(threads))
        for thread in threads:
            thread.join()
    assert not errors
    expected = np.stack([softmax(heads[number].logits(features))[0] for number in range(len(heads))])
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-4  # each head is told from the one before
    predictions = [prediction for results in found for prediction in results]
    said = np.array([prediction.head for prediction in predictions])
    np.testing.assert_allclose(np.stack([p.probabilities for p in predictions]), expected[said], atol=1e-5)
    labels = [heads[0].labels[i] for i in expected[said].argmax(axis=1)]
    assert [prediction.label for prediction in predictions] == labels
    assert len(set(said.tolist())) > 200
    device.step()
    status = device.status()
    assert status.counters.predictions == sum(map(len, found))
    assert status.counters.rows_lost == 0


# ---- modes


def feed(device, pool, count, *, wrong=False):
    """Predict and label `count` samples of the pool; wrong labels are the true ones moved on by one."""
    for i in range(count):
        x, y = pool.x[i % len(pool.y)], int(pool.y[i % len(pool.y)])
        device.observe(device.predict(x).id, str((y + 1) % 8 if wrong else y))


@pytest.mark.parametrize("mode", ["monitor", "shadow", "adapt"])
def test_a_device_learns_and_promotes_as_far_as_it_is_trusted(make_device, digits, mode):
    device = make_device(mode=mode)
    known = digits.life.only({3})
    assert device.mode == mode
    for _ in range(3):
        for x in known.x:
            device.observe(device.predict(x).id, "5")  # a world in which this shape has another name
        device.learn_now()
        device.step()
    names = {entry.name for entry in device.history()}
    assert ("learn_started" in names) == (mode != "monitor")
    assert ("promoted" in names) <= (mode == "adapt")
    assert (device.status().head > 0) <= (mode == "adapt")


def test_the_mode_can_be_changed_while_the_device_runs(make_device, digits):
    device = make_device(mode="monitor")
    feed(device, digits.life.only(set(range(8))), 80)
    device.learn_now()
    device.step()
    assert not events(device, "learn_started")
    device.mode = "shadow"
    device.step()
    assert device.status().mode == "shadow"
    assert len(events(device, "learn_started")) == 1


# ---- a full disk


def test_a_full_disk_loses_no_acknowledged_label_and_serving_goes_on(make_device, digits, clock):
    device = make_device(mode="monitor")
    conn = device._store.conn
    pages = conn.execute("PRAGMA page_count").fetchone()[0]
    conn.execute(f"PRAGMA max_page_count = {pages}")
    given, problem = [], ""
    while not problem:
        for _ in range(20):
            clock.advance(1)
            given.append(clock.now())
            device.observe(device.predict(digits.life.x[len(given) % 400]).id, "3")
        problem = device.step().problem
        assert len(given) < 10_000
    assert "no room" in problem
    assert "no room" in device.status().problem
    clock.advance(1)
    given.append(clock.now())
    prediction = device.predict(digits.life.x[0])
    with pytest.raises(StoreError, match="not on disk yet"):
        device.observe(prediction.id, "3", durable=True)
    assert device.predict(digits.life.x[1]).release == 1
    conn.execute("PRAGMA max_page_count = 1000000")
    assert device.step().problem == ""
    assert Counter(samples(device)) == Counter((time, "3") for time in given)
    counters = device.status().counters
    assert (counters.labelled, counters.labels_lost, counters.rows_lost, counters.unmatched) == (len(given), 0, 0, 0)
    assert counters.predictions == len(given) + 1


def test_a_durable_label_on_a_full_disk_is_an_error_in_time_with_a_thread(make_device, digits):
    device = make_device(mode="monitor", flush_interval_s=0.01)
    conn = device._store.conn

    def label_until_it_fails():
        for x in digits.life.x:
            device.observe(device.predict(x).id, "3", durable=True, timeout_s=0.3)

    with device:
        with device._step_lock:
            conn.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size for it
        with pytest.raises(StoreError, match="not on disk yet"):
            label_until_it_fails()
        with device._step_lock:
            conn.execute("PRAGMA max_page_count = 1000000")
        device.observe(device.predict(digits.life.x[0]).id, "3", durable=True)
        with device._step_lock:
            labels = len(samples(device))
        assert labels == device.status().counters.labelled


# ---- the network


def test_without_a_broker_nothing_is_queued(make_device, digits, clock):
    device = make_device(report=ReportConfig(interval_s=300, summary_interval_s=600))
    device.connect()
    for x in digits.life.x[:5]:
        device.predict_batch(digits.life.x[:40])
        device.predict(x)
        clock.advance(600)
        report = device.step()
        assert (report.problem, report.sent) == ("", 0)
    status = device.status()
    assert (status.connected, status.outbox_rows, status.counters.bytes_sent) == (False, 0, 0)


def test_an_unreachable_broker_only_makes_the_outbox_wait(make_device, digits, clock):
    broker = MemoryBroker()
    broker.stop()
    device = make_device(transport=MemoryTransport(broker))
    device.connect()
    device.predict(digits.life.x[0])
    clock.advance(600)
    report = device.step()
    assert (report.problem, report.sent) == ("", 0)
    assert device.status().outbox_rows == 2  # release_activated, and the report


def test_a_broker_that_dies_and_comes_back_loses_nothing_and_doubles_nothing(make_device, digits, clock):
    broker = MemoryBroker()
    coordinator = Coordinator(broker)
    device = make_device(transport=MemoryTransport(broker), report=ReportConfig(interval_s=300, min_count=1))
    device.connect()
    for tick in range(30):
        device.predict(digits.life.x[tick])
        clock.advance(301)
        if tick in (5, 15):
            broker.stop()
        if tick in (10, 20):
            broker.start()
        assert device.step().problem == ""
        if tick in (4, 14):
            broker.stop()  # what is under way, one way or the other, is lost
            broker.start()
        coordinator.pump(acknowledge=tick != 25)
    for _ in range(2):
        clock.advance(31)
        device.step()
        coordinator.pump()
    device.step()
    assert device.status().outbox_rows == 0
    assert sorted(coordinator.bodies) == list(range(1, len(coordinator.bodies) + 1))
    assert sum(report.predictions for report in coordinator.reports()) == 30
    assert coordinator.events() == ["release_activated"]
    starts = [report.start for report in coordinator.reports()]
    assert starts == sorted(set(starts))


def test_reports_tell_the_room_that_the_machine_has(make_device, digits, clock):
    broker = MemoryBroker()
    coordinator = Coordinator(broker)
    resources = FixedReader(ResourceState(free_mb=301.4, total_mb=926.0), disk_free_mb=812.6)
    device = make_device(transport=MemoryTransport(broker), report=ReportConfig(interval_s=60), resources=resources)
    device.connect()
    device.predict(digits.life.x[0])
    clock.advance(61)
    device.step()
    coordinator.pump()
    (report,) = coordinator.reports()
    assert (report.disk_free_mb, report.memory_free_mb, report.memory_total_mb) == (813, 301, 926)


def test_a_message_that_is_none_is_counted_and_ignored(make_device):
    broker = MemoryBroker()
    device = make_device(transport=MemoryTransport(broker))
    device.connect()
    other = MemoryTransport(broker)
    other.connect()
    other.publish("edge/d/dev-1/dn/ack", b"\xff\x00")
    other.publish("edge/g/default/desired", b"\x01nonsense")
    assert device.step().problem == ""
    assert device.status().counters.bad_messages == 2


@pytest.mark.parametrize("leap", [-YEAR, YEAR])
def test_a_clock_set_wrong_by_a_year_does_not_stop_reports(make_device, digits, clock, leap):
    broker = MemoryBroker()
    coordinator = Coordinator(broker)
    device = make_device(transport=MemoryTransport(broker), report=ReportConfig(interval_s=300, min_count=1))
    device.connect()
    device.step()
    for moved in (leap, -leap):  # wrong, and then right again
        clock.set(clock.now() + moved)
        device.step()
        coordinator.pump()
        before = len(coordinator.reports())
        for x in digits.life.x[:3]:
            device.observe(device.predict(x).id, "3", durable=True)
            clock.advance(301)
            assert device.step().problem == ""
            coordinator.pump()
        assert len(coordinator.reports()) == before + 3
    device.step()
    assert device.status().outbox_rows == 0
    assert len(samples(device)) == 6


# ---- the end


def test_stopping_twice_is_stopping_once_and_keeps_what_was_observed(make_device, digits):
    device = make_device(flush_interval_s=60)
    with device:
        device.observe(device.predict(digits.life.x[0]).id, "3")
    device.stop()
    device = make_device()
    assert len(samples(device)) == 1
    assert device.status().counters.labelled == 1


def test_a_stopped_device_says_goodbye(make_device):
    broker = MemoryBroker()
    coordinator = Coordinator(broker)
    device = make_device(transport=MemoryTransport(broker))
    device.connect()
    device.step()
    device.stop()
    coordinator.pump()
    assert b"stopped" in coordinator.states[-1]


def test_a_bug_in_one_part_of_a_step_does_not_keep_the_others_from_their_turn(make_device, digits, monkeypatch, caplog):
    device = make_device()
    monkeypatch.setattr(device._maintenance.upgrade, "turn", lambda *_: 1 / 0)
    prediction = device.predict(digits.life.x[0])
    device.observe(prediction.id, str(digits.life.y[0]))
    report = device.step()
    assert (report.predictions, report.labelled) == (1, 1)
    assert "ZeroDivisionError" in report.problem
    assert "nobody foresaw" in caplog.text
    device.stop()
    assert make_device().status().counters.labelled == 1


# ---- settings made in Python, and what comes after the end


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "adopt"}, r"\$\.mode"),
        ({"flush_interval_s": -1.0}, r"\$\.flush_interval_s"),
        ({"holdout_share": float("nan")}, r"\$\.holdout_share"),
        ({"learn": LearnConfig(passes=0)}, r"\$\.learn\.passes"),
        ({"learn": LearnConfig(learner="clever")}, "learn.learner: 'clever' is none of"),
        ({"learn": LearnConfig(learner="no_such_module:train")}, "No module named 'no_such_module'"),
    ],
)
def test_settings_made_in_python_are_held_to_the_bounds_of_the_file(make_device, settings, named):
    with pytest.raises(ConfigError, match=named):
        make_device(**settings)


def test_settings_that_are_no_settings_are_refused():
    with pytest.raises(ConfigError, match="expected a DeviceConfig, got dict"):
        check_config({"mode": "adapt"})


def test_a_mode_that_is_none_is_refused_and_the_one_in_use_kept(make_device):
    device = make_device(mode="shadow")
    with pytest.raises(ConfigError, match="monitor, shadow, adapt, got 'adept'"):
        device.mode = "adept"
    assert device.mode == "shadow"


def test_a_broker_in_the_settings_is_connected_to_by_an_embedded_device_too(make_device, embedded_broker):
    broker = BrokerConfig(host=embedded_broker.host, port=embedded_broker.port)
    with make_device(broker=broker) as device:
        deadline = threading.Event()
        for _ in range(500):
            if device.connected:
                break
            deadline.wait(0.02)
        assert device.connected


def test_nothing_is_taken_after_the_end_instead_of_being_lost(make_device, digits):
    device = make_device()
    waiting = device.predict(digits.life.x[0])
    device.stop()
    for refused in (
        lambda: device.predict(digits.life.x[0]),
        lambda: device.observe(waiting.id, "3"),
        lambda: device.learn(digits.life.x[:1], ["3"]),
        device.step,
        device.status,
        device.start,
    ):
        with pytest.raises(StoppedError, match="make another EdgeDevice"):
            refused()


def test_a_stop_that_the_disk_does_not_let_write_says_what_is_lost(make_device, digits, monkeypatch):
    device = make_device()
    device.observe(device.predict(digits.life.x[0]).id, "3")

    def no_room(rows):
        raise StoreError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(device._store, "add_rows", no_room)
        with pytest.raises(StoreError, match="1 labels and 1 predictions are lost: no room"):
            device.stop()
    device.stop()  # it is closed all the same
    make_device()


def test_the_apps_own_error_is_not_hidden_by_a_disk_that_is_full(make_device, digits, monkeypatch):
    def no_room(rows):
        raise StoreError("no room")

    def fail():
        with make_device() as device:
            monkeypatch.setattr(device._store, "add_rows", no_room)
            device.predict(digits.life.x[0])
            raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        fail()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda device: device.record("basket", "many"), InputError, "'basket': expected a number, got 'many'"),
        (lambda device: device.accept_label(3), LabelError, "a label is a string that is not empty, got 3"),
        (lambda device: device.observe("scan", "x" * 129), UnknownLabelError, "at most 128 printable characters"),
        (lambda device: device.observe("scan", "a\nb"), UnknownLabelError, "at most 128 printable characters"),
        (lambda device: device.observe("x" * 129, "3"), LabelError, "a string of 1 to 128 characters"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(make_device, call, error, words):
    with pytest.raises(error, match=words):
        call(make_device())


def test_what_edge_status_shows_is_a_minute_old_at_most_and_never_of_another_version(make_device, clock):
    def told():
        return json.loads(device._store.get("status"))

    device = make_device()
    device.step()
    assert (told()["release"], told()["ready"]) == (1, True)
    promote(device, tilted(current_head(device), 1))
    clock.advance(61)
    device.step()
    assert told()["head"] == 1
    device.observe(device.predict(np.zeros(device._maintenance.served.manifest.input.shape, np.float32)).id, "3")
    clock.advance(61)
    device.step()
    clock.advance(61)
    device.step()
    assert told()["counters"]["labelled"] == 1
