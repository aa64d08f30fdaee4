"""The contract of every learner, jobs on disk, and what learners do to real handwriting."""

import sys
from dataclasses import dataclass, replace
from types import ModuleType

import msgspec
import numpy as np
import pytest

from edge_sdk.checks import CheckFailed, check_learner, check_runtime, example_job
from edge_sdk.config import LearnConfig
from edge_sdk.errors import ConfigError, EmptyBufferError, IntegrityError, MissingExtraError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import JOB_JSON, JOB_NPZ, LEARNERS, LearnJob, LearnResult, Rows, load_learner, nothing_between
from edge_sdk.learn.ewc import grown_like
from edge_sdk.learn.hybrid import train_hybrid
from edge_sdk.learn.moments import Moments, fresh_mass
from edge_sdk.learn.sgd import train_sgd
from edge_sdk.learn.slda import train_slda
from edge_sdk.manifest import FISHER_NPZ, HEAD_NPZ, MANIFEST_NAME, MEMORY_NPZ, parse_manifest
from edge_sdk.runtime import OnnxRuntime
from edge_sdk.streams import rotation

BASE = tuple("01234567")
TASKS = ("classification", "multilabel", "regression")


@pytest.mark.parametrize("learner", [train_slda, train_hybrid, train_sgd])
def test_every_learner_keeps_the_contract(learner):
    for seed in range(3):
        check_learner(learner, seed=seed)


def in_place(job, *, between=nothing_between):
    head, result = train_slda(job, between=between)
    for key, value in head.weights.items():
        job.champion.weights[key][:] = value
    return head, result


def forcing(job, *, between=nothing_between):
    job.champion.weights["W0"].setflags(write=True)
    job.champion.weights["W0"][0] = 0
    return train_slda(job, between=between)


def unseeded(job, *, between=nothing_between):
    return train_hybrid(replace(job, seed=int(np.random.default_rng().integers(1_000_000))), between=between)


def global_chance(job, *, between=nothing_between):
    np.random.seed(job.seed % 2**32)  # noqa: NPY002 - what a learner must not do
    return train_slda(job, between=between)


def idle(job, *, between=nothing_between):
    return job.champion, train_slda(job, between=between)[1]


def double(job, *, between=nothing_between):
    head, result = train_slda(job, between=between)
    return Head({key: value.astype(np.float64) for key, value in head.weights.items()}, head.labels), result


def renaming(job, *, between=nothing_between):
    head, result = train_slda(job, between=between)
    return Head(head.weights, tuple(reversed(head.labels))), result


def indulgent(job, *, between=nothing_between):
    return train_slda(job, between=between) if len(job.fresh) else (job.champion, LearnResult())


def weighing_nothing(job, *, between=nothing_between):
    counted = replace(job.fresh, weights=np.ones(len(job.fresh), np.float32))
    return train_sgd(replace(job, fresh=counted), between=between)


def deaf(job, *, between=nothing_between):
    return train_slda(job)


def deaf_to_errors(job, *, between=nothing_between):
    try:
        return train_slda(job, between=between)
    except EmptyBufferError:
        raise
    except Exception:  # noqa: BLE001
        return train_slda(job)


def failing(job, *, between=nothing_between):
    head, result = train_slda(job, between=between)
    return head, msgspec.structs.replace(result, error="no")


def overflowing(job, *, between=nothing_between):
    head, result = train_slda(job, between=between)
    return head, msgspec.structs.replace(result, last_loss=np.inf if job.config.learning_rate > 1e9 else 0.0)


def fond_of_what_is_new(job, *, between=nothing_between):
    """Makes the last label likely when nothing speaks for it."""
    head, result = train_slda(job, between=between)
    last, unseen = f"b{head.depth - 1}", job.task == "classification" and not job.moments.known[-2:].any()
    bias = head.weights[last] + np.float32(1e3) * unseen * (np.arange(len(head.labels)) == len(head.labels) - 1)
    return Head({**head.weights, last: bias.astype(np.float32)}, head.labels), result


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (in_place, "only read"),
        (forcing, "only read"),
        (unseeded, "same bytes"),
        (global_chance, "global generator"),
        (idle, "better than the champion"),
        (double, "names, shapes and types"),
        (renaming, "the champion's labels"),
        (indulgent, "without fresh rows"),
        (weighing_nothing, "weight 0"),
        (deaf, "`between` is called"),
        (deaf_to_errors, "let through"),
        (failing, "tells of no error"),
        (overflowing, "numbers are finite"),
        (fond_of_what_is_new, "no row has"),
    ],
)
def test_contract_suite_finds_a_broken_learner(broken, rule):
    with pytest.raises(CheckFailed, match=rule):
        check_learner(broken)


