"""A release with another trunk: what was learned is carried over, and every kill leaves one of the two serving."""

import gc
import io
import itertools
import shutil
import threading
from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge_sdk.cli import main as edge
from edge_sdk.clock import ManualClock
from edge_sdk.config import DeviceConfig, GateConfig, LearnConfig, PolicyConfig, UpdateConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.experience import fair_judges
from edge_sdk.files import set_crash_hook
from edge_sdk.learn.executor import ProcessExecutor
from edge_sdk.resources import FixedReader
from edge_sdk.shadow import Shadow
from edge_sdk.transport import MemoryTransport

pytestmark = pytest.mark.torch
ROWS = 32
UPDATE = UpdateConfig(trust="none", shadow_rows=ROWS, min_free_bytes=0)


@pytest.fixture(autouse=True)
def clean_hook():
    yield
    set_crash_hook(None)


def events(device, name):
    return [entry.detail for entry in device.history(limit=2_000) if entry.name == name]


def personalise(device, pool, clock, *, rows=220):
    """Teach the device two digits that its release does not know, until a learned head serves."""
    for start in range(0, rows, 20):
        feed(device, pool, 20, start)
        clock.advance(30)
        device.step()
    device.learn_now()
    for _ in range(40):
        feed(device, pool, 10, rows)
        clock.advance(120)
        device.step()
        if device.status().head:
            return
    pytest.fail(f"nothing was learned: {device.status()}")


def feed(device, pool, count, start=0):
    for i in range(start, start + count):
        prediction = device.predict(pool.x[i % len(pool.y)])
        device.observe(prediction.id, str(pool.y[i % len(pool.y)]))


def shadow(device, pool, clock, *, turns=12):
    """Predict until the release in shadow serves, or does not any more."""
    for turn in range(turns):
        if device._maintenance.upgrade.state.shadow is None:
            return
        for x in pool.x[turn * 16 : turn * 16 + 16]:
            device.predict(x)
        clock.advance(1)
        assert device.step().problem == ""


@pytest.fixture(scope="module")
def taught(checkpoint, digits, tmp_path_factory):
    """The folder of a stopped device whose head has learned 8 and 9 on release 1, with the inputs of its labels."""
    home, clock = tmp_path_factory.mktemp("taught") / "device", ManualClock()
    config = DeviceConfig(
        device="dev-1", mode="adapt", variant="int8", durability="normal", learn=LearnConfig(executor="inline"),
        policy=PolicyConfig(min_fresh_rows=40, cooldown_s=60), gate=GateConfig(max_wait_s=3_600),
        update=msgspec.structs.replace(UPDATE, keep_inputs=1_000),
    )  # fmt: skip
    device = EdgeDevice(
        home, checkpoint=checkpoint, config=config, clock=clock, resources=FixedReader(), rng=np.random.default_rng(0)
    )
    personalise(device, digits.life, clock)
    device.stop()
    return home, clock.now()


@pytest.fixture
def learned(make_device, taught, tmp_path, clock):
    """Opens a copy of it: `learned(checkpoint, shadow_rows=0)`."""
    home, now = taught
    clock.advance(now + 60 - clock.now())

    def make(checkpoint, *, transport=None, executor=None, **update):
        if not (tmp_path / "device").exists():
            shutil.copytree(home, tmp_path / "device")
        return make_device(
            checkpoint=checkpoint,
            transport=transport,
            executor=executor,
            update=msgspec.structs.replace(UPDATE, **update),
        )

    return make


def in_shadow(device):
    return device._maintenance.upgrade.state.shadow is not None


def accuracy(device, digits):
    return device.evaluate(digits.score.x, [str(y) for y in digits.score.y])


def carried(device):
    return events(device, "release_activated")[-1]


def crash(device):
    """What a killed process leaves behind: no last step, and its locks and files closed."""
    device._stopped = True
    device._files.close()


# ---- the way over


