"""Rows at the door: every task, every file kind, and what is said of bad ones."""

import sys

import numpy as np
import pytest

from edge_quantize.data import DataFormat, Dataset, LeakageWarning, checked_slices, checked_y
from edge_quantize.errors import DataError
from edge_sdk.errors import MissingExtraError
from edge_sdk.schema import Column, Impute, InputSpec, OneHot

PAIR = InputSpec(shape=[2], low=-10, high=10)
TABLE = InputSpec(
    shape=[2],
    columns=[Column("age", low=0, high=120), Column("site", "category", values=["north", "south"])],
    preprocess=[OneHot(columns=["site"]), Impute(values=[0.0])],
)


def rows(count, start=0):
    """Rows float32 [count, 2], no two equal."""
    return np.stack([np.arange(start, start + count) / 1000, np.ones(count)], axis=1).astype(np.float32)


def dataset(**changes):
    arguments = {
        "train_x": rows(10),
        "train_y": np.arange(10) % 2,
        "holdout_x": rows(200, 100),
        "holdout_y": np.arange(200) % 2,
        **changes,
    }
    return Dataset(**arguments)


# ---- truth


def test_labels_may_be_given_by_name_or_position():
    by_name = checked_y("train", ["dog", "cat", "dog"], 3, ["cat", "dog"])
    assert by_name.dtype == np.int64
    assert (
        by_name.tolist() == checked_y("train", np.array([1, 0, 1], np.uint8), 3, ["cat", "dog"]).tolist() == [1, 0, 1]
    )


def test_multilabel_truth_becomes_integers_and_regression_a_column_for_each_target():
    tags = checked_y("train", [[True, False], [False, False]], 2, ["red", "wet"], task="multilabel")
    assert (tags.dtype, tags.tolist()) == (np.int64, [[1, 0], [0, 0]])
    load = checked_y("train", [1.5, 2.5], 2, ["load"], task="regression")
    assert (load.dtype, load.tolist()) == (np.float32, [[1.5], [2.5]])
    assert checked_y("train", None, 2, [], task="raw") is None


@pytest.mark.parametrize(
    ("task", "y", "message"),
    [
        ("classification", ["cat", "dgo"], "train: row 1: 'dgo' is none of the labels 'cat', 'dog'"),
        ("classification", [0, 2], "y runs from 0 to 2, there are 2 labels .* see row 1"),
        ("classification", [0.0, 1.0], "one integer for each of 2 rows, got float64"),
        ("classification", None, "task 'classification' needs y"),
        ("multilabel", [[0, 1], [2, 0]], "row 1: 'cat' is 2, expected a 0 or 1"),
        ("multilabel", [0, 1], r"a 0 or 1 for each label, shape \(2, 2\), got int64 \(2,\)"),
        ("regression", [[0.5, 1.0], [1.0, np.nan]], "row 1: 'dog' is nan, expected a number"),
        ("regression", [["a", "b"], ["c", "d"]], r"a number for each target, shape \(2, 2\), got <U1"),
        ("raw", [0, 1], 'task "raw" knows no truth'),
    ],
)
def test_bad_truth_is_refused_with_split_row_and_column(task, y, message):
    with pytest.raises(DataError, match=message):
        checked_y("train", y, 2, ["cat", "dog"], task=task)


# ---- samples


def test_checked_rows_are_arrays_in_the_apps_units():
    checked = dataset(validation_x=rows(5, 400), validation_y=[0] * 5).checked(PAIR, ["a", "b"])
    assert checked.train_x.dtype == np.float32
    assert checked.train_y.dtype == checked.validation_y.dtype == np.int64
    assert checked.calibration_x is None


def test_dict_rows_with_text_and_missing_values_become_numbers():
    people = [{"age": 30 + i / 1000, "site": "south"} for i in range(199)] + [{"site": "moon"}]
    data = Dataset([{"age": 1.0, "site": "north"}], np.array([0]), people, np.zeros(200, np.int64))
    checked = data.checked(TABLE, ["a"])
    assert checked.holdout_x[0].tolist() == [30.0, 1.0]
    assert np.isnan(checked.holdout_x[199, 0])
    assert checked.holdout_x[199, 1] == -1


