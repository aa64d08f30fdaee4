"""The learning transaction by itself: no trunk, no device, and things that move (see `Rig`)."""

import shutil
from contextlib import contextmanager, suppress

import msgspec
import numpy as np
import pytest

from edge_sdk.errors import DiskFullError
from edge_sdk.head import Head
from edge_sdk.learn.base import CHALLENGER, LearnJob, LearnResult
from edge_sdk.policy import ResourceState
from edge_sdk.progress import Recent
from edge_sdk.slots import Slots


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


# ---- what the machine can spare


def test_an_obstacle_pauses_the_job_and_learning_goes_on_once_there_is_a_margin(rig, working):
    made = rig(executor=working)
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


def test_the_days_cpu_time_is_charged_with_the_learners_and_learning_waits_for_the_next_day(rig, working):
    made = rig(executor=working, resources={"seconds_per_day": 5.0, "watts": 2.0})
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


def test_a_job_that_was_stopped_is_charged_once(rig, working):
    made = rig(executor=working, learn={"max_seconds": 10.0})
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


# ---- consolidation


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
def test_the_importance_of_a_promoted_head_is_kept_beside_it_and_held_on_to(rig, mode, recording):
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
    made.executor = made.adaptation._training._executor = recording
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
    np.testing.assert_array_equal(made.adaptation._trial.importance().anchor["W0"], second.weights["W0"])
    made.slots.promote(0)
    made.attach()
    assert made.adaptation._trial.importance() is made.experience.importance


def test_damaged_importance_is_that_of_the_release(rig, caplog):
    made = rig(learn={"learner": "sgd", "consolidation": "online", "ewc_lambda": 1e-3})
    promote(made)
    (made.slots.root / "a" / "heads" / "0001.ewc.npz").write_bytes(b"damaged")
    confirm(made)
    learn(made)
    assert made.events().count("learn_started") == 2
    assert "EWC holds on to what the release came with" in caplog.text


# ---- a full disk


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


# ---- killed between a change of the pointer and its record


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


# ---- labels


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


# ---- how heads came to be, and how they do


def test_every_challenger_leaves_a_line(rig, working):
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
    made.executor = made.adaptation._training._executor = working
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


# ---- any sequence of events

EAGER = {
    "gate": {"alpha": 0.5, "class_margin": 1.0, "factory_margin": 1.0, "probation_rows": 8, "probation_s": 1e5},
    "policy": {"min_fresh_rows": 6, "volume_rows": 12, "cooldown_s": 2.0},
}


KINDS = (
    {},
    {"learn": {"new_labels": "ask", "consolidation": "online"}},
    {"hidden": (8,)},
    {"learn": {"learner": "sgd", "ewc_lambda": 0.0, "consolidation": "offline", "scratch_every": 3}},
)


class Walk:
    """Things that happen to a rig, drawn at random."""

    def __init__(self, rig, seed):
        self.rig, self.rng, self.roles = rig, np.random.default_rng(seed), {}

    def some(self, most):
        return int(self.rng.integers(1, most))

    def fresh(self):
        self.rig.add(self.some(20), moved=bool(self.rng.integers(2)))

    def judging(self):
        self.rig.add(self.some(12), "judge", moved=bool(self.rng.integers(2)))

    def new_label(self):
        self.rig.add(self.some(15), str(self.rng.choice(["fresh", "judge"])), label="new", things=[3])

    def odd_rows(self):
        self.rig.add(4, weight=-1.0)
        self.rig.add(4, time=self.rig.now - 500)

    def turn(self):
        changed_at = self.rig.now - 100 if self.rng.integers(2) else None
        self.rig.turn(mode="adapt" if self.rng.random() < 0.8 else "shadow", changed_at=changed_at)

    def long_turn(self):
        self.rig.turn(seconds=3_600)

    def live(self):
        label = str(self.rng.choice(["a", "b", "c"])) if self.rng.integers(2) else None
        self.rig.live(self.some(12), moved=bool(self.rng.integers(2)), label=label)

    def restart(self):
        self.rig.open()

    def go_back(self):
        """As a person asks for it, perhaps killed right after."""
        slots = self.rig.slots
        if self.rng.integers(2) and slots.pointer.previous is not None:
            slots.rollback()
        elif slots.pointer.current.head:
            slots.promote(0)
        else:
            return
        if self.rng.integers(2):
            self.rig.open()
        else:
            self.rig.adaptation.abandon(self.rig.now)

    def forget(self):
        rows = [row for role in ("fresh", "judge", "replay") for row in self.rig.samples(role)]
        if rows and self.rig.experience is not None:
            found = [
                (rows[i], self.rig.manifest.trunk_id) for i in self.rng.choice(len(rows), min(3, len(rows)), False)
            ]
            self.rig.adaptation.erase(found, self.rig.now, unlearn=True)

    def decide_label(self):
        if "new" not in self.rig.head.labels and self.rig.experience is not None:
            self.rig.adaptation.decide_label("new", self.rig.now, accept=bool(self.rng.integers(2)))

    def check(self):
        rig = self.rig
        for role in ("fresh", "judge", "replay"):
            for row in rig.samples(role):  # a role is given once
                was = self.roles.setdefault((row.key, row.latent), role)
                assert (was == "judge") == (role == "judge")
        promoted = [line.head for line in rig.store.lineage(limit=500) if line.head]
        assert len(set(promoted)) == len(promoted)
        if rig.attached != rig.slots.pointer.current or rig.experience is None:
            return  # not recorded yet
        labels = [rig.experience._strata[number] for number in rig.experience.buffer.labels]
        held = [(i, rig.experience.buffer.latents[i].tobytes(), label) for i, label in enumerate(labels)]
        assert held == [(row.slot, row.latent, row.label) for row in rig.samples("replay")]
        added = sum(row.mass for row in rig.samples("replay"))
        assert (rig.moments.mass if rig.moments else 0.0) == pytest.approx(added, rel=1e-3, abs=1e-3)
        if rig.state.phase == "judging":
            assert rig.state.parent == rig.slots.pointer.current
        if rig.state.phase == "probation":
            assert rig.state.parent == rig.slots.pointer.previous


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_rows_sums_and_pointer_stay_in_step(rig, seed):
    walk = Walk(rig(**EAGER, **KINDS[seed % 4]), seed)
    events = [walk.fresh] * 4 + [walk.judging] * 3 + [walk.turn] * 10 + [walk.live] * 4 + [walk.go_back] * 2
    events += [walk.new_label, walk.odd_rows, walk.long_turn, walk.restart, walk.forget, walk.decide_label]
    for number in walk.rng.integers(len(events), size=60):
        walk.rig.full = int(walk.rng.random() < 0.1)  # the first transaction finds no room
        with suppress(DiskFullError):
            events[number]()
        walk.rig.full = 0
        walk.check()
    assert "learn_started" in walk.rig.events()