def test_a_learner_that_fails_on_its_own_account_is_not_taken_for_one_that_breaks_a_rule():
    def own_error(job, *, between=nothing_between):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        check_learner(own_error)


# ---- learners by name


def test_every_name_leads_to_a_learner():
    assert load_learner("slda") is train_slda
    assert load_learner("hybrid") is train_hybrid
    assert load_learner("sgd") is train_sgd
    assert LEARNERS.keys() == {"slda", "hybrid", "sgd", "torch"}
    assert LearnConfig().learner in LEARNERS


def test_an_apps_own_learner_is_loaded(monkeypatch):
    module = ModuleType("app_learners")
    module.mine = train_slda
    monkeypatch.setitem(sys.modules, "app_learners", module)
    assert load_learner("app_learners:mine") is train_slda


@pytest.mark.parametrize(
    "name", ["", "adam", ":f", "edge_sdk.learn.slda:", "edge_sdk.learn.slda:none", "no_such_module:f", ".slda:f"]
)
def test_a_learner_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=r"learn\.learner"):
        load_learner(name)


def test_without_torch_its_learner_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "edge_sdk.learn.torch_learner", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-sdk\[train\]'"):
        load_learner("torch")


# ---- the job


def weighed(rows, weights):
    return replace(rows, weights=np.asarray(weights, np.float32))


def test_rows_that_weigh_nothing_are_left_out_and_labels_that_do_not_apply_stay():
    job, _ = example_job()
    job = replace(job, fresh=weighed(job.fresh, np.arange(96) % 3 - 1), replay=weighed(job.replay, np.arange(64) % 2))
    counted = job.counted()
    assert (len(counted.fresh), len(counted.replay)) == (64, 32)
    assert set(counted.fresh.weights) == {-1, 1}
    np.testing.assert_array_equal(counted.fresh_mass, job.fresh_mass[np.arange(96) % 3 != 1])
    np.testing.assert_array_equal(counted.replay.latents, job.replay.latents[1::2])


@pytest.mark.parametrize("learner", [train_slda, train_hybrid, train_sgd])
@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_weight_0_is_as_if_it_were_not_there(learner, task):
    job, _ = example_job(task)
    keep = np.arange(len(job.fresh)) % 4 > 0
    idle_rows = replace(job, fresh=weighed(job.fresh, keep), fresh_mass=job.fresh_mass * keep)
    without = replace(job, fresh=job.fresh.take(keep), fresh_mass=job.fresh_mass[keep])
    assert learner(idle_rows)[0].to_bytes() == learner(without)[0].to_bytes()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hidden", [0, 24])
def test_a_job_survives_saving(task, hidden, tmp_path):
    job, _ = example_job(task, hidden=hidden)
    job.save(tmp_path)
    loaded = LearnJob.load(tmp_path)
    assert loaded.champion.to_bytes() == job.champion.to_bytes()
    assert loaded.base.to_bytes() == job.base.to_bytes()
    assert (loaded.latent, loaded.task, loaded.config, loaded.seed) == (job.latent, task, job.config, job.seed)
    for rows, kept in ((loaded.fresh, job.fresh), (loaded.replay, job.replay)):
        for name, value in vars(kept).items():
            np.testing.assert_array_equal(vars(rows)[name], value, strict=True)
    np.testing.assert_array_equal(loaded.fresh_mass, job.fresh_mass, strict=True)
    assert loaded.moments.labels == job.moments.labels
    np.testing.assert_allclose(loaded.moments.xx, job.moments.xx, rtol=1e-6)
    for name in ("anchor", "fisher"):
        assert getattr(loaded, name).keys() == getattr(job, name).keys()
        for key, value in getattr(job, name).items():
            np.testing.assert_array_equal(getattr(loaded, name)[key], value)


