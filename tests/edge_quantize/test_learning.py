"""What learning starts from: right for every task, within its bounds, and checked against the head."""

from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

import edge_quantize.learning
from edge_quantize.learning import Memory, check_learning, learning_start, memory_rows, moments_rows
from edge_sdk.errors import ConfigError, EdgeError, IntegrityError
from edge_sdk.files import load_npz, npz_bytes
from edge_sdk.head import Head, dequantize, sigmoid
from edge_sdk.learn.moments import Moments
from edge_sdk.learn.slda import closed_form
from edge_sdk.manifest import (
    CARD,
    FISHER_NPZ,
    HEAD_NPZ,
    MEMORY_NPZ,
    MOMENTS_NPZ,
    FileEntry,
    LatentSpec,
    Manifest,
    TargetSpec,
)
from edge_sdk.schema import InputSpec
from edge_sdk.tasks import as_scores, rows_right

LATENT = LatentSpec(12, 0.05, 20)
ABC = ["a", "b", "c"]
TARGETS = [TargetSpec(5.0, 2.0, 0.5), TargetSpec(100.0, 30.0, 5.0), TargetSpec(-1.0, 0.5, 0.1)]
TASKS = ("classification", "multilabel", "regression")
MORE = {"multilabel": {"thresholds": [0.5] * 3}, "regression": {"targets": TARGETS}}


def manifest_of(task, files=()):
    return Manifest(
        name="made", release=1, created="", task=task, labels=ABC, input=InputSpec([4]), latent=LATENT,
        files={name: FileEntry(0, "") for name in files}, **MORE.get(task, {}),
    )  # fmt: skip


def made(task, rows=3000, *, hidden=0, seed=0):
    """Latents, their truth, and a head that knows nothing of either."""
    rng = np.random.default_rng(seed)
    latents = rng.integers(0, 256, (rows, LATENT.dim)).astype(np.uint8)
    found = dequantize(latents, LATENT) @ rng.normal(size=(LATENT.dim, 3)).astype(np.float32)
    y = {
        "classification": found.argmax(axis=1),
        "multilabel": (found > np.diag(np.quantile(found, [0.5, 0.9, 0.99], axis=0))).astype(np.int64),
        "regression": (found * 10 + 50).astype(np.float32),
    }[task]
    widths = [LATENT.dim, *([hidden] if hidden else []), 3]
    weights = {}
    for i, (before, after) in enumerate(pairwise(widths)):
        weights[f"W{i}"] = rng.normal(size=(before, after)).astype(np.float32)
        weights[f"b{i}"] = rng.normal(size=after).astype(np.float32)
    return Head(weights, tuple(ABC)), latents, y


def start_of(task, *, memory=None, seed=0, hidden=0, rows=3000):
    head, latents, y = made(task, rows, hidden=hidden)
    rng = np.random.default_rng(seed)
    return learning_start(head, latents, y, manifest=manifest_of(task), memory=memory or Memory(), rng=rng)


def same(found, expected):
    assert (found.labels, found.rows, found.mass) == (expected.labels, expected.rows, expected.mass)
    for part in ("x", "xx", "y", "xy"):
        assert np.allclose(getattr(found, part), getattr(expected, part), rtol=1e-5, atol=1e-2), part


# ---- moments


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("task", TASKS)
def test_moments_are_the_sums_over_all_training_rows_as_the_last_layer_sees_them(task, hidden):
    head, latents, y = made(task, hidden=hidden)
    targets = (y - [t.mean for t in TARGETS]) / [t.std for t in TARGETS] if task == "regression" else y
    found = Moments.load(start_of(task, hidden=hidden).files[MOMENTS_NPZ])
    assert len(found.x) == (hidden or LATENT.dim)
    same(found, Moments.of(head.hidden(dequantize(latents, LATENT)), targets, np.ones(len(y)), ABC))


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_gives_the_same_bytes(task):
    assert start_of(task).files == start_of(task).files
    assert start_of(task).files[MEMORY_NPZ] != start_of(task, seed=1).files[MEMORY_NPZ]


