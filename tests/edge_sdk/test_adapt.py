"""The learning transaction on a real device and real handwriting: decide, learn, judge, promote, watch."""

import os
import signal

import msgspec
import numpy as np
import pytest

import edge_sdk.maintenance
from edge_sdk.errors import DiskFullError, LabelError, UnknownLabelError
from edge_sdk.experience import FactoryMemory
from edge_sdk.files import load_npz
from edge_sdk.head import Head
from edge_sdk.learn.base import CHALLENGER
from edge_sdk.learn.executor import InlineExecutor
from edge_sdk.manifest import MANIFEST_NAME, MEMORY_NPZ, parse_manifest
from edge_sdk.policy import ResourceState
from edge_sdk.resources import FixedReader
from edge_sdk.streams import DriftingStream, darkening, rotation

NAMES = [str(i) for i in range(10)]
BASE = set(range(8))
TICK_S = 300.0
TURNED = rotation(30)


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
    state = {monitor.name: monitor for monitor in device._maintenance.monitoring.states()}
    assert state["output"].evidence > 0
    after = World(life.clock, life.stream._base, darkening(0.3))
    assert after.live(device, 10, until=lambda device: "input" in device.status().alarms)


def test_a_version_that_fails_in_use_is_rolled_back_without_labels(make_device, world):
    device, life = make_device(), world()
    assert life.live(device, 40, until=phase_is("probation"))
    device.step()
    for _ in range(5):
        device._maintenance.pending.fail()
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


def test_rows_beyond_twice_the_room_for_judges_are_learned_from_while_a_challenger_is_on_trial(
    make_device, world, hard_to_convince
):
    device, life = make_device(config=hard_to_convince), world()
    assert life.live(device, 20, until=phase_is("judging"))
    before = device.status()
    device._adaptation.experience.judge_capacity = before.judge_rows // 2
    life.live(device, 1)
    after = device.status()
    assert (after.judge_rows, after.fresh_rows) == (before.judge_rows, before.fresh_rows + 40)


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


def test_a_learner_that_takes_too_long_is_stopped(make_device, world, working):
    device, life = make_device(executor=working), world()
    assert life.live(device, 20, until=phase_is("training"))
    working.worked_s = 121.0
    device.step()
    assert working.calls[-1] == "cancel"
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
    alarms, evidence = device.status().alarms, device._maintenance.monitoring.states()
    assert alarms
    stop(device)
    again = make_device(mode="monitor")
    assert again.status().alarms == alarms
    assert again._maintenance.monitoring.states() == evidence
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

    def no_room(samples):
        raise DiskFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(device._store, "add_samples", no_room)
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
    assert details(device, "label_asked") == [{"label": "8", "rows": device.status().new_labels["8"]}]
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
    loaded, load = [], edge_sdk.maintenance.load_served

    def note(slots, version, *rest):
        loaded.append(version.head)
        return load(slots, version, *rest)

    monkeypatch.setattr(edge_sdk.maintenance, "load_served", note)
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
    fresh, executor = device.status().fresh_rows, device._maintenance._executor
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


def test_learning_rows_and_judge_rows_never_swap(make_device, world, clock, digits, config, recording):
    policy = msgspec.structs.replace(config.policy, volume_rows=60, cooldown_s=0)
    config = msgspec.structs.replace(config, policy=policy)
    device = make_device(executor=recording, config=config)
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
            device = make_device(executor=recording, config=config)
            look(device)

    assert len(recording.jobs) >= 2
    assert not judge_keys & learn_keys
    assert len(judge_keys) + len(learn_keys) == len(base.y)
    assert len(judge_keys) / len(base.y) == pytest.approx(0.3, abs=0.08)
    judged = {s.latent for s in device._store.samples("judge", trunk)}
    factory = device._adaptation.experience.factory
    judged |= {row.tobytes() for row in factory.latents[factory.judging]}
    for job in recording.jobs:
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