@pytest.mark.parametrize("name", [JOB_NPZ, JOB_JSON])
@pytest.mark.parametrize("damage", ["gone", "altered", "another file"])
def test_a_damaged_job_is_refused(tmp_path, name, damage):
    example_job()[0].save(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "altered":
        middle = len(data) // 2
        data[middle : middle + 20] = bytes(20)
        path.write_bytes(data)
    else:
        path.write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        LearnJob.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("fresh.latents", lambda a: a[:, :-1]),
        ("fresh.targets", lambda a: a + 8),
        ("fresh.targets", lambda a: a[:-1]),
        ("replay.weights", lambda a: a[:-1]),
        ("fresh_mass", lambda a: a[:-1]),
        ("anchor.W0", lambda a: a[:, :-1]),
        ("moments.x", lambda a: a[:-1]),
        ("champion.W0", lambda a: a * np.nan),
    ],
)
def test_a_job_whose_parts_do_not_fit_is_refused(tmp_path, part, change):
    example_job()[0].save(tmp_path)
    arrays = load_npz(tmp_path / JOB_NPZ)
    (tmp_path / JOB_NPZ).write_bytes(npz_bytes({**arrays, part: change(arrays[part])}))
    with pytest.raises(IntegrityError):
        LearnJob.load(tmp_path)


# ---- real handwriting


@dataclass(frozen=True)
class Lab:
    """A checkpoint's head and memory, and latents of handwriting that it has not seen."""

    checkpoint: object
    runtime: OnnxRuntime
    latent: object
    champion: Head
    fisher: dict
    moments: Moments
    memory: Rows
    life: object
    score: object

    def features(self, x):
        return dequantize(self.runtime.latents(x), self.latent)

    def job(self, pool, transform=None, *, labels=BASE, replay=False, **settings):
        x = pool.x if transform is None else transform(pool.x, np.random.default_rng(0))
        champion, moments = self.champion.grown(labels), self.moments.aligned(labels)
        fresh = Rows(self.runtime.latents(x), pool.y, np.ones(len(x), np.float32))
        return LearnJob(
            champion=champion,
            base=champion,
            anchor=grown_like(self.champion.weights, champion.weights),
            fisher=grown_like(self.fisher, champion.weights),
            fresh=fresh,
            replay=self.memory if replay else self.memory.take(np.zeros(0, np.int64)),
            moments=moments,
            fresh_mass=fresh_mass(moments, fresh.targets, fresh.weights, "classification"),
            latent=self.latent,
            task="classification",
            config=LearnConfig(**settings),
            seed=3,
        )

    def accuracy(self, head, pool, transform=None):
        x = pool.x if transform is None else transform(pool.x, np.random.default_rng(0))
        return (head.predict(self.features(x)) == pool.y).mean()


@pytest.fixture(scope="module")
def lab(checkpoint, digits):
    manifest = parse_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    memory, runtime = load_npz(checkpoint / MEMORY_NPZ), OnnxRuntime(checkpoint)
    factory = digits.factory.only(set(range(8)))
    features = dequantize(runtime.latents(factory.x), manifest.latent)
    return Lab(
        checkpoint=checkpoint,
        runtime=runtime,
        latent=manifest.latent,
        champion=Head.load(checkpoint / HEAD_NPZ),
        fisher=load_npz(checkpoint / FISHER_NPZ),
        moments=Moments.of(features, factory.y, np.ones(len(features)), BASE),
        memory=Rows(memory["latents"], memory["labels"].astype(np.int64), np.ones(len(memory["labels"]), np.float32)),
        life=digits.life,
        score=digits.score,
    )


OLD, NEW = set(range(8)), {8}
TURNED = rotation(30)


@pytest.mark.parametrize("variant", ["int8", "fp32"])
def test_onnx_runtime_keeps_the_contract(lab, variant):
    check_runtime(OnnxRuntime(lab.checkpoint, variant=variant), lab.score.x[:40], latent_dim=lab.latent.dim)


class Batchwise:
    """Normalizes over the batch."""

    def latents(self, x):
        flat = x.reshape(len(x), -1)
        return np.round(255 * flat / flat.max()).astype(np.uint8)


class Reusing:
    """Gives the same array again and again."""

    def __init__(self):
        self.result = np.zeros((100, 64), np.uint8)

    def latents(self, x):
        self.result[: len(x)] = np.round(15 * x.reshape(len(x), -1))
        return self.result[: len(x)]


