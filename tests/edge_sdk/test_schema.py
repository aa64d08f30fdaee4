"""Inputs: what is refused and why, and one path of preprocessing for one sample and for many."""

import math
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import DtypeError, InputError, IntegrityError, NonFiniteError, RangeError, ShapeError
from edge_sdk.manifest import parse_manifest
from edge_sdk.schema import Column, Impute, InputSpec, OneHot, Permute, Resize, Scale, Window, interpolation

SPEC = InputSpec(shape=[2, 3], name="pixels", low=0.0, high=16.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64, np.uint8])
def test_numbers_of_any_width_become_float32(dtype):
    x = SPEC.check(np.arange(6).reshape(2, 3).astype(dtype))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.arange(6).reshape(2, 3))


def test_nested_lists_are_taken():
    assert SPEC.check([[1, 2, 3], [4, 5, 6.5]]).shape == (2, 3)


@pytest.mark.parametrize("x", [[["1", "2", "3"]] * 2, [[True] * 3] * 2, [[1j] * 3] * 2, [[None] * 3] * 2, "text"])
def test_what_is_not_a_number_is_refused(x):
    with pytest.raises(DtypeError, match="expected numbers"):
        SPEC.check(x)


def test_ragged_lists_are_refused():
    with pytest.raises(InputError, match="not an array"):
        SPEC.check([[1, 2], [3]])


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), (), (2, 4)])
def test_a_wrong_shape_says_what_was_expected(shape):
    with pytest.raises(ShapeError, match=r"'pixels': expected shape \(2, 3\), got"):
        SPEC.check(np.zeros(shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_says_where(bad):
    x = np.zeros((2, 3))
    x[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"at \(1, 2\)"):
        SPEC.check(x)


def test_a_value_too_large_for_float32_is_not_finite():
    with np.errstate(over="ignore"), pytest.raises(NonFiniteError):
        SPEC.check(np.full((2, 3), 1e300))


@pytest.mark.parametrize(("bad", "spec"), [(-0.1, SPEC), (16.1, SPEC), (-1, InputSpec(shape=[2, 3], low=0.0))])
def test_a_value_out_of_range_says_the_range(bad, spec):
    x = np.ones((2, 3))
    x[0, 0] = bad
    with pytest.raises(RangeError, match="allowed 0"):
        spec.check(x)


def test_the_range_itself_is_allowed():
    SPEC.check([[0, 16, 0], [16, 0, 16]])


def test_a_batch_is_checked_like_its_samples():
    batch = np.ones((4, 2, 3))
    assert SPEC.check_batch(batch).shape == (4, 2, 3)
    for wrong in (np.ones((0, 2, 3)), np.float32(1), np.ones((4, 3, 2)), np.ones((2, 3))):
        with pytest.raises(ShapeError):
            SPEC.check_batch(wrong)
    batch[3, 0, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"\(3, 0, 1\)"):
        SPEC.check_batch(batch)


def test_input_errors_are_value_errors():
    with pytest.raises(ValueError, match="expected shape"):
        SPEC.check([1])


def test_checking_does_not_change_the_callers_array():
    x = np.ones((2, 3), np.float32)
    spec = InputSpec(shape=[2, 3], preprocess=[Scale([1.0], [2.0])])
    spec.apply(spec.check(x)[None])
    np.testing.assert_array_equal(x, np.ones((2, 3)))


def test_preprocessing_scales_by_one_number_or_by_element_in_order():
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    one = InputSpec(shape=[2, 3], preprocess=[Scale([2.0], [4.0])])
    np.testing.assert_allclose(one.apply(x), (x - 2) / 4)
    two = InputSpec(shape=[2, 3], preprocess=[Scale([0.0, 1.0, 2.0], [1.0, 2.0, 4.0]), Scale([1.0], [10.0])])
    np.testing.assert_allclose(two.apply(x), ((x - [0, 1, 2]) / [1, 2, 4] - 1) / 10, rtol=1e-6)
    assert two.apply(x).dtype == np.float32
    assert two.apply(x).flags.c_contiguous


def test_a_sample_is_preprocessed_as_in_a_batch(rng):
    spec = InputSpec(shape=[5], preprocess=[Scale([0.3] * 5, [0.7] * 5)])
    batch = rng.normal(size=(8, 5)).astype(np.float32)
    alone = np.concatenate([spec.apply(spec.check(row)[None]) for row in batch])
    np.testing.assert_array_equal(spec.apply(spec.check_batch(batch)), alone)


def test_the_spec_survives_json_and_refuses_unknown_fields():
    spec = InputSpec(shape=[4], low=-1.0, preprocess=[Scale([0.0], [1.0])])
    data = msgspec.json.encode(spec)
    assert msgspec.json.decode(data, type=InputSpec) == spec
    with pytest.raises(msgspec.ValidationError, match="hihg"):
        msgspec.json.decode(data.replace(b'"high"', b'"hihg"'), type=InputSpec)


# ---- tabular rows


COLUMNS = [
    Column("age", low=0, high=120),
    Column("colour", "category", ["red", "green", "blue"]),
    Column("note", "text", buckets=16),
]
ROWS = InputSpec(shape=[3], name="row", columns=COLUMNS)
LENIENT = InputSpec(
    shape=[3],
    name="row",
    columns=COLUMNS,
    preprocess=[
        Impute([40.0, 0.0, None]),
        OneHot(["colour"]),
        Scale([40.0, 0.0, 0.0, 0.0, 0.0], [10.0, 1.0, 1.0, 1.0, 16.0]),
    ],
)
NAMES = [column.name for column in COLUMNS]


def test_a_text_has_the_same_code_on_every_machine():
    codes = {text: Column("note", "text", buckets=1000).encode(text) for text in ("hello", "grüße", "日本", "a b")}
    assert codes == {"hello": 870.0, "grüße": 117.0, "日本": 756.0, "a b": 299.0}


@given(
    age=st.floats(0, 120, width=32),
    colour=st.sampled_from(["red", "green", "blue", "pink", "Red", "rot"]),
    note=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_a_row_by_name_in_order_and_as_codes_is_the_same(age, colour, note):
    by_name = ROWS.check({"note": note, "age": age, "colour": colour})
    place = ["red", "green", "blue"].index(colour) if colour in ("red", "green", "blue") else -1
    codes = np.array([age, place, zlib.crc32(note.encode()) % 16], np.float32)
    np.testing.assert_array_equal(by_name, codes)
    for other in ([age, colour, note], (str(age), colour, note), np.array([age, colour, note], object), codes):
        np.testing.assert_array_equal(ROWS.check(other), by_name)
    rows = [{"note": note, "age": age, "colour": colour}, [age, colour, note], codes]
    np.testing.assert_array_equal(ROWS.check_batch(rows), [codes] * 3)
    np.testing.assert_array_equal(ROWS.check_batch(np.stack([codes] * 3)), [codes] * 3)


@pytest.mark.parametrize(("number", "wanted"), [("3.5", 3.5), (" 7 ", 7), ("1e2", 100), (np.int64(3), 3), (True, 1)])
def test_numbers_in_a_row_may_come_as_text(number, wanted):
    assert ROWS.check([number, "red", "x"])[0] == wanted


@pytest.mark.parametrize(
    "number",
    ["old", "1,5", 1j, b"3", [3], (3,), {"a": 3}, {3}, np.array([3.0]), 10**400, object()],
    ids=lambda number: type(number).__name__,
)
def test_what_is_no_number_is_refused_with_its_column_and_value(number):
    with pytest.raises(DtypeError, match="column 'age': expected a number, got ") as caught:
        ROWS.check([number, "red", "x"])
    assert len(str(caught.value)) < 200  # a long value is cut short


@pytest.mark.parametrize("value", [["red"], ("red",), {"red"}, {"red": 1}, b"red", np.array(["red"])], ids=repr)
@pytest.mark.parametrize("name", ["colour", "note"])
def test_a_container_is_no_unseen_category(name, value):
    with pytest.raises(DtypeError, match=f"column '{name}': expected a (category|text), got"):
        ROWS.check({"age": 3, "colour": "red", "note": "x", name: value})


def test_text_that_is_no_utf8_is_refused():
    with pytest.raises(InputError, match="column 'note': the text is not UTF-8"):
        ROWS.check([3, "red", "\ud800"])
    assert ROWS.check([3, "\ud800", "x"])[1] == -1


@pytest.mark.parametrize("missing", [None, "", math.nan, np.nan, np.float32("nan"), np.float16("nan")], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_value_names_its_column_unless_it_is_imputed(name, missing):
    row = {"age": 3, "colour": "red", "note": "x", name: missing}
    with pytest.raises(NonFiniteError, match=f"'row': nan at column '{name}'; impute or drop"):
        ROWS.check(row)
    with pytest.raises(NonFiniteError, match=f"nan at column '{name}' of row 1; impute or drop"):
        ROWS.check_batch([[3, "red", "x"], row])
    if name == "note":  # not imputed, although others are
        with pytest.raises(NonFiniteError, match="nan at column 'note'"):
            LENIENT.check(row)
    else:
        assert np.isnan(LENIENT.check(row)[NAMES.index(name)])


def test_a_missing_key_is_a_missing_value():
    np.testing.assert_array_equal(LENIENT.check({"note": "x"}), LENIENT.check([None, "", "x"]))


def test_missing_values_are_imputed_and_codes_become_columns():
    code = Column("note", "text", buckets=16).encode("x")
    rows = [{"age": 60, "colour": "blue", "note": "x"}, {"note": "x"}, {"age": 30, "colour": "pink", "note": "x"}]
    expected = [[2, 0, 0, 1, code / 16], [0, 1, 0, 0, code / 16], [-1, 0, 0, 0, code / 16]]
    np.testing.assert_array_equal(LENIENT.apply(LENIENT.check_batch(rows)), np.float32(expected))
    assert LENIENT.model_shape == [5]


def test_without_imputing_a_missing_or_unseen_category_is_all_zeros():
    spec = InputSpec(shape=[3], columns=COLUMNS, preprocess=[OneHot(["colour", "note"]), Impute([0.5])])
    applied = spec.apply(spec.check_batch([["", None, None], [3, "pink", ""]]))
    assert spec.model_shape == [1 + 3 + 16]
    np.testing.assert_array_equal(applied, np.float32([[0.5, *[0] * 19], [3, *[0] * 19]]))


def test_codes_can_be_expanded_one_after_the_other():
    apart = InputSpec(shape=[3], columns=COLUMNS, preprocess=[OneHot(["colour"]), OneHot(["note"])])
    together = InputSpec(shape=[3], columns=COLUMNS, preprocess=[OneHot(["note", "colour"])])
    rows = ROWS.check_batch([[3, "blue", "x"], [4, "red", "y"], [5, "pink", "z"]])
    np.testing.assert_array_equal(apart.apply(rows), together.apply(rows))
    assert apart.apply(rows).sum() == 3 + 4 + 5 + 2 + 3


def test_an_unknown_column_is_refused():
    with pytest.raises(ShapeError, match=r"'row' has no column 'colr', 'size'"):
        ROWS.check({"age": 3, "colr": "red", "size": 2})


@pytest.mark.parametrize(
    "row", [[3, "red"], [3, "red", "x", 1], "red", 3, None, {3}, b"abc", np.array("red")], ids=repr
)
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises(ShapeError, match=r"'row': expected (3 values in a row|shape \(3,\)), got"):
        ROWS.check(row)


@pytest.mark.parametrize(
    "rows", [{"age": 3}, "abc", b"abc", 3, None, np.array("x"), {1, 2}, iter([])], ids=lambda rows: type(rows).__name__
)
def test_a_batch_of_rows_is_a_list_of_them(rows):
    with pytest.raises(ShapeError, match="'row': expected a list of rows, got"):
        ROWS.check_batch(rows)
    with pytest.raises(ShapeError, match="at least one sample"):
        ROWS.check_batch([])


def test_an_error_in_a_batch_says_which_row():
    with pytest.raises(DtypeError, match=r"^row 1: column 'age': expected a number, got 'old'"):
        ROWS.check_batch([[3, "red", "x"], ["old", "red", "x"]])
    with pytest.raises(ShapeError, match=r"^row 2: input 'row' has no column 'agee'"):
        ROWS.check_batch([[3, "red", "x"], [4, "red", "x"], {"agee": 1}])


@pytest.mark.parametrize("age", [-0.5, 121])
def test_each_column_has_a_range_of_its_own(age):
    with pytest.raises(RangeError, match=f"'row': column 'age' is {age:g}, allowed 0 to 120;"):
        ROWS.check([age, "red", "x"])
    with pytest.raises(RangeError, match="column 'age' of row 1 is"):
        ROWS.check_batch([[3, "red", "x"], [age, "red", "x"]])
    assert ROWS.check([120, "blue", "x"])[0] == 120  # codes have no range


def test_a_number_too_large_for_float32_is_refused_with_its_column():
    with pytest.raises(NonFiniteError, match="inf at column 'age'"):
        ROWS.check([1e300, "red", "x"])
    with pytest.raises(NonFiniteError, match="inf at column 'age'"):
        LENIENT.check(["inf", "red", "x"])


# ---- whole numbers, and any size


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_whole_numbers_are_taken_in_any_width(dtype):
    spec = InputSpec(shape=[2], dtype=dtype)
    for given_as in (np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64):
        checked = spec.check(np.array([3, 120], given_as))
        assert checked.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(checked, [3, 120])
    assert spec.check([3, 4]).dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("dtype", "x", "error"),
    [
        ("uint8", [300], RangeError),
        ("uint8", [-1], RangeError),
        ("int32", [2**31], RangeError),
        ("int32", np.array([2**32 + 1]), RangeError),
        ("int64", np.array([2**63], np.uint64), RangeError),
        ("int64", np.array([2**64 - 1], np.uint64), RangeError),
        ("int64", [2**64], DtypeError),
        ("int32", [1.5], DtypeError),
        ("int64", [1.0], DtypeError),
        ("int32", [True], DtypeError),
        ("int32", ["1"], DtypeError),
    ],
)
def test_whole_numbers_neither_wrap_nor_round(dtype, x, error):
    with pytest.raises(error, match=r"'input': (values from .* do not fit|expected)"):
        InputSpec(shape=[1], dtype=dtype).check(x)


def test_large_whole_numbers_keep_their_last_digit():
    spec = InputSpec(shape=[2], dtype="int64", high=2.0**53)
    np.testing.assert_array_equal(spec.check([2**53 - 1, 2**53]), [2**53 - 1, 2**53])
    with pytest.raises(RangeError, match="values from 0 to 9007199254740993, allowed None to 9007199254740992"):
        spec.check([0, 2**53 + 1])  # as float64 it would be 2**53
    free = InputSpec(shape=[1], dtype="int64")
    assert free.apply(free.check_batch([[2**63 - 1]]))[0, 0] == 2**63 - 1


@given(st.integers(-(2**65), 2**65), st.sampled_from(["int32", "int64", "uint8"]))
def test_a_whole_number_comes_through_exactly_or_not_at_all(number, dtype):
    spec, info = InputSpec(shape=[1], dtype=dtype), np.iinfo(dtype)
    if info.min <= number <= info.max:
        assert int(spec.check([number])[0]) == number
    else:
        with pytest.raises(InputError):
            spec.check([number])


@pytest.mark.parametrize("limit", [0.1, 0.7, 1 / 3, 1e-30, 1e300])
def test_the_limit_itself_is_allowed_as_float32_rounds_it(limit):
    spec = InputSpec(shape=[1], low=min(limit, 0.7), high=limit)
    if limit < 1e38:
        spec.check([limit])
        InputSpec(shape=[1], columns=[Column("a", low=limit, high=limit)]).check([limit])
    with pytest.raises(RangeError, match="is the unit right"):
        InputSpec(shape=[1], low=limit / 2, high=limit).check([limit * 0.4 if limit < 1e38 else 0.0])


def test_big_endian_numbers_are_turned_round():
    np.testing.assert_array_equal(InputSpec(shape=[2]).check(np.array([1, 2], ">f4")), [1, 2])
    checked = InputSpec(shape=[2], dtype="int32").check(np.array([1, 2], ">i4"))
    assert checked.dtype == np.int32
    np.testing.assert_array_equal(checked, [1, 2])


def test_any_size_is_taken_where_the_contract_says_so():
    spec = InputSpec(shape=[3, -1, -1], preprocess=[Resize(4, 5)])
    for height, width in ((1, 1), (4, 5), (9, 2)):
        assert spec.apply(spec.check(np.ones((3, height, width)))[None]).shape == (1, 3, 4, 5)
    for wrong in ((2, 4, 4), (3, 4), (3, 0, 4), (1, 3, 4, 4)):
        with pytest.raises(ShapeError, match=r"expected shape \(3, 'any', 'any'\), got"):
            spec.check(np.ones(wrong))
    with pytest.raises(ShapeError, match=r"expected shape \(N, 3, 'any', 'any'\)"):
        spec.check_batch(np.ones((3, 4, 4)))


def test_a_sample_may_be_one_number():
    spec = InputSpec(shape=[], preprocess=[Scale([1.0], [2.0])])
    np.testing.assert_array_equal(spec.apply(spec.check(3.0)[None]), [1.0])
    np.testing.assert_array_equal(spec.apply(spec.check_batch([3, 5])), [1.0, 2.0])
    assert spec.model_shape == []


# ---- operations


@pytest.mark.parametrize("layout", ["chw", "hwc", "hw"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((16, 20), (7, 9)),
        ((5, 6), (12, 17)),
        ((9, 4), (4, 9)),
        ((1, 1), (3, 2)),
        ((224, 160), (32, 32)),
        ((13, 8), (13, 3)),
    ],
    ids=str,
)
def test_resizing_is_antialiased_linear_interpolation(rng, layout, source, target):
    torch = pytest.importorskip("torch")
    x = rng.random((2, 3, *source)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=target, mode="bilinear", antialias=True, align_corners=False
    ).numpy()
    if layout == "hw":
        x, wanted = x[:, 0], wanted[:, 0]
    order = (0, 2, 3, 1) if layout == "hwc" else tuple(range(x.ndim))
    spec = InputSpec(shape=list(x.transpose(order).shape[1:]), preprocess=[Resize(*target, layout=layout)])
    resized = spec.apply(spec.check_batch(np.ascontiguousarray(x.transpose(order))))
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, wanted.transpose(order), atol=1e-3)


def test_an_image_of_the_right_size_is_left_alone(rng):
    x = rng.random((1, 3, 4, 5)).astype(np.float32)
    assert np.shares_memory(InputSpec(shape=[3, -1, -1], preprocess=[Resize(4, 5)]).apply(x), x)


@given(source=st.integers(1, 60), target=st.integers(1, 60))
def test_interpolation_weights_are_means(source, target):
    weights = interpolation(source, target)
    assert weights.shape == (target, source)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-5)  # no side is preferred


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        (Window(3), [5, 6, 7]),
        (Window(3, stride=2), [3, 5, 7]),
        (Window(3, stride=3), [1, 4, 7]),
        (Window(7), [1, 2, 3, 4, 5, 6, 7]),
        (Window(9), [1, 1, 1, 2, 3, 4, 5, 6, 7]),
        (Window(9, pad="zero"), [0, 0, 1, 2, 3, 4, 5, 6, 7]),
        (Window(4, stride=3), [1, 1, 4, 7]),
        (Window(4, stride=3, pad="zero"), [0, 1, 4, 7]),
        (Window(2, stride=100), [7, 7]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_a_window_holds_the_latest_steps(op, wanted, dtype):
    x = np.arange(1, 8)
    fixed = InputSpec(shape=[7], dtype=dtype, preprocess=[op])
    free = InputSpec(shape=[-1, 2], dtype=dtype, preprocess=[op])
    applied = fixed.apply(fixed.check(x)[None])
    assert applied.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(applied, [wanted])
    np.testing.assert_array_equal(free.apply(free.check(np.stack([x, x * 2], axis=1))[None])[0].T,
                                  [wanted, np.array(wanted) * 2])  # fmt: skip
    assert (fixed.model_shape, free.model_shape) == ([op.length], [op.length, 2])


def test_dimensions_are_put_in_order(rng):
    x = rng.integers(0, 255, (2, 4, 5, 3), dtype=np.uint8)
    spec = InputSpec(shape=[4, 5, 3], dtype="uint8", preprocess=[Permute([2, 0, 1])])
    applied = spec.apply(spec.check_batch(x))
    np.testing.assert_array_equal(applied, x.transpose(0, 3, 1, 2))
    assert applied.flags.c_contiguous
    assert spec.model_shape == [3, 4, 5]


@pytest.mark.parametrize("axis", [0, -3])
def test_channels_are_scaled_along_their_axis(rng, axis):
    x = rng.random((2, 3, 4, 5)).astype(np.float32)
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    spec = InputSpec(shape=[3, 4, 5], preprocess=[Scale(mean, std, axis=axis)])
    along = (1, 3, 1, 1)
    np.testing.assert_allclose(spec.apply(x), (x - np.reshape(mean, along)) / np.reshape(std, along), rtol=1e-5)
    one_std = InputSpec(shape=[3, 4, 5], preprocess=[Scale(mean, [2.0], axis=axis)])
    np.testing.assert_allclose(one_std.apply(x), (x - np.reshape(mean, along)) / 2, rtol=1e-5)


def test_imputing_fits_the_last_dimension():
    spec = InputSpec(shape=[2, 3], preprocess=[Impute([1.0, None, 3.0])])
    x = np.float32([[np.nan, 0, np.nan], [5, 6, np.nan]])
    np.testing.assert_array_equal(spec.apply(spec.check(x)[None])[0], [[1, 0, 3], [5, 6, 3]])
    assert np.isnan(x).sum() == 3  # the app's array is its own
    with pytest.raises(NonFiniteError, match=r"nan at \(1, 1\)"):
        spec.check([[0, 0, 0], [0, np.nan, 0]])
    with pytest.raises(NonFiniteError, match=r"inf at \(1, 0\)"):
        spec.check([[np.nan, 0, 0], [np.inf, 0, 0]])
    with pytest.raises(RangeError, match=r"values from 0 to 9, allowed 0\.0 to 8\.0"):
        InputSpec(shape=[3], low=0.0, high=8.0, preprocess=[Impute([1.0])]).check([np.nan, 0, 9])


# ---- any composition


SIZES = st.integers(1, 9)
KINDS = {
    "row": ["impute", "scale", "one_hot"],
    "image": ["scale", "resize", "permute", "window", "impute"],
    "recording": ["scale", "window", "permute", "impute"],
    "whole": ["window", "permute"],
}


def draw_op(draw, name, shape, columns):
    """An operation that fits samples of `shape`, and the shape after it."""
    match name:
        case "impute":
            values = st.lists(st.floats(-5, 5, width=32), min_size=shape[-1], max_size=shape[-1])
            return Impute(draw(values)), shape
        case "scale":
            axis = draw(st.integers(-len(shape), len(shape) - 1))
            count = draw(st.sampled_from([1, shape[axis]]))
            return Scale([0.5] * count, [float(i + 1) for i in range(count)], axis=axis), shape
        case "one_hot":
            coded = [column for column in columns if column.size]
            once = coded[-1:] if shape == [len(columns)] else []
            return OneHot([column.name for column in once]), [shape[0] + sum(column.size - 1 for column in once)]
        case "resize":
            op = Resize(draw(SIZES), draw(SIZES), layout=draw(st.sampled_from(["chw", "hwc"])))
            return op, [shape[0], op.height, op.width] if op.layout == "chw" else [op.height, op.width, shape[2]]
        case "permute":
            op = Permute(draw(st.permutations(range(len(shape)))))
            return op, [shape[i] for i in op.order]
        case "window":
            op = Window(draw(SIZES), draw(st.integers(1, 3)), draw(st.sampled_from(["zero", "edge"])))
            return op, [op.length, *shape[1:]]


@st.composite
def specs(draw):
    """A spec of up to four operations that fit, the shape of samples for it, and the shape that must come out."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    columns = []
    if kind == "row":
        forms = st.sampled_from([("number",), ("category", ["a", "b", "c"]), ("text", [], 5)])
        columns = [Column(f"c{i}", *draw(forms)) for i in range(draw(st.integers(1, 5)))]
    shape = {"row": [len(columns)], "image": [draw(st.sampled_from([1, 3])), draw(SIZES), draw(SIZES)]}.get(
        kind, [draw(SIZES), draw(SIZES)]
    )
    dtype = draw(st.sampled_from(["uint8", "int32", "int64"])) if kind == "whole" else "float32"
    sample, declared, ops = shape, shape, []
    for name in draw(st.lists(st.sampled_from(KINDS[kind]), max_size=4)):
        op, shape = draw_op(draw, name, shape, columns)
        ops.append(op)
    if ops and draw(st.booleans()):  # any size, where the first operation makes it a known one
        match ops[0]:
            case Window():
                declared = [-1, *sample[1:]]
            case Resize(layout="chw"):
                declared = [sample[0], -1, -1]
    return InputSpec(shape=declared, dtype=dtype, columns=columns, preprocess=ops), sample, shape


@given(made=specs(), seed=st.integers(0, 2**32 - 1))
def test_any_composition_gives_the_shape_it_promises_and_treats_each_row_alike(made, seed):
    spec, shape, wanted = made
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 5, (3, *shape)).astype(spec.dtype)
    if spec.imputes and not any(isinstance(op, Resize) for op in spec.preprocess):
        x[rng.random(x.shape) < 0.3] = np.nan
    checked = spec.check_batch(x)
    applied = spec.apply(checked)
    assert list(applied.shape[1:]) == spec.model_shape == wanted
    assert applied.dtype == np.dtype(spec.dtype)
    assert applied.flags.c_contiguous
    for i in range(3):
        one = spec.check(x[i])
        np.testing.assert_array_equal(one, checked[i])
        np.testing.assert_array_equal(spec.apply(one[None])[0], applied[i])
    if spec.imputes and not any(isinstance(op, Resize) for op in spec.preprocess):
        assert np.isfinite(applied).all()
    assert msgspec.json.decode(msgspec.json.encode(spec), type=InputSpec) == spec


# ---- contracts that cannot be


IMPOSSIBLE = [
    ({"shape": [0, 3]}, "sizes are 1 or more"),
    ({"shape": [-2]}, "sizes are 1 or more"),
    ({"shape": [2], "columns": [{"name": "a"}]}, r"1 columns make shape \[1\], not \[2\]"),
    ({"shape": [2], "columns": [{"name": "a"}, {"name": "a"}]}, "column names must differ"),
    ({"shape": [1], "columns": [{"name": "a", "kind": "category"}]}, "'a': a category needs its values"),
    ({"shape": [1], "columns": [{"name": "a", "kind": "category", "values": ["x", "x"]}]}, "each once"),
    ({"shape": [1], "columns": [{"name": "a", "kind": "text"}]}, "'a': a text needs 2 to 16777216 buckets, got 0"),
    ({"shape": [1], "columns": [{"name": "a", "kind": "text", "buckets": 2**24 + 1}]}, "got 16777217"),
    ({"shape": [1], "columns": [{"name": "a", "values": ["x"]}]}, "only a category has values"),
    ({"shape": [1], "columns": [{"name": "a", "buckets": 3}]}, "only a text has buckets"),
    ({"shape": [1], "columns": [{"name": "a", "kind": "text", "buckets": 3, "low": 0}]}, "only a number has a range"),
    ({"shape": [1], "columns": [{"name": "a", "low": 2, "high": 1}]}, "column 'a': nothing is both"),
    ({"shape": [1], "low": 2, "high": 1}, "'input': nothing is both at least 2.0 and at most 1.0"),
    ({"shape": [2], "dtype": "int64", "preprocess": [{"op": "scale", "mean": [0], "std": [1]}]}, "only be windowed"),
    ({"shape": [1], "dtype": "uint8", "columns": [{"name": "a"}]}, "only be windowed"),
    ({"shape": [2], "preprocess": [{"op": "impute", "values": []}]}, r"impute: 0 values do not fit shape \[2\]"),
    ({"shape": [2], "preprocess": [{"op": "impute", "values": [1, 2, 3]}]}, "impute: 3 values"),
    ({"shape": [2], "preprocess": [{"op": "impute", "values": [1e39]}]}, "impute: .* must be finite"),
    ({"shape": [2, 2], "preprocess": [{"op": "permute", "order": [1, 0]}, {"op": "impute", "values": [None, 1]}]},
     "impute: .* comes before Permute"),
    ({"shape": [2], "preprocess": [{"op": "one_hot", "columns": []}]}, "one_hot: it needs a tabular row"),
    ({"shape": [], "preprocess": [{"op": "one_hot", "columns": []}]}, "one_hot: it needs a tabular row"),
    ({"shape": [1], "columns": [{"name": "a"}], "preprocess": [{"op": "one_hot", "columns": ["a"]}]},
     "one_hot: 'a' is no category or text column"),
    ({"shape": [1], "columns": [{"name": "a", "kind": "text", "buckets": 3}],
      "preprocess": [{"op": "one_hot", "columns": ["b"]}]}, "one_hot: 'b' is no category or text column"),
    ({"shape": [1], "columns": [{"name": "a", "kind": "text", "buckets": 3}],
      "preprocess": [{"op": "one_hot", "columns": ["a"]}, {"op": "one_hot", "columns": ["a"]}]}, "'a' is no category"),
    ({"shape": [1], "columns": [{"name": "a"}], "preprocess": [{"op": "window", "length": 2}]},
     "window: a tabular row"),
    ({"shape": [2], "preprocess": [{"op": "scale", "mean": [], "std": []}]}, "scale: mean and std need at least one"),
    ({"shape": [2], "preprocess": [{"op": "scale", "mean": [1], "std": [0]}]}, "scale: .* std above 0"),
    ({"shape": [2], "preprocess": [{"op": "scale", "mean": [1e300], "std": [1]}]}, "scale: .* must be finite"),
    ({"shape": [2], "preprocess": [{"op": "scale", "mean": [1, 2, 3], "std": [1]}]}, "scale: 3 means and 1 stds"),
    ({"shape": [2, 3], "preprocess": [{"op": "scale", "mean": [1, 2, 3], "std": [1], "axis": 0}]}, "do not fit axis 0"),
    ({"shape": [2], "preprocess": [{"op": "scale", "mean": [1, 2], "std": [1], "axis": 1}]}, "has no axis 1"),
    ({"shape": [-1], "preprocess": [{"op": "scale", "mean": [1, 2], "std": [1]}]}, "do not fit axis -1"),
    ({"shape": [4, 4], "preprocess": [{"op": "resize", "height": 2, "width": 2}]}, "resize: layout chw"),
    ({"shape": [4, 4], "preprocess": [{"op": "resize", "height": 0, "width": 2, "layout": "hw"}]}, "size 0 x 2"),
    ({"shape": [], "preprocess": [{"op": "window", "length": 2}]}, "window: length 2"),
    ({"shape": [4], "preprocess": [{"op": "window", "length": 0}]}, "window: length 0"),
    ({"shape": [4], "preprocess": [{"op": "window", "length": 1, "stride": 0}]}, "stride 0"),
    ({"shape": [4, 4], "preprocess": [{"op": "permute", "order": [0, 0]}]}, "is no order of the dimensions"),
    ({"shape": [4, 4], "preprocess": [{"op": "permute", "order": [0]}]}, "is no order of the dimensions"),
    ({"shape": [4], "preprocess": [{"op": "fold"}]}, "fold"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), IMPOSSIBLE, ids=[reason for _, reason in IMPOSSIBLE])
def test_a_contract_that_cannot_be_is_refused_with_the_reason(fields, reason):
    with pytest.raises(ValueError, match=reason):
        msgspec.convert(fields, InputSpec)
    manifest = {"name": "m", "release": 1, "created": "", "labels": ["a"], "files": {}, "input": fields}
    with pytest.raises(IntegrityError, match=reason):
        parse_manifest(msgspec.json.encode(manifest))


def test_limits_that_are_no_numbers_are_refused():
    for make in (lambda: InputSpec(shape=[1], low=math.nan), lambda: Column("a", high=math.nan)):
        with pytest.raises(ValueError, match="a limit is a number"):
            make()
    with pytest.raises(ValueError, match="must be finite"):
        InputSpec(shape=[1], preprocess=[Impute([math.nan])])


# ---- what a call costs


def test_checking_and_applying_copy_nothing_that_need_not_change(rng):
    """A copy of an image of 600 kB costs as much as all checks together, and is paid on every request."""
    spec = InputSpec(shape=[3, 224, 224], low=0.0, high=1.0)
    x = rng.random((3, 224, 224), dtype=np.float32)
    checked = spec.check(x)
    assert np.shares_memory(checked, x)
    assert np.shares_memory(spec.apply(checked[None]), x)
    batch = x[None]
    assert np.shares_memory(spec.apply(spec.check_batch(batch)), batch)
    whole = np.arange(6, dtype=np.int64)
    tokens = InputSpec(shape=[6], dtype="int64", preprocess=[Window(6)])
    assert np.shares_memory(tokens.apply(tokens.check(whole)[None]), whole)
    row = np.zeros(3, np.float32)
    assert np.shares_memory(ROWS.check(row), row)


def test_what_lies_scattered_in_memory_is_gathered_for_the_network(rng):
    x = rng.random((4, 4), dtype=np.float32).T
    spec = InputSpec(shape=[4, 4])
    applied = spec.apply(spec.check(x)[None])
    assert applied.flags.c_contiguous
    np.testing.assert_array_equal(applied[0], x)
