"""The learning transaction on a real device and real handwriting: decide, learn, judge, promote, watch."""

import os
import shutil
import signal
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

import edge_sdk.device
from edge_sdk.adapt import Recent
from edge_sdk.errors import DiskFullError, LabelError, UnknownLabelError
from edge_sdk.experience import FactoryMemory
from edge_sdk.files import load_npz
from edge_sdk.head import Head
from edge_sdk.learn.base import CHALLENGER, LearnJob, LearnResult
from edge_sdk.learn.executor import InlineExecutor
from edge_sdk.manifest import MANIFEST_NAME, MEMORY_NPZ, parse_manifest
from edge_sdk.policy import ResourceState
from edge_sdk.resources import FixedReader
from edge_sdk.slots import Slots
from edge_sdk.streams import DriftingStream, darkening, rotation

NAMES = [str(i) for i in range(10)]
BASE = set(range(8))
TICK_S = 300.0
TURNED = rotation(30)


class Working:
    """A learner that works until it is told what came of it."""

    def __init__(self):
        self.paused, self.worked_s, self.result, self.calls = False, 0.0, None, []

    def start(self, folder):
        self.calls.append("start")

    def poll(self):
        result, self.result = self.result, None
        return result

    def pause(self):
        self.paused = True
        self.calls.append("pause")

    def resume(self):
        self.paused = False
        self.calls.append("resume")

    def cancel(self):
        self.calls.append("cancel")


class World:
    """What happens to a device, tick by tick; every prediction gets its label at once."""

    def __init__(self, clock, pool, transform=TURNED, *, drift_at=0, new_labels=frozenset(), seed=0):
        rng = np.random.default_rng(seed)
        self.clock, self.tick = clock, 0
        self.stream = DriftingStream(
            pool, rng=rng, base_labels=BASE, drift_at=drift_at, transform=transform, new_labels=new_labels
        )

    def live(self, device, ticks=1, *, rows=40, label=lambda truth: truth, until=None):
        """Ticks of life, or fewer if `until` says so; returns whether it did."""
        for _ in range(ticks):
            self.clock.advance(TICK_S)
            x, y = self.stream.draw(rows, self.tick)
            self.tick += 1
            for prediction, truth in zip(device.predict_batch(x), y, strict=True):
                device.observe(prediction.id, label(NAMES[truth]))
            report = device.step()
            assert report.problem == ""
            if until is not None and until(device):
                return True
        return False


@pytest.fixture
def world(clock, digits):
    def make(*args, **options):
        return World(clock, digits.life, *args, **options)

    return make


@pytest.fixture
def hard_to_convince(config):
    """A gate that never has evidence enough."""
    return msgspec.structs.replace(config, gate=msgspec.structs.replace(config.gate, alpha=1e-300, class_margin=1.0))


@pytest.fixture
def careless(config):
    """It forgets, and its gate does not mind: harm is left to probation."""
    gate = msgspec.structs.replace(config.gate, factory_margin=1.0, class_margin=1.0)
    learn = msgspec.structs.replace(config.learn, learner="sgd", replayed_per_batch=0, ewc_lambda=0.0)
    return msgspec.structs.replace(config, gate=gate, learn=learn)


def events(device):
    return [entry.name for entry in device.history(limit=1_000)]


def details(device, name):
    return [entry.detail for entry in device.history(limit=1_000) if entry.name == name]


def promoted_rows(device):
    return details(device, "learn_started")[-1]["rows"]


def phase_is(phase):
    return lambda device: device.status().phase == phase


def has(name):
    return lambda device: name in events(device)


def turned(label):
    """Another label than the right one, always the same."""
    return NAMES[(int(label) + 1) % 8]


def kill(device):
    """As a power cut: nothing is flushed."""
    device._files.close()
    device.stop = lambda: None


def stop(device):
    device.stop()
    device.stop = lambda: None


def challenger_of(device):
    return Head.load(device._home / "learn" / "job" / CHALLENGER)


def stored_replay(device):
    samples = device._store.samples("replay", device._adaptation.experience.trunk)
    return [(s.slot, s.latent, s.label) for s in samples]


def buffered(device):
    experience = device._adaptation.experience
    labels = [experience._strata[i] for i in experience.buffer.labels]
    return [(i, experience.buffer.latents[i].tobytes(), label) for i, label in enumerate(labels)]


# ---- the whole loop


def test_drift_is_noticed_learned_promoted_and_confirmed(make_device, world, digits):
    device, life = make_device(), world(drift_at=4)
    score = digits.score.only(BASE)
    names = [NAMES[i] for i in score.y]
    drifted = life.stream.transform(score.x, np.random.default_rng(0))
    life.live(device, 4)
    assert "drift_alarm" not in events(device)
    under, original = device.evaluate(drifted, names), device.evaluate(score.x, names)

    assert life.live(device, 40, until=has("confirmed"))

    order = events(device)
    steps = ["drift_alarm", "learn_started", "promoted", "rereferenced", "confirmed"]
    assert [order.index(name) for name in steps] == sorted(order.index(name) for name in steps)
    status = device.status()
    assert status.head >= 1
    assert status.counters.promotions == 1
    assert status.counters.rollbacks == 0
    assert status.replay_rows > 0
    assert device.evaluate(drifted, names) >= under + 0.1
    assert device.evaluate(score.x, names) >= original - 0.05
    (promoted,) = details(device, "promoted")
    assert promoted["evidence"] >= 20
    assert promoted["challenger"] > promoted["champion"]
    assert "drift" in promoted["trigger"]
    assert (promoted["to"], promoted["parent"]) == (1, 0)
    (line,) = device.lineage()
    assert (line.outcome, line.head, line.detail["fresh"]) == ("promoted", 1, promoted_rows(device))
    skew = device.skew()
    assert skew.training.rows == promoted_rows(device)
    assert skew.judge.rows == promoted["rows"]
    assert skew.live.rows >= 60
    assert skew.changed == 0  # what serves is what was measured


def test_without_drift_nothing_is_learned(make_device, world):
    device = make_device()
    world(darkening(1.0), drift_at=0).live(device, 30)
    assert set(events(device)) <= {"release_activated", "drift_warning"}
    assert device.status().head == 0
    assert device.status().fresh_rows > 0


def test_shadow_mode_learns_and_judges_but_never_promotes_and_says_what_it_would_have_done(make_device, world):
    device, life = make_device(mode="shadow"), world()
    assert life.live(device, 40, until=has("would_promote"))
    status = device.status()
    assert status.phase == "idle"
    assert (status.head, status.counters.promotions) == (0, 0)
    assert "promoted" not in events(device)
    (detail,) = details(device, "would_promote")
    assert detail["outcome"] == "promote"
    assert detail["evidence"] >= 20
    assert status.replay_rows > 0


def test_monitor_mode_watches_and_never_learns(make_device, world):
    device = make_device(mode="monitor")
    world().live(device, 10)
    device.learn_now()
    world().live(device, 10)
    assert "drift_alarm" in events(device)
    assert "learn_started" not in events(device)
    assert device.status().phase == "idle"
    assert device.status().fresh_rows > 300


