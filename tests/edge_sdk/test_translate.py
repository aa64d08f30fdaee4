"""The map between trunks: exact where one is a linear function of the other, harmless where it knows nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import EmptyBufferError
from edge_sdk.head import dequantize
from edge_sdk.manifest import LatentSpec
from edge_sdk.translate import fit_map, quantize


def spec(dim, scale=0.05, zero_point=100):
    return LatentSpec(dim=dim, scale=scale, zero_point=zero_point)


def rows(seed, count, dim):
    return np.random.default_rng(seed).integers(40, 200, size=(count, dim)).astype(np.uint8)


@given(seed=st.integers(0, 1000), dim=st.integers(1, 6), scale=st.floats(1e-3, 10), zero_point=st.integers(0, 255))
def test_what_is_dequantised_is_quantised_to_the_same(seed, dim, scale, zero_point):
    form, latents = (
        spec(dim, scale, zero_point),
        np.random.default_rng(seed).integers(0, 256, (9, dim)).astype(np.uint8),
    )
    np.testing.assert_array_equal(quantize(dequantize(latents, form), form), latents)


@given(seed=st.integers(0, 1000), old=st.integers(2, 6), new=st.integers(1, 6))
def test_a_linear_change_of_the_trunk_is_found(seed, old, new):
    rng = np.random.default_rng(seed)
    before, other = rows(seed, 80, old), rows(seed + 1, 20, old)
    weights, bias = rng.normal(0, 0.3, (old, new)), rng.normal(0, 0.3, new)
    into = spec(new, 0.2, 128)

    def changed(latents):
        return quantize((dequantize(latents, spec(old)) @ weights + bias).astype(np.float32), into)

    found = fit_map(before, changed(before), old_spec=spec(old), new_spec=into)
    assert np.abs(found(other).astype(int) - changed(other)).max() <= 1


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), count=st.integers(1, 30), old=st.integers(1, 12), new=st.integers(1, 12),
       constant=st.booleans())  # fmt: skip
def test_whatever_the_rows_are_the_map_is_finite_and_its_latents_are_latents(seed, count, old, new, constant):
    before, after = rows(seed, count, old), rows(seed + 1, count, new)
    if constant:
        before[:], after[:] = 7, 9
    kept = before.copy(), after.copy()
    found = fit_map(before, after, old_spec=spec(old), new_spec=spec(new))
    translated = found(rows(seed + 2, 10, old))
    assert translated.dtype == np.uint8
    assert translated.shape == (10, new)
    assert np.isfinite(found.weights).all()
    assert np.isfinite(found.error)
    np.testing.assert_array_equal(before, kept[0])
    np.testing.assert_array_equal(after, kept[1])
    if constant:
        np.testing.assert_array_equal(found(before), after)


@given(seed=st.integers(0, 200))
def test_what_has_nothing_to_do_with_the_old_latents_is_predicted_by_its_mean(seed):
    before, after = rows(seed, 200, 4), rows(seed + 1, 200, 3)
    found = fit_map(before, after, old_spec=spec(4), new_spec=spec(3))
    assert 0.9 < found.error < 1.1
    assert np.abs(found(before).mean(axis=0) - after.mean(axis=0)).max() < 2


def test_the_error_is_that_of_rows_left_out(rng):
    before = rows(5, 30, 6)
    after = np.clip(before[:, :4] + rng.normal(0, 25, (30, 4)), 0, 255).astype(np.uint8)
    forms = {"old_spec": spec(6), "new_spec": spec(4)}
    errors = [
        dequantize(after[i : i + 1], spec(4))
        - dequantize(fit_map(np.delete(before, i, 0), np.delete(after, i, 0), **forms)(before[i : i + 1]), spec(4))
        for i in range(30)
    ]
    values = dequantize(after, spec(4))
    expected = np.square(errors).sum() / np.square(values - values.mean(axis=0)).sum()
    assert fit_map(before, after, **forms).error == pytest.approx(expected, rel=0.15)


def test_a_map_needs_rows():
    with pytest.raises(EmptyBufferError):
        fit_map(rows(0, 0, 3), rows(0, 0, 3), old_spec=spec(3), new_spec=spec(3))