def test_bad_sample_is_refused_with_split_row_and_column():
    people = [{"age": 20 + i / 1000, "site": "south"} for i in range(200)]
    for change, message in (
        ({"age": 130}, "holdout: row 7: input 'input': column 'age' is 130"),
        ({"age": "old"}, "holdout: row 7: column 'age': expected a number, got 'old'"),
        ({"height": 2}, "holdout: row 7: input 'input' has no column 'height'"),
    ):
        bad = [{**row, **change} if i == 7 else row for i, row in enumerate(people)]
        data = Dataset([{"age": 1.0, "site": "north"}], np.array([0]), bad, np.zeros(200, np.int64))
        with pytest.raises(DataError, match=message):
            data.checked(TABLE, ["a"])
    broken = rows(10)
    broken[3, 1] = np.inf
    with pytest.raises(DataError, match=r"train: row 3: input 'input': inf at \(1,\)"):
        dataset(train_x=broken).checked(PAIR, ["a", "b"])
    with pytest.raises(DataError, match=r"train: input 'input': expected shape \(N, 2.*, got \(10, 1\)"):
        dataset(train_x=broken[:, :1]).checked(PAIR, ["a", "b"])


def test_model_with_several_inputs_takes_rows_of_arrays_by_name():
    specs = [InputSpec([2], name="left"), InputSpec([1], name="right")]
    held_out = [{"left": row, "right": row[:1]} for row in rows(200)]
    checked = Dataset(None, None, held_out, None).checked(specs, [], task="raw", learns=False)
    assert checked.holdout_x[1]["right"].tolist() == [np.float32(0.001)]
    held_out[4] = {"left": held_out[4]["left"]}
    with pytest.raises(DataError, match="holdout: row 4: expected a mapping with inputs 'left', 'right'"):
        Dataset(None, None, held_out, None).checked(specs, [], task="raw", learns=False)


def test_one_mapping_of_stacked_arrays_is_refused_for_what_it_is():
    specs = [InputSpec([2], name="left"), InputSpec([1], name="right")]
    stacked = {"left": rows(200), "right": rows(200)[:, :1]}
    with pytest.raises(
        DataError, match="holdout: rows of several inputs or columns are a list with a mapping for each"
    ):
        Dataset(None, None, stacked, np.zeros(200, np.int64)).checked(specs, ["a"], learns=False)


def test_model_that_does_not_learn_needs_no_training_rows():
    held_out = {"holdout_x": rows(200), "holdout_y": np.zeros(200, np.int64)}
    checked = Dataset(None, None, **held_out).checked(PAIR, ["a", "b"], learns=False)
    assert checked.train_x is None
    with pytest.raises(DataError, match="needs the rows its head was trained on"):
        Dataset(None, None, **held_out).checked(PAIR, ["a", "b"])
    with pytest.raises(DataError, match="train: there is truth, but there are no rows"):
        Dataset(None, np.zeros(3), **held_out).checked(PAIR, ["a", "b"], learns=False)


def test_every_label_needs_training_rows():
    with pytest.raises(DataError, match="no rows with label 'c'"):
        dataset().checked(PAIR, ["a", "b", "c"])
    tags = {"train_y": [[1, 0]] * 10, "holdout_y": [[1, 0]] * 200}
    with pytest.raises(DataError, match="no rows with label 'wet'"):
        dataset(**tags).checked(PAIR, ["red", "wet"], task="multilabel")


def test_too_few_held_out_rows_are_refused():
    few = dataset(holdout_x=rows(50, 100), holdout_y=np.zeros(50, np.int64))
    with pytest.raises(DataError, match="at least 200 rows, got 50"):
        few.checked(PAIR, ["a", "b"])
    assert len(few.checked(PAIR, ["a", "b"], min_holdout=50).holdout_x) == 50


def test_held_out_rows_that_were_trained_on_are_counted_and_warned_of():
    leaking = dataset(holdout_x=rows(200, 7), calibration_x=rows(5, 205))
    with pytest.warns(LeakageWarning) as caught:
        checked = leaking.checked(PAIR, ["a", "b"])
    said = [str(warning.message) for warning in caught]
    assert said[0].startswith("3 of 200 held-out rows are also among the train rows, byte for byte")
    assert said[1].startswith("2 of 200 held-out rows are also among the calibration rows")
    assert checked.leaks() == {"train": 3, "calibration": 2}


# ---- slices


def test_column_of_values_makes_a_slice_for_each():
    slices = checked_slices({"site": ["n", "s", "n"], "night": np.array([True, False, False])}, 3)
    assert {name: rows.tolist() for name, rows in slices.items()} == {
        "night": [True, False, False],
        "site=n": [True, False, True],
        "site=s": [False, True, False],
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3), "float64 values cannot name slices"),
        (["a", "b"], r"expected a value for each of 3 held-out rows, got \(2,\)"),
    ],
)
def test_bad_slice_is_refused_by_name(values, message):
    with pytest.raises(DataError, match=f"slice 'x': {message}"):
        checked_slices({"x": values}, 3)


def test_column_that_names_rows_makes_no_slices():
    with pytest.raises(DataError, match="slice 'id' has 65 values, at most 64"):
        checked_slices({"id": np.arange(65)}, 65)


