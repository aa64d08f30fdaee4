"""The rows of a trunk: kept, replayed, judged by, summed up, and forgotten; the same after a restart."""

import json

import msgspec
import numpy as np
import pytest

from edge_sdk.config import FeedbackConfig, JoinConfig
from edge_sdk.experience import MIN_LABEL_ROWS, Chosen, Experience, FactoryMemory
from edge_sdk.files import load_npz
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import LearnJob
from edge_sdk.learn.moments import Moments
from edge_sdk.manifest import HEAD_NPZ, MEMORY_NPZ, MOMENTS_NPZ
from edge_sdk.replay import BUFFERS
from edge_sdk.store import NewSample

OVERHEAD = 96
TASKS = ["classification", "multilabel", "regression"]


def open_experience(rig, *, manifest=None, config=None, seed=1):
    return Experience(
        rig.store, config or rig.config, manifest or rig.manifest, rig.slots.root / "a", seed=(seed, 0, 1)
    )  # fmt: skip


def with_section(config, section, **changes):
    return msgspec.structs.replace(config, **{section: msgspec.structs.replace(getattr(config, section), **changes)})


def consolidate(rig, experience, *, fold=True, mass=1.0, wrong=()):
    """All fresh rows, as if they had been learned from."""
    keys = [sample.key for sample in rig.samples("fresh")]
    with rig.store.transaction():
        experience.consolidate(Chosen(keys, [], [mass] * len(keys), list(wrong)), fold=fold)


def job_of(rig, experience, *, may_grow=lambda _: True, since=0.0, attempt=1):
    return experience.job(rig.head, experience.importance, may_grow=may_grow, since=since, attempt=attempt)


def rows_of(experience):
    """What the buffer holds, by slot."""
    labels = [experience._strata[number] for number in experience.buffer.labels]
    return [(row.tobytes(), label) for row, label in zip(experience.buffer.latents, labels, strict=True)]


def stored_rows(rig):
    samples = rig.samples("replay")
    assert [sample.slot for sample in samples] == list(range(len(samples)))
    return [(sample.latent, sample.label) for sample in samples]


def moments_of(rig, samples, labels):
    """Of stored samples, each with its own mass, from nothing but the rows."""
    x = np.stack([np.frombuffer(sample.latent, np.uint8) for sample in samples])
    features = rig.experience.base.hidden(dequantize(x, rig.manifest.latent))
    targets = np.array([labels.index(sample.label) for sample in samples])
    return Moments.of(features, targets, np.array([sample.mass for sample in samples]), labels)


def assert_same_sums(found, wanted):
    assert found.labels == tuple(wanted.labels)
    for part in ("mass", "x", "xx", "y", "xy"):
        np.testing.assert_allclose(getattr(found, part), getattr(wanted, part), rtol=1e-4, atol=1e-4)


# ---- the factory's rows


@pytest.mark.parametrize("most", [0, 7, 31, 60, 1_000])
def test_of_the_factory_rows_so_many_are_replayed_balanced_and_none_that_judges(rig, most):
    made = rig()
    factory = made.experience.factory
    rows = factory.replayed(most)
    assert len(rows) == min(most, 60)
    counts = np.bincount(rows.targets, minlength=3)
    assert counts.max() - counts.min() <= 1
    judging = {row.tobytes() for row in factory.latents[factory.judging]}
    assert not judging & {row.tobytes() for row in rows.latents}


def test_balance_holds_where_the_factory_has_few_rows_of_a_label(rig):
    made = rig()
    path = made.slots.root / "a" / MEMORY_NPZ
    arrays = load_npz(path)
    kept = np.concatenate([np.flatnonzero(arrays["labels"] != 2), np.flatnonzero(arrays["labels"] == 2)[:6]])
    np.savez(path, latents=arrays["latents"][kept], labels=arrays["labels"][kept])
    rows = FactoryMemory(path.parent, made.manifest).replayed(24)
    assert np.bincount(rows.targets).tolist() == [10, 10, 4]


@pytest.mark.parametrize("task", TASKS)
def test_without_factory_rows_only_the_devices_own_are_replayed(rig, task):
    made = rig(task=task, replay={"factory_rows": 0})
    made.add(6)
    consolidate(made, made.experience)
    made.add(3)
    job, _ = job_of(made, made.experience)
    assert {row.tobytes() for row in job.replay.latents} == {row for row, _ in stored_rows(made)}
    assert job.fits


