"""The learning transaction by itself: no trunk, no device, and things that move (see `Rig`)."""

import shutil

import numpy as np
import pytest

from edge_sdk.learn.base import LearnResult
from edge_sdk.policy import ResourceState
from edge_sdk.progress import Recent

# ---- deciding


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
    made.learn()
    said = [(detail["learn"], detail["reason"]) for detail in made.events("learn_decided")]
    assert said == [
        (False, "input drift: waits for 20 new labelled rows, has 10"),
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


@pytest.mark.parametrize("new_labels", ["allow", "ask"])
def test_a_new_label_is_reason_enough_and_is_not_named(rig, new_labels):
    triggers = (("volume",), ("new_label",))
    made = rig(policy={"volume_rows": 1_000, "triggers": triggers}, learn={"new_labels": new_labels})
    made.add(9, label="new", things=[3])
    made.add(30)
    made.turn()
    assert "learn_started" not in made.events()
    made.add(1, label="new", things=[3])
    made.turn()
    if new_labels == "ask":
        assert "learn_started" not in made.events()
        made.adaptation.decide_label("new", made.now, accept=True)
        made.turn()
    (started,) = made.events("learn_started")
    assert (started["reason"], started["rows"]) == ("1 new label", 40)
    assert "new" in made.adaptation._training.challenger().labels


def test_a_model_that_is_too_sure_of_itself_learns_once_enough_labels_tell(rig):
    made = rig(policy={"volume_rows": 1_000, "calibration_target": 0.3})
    made.add(30)
    made.live(29, moved=False, label="b")
    made.turn()
    assert (made.state.calibration, made.events()) == (None, [])
    made.live(1, moved=False, label="b")
    made.turn()
    assert made.state.calibration > 0.5
    assert made.events("learn_started")[0]["reason"].startswith("calibration error 0.")


def test_a_model_that_is_right_as_often_as_it_is_sure_does_not(rig):
    made = rig(policy={"volume_rows": 1_000, "calibration_target": 0.3})
    made.add(30)
    made.live(200, moved=False)
    made.turn()
    assert made.state.calibration < 0.1
    assert made.events() == []


def test_of_a_multi_label_model_the_share_of_right_labels_is_what_it_is_sure_of(rig):
    """Each label right 95 times of 100, and all of them together only every other time."""
    made = rig(task="multilabel")
    made.live(1, moved=False, label='["b", "c"]')  # it says "a": no label is right
    made.live(1, moved=False, label='["a", "c"]')
    assert [(row.right, row.success) for row in made.state.recent] == [(False, 0.0), (False, 0.667)]
    made.state.recent = [Recent(False, 0.95, 0.95), Recent(True, 0.95, 0.95)] * 20
    assert made.state.calibration == pytest.approx(0.0)
    assert made.state.accuracy == 0.5


def test_rows_that_may_not_be_learned_start_nothing(rig):
    """60 rows of a label that nobody has accepted, 9 of one that may be a typing error."""
    made = rig(learn={"new_labels": "ask"})
    made.add(60, label="new", things=[3])
    made.add(9, label="typo", things=[0])
    for _ in range(3):
        made.turn()
    assert made.events() == ["label_asked"]


def test_a_new_label_is_told_of_once_it_has_as_many_rows_as_may_be_told(rig):
    made = rig(learn={"new_labels": "ask"}, report={"min_count": 15})
    made.add(14, label="new", things=[3])
    made.turn()
    assert (made.events("label_asked"), made.adaptation.new_labels) == ([], {"new": 14})
    made.add(1, label="new", things=[3])
    made.turn()
    assert made.events("label_asked") == [{"label": "new", "rows": 15}]


# ---- what the machine can spare


def test_an_obstacle_pauses_the_job_and_learning_goes_on_once_there_is_a_margin(rig, working):
    made = rig(executor=working)
    made.learn()
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
    made.learn()
    assert made.state.waits == "40 new labelled rows: waits for 90 °C, learning stops at 85"
    made.resources = ResourceState(temperature_c=50.0)
    made.turn()
    assert made.state.phase == "probation"


def test_the_days_cpu_time_is_charged_with_the_learners_and_learning_waits_for_the_next_day(rig, working):
    made = rig(executor=working, resources={"seconds_per_day": 5.0, "watts": 2.0})
    made.learn()
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


def test_a_job_that_was_stopped_is_charged_once(rig, working):
    made = rig(executor=working, learn={"max_seconds": 10.0})
    made.learn()
    made.executor.worked_s, made.full = 11.0, 0
    made.fails_on = "learn_failed"
    assert made.tries(3) == 3
    made.fails_on = ""
    made.turn()
    assert made.events("learn_failed")[0]["reason"] == "stopped after 10 s"
    assert made.state.spent.seconds == 11.0
    assert made.executor.calls.count("cancel") == 1


def test_what_learning_writes_is_charged(rig):
    made = rig(resources={"flash_bytes_per_day": 20_000})
    made.adaptation.charge(made.now, flash_bytes=500)
    assert made.state.spent.flash_bytes == 500
    made.promote()
    assert made.state.spent.flash_bytes > 5_000  # the job's files; what the database writes is counted there
    made.adaptation.charge(made.now, flash_bytes=20_000)
    made.confirm()
    made.learn()
    assert "of 20000 bytes written today" in made.state.waits


# ---- challengers that follow each other


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


def test_a_verdict_and_a_failure_begin_the_count_anew(rig, never_sure):
    made = rig(**never_sure)
    for end in ("rejected", "learn_failed"):
        made.learn()
        made.add(len(made.samples("fresh")))
        made.turn()
        assert made.state.superseded == 1
        made.turn()
        assert made.state.phase == "judging"
        if end == "rejected":
            made.turn(seconds=3_600)
        else:
            shutil.rmtree(made.folder / "learn" / "job")
            made.open()
            made.add(1, "judge")
            made.turn()
        assert made.events()[-1] == end
        assert (made.state.phase, made.state.superseded) == ("idle", 0)
        made.now += 60


def test_rows_that_may_not_be_learned_supersede_nothing(rig, never_sure):
    made = rig(learn={"new_labels": "ask"}, **never_sure)
    made.add(60, label="new", things=[3])
    made.learn(turns=5)
    assert made.events() == ["label_asked", "learn_decided", "learn_started"]
    made.adaptation.decide_label("new", made.now, accept=True)
    made.turn()
    assert made.events()[-1] == "superseded"
    made.turn()
    assert made.challenger.labels == ("a", "b", "c", "new")


def test_judge_rows_stay_while_a_challenger_is_on_trial_and_no_more_come_beyond_twice_the_room(rig, never_sure):
    made = rig(**never_sure)
    made.learn()  # 30 rows judge
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


# ---- how heads came to be, and how they do


def test_every_challenger_leaves_a_line(rig, working, never_sure):
    made = rig(seed=3)
    made.promote()
    made.confirm()
    made.change(**never_sure)
    made.learn()
    made.add(80)
    made.turn()
    made.turn()
    assert made.state.phase == "judging"
    made.turn(seconds=3_600)
    made.run_with(working)
    made.now += 60
    made.learn()
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
    made.promote()
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
