"""What is forgotten is gone: from memory, from every table, from the bytes of the database, from what was summed up."""

import shutil
import sqlite3

import msgspec
import numpy as np
import pytest

from edge_sdk.config import PolicyConfig, ReplayConfig
from edge_sdk.errors import LabelError, ModelError, StoreError
from edge_sdk.files import set_crash_hook
from edge_sdk.learn.executor import ProcessExecutor
from edge_sdk.streams import rotation

pytestmark = pytest.mark.torch
BASE = set(range(8))
TURN = rotation(30)
DAY_S = 86_400


class Killed(BaseException):
    """As a power cut: nobody catches it."""


@pytest.fixture
def crash_at():
    """Die at the crash point with this number; without, count them."""
    met = []

    def hook(number=None):
        met.clear()

        def meet(name):
            met.append(name)
            if len(met) - 1 == number:
                raise Killed

        set_crash_hook(meet)
        return met

    yield hook
    set_crash_hook(None)


@pytest.fixture
def turned(digits):
    """Images that are all different, as a device sees them, and their names."""
    pool = digits.life.only(BASE)
    return TURN(pool.x, None), [str(y) for y in pool.y]


@pytest.fixture
def patient(config):
    """It learns when it is told to, and its gate never has evidence enough."""
    return msgspec.structs.replace(
        config,
        policy=PolicyConfig(min_fresh_rows=40, triggers=()),
        gate=msgspec.structs.replace(config.gate, alpha=1e-300, class_margin=1.0, slice_margin=1.0, factory_margin=1.0),
    )


@pytest.fixture
def credulous(patient):
    """It learns when it is told to, and promotes whatever looks the least bit better."""
    gate = msgspec.structs.replace(patient.gate, alpha=0.9999, calibration_margin=1.0)
    return msgspec.structs.replace(patient, gate=gate)


def live(device, turned, first, count, *, source=""):
    """Predict and label; returns the ids."""
    x, names = turned
    part = slice(first, first + count)
    ids = [prediction.id for prediction in device.predict_batch(x[part])]
    for name, truth in zip(ids, names[part], strict=True):
        device.observe(name, truth, source=source)
    device.step()
    return ids


def learn(device):
    device.learn_now()
    assert device.step().problem == ""


def samples(device, role=None):
    """Id to latent."""
    where = "" if role is None else f" WHERE role = '{role}'"
    return dict(device._store.read(f"SELECT id, latent FROM samples{where}"))


def on_disk(device):
    """The bytes of every file that the device has."""
    return b"".join(file.read_bytes() for file in sorted(device._home.rglob("*")) if file.is_file())


def found(device, latents):
    """How many of the latents are anywhere on the disk, or in the replay buffer's memory."""
    everything = on_disk(device) + device._adaptation.experience.buffer._latents.tobytes()
    return sum(latent in everything for latent in latents)


def names_of(device):
    return [entry.name for entry in device.history(limit=1_000)]


def moments(device):
    return device._adaptation.experience._device_moments()


def kill(device):
    """As a power cut: nothing is flushed."""
    device._files.close()
    device.stop = lambda: None


def consistent(device):
    """The buffer in memory is the one on the disk, in slots without holes."""
    buffer = device._adaptation.experience.buffer
    stored = device._store.samples("replay", device._adaptation.experience.trunk)
    assert [sample.slot for sample in stored] == list(range(len(buffer)))
    assert [sample.latent for sample in stored] == [latent.tobytes() for latent in buffer.latents]


# ---- some