def test_a_mode_changed_while_a_challenger_is_judged_counts(make_device, world, config, clock, hard_to_convince):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 20, until=phase_is("judging"))
    kill(device)
    again = make_device(config=config, mode="monitor")
    assert life.live(again, 20, until=phase_is("idle"))
    assert again.status().head == 0
    assert "promoted" not in events(again)


def test_a_harmful_promotion_is_rolled_back_in_probation(make_device, world, digits, careless):
    """Labels come wrong until the promotion, and right again after it."""
    device, life = make_device(config=careless), world(darkening(1.0))
    score = digits.score.only(BASE)
    names = [NAMES[i] for i in score.y]
    accuracy = device.evaluate(score.x, names)
    device.learn_now()
    assert life.live(device, 20, label=turned, until=phase_is("probation"))
    assert device.status().head == 1
    assert device.evaluate(score.x, names) < 0.3

    assert life.live(device, 3, until=phase_is("idle"))

    assert device.status().head == 0
    assert device.evaluate(score.x, names) == accuracy
    assert device.status().counters.rollbacks == 1
    (detail,) = details(device, "head_rolled_back")
    assert detail["reason"].startswith("live loss ")
    assert detail["to"] == 0
    life.live(device, 5)
    assert "confirmed" not in events(device)


def test_after_the_rollback_of_a_grown_head_the_monitors_watch_the_head_before(make_device, world, careless):
    """The head that was rolled back had one label more, and another normal."""
    device, life = make_device(config=careless), world(darkening(1.0))
    device.learn_now()
    assert life.live(device, 20, label=lambda truth: "new" if truth in "01" else truth, until=phase_is("probation"))
    assert "new" in device.labels
    assert life.live(device, 6, until=phase_is("idle"))
    assert device.labels == tuple(NAMES[:8])

    life.live(device, 20)

    assert device.status().alarms == []
    state = {monitor.name: monitor for monitor in device._monitoring.states()}
    assert state["output"].evidence > 0
    after = World(life.clock, life.stream._base, darkening(0.3))
    assert after.live(device, 10, until=lambda device: "input" in device.status().alarms)


def test_a_version_that_fails_in_use_is_rolled_back_without_labels(make_device, world):
    device, life = make_device(), world()
    assert life.live(device, 40, until=phase_is("probation"))
    device.step()
    for _ in range(5):
        device._pending.fail()
    device.step()
    assert device.status().head == 0
    assert details(device, "head_rolled_back")[0]["reason"] == "the new version fails in use"


def test_without_labels_a_healthy_version_is_kept_as_unproven(make_device, world, clock):
    device, life = make_device(), world()
    assert life.live(device, 40, until=phase_is("probation"))
    clock.advance(86_400)
    device.step()
    assert device.status().phase == "idle"
    assert details(device, "confirmed")[0]["reason"].startswith("unproven: healthy")


# ---- waiting and superseding


def test_a_challenger_that_proves_nothing_gives_way_to_one_that_knows_more(make_device, world, hard_to_convince):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 30, until=lambda device: events(device).count("learn_started") == 3)
    rows = [detail["rows"] for detail in details(device, "learn_started")]
    assert rows[1] >= 2 * rows[0]
    assert rows[2] >= 2 * rows[1]
    assert events(device).count("superseded") == 2
    assert device.status().replay_rows == 0
    assert device.status().counters.rejections == 0
    assert "more samples than the challenger before" in details(device, "learn_started")[1]["reason"]


def test_a_challenger_that_is_not_proven_in_time_is_rejected_and_its_rows_are_remembered(
    make_device, world, clock, hard_to_convince
):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 20, until=phase_is("judging"))
    assert device.status().waits.startswith("evidence ")
    rows = details(device, "learn_started")[0]["rows"]
    clock.advance(3_600)
    device.step()
    (detail,) = details(device, "rejected")
    assert detail["reason"] == "not proven better within 3600 s"
    status = device.status()
    assert (status.phase, status.head, status.counters.rejections) == ("idle", 0, 1)
    assert status.replay_rows == rows
    assert not (device._home / "learn" / "job").exists()


def test_learning_waits_for_resources_and_says_so(make_device, world):
    reader = FixedReader(ResourceState(battery=0.1, on_mains=False))
    device, life = make_device(resources=reader), world()
    life.live(device, 10)
    assert device.status().alarms
    assert "waits for battery at 10%" in device.status().waits
    assert "learn_started" not in events(device)
    reader.state = ResourceState(battery=0.1, on_mains=True)
    device.step()
    assert "learn_started" in events(device)


def test_a_failed_learner_leaves_the_champion_and_is_tried_again_after_the_cool_down(make_device, world, clock, config):
    class Failing(InlineExecutor):
        fails = 1

        def start(self, folder):
            if self.fails:
                self.fails -= 1
                (folder / "job.json").write_bytes(b"{}")
            super().start(folder)

    config = msgspec.structs.replace(config, policy=msgspec.structs.replace(config.policy, cooldown_s=2 * TICK_S))
    device, life = make_device(executor=Failing(), config=config), world()
    assert life.live(device, 20, until=has("learn_failed"))
    assert device.status().head == 0
    assert device.status().phase == "idle"
    assert "IntegrityError" in details(device, "learn_failed")[0]["reason"]
    life.live(device, 1)
    assert events(device).count("learn_started") == 1
    assert "cool-down" in device.status().waits
    life.live(device, 1)
    assert events(device).count("learn_started") == 2


def test_a_learner_that_takes_too_long_is_stopped(make_device, world, clock):
    executor = Working()
    device, life = make_device(executor=executor), world()
    assert life.live(device, 20, until=phase_is("training"))
    executor.worked_s = 121.0
    device.step()
    assert executor.calls[-1] == "cancel"
    assert details(device, "learn_failed")[0]["reason"] == "stopped after 120 s"
    assert device.status().phase == "idle"


# ---- restarts


@pytest.mark.parametrize("end", [stop, kill])
def test_a_restart_during_judging_continues_with_the_same_challenger(make_device, world, config, hard_to_convince, end):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 20, until=phase_is("judging"))
    challenger = challenger_of(device).to_bytes()
    end(device)

    again = make_device(config=config)
    assert again.status().phase == "judging"
    assert challenger_of(again).to_bytes() == challenger
    assert life.live(again, 6, until=phase_is("probation"))
    assert events(again).count("learn_started") == 1
    assert again._slots.head(again._slots.pointer.current).to_bytes() == challenger


@pytest.mark.parametrize("end", [stop, kill])
def test_a_restart_during_probation_continues_with_the_same_evidence(make_device, world, clock, end):
    device, life = make_device(), world()
    assert life.live(device, 40, until=phase_is("probation"))
    life.live(device, 1, rows=30)
    clock.advance(61)  # evidence is on disk at least once a minute
    device.step()
    before, after, recent = (list(getattr(device._adaptation.state, name)) for name in ("before", "after", "recent"))
    assert len(after) == 30
    end(device)

    again = make_device()
    state = again._adaptation.state
    assert (state.phase, state.before, state.after, state.recent) == ("probation", before, after, recent)
    assert again.status().head == 1
    assert life.live(again, 10, until=has("confirmed"))