def test_of_many_rows_the_moments_know_a_sample_with_the_factory_memory_in_it(monkeypatch):
    monkeypatch.setattr(edge_quantize.learning, "MOMENTS_ROWS", 500)
    kept = np.arange(7, 107)
    chosen = moments_rows(2000, kept, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == 500
    assert set(kept) < set(chosen)
    assert chosen.max() > 1900
    assert (chosen == moments_rows(2000, kept, np.random.default_rng(0))).all()
    assert moments_rows(500, kept, np.random.default_rng(0)).tolist() == list(range(500))
    start = start_of("multilabel")
    assert start.moments_rows == Moments.load(start.files[MOMENTS_NPZ]).rows == 500


def test_moments_beyond_their_bound_do_not_ship_and_it_is_said_why():
    size = 4 * (12 * 13 // 2 + 12 * 4 + 3)
    start = start_of("classification", memory=Memory(moments_bytes=size - 1))
    assert (MOMENTS_NPZ in start.files, start.moments_rows) == (False, 0)
    assert start.no_moments == f"of 12 values they take {size} bytes, moments_bytes is {size - 1}"
    start = start_of("classification", memory=Memory(moments_bytes=size))
    assert size < len(start.files[MOMENTS_NPZ]) < size + 2000  # names, shapes, labels


def test_moments_of_a_handful_of_rows_do_not_ship():
    assert start_of("regression", rows=49).no_moments == "49 training rows, they take 50"
    assert start_of("regression", rows=50).moments_rows == 50


# ---- factory memory and Fisher information


def test_multilabel_memory_has_forty_rows_with_each_label_or_all_there_are():
    _, latents, y = made("multilabel")
    memory = load_npz(start_of("multilabel").files[MEMORY_NPZ])
    assert memory["labels"].dtype == np.uint8
    assert (memory["labels"].sum(axis=0) >= np.minimum(40, y.sum(axis=0))).all()
    assert y.sum(axis=0)[2] == 30
    assert (memory["labels"].sum(axis=1) == 0).sum() >= 40
    known = {(row.tobytes(), truth.astype(np.uint8).tobytes()) for row, truth in zip(latents, y, strict=True)}
    kept = zip(memory["latents"], memory["labels"], strict=True)
    assert all((row.tobytes(), truth.tobytes()) in known for row, truth in kept)


def test_many_labels_fit_because_a_label_takes_one_byte():
    y = (np.random.default_rng(0).random((5000, 80)) < 0.02).astype(np.uint8)
    assert len(memory_rows(y, 128, "multilabel", Memory(), np.random.default_rng(0))) > 1600
    with pytest.raises(ConfigError, match="raise it, or lower per_class"):
        memory_rows(y.astype(np.int64), 128, "multilabel", Memory(), np.random.default_rng(0))


def test_regression_memory_has_forty_rows_of_each_tenth_in_the_targets_own_units():
    _, _, y = made("regression")
    memory = load_npz(start_of("regression").files[MEMORY_NPZ])
    assert memory["labels"].dtype == np.float32
    tenths = np.searchsorted(np.quantile(y[:, 0], np.linspace(0.1, 0.9, 9)), memory["labels"][:, 0])
    assert (np.abs(np.bincount(tenths) - 40) <= 1).all()
    assert {row.tobytes() for row in memory["labels"]} <= {row.tobytes() for row in y}


def test_fisher_information_follows_from_what_the_task_says_of_the_outputs():
    """Of the last bias it is the variance of the output: 1 of standardised values, p (1 - p) of a coin."""
    assert (load_npz(start_of("regression", hidden=7).files[FISHER_NPZ])["b1"] == 1).all()
    head, latents, _ = made("multilabel")
    p = sigmoid(head.logits(dequantize(latents, LATENT)))
    assert load_npz(start_of("multilabel").files[FISHER_NPZ])["b0"] == pytest.approx((p * (1 - p)).mean(0), rel=1e-4)


# ---- check


def filled(folder, task, **changes):
    """A folder with what learning starts from; `changes` replace or (None) remove the arrays of a file."""
    head, _, _ = made(task)
    files = {HEAD_NPZ: head.to_bytes(), **start_of(task).files}
    for name, of_file in changes.items():
        file = f"{name}.npz"
        arrays = {key: of_file.get(key, value) for key, value in load_npz(files[file]).items()}
        files[file] = npz_bytes({key: value for key, value in arrays.items() if value is not None})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return manifest_of(task, files)


@pytest.mark.parametrize("task", TASKS)
def test_what_was_made_passes_its_check(tmp_path, task):
    manifest = filled(tmp_path, task)
    rows = len(load_npz(tmp_path / MEMORY_NPZ)["labels"])
    assert check_learning(tmp_path, manifest) == f"{rows} rows of factory memory, moments of 3000"
    without = msgspec.structs.replace(manifest, files={})
    assert check_learning(tmp_path, without) == f"{rows} rows of factory memory, no moments"


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("classification", {"moments": {"labels": np.array(["a", "b", "d"])}}, "moments.npz: .* labels a, b, d"),
        ("classification", {"moments": {"size": np.zeros(2)}}, "moments.npz: 0 rows"),
        ("classification", {"moments": {"xx": None}}, "the moments are damaged"),
        ("regression", {"moments": {"x": np.zeros(3), "xx": np.zeros(6), "xy": np.zeros((3, 3))}}, "takes 12 values"),
        ("classification", {"fisher": {"b0": np.zeros(2, np.float32)}}, "fisher.npz: its arrays are not those"),
        ("regression", {"fisher": {"b0": np.array([1, -1, 1], np.float32)}}, "b0 holds numbers that are negative"),
        ("classification", {"memory": {"latents": None}}, "memory.npz lacks latents"),
        ("classification", {"memory": {"latents": np.zeros((120, 12), np.float32)}}, "latents are float32"),
        ("classification", {"memory": {"labels": np.full(120, 3)}}, "not the truth of 120 rows of a classification"),
        ("multilabel", {"memory": {"labels": np.zeros(9, np.uint8)}}, "not the truth of .* rows of a multilabel"),
        ("regression", {"memory": {"labels": np.full((400, 3), np.nan, np.float32)}}, "not the truth of 400 rows"),
        ("classification", {"head": {"labels": np.array(["a", "b", "d"])}}, "head.npz: 12 values for 3 labels"),
    ],
)
def test_what_does_not_fit_the_head_is_named(tmp_path, task, changes, message):
    manifest = filled(tmp_path, task, **changes)
    with pytest.raises(IntegrityError, match=message):
        check_learning(tmp_path, manifest)


