"""A file of samples in, a file of predictions out: nothing lost, nothing doubled, whatever happens in between."""

import csv
import json
import os
import pty
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from edge_sdk import batch
from edge_sdk.batch import score
from edge_sdk.cli import main
from edge_sdk.errors import (
    ConfigError,
    DtypeError,
    IncompatibleError,
    InputError,
    MissingExtraError,
    ModelError,
    SelfTestError,
    ShapeError,
    StoreError,
)
from edge_sdk.files import replace_file, set_crash_hook
from edge_sdk.head import Head
from edge_sdk.installed import from_home, load
from edge_sdk.manifest import Manifest, StateSpec, TargetSpec
from edge_sdk.model import Ran, SplitModel
from edge_sdk.schema import Column, Impute, InputSpec, Resize
from edge_sdk.serving import Served
from edge_sdk.slots import Slots, Version

ENDINGS = (".csv", ".jsonl", ".parquet")
TABULAR = InputSpec(
    shape=[3],
    columns=[Column("size"), Column("colour", "category", ["red", "blue"]), Column("note", "text", buckets=8)],
    low=-100,
    high=100,
    preprocess=[Impute([0.0])],
)


class PowerCutError(BaseException):
    pass


class Scorer:
    """A model with arithmetic of its own: what comes out depends on the row alone."""

    def __init__(self, spec=None, *, task="classification", release=3, labels=("a", "b", "c"), **more):
        spec = spec or InputSpec(shape=[2], low=-100, high=100)
        more.setdefault("thresholds", [0.3, 0.9, 0.4] if task == "multilabel" else [])
        more.setdefault("targets", [TargetSpec(0, 1, 0.1)] * len(labels) if task == "regression" else [])
        self.manifest = Manifest(
            name="arithmetic", release=release, created="2026-01-01T00:00:00Z", task=task, labels=list(labels),
            input=spec, files={}, **more,
        )  # fmt: skip
        self.batches = []

    def run(self, x):
        self.batches.append(len(x))
        if (x.reshape(len(x), -1)[:, 0] == 66).any():
            raise ModelError("the model put out NaN")
        sums = np.nan_to_num(self.manifest.input.apply(x).reshape(len(x), -1)).sum(axis=1, dtype=np.float32)
        scores = np.sin(sums[:, None] * np.arange(1, 4, dtype=np.float32)) + 2
        return outputs_of(self.manifest.task, scores.astype(np.float32))


def outputs_of(task, scores):
    """What `Served.run` would give."""
    if task == "classification":
        scores = scores / scores.sum(axis=1, keepdims=True)
    if task == "multilabel":
        scores = scores / 4
    outputs = [{"first": row, "second": row[0]} for row in scores] if task == "raw" else ()
    return Ran(np.zeros((len(scores), 0), np.uint8), scores, outputs)