def test_a_restart_during_probation_can_still_roll_back(make_device, world, careless):
    device, life = make_device(config=careless), world(darkening(1.0))
    device.learn_now()
    assert life.live(device, 20, label=turned, until=phase_is("probation"))
    kill(device)
    again = make_device(config=careless)
    assert again.status().phase == "probation"
    assert life.live(again, 3, until=phase_is("idle"))
    assert again.status().head == 0
    assert again.status().counters.rollbacks == 1


def test_a_restart_while_a_child_learns_starts_over(make_device, world, config):
    class Stuck(InlineExecutor):
        def poll(self):
            return None

    device, life = make_device(executor=Stuck()), world()
    assert life.live(device, 20, until=phase_is("training"))
    fresh = device.status().fresh_rows
    kill(device)
    again = make_device()
    assert again.status().phase == "idle"
    assert again.status().fresh_rows == fresh
    life.live(again, 1)
    assert events(again).count("learn_started") == 2


def test_alarms_survive_a_restart_and_damaged_evidence_does_not_hinder_one(make_device, world, clock, caplog):
    device, life = make_device(mode="monitor"), world()
    life.live(device, 10)
    alarms, evidence = device.status().alarms, device._monitoring.states()
    assert alarms
    stop(device)
    again = make_device(mode="monitor")
    assert again.status().alarms == alarms
    assert again._monitoring.states() == evidence
    assert events(again).count("drift_alarm") == len(alarms)
    life.live(again, 1)
    assert events(again).count("drift_alarm") == len(again.status().alarms)
    stop(again)

    third = make_device(mode="monitor")
    with third._store.transaction():
        third._store.put("monitors", b"damaged")
    kill(third)
    last = make_device(mode="monitor")
    assert last.status().alarms == []
    assert "evidence of the run before is lost" in caplog.text
    assert life.live(last, 10, until=lambda device: bool(device.status().alarms))


def test_the_replay_buffer_survives_a_restart(make_device, world, clock, hard_to_convince):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 20, until=phase_is("judging"))
    clock.advance(3_600)
    device.step()
    kept, seen = buffered(device), dict(device._adaptation.experience.buffer.seen)
    assert kept == stored_replay(device)
    stop(device)
    again = make_device(config=hard_to_convince)
    assert buffered(again) == kept
    assert sorted(again._adaptation.experience.buffer.seen.values()) == sorted(seen.values())


def test_a_smaller_replay_budget_keeps_what_fits(make_device, world, clock, hard_to_convince):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 20, until=phase_is("judging"))
    clock.advance(3_600)
    device.step()
    kept = buffered(device)
    assert len(kept) > 20
    stop(device)
    smaller = msgspec.structs.replace(hard_to_convince.replay, max_bytes=20 * (32 + 96))
    again = make_device(config=msgspec.structs.replace(hard_to_convince, replay=smaller))
    assert buffered(again) == kept[:20] == stored_replay(again)
    life.live(again, 2)


# ---- a disk that is full at the worst moment


def fail_once(device, name):
    """The record of one kind of event finds no room, once."""
    adaptation, emit = device._adaptation, device._adaptation._emit
    failed = []

    def emit_or_fail(event, detail):
        if event == name and not failed:
            failed.append(event)
            raise DiskFullError("no room")
        emit(event, detail)

    adaptation._emit = emit_or_fail
    return failed


def advance(life, device, ticks, until):
    """As `live`, when a step may report a problem."""
    for _ in range(ticks):
        try:
            life.live(device, 1)
        except AssertionError:
            assert "no room" in device.status().problem
        if until(device):
            return
    raise AssertionError("it did not come to that")


def test_a_promotion_that_could_not_be_recorded_is_recorded_at_the_next_turn(make_device, world):
    device, life = make_device(), world()
    failed = fail_once(device, "promoted")
    advance(life, device, 40, until=has("promoted"))
    assert failed
    assert events(device).count("promoted") == 1
    assert device.status().counters.promotions == 1
    assert device.status().phase == "probation"
    assert device.status().head == 1
    assert buffered(device) == stored_replay(device) != []
    assert life.live(device, 10, until=has("confirmed"))


def test_a_rejection_that_could_not_be_recorded_changes_nothing_and_is_made_again(
    make_device, world, clock, hard_to_convince
):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 20, until=phase_is("judging"))
    failed = fail_once(device, "rejected")
    clock.advance(3_600)
    assert "no room" in device.step().problem
    assert failed
    assert device.status().phase == "judging"
    assert buffered(device) == stored_replay(device) == []
    assert device.step().problem == ""
    assert events(device).count("rejected") == 1
    assert buffered(device) == stored_replay(device) != []


@pytest.mark.parametrize("restart", [False, True])
def test_a_rollback_that_could_not_be_recorded_is_recorded_later(make_device, world, careless, restart):
    device, life = make_device(config=careless), world(darkening(1.0))
    device.learn_now()
    assert life.live(device, 20, label=turned, until=phase_is("probation"))
    fail_once(device, "head_rolled_back")
    advance(life, device, 4, until=lambda device: device._slots.pointer.current.head == 0)
    if restart:
        kill(device)
        device = make_device(config=careless)
    life.live(device, 1)
    assert device.status().phase == "idle"
    assert events(device).count("head_rolled_back") == 1
    assert device.status().counters.rollbacks == 1


def test_a_rollback_asked_for_in_probation_is_recorded_once_even_if_killed_after_it(make_device, world):
    device, life = make_device(), world()
    assert life.live(device, 40, until=phase_is("probation"))
    device.rollback()
    kill(device)
    again = make_device()
    assert again.status().phase == "idle"
    assert events(again).count("head_rolled_back") == 1


# ---- new labels


def fresh_labels(device):
    return [sample.label for sample in device._store.samples("fresh", device._adaptation.experience.trunk)]


def teach(device, pool, label, until):
    """Labelled samples one by one, until there are enough to learn from."""
    for x in pool.only({label}).x:
        if until(device):
            return
        device.learn(x[None], [NAMES[label]])
        device.step()
    raise AssertionError("not enough samples")


def test_a_new_class_grows_the_head_only_after_ten_rows(make_device, world, clock, digits, hard_to_convince):
    device, life = make_device(config=hard_to_convince), world(darkening(1.0))
    life.live(device, 3)
    teach(device, digits.life, 8, until=lambda device: fresh_labels(device).count("8") == 9)
    device.learn_now()
    device.step()
    assert challenger_of(device).labels == tuple(NAMES[:8])
    clock.advance(3_600)
    device.step()
    assert device.status().phase == "idle"
    assert fresh_labels(device) == ["8"] * 9

    life.live(device, 3)
    teach(device, digits.factory, 8, until=lambda device: fresh_labels(device).count("8") == 10)
    device.learn_now()
    device.step()
    assert challenger_of(device).labels == (*NAMES[:8], "8")


