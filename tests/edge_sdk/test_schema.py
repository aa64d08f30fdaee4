"""Inputs: what is refused and why, and one path of preprocessing for one sample and for many."""

import msgspec
import numpy as np
import pytest

from edge_sdk.errors import DtypeError, InputError, NonFiniteError, RangeError, ShapeError
from edge_sdk.schema import InputSpec, Scale

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