class Floating:
    def latents(self, x):
        return x.reshape(len(x), -1)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [(Batchwise, "one by one"), (Reusing, "on it alone|one by one|belongs to the caller"), (Floating, "uint8")],
)
def test_contract_suite_finds_a_broken_runtime(broken, rule, digits):
    with pytest.raises(CheckFailed, match=rule):
        check_runtime(broken(), digits.score.x[:20], latent_dim=64)


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("learner", [train_slda, train_hybrid])
def test_drift_and_a_new_class_are_learned_without_forgetting_and_without_a_buffer(lab, learner, replay):
    old, new = lab.score.only(OLD), lab.score.only(NEW)
    before = lab.accuracy(lab.champion, old)
    turned, _ = learner(lab.job(lab.life.only(OLD), TURNED, replay=replay))
    assert lab.accuracy(turned, old, TURNED) > lab.accuracy(lab.champion, old, TURNED) + 0.3
    assert lab.accuracy(turned, old) >= before - 0.02
    grown, _ = learner(lab.job(lab.life.only(NEW), labels=(*BASE, "8"), replay=replay))
    assert lab.accuracy(grown, new) >= 0.9
    assert lab.accuracy(grown, old) >= before - 0.02


def test_twenty_rows_of_a_new_class_are_enough(lab):
    few = replace(lab.life.only(NEW), x=lab.life.only(NEW).x[:20], y=lab.life.only(NEW).y[:20])
    for learner, replay in ((train_slda, False), (train_hybrid, False), (train_sgd, True)):
        challenger, _ = learner(lab.job(few, labels=(*BASE, "8"), replay=replay))
        assert lab.accuracy(challenger, lab.score.only(NEW)) >= 0.6
        assert lab.accuracy(challenger, lab.score.only(OLD)) >= lab.accuracy(lab.champion, lab.score.only(OLD)) - 0.08


def test_sgd_lowers_the_loss_and_learns_the_drifted_data(lab):
    job = lab.job(lab.life.only(OLD), TURNED, replay=True)
    challenger, result = train_sgd(job)
    assert result.last_loss < 0.6 * result.first_loss
    assert result.steps == job.config.passes * -(-len(job.fresh) // job.config.new_per_batch)
    score = lab.score.only(OLD)
    assert lab.accuracy(challenger, score, TURNED) > lab.accuracy(lab.champion, score, TURNED) + 0.15


def test_sgd_forgets_old_classes_unless_they_are_replayed(lab):
    labels, old = (*BASE, "8"), lab.score.only(OLD)
    with_replay, _ = train_sgd(lab.job(lab.life.only(NEW), labels=labels, replay=True, ewc_lambda=0))
    without, _ = train_sgd(lab.job(lab.life.only(NEW), labels=labels, ewc_lambda=0))
    assert lab.accuracy(with_replay, lab.score.only(NEW)) >= 0.6
    assert lab.accuracy(with_replay, old) >= lab.accuracy(lab.champion, old) - 0.08
    assert lab.accuracy(without, old) < 0.5


def test_ewc_with_an_empty_buffer_keeps_more_of_the_factory_data_than_none(lab):
    life, score = lab.life.only(OLD), lab.score.only(OLD)
    naive, _ = train_sgd(lab.job(life, TURNED, ewc_lambda=0))
    held, _ = train_sgd(lab.job(life, TURNED, ewc_lambda=1_000))
    assert lab.accuracy(held, score) > lab.accuracy(naive, score) + 0.03
    assert lab.accuracy(held, score, TURNED) > lab.accuracy(lab.champion, score, TURNED)


@pytest.mark.parametrize("ewc_lambda", [0, 1, 1e2, 1e4, 1e6])
def test_no_strength_of_the_penalty_diverges(lab, ewc_lambda):
    challenger, result = train_sgd(lab.job(lab.life.only(OLD), TURNED, replay=True, ewc_lambda=ewc_lambda))
    assert result.last_loss <= 1.5 * result.first_loss  # the first is of one batch
    score = lab.score.only(OLD)
    assert lab.accuracy(challenger, score) > 0.8
    assert lab.accuracy(challenger, score, TURNED) > lab.accuracy(lab.champion, score, TURNED) - 0.02