@pytest.mark.parametrize("task", TASKS)
def test_without_moments_in_the_checkpoint_those_of_its_memory_stand_in(rig, task):
    made = rig(task=task)
    made.add(3)
    job, _ = job_of(made, made.experience)
    factory = made.experience.factory
    replayed = factory.replayed(1_000)
    assert job.moments.rows == len(replayed) == 60
    np.testing.assert_allclose(job.moments.x, dequantize(replayed.latents, made.manifest.latent).sum(axis=0), rtol=1e-5)


def test_the_checkpoints_moments_are_those_of_all_its_rows_but_the_judging_ones(rig):
    with_file, without = rig("with", moments=True), rig("without")
    found = []
    for made in (with_file, without):
        made.add(3)
        found.append(job_of(made, made.experience)[0].moments)
    assert MOMENTS_NPZ in with_file.manifest.files
    assert_same_sums(found[0], found[1])


# ---- the replay buffer


@pytest.mark.parametrize("kind", sorted(BUFFERS))
@pytest.mark.parametrize("task", TASKS)
def test_a_buffer_goes_on_after_a_restart_as_if_there_had_been_none(rig, kind, task):
    made = rig(task=task, replay={"kind": kind, "max_bytes": 12 * (8 + OVERHEAD)})
    made.add(20, moved=False)
    consolidate(made, made.experience)
    assert len(made.experience.buffer) == 12
    again = open_experience(made)
    assert rows_of(again) == rows_of(made.experience)
    assert [(row, made.experience._strata[again.buffer.labels[i]]) for i, (row, _) in enumerate(stored_rows(made))] == (
        rows_of(made.experience)
    )
    assert again.buffer.state() == made.experience.buffer.state()

    for buffer in (again.buffer, made.experience.buffer):  # the same chance from here on
        buffer._chance = np.random.default_rng(5)
        buffer.__dict__.pop("_rng", None)
    rows = [(made.latent(i % 3, moved=True), i % 2) for i in range(40)]
    assert [again.buffer.add(*row) for row in rows] == [made.experience.buffer.add(*row) for row in rows]


def test_what_a_smaller_budget_leaves_no_room_for_is_forgotten(rig):
    made = rig()
    made.add(20)
    consolidate(made, made.experience)
    kept = rows_of(made.experience)[:5]
    smaller = open_experience(made, config=with_section(made.config, "replay", max_bytes=5 * (8 + OVERHEAD)))
    assert rows_of(smaller) == stored_rows(made) == kept


@pytest.mark.parametrize("max_bytes", [0, 50])
def test_without_room_for_a_row_nothing_is_kept_and_learning_goes_on(rig, max_bytes, caplog):
    """50 bytes hold no row of this latent: a release with wider latents than before must not stop the device."""
    made = rig(replay={"max_bytes": max_bytes})
    assert ("raise replay.max_bytes" in caplog.text) == (max_bytes == 50)
    made.add(40)
    made.add(30, "judge")
    made.turn()
    assert made.state.phase == "probation"
    assert rows_of(made.experience) == stored_rows(made) == made.samples("fresh") == []
    assert made.moments.mass > 0


@pytest.mark.parametrize("kind", sorted(BUFFERS))
def test_holes_that_rows_forgotten_meanwhile_left_are_closed(rig, kind):
    """Rows of a trunk that does not serve are deleted where they lie."""
    made = rig(replay={"kind": kind})
    made.add(9)
    consolidate(made, made.experience)
    before = rows_of(made.experience)
    with made.store.transaction():
        made.store.delete_samples([s.key for s in made.samples("replay") if s.slot in (0, 4, 8)])
    again = open_experience(made)
    assert rows_of(again) == stored_rows(made) == [row for i, row in enumerate(before) if i not in (0, 4, 8)]
    made.add(6)
    consolidate(made, again)
    assert rows_of(again) == stored_rows(made)
    assert len(stored_rows(made)) == 12


def test_counts_that_do_not_fit_the_rows_are_begun_anew(rig, caplog):
    made = rig()
    made.add(9)
    consolidate(made, made.experience)
    with made.store.transaction():
        made.store.put(f"buffer:{made.manifest.trunk_id[:16]}", b"damaged")
    again = open_experience(made)
    assert rows_of(again) == rows_of(made.experience)
    assert "the buffer's counts are lost" in caplog.text


def test_a_regressions_rows_are_kept_balanced_over_the_range_of_its_target(rig):
    made = rig(task="regression", labels=("value",), replay={"max_bytes": 16 * (8 + OVERHEAD)})
    rows = [(made.latent(0), value) for value in [0.1] * 60 + [-9.0, 9.0, 1.7, -0.7] * 4]
    with made.store.transaction():
        made.store.add_samples(
            NewSample(made.now, row.tobytes(), json.dumps([value]), "fresh", made.manifest.trunk_id)
            for row, value in rows
        )
    consolidate(made, made.experience)
    assert made.experience._strata == ["0", "-4", "3", "-2"]  # in halves of the deviation, the ends open; 1.7 is in "3"
    kept = np.bincount(made.experience.buffer.labels)
    assert kept.sum() == 16
    assert kept[0] <= 5


