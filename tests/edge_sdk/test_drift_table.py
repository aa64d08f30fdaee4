"""CSV tables as the monitors see them."""

import math

import numpy as np
import pytest

from edge_sdk.drift.table import Layout, Roles
from edge_sdk.errors import ConfigError, DtypeError, InputError, NonFiniteError, ShapeError


@pytest.fixture
def write(tmp_path):
    """Writes a CSV file: `write("name.csv", "a,b", "1,2")`."""

    def make(name, *lines):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


def test_columns_of_numbers_stand_for_themselves_and_categories_for_their_place(write):
    normal = write("normal.csv", "temp,mode", "1.5,run", "2,idle", ",run")
    layout = Layout(normal, Roles())
    rows = layout.read_all(write("now.csv", "mode,extra,temp", "idle,9,7", "wash,9,NA", ",9,1e3"))
    assert layout.names == ("temp", "mode")
    assert layout.categories == {"mode": [0.0, 1.0]}
    np.testing.assert_array_equal(rows.features, [[7, 0], [math.nan, -1], [1000, math.nan]])


def test_texts_of_many_kinds_and_what_exceeds_64_columns_are_left_out(write):
    notes = [f"note {i}" for i in range(70)]
    many = write("notes.csv", "x,note", *(f"{i},{note}" for i, note in enumerate(notes)))
    assert Layout(many, Roles()).left_out == ["note"]
    wide = write("wide.csv", ",".join(f"c{i}" for i in range(66)), ",".join("1" * 66))
    layout = Layout(wide, Roles())
    assert (len(layout.names), layout.left_out) == (64, ["c64", "c65"])


@pytest.mark.parametrize(
    ("cell", "seconds"),
    [("1700000000", 1.7e9), ("1700000000000", 1.7e9), ("2023-11-14T22:13:20Z", 1.7e9), ("2023-11-14 22:13:20", 1.7e9)],
)
def test_times_are_seconds_milliseconds_or_iso_8601(write, cell, seconds):
    table = write("t.csv", "at,x", f"{cell},1")
    assert Layout(table, Roles(time="at")).read_all(table).times.tolist() == [seconds]


def test_predictions_become_scores_and_labels_right_or_wrong(write):
    table = write("p.csv", "x,said,sure,true", "1,cat,0.9,cat", "1,dog,0.6,cat", "1,cow,0.8,")
    layout = Layout(table, Roles(prediction="said", confidence="sure", label="true"))
    rows = layout.read_all(table)
    assert (layout.task, layout.classes) == ("classification", ("cat", "cow", "dog"))
    np.testing.assert_allclose(rows.scores, [[0.9, 0.05, 0.05], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(rows.right, [1, 0, math.nan])
    unknown = layout.read_all(write("q.csv", "x,said,sure,true", "1,horse,0.9,cat"))
    assert unknown.scores.tolist() == [[0, 0, 0]]


def test_predictions_of_many_numbers_are_values_and_labels_give_their_error(write):
    table = write("v.csv", "x,said,true", *(f"1,{i},{i + 2}" for i in range(30)))
    layout = Layout(table, Roles(prediction="said", label="true"))
    rows = layout.read_all(table)
    assert layout.task == "regression"
    assert rows.scores.shape == (30, 1)
    assert set(rows.right) == {2.0}


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        ([""], ShapeError, "is empty"),
        (["a,b"], InputError, "no rows"),
        (["a,a", "1,2"], ShapeError, "more than once"),
        (["a,b", "1,2", "1"], ShapeError, "row 2: 1 fields where the header has 2"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_place(write, lines, error, words):
    with pytest.raises(error, match=words):
        Layout(write("bad.csv", *lines), Roles())


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("warm,1,0.5", DtypeError, r"now.csv, row 2: column 'temp': expected a number, got 'warm'"),
        ("1e300,1,0.5", NonFiniteError, "row 2: column 'temp': 1e300 is too large"),
        ("1,later,0.5", InputError, "row 2: expected a time"),
        ("1,1,1.5", InputError, "row 2: a confidence lies in 0 to 1"),
    ],
)
def test_a_cell_that_does_not_fit_is_refused_with_row_and_column(write, line, error, words):
    header = "temp,at,sure,said"
    normal = write("normal.csv", header, "1,1,0.5,a", "2,2,0.5,b")
    layout = Layout(normal, Roles(time="at", confidence="sure", prediction="said"))
    with pytest.raises(error, match=words):
        layout.read_all(write("now.csv", header, "1,1,0.5,a", f"{line},a"))


def test_files_of_another_kind_are_refused(write, tmp_path):
    binary = tmp_path / "image.csv"
    binary.write_bytes(b"\x89PNG\0\0")
    latin = tmp_path / "latin.csv"
    latin.write_bytes("größe\n1\n".encode("latin-1"))
    for path in (binary, latin, tmp_path / "absent.csv"):
        with pytest.raises(InputError, match=path.name):
            Layout(path, Roles())


def test_columns_that_are_named_must_be_there(write):
    table = write("t.csv", "x,y", "1,2")
    with pytest.raises(ConfigError, match="no column 'when'; it has 'x', 'y'"):
        Layout(table, Roles(time="when"))
    with pytest.raises(ConfigError, match="beside predictions"):
        Layout(table, Roles(label="y"))
    with pytest.raises(ShapeError, match="lacks column 'y'"):
        Layout(table, Roles()).read_all(write("u.csv", "x", "1"))
    with pytest.raises(ShapeError, match="no column of numbers"):
        Layout(table, Roles(ignore=("x", "y")))


def test_a_model_that_says_one_thing_only_cannot_be_watched(write):
    table = write("t.csv", "x,said", "1,a", "2,a")
    with pytest.raises(InputError, match="has 1 classes"):
        Layout(table, Roles(prediction="said"))


def test_rows_that_are_not_in_the_order_of_their_times_are_refused(write):
    normal = write("normal.csv", "at,temp", "1,20", "2,21", "2,22")
    layout = Layout(normal, Roles(time="at"))
    assert len(layout.read_all(normal)) == 3
    newest_first = write("now.csv", "at,temp", "1,20", "3,20", "2,21")
    with pytest.raises(InputError, match=r"now\.csv, row 3: its time is before .*sort the rows by 'at', oldest first"):
        list(layout.read(newest_first, 2))


def test_columns_that_the_normal_rows_lack_are_told(write):
    layout = Layout(write("normal.csv", "temp,at", "1,2", "2,3"), Roles(time="at"))
    assert layout.not_watched(write("now.csv", "at,humidity,temp", "2,9,7")) == ["humidity"]