def test_a_new_class_is_learned_and_served(make_device, world, digits):
    device, life = make_device(), world(darkening(1.0), new_labels=frozenset({8}))
    assert life.live(device, 60, until=has("confirmed"))
    assert device.labels == (*NAMES[:8], "8")
    eights = digits.score.only({8})
    assert device.evaluate(eights.x, ["8"] * len(eights.y)) >= 0.5
    old = digits.score.only(BASE)
    assert device.evaluate(old.x, [NAMES[i] for i in old.y]) >= 0.85


def test_the_head_never_grows_beyond_its_limit(make_device, clock, digits, config):
    config = msgspec.structs.replace(
        config,
        learn=msgspec.structs.replace(config.learn, max_labels=9),
        policy=msgspec.structs.replace(config.policy, min_fresh_rows=20),
    )
    device = make_device(config=config)
    for label in (8, 9):
        pool = digits.life.only({label})
        device.learn(pool.x[:40], [NAMES[label]] * 40)
    device.learn_now()
    device.step()
    assert len(device.labels) <= 9
    started = details(device, "learn_started")
    assert started
    assert set(fresh_labels(device)) <= {"8", "9"}
    assert "9" in fresh_labels(device)


def samples_of(device, label):
    return [sample for sample, _ in device._store.samples_labelled(label)]


def test_a_refused_label_is_erased_and_refused_also_what_waits_in_memory(make_device, digits, monkeypatch):
    device, eights = make_device(), digits.life.only({8})
    early, late = (device.predict_batch(eights.x[part]) for part in (slice(10), slice(10, 20)))
    device.learn(eights.x[20:40], ["8"] * 20)
    device.step()
    assert len(samples_of(device, "8")) == 20
    for prediction in early:
        device.observe(prediction.id, "8")
    with monkeypatch.context() as patch:
        patch.setattr(device._store, "add_samples", lambda samples: (_ for _ in ()).throw(DiskFullError("no room")))
        device.refuse_label("8")  # what waits cannot be written now
    assert samples_of(device, "8") == []
    device.step()
    assert samples_of(device, "8") == []
    assert device.status().accuracy is None
    for again in (False, True):
        if again:
            stop(device)
            device = make_device()
        with pytest.raises(UnknownLabelError, match="refuse_label"):
            device.observe(late[0].id, "8")
    device.accept_label("8")
    device.observe(late[0].id, "8")
    device.step()
    assert len(samples_of(device, "8")) == 1


def test_what_is_asked_about_a_label_is_answered_by_name(make_device, digits, config):
    config = msgspec.structs.replace(config, learn=msgspec.structs.replace(config.learn, new_labels="ask"))
    device, eights = make_device(config=config), digits.life.only({8})
    device.learn(eights.x[:40], ["8"] * 40)
    device.learn_now()
    device.step()
    assert events(device)[-1] == "label_asked"
    assert device.status().new_labels["8"] >= 20
    for known in (device.accept_label, device.refuse_label):
        with pytest.raises(LabelError, match="one of the model's labels already"):
            known("7")
    stop(device)
    device = make_device(config=config)
    device.accept_label("8")
    assert device.status().new_labels == {}
    device.learn(digits.factory.only({8}).x[:40], ["8"] * 40)
    device.learn_now()
    device.step()
    assert "learn_started" in events(device)
    assert events(device).count("label_asked") == 1


# ---- processes that die


def test_a_head_whose_app_dies_at_every_start_is_left_before_it_is_loaded(make_device, world, config, monkeypatch):
    loaded = []
    load = edge_sdk.device.load_served
    monkeypatch.setattr(
        edge_sdk.device,
        "load_served",
        lambda slots, version, *rest: (loaded.append(version.head), load(slots, version, *rest))[1],
    )
    device, life = make_device(), world()
    assert life.live(device, 40, until=phase_is("probation"))
    for _ in range(config.gate.max_boots):
        kill(device)
        device = make_device()
        assert device.status().head == 1
    kill(device)
    loaded.clear()
    device = make_device()
    assert loaded == [0]
    assert (device.status().head, device.status().phase) == (0, "idle")
    assert events(device).count("head_rolled_back") == 1
    assert device.status().counters.rollbacks == 1
    for _ in range(config.gate.max_boots + 1):  # a head that is not on probation is never left
        kill(device)
        device = make_device()
        assert device._slots.pointer.boots == 0
    life.live(device, 1)


def test_a_healthy_step_forgets_the_deaths_before_it(make_device, world, config):
    device, life = make_device(), world()
    assert life.live(device, 40, until=phase_is("probation"))
    for healthy in (False, False, True, False, False, False):
        kill(device)
        device = make_device()
        if healthy:
            device.step()
    assert (device.status().head, device.status().phase) == (1, "probation")


def test_a_killed_learner_leaves_the_champion_untouched(make_device, world, config, digits):
    learn = msgspec.structs.replace(config.learn, executor="process", passes=1_000_000)
    device, life = make_device(config=msgspec.structs.replace(config, learn=learn)), world()
    x = digits.score.x[:20]
    before = [prediction.probabilities for prediction in device.predict_batch(x)]
    assert life.live(device, 20, until=phase_is("training"))
    fresh, executor = device.status().fresh_rows, device._executor
    os.kill(executor.pid, signal.SIGKILL)
    executor._child.wait(30)
    device.step()
    (failed,) = details(device, "learn_failed")
    assert failed["reason"] == "LearnError: the learner ended with code -9 and left no result"
    status = device.status()
    assert (status.phase, status.head, status.problem, status.fresh_rows) == ("idle", 0, "", fresh)
    after = [prediction.probabilities for prediction in device.predict_batch(x)]
    np.testing.assert_array_equal(before, after)
    assert not (device._home / "learn" / "job").exists()


# ---- what is learned from never judges


class Recording(InlineExecutor):
    def __init__(self):
        super().__init__()
        self.jobs = []

    def start(self, folder):
        self.jobs.append(LearnJob.load(folder))
        super().start(folder)