def read(path):
    """The table as dicts, with None for what is not there."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    with path.open(newline="") as file:
        return [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]


def write_csv(path, rows, header=("x", "y")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def crash_hook():
    yield set_crash_hook
    set_crash_hook(None)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(batch, "CHUNK_BATCHES", 2)


@pytest.fixture
def rows_npy(tmp_path, rng):
    path = tmp_path / "rows.npy"
    x = rng.normal(size=(23, 2)).astype(np.float32)
    x[4, 1], x[5, 0], x[17, 0] = np.nan, 1000, 66  # NaN, out of range, and what makes the model fail
    np.save(path, x)
    return path


# ---- what is written


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_row_gets_its_prediction_in_order(tmp_path, rng, ending):
    x = rng.normal(size=(70, 2)).astype(np.float32)
    np.save(tmp_path / "rows.npy", x)
    scorer, out = Scorer(), tmp_path / f"out{ending}"
    summary = score(scorer, tmp_path / "rows.npy", out, batch=32)
    expected = scorer.run(x).scores
    found = read(out)
    assert (summary.rows, summary.refused, summary.resumed) == (70, {}, 0)
    assert scorer.batches[:3] == [32, 32, 6]
    assert list(found[0]) == ["row", "label", "probability", "p_a", "p_b", "p_c", "error", "release", "head"]
    assert [int(row["row"]) for row in found] == list(range(70))
    assert [row["label"] for row in found] == ["abc"[i] for i in expected.argmax(axis=1)]
    probabilities = np.array([[row["p_a"], row["p_b"], row["p_c"]] for row in found], dtype=np.float32)
    assert np.array_equal(probabilities, expected)  # the decimals give the same float32 again
    assert [np.float32(row["probability"]) for row in found] == expected.max(axis=1).tolist()
    assert {(row["error"], int(row["release"]), int(row["head"])) for row in found} == {(None, 3, 0)}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["rows.npy", out.name])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_multilabel_model_says_which_labels_are_present(tmp_path, ending):
    np.save(tmp_path / "rows.npy", np.array([[0, 0], [1, 0.5]], np.float32))
    scorer, out = Scorer(task="multilabel"), tmp_path / f"out{ending}"
    score(scorer, tmp_path / "rows.npy", out)
    found = read(out)
    assert found[0]["present"] == ('["a","c"]' if ending == ".csv" else ["a", "c"])  # 0.5 each; thresholds 0.3 0.9 0.4
    assert found[1]["label"] == "a"


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_regression_gives_a_value_for_each_target(tmp_path, ending):
    np.save(tmp_path / "rows.npy", np.zeros((1, 2), np.float32))
    out = tmp_path / f"out{ending}"
    score(Scorer(task="regression", labels=("u", "v", "w")), tmp_path / "rows.npy", out)
    assert list(read(out)[0]) == ["row", "values_u", "values_v", "values_w", "error", "release", "head"]
    assert [float(read(out)[0][f"values_{name}"]) for name in "uvw"] == [2, 2, 2]


def test_a_raw_model_puts_its_outputs_into_json_lines_alone(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((2, 2), np.float32))
    scorer = Scorer(task="raw", labels=(), adapt="none")
    score(scorer, tmp_path / "rows.npy", tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")[1]["outputs"] == {"first": [2.0, 2.0, 2.0], "second": 2.0}
    with pytest.raises(ConfigError, match=r"name the output \.jsonl"):
        score(scorer, tmp_path / "rows.npy", tmp_path / "out.csv")


def test_a_model_with_state_or_several_inputs_is_not_scored_in_batches(tmp_path):
    spec = InputSpec(shape=[1])
    for more in ({"state": [StateSpec("h", "h_out", [1, 4])]}, {"more_inputs": [spec]}):
        with pytest.raises(IncompatibleError, match="several inputs or a state"):
            score(Scorer(adapt="none", **more), tmp_path / "rows.npy", tmp_path / "out.csv")


# ---- rows that are wrong


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_bad_row_has_an_error_and_stops_nothing(tmp_path, rows_npy, ending):
    out = tmp_path / f"out{ending}"
    summary = score(Scorer(), rows_npy, out, batch=8)
    assert summary.refused == {"ModelError": 1, "NonFiniteError": 1, "RangeError": 1}
    found = read(out)
    assert found[4]["error"].startswith("NonFiniteError: input 'input': nan")
    assert found[5]["error"].startswith("RangeError: input 'input': values from")
    assert found[17]["error"] == "ModelError: the model put out NaN"
    for i, row in enumerate(found):
        assert (row["error"] is None) == (row["label"] is not None) == (row["p_b"] is not None), i
    good = np.delete(np.load(rows_npy), [4, 5, 17], axis=0)
    labels = ["abc"[i] for i in Scorer().run(good).scores.argmax(axis=1)]
    assert [row["label"] for row in found if row["error"] is None] == labels


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    kinds=st.lists(st.sampled_from(["good", "nan", "range", "model"]), min_size=1, max_size=40),
    size=st.integers(1, 12),
)
def test_whatever_rows_are_bad_the_others_are_predicted_as_if_alone(tmp_path, kinds, size):
    first = {"good": 1.5, "nan": np.nan, "range": 500, "model": 66}
    x = np.array([[first[kind], i] for i, kind in enumerate(kinds)], dtype=np.float32)
    np.save(tmp_path / "rows.npy", x)
    summary = score(Scorer(), tmp_path / "rows.npy", tmp_path / "out.jsonl", batch=size)
    found = read(tmp_path / "out.jsonl")
    assert sum(summary.refused.values()) == sum(kind != "good" for kind in kinds)
    for row, kind, sample in zip(found, kinds, x, strict=True):
        assert (row["error"] is None) == (kind == "good")
        if kind == "good":
            assert np.array_equal(
                np.float32([row["p_a"], row["p_b"], row["p_c"]]), Scorer().run(sample[None]).scores[0]
            )


# ---- CSV


def test_columns_are_found_by_name_and_further_ones_left_out(tmp_path):
    path = write_csv(
        tmp_path / "rows.csv",
        [["k1", "blue", "hello", 7, "3.5"], ["k2", "", "", 7, ""], ["k1", "pink", "grün", 7, "x"]],
        header=["key", "colour", "note", "extra", "size"],
    )
    scorer = Scorer(TABULAR)
    summary = score(scorer, path, tmp_path / "out.jsonl", id_column="key")
    found = read(tmp_path / "out.jsonl")
    assert summary.left_out == ("extra",)
    assert [row["id"] for row in found] == ["k1", "k2", "k1"]  # an id may come twice
    assert "row" not in found[0]
    expected = scorer.run(np.array([[3.5, 1, zlib.crc32(b"hello") % 8], [np.nan] * 3], dtype=np.float32)).scores
    assert np.array_equal(np.float32([[row["p_a"], row["p_b"], row["p_c"]] for row in found[:2]]), expected)
    assert found[2]["error"] == "DtypeError: column 'size': expected a number, got 'x'"


def test_a_missing_column_is_named(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [[1, 2]], header=["size", "color"])
    with pytest.raises(ShapeError, match=r"rows\.csv lacks column 'colour', 'note'; the model takes 'size'"):
        score(Scorer(TABULAR), path, tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="has no column 'key' to take ids from; it has 'size', 'color'"):
        score(Scorer(TABULAR), path, tmp_path / "out.csv", id_column="key")
    with pytest.raises(ShapeError, match=r"has 1 columns of values; the model takes 2, for shape \[2\]"):
        score(Scorer(), path, tmp_path / "out.csv", id_column="size")
    twice = write_csv(tmp_path / "twice.csv", [], header=["size", "size", "colour", "note"])
    with pytest.raises(ShapeError, match="has column 'size' more than once"):
        score(Scorer(TABULAR), twice, tmp_path / "out.csv")
    assert not list(tmp_path.glob("out.*"))


def test_without_names_in_the_contract_the_first_columns_make_the_shape(tmp_path):
    spec = InputSpec(shape=[2, 2])
    path = write_csv(tmp_path / "rows.csv", [[1, "id", 2, 3, 4, 99]], header=["a", "key", "b", "c", "d", "truth"])
    scorer = Scorer(spec)
    summary = score(scorer, path, tmp_path / "out.jsonl", id_column="key")
    assert summary.left_out == ("truth",)
    expected = scorer.run(np.array([[[1, 2], [3, 4]]], np.float32)).scores[0]
    assert np.float32(read(tmp_path / "out.jsonl")[0]["p_a"]) == expected[0]


def test_whole_numbers_keep_all_their_digits(tmp_path):
    seen = []
    scorer = Scorer(InputSpec(shape=[1], dtype="int64"))
    scorer.run = lambda x: seen.append(x) or outputs_of("classification", np.ones((len(x), 3), np.float32))
    path = write_csv(tmp_path / "rows.csv", [[2**53 + 1], [1.5], [""]], header=["n"])
    assert score(scorer, path, tmp_path / "out.csv").refused == {"DtypeError": 1, "NonFiniteError": 1}
    assert (seen[0].dtype, seen[0].tolist()) == (np.int64, [[2**53 + 1]])


def test_lines_that_are_no_rows_of_the_table_have_an_error(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfsize,colour,note\r\n1,red,x\r\n\r\n1,red\r\n1,red,\xff\xfe\r\n"
        b'2,blue,"two\nlines"\r\n3,red,' + b"n" * 140_000 + b"\r\n4,red,end\r\n"
    )
    score(Scorer(TABULAR), path, tmp_path / "out.jsonl")
    errors = [row["error"] for row in read(tmp_path / "out.jsonl")]
    assert errors == [
        None,
        "ShapeError: 2 fields where the header has 3",
        "InputError: column 'note': the text is not UTF-8",
        None,
        "InputError: the line is not CSV: field larger than field limit (131072)",
        None,
    ]


def test_ids_that_are_not_utf8_are_made_printable(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"key,x,y\n\xff,1,2\n")
    for ending in ENDINGS:
        score(Scorer(), path, tmp_path / f"out{ending}", id_column="key")
        assert read(tmp_path / f"out{ending}")[0]["id"] == "\\udcff"


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_without_rows_gives_a_table_without_rows(tmp_path, ending):
    np.save(tmp_path / "none.npy", np.zeros((0, 2), np.float32))
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 2), np.float32))
    parquet.write_table(
        pa.table({"x": pa.array([], pa.float32()), "y": pa.array([], pa.float32())}), tmp_path / "none.parquet"
    )
    for source in (
        write_csv(tmp_path / "none.csv", []),
        *(tmp_path / f"none.{kind}" for kind in ("npy", "npz", "parquet")),
    ):
        out = tmp_path / f"out{ending}"
        assert score(Scorer(), source, out).rows == 0
        assert read(out) == []
        if ending == ".csv":
            assert out.read_text().startswith("row,label,")


def test_a_file_without_a_header_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"")
    with pytest.raises(ShapeError, match="is empty; expected a header"):
        score(Scorer(), tmp_path / "rows.csv", tmp_path / "out.csv")


# ---- Parquet


def test_parquet_gives_what_the_same_csv_gives(tmp_path, rng):
    rows = [[f"k{i}", float(v), ["red", "blue", None][i % 3], "text"] for i, v in enumerate(rng.normal(size=50))]
    header = ["key", "size", "colour", "note"]
    write_csv(tmp_path / "rows.csv", rows, header)
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(header)})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    for kind in ("csv", "parquet"):
        score(Scorer(TABULAR), tmp_path / f"rows.{kind}", tmp_path / f"out-{kind}.csv", batch=4, id_column="key")
    assert (tmp_path / "out-csv.csv").read_bytes() == (tmp_path / "out-parquet.csv").read_bytes()


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20, 21, 30])
def test_parquet_is_read_from_any_row_on(tmp_path, start):
    from edge_sdk.rows import open_source

    table = pa.table({"x": np.arange(30, dtype=np.float32), "y": np.zeros(30, np.float32)})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    source = open_source(tmp_path / "rows.parquet", InputSpec(shape=[2]))
    found = [row for rows, _ in source.batches(start, 4) for row in rows]
    assert [row.name for row in found] == list(range(start, 30))
    assert [row.value[0] for row in found] == list(range(start, 30))


def test_a_column_of_lists_holds_samples(tmp_path):
    samples = [[1.0, 2.0, 3.0, 4.0], [1.0], None]
    parquet.write_table(pa.table({"when": [1, 2, 3], "image": samples}), tmp_path / "rows.parquet")
    scorer = Scorer(InputSpec(shape=[2, 2]))
    summary = score(scorer, tmp_path / "rows.parquet", tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert summary.left_out == ("when",)
    assert np.float32(found[0]["p_a"]) == scorer.run(np.array([[[1, 2], [3, 4]]], np.float32)).scores[0, 0]
    assert [row["error"].split(":")[0] for row in found[1:]] == ["ShapeError", "DtypeError"]


def test_values_that_are_no_numbers_are_refused_row_by_row(tmp_path):
    parquet.write_table(pa.table({"x": ["1", "b", None], "y": [1, 2, 3]}), tmp_path / "rows.parquet")
    score(Scorer(), tmp_path / "rows.parquet", tmp_path / "out.jsonl")
    errors = [row["error"] for row in read(tmp_path / "out.jsonl")]
    assert errors[0] is None
    assert errors[1] == "DtypeError: column 'x': expected a number, got 'b'"
    assert errors[2].startswith("NonFiniteError")


# ---- arrays and folders


def test_npz_gives_what_npy_gives(tmp_path, rows_npy):
    x = np.load(rows_npy)
    np.savez_compressed(tmp_path / "rows.npz", other=np.zeros(3), x=x)
    np.savez(tmp_path / "one.npz", whatever=x.astype(np.float64))
    for source in (rows_npy, tmp_path / "rows.npz", tmp_path / "one.npz"):
        score(Scorer(), source, tmp_path / f"{source.name}.csv", batch=8)
    first = (tmp_path / "rows.npy.csv").read_bytes()
    assert first == (tmp_path / "rows.npz.csv").read_bytes() == (tmp_path / "one.npz.csv").read_bytes()


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((4, 3)), ShapeError, r"has shape \(4, 3\); expected \(N, 2\), the samples stacked"),
        (np.zeros(2), ShapeError, r"give one sample as shape \(1, 2\)"),
        (np.array([["a", "b"]]), DtypeError, "expected numbers"),
        (np.array([[None, 1]]), InputError, "is not a readable|holds object; expected numbers"),
    ],
)
def test_an_array_that_cannot_be_right_is_refused_as_a_whole(tmp_path, array, error, message):
    np.save(tmp_path / "rows.npy", array, allow_pickle=True)
    np.savez(tmp_path / "rows.npz", x=array)
    for name in ("rows.npy", "rows.npz"):
        with pytest.raises(error, match=message):
            score(Scorer(), tmp_path / name, tmp_path / "out.csv")


def test_an_npz_must_say_which_array_is_meant(tmp_path):
    np.savez(tmp_path / "rows.npz", a=np.zeros((1, 2)), b=np.zeros((1, 2)))
    with pytest.raises(ShapeError, match="holds 'a', 'b'; expected an array named 'input' or 'x'"):
        score(Scorer(), tmp_path / "rows.npz", tmp_path / "out.csv")
    np.savez(tmp_path / "rows.npz", x=np.asfortranarray(np.zeros((3, 2))))
    with pytest.raises(InputError, match="column by column"):
        score(Scorer(), tmp_path / "rows.npz", tmp_path / "out.csv")


@pytest.mark.parametrize("name", ["rows.npy", "rows.npz", "rows.parquet"])
def test_a_file_that_is_damaged_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x93NUMPYrubbish" * 3)
    with pytest.raises(InputError, match=name):
        score(Scorer(), tmp_path / name, tmp_path / "out.csv")


def test_an_npz_that_ends_early_is_refused_after_the_rows_that_are_there(tmp_path, small_chunks, rng):
    x = rng.normal(size=(4000, 2)).astype(np.float32)
    np.savez_compressed(tmp_path / "rows.npz", x=x)
    data = bytearray((tmp_path / "rows.npz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (tmp_path / "rows.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"rows\.npz is damaged"):
        score(Scorer(), tmp_path / "rows.npz", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_folder_of_arrays_is_read_by_name_and_its_bad_files_have_an_error(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    np.save(folder / "b.npy", np.array([1, 2], np.float32))
    np.save(folder / "a.npy", np.array([3, 4], np.float64))
    np.save(folder / "c.npy", np.array([1, 2, 3], np.float32))
    (folder / "d.npy").write_bytes(b"rubbish")
    np.savez(folder / "e", x=np.zeros(2))
    (folder / "e.npz").rename(folder / "e.npy")
    (folder / "readme.txt").write_text("not a sample")
    score(Scorer(), folder, tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == ["a.npy", "b.npy", "c.npy", "d.npy", "e.npy"]
    assert [row["error"] and row["error"].split(":")[0] for row in found] == [
        None, None, "ShapeError", "InputError", "InputError",
    ]  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "out.jsonl").read_text()


def test_samples_of_any_size_need_not_be_of_the_same(tmp_path, rng):
    folder = tmp_path / "samples"
    folder.mkdir()
    sizes = [4, 6, 4, 9]
    for i, size in enumerate(sizes):
        np.save(folder / f"{i}.npy", rng.random((1, size, size), dtype=np.float32))
    scorer = Scorer(InputSpec(shape=[1, -1, -1], preprocess=[Resize(2, 2)]))
    score(scorer, folder, tmp_path / "out.jsonl")
    assert scorer.batches == [2, 1, 1]
    for i, row in enumerate(read(tmp_path / "out.jsonl")):
        assert np.float32(row["p_a"]) == scorer.run(np.load(folder / f"{i}.npy")[None]).scores[0, 0]


@pytest.mark.parametrize(
    ("spec", "mode", "layout"),
    [
        (InputSpec(shape=[3, 4, 5]), "RGB", (2, 0, 1)),
        (InputSpec(shape=[4, 5, 3], dtype="uint8"), "RGB", None),
        (InputSpec(shape=[4, 4, 5]), "RGBA", (2, 0, 1)),
        (InputSpec(shape=[-1, -1, 3], dtype="uint8"), "RGB", None),
        (InputSpec(shape=[4, 5]), "L", None),
        (InputSpec(shape=[1, 4, 5], low=0, high=1), "L", None),
    ],
)
def test_images_are_decoded_into_the_shape_of_the_contract(tmp_path, rng, spec, mode, layout):
    folder, seen = tmp_path / "images", []
    folder.mkdir()
    pixels = rng.integers(0, 256, (4, 5, len(mode)), dtype=np.uint8).squeeze()
    Image.fromarray(pixels).save(folder / "one.png")
    scorer = Scorer(spec)
    scorer.run = lambda x: seen.append(x) or outputs_of("classification", np.ones((len(x), 3), np.float32))
    score(scorer, folder, tmp_path / "out.csv")
    expected = pixels.transpose(layout) if layout else pixels.reshape(seen[0].shape[1:])
    expected = expected.astype(np.float32) / 255 if spec.high == 1 else expected
    assert np.array_equal(seen[0][0], expected)
    assert seen[0].dtype == spec.dtype


def test_images_that_cannot_be_right_have_an_error(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (5, 4)).save(folder / "a.jpg")
    Image.new("RGB", (6, 4)).save(folder / "b.PNG")
    Image.new("I;16", (5, 4)).save(folder / "c.png")
    (folder / "d.jpeg").write_bytes(b"\xff\xd8\xffrubbish")
    score(Scorer(InputSpec(shape=[3, 4, 5])), folder, tmp_path / "out.jsonl")
    errors = [row["error"] for row in read(tmp_path / "out.jsonl")]
    assert errors[0] is None
    assert errors[1] == "ShapeError: input 'input': expected shape (N, 3, 4, 5), got (1, 3, 4, 6)"
    assert errors[2] == "DtypeError: the image has mode I;16; expected 8 bits a channel"
    assert errors[3].startswith("InputError: the file cannot be read: cannot identify image file")
    score(Scorer(InputSpec(shape=[7])), folder, tmp_path / "other.jsonl")
    assert "no image of 1, 3 or 4 channels" in read(tmp_path / "other.jsonl")[0]["error"]


# ---- what is refused before anything is written


def test_names_that_do_not_fit_are_refused(tmp_path, rows_npy):
    for source, out, message in [
        (rows_npy, "out.xlsx", r"the output ends in \.csv, \.jsonl or \.parquet"),
        (rows_npy, "none/out.csv", "there is no folder"),
        (tmp_path / "rows.txt", "out.csv", r"expected \.csv, \.parquet, \.npy, \.npz or a folder"),
        (write_csv(tmp_path / "rows.csv", []), "rows.csv", "both input and output"),
    ]:
        with pytest.raises(ConfigError, match=message):
            score(Scorer(), source, tmp_path / out)
    with pytest.raises(ConfigError, match="has no columns, so none named 'key'"):
        score(Scorer(), rows_npy, tmp_path / "out.csv", id_column="key")
    with pytest.raises(ConfigError, match="at least one sample, not 0"):
        score(Scorer(), rows_npy, tmp_path / "out.csv", batch=0)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        score(Scorer(), tmp_path / "none.npy", tmp_path / "out.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no file ending in \.npy, \.png"):
        score(Scorer(), tmp_path / "empty", tmp_path / "out.csv")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("absent", "source", "out", "extra"),
    [
        ("pyarrow", "rows.parquet", "out.csv", "parquet"),
        ("pyarrow", "rows.npy", "out.parquet", "parquet"),
        ("PIL", "images", "out.csv", "images"),
    ],
)
def test_a_base_install_names_the_extra(tmp_path, rows_npy, monkeypatch, absent, source, out, extra):
    parquet.write_table(pa.table({"x": [1.0], "y": [1.0]}), tmp_path / "rows.parquet")
    (tmp_path / "images").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "images" / "one.png")
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'edge-sdk\[{extra}\]'"):
        score(Scorer(), tmp_path / source, tmp_path / out)


# ---- killed and resumed


def killed_at(count, run, crash_hook):
    """Run until crash point number `count`. Returns whether the power was cut; else the run was complete."""
    left = count

    def cut(_name):
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    crash_hook(cut)
    try:
        run()
    except PowerCutError:
        return True
    finally:
        crash_hook(None)
    return False


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_killed_at_any_instant_is_continued_to_the_same_bytes(
    tmp_path, rows_npy, ending, crash_hook, small_chunks
):
    whole = tmp_path / f"whole{ending}"
    expected = score(Scorer(), rows_npy, whole, batch=3)
    instant, resumed = 0, set()
    while True:
        out = tmp_path / f"out-{instant}{ending}"
        if not killed_at(instant, lambda: score(Scorer(), rows_npy, out, batch=3), crash_hook):  # noqa: B023
            break
        summary = score(Scorer(), rows_npy, out, batch=3)
        resumed.add(summary.resumed)
        assert out.read_bytes() == whole.read_bytes(), instant
        assert (summary.rows, summary.refused) == (expected.rows, expected.refused), instant
        assert [file.name for file in tmp_path.glob(f"out-{instant}.*")] == [out.name]
        instant += 1
    assert resumed == {0, 6, 12, 18, 23}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path, rows_npy, crash_hook, small_chunks, data):
    size, ending = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(ENDINGS))
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    score(Scorer(), rows_npy, whole, batch=size)
    out.unlink(missing_ok=True)
    for count in data.draw(st.lists(st.integers(0, 12), max_size=6)):
        killed_at(count, lambda: score(Scorer(), rows_npy, out, batch=size), crash_hook)
    score(Scorer(), rows_npy, out, batch=size)
    assert out.read_bytes() == whole.read_bytes()


def test_what_was_written_after_the_last_record_is_written_once(tmp_path, rows_npy, crash_hook, small_chunks):
    out = tmp_path / "out.csv"
    assert killed_at(3, lambda: score(Scorer(), rows_npy, out, batch=3), crash_hook)
    with (tmp_path / "out.csv.part").open("ab") as file:
        file.write(b"half a li")
    scorer = Scorer()
    assert score(scorer, rows_npy, out, batch=3).resumed == 6
    assert scorer.batches[0] == 3
    assert [int(row["row"]) for row in read(out)] == list(range(23))


def test_a_run_begun_differently_is_not_continued_unless_restarted(tmp_path, rows_npy, crash_hook, small_chunks):
    out, other = tmp_path / "out.csv", tmp_path / "other"
    killed_at(3, lambda: score(Scorer(), rows_npy, out, batch=3), crash_hook)
    other.mkdir()
    np.save(other / "rows.npy", np.zeros((5, 2), np.float32))
    for change, what in [
        (lambda **k: score(Scorer(), other / "rows.npy", out, batch=3, **k), "input was rows.npy"),
        (lambda **k: score(Scorer(release=4), rows_npy, out, batch=3, **k), "model was release 3"),
        (lambda **k: score(Scorer(), rows_npy, out, batch=4, **k), "settings was batch 3"),
    ]:
        with pytest.raises(ConfigError, match=rf"out\.csv\.part was begun differently: {what}.*--restart"):
            change()
    assert score(Scorer(), rows_npy, out, batch=3).resumed == 6  # nothing was lost by asking
    killed_at(3, lambda: score(Scorer(), rows_npy, out, batch=3), crash_hook)
    assert score(Scorer(), other / "rows.npy", out, restart=True).rows == 5
    assert len(read(out)) == 5


def test_a_head_learned_meanwhile_is_another_model(tmp_path, rows_npy, crash_hook, small_chunks):
    def with_head(weight):
        scorer = Scorer()
        head = Head({"W0": np.full((1, 3), weight, np.float32), "b0": np.zeros(3, np.float32)}, ("a", "b", "c"))
        model = SplitModel(None, SimpleNamespace(head=head))
        model.run = lambda x, _more: scorer.run(x)
        return Served(Version("a", 3, "", 7), scorer.manifest, "int8", model, head.labels)

    killed_at(3, lambda: score(with_head(1), rows_npy, tmp_path / "out.csv", batch=3), crash_hook)
    with pytest.raises(ConfigError, match="model was"):
        score(with_head(2), rows_npy, tmp_path / "out.csv", batch=3)


def test_an_input_that_changes_while_it_is_read_gives_no_output(tmp_path, small_chunks):
    path = write_csv(tmp_path / "rows.csv", [[i, i] for i in range(20)])

    def append(done, total):
        if done < total:
            with path.open("a") as file:
                file.write("1,1\n")

    with pytest.raises(InputError, match="was changed while it was read"):
        score(Scorer(), path, tmp_path / "out.csv", batch=2, progress=append)
    assert not (tmp_path / "out.csv").exists()


def test_a_finished_run_is_done_again_from_the_start(tmp_path, rows_npy):
    out = tmp_path / "out.csv"
    score(Scorer(), rows_npy, out)
    scorer = Scorer(release=9)
    assert score(scorer, rows_npy, out, batch=5).resumed == 0
    assert read(out)[0]["release"] == "9"


def test_two_processes_cannot_write_the_same_output(tmp_path, rows_npy):
    seen = []

    def again(*_):
        with pytest.raises(StoreError, match="being written by another process"):
            score(Scorer(), rows_npy, tmp_path / "out.csv")
        seen.append(1)

    score(Scorer(), rows_npy, tmp_path / "out.csv", progress=again)
    assert seen


def test_a_record_or_part_that_is_damaged_is_not_trusted(tmp_path, rows_npy, crash_hook, small_chunks):
    out = tmp_path / "out.csv"
    killed_at(3, lambda: score(Scorer(), rows_npy, out, batch=3), crash_hook)
    (tmp_path / "out.csv.part").write_bytes(b"x")
    with pytest.raises(StoreError, match="shorter than its record says"):
        score(Scorer(), rows_npy, out, batch=3)
    (tmp_path / "out.csv.progress").write_bytes(b"{")
    with pytest.raises(ConfigError, match="is damaged; pass --restart"):
        score(Scorer(), rows_npy, out, batch=3)
    assert score(Scorer(), rows_npy, out, batch=3, restart=True).rows == 23


def test_progress_tells_how_much_is_read(tmp_path, rows_npy):
    seen = []
    score(Scorer(), rows_npy, tmp_path / "out.csv", batch=10, progress=lambda *at: seen.append(at))
    assert seen == [(10, 23), (20, 23), (23, 23)]
    path = write_csv(tmp_path / "rows.csv", [[i, i] for i in range(9)])
    score(Scorer(), path, tmp_path / "out.csv", batch=4, progress=lambda *at: seen.append(at))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_memory_does_not_grow_with_the_file(tmp_path):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_batch import Scorer
from edge_sdk.batch import score
score(Scorer(), Path(sys.argv[2]), Path(sys.argv[3]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    used = {}
    for rows in (2_000, 100_000):
        path = tmp_path / f"{rows}.csv"
        with path.open("w") as file:
            file.write("x,y,rest\n" + f"1.5,2.5,{'z' * 300}\n" * rows)
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent), str(path), str(tmp_path / f"{rows}.out.csv")],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        used[rows] = int(done.stdout)
    assert used[100_000] < used[2_000] + 8_000  # kB; the larger file has 31 MB


# ---- beside a device


def edge(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def life_npy(tmp_path, digits):
    np.save(tmp_path / "life.npy", digits.life.x[:100])
    return tmp_path / "life.npy"


@pytest.mark.torch
def test_scoring_beside_a_running_device_gives_its_predictions_and_leaves_no_trace(
    tmp_path, make_device, digits, life_npy
):
    device = make_device()
    slots = device._slots
    head = slots.head(slots.pointer.current).grown([*"01234567", "8"])
    slots.promote(slots.write_head(slots.pointer.current.slot, head))
    device.step()
    device.step()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "device").rglob("*")}
    result = edge("predict", "--home", tmp_path / "device", "--variant", "int8", "--input", life_npy,
                  "--output", tmp_path / "out.jsonl", "--batch", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "out.jsonl: 100 rows" in result.output
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "device").rglob("*")}
    assert device.status().counters.predictions == 0
    for row, x in zip(read(tmp_path / "out.jsonl"), digits.life.x, strict=False):
        said = device.predict(x)
        assert (row["label"], row["release"], row["head"]) == (said.label, said.release, said.head)
        assert np.array_equal(np.float32([row[f"p_{label}"] for label in said.labels]), said.probabilities)
    assert row["head"] == 1
    assert "p_8" in row


@pytest.mark.torch
def test_a_version_that_is_deleted_while_it_is_read_is_read_anew(make_device, tmp_path):
    device = make_device()
    device.stop()
    slots = Slots(tmp_path / "device" / "slots")
    slot = slots.pointer.current.slot

    def learn():
        head = slots.head(slots.pointer.current)
        slots.promote(slots.write_head(slot, head))
        slots.collect_garbage()

    learn()
    tried = []

    def use(slots_seen, version, variant):
        tried.append(version.head)
        if len(tried) == 1:
            learn()
            learn()  # now the one that is being read is gone
        return load(slots_seen, version, variant)

    served = from_home(tmp_path / "device", "int8", use)
    assert tried == [1, 3]
    assert served.version.head == 3


@pytest.mark.torch
def test_a_slot_that_is_replaced_while_it_is_read_is_read_anew(make_device, tmp_path, build):
    device = make_device()
    device.stop()
    slots = Slots(tmp_path / "device" / "slots")

    def install(folder):
        from edge_sdk.manifest import MANIFEST_NAME, digest_of, parse_manifest
        from edge_sdk.slots import Version

        data = (folder / MANIFEST_NAME).read_bytes()
        sources = {entry.sha256: folder / name for name, entry in parse_manifest(data).files.items()}
        slot, manifest = slots.stage(data, sources, link=False)
        slots.activate(Version(slot, manifest.release, digest_of(data)))

    tried = []

    def use(slots_seen, version, variant):
        tried.append(version.release)
        served = load(slots_seen, version, variant)
        if len(tried) == 1:
            install(build(release=2, seed=1, epochs=1))
            install(build(release=3, seed=2, epochs=1))  # into the slot that was read
        return served

    assert from_home(tmp_path / "device", "int8", use).version.release == 3
    assert tried == [1, 3]


@pytest.mark.torch
def test_a_version_that_is_damaged_is_not_tried_for_ever(make_device, tmp_path):
    make_device().stop()
    slots = Slots(tmp_path / "device" / "slots")
    (slots.folder(slots.pointer.current) / "head.onnx").write_bytes(b"rubbish")
    with pytest.raises(SelfTestError, match=r"head\.onnx"):
        from_home(tmp_path / "device", "int8", load)


def test_a_home_without_a_device_is_a_usage_error_and_is_not_made(tmp_path, rows_npy):
    result = edge("predict", "--home", tmp_path / "none", "--input", rows_npy, "--output", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert "there is no device in" in result.output
    assert not (tmp_path / "none").exists()
    (tmp_path / "none" / "slots").mkdir(parents=True)
    replace_file(tmp_path / "none" / "slots" / "pointer.json", b"{")
    result = edge("predict", "--home", tmp_path / "none", "--input", rows_npy, "--output", tmp_path / "out.csv")
    assert result.exit_code == 3
    assert "pointer.json is damaged" in result.output


# ---- the command


@pytest.mark.torch
def test_refused_rows_are_summed_up_and_make_the_exit_code_1_unless_allowed(tmp_path, checkpoint, digits):
    x = digits.life.x[:10].copy()
    x[3] = np.nan
    np.save(tmp_path / "rows.npy", x)
    command = [
        "predict",
        "--checkpoint",
        checkpoint,
        "--input",
        tmp_path / "rows.npy",
        "--output",
        tmp_path / "out.csv",
    ]
    result = edge(*command)
    assert result.exit_code == 1
    assert "out.csv: 10 rows, 1 refused (1 NonFiniteError)" in result.output
    assert "scoring" not in result.output  # no bar: this is no terminal
    assert len(read(tmp_path / "out.csv")) == 10
    assert edge(*command, "--allow-errors").exit_code == 0
    quiet = edge(*command, "--allow-errors", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert edge(*command, "--home", tmp_path).exit_code == 2


@pytest.mark.torch
def test_a_terminal_sees_a_progress_bar(tmp_path, checkpoint, life_npy):
    ours, theirs = pty.openpty()
    command = ["predict", "--checkpoint", checkpoint, "--input", life_npy, "--output", tmp_path / "out.csv"]
    with open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123 - a descriptor
        edge_command = Path(sys.executable).with_name("edge")
        done = subprocess.run([edge_command, *command], stdout=subprocess.PIPE, stderr=theirs, timeout=120, check=False)
        os.close(theirs)
        said = terminal.read(100_000).decode()
    assert done.returncode == 0, said
    assert "scoring life.npy" in said
    assert "100%" in said
    assert "out.csv: 100 rows" in said
    assert done.stdout == b""


CHILD = """
import os, signal, sys
from edge_sdk import batch
from edge_sdk.cli import main
from edge_sdk.files import set_crash_hook

batch.CHUNK_BATCHES = 4
left = int(sys.argv.pop(1))


def crash(name):
    global left
    left -= name == "batch:written"
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)


set_crash_hook(crash)
main()
"""


@pytest.mark.torch
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_command_killed_with_sigkill_is_continued_by_the_same_command(tmp_path, checkpoint, life_npy, ending):
    def run(name, left):
        command = ["predict", "--checkpoint", checkpoint, "--input", life_npy, "--output", tmp_path / (name + ending),
                   "--batch", 8]  # fmt: skip
        return subprocess.run(
            [sys.executable, "-c", CHILD, str(left), *map(str, command)],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    assert run("whole", 99).returncode == 0
    assert run("out", 2).returncode == -signal.SIGKILL
    assert run("out", 0).returncode == -signal.SIGKILL
    assert not (tmp_path / f"out{ending}").exists()
    last = run("out", 99)
    assert last.returncode == 0, last.stderr
    assert f"out{ending}: 100 rows, 64 of them done before" in last.stderr
    assert (tmp_path / f"out{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    assert Counter(row["release"] for row in read(tmp_path / f"out{ending}")).total() == 100
