import shutil

import numpy as np
import onnx
import pytest

from edge_quantize import CalibrationWarning, DataError, Dataset, Memory, encode, pack_checkpoint, repack_checkpoint
from edge_quantize.card import FILL_IN, CardText
from edge_quantize.quantize import Trunks
from edge_sdk.drift.features import feature_names
from edge_sdk.drift.reference import Reference
from edge_sdk.errors import ConfigError, IncompatibleError, IntegrityError, RuntimeUnavailableError
from edge_sdk.files import load_npz
from edge_sdk.head import Head
from edge_sdk.manifest import (
    CARD,
    FISHER_NPZ,
    HEAD_NPZ,
    MANIFEST_NAME,
    MEMORY_NPZ,
    MOMENTS_NPZ,
    REFERENCE_NPZ,
    REQUIRED,
    SELFTEST_NPZ,
    TRUNK_FP32,
    TRUNK_INT8,
    digest_of,
    verify_checkpoint,
)
from edge_sdk.selftest import self_test

pytestmark = pytest.mark.torch


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def copied(base, tmp_path):
    return shutil.copytree(base.folder, tmp_path / "copy")


def repacked(base, target, **changes):
    arguments = {
        "head": Head.load(base.folder / HEAD_NPZ),
        "data": base.data,
        "release": 2,
        "created": "2026-02-01T00:00:00+00:00",
        **changes,
    }
    return repack_checkpoint(base.folder, target, **arguments)


def test_checkpoint_holds_every_file_and_passes_the_devices_own_checks(base):
    assert set(contents(base.folder)) == {*REQUIRED, MOMENTS_NPZ, MANIFEST_NAME}
    manifest = verify_checkpoint(base.folder)
    assert manifest == base.manifest
    for variant in ("int8", "fp32"):
        self_test(base.folder, manifest, variant=variant)
    assert not list(base.folder.parent.glob(".digits-1*"))


def test_same_inputs_give_the_same_bytes(base, build, tmp_path):
    build(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base.folder)


def test_another_seed_gives_other_samples_on_the_same_network(base, build, tmp_path):
    build(tmp_path / "other", seed=1)
    first, second = contents(base.folder), contents(tmp_path / "other")
    assert first[TRUNK_FP32][:200] == second[TRUNK_FP32][:200]
    assert first[MEMORY_NPZ] != second[MEMORY_NPZ]


def test_nothing_in_the_folder_names_a_path_of_the_machine(base):
    for name, data in contents(base.folder).items():
        for trace in (b"/tmp", b"/home", b"site-packages", b".py", str(base.folder.parent).encode()):
            assert trace not in data, (name, trace)


def test_factory_memory_has_forty_of_each_label_and_their_own_latents(base, spec):
    memory = load_npz(base.folder / MEMORY_NPZ)
    assert memory["latents"].dtype == np.uint8
    assert memory["labels"].dtype == np.int64
    assert np.bincount(memory["labels"]).tolist() == [40] * 8
    known = {(row.tobytes(), int(y)) for row, y in zip(encode(base.folder, base.data.train_x, spec=spec),
             base.data.train_y, strict=True)}  # fmt: skip
    assert all((row.tobytes(), int(y)) in known for row, y in zip(memory["latents"], memory["labels"], strict=True))


def test_factory_memory_takes_all_rows_of_a_rare_label(base, tmp_path):
    data = base.data
    keep = np.flatnonzero((data.train_y != 3) | (np.cumsum(data.train_y == 3) <= 11))
    thin = Dataset(data.train_x[keep], data.train_y[keep], data.holdout_x, data.holdout_y)
    repacked(base, tmp_path / "thin", data=thin, memory=Memory(per_class=60))
    counts = np.bincount(load_npz(tmp_path / "thin" / MEMORY_NPZ)["labels"])
    assert counts.tolist() == [60, 60, 60, 11, 60, 60, 60, 60]


def test_factory_memory_beyond_its_bound_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="40 rows a class takes 23040 bytes, max_bytes is 20000"):
        repacked(base, tmp_path / "big", memory=Memory(max_bytes=20_000))
    assert not list(tmp_path.iterdir())


def test_fisher_has_the_heads_shapes_and_is_not_negative(base):
    fisher, head = load_npz(base.folder / FISHER_NPZ), Head.load(base.folder / HEAD_NPZ)
    assert {key: value.shape for key, value in fisher.items()} == {k: v.shape for k, v in head.weights.items()}
    assert all((value >= 0).all() and value.any() for value in fisher.values())


