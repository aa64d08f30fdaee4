"""The numpy learner: the contract of every learner, its gradients, and what it does to real handwriting."""

from dataclasses import dataclass, replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.checks import CheckFailed, check_learner, check_runtime
from edge_sdk.config import LearnConfig
from edge_sdk.errors import DivergedError, EmptyBufferError, IntegrityError
from edge_sdk.files import load_npz
from edge_sdk.head import Head, dequantize
from edge_sdk.learn.base import JOB_JSON, JOB_NPZ, LearnJob, batch_indices
from edge_sdk.learn.ewc import grown_like
from edge_sdk.learn.numpy_learner import loss_and_gradients, train_head
from edge_sdk.manifest import FISHER_NPZ, HEAD_NPZ, MANIFEST_NAME, MEMORY_NPZ, parse_manifest
from edge_sdk.runtime import OnnxRuntime
from edge_sdk.streams import rotation

BASE = tuple("01234567")


def test_numpy_learner_keeps_the_contract():
    for seed in range(3):
        check_learner(train_head, seed=seed)


def in_place(job):
    head, result = train_head(job)
    for key, value in head.weights.items():
        job.champion.weights[key][:] = value
    return head, result


def unseeded(job):
    return train_head(replace(job, seed=int(np.random.default_rng().integers(1_000_000))))


def idle(job):
    _, result = train_head(job)
    return Head({key: value.copy() for key, value in job.champion.weights.items()}, job.champion.labels), result


def passing_through(job):
    head, result = train_head(job)
    return Head({**head.weights, "b0": job.champion.weights["b0"]}, head.labels), result


def double(job):
    head, result = train_head(job)
    return Head({key: value.astype(np.float64) for key, value in head.weights.items()}, head.labels), result


def indulgent(job):
    if not len(job.fresh_latents):
        return job.champion, None
    return train_head(job)


def failing(job):
    head, result = train_head(job)
    return head, msgspec.structs.replace(result, error="no")


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (in_place, "left as they were"),
        (unseeded, "same bytes"),
        (idle, "learned something"),
        (passing_through, "shares no memory"),
        (double, "names, shapes and types"),
        (indulgent, "without fresh rows"),
        (failing, "tells of no error"),
    ],
)
def test_contract_suite_finds_a_broken_learner(broken, rule):
    with pytest.raises(CheckFailed, match=rule):
        check_learner(broken)


def make_head(rng, *widths):
    weights = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        weights[f"b{i}"] = rng.normal(size=outputs).astype(np.float32)
    return Head(weights, tuple(str(i) for i in range(widths[-1])))


@pytest.mark.parametrize("widths", [(5, 3), (5, 6, 4), (5, 7, 6, 4)], ids=str)
def test_gradients_equal_finite_differences(rng, widths):
    head = make_head(rng, *widths)
    x, y = rng.normal(size=(9, 5)), rng.integers(widths[-1], size=9)
    _, gradients = loss_and_gradients(head, x, y)
    step = 1e-6
    for key, value in head.weights.items():
        slopes = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                nudged = {name: array.astype(np.float64) for name, array in head.weights.items()}
                nudged[key][index] += sign * step
                sides.append(loss_and_gradients(Head(nudged, head.labels), x, y)[0])
            slopes[index] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(gradients[key], slopes, atol=1e-5)


@settings(deadline=None)
@given(
    fresh=st.integers(1, 60),
    replay=st.integers(0, 30),
    new=st.integers(1, 20),
    replayed=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_a_pass_shows_every_fresh_row_once_and_fills_each_batch_with_replayed_rows(fresh, replay, new, replayed, seed):
    config = LearnConfig(new_per_batch=new, replayed_per_batch=replayed)
    batches = batch_indices(fresh, replay, config, np.random.default_rng(seed))
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(fresh))
    for rows, old in batches:
        assert 1 <= len(rows) <= new
        assert len(old) == (replayed if replay else 0)
        assert ((old >= 0) & (old < replay)).all()


@dataclass(frozen=True)
class Lab:
    """A checkpoint's head and memory, and latents of handwriting that it has not seen."""

    checkpoint: object
    runtime: OnnxRuntime
    latent: object
    champion: Head
    fisher: dict
    memory: tuple
    factory: object
    life: object
    score: object

    def latents(self, x):
        return self.runtime.latents(x)

    def job(self, pool, transform=None, *, labels=BASE, replay=(), **settings):
        x = pool.x if transform is None else transform(pool.x, np.random.default_rng(0))
        champion = self.champion.grown(labels)
        replay_latents, replay_labels = replay or (np.zeros((0, self.latent.dim), np.uint8), np.zeros(0, np.int64))
        return LearnJob(
            champion=champion,
            anchor=grown_like(self.champion.weights, champion.weights),
            fisher=grown_like(self.fisher, champion.weights),
            fresh_latents=self.latents(x),
            fresh_labels=pool.y,
            replay_latents=replay_latents,
            replay_labels=replay_labels,
            latent=self.latent,
            config=LearnConfig(**settings),
            seed=3,
        )

    def accuracy(self, head, pool, transform=None):
        x = pool.x if transform is None else transform(pool.x, np.random.default_rng(0))
        return (head.predict(dequantize(self.latents(x), self.latent)) == pool.y).mean()