def test_learning_rows_and_judge_rows_never_swap(make_device, world, clock, digits, config):
    executor = Recording()
    policy = msgspec.structs.replace(config.policy, volume_rows=60, cooldown_s=0)
    config = msgspec.structs.replace(config, policy=policy)
    device = make_device(executor=executor, config=config)
    base = digits.life.only(BASE)
    turn = rotation(35)
    judge_keys, learn_keys = set(), set()
    trunk = device._adaptation.experience.trunk

    def look(device):
        judging = {s.key for s in device._store.samples("judge", trunk)}
        learning = {s.key for role in ("fresh", "replay") for s in device._store.samples(role, trunk)}
        judge_keys.update(judging)
        learn_keys.update(learning)

    for start in range(0, len(base.y), 40):  # every image once
        clock.advance(TICK_S)
        x = turn(base.x[start : start + 40], np.random.default_rng(0))
        for prediction, truth in zip(device.predict_batch(x), base.y[start:], strict=False):
            device.observe(prediction.id, NAMES[truth])
        device.step()
        look(device)
        if start == 200:
            kill(device)
            device = make_device(executor=executor, config=config)
            look(device)

    assert len(executor.jobs) >= 2
    assert not judge_keys & learn_keys
    assert len(judge_keys) + len(learn_keys) == len(base.y)
    assert len(judge_keys) / len(base.y) == pytest.approx(0.3, abs=0.08)
    judged = {s.latent for s in device._store.samples("judge", trunk)}
    factory = device._adaptation.experience.factory
    judged |= {row.tobytes() for row in factory.latents[factory.judging]}
    for job in executor.jobs:
        learned = {row.tobytes() for row in np.concatenate([job.fresh.latents, job.replay.latents])}
        assert not learned & judged


def test_the_factory_memory_is_split_once_by_label(checkpoint):
    manifest = parse_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    memory, again = FactoryMemory(checkpoint, manifest), FactoryMemory(checkpoint, manifest)
    labels = load_npz(checkpoint / MEMORY_NPZ)["labels"]
    np.testing.assert_array_equal(memory.judging, again.judging)
    replayed = memory.replayed(len(labels))
    assert len(replayed) + int(memory.judging.sum()) == len(labels)
    for label in range(len(manifest.labels)):
        assert int((memory.truths[memory.judging] == label).sum()) == int((labels == label).sum()) // 3


def test_the_same_seed_gives_the_same_head(make_device, world):
    heads = []
    for home in ("one", "two"):
        device = make_device(home, device="dev-1")
        life = world()
        life.clock = type(life.clock)()
        device._clock = device._reporter._clock = life.clock
        assert life.live(device, 40, until=phase_is("probation"))
        heads.append(device._slots.head(device._slots.pointer.current).to_bytes())
    assert heads[0] == heads[1]


# ---- the transaction by itself: no trunk, no device, things that move (see `Rig`)


def change(rig, **sections):
    """Other settings from now on, after a restart."""
    parts = {key: msgspec.structs.replace(getattr(rig.config, key), **values) for key, values in sections.items()}
    rig.open(**parts)


def learn(rig, *, turns=1, **rows):
    """Rows that the release gets wrong, to learn from and to judge by, and the turns that take them."""
    rig.add(40, **rows)
    rig.add(30, "judge")
    for _ in range(turns):
        rig.turn()


def promote(rig, **rows):
    learn(rig, **rows)
    assert rig.state.phase == "probation"


def confirm(rig):
    """End a probation well, and the cool-down after it."""
    rig.live(20)
    rig.turn()
    assert rig.state.phase == "idle"
    assert rig.events()[-1] == "confirmed"
    rig.now += 60


NEVER_SURE = {"gate": {"alpha": 1e-300, "class_margin": 1.0, "factory_margin": 1.0}}


def tries(rig, turns):
    """Turns of which some find no room on the disk; returns how many."""
    failed = 0
    for _ in range(turns):
        try:
            rig.turn()
        except DiskFullError:
            failed += 1
    return failed


# -- deciding


def test_a_decision_is_noted_once_when_it_changes_and_is_not_told(rig):
    made = rig(policy={"cooldown_s": 60.0})
    told = []
    emit = made.adaptation._emit
    made.adaptation._emit = lambda name, detail: (told.append(name), emit(name, detail))
    for count in (10, 5):
        made.add(count)
        for _ in range(3):
            made.turn(alarms=("input",))
    made.turn()
    learn(made)
    said = [(detail["learn"], detail["reason"]) for detail in made.events("learn_decided")]
    assert said == [
        (False, "input drift: waits for 10 of 20 new labelled rows"),
        (False, "nothing calls for it"),
        (True, "55 new labelled rows"),
    ]
    assert "learn_decided" not in told
    assert "promoted" in told


def test_triggers_that_stand_together_must_all_call(rig):
    made = rig(policy={"triggers": (("drift", "volume"),)})
    made.add(30)
    made.add(30, "judge")
    made.turn(alarms=("input",))
    made.add(20)
    made.turn()
    assert "learn_started" not in made.events()
    made.turn(alarms=("input",))
    (started,) = made.events("learn_started")
    assert started["reason"] == "input drift; 50 new labelled rows"


def test_a_model_that_is_too_sure_of_itself_learns_once_enough_labels_tell(rig):
    made = rig(policy={"volume_rows": 1_000, "calibration_target": 0.3})
    made.add(30)
    made.live(29, moved=False, label="b")
    made.turn()
    assert (made.adaptation.calibration, made.events()) == (None, [])
    made.live(1, moved=False, label="b")
    made.turn()
    assert made.adaptation.calibration > 0.5
    assert made.events("learn_started")[0]["reason"].startswith("calibration error 0.")


def test_a_model_that_is_right_as_often_as_it_is_sure_does_not(rig):
    made = rig(policy={"volume_rows": 1_000, "calibration_target": 0.3})
    made.add(30)
    made.live(200, moved=False)
    made.turn()
    assert made.adaptation.calibration < 0.1
    assert made.events() == []


def test_of_a_multi_label_model_the_share_of_right_labels_is_what_it_is_sure_of(rig):
    """Each label right 95 times of 100, and all of them together only every other time."""
    made = rig(task="multilabel")
    made.live(1, moved=False, label='["b", "c"]')  # it says "a": no label is right
    made.live(1, moved=False, label='["a", "c"]')
    assert [(row.right, row.success) for row in made.state.recent] == [(False, 0.0), (False, 0.667)]
    made.state.recent = [Recent(False, 0.95, 0.95), Recent(True, 0.95, 0.95)] * 20
    assert made.adaptation.calibration == pytest.approx(0.0)
    assert made.adaptation.accuracy == 0.5


def test_rows_that_may_not_be_learned_start_nothing(rig):
    """60 rows of a label that nobody has accepted, 9 of one that may be a typing error."""
    made = rig(learn={"new_labels": "ask"})
    made.add(60, label="new", things=[3])
    made.add(9, label="typo", things=[0])
    for _ in range(3):
        made.turn()
    assert made.events() == ["label_asked"]


# -- what the machine can spare


def test_an_obstacle_pauses_the_job_and_learning_goes_on_once_there_is_a_margin(rig):
    made = rig(executor=Working())
    learn(made)
    assert (made.state.phase, made.executor.paused) == ("training", False)
    made.resources = ResourceState(battery=0.29, on_mains=False)
    made.turn()
    assert made.executor.paused
    assert made.state.waits == "paused: battery at 29%, learning needs 30%"
    made.resources = ResourceState(battery=0.32, on_mains=False)
    made.turn()
    assert made.executor.paused
    made.resources = ResourceState(battery=0.36, on_mains=False)
    made.turn()
    assert (made.executor.paused, made.state.waits, made.state.phase) == (False, "", "training")