def test_more_sets_of_labels_than_are_told_apart_share_a_place(rig):
    made = rig(task="multilabel", labels=[f"l{i}" for i in range(6)])
    names = made.manifest.labels
    sets = [json.dumps([name for i, name in enumerate(names) if number >> i & 1]) for number in range(64)]
    numbers = [made.experience._stratum(truth) for truth in [*sets, '["another"]']]
    assert numbers == [*range(64), 63]


# ---- judge rows


def test_judge_rows_weigh_by_the_most_that_a_row_may_count(rig):
    feedback = FeedbackConfig(sources={"expert": 0.8, "crowd": 0.2}, default_weight=0.4)
    made = rig(feedback=feedback, join=JoinConfig(log_fraction=0.5))
    for weight in (1.6, 0.4, 0.8, 16.0, 1e-9):  # expert, crowd, none named; and from other settings
        made.add(1, "judge", weight=weight)
    weights = made.experience.judge_rows.weights
    np.testing.assert_allclose(weights, [1.0, 0.25, 0.5, 1.0, 1e-3])
    assert weights.min() > 0


def test_there_may_be_no_judge_rows(rig):
    made = rig(task="multilabel")
    rows = made.experience.judge_rows
    assert rows.latents.shape == (0, 8)
    assert (rows.truths, rows.slices, rows.weights.tolist()) == ([], [], [])
    made.add(40)
    made.turn()
    assert (made.state.phase, made.state.waits[:9]) == ("judging", "evidence ")


# ---- which rows a job has


def test_rows_from_before_the_change_are_replayed_and_not_fresh(rig):
    made = rig()
    old = made.add(5, time=10.0)
    new = made.add(7, time=20.0)
    job, chosen = job_of(made, made.experience, since=15.0)
    assert (chosen.fresh, chosen.older) == (new, old)
    assert (len(job.fresh), len(job.replay)) == (7, 5 + 60)


def test_a_label_grows_the_head_once_enough_rows_ask_for_it_and_it_may(rig):
    made = rig()
    made.add(3)
    made.add(MIN_LABEL_ROWS - 1, label="new", things=[0])
    made.add(MIN_LABEL_ROWS, label="other", things=[1])
    known = made.manifest.labels
    experience = made.experience
    for may_grow, labels, learnable in (
        (lambda _: True, ("a", "b", "c", "other"), 3 + MIN_LABEL_ROWS),
        (lambda label: label != "other", ("a", "b", "c"), 3),
    ):
        job, chosen = job_of(made, experience, may_grow=may_grow)
        assert job.champion.labels == job.base.labels == job.moments.labels == labels
        assert len(chosen.fresh) == learnable
        found = experience.learnable(known, may_grow=may_grow, since=0.0)
        assert found == (learnable, len(labels) - 3)
        assert job.fits
    assert experience.learnable(known, may_grow=lambda _: True, since=made.now + 1).rows == 0


def test_a_head_has_room_for_so_many_labels(rig):
    made = rig(learn={"max_labels": 4})
    for label in ("new", "other"):
        made.add(12, label=label, things=[0])
    job, chosen = job_of(made, made.experience)
    assert job.champion.labels == ("a", "b", "c", "new")
    assert len(chosen.fresh) == 12
    assert made.experience.learnable(made.manifest.labels, may_grow=lambda _: True, since=0) == (12, 1)


def test_a_label_that_was_summed_up_stays_in_the_head(rig):
    """As after the rollback of the head that had learned it."""
    made = rig()
    made.add(12, label="new", things=[0])
    consolidate(made, made.experience)
    made.add(6)
    job, _ = job_of(made, made.experience, may_grow=lambda _: False)
    assert job.champion.labels == ("a", "b", "c", "new")
    assert job.moments.y[3] > 0
    assert job.fits


def test_every_so_many_jobs_start_from_the_checkpoint(rig):
    made = rig(learn={"scratch_every": 3})
    made.add(6)
    consolidate(made, made.experience)
    number = made.slots.write_head("a", made.head.with_last(2 * made.head.weights["W0"], made.head.weights["b0"]))
    made.slots.promote(number)
    made.add(6)
    for attempt in range(7):
        job, _ = job_of(made, made.experience, attempt=attempt)
        scratch = attempt % 3 == 0
        wanted = made.experience.base if scratch else made.head
        assert job.champion.to_bytes() == wanted.to_bytes()
        assert (job.moments.rows == 60) == scratch


