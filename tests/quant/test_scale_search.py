"""Scales that are found are about as good as the best of a dense grid, tried one by one in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.quant import scale_search
from mla_jax.quant.i_quants import VALUES_4

LEVELS = {
    "4 bits": (scale_search.integers(-8, 7), np.arange(-8, 8)),
    "6 bits": (scale_search.integers(-32, 31), np.arange(-32, 32)),
    "table": (scale_search.table(VALUES_4), VALUES_4.astype(np.float64)),
    "shifted table": (scale_search.table(VALUES_4, 4.0), VALUES_4.astype(np.float64) + 4),
}
each_levels = pytest.mark.parametrize(("levels", "values"), LEVELS.values(), ids=LEVELS)


def _draw(seed=0, runs=24, size=32):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (runs, size)) * rng.lognormal(0, 2, (runs, 1))
    return x.astype(np.float32), rng.lognormal(0, 1.5, (runs, size)).astype(np.float32)


def _nearest(x, values):
    return values[np.abs(x[..., None] - values).argmin(axis=-1)]


def _error(x, weights, y):
    return (weights * (x - y) ** 2).sum(axis=-1)


@each_levels
def test_nearest_is_the_nearest(levels, values):
    x = np.linspace(-140, 140, 1001, dtype=np.float32)
    found, codes = levels.nearest(jnp.asarray(x))
    np.testing.assert_allclose(np.abs(x - found), np.abs(x[:, None] - values).min(axis=1), atol=1e-5)
    np.testing.assert_array_equal(values[np.asarray(codes, int)], found)
    assert levels.lowest == values[0] == values[np.abs(values).argmax()]


@each_levels
def test_scale_is_about_the_best(levels, values):
    x, weights = (array.astype(np.float64) for array in _draw())
    scale = np.asarray(scale_search.fit_scale(*map(jnp.asarray, _draw()), levels), np.float64)
    found = _error(x, weights, scale * _nearest(x / scale, values))
    full = np.abs(x).max(axis=-1, keepdims=True) / 127
    grid = np.concatenate([np.geomspace(0.1, 40, 1500), -np.geomspace(0.1, 40, 1500)])
    best = np.min([_error(x, weights, g * full * _nearest(x / (g * full), values)) for g in grid], axis=0)
    ratio = np.sqrt(found / best)
    assert ratio.mean() < 1.02 and ratio.max() < 1.2


@each_levels
def test_a_large_weight_that_does_not_matter_is_cut_off(levels, values):
    x, weights = np.random.default_rng(3).standard_normal((24, 32), np.float32), np.ones((24, 32), np.float32)
    x[:, 0] = 3.5 * np.abs(x).max(axis=-1)
    weights[:, 0] = 1e-6
    scale = np.asarray(scale_search.fit_scale(jnp.asarray(x), jnp.asarray(weights), levels))
    alone = np.asarray(scale_search.fit_scale(jnp.asarray(x[:, 1:]), jnp.asarray(weights[:, 1:]), levels))
    found, best = (_error(x[:, 1:], 1.0, s * _nearest(x[:, 1:] / s, values)) for s in (scale, alone))
    assert np.sqrt(found / best).mean() < 1.15


def test_the_better_of_two_versions_is_taken():
    x, weights = map(jnp.asarray, _draw(seed=1))
    first, second = LEVELS["table"][0], LEVELS["shifted table"][0]
    error_of = lambda scale, levels: _error(x, weights, scale * levels.nearest(x / scale)[0])
    alone = [np.asarray(scale_search.fit_scale(x, weights, levels)) for levels in (first, second)]
    errors = [error_of(scale, levels) for scale, levels in zip(alone, (first, second), strict=True)]
    expected = np.where(errors[1] < errors[0], alone[1][:, 0], alone[0][:, 0])
    together = np.asarray(scale_search.fit_scale(x, weights, first, second))[:, 0]
    assert 0 < (errors[1] < errors[0]).mean() < 1
    np.testing.assert_allclose(together, expected, rtol=1e-5)


@pytest.mark.parametrize("highest", [3, 15, 31])
@pytest.mark.parametrize("is_negative", [False, True], ids=["any offset", "negative offset"])
def test_line_is_about_the_best(highest, is_negative):
    x, weights = _draw(seed=2)
    x += np.array([[0.0], [100.0], [-100.0]], np.float32).repeat(8, axis=0)
    fitted = scale_search.fit_line(
        jnp.asarray(x), jnp.asarray(weights), highest, is_offset_negative=is_negative
    )
    scale, offset = (np.asarray(number, np.float64) for number in fitted)
    assert (scale >= 0).all() and not (is_negative and (offset > 0).any())
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    codes_of = lambda scale, offset: np.clip(np.rint((x - offset) / scale), 0, highest)
    found = _error(x, weights, scale * codes_of(scale, offset) + offset)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    low = np.minimum(low, 0) if is_negative else low
    best = np.full(len(x), np.inf)
    for start in np.linspace(0, 0.6, 50):
        for end in np.linspace(0.3, 1, 50):
            if end > start:
                a = low + start * (high - low)
                a = np.minimum(a, 0) if is_negative else a
                step = np.maximum(low + end * (high - low) - a, 1e-9) / highest
                best = np.minimum(best, _error(x, weights, step * codes_of(step, a) + a))
    ratio = np.sqrt(found / best)
    assert ratio.mean() < {3: 1.12, 15: 1.03, 31: 1.0}[highest]
    assert ratio.max() < {3: 1.6, 15: 1.35, 31: 1.2}[highest]


@pytest.mark.parametrize("is_negative", [False, True], ids=["any offset", "negative offset"])
@pytest.mark.parametrize("constant", [0.0, 5.0, -5.0])
def test_line_of_a_constant(constant, is_negative):
    x = jnp.full((4096, 32), constant)
    scale, offset = scale_search.fit_line(x, _draw(runs=4096)[1], 15, is_offset_negative=is_negative)
    codes = np.where(scale > 0, np.rint((x - offset) / jnp.where(scale > 0, scale, 1.0)), 0)
    np.testing.assert_allclose(scale * codes + offset, x, rtol=1e-5)
    assert scale.max() <= abs(constant)


def test_weights_are_relative_and_positive():
    importance = jnp.asarray(np.array([[0, 0, 0, 0], [1e30, 0, 5e29, 0], [1e-30, 0, 1e-30, 0]], np.float32))
    found = np.asarray(scale_search.weights_of(jnp.ones((3, 4)), importance))
    np.testing.assert_allclose(found, [[1, 1, 1, 1], [1, 0, 0.5, 0], [1, 0, 1, 0]], atol=2e-6)
    assert (found > 0).all()


def test_choose_takes_the_first_of_equal_numbers_and_keeps_limits():
    error_of = lambda a, b: jnp.abs(a - 9.0) + 0.0 * b
    first = (jnp.array([0.0, 7.0, 9.0, 10.0]), jnp.zeros(4))
    steps = np.array([[0, 0], [0, 1], [1, 1], [-1, 1], [2, 0]], np.float32)
    a, b = scale_search.choose(error_of, first, steps, ((0, 8), (0, 1)))
    np.testing.assert_array_equal(a, [2, 8, 8, 8])
    np.testing.assert_array_equal(b, [0, 1, 0, 0])