def test_what_was_learned_is_carried_over_to_another_trunk(learned, checkpoint, other_trunk, digits, clock):
    device = learned(None)
    before = accuracy(device, digits)
    device.stop()
    device = learned(other_trunk)
    status = device.status()
    assert status.release == 1, "the new release is in shadow"
    waiting = status.shadow
    assert (waiting.release, waiting.pairs, waiting.pairs_wanted, waiting.training) == (2, 0, ROWS, False)
    (told,) = events(device, "release_shadowed")
    assert told == {"release": 2, "rows": ROWS}
    shadow(device, digits.life, clock)
    status = device.status()
    assert (status.release, status.labels, status.shadow) == (2, list("0123456789"), None)
    assert status.head > 0
    assert status.replay_rows > 0
    assert accuracy(device, digits) > before - 0.1
    assert carried(device)["carried"]
    assert carried(device)["head"].startswith("kept: head trained here")
    assert f"translated by {ROWS} inputs" in carried(device)["head"]
    assert device._store.count_pairs() == 0
    device.predict(digits.life.x[0])
    assert device._maintenance.pending.held() == {}


def test_the_status_says_how_long_a_release_in_shadow_waits_still(learned, other_trunk, digits, clock, tmp_path):
    device = learned(other_trunk)
    device.step()
    since = clock.now()
    clock.advance(600.0)
    for x in digits.life.x[:5]:
        device.predict(x)
    device.step()
    waiting = device.status().shadow
    device.stop()
    assert (waiting.since, waiting.pairs) == (since, 5)
    assert waiting.left_s == UPDATE.shadow_s - 600.0
    shown = CliRunner().invoke(edge, ["status", "--home", str(tmp_path / "device")])
    assert f"release 2 since {datetime.fromtimestamp(since, UTC).isoformat()}: 5 inputs passed both" in shown.output
    assert f"decided with {ROWS}, or in {waiting.left_s / 3600:.1f} hours" in shown.output


def test_labels_that_come_after_the_change_are_learned_from(learned, other_trunk, digits, clock):
    device = learned(other_trunk)
    early = device.predict(digits.life.x[0])  # passes both, too
    before = device._served.manifest.trunk_id
    device.step()
    waiting = [device.predict(x) for x in digits.life.x[100:140]]  # the last of them pass both trunks
    device.step()
    shadow(device, digits.life, clock)
    trunk = device._served.manifest.trunk_id
    assert (device.status().release, trunk != before) == (2, True)
    for number, prediction in [(0, early), *enumerate(waiting, 100)]:
        device.observe(prediction.id, str(digits.life.y[number]))
    device.step()
    found = device._store.execute("SELECT id, translated FROM samples WHERE trunk = ?", (trunk,)).fetchall()
    kinds = dict(found)
    assert [kinds[one.id] for one in (early, waiting[0], waiting[-1])] == [0, 1, 0]
    assert all(one.id in kinds for one in waiting)
    assert device.status().counters.other_trunk == 0


def test_labels_of_predictions_that_could_not_cross_over_are_counted(learned, other_trunk, digits, clock):
    device = learned(None)
    prediction = device.predict(digits.life.x[0])
    device.stop()
    device = learned(other_trunk, shadow_rows=0)
    device.observe(prediction.id, str(digits.life.y[0]))
    device.step()
    assert device.status().counters.other_trunk == 1
    assert device.status().fresh_rows == 0


def test_without_rows_in_shadow_the_learned_head_is_dropped_at_once(learned, other_trunk):
    device = learned(other_trunk, shadow_rows=0)
    assert (device.status().release, device.status().head) == (2, 0)
    assert carried(device)["head"] == "dropped: the new release has another trunk"


@pytest.mark.parametrize("key_file", ["", "inputs.key"])
def test_inputs_that_were_kept_are_encoded_anew_instead_of_translated(learned, other_trunk, digits, clock, key_file):
    device = learned(other_trunk, keep_inputs=1_000, inputs_key_file=key_file)
    assert device._store.execute("SELECT count(*) FROM inputs").fetchone()[0] > 200
    shadow(device, digits.life, clock)
    assert device.status().head > 0
    assert "; 0 rows translated" in carried(device)["head"]
    assert "encoded anew" in carried(device)["head"]
    trunk = device._served.manifest
    row = device._store.execute("SELECT id, latent FROM samples WHERE trunk = ?", (trunk.trunk_id,)).fetchone()
    x = np.load(io.BytesIO(device._store.input_of(row[0])))["x"]
    assert device._served.model.trunk.latents(trunk.input.apply(x[None]))[0].tobytes() == row[1]