def test_an_obstacle_keeps_a_job_from_beginning(rig):
    made = rig()
    made.resources = ResourceState(temperature_c=90.0)
    learn(made)
    assert made.state.waits == "40 new labelled rows: waits for 90 °C, learning stops at 85"
    made.resources = ResourceState(temperature_c=50.0)
    made.turn()
    assert made.state.phase == "probation"


def test_the_days_cpu_time_is_charged_with_the_learners_and_learning_waits_for_the_next_day(rig):
    made = rig(executor=Working(), resources={"seconds_per_day": 5.0, "watts": 2.0})
    learn(made)
    made.executor.result = LearnResult(error="LearnError: no luck", seconds=6.0)
    made.turn()
    assert (made.state.spent.seconds, made.state.spent.joules) == (6.0, 12.0)
    made.now += 60
    made.open()
    made.turn()
    assert made.state.waits == "40 new labelled rows: waits for 6 of 5 s of learning today"
    made.now += 86_400
    made.turn()
    assert made.state.phase == "training"


def test_a_job_that_was_stopped_is_charged_once(rig):
    made = rig(executor=Working(), learn={"max_seconds": 10.0})
    learn(made)
    made.executor.worked_s, made.full = 11.0, 0
    made.fails_on = "learn_failed"
    assert tries(made, 3) == 3
    made.fails_on = ""
    made.turn()
    assert made.events("learn_failed")[0]["reason"] == "stopped after 10 s"
    assert made.state.spent.seconds == 11.0
    assert made.executor.calls.count("cancel") == 1


def test_what_learning_writes_is_charged(rig):
    made = rig(resources={"flash_bytes_per_day": 20_000})
    made.adaptation.charge(made.now, flash_bytes=500)
    assert made.state.spent.flash_bytes == 500
    promote(made)
    assert made.state.spent.flash_bytes > 10_000  # the job, and what was summed up
    made.adaptation.charge(made.now, flash_bytes=20_000)
    confirm(made)
    learn(made)
    assert "of 20000 bytes written today" in made.state.waits


# -- challengers that follow each other


def test_challengers_that_follow_each_other_share_the_level(rig):
    made = rig(gate={"alpha": 1e-4, "class_margin": 1.0, "factory_margin": 1.0})
    made.add(40)
    made.add(12, "judge")
    levels = []
    for _ in range(3):
        made.turn()
        levels.append(float(made.state.waits.rpartition(" ")[2]))
        made.add(len(made.samples("fresh")))
        made.turn()
    assert levels == pytest.approx([np.pi**2 / 6e-4 * k**2 for k in (1, 2, 3)], rel=1e-3)
    assert [entry.outcome for entry in made.store.lineage()] == ["superseded"] * 3
    made.open()  # the count outlives a restart
    made.turn()
    assert made.state.superseded == 3
    assert float(made.state.waits.rpartition(" ")[2]) == pytest.approx(np.pi**2 / 6e-4 * 16, rel=1e-3)
    made.add(60, "judge")
    made.turn()
    (promoted,) = made.events("promoted")
    assert promoted["alpha"] == pytest.approx(6e-4 / np.pi**2 / 16)
    assert made.state.superseded == 0


def test_a_verdict_and_a_failure_begin_the_count_anew(rig):
    made = rig(**NEVER_SURE)
    for end in ("rejected", "learn_failed"):
        learn(made)
        made.add(len(made.samples("fresh")))
        made.turn()
        assert made.state.superseded == 1
        made.turn()
        assert made.state.phase == "judging"
        if end == "rejected":
            made.turn(seconds=3_600)
        else:
            shutil.rmtree(made.folder / "learn" / "job")
            made.add(1, "judge")
            made.turn()
        assert made.events()[-1] == end
        assert (made.state.phase, made.state.superseded) == ("idle", 0)
        made.now += 60


def test_rows_that_may_not_be_learned_supersede_nothing(rig):
    made = rig(learn={"new_labels": "ask"}, **NEVER_SURE)
    made.add(60, label="new", things=[3])
    learn(made, turns=5)
    assert made.events() == ["label_asked", "learn_decided", "learn_started"]
    made.adaptation.decide_label("new", made.now, accept=True)
    made.turn()
    assert made.events()[-1] == "superseded"
    made.turn()
    assert challenger(made).labels == ("a", "b", "c", "new")


def challenger(rig):
    return Head.load(rig.folder / "learn" / "job" / CHALLENGER)


def test_judge_rows_stay_while_a_challenger_is_on_trial_and_no_more_come_beyond_twice_the_room(rig):
    made = rig(**NEVER_SURE)
    learn(made)  # 30 rows judge
    made.experience.judge_capacity = 20
    made.turn()
    assert (made.state.phase, len(made.samples("judge"))) == ("judging", 30)
    assert not made.adaptation.judges_full
    made.add(10, "judge")
    assert made.adaptation.judges_full
    newest = [sample.key for sample in made.samples("judge")][-20:]
    made.turn(seconds=3_600)
    assert made.state.phase == "idle"
    assert not made.adaptation.judges_full
    made.turn()
    assert [sample.key for sample in made.samples("judge")] == newest


# -- consolidation


@pytest.mark.parametrize("hidden", [(), (8,)], ids=["linear", "hidden"])
def test_what_a_promoted_head_learned_is_summed_up(rig, hidden):
    made = rig(hidden=hidden, gate={"factory_margin": 1.0})
    promote(made)
    assert made.moments.rows == 40
    assert made.moments.mass == pytest.approx(sum(sample.mass for sample in made.samples("replay")), rel=1e-5)
    assert made.samples("fresh") == []


def test_what_a_harmful_challenger_learned_is_replayed_and_not_summed_up(rig):
    made = rig(learn={"learner": "sgd", "ewc_lambda": 0.0, "replayed_per_batch": 0})
    made.add(40, label="a", moved=False)
    made.add(60, "judge", moved=False)
    made.turn()
    assert made.events()[-1] == "rejected"
    assert made.moments is None
    assert len(made.samples("replay")) == 40


def test_what_was_not_proven_is_summed_up_all_the_same(rig):
    made = rig(**NEVER_SURE)
    learn(made)
    made.turn(seconds=3_600)
    assert made.events("rejected")[0]["reason"].startswith("not proven")
    assert made.moments.rows == 40


def test_rows_whose_label_contradicts_the_others_are_forgotten(rig):
    made = rig(learn={"filter_share": 0.2})
    made.add(60)
    wrong = made.add(4, things=[0], label="c")
    made.add(30, "judge")
    made.turn()
    assert made.state.phase == "probation"
    kept = {sample.key for sample in made.samples("replay")}
    assert not kept & set(wrong)
    assert len(kept) == 60
    assert made.store.lineage()[-1].detail["wrong"] == 4
    assert made.store.lineage()[-1].detail["used"] == 60