# ---- files


def test_npz_brings_its_slices(tmp_path):
    np.savez(tmp_path / "train.npz", x=rows(3), y=[0, 1, 0])
    np.savez(tmp_path / "holdout.npz", x=rows(2), y=[0, 1], slice_site=["n", "s"])
    data = Dataset.load(tmp_path / "train.npz", tmp_path / "holdout.npz", validation=tmp_path / "train.npz")
    assert data.slices["site"].tolist() == ["n", "s"]
    assert data.validation_y.tolist() == [0, 1, 0]


def test_npy_pair_is_found_beside_its_samples(tmp_path):
    np.save(tmp_path / "train_x.npy", rows(3))
    np.save(tmp_path / "train_y.npy", [0, 1, 0])
    data = Dataset.load(tmp_path / "train_x.npy", tmp_path / "train_x.npy", tmp_path / "train_x.npy")
    assert data.train_y.tolist() == [0, 1, 0]
    assert np.array_equal(data.calibration_x, rows(3))
    (tmp_path / "train_y.npy").unlink()
    with pytest.raises(DataError, match=r"train_y\.npy does not exist"):
        Dataset.load(tmp_path / "train_x.npy", tmp_path / "train_x.npy")


def test_csv_is_read_by_the_contracts_columns_and_the_named_label(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text("name,site,age,kind,shift\nAnn,north,31,cat,day\n\nBob,south,,dog,night\n", encoding="utf-8-sig")
    form = DataFormat(target=["kind"], slices=["shift"])
    data = Dataset.load(path, path, path, spec=TABLE, labels=["cat", "dog"], form=form)
    assert data.train_x == [{"age": "31", "site": "north"}, {"age": "", "site": "south"}]
    assert checked_y("train", data.train_y, 2, ["cat", "dog"]).tolist() == [0, 1]
    assert data.slices["shift"].tolist() == ["day", "night"]
    assert TABLE.check_batch(data.calibration_x)[0].tolist() == [31.0, 0.0]


def test_csv_without_named_columns_takes_the_others_in_order(tmp_path):
    path = tmp_path / "loads.csv"
    path.write_text("a,load,b\n1,0.5,2\n3,,4\n")
    data = Dataset.load(None, path, spec=PAIR, labels=["load"], task="regression")
    assert data.holdout_x.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="holdout: row 1: 'load' is nan"):
        checked_y("holdout", data.holdout_y, 2, ["load"], task="regression")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "has no rows"),
        ("a,b,kind\n1,2,x\n1,2\n", "row 1: 2 fields where the header has 3"),
        ("a,b\n1,2\n", "has no column 'kind'; it has 'a', 'b'"),
        ("a,b,c,kind\n1,2,3,x\n", r"3 columns of values, the model takes shape \[2\]"),
        ("a,b,kind\n1,two,x\n", "row 0: 'b' is 'two', expected a number"),
        ("a,a,kind\n1,2,x\n", "has column 'a' more than once"),
    ],
)
def test_bad_table_is_refused_with_row_and_column(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        Dataset.load(None, path, spec=PAIR, labels=["x"], form=DataFormat(target=["kind"]))


def test_bad_files_are_refused(tmp_path):
    for name, data, message in (
        ("x.txt", b"", "expected a file ending in"),
        ("x.csv", b"\xff\xfe", "not readable CSV in UTF-8"),
        ("x.npy", b"", "name the samples NAME_x.npy"),
        ("a_x.npy", b"no array", "not a readable .npy file"),
        ("x.npz", b"no zip", "x.npz"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            Dataset.load(None, tmp_path / name, spec=PAIR, form=DataFormat(target=["y"]))
    (tmp_path / "y.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="a table needs the input contract"):
        Dataset.load(None, tmp_path / "y.csv")
    with pytest.raises(DataError, match="say which column holds the labels"):
        Dataset.load(None, tmp_path / "y.csv", spec=PAIR)


def test_parquet_gives_the_same_rows_as_csv(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "people.parquet"
    table = {"site": ["north", "south"], "age": [31.0, None], "kind": ["cat", "dog"]}
    parquet.write_table(pa.table(table), path)
    data = Dataset.load(None, path, spec=TABLE, labels=["cat", "dog"], form=DataFormat(target=["kind"]))
    assert data.holdout_x == [{"age": 31.0, "site": "north"}, {"age": None, "site": "south"}]
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not readable Parquet"):
        Dataset.load(None, path, spec=TABLE, labels=["cat", "dog"], form=DataFormat(target=["kind"]))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(MissingExtraError, match=r"edge-sdk\[parquet\]"):
        Dataset.load(None, tmp_path / "x.parquet", spec=TABLE, labels=["a"])