def test_rows_labelled_while_the_release_is_in_shadow_are_exact(learned, other_trunk, digits, clock):
    device = learned(other_trunk)
    while in_shadow(device):
        feed(device, digits.life, 16)
        clock.advance(1)
        assert device.step().problem == ""
    kinds = dict(device._store.execute("SELECT translated, count(*) FROM samples WHERE trunk = ? GROUP BY translated",
                                       (device._served.manifest.trunk_id,)).fetchall())  # fmt: skip
    assert kinds[0] > 0
    assert kinds[1] > 0


def test_a_release_waits_only_so_long_for_inputs(learned, other_trunk, digits, clock):
    device = learned(other_trunk, shadow_s=60)
    device.step()
    assert in_shadow(device)
    clock.advance(61)
    device.step()
    assert (device.status().release, device.status().head) == (2, 0)
    assert carried(device)["head"].startswith("dropped: 0 inputs passed both trunks")


def test_a_release_is_not_waited_for_once_there_is_no_learned_head(learned, other_trunk):
    device = learned(other_trunk)
    device.reset_to_base()
    device.step()
    assert device.status().release == 2
    assert carried(device)["head"] == "there was no personal head"


def test_a_release_that_does_clearly_worse_either_way_is_not_taken(learned, other_trunk, digits, clock, monkeypatch):
    right = Shadow._right

    def worse(self, head, current, old):
        found = right(self, head, current, old)
        rows = np.ones(60, bool)
        return found._replace(old=rows, exact=rows, shipped=~rows, personal=~rows)

    monkeypatch.setattr(Shadow, "_right", worse)
    device = learned(other_trunk)
    shadow(device, digits.life, clock)
    assert device.status().release == 1
    assert device.status().head > 0
    (failed,) = events(device, "release_failed")
    assert failed["release"] == 2
    assert "worse than the release in use" in failed["reason"]
    assert {row[0] for row in device._store.execute("SELECT trunk FROM samples")} == {device._served.manifest.trunk_id}
    device.stop()
    assert not in_shadow(learned(other_trunk))


def test_an_input_goes_with_the_last_sample_of_its_prediction(learned, digits):
    device = learned(None, keep_inputs=1_000)
    (name,) = device._store.execute("SELECT id FROM inputs LIMIT 1").fetchone()
    assert device.forget([name]) == 1
    assert device._store.input_of(name) is None
    device.forget_all()
    assert device._store.execute("SELECT count(*) FROM inputs").fetchone()[0] == 0


def test_what_is_forgotten_while_a_release_is_in_shadow_is_forgotten_for_it_too(learned, other_trunk, digits, clock):
    device = learned(other_trunk)
    names = [device.predict(x).id for x in digits.life.x[:16]]
    device.step()
    assert device._store.count_pairs() == 16
    device.forget(names[:4])
    assert device._store.count_pairs() == 12
    device.forget_all()
    assert device._store.count_pairs() == 0


def test_the_head_is_trained_in_a_child_process_while_predictions_go_on(learned, other_trunk, digits, clock):
    executor = ProcessExecutor()
    device = learned(other_trunk, executor=executor)
    for turn in range(600):
        for x in digits.life.x[turn % 40 * 4 :][:16]:
            device.predict(x)
        assert device.step().problem == ""
        if not in_shadow(device):
            break
        if executor.pid is not None:
            clock.advance(1)
            threading.Event().wait(0.02)
    assert (device.status().release, device.status().head > 0) == (2, True)
    assert not (device._slots.root.parent / "rebase").exists()


def test_a_clock_that_is_set_while_a_release_waits_does_not_end_the_wait(learned, other_trunk, clock):
    device = learned(other_trunk)
    device.step()
    clock.advance(50 * 365 * 86_400)
    device.step()
    assert in_shadow(device)


# ---- what may happen on the way


def test_a_device_that_restarts_goes_on_with_the_release_in_shadow(learned, other_trunk, digits, clock):
    device = learned(other_trunk)
    for x in digits.life.x[:16]:
        device.predict(x)
    device.step()
    crash(device)
    device = learned(other_trunk)
    assert in_shadow(device)
    assert device._store.count_pairs() == 16
    shadow(device, digits.life, clock, turns=3)
    assert device.status().release == 2
    assert len(events(device, "release_shadowed")) == 1