# ---- in a checkpoint


@pytest.fixture(scope="module")
def packed(base, spec, tmp_path_factory):
    """Checkpoints of other tasks on the trunk that reads digits; their heads are fitted by least squares."""
    from edge_quantize import Dataset, encode, pack_checkpoint
    from edge_quantize.quantize import Trunks

    data = base.data
    x = {part: dequantize(encode(base.folder, rows, spec=spec), base.manifest.latent)
         for part, rows in (("train", data.train_x), ("holdout", data.holdout_x))}  # fmt: skip

    def truth(task, x, y):
        if task == "multilabel":
            return np.stack([y % 2, y > 3, y == 5], axis=1).astype(np.int64)
        return np.stack([x[:, 0, :4].sum(axis=(1, 2)), 3 * x[:, 0, :, 4:].mean(axis=(1, 2))], axis=1)

    def fit(task, y):
        goal = 8.0 * y - 4.0 if task == "multilabel" else (y - y.mean(axis=0)) / y.std(axis=0)
        w = np.linalg.lstsq(np.c_[x["train"], np.ones(len(y))], goal, rcond=None)[0].astype(np.float32)
        return Head({"W0": w[:-1], "b0": w[-1]}, ("odd", "large", "five") if task == "multilabel" else ("top", "right"))

    folders = {"classification": base.folder}
    for task in ("multilabel", "regression"):
        y = {p: truth(task, *rows) for p, rows in (("train", (data.train_x, data.train_y)),
             ("holdout", (data.holdout_x, data.holdout_y)))}  # fmt: skip
        targets = [TargetSpec(float(m), float(s), float("nan"))
                   for m, s in zip(y["train"].mean(axis=0), y["train"].std(axis=0), strict=True)]  # fmt: skip
        folders[task] = tmp_path_factory.mktemp(task) / "packed"
        pack_checkpoint(
            folders[task], trunks=Trunks.of_checkpoint(base.folder, base.manifest), head=fit(task, y["train"]),
            data=Dataset(data.train_x, y["train"], data.holdout_x, y["holdout"]), input_spec=spec, name=task,
            release=1, created="", task=task, targets=targets if task == "regression" else [],
        )  # fmt: skip
    truths = {"classification": data.holdout_y, **{t: truth(t, data.holdout_x, data.holdout_y) for t in TASKS[1:]}}
    return folders, x["holdout"], truths