def test_selftest_and_reference_come_from_held_out_rows(base):
    held_out = {row.tobytes() for row in base.data.holdout_x}
    stored = load_npz(base.folder / SELFTEST_NPZ)
    assert len(stored["x"]) == 32
    assert all(row.tobytes() in held_out for row in stored["x"])
    reference = Reference.load(base.folder / REFERENCE_NPZ)
    assert reference.rows == reference.labelled == len(base.data.holdout_y)
    assert reference.accuracy == pytest.approx(base.manifest.metrics["int8_accuracy"])
    assert reference.names == feature_names(base.manifest.input)
    latents = encode(base.folder, base.data.holdout_x, spec=base.manifest.input)
    np.testing.assert_allclose(reference.latent_mean, reference.latent.channels(latents).mean(axis=0))
    assert reference.class_share.sum() == pytest.approx(1)
    assert reference.confidence_table.shape[1] >= 1


def test_card_states_what_was_measured_and_marks_what_a_person_must_fill(base, tmp_path):
    card = (base.folder / CARD).read_text()
    assert card.count(FILL_IN) == 4
    assert "| INT8, label 7 | 1.0" in card or "| INT8, label 7 | 0.9" in card
    text = CardText(data="UCI digits.", intended_use="Tests.", limits="8 x 8 pixels.", contact="The team.")
    repacked(base, tmp_path / "told", card=text)
    told = (tmp_path / "told" / CARD).read_text()
    assert FILL_IN not in told
    assert "UCI digits." in told
    assert base.folder.name not in told


def test_flipped_byte_truncation_absence_and_altered_manifest_are_found(base, tmp_path):
    for name in (*REQUIRED, MOMENTS_NPZ):
        folder = copied(base, tmp_path)
        path, data = folder / name, (folder / name).read_bytes()
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
        with pytest.raises(IntegrityError, match=f"{name} has SHA-256"):
            verify_checkpoint(folder)
        path.write_bytes(data[:-1])
        with pytest.raises(IntegrityError, match=f"{name} has {len(data) - 1} bytes"):
            verify_checkpoint(folder)
        path.unlink()
        with pytest.raises(IntegrityError, match=f"{name} is missing"):
            verify_checkpoint(folder)
        shutil.rmtree(folder)


def test_repack_keeps_the_trunk_and_names_its_parent(base, spec, tmp_path):
    head = Head.load(base.folder / HEAD_NPZ)
    better = Head({**head.weights, "b0": head.weights["b0"] * 0.9}, head.labels)
    manifest = repacked(base, tmp_path / "two", head=better)
    assert manifest.trunk_id == base.manifest.trunk_id
    assert manifest.release == 2
    assert manifest.parent == digest_of((base.folder / MANIFEST_NAME).read_bytes())
    first, second = contents(base.folder), contents(tmp_path / "two")
    assert {name for name in first if first[name] == second[name]} >= {TRUNK_INT8, TRUNK_FP32}
    assert Head.load(tmp_path / "two" / HEAD_NPZ).to_bytes() == better.to_bytes()
    assert np.array_equal(
        encode(base.folder, base.data.holdout_x[:5], spec=spec),
        encode(tmp_path / "two", base.data.holdout_x[:5], spec=spec),
    )


def test_repack_takes_a_head_with_more_labels(base, tmp_path):
    head = Head.load(base.folder / HEAD_NPZ).grown([*map(str, range(8)), "flipped 0"])
    data = base.data
    flipped = data.train_x[data.train_y == 0][..., ::-1, :]
    more = Dataset(
        np.concatenate([data.train_x, flipped]),
        np.concatenate([data.train_y, np.full(len(flipped), 8)]),
        data.holdout_x,
        data.holdout_y,
    )
    manifest = repacked(base, tmp_path / "grown", head=head, data=more)
    assert manifest.labels[-1] == "flipped 0"
    graph = onnx.load(tmp_path / "grown" / "head.onnx").graph
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_param == "classes"


def test_release_must_follow_its_parents(base, tmp_path):
    with pytest.raises(ConfigError, match="release 1 does not follow the parent's release 1"):
        repacked(base, tmp_path / "same", release=1)