def test_rows_of_every_kind_are_gone_from_the_bytes_on_disk(make_device, credulous, turned):
    """Learned, kept to judge, not learned yet, waiting for a label, asked about, and still in memory."""
    device = make_device(config=credulous)
    live(device, turned, 0, 200)
    learn(device)
    assert device.status().head == 1
    live(device, turned, 200, 30)
    waiting = [prediction.id for prediction in device.predict_batch(turned[0][230:250])]
    device.step()
    asked = [request.id for request in device.label_requests(5)]
    memory = [device.predict(x, id=f"order-of-{i}").id for i, x in enumerate(turned[0][250:260])]
    device.observe(memory[0], "3")
    rows = dict(device._store.read("SELECT id, latent FROM rows"))
    kinds = {role: list(samples(device, role).items())[:7] for role in ("replay", "judge", "fresh")}
    kinds["waiting"] = [(name, rows[name]) for name in {*waiting[:4], *asked}]
    ids = [name for kind in kinds.values() for name, _ in kind]
    latents = [latent for kind in kinds.values() for _, latent in kind]
    others = [latent for name, latent in samples(device).items() if name not in ids]
    assert all(kinds.values())
    assert len({*latents, *others}) == len(latents) + len(others)
    assert found(device, latents) == len(latents)
    assert device.status().asked == 5
    before = moments(device)

    assert device.forget([*ids, *memory, "nobody"]) == len(ids) + len(memory)

    assert found(device, latents) == 0
    assert found(device, others) == len(others)
    assert b"order-of" not in on_disk(device)
    assert device.status().asked == 0
    assert moments(device).mass < before.mass
    assert moments(device).mass == pytest.approx(moments(device).y.sum(), rel=1e-5)
    consistent(device)
    assert device.forget([*ids, *memory]) == 0
    assert [device.predict(x, id=name).id for x, name in zip(turned[0][260:], memory, strict=False)] == memory
    assert device.step().problem == ""
    for name in ids:
        device.observe(name, "3")
    assert device.step().labelled == 0
    assert [e.detail["rows"] for e in device.history(limit=1_000) if e.name == "forgotten"] == [len(ids + memory), 0]
    device.stop()
    again = make_device(config=credulous)
    assert found(again, latents) == 0
    consistent(again)


def test_all_rows_forgotten_one_by_one_leave_no_sum(make_device, credulous, turned):
    device = make_device(config=credulous)
    live(device, turned, 0, 70)
    learn(device)
    largest = np.abs(moments(device).xx).max()
    assert largest > 1
    for name in list(samples(device)):
        assert device.forget([name]) == 1
        consistent(device)
    left = moments(device)
    assert abs(left.mass) < 1e-3
    assert np.abs(left.xx).max() < 1e-4 * largest
    status = device.status()
    assert (status.head, status.fresh_rows, status.replay_rows, status.judge_rows) == (1, 0, 0, 0)
    live(device, turned, 70, 100)
    learn(device)
    first, second = (e.detail["replayed"] for e in device.history(limit=1_000) if e.name == "learn_started")
    assert first == second  # the factory's rows alone
    assert "learn_failed" not in names_of(device)


def test_what_is_to_be_forgotten_is_not_learned_first(make_device, credulous, turned):
    """The labels that would start learning are in memory only."""
    device = make_device(config=credulous)
    live(device, turned, 0, 100)
    fresh = list(samples(device, "fresh"))
    device.learn_now()
    assert device.forget(fresh) == len(fresh)
    assert device.step().problem == ""
    assert "learn_started" not in names_of(device)


def test_a_challenger_that_knows_a_forgotten_row_is_given_up(make_device, patient, turned):
    device = make_device(config=patient)
    live(device, turned, 0, 100)
    learn(device)
    assert device.status().phase == "judging"
    name, latent = next(iter(samples(device, "fresh").items()))
    (judge, _), *_ = samples(device, "judge").items()
    device.forget([judge])
    assert device.status().phase == "judging"  # it was never shown that one
    device.forget([name])
    assert device.status().phase == "idle"
    assert not (device._home / "learn" / "job").exists()
    assert found(device, [latent]) == 0
    (failure,) = [e.detail["reason"] for e in device.history(limit=1_000) if e.name == "learn_failed"]
    assert failure == "samples that it knows were to be forgotten"
    assert device.status().fresh_rows == len(samples(device, "fresh")) > 0


def test_a_job_under_way_that_knows_a_forgotten_row_is_stopped(make_device, patient, turned):
    executor = ProcessExecutor()
    executor.pause()  # it stays under way
    device = make_device(config=patient, executor=executor)
    live(device, turned, 0, 100)
    device.learn_now()
    executor.paused = True
    device.step()
    assert device.status().phase == "training"
    child = executor._child
    assert child.poll() is None
    device.forget(list(samples(device, "fresh"))[:1])
    assert device.status().phase == "idle"
    assert child.poll() is not None
    assert not (device._home / "learn" / "job").exists()