@pytest.mark.torch
@pytest.mark.parametrize("task", TASKS)
def test_closed_form_of_the_packed_moments_is_nearly_as_right_as_the_head_on_held_out_rows(packed, task):
    from edge_sdk.manifest import verify_checkpoint

    folders, features, truths = packed
    manifest, head = verify_checkpoint(folders[task]), Head.load(folders[task] / HEAD_NPZ)
    found = closed_form(Moments.load(folders[task] / MOMENTS_NPZ), task)
    again = head.with_last(found.w.astype(np.float32), found.b.astype(np.float32))
    own, other = (rows_right(as_scores(h.logits(features), manifest), truths[task], manifest).mean()
                  for h in (head, again))  # fmt: skip
    assert own > {"classification": 0.9, "multilabel": 0.6, "regression": 0.7}[task]
    assert other > own - 0.03


@pytest.mark.torch
def test_new_head_on_the_same_trunk_gets_moments_of_its_own_rows_and_labels(base, spec, tmp_path):
    from edge_quantize import Dataset, encode, repack_checkpoint

    data = base.data
    flipped = data.train_x[data.train_y == 0][..., ::-1, :]
    more = Dataset(np.concatenate([data.train_x, flipped]), np.r_[data.train_y, np.full(len(flipped), 8)],
                   data.holdout_x, data.holdout_y)  # fmt: skip
    head = Head.load(base.folder / HEAD_NPZ).grown([*map(str, range(8)), "flipped 0"])
    repack_checkpoint(base.folder, tmp_path / "two", head=head, data=more, release=2, created="")
    features = dequantize(encode(base.folder, more.train_x, spec=spec), base.manifest.latent)
    found = Moments.load(tmp_path / "two" / MOMENTS_NPZ)
    same(found, Moments.of(features, more.train_y, np.ones(len(features)), head.labels))


@pytest.mark.torch
def test_card_and_check_tell_of_moments_and_of_their_absence(base, tmp_path):
    from edge_quantize import repack_checkpoint

    card = (base.folder / CARD).read_text()
    assert "1000 training rows go into sums that ship (moments)" in card
    size = base.manifest.files[MOMENTS_NPZ].size
    assert f"moments.npz {size / 1000:.1f} kB" in card
    head = Head.load(base.folder / HEAD_NPZ)
    manifest = repack_checkpoint(base.folder, tmp_path / "two", head=head, data=base.data, release=2, created="",
                                 memory=Memory(moments_bytes=0))  # fmt: skip
    assert MOMENTS_NPZ not in manifest.files
    assert (
        "- no moments ship (of 64 values they take 10656 bytes, moments_bytes is 0): devices take"
        in (tmp_path / "two" / CARD).read_text()
    )


@pytest.mark.torch
def test_checkpoint_whose_parts_do_not_fit_is_never_published(base, tmp_path, monkeypatch):
    from edge_quantize import repack_checkpoint

    def spoilt(head, latents, y, **others):
        start = learning_start(head, latents, y, **others)
        start.files[FISHER_NPZ] = npz_bytes({"W0": np.zeros(3, np.float32)})
        return start

    monkeypatch.setattr("edge_quantize.pack.learning_start", spoilt)
    with pytest.raises(EdgeError, match=r"fisher.npz: its arrays are not those of the head"):
        repack_checkpoint(base.folder, Path(tmp_path / "two"), head=Head.load(base.folder / HEAD_NPZ), data=base.data,
                          release=2, created="")  # fmt: skip
    assert not list(tmp_path.iterdir())