def test_repack_on_a_damaged_parent_is_refused(base, tmp_path):
    folder = copied(base, tmp_path)
    (folder / TRUNK_INT8).write_bytes(b"")
    with pytest.raises(IntegrityError, match="0 bytes"):
        repack_checkpoint(
            folder, tmp_path / "two", head=Head.load(folder / HEAD_NPZ), data=base.data, release=2, created=""
        )


def test_existing_target_is_refused_and_left_alone(base, build, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes").write_text("keep")
    for attempt in (lambda: build(target), lambda: repacked(base, target)):
        with pytest.raises(ConfigError, match="mine already exists"):
            attempt()
    assert contents(target) == {"notes": b"keep"}


def test_head_of_another_width_is_refused(base, tmp_path):
    head = Head({"W0": np.zeros((3, 8), np.float32), "b0": np.zeros(8, np.float32)}, tuple("01234567"))
    with pytest.raises(IncompatibleError, match="the head takes 3 values, the trunk puts out 64"):
        repacked(base, tmp_path / "two", head=head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: Dataset(d.train_x, d.train_y, d.holdout_x[:50], d.holdout_y[:50]),
            "at least 200 rows, got 50",
        ),
        (
            lambda d: Dataset(d.train_x, d.train_y[:-1], d.holdout_x, d.holdout_y),
            "one integer for each of 1000 rows",
        ),
        (lambda d: Dataset(d.train_x, d.train_y + 1, d.holdout_x, d.holdout_y), "y runs from 1 to 8"),
        (lambda d: Dataset(d.train_x, d.train_y % 7, d.holdout_x, d.holdout_y), "no rows with label '7'"),
        (
            lambda d: Dataset(d.train_x[:, 0], d.train_y, d.holdout_x, d.holdout_y),
            "train: input 'input': expected shape",
        ),
        (
            lambda d: Dataset(d.train_x, d.train_y, d.holdout_x * 2, d.holdout_y),
            "holdout: .* is the unit right",
        ),
        (
            lambda d: Dataset(d.train_x, d.train_y, d.holdout_x, d.holdout_y, d.train_x[:5]),
            "at least 16 rows",
        ),
    ],
)
def test_unusable_rows_are_refused_by_split_and_reason(base, build, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        build(tmp_path / "none", data=change(base.data))
    assert not list(tmp_path.iterdir())


def test_labels_must_match_the_networks_outputs(base, build, tmp_path):
    data = base.data
    few = Dataset(data.train_x, data.train_y % 4, data.holdout_x, data.holdout_y % 4)
    with pytest.raises(ConfigError, match="8 outputs, there are 4 labels"):
        build(tmp_path / "none", data=few, labels=tuple("0123"))


def test_labels_must_differ(base, build, tmp_path):
    with pytest.raises(ConfigError, match="labels must differ: '1' appears more than once"):
        build(tmp_path / "none", labels=("0", "1", "1", "3", "4", "5", "6", "7"))


def test_failure_while_packing_leaves_nothing_behind(base, tmp_path):
    trunks = Trunks(b"no onnx", b"no onnx", base.manifest.latent)
    with pytest.raises(RuntimeUnavailableError, match="refuses"):
        pack_checkpoint(
            tmp_path / "none",
            trunks=trunks,
            head=Head.load(base.folder / HEAD_NPZ),
            data=base.data,
            input_spec=base.manifest.input,
            name="digits",
            release=1,
            created="",
        )
    assert not list(tmp_path.iterdir())


def test_release_calibrated_on_wrong_rows_packs_but_its_figures_tell(base, build, tmp_path):
    data = base.data
    dark = Dataset(data.train_x, data.train_y, data.holdout_x, data.holdout_y, data.train_x * np.float32(0.02))
    with pytest.warns(CalibrationWarning, match="of the latent's values lie outside its range"):
        result = build(tmp_path / "bad", data=dark, release=3, parent=base.folder)
    assert result.manifest.metrics["int8_accuracy"] < base.manifest.metrics["int8_accuracy"] - 0.2
    verify_checkpoint(tmp_path / "bad")


def test_few_calibration_rows_are_warned_of(base, build, tmp_path):
    data = base.data
    few = Dataset(data.train_x, data.train_y, data.holdout_x, data.holdout_y, data.train_x[:30])
    with pytest.warns(CalibrationWarning, match="30 rows"):
        build(tmp_path / "few", data=few)
