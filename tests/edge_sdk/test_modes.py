"""A drifting device under every setting of trust, learner, executor, buffer, consolidation and window."""

import threading
from collections import Counter

import msgspec
import numpy as np
import pytest

from edge_sdk.config import LearnConfig, ReplayConfig, ReportConfig
from edge_sdk.head import Head
from edge_sdk.learn.base import CHALLENGER, LearnJob
from edge_sdk.messages import Envelope, Event, Topics, decode, unpack
from edge_sdk.replay import BUFFERS
from edge_sdk.streams import DriftingStream, rotation
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
BASE = set(range(8))
TURN = rotation(30)
OWN = """
from edge_sdk.learn.base import nothing_between
from edge_sdk.learn.slda import train_slda

def train(job, *, between=nothing_between):
    return train_slda(job, between=between)
"""
LEARNERS = ["hybrid", "slda", "sgd", "torch", "learner_of_the_app:train"]


@pytest.fixture
def own_learner(tmp_path, monkeypatch):
    """The app's own learner, where it can be imported."""
    (tmp_path / "learner_of_the_app.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def scores(digits):
    """Accuracy of a device on turned and on straight digits that it has not seen."""
    pool = digits.score.only(BASE)
    names = [str(y) for y in pool.y]
    turned = TURN(pool.x, None)
    return lambda device: (device.evaluate(turned, names), device.evaluate(pool.x, names))


@pytest.fixture
def life(digits, clock):
    """Lives on turned digits, each labelled at once, until something is so, for 40 ticks at most."""
    streams = {}

    def live(device, until=lambda device: False, ticks=40):
        stream = streams.setdefault(
            device,
            DriftingStream(digits.life, rng=np.random.default_rng(0), base_labels=BASE, drift_at=0, transform=TURN),
        )
        for _ in range(ticks):
            clock.advance(300)
            x, y = stream.draw(40, 0)
            for prediction, truth in zip(device.predict_batch(x), y, strict=True):
                device.observe(prediction.id, str(truth))
            assert device.step().problem == ""
            if until(device):
                return True
        return False

    return live


def learning(**options):
    return LearnConfig(**{"executor": "inline", **options})


def outcomes(device):
    return [entry.outcome for entry in device.lineage()]


def is_promoted(device):
    return device.status().counters.promotions > 0


def heads(device):
    return sorted(file.name for file in device._home.glob("slots/a/heads/*"))


# ---- how far it is trusted


@pytest.mark.parametrize("mode", ["monitor", "shadow", "adapt"])
def test_a_drifting_device_learns_judges_and_promotes_as_far_as_it_is_trusted(make_device, life, scores, digits, mode):
    broker = MemoryBroker()
    listener = MemoryTransport(broker)
    listener.subscribe(Topics().up("+", "event"))
    listener.connect()
    device = make_device(mode=mode, transport=MemoryTransport(broker), report=ReportConfig(min_count=10))
    device.connect()
    before, first = scores(device), device.predict(digits.score.x[0]).probabilities
    life(device, ticks=6)
    if mode == "monitor":
        device.learn_now()  # nor then
        life(device, ticks=2)
    status = device.status()
    sent = [unpack(decode(message.payload, Envelope).body, Event) for message in listener.receive()]
    told = {event.name: event.detail for event in sent}
    assert "drift_alarm" in told
    assert ("learn_started" in told) == (mode != "monitor")
    assert (status.counters.promotions > 0, "promoted" in told) == ((mode == "adapt"),) * 2
    assert ("would_promote" in told) == (mode == "shadow")
    if mode == "monitor":
        assert (outcomes(device), status.replay_rows, status.phase) == ([], 0, "idle")
        assert status.fresh_rows + status.judge_rows == status.counters.labelled
    if mode != "adapt":
        assert (status.head, heads(device), scores(device)) == (0, [], before)
        np.testing.assert_array_equal(device.predict(digits.score.x[0]).probabilities, first)
        assert device.skew().training.rows == 0
    else:
        assert (status.head, heads(device)) == (1, ["0001.npz"])
        assert scores(device)[0] >= before[0] + 0.3
        assert scores(device)[1] >= before[1] - 0.03
        assert device.skew().training.rows > 0
    if mode != "monitor":
        (detail,) = [told[name] for name in ("would_promote", "promoted") if name in told]
        assert detail["outcome"] == "promote"
        assert detail["evidence"] >= 1 / detail["alpha"] > 30
        assert detail["rows"] >= 10
        assert detail["challenger"] >= detail["champion"] + 0.2
        assert detail["challenger_factory"] >= detail["champion_factory"] - 0.05
        entry = device.lineage()[0]
        assert (entry.parent, entry.head) == (0, None if mode == "shadow" else 1)
        assert entry.detail["fresh"] == entry.detail["used"] > 40


# ---- learners


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learner_brings_a_drifting_device_back_and_keeps_what_it_knew(
    make_device, life, scores, own_learner, learner
):
    device = make_device(learn=learning(learner=learner))
    turned, straight = scores(device)
    assert life(device, is_promoted)
    after = scores(device)
    assert after[0] >= turned + 0.2
    assert after[1] >= straight - 0.03
    assert device.lineage()[-1].detail["config"]["learner"] == learner
    said = device.predict(np.zeros((1, 8, 8), np.float32)).probabilities
    device.stop()
    again = make_device(learn=learning(learner=learner), mode="monitor")
    assert (again.status().head, scores(again)) == (1, after)
    np.testing.assert_array_equal(again.predict(np.zeros((1, 8, 8), np.float32)).probabilities, said)


@pytest.mark.parametrize("learner", ["hybrid", "sgd", "learner_of_the_app:train"])
def test_a_process_of_its_own_gives_the_bytes_that_learning_in_place_gives(
    make_device, life, config, own_learner, learner
):
    unmoved = msgspec.structs.replace(config.gate, alpha=1e-300, class_margin=1.0, factory_margin=1.0)
    made = {}
    for executor in ("inline", "process"):
        device = make_device(executor, gate=unmoved, learn=learning(executor=executor, learner=learner))
        life(device, lambda device: device.status().phase != "idle")
        for _ in range(3_000):
            if device.status().phase == "judging":
                break
            threading.Event().wait(0.01)  # another process takes its own time
            assert device.step().problem == ""
        made[executor] = (device._home / "learn" / "job" / CHALLENGER).read_bytes()
    assert made["inline"] == made["process"]


def test_a_function_that_is_no_learner_fails_its_job_and_the_champion_serves_on(make_device, life):
    device = make_device(learn=learning(learner="json:dumps"))
    assert life(device, lambda device: "learn_failed" in outcomes(device))
    (reason, *_) = [entry.detail["reason"] for entry in device.history(limit=500) if entry.name == "learn_failed"]
    assert "unexpected keyword argument 'between'" in reason
    assert (device.status().head, device.status().phase) == (0, "idle")


# ---- memory, consolidation, windows


@pytest.mark.parametrize("kind", sorted(BUFFERS))
def test_every_buffer_keeps_what_fits_and_is_replayed(make_device, life, scores, clock, kind):
    device = make_device(replay=ReplayConfig(kind=kind, max_bytes=40 * (32 + 96)))
    before = scores(device)
    assert life(device, is_promoted)
    assert device.lineage()[-1].detail["used"] > 40
    assert device.status().replay_rows == 40
    if kind == "balanced":
        stored = Counter(label for (label,) in device._store.read("SELECT label FROM samples WHERE role = 'replay'"))
        assert max(stored.values()) - min(stored.values()) <= 4
    device.stop()
    device = make_device(replay=ReplayConfig(kind=kind, max_bytes=40 * (32 + 96)))
    assert life(device, lambda device: device.status().phase == "idle")
    device.learn_now()
    assert life(device, lambda device: len(device.lineage()) > 1)
    first, second = (entry.detail["replayed"] for entry in device.lineage()[:2])
    assert second == first + 40
    assert device.status().replay_rows == 40
    assert scores(device)[0] >= before[0] + 0.3


@pytest.mark.parametrize("mode", ["checkpoint", "offline", "online"])
def test_every_consolidation_holds_on_to_what_it_says(make_device, life, config, mode):
    """The second job: the promoted head's weights are what online EWC holds on to, the checkpoint's are the others'."""
    device = make_device(learn=learning(learner="sgd", consolidation=mode))
    assert life(device, is_promoted)
    assert heads(device) == (["0001.npz"] if mode == "checkpoint" else ["0001.ewc.npz", "0001.npz"])
    device.stop()
    unmoved = msgspec.structs.replace(config.gate, alpha=1e-300, class_margin=1.0, factory_margin=1.0)
    device = make_device(learn=learning(learner="sgd", consolidation=mode), gate=unmoved)
    assert life(device, lambda device: device.status().phase == "idle")
    device.learn_now()
    assert life(device, lambda device: device.status().phase == "judging")
    job = LearnJob.load(device._home / "learn" / "job")
    base, promoted = job.base.weights, Head.load(device._home / "slots" / "a" / "heads" / "0001.npz").weights
    same_as_base, same_as_promoted = (
        all(np.array_equal(job.anchor[key], head[key]) for key in head) for head in (base, promoted)
    )
    assert (same_as_base, same_as_promoted) == {
        "checkpoint": (True, False), "offline": (False, False), "online": (False, True),
    }[mode]  # fmt: skip
    assert all((value >= 0).all() for value in job.fisher.values())


@pytest.mark.parametrize("window", ["all", "fixed", "dynamic"])
def test_every_window_learns_from_no_more_than_its_rows(make_device, life, scores, window):
    device = make_device(learn=learning(window=window, window_rows=50))
    before = scores(device)
    assert life(device, is_promoted)
    detail = device.lineage()[-1].detail
    assert detail["fresh"] > 50
    assert detail["used"] == detail["fresh"] if window == "all" else 40 <= detail["used"] <= 50
    assert scores(device)[0] >= before[0] + 0.2


def test_a_part_that_stands_for_all_is_learned_from_where_there_are_more(make_device, life, scores):
    device = make_device(learn=learning(max_rows=40))
    before = scores(device)
    assert life(device, is_promoted)
    assert device.lineage()[-1].detail["used"] == 40 < device.lineage()[-1].detail["fresh"]
    assert scores(device)[0] >= before[0] + 0.2