def test_a_rollback_takes_the_last_consolidation_out_of_what_is_summed_up(rig):
    made = rig(gate={"class_margin": 1.0, "factory_margin": 1.0})
    promote(made)
    confirm(made)
    change(made, learn={"learner": "sgd", "ewc_lambda": 0.0, "replayed_per_batch": 0})
    before = made.moments
    made.add(60, things=[0, 1], label="c", moved=False)
    made.add(40, "judge", things=[0, 1], label="c", moved=False)
    made.turn()
    assert (made.state.phase, made.slots.pointer.current.head) == ("probation", 2)
    assert made.moments.mass > before.mass
    made.live(30, moved=False)
    made.turn()
    assert made.events("head_rolled_back")[0]["to"] == 1
    np.testing.assert_array_equal(made.moments.xx, before.xx)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_importance_of_a_promoted_head_is_kept_beside_it_and_held_on_to(rig, mode):
    made = rig(learn={"learner": "sgd", "consolidation": mode, "ewc_lambda": 1e-3})
    heads = made.slots.root / "a" / "heads"
    shipped = made.experience.importance
    promote(made)
    assert sorted(file.name for file in heads.iterdir()) == ["0001.ewc.npz", "0001.npz"]
    first = made.slots.importance(made.slots.pointer.current)
    if mode == "online":
        np.testing.assert_array_equal(first.anchor["W0"], made.head.weights["W0"])
    else:
        assert (first.fisher["W0"] >= shipped.fisher["W0"]).all()
    confirm(made)
    made.executor = made.adaptation._executor = Recording()
    made.add(12, label="new", things=[3])
    learn(made, moved=False)
    (job,) = made.executor.jobs
    np.testing.assert_array_equal(job.anchor["W0"][:, :3], first.anchor["W0"])
    np.testing.assert_array_equal(job.fisher["W0"][:, :3], first.fisher["W0"])
    assert (job.fisher["W0"][:, 3] == 0).all()


def test_the_importance_goes_with_its_head_and_a_rollback_finds_the_one_before(rig):
    made = rig(learn={"learner": "sgd", "consolidation": "online", "ewc_lambda": 1e-3})
    for _ in range(3):
        promote(made)
        confirm(made)
        made.now += 3_600
        change(made, gate={"alpha": 0.9, "factory_margin": 1.0})
    names = sorted(file.name for file in (made.slots.root / "a" / "heads").iterdir())
    assert names == ["0002.ewc.npz", "0002.npz", "0003.ewc.npz", "0003.npz"]
    second = made.slots.head(made.slots.pointer.previous)
    made.slots.rollback()
    made.attach()
    np.testing.assert_array_equal(made.adaptation._importance().anchor["W0"], second.weights["W0"])
    made.slots.promote(0)
    made.attach()
    assert made.adaptation._importance() is made.experience.importance


def test_damaged_importance_is_that_of_the_release(rig, caplog):
    made = rig(learn={"learner": "sgd", "consolidation": "online", "ewc_lambda": 1e-3})
    promote(made)
    (made.slots.root / "a" / "heads" / "0001.ewc.npz").write_bytes(b"damaged")
    confirm(made)
    learn(made)
    assert made.events().count("learn_started") == 2
    assert "EWC holds on to what the release came with" in caplog.text


# -- a full disk


@pytest.mark.parametrize("at", range(8))
def test_wherever_the_disk_is_full_the_transaction_goes_on_once_there_is_room(rig, at):
    made = rig()
    made.add(40)
    made.add(30, "judge")
    commit, count = made.store.transaction, [0]

    @contextmanager
    def transaction():
        with commit():
            yield
            count[0] += 1
            if count[0] - 1 == at:
                raise DiskFullError("no room")

    made.store.transaction = transaction
    assert tries(made, 8) == 1
    assert made.state.phase == "probation"
    assert made.events().count("promoted") == made.events().count("learn_started") == 1
    assert made.moments.rows == 40
    assert [sample.slot for sample in made.samples("replay")] == list(range(40))
    assert [entry.outcome for entry in made.store.lineage()] == ["promoted"]


def test_a_job_that_finds_no_room_fails_once_that_can_be_recorded(rig, monkeypatch):
    def no_room(self, folder):
        raise DiskFullError("no room")

    made = rig()
    with monkeypatch.context() as patch:
        patch.setattr(LearnJob, "save", no_room)
        made.fails_on = "learn_failed"
        made.add(40)
        assert tries(made, 3) == 3
    assert made.state.phase == "training"
    made.fails_on = ""
    made.turn()
    assert made.events("learn_failed")[0]["reason"] == "DiskFullError: no room"
    made.add(30, "judge")
    made.turn(seconds=60)
    assert made.state.phase == "probation"


def test_a_promotion_waits_for_room_and_not_for_another_judge_row(rig, monkeypatch):
    def no_room(*args):
        raise DiskFullError("no room")

    made = rig()
    made.add(40)
    made.add(30, "judge")
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "write_head", no_room)
        assert tries(made, 2) == 2
    made.turn()
    assert made.state.phase == "probation"


# -- killed between a change of the pointer and its record


def test_a_promotion_that_was_not_recorded_is_one_after_the_restart(rig):
    made = rig()
    made.fails_on = "promoted"
    made.add(40)
    made.add(30, "judge")
    assert tries(made, 1) == 1
    assert made.slots.pointer.current.head == 1
    made.state.superseded = 2
    with made.store.transaction():
        made.adaptation.save()
    made.fails_on = ""
    made.open()
    assert made.events("promoted") == [{"to": 1, "trigger": "40 new labelled rows", "recovered": True}]
    assert (made.state.phase, made.state.superseded) == ("probation", 0)
    assert (made.state.skew.training.rows, made.state.skew.judge.rows) == (40, 30)
    assert made.moments.rows == 40
    assert [(entry.outcome, entry.head) for entry in made.store.lineage()] == [("promoted", 1)]
    confirm(made)


def test_a_promotion_that_cannot_be_recorded_yet_is_neither_judged_nor_watched(rig):
    made = rig()
    made.add(40)
    made.add(30, "judge")
    made.fails_on = "promoted"
    assert tries(made, 4) == 4
    assert made.experience is None
    made.fails_on = ""
    made.turn()
    assert (made.state.phase, made.events().count("promoted")) == ("probation", 1)


@pytest.mark.parametrize("way", ["rollback", "reset"])
def test_going_back_while_a_challenger_is_judged_is_no_promotion_after_a_restart(rig, way):
    made = rig()
    promote(made)
    confirm(made)
    change(made, **NEVER_SURE)
    learn(made)
    assert made.state.phase == "judging"
    made.slots.rollback() if way == "rollback" else made.slots.promote(0)
    made.open()
    assert (made.state.phase, made.slots.pointer.current.head) == ("idle", 0)
    assert made.events().count("promoted") == 1
    assert len(made.samples("fresh")) == 40
    assert made.moments.rows == 40


def test_going_back_to_the_releases_head_ends_a_probation_also_after_a_restart(rig):
    made = rig()
    promote(made)
    made.slots.promote(0)
    made.open()
    assert made.state.phase == "idle"
    made.turn()
    assert made.slots.pointer.current.head == 0


