"""The norm against its definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from mla_jax.nn import layers

EPSILON = 1e-6
SIZES = (1, 15, 16, 17, 576, 7168)


def _draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _definition(x, weight, epsilon=EPSILON):
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight.astype(np.float64)


def _norm(x, weight, epsilon=EPSILON):
    return np.asarray(cpu_kernels.rms_norm(jnp.asarray(x), jnp.asarray(weight), epsilon=epsilon))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 40)], ids=str)
def test_norm_is_the_definition(size, lead, instruction_set):
    x, weight = _draw(0, *lead, size), _draw(1, size)
    expected = _definition(x, weight)
    np.testing.assert_allclose(_norm(x, weight), expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e-3, 1e3, 1e15])
def test_small_and_large_numbers(scale, instruction_set):
    """As long as squares fit float32; those that vanish beside epsilon may."""
    x, weight = _draw(0, 4, 100) * np.float32(scale), _draw(1, 100)
    np.testing.assert_allclose(_norm(x, weight), _definition(x, weight), rtol=2e-6)


@pytest.mark.parametrize("epsilon", [1e-30, 1e-6, 1e-2, 4.0])
def test_epsilon_joins_the_mean_square(epsilon, instruction_set):
    x, weight = _draw(0, 3, 50) * np.float32(0.1), _draw(1, 50)
    np.testing.assert_allclose(_norm(x, weight, epsilon), _definition(x, weight, epsilon), rtol=2e-6)


def test_zeros_give_zeros(instruction_set):
    np.testing.assert_array_equal(_norm(np.zeros((2, 33), np.float32), _draw(1, 33)), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_spoils_its_row_alone(bad, instruction_set):
    x, weight = _draw(0, 5, 40), _draw(1, 40)
    clean = _norm(x, weight)
    x[2, 7] = bad
    spoiled = _norm(x, weight)
    assert np.isnan(spoiled[2, 7])
    np.testing.assert_array_equal(np.delete(spoiled, 2, axis=0), np.delete(clean, 2, axis=0))


def test_no_rows(instruction_set):
    assert _norm(np.zeros((0, 8), np.float32), _draw(1, 8)).shape == (0, 8)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_alone_and_among_others(size, instruction_set):
    x, weight = _draw(0, 600, size), _draw(1, size)
    among = _norm(x, weight)
    for row in (0, 1, 299, 599):
        np.testing.assert_array_equal(_norm(x[row], weight), among[row])


def test_a_weight_of_another_size_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="x does not fit the weight"):
        jax.block_until_ready(cpu_kernels.rms_norm(jnp.ones((2, 8)), jnp.ones((4,)), epsilon=EPSILON))


def test_the_model_normalises_by_the_kernel():
    x, weight = jnp.asarray(_draw(0, 2, 64)), jnp.asarray(_draw(1, 64))
    norm = jax.jit(functools.partial(layers.rms_norm, epsilon=EPSILON))
    assert "mla_rms_norm" in norm.lower(x, weight).as_text()
    np.testing.assert_allclose(norm(x, weight), _definition(np.asarray(x), np.asarray(weight)), rtol=2e-6)
    slope = lambda x: jnp.sum(norm(x, weight) ** 2)
    with jax.default_matmul_precision("highest"):
        exact = jax.grad(lambda x: jnp.sum(layers.rms_norm(x, weight, EPSILON) ** 2))(x)
    np.testing.assert_allclose(jax.grad(slope)(x), exact, rtol=1e-5, atol=1e-5)
