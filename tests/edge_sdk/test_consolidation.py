"""What a challenger leaves behind in sums, replay buffer and importance, and what a person has erased (see `Rig`)."""

import numpy as np
import pytest

# ---- consolidation


@pytest.mark.parametrize("hidden", [(), (8,)], ids=["linear", "hidden"])
def test_what_a_promoted_head_learned_is_summed_up(rig, hidden):
    made = rig(hidden=hidden, gate={"factory_margin": 1.0})
    made.promote()
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


def test_what_was_not_proven_is_summed_up_all_the_same(rig, never_sure):
    made = rig(**never_sure)
    made.learn()
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
    made.promote()
    made.confirm()
    # by this name it is an app's own, which may read sums
    made.change(learn={"learner": "edge_sdk.learn.sgd:train_sgd", "ewc_lambda": 0.0, "replayed_per_batch": 0})
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
    made.promote()
    assert sorted(file.name for file in heads.iterdir()) == ["0001.ewc.npz", "0001.npz"]
    first = made.slots.importance(made.slots.pointer.current)
    if mode == "online":
        np.testing.assert_array_equal(first.anchor["W0"], made.head.weights["W0"])
    else:
        assert (first.fisher["W0"] >= shipped.fisher["W0"]).all()
    made.confirm()
    made.run_with(recording)
    made.add(12, label="new", things=[3])
    made.learn(moved=False)
    (job,) = made.executor.jobs
    np.testing.assert_array_equal(job.anchor["W0"][:, :3], first.anchor["W0"])
    np.testing.assert_array_equal(job.fisher["W0"][:, :3], first.fisher["W0"])
    assert (job.fisher["W0"][:, 3] == 0).all()


def test_the_importance_goes_with_its_head_and_a_rollback_finds_the_one_before(rig):
    made = rig(learn={"learner": "sgd", "consolidation": "online", "ewc_lambda": 1e-3})
    for _ in range(3):
        made.promote()
        made.confirm()
        made.now += 3_600
        made.change(gate={"alpha": 0.9, "factory_margin": 1.0})
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
    made.promote()
    (made.slots.root / "a" / "heads" / "0001.ewc.npz").write_bytes(b"damaged")
    made.confirm()
    made.learn()
    assert made.events().count("learn_started") == 2
    assert "EWC holds on to what the release came with" in caplog.text


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
    made.promote()
    assert made.head.labels == ("a", "b", "c")
    made.confirm()

    made.adaptation.decide_label("new", made.now, accept=True)
    made.open()
    assert made.adaptation.new_labels == {}
    made.add(20, "judge", label="new", things=[3])
    made.add(30, label="new", things=[3])
    made.turn()
    assert made.head.labels == ("a", "b", "c", "new")


def test_a_refused_label_is_erased_and_what_was_summed_up_of_others_stays(rig):
    made = rig()
    made.promote()
    made.confirm()
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
    made.learn()
    assert "new" not in (made.challenger or made.head).labels
    made.adaptation.decide_label("new", made.now, accept=True)
    assert (made.state.refused, made.state.accepted) == ([], ["new"])


def test_refusing_a_label_that_was_learned_gives_up_what_was_summed_up_with_it(rig):
    made = rig(gate={"factory_margin": 1.0, "class_margin": 1.0})
    made.add(20, label="new", things=[3])
    made.promote()
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
def test_a_challenger_that_knows_a_row_to_be_forgotten_is_given_up(rig, role, never_sure):
    made = rig()
    made.promote()
    made.confirm()
    made.change(**never_sure)
    made.learn()
    assert made.state.phase == "judging"
    found = [(made.samples(role)[0], made.manifest.trunk_id)]
    made.adaptation.erase(found, made.now, unlearn=True)
    assert made.state.phase == "idle"
    assert made.events("learn_failed") == [{"reason": "samples that it knows were to be forgotten"}]
    assert found[0][0].key not in {sample.key for sample in made.samples(role)}


def test_a_challenger_outlives_what_does_not_concern_it(rig, never_sure):
    made = rig(**never_sure)
    made.learn()
    made.add(12, label="new", things=[3])
    made.adaptation.decide_label("new", made.now, accept=False)
    made.adaptation.erase([(made.samples("judge")[0], made.manifest.trunk_id)], made.now, unlearn=True)
    assert made.state.phase == "judging"