def test_a_damaged_release_in_shadow_is_given_up_and_the_old_one_serves(learned, other_trunk, digits, clock):
    device = learned(other_trunk)
    device.stop()
    slot = device._slots.root / "b"
    (slot / "trunk.int8.onnx").write_bytes(b"nothing")
    device = learned(None)
    shadow(device, digits.life, clock)
    assert not in_shadow(device)
    assert device.predict(digits.life.x[0]).release == 1
    device.stop()
    device = learned(other_trunk)
    assert in_shadow(device), "the app brings it again"


def test_a_release_in_shadow_serves_at_once_when_the_old_one_is_lost(learned, other_trunk, digits):
    device = learned(other_trunk)
    device.stop()
    for file in (device._slots.root / "a").glob("*.onnx"):
        file.write_bytes(b"nothing")
    device = learned(None)
    assert device.predict(digits.life.x[0]).release == 2
    assert carried(device)["head"] == "dropped: the release that it was learned on is lost"


@pytest.mark.parametrize("wanted", ["withdrawn", "revoked", "kept"])
def test_an_offered_release_leaves_the_shadow_when_it_is_not_wanted_any_more(
    learned, other_trunk, publisher, digits, clock, wanted
):
    device = learned(None, transport=MemoryTransport(publisher.transport._broker))
    device.connect()
    offer = publisher.add(other_trunk)
    publisher.desire(offer)
    while not in_shadow(device):
        device.step()
        publisher.pump()
    if wanted != "kept":
        publisher.desire(None if wanted == "withdrawn" else offer, revoked=[2] if wanted == "revoked" else [])
        device.step()
        assert not in_shadow(device)
        assert device.predict(digits.life.x[0]).release == 1
        return
    crash(device)
    device = learned(None, transport=MemoryTransport(publisher.transport._broker))
    shadow(device, digits.life, clock, turns=5)
    assert in_shadow(device), "until the coordinator is heard again, its offer waits"
    device.connect()
    shadow(device, digits.life, clock)
    assert device.status().release == 2
    assert carried(device)["carried"]


class Killed(BaseException):
    """The power failed."""


def kill_at(point):
    passed = itertools.count()

    def kill(_):
        if next(passed) >= point:
            set_crash_hook(None)
            raise Killed

    return kill


def test_wherever_it_is_killed_one_of_the_two_serves_and_the_release_comes_over(
    learned, other_trunk, digits, clock, tmp_path
):
    """Every crash point between the install and the first step on the new release, each in a life of its own."""
    names = []
    set_crash_hook(names.append)
    shadow(learned(other_trunk), digits.life, clock)
    set_crash_hook(None)
    assert "shadow:settled" in names
    # commits are many and alike: the first, one on the way, and those around the hand-over
    last = len(names) - 1 - names[::-1].index("shadow:settled")
    points = sorted({0, last // 2, *range(last - 3, last + 4)})
    for point in points:
        shutil.rmtree(tmp_path / "device")
        set_crash_hook(kill_at(point))
        device = None
        try:
            device = learned(other_trunk)
            shadow(device, digits.life, clock)
        except Killed:
            pass
        set_crash_hook(None)
        if device is not None:
            crash(device)
        gc.collect()
        device = learned(other_trunk)
        assert device.predict(digits.life.x[0]).release in (1, 2), names[point]
        shadow(device, digits.life, clock)
        assert device.status().release == 2, names[point]
        assert device.status().head > 0, names[point]
        assert device.status().replay_rows > 0, names[point]
        device.stop()


# ---- which rows judge


def test_translated_rows_judge_only_until_there_are_others(learned, other_trunk, digits, clock):
    device = learned(other_trunk)
    shadow(device, digits.life, clock)
    trunk = device._served.manifest.trunk_id
    assert all(sample.translated for sample in fair_judges(device._store.samples("judge", trunk)))
    for start in range(0, 200, 20):
        feed(device, digits.life, 20, start)
        clock.advance(1)
        device.step()
    judges = fair_judges(device._store.samples("judge", trunk))
    assert len(judges) >= 20
    assert not any(sample.translated for sample in judges)