def test_a_job_reads_rows_of_a_release_with_new_labels_first(rig):
    """A new base on the same trunk knows another label; the device's own comes after it."""
    made = rig()
    made.add(12)
    made.add(12, label="new", things=[0])
    consolidate(made, made.experience)
    personal = made.head.grown(["a", "b", "c", "new"])
    manifest = made.write(made.slots.root / "a", "classification", ("c", "d", "a", "b"))
    carried = Head.load(made.slots.root / "a" / HEAD_NPZ).grown(["c", "d", "a", "b", "new"])
    made.add(6)
    experience = open_experience(made, manifest=manifest)
    job, _ = experience.job(carried, experience.importance, may_grow=lambda _: True, since=0.0, attempt=1)
    assert job.champion.labels == job.moments.labels == ("c", "d", "a", "b", "new")
    assert job.fits
    assert job.moments.y[4] == pytest.approx(12, rel=1e-3)
    assert personal.labels[-1] == job.champion.labels[-1]
    consolidate(made, experience)
    assert set(made.moments.labels) == {"a", "b", "c", "d", "new"}


# ---- what is summed up


def test_moments_grow_by_the_rows_that_were_learned_and_older_ones_fade(rig):
    made = rig(learn={"decay": 0.5})
    made.add(6)
    consolidate(made, made.experience, mass=2.0)
    first = made.moments
    assert_same_sums(first, moments_of(made, made.samples("replay"), ["a", "b", "c"]))
    made.add(6)
    made.add(10, label="new", things=[0])
    consolidate(made, made.experience)
    assert made.moments.mass == pytest.approx(0.5 * 12 + 16)
    assert {sample.mass for sample in made.samples("replay")} == {1.0}  # 2 faded by half, and 1
    assert_same_sums(made.moments, moments_of(made, made.samples("replay"), ["a", "b", "c", "new"]))


def test_without_folding_rows_are_replayed_and_not_summed_up(rig):
    made = rig()
    made.add(6)
    consolidate(made, made.experience, fold=False)
    assert made.moments is None
    assert [sample.mass for sample in made.samples("replay")] == [0.0] * 6
    assert len(rows_of(made.experience)) == 6


def test_wrong_rows_and_rows_that_say_what_a_label_is_not_leave_no_trace(rig):
    made = rig()
    good, wrong, negative = made.add(4), made.add(2), made.add(3, weight=-1.0)
    keys = [*good, *wrong, *negative]
    with made.store.transaction():
        made.experience.consolidate(Chosen(keys, [], [1.0] * 9, wrong=[4, 5]), fold=True)
    assert [sample.key for sample in made.samples("replay")] == good
    assert made.samples("fresh") == []
    assert made.moments.mass == 4.0


def test_the_last_consolidation_is_taken_out_again(rig):
    made = rig(learn={"decay": 0.5})
    made.add(6)
    consolidate(made, made.experience, mass=3.0)
    before, mass = made.moments, {sample.key: sample.mass for sample in made.samples("replay")}
    made.add(6)
    consolidate(made, made.experience)
    with made.store.transaction():
        made.experience.unfold()
    assert_same_sums(made.moments, before)
    assert {s.key: s.mass for s in made.samples("replay") if s.key in mass} == mass
    assert sum(sample.mass for sample in made.samples("replay")) == 18.0
    with made.store.transaction():
        made.experience.unfold()  # there is only one way back
    assert_same_sums(made.moments, before)


def test_the_first_consolidation_is_taken_out_again(rig):
    made = rig()
    made.add(6)
    consolidate(made, made.experience)
    with made.store.transaction():
        made.experience.unfold()
    assert made.moments is None
    assert {sample.mass for sample in made.samples("replay")} == {0.0}


def test_what_came_before_a_consolidation_without_sums_is_never_taken_out(rig):
    """All rows of the promoted challenger were forgotten: nothing of it is in the moments."""
    made = rig()
    made.add(6)
    consolidate(made, made.experience)
    before = made.moments
    consolidate(made, made.experience)
    with made.store.transaction():
        made.experience.unfold()
    assert_same_sums(made.moments, before)