def test_what_is_no_list_of_ids_is_refused_and_nothing_is_forgotten(make_device, config, turned):
    device = make_device(mode="monitor")
    live(device, turned, 0, 5)
    device.learn(turned[0][5:8], turned[1][5:8])
    for ids in ("abc", [""], [None], [7], ["\ud800"]):
        with pytest.raises(LabelError):
            device.forget(ids)
    assert device.forget([]) == device.forget(["abc"]) == 0
    assert len(device._store.read("SELECT key FROM samples")) == 8


def test_without_room_to_write_nothing_is_forgotten_and_it_says_so(make_device, turned):
    """What waits in memory must not reach the disk after it was forgotten."""
    device = make_device(mode="monitor")
    ids = [device.predict(x).id for x in turned[0][:50]]
    conn = device._store.conn
    conn.execute(f"PRAGMA max_page_count = {conn.execute('PRAGMA page_count').fetchone()[0]}")
    for x in turned[0][:300]:
        device.predict(x)
    with pytest.raises(StoreError, match="no room"):
        device.forget(ids)
    conn.execute("PRAGMA max_page_count = 1000000")
    assert device.forget(ids) == 50
    assert device.step().problem == ""
    assert device._store.read("SELECT count(*) FROM rows") == [(300,)]


# ---- all


def test_after_forgetting_all_the_device_is_as_new(make_device, credulous, turned):
    device = make_device(config=credulous)
    first = device.predict(turned[0][0]).probabilities
    live(device, turned, 0, 200)
    learn(device)
    live(device, turned, 200, 60)
    device.learn(turned[0][260:270], turned[1][260:270])
    device.predict(turned[0][270], id="mine")
    device.predict_batch(turned[0][271:280])
    device.step()
    asked = device.label_requests(5)
    latents = [*samples(device).values(), *dict(device._store.read("SELECT id, latent FROM rows")).values()]
    assert device.status().head == 1
    assert device.skew().training.rows
    assert len(asked) == 5

    assert device.forget_all().head == 0

    assert found(device, latents) == 0
    status = device.status()
    assert (status.head, status.fresh_rows, status.replay_rows, status.judge_rows) == (0, 0, 0, 0)
    assert (status.asked, status.accuracy, device.skew()) == (0, None, type(device.skew())())
    assert (moments(device).mass, len(device._adaptation.experience.buffer)) == (0, 0)
    assert not list(device._home.rglob("heads/*"))
    assert device.rollback().head == 0
    np.testing.assert_array_equal(device.predict(turned[0][0], id="mine").probabilities, first)
    live(device, turned, 280, 60)
    learn(device)
    assert device.lineage()[-1].detail["replayed"] <= len(device._adaptation.experience.factory.latents)


def test_forgetting_all_gives_up_a_challenger(make_device, patient, turned):
    device = make_device(config=patient)
    live(device, turned, 0, 100)
    learn(device)
    assert device.status().phase == "judging"
    device.forget_all()
    assert (device.status().phase, device.status().fresh_rows) == ("idle", 0)
    assert not (device._home / "learn" / "job").exists()


def test_a_device_without_a_release_has_nothing_to_forget(make_device):
    device = make_device(checkpoint=None)
    assert device.forget(["some"]) == 0
    with pytest.raises(ModelError):
        device.forget_all()


# ---- killed meanwhile


@pytest.mark.parametrize("all_of_it", [False, True])
def test_killed_at_any_point_it_comes_back_and_forgets_at_the_second_call(
    make_device, credulous, turned, crash_at, tmp_path, all_of_it
):
    first = make_device("first", config=credulous)
    live(first, turned, 0, 100)
    learn(first)
    ids = [*live(first, turned, 100, 20), *samples(first)]
    latents = list(samples(first).values())
    first.stop()

    def run(number, home):
        """The points that forgetting passes."""
        shutil.copytree(tmp_path / "first", tmp_path / home)
        device = make_device(home, config=credulous)
        device.predict(turned[0][0], id="mine")
        forget = lambda: device.forget_all() if all_of_it else device.forget([*ids, "mine"])  # noqa: E731
        met = crash_at(number)
        try:
            forget()
        except Killed:
            assert len(met) == number + 1
            crash_at()
            kill(device)
            device = make_device(home, config=credulous)
            assert device.step().problem == ""
            consistent(device)
            forget()
        passed = list(met)
        assert found(device, latents) == 0
        assert samples(device) == {}
        assert device.predict(turned[0][0], id="mine").head == (0 if all_of_it else 1)
        assert device.step().problem == ""
        return passed

    points = run(None, "whole")
    assert {"commit:before", "commit:after"} <= set(points)
    assert ("renamed:pointer.json" in points) == all_of_it
    for number in range(len(points)):
        run(number, f"point-{number}")