@pytest.fixture(scope="module")
def lab(checkpoint, digits):
    manifest = parse_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    memory = load_npz(checkpoint / MEMORY_NPZ)
    base = set(range(8))
    return Lab(
        checkpoint=checkpoint,
        runtime=OnnxRuntime(checkpoint),
        latent=manifest.latent,
        champion=Head.load(checkpoint / HEAD_NPZ),
        fisher=load_npz(checkpoint / FISHER_NPZ),
        memory=(memory["latents"], memory["labels"].astype(np.int64)),
        factory=digits.factory.only(base),
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


def test_loss_falls_and_the_drifted_data_are_learned(lab):
    job = lab.job(lab.life.only(OLD), TURNED, replay=lab.memory)
    challenger, result = train_head(job)
    assert result.last_loss < result.first_loss / 2
    assert result.steps == 24 * -(-len(job.fresh_labels) // 8)
    score = lab.score.only(OLD)
    assert lab.accuracy(challenger, score, TURNED) > lab.accuracy(lab.champion, score, TURNED) + 0.15


def test_replay_keeps_old_classes_and_a_new_one_is_learned(lab):
    labels = (*BASE, "8")
    with_replay, _ = train_head(lab.job(lab.life.only(NEW), labels=labels, replay=lab.memory, ewc_lambda=0))
    without, _ = train_head(lab.job(lab.life.only(NEW), labels=labels, ewc_lambda=0))
    old = lab.score.only(OLD)
    before = lab.accuracy(lab.champion, old)
    assert lab.accuracy(with_replay, lab.score.only(NEW)) >= 0.6
    assert lab.accuracy(with_replay, old) >= before - 0.08
    assert lab.accuracy(without, old) < 0.5


def test_ewc_with_an_empty_buffer_keeps_more_of_the_factory_data_than_none(lab):
    life, score = lab.life.only(OLD), lab.score.only(OLD)
    naive, _ = train_head(lab.job(life, TURNED, ewc_lambda=0))
    held, _ = train_head(lab.job(life, TURNED, ewc_lambda=1_000))
    assert lab.accuracy(held, score) > lab.accuracy(naive, score) + 0.03
    assert lab.accuracy(held, score, TURNED) > lab.accuracy(lab.champion, score, TURNED)


@pytest.mark.parametrize("ewc_lambda", [0, 1, 1e2, 1e4, 1e6])
def test_no_strength_of_the_penalty_diverges(lab, ewc_lambda):
    challenger, result = train_head(lab.job(lab.life.only(OLD), TURNED, replay=lab.memory, ewc_lambda=ewc_lambda))
    assert np.isfinite(result.last_loss)
    assert result.last_loss <= 1.5 * result.first_loss  # the first is of one batch
    score = lab.score.only(OLD)
    assert lab.accuracy(challenger, score) > 0.8
    assert lab.accuracy(challenger, score, TURNED) > lab.accuracy(lab.champion, score, TURNED) - 0.02


@pytest.mark.parametrize("rate", [1e42, 1e300])
def test_an_absurd_learning_rate_is_one_error_and_leaves_the_jobs_arrays_untouched(lab, rate):
    job = lab.job(lab.life.only(OLD), replay=lab.memory, learning_rate=rate, ewc_lambda=0)
    before = [array.copy() for array in arrays_of(job)]
    with pytest.raises(DivergedError, match="became"):
        train_head(job)
    for array, kept in zip(arrays_of(job), before, strict=True):
        np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("ewc_lambda", [0, 10])
@pytest.mark.parametrize("rate", [1e3, 1e10, 1e38, 1e300])
def test_any_learning_rate_gives_a_finite_head_or_diverges(lab, rng, rate, ewc_lambda):
    """ReLU units may die instead: what comes of it is finite, and the gate's to refuse."""
    champion = make_head(rng, lab.latent.dim, 16, 8)
    job = lab.job(lab.life.only(OLD), learning_rate=rate, ewc_lambda=ewc_lambda, passes=3)
    fisher = {key: np.abs(value) for key, value in champion.weights.items()}
    job = replace(job, champion=champion, anchor=champion.weights, fisher=fisher)
    try:
        challenger, result = train_head(job)
    except DivergedError:
        return
    assert np.isfinite(result.last_loss)
    assert all(np.isfinite(value).all() for value in challenger.weights.values())


def arrays_of(job):
    rows = [job.fresh_latents, job.fresh_labels, job.replay_latents, job.replay_labels]
    return [*rows, *job.champion.weights.values(), *job.anchor.values(), *job.fisher.values()]


def test_a_job_without_fresh_rows_is_refused(lab):
    with pytest.raises(EmptyBufferError, match="no fresh rows"):
        train_head(lab.job(lab.life.only(set()), replay=lab.memory))


def test_another_seed_gives_another_challenger(lab):
    job = lab.job(lab.life.only(OLD), TURNED, passes=1)
    assert train_head(job)[0].to_bytes() != train_head(replace(job, seed=4))[0].to_bytes()


def test_a_job_survives_saving(lab, tmp_path):
    job = lab.job(lab.life.only(NEW), labels=(*BASE, "8"), replay=lab.memory)
    job.save(tmp_path)
    loaded = LearnJob.load(tmp_path)
    assert loaded.champion.to_bytes() == job.champion.to_bytes()
    assert (loaded.latent, loaded.config, loaded.seed) == (job.latent, job.config, job.seed)
    for name in ("fresh_latents", "fresh_labels", "replay_latents", "replay_labels"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(job, name))
        assert getattr(loaded, name).dtype == getattr(job, name).dtype
    for name in ("anchor", "fisher"):
        assert getattr(loaded, name).keys() == getattr(job, name).keys()
        for key, value in getattr(job, name).items():
            np.testing.assert_array_equal(getattr(loaded, name)[key], value)


@pytest.mark.parametrize("name", [JOB_NPZ, JOB_JSON])
@pytest.mark.parametrize("damage", ["gone", "altered", "another file"])
def test_a_damaged_job_is_refused(lab, tmp_path, name, damage):
    lab.job(lab.life.only(NEW), labels=(*BASE, "8")).save(tmp_path)
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