def test_a_rollback_that_was_not_recorded_also_takes_back_what_was_summed_up(rig):
    made = rig()
    promote(made)
    made.slots.rollback()
    made.open()
    assert made.state.phase == "idle"
    assert made.events("head_rolled_back") == [{"reason": "on probation", "to": 0, "recovered": True}]
    assert made.moments is None


def test_a_state_of_an_earlier_version_is_begun_anew(rig, caplog):
    made = rig()
    with made.store.transaction():
        made.store.put("adaptation", b'{"phase": "probation", "recent": [true, false], "fresh_keys": [1]}')
    made.open()
    assert made.state.phase == "idle"
    assert "how far learning had come is lost" in caplog.text
    promote(made)


# -- labels


def test_with_ask_a_label_is_asked_about_once_and_learned_when_it_is_accepted(rig):
    made = rig(learn={"new_labels": "ask"})
    made.add(9, label="new", things=[3])
    made.turn()
    assert made.events() == []
    made.add(3, label="new", things=[3])
    made.turn()
    made.open()
    made.turn()
    assert made.events() == ["label_asked"]
    assert made.events("label_asked") == [{"label": "new", "rows": 12}]
    assert made.adaptation.new_labels == {"new": 12}
    promote(made)
    assert made.head.labels == ("a", "b", "c")
    confirm(made)

    made.adaptation.decide_label("new", made.now, accept=True)
    made.open()
    assert made.adaptation.new_labels == {}
    made.add(20, "judge", label="new", things=[3])
    made.add(30, label="new", things=[3])
    made.turn()
    assert made.head.labels == ("a", "b", "c", "new")


def test_a_refused_label_is_erased_and_what_was_summed_up_of_others_stays(rig):
    made = rig()
    promote(made)
    confirm(made)
    summed_up = made.moments
    made.add(12, label="new", things=[3])
    made.add(4, "judge", label="new", things=[3])
    made.adaptation.decide_label("new", made.now, accept=False)
    made.open()
    assert made.state.refused == ["new"]
    assert made.store.samples_labelled("new") == []
    np.testing.assert_array_equal(made.moments.xx, summed_up.xx)
    made.add(12, label="new", things=[3])  # written all the same, as by a flush under way
    assert made.adaptation.new_labels == {}
    learn(made)
    assert "new" not in challenger_labels(made)
    made.adaptation.decide_label("new", made.now, accept=True)
    assert (made.state.refused, made.state.accepted) == ([], ["new"])


def challenger_labels(rig):
    job = rig.folder / "learn" / "job" / CHALLENGER
    return Head.load(job).labels if job.exists() else rig.head.labels


def test_refusing_a_label_that_was_learned_gives_up_what_was_summed_up_with_it(rig):
    made = rig(gate={"factory_margin": 1.0, "class_margin": 1.0})
    made.add(20, label="new", things=[3])
    promote(made)
    assert "new" in made.moments.labels
    made.live(30, moved=False, label="b")
    made.turn()
    made.slots.promote(0)
    made.attach()
    made.adaptation.decide_label("new", made.now, accept=False)
    assert made.moments is None or not made.moments.known[list(made.moments.labels).index("new")]
    assert [sample.slot for sample in made.samples("replay")] == list(range(len(made.samples("replay"))))
    job, _ = made.experience.job(
        made.head, made.experience.importance, may_grow=lambda _: True, since=0.0, attempt=1
    )  # fmt: skip
    assert job.champion.labels == ("a", "b", "c")


@pytest.mark.parametrize("role", ["fresh", "replay"])
def test_a_challenger_that_knows_a_row_to_be_forgotten_is_given_up(rig, role):
    made = rig()
    promote(made)
    confirm(made)
    change(made, **NEVER_SURE)
    learn(made)
    assert made.state.phase == "judging"
    found = [(made.samples(role)[0], made.manifest.trunk_id)]
    made.adaptation.erase(found, made.now, unlearn=True)
    assert made.state.phase == "idle"
    assert made.events("learn_failed") == [{"reason": "samples that it knows were to be forgotten"}]
    assert found[0][0].key not in {sample.key for sample in made.samples(role)}


def test_a_challenger_outlives_what_does_not_concern_it(rig):
    made = rig(**NEVER_SURE)
    learn(made)
    made.add(12, label="new", things=[3])
    made.adaptation.decide_label("new", made.now, accept=False)
    made.adaptation.erase([(made.samples("judge")[0], made.manifest.trunk_id)], made.now, unlearn=True)
    assert made.state.phase == "judging"


# -- how heads came to be, and how they do


def test_every_challenger_leaves_a_line(rig):
    made = rig(seed=3)
    promote(made)
    confirm(made)
    change(made, **NEVER_SURE)
    learn(made)
    made.add(80)
    made.turn()
    made.turn()
    assert made.state.phase == "judging"
    made.turn(seconds=3_600)
    made.executor = made.adaptation._executor = Working()
    made.now += 60
    learn(made)
    made.executor.result = LearnResult(error="LearnError: no luck", seconds=2.0)
    made.turn()
    lines = made.store.lineage()
    assert [(line.outcome, line.parent, line.head) for line in lines] == [
        ("promoted", 0, 1), ("superseded", 1, None), ("rejected", 1, None), ("learn_failed", 1, None)
    ]  # fmt: skip
    assert [line.time for line in lines] == sorted(line.time for line in lines)
    assert [line.detail["fresh"] for line in lines] == [40, 40, 120, 40]
    assert [line.detail["seed"] for line in lines] == [3_000_009 + attempt for attempt in range(4)]
    first, *_, failed = (line.detail for line in lines)
    assert first["trigger"] == "40 new labelled rows"
    assert first["config"]["learner"] == "hybrid"
    assert first["challenger"] > first["champion"]
    assert (first["used"], first["replayed"]) == (40, 60)
    assert 0 < first["cpu_s"] < 5
    assert (failed["reason"], failed["cpu_s"]) == ("LearnError: no luck", 2.0)


def test_shadow_mode_leaves_a_line_too(rig):
    made = rig()
    made.add(40)
    made.add(30, "judge")
    made.turn(mode="shadow")
    (line,) = made.store.lineage()
    assert (line.outcome, line.head) == ("would_promote", None)
    assert made.moments.rows == 40


def test_a_head_is_scored_where_it_was_trained_judged_and_used_within_a_day(rig):
    made = rig()
    promote(made)
    skew = made.state.skew
    assert (skew.training.rows, skew.judge.rows, skew.live.rows) == (40, 30, 0)
    assert min(skew.training.share, skew.judge.share) > 0.9
    made.live(15)
    made.now += 86_000
    made.live(15)
    made.now += 500
    made.live(15)
    skew = made.state.skew
    assert skew.live == skew.next_day
    assert (skew.live.rows, skew.changed) == (30, 0)
    made.adaptation.forget_learned()
    assert made.state.skew.training.rows == 0