# ---- by age


@pytest.mark.parametrize("mode", ["monitor", "adapt"])
def test_samples_older_than_they_may_become_are_erased(make_device, credulous, turned, clock, mode):
    config = msgspec.structs.replace(credulous, replay=ReplayConfig(retain_days=2))
    device = make_device(config=config, mode=mode)
    live(device, turned, 0, 100)
    if mode == "adapt":
        learn(device)
        assert device.status().replay_rows > 0
    old = set(samples(device))
    clock.advance(1.5 * DAY_S)
    new = set(live(device, turned, 100, 30))
    assert set(samples(device)) == old | new
    clock.advance(0.6 * DAY_S)
    device.step()
    assert set(samples(device)) == new
    if mode == "adapt":
        consistent(device)
    clock.advance(2 * DAY_S)
    device.step()
    assert samples(device) == {}


@pytest.mark.parametrize("why", ["not_learned_on", "on_probation"])
def test_samples_are_erased_by_age_while_nothing_can_be_learned(make_device, config, turned, clock, why):
    config = msgspec.structs.replace(config, replay=ReplayConfig(retain_days=2), mode="monitor")
    device = make_device(config=config)
    live(device, turned, 0, 30)
    if why == "not_learned_on":
        device._adaptation.experience = None
    else:
        state = device._maintenance.upgrade.state
        state.watching, state.since = True, clock.now() + 10 * DAY_S
    clock.advance(2.1 * DAY_S)
    assert device.step().problem == ""
    assert samples(device) == {}


def test_what_was_erased_by_age_is_gone_from_the_bytes_on_disk(make_device, credulous, turned, clock):
    config = msgspec.structs.replace(credulous, replay=ReplayConfig(retain_days=2), mode="adapt")
    device = make_device(config=config)
    live(device, turned, 0, 100)
    learn(device)
    live(device, turned, 100, 30)
    latents = list(samples(device).values())
    clock.advance(2.1 * DAY_S)
    device.step()
    assert found(device, latents) == 0


def test_a_reader_delays_only_the_last_trace_of_what_was_erased_by_age(make_device, config, turned, clock, monkeypatch):
    config = msgspec.structs.replace(config, replay=ReplayConfig(retain_days=2), mode="monitor")
    device = make_device(config=config)
    live(device, turned, 0, 30)
    latents = list(samples(device).values())
    device._store.execute("PRAGMA busy_timeout = 1")
    reader = sqlite3.connect(f"file:{device._home / 'edge.db'}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM samples").fetchone()
    clock.advance(2.1 * DAY_S)
    assert "another process reads the database" in device.step().problem
    assert samples(device) == {}
    assert device.step().problem == ""
    reader.close()
    clock.advance(3_600)
    assert device.step().problem == ""
    assert found(device, latents) == 0


def test_without_a_limit_samples_are_kept(make_device, turned, clock):
    device = make_device(mode="monitor")
    live(device, turned, 0, 10)
    clock.advance(1_000 * DAY_S)
    device.step()
    assert len(samples(device)) == 10


# ---- the head alone


def test_a_reset_keeps_the_samples_and_forgets_how_the_head_scored(make_device, credulous, turned):
    device = make_device(config=credulous)
    live(device, turned, 0, 200)
    learn(device)
    kept = samples(device)
    assert device.skew().judge.rows
    assert device.reset_to_base().head == 0
    assert device.skew() == type(device.skew())()
    assert (device.status().phase, samples(device)) == ("idle", kept)
    assert device.rollback().head == 1


def test_a_reader_of_the_database_does_not_keep_what_is_forgotten_on_the_disk(make_device, turned):
    device = make_device(mode="monitor")
    ids = live(device, turned, 0, 30)
    latents = list(samples(device).values())
    reader = sqlite3.connect(f"file:{device._home / 'edge.db'}?mode=ro", uri=True)
    reader.execute("SELECT count(*) FROM samples").fetchone()
    device.forget(ids)
    reader.close()
    assert found(device, latents) == 0