def test_forgetting_a_row_takes_it_out_of_the_moments_also_after_a_rollback(rig):
    made = rig(learn={"decay": 0.5})
    first = made.add(6)
    consolidate(made, made.experience)
    made.add(6)
    consolidate(made, made.experience)
    with made.store.transaction():
        made.experience.unfold()
    found = [(sample, made.manifest.trunk_id) for sample in made.samples("replay") if sample.key in first[:2]]
    with made.store.transaction():
        made.experience.erase(found, unlearn=True)
    assert made.moments.mass == pytest.approx(4.0)
    kept = [sample for sample in made.samples("replay") if sample.mass]
    assert_same_sums(made.moments, moments_of(made, kept, ["a", "b", "c"]))
    assert rows_of(made.experience) == stored_rows(made)
    with made.store.transaction():
        made.experience.unfold()  # what was there before the forgetting does not come back
    assert made.moments.mass == pytest.approx(4.0)


def test_forgetting_a_row_of_another_trunk_gives_up_what_was_summed_up_there(rig):
    made = rig()
    keys = made.add(6)
    consolidate(made, made.experience)
    trunk = made.manifest.trunk_id
    found = [(sample, trunk) for sample in made.samples("replay") if sample.key == keys[0]]
    other = rig("other", labels=("a", "b"))
    elsewhere = Experience(made.store, made.config, other.manifest, other.slots.root / "a", seed=(1,))
    elsewhere.trunk = "another trunk altogether"
    with made.store.transaction():
        elsewhere.erase(found, unlearn=True)
    assert made.moments is None
    assert made.store.get(f"undo:{trunk[:16]}") is None
    assert [sample.mass for sample in made.samples("replay")] == [0.0] * 5


def test_moments_of_other_hidden_layers_are_made_anew_from_the_rows_there_are(rig):
    made = rig(hidden=(8,))
    made.add(6)
    consolidate(made, made.experience, mass=2.0)
    path = made.slots.root / "a" / HEAD_NPZ
    head = Head.load(path)
    path.write_bytes(Head({**head.weights, "W0": -head.weights["W0"]}, head.labels).to_bytes())
    made.open()
    made.add(6)
    device = made.experience._device_moments()
    assert_same_sums(device, moments_of(made, made.samples("replay"), ["a", "b", "c"]))
    consolidate(made, made.experience)
    assert_same_sums(made.moments, moments_of(made, made.samples("replay"), ["a", "b", "c"]))


def test_damaged_moments_are_made_anew_from_the_rows_there_are(rig, caplog):
    made = rig()
    made.add(6)
    consolidate(made, made.experience)
    key = f"moments:{made.manifest.trunk_id[:16]}"
    with made.store.transaction():
        made.store.put(key, made.store.get(key)[:40])
    assert made.experience._device_moments().mass == 6.0
    assert "what was summed up is lost" in caplog.text


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks_sum_up_their_targets(rig, task):
    made = rig(task=task, learn={"decay": 1.0})
    for _ in range(2):
        made.add(6)
        consolidate(made, made.experience)
    assert made.moments.labels == tuple(made.manifest.labels)
    assert made.moments.mass == 12.0
    x = dequantize(np.stack([np.frombuffer(s.latent, np.uint8) for s in made.samples("replay")]), made.manifest.latent)
    wanted = (x[:, :3] > 0.5).sum(axis=0) if task == "multilabel" else x[:, :1].sum(axis=0).repeat(3)
    np.testing.assert_allclose(made.moments.y, wanted, rtol=1e-4, atol=1e-4)


def test_the_rows_whose_label_is_known_are_the_newest_of_all_roles(rig):
    made = rig()
    made.add(4, "judge")
    newest = {sample.latent for sample in made.samples("judge")[-1:]}
    made.add(5)
    newest |= {sample.latent for sample in made.samples("fresh")}
    own = made.experience.known_latents(6)[90:]
    assert {row.tobytes() for row in own} == newest


# ---- learners that read no sums


@pytest.mark.parametrize("learner", ["sgd", "torch"])
def test_for_a_learner_that_reads_no_moments_none_are_loaded_or_kept(rig, monkeypatch, tmp_path, learner):
    made = rig(learn={"learner": learner}, moments=True)
    made.add(30)
    made.add(12, label="new", things=[3])

    def refuse(*_):
        raise AssertionError("moments were read")

    for name in ("load", "of"):
        monkeypatch.setattr(Moments, name, refuse)
    job, chosen = job_of(made, made.experience)
    assert (job.moments.x.size, job.moments.labels) == (0, ("a", "b", "c", "new"))
    assert job.fits
    job.save(tmp_path)
    assert LearnJob.load(tmp_path).moments.x.size == 0
    with made.store.transaction():
        made.experience.consolidate(chosen, fold=True)
    assert made.moments is None
    assert {sample.mass for sample in made.samples("replay")} == {0.0}
    with made.store.transaction():
        made.experience.forget_label("new")
