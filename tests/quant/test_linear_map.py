"""The product with frozen blocks as a linear map, beside the same with a dense float32 copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from mla_jax import quant
from mla_jax.quant import linear_map

ROWS, COLUMNS = 96, 64


def _weight(format, rows=ROWS, columns=COLUMNS, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    return jax.tree.map(jnp.asarray, quant.encode(values, format))


def _x(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _loss(x, weight):
    return jnp.sum(jnp.sin(quant.matmul(x, weight)))


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "iq4_nl"])
@pytest.mark.parametrize("decoded", [1 << 22, 640, 7 * COLUMNS], ids=["whole", "pieces", "rest"])
def test_gradient_is_that_of_a_dense_copy(monkeypatch, format, decoded):
    monkeypatch.setattr(linear_map, "_DECODED", decoded)
    jax.clear_caches()  # the number of pieces is a constant of the compiled code
    x, weight = _x(2, 5, COLUMNS), _weight(format)
    found, expected = jax.grad(_loss)(x, weight), jax.grad(_loss)(x, quant.decode(weight))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "derive",
    [
        lambda f, x: jax.jvp(f, (x,), (jnp.cos(x),))[1],
        lambda f, x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
        lambda f, x: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), jnp.cos(x)))(x),
        lambda f, x: jax.vmap(jax.grad(f))(x),
        lambda f, x: jax.vmap(jax.grad(f), in_axes=1)(x[None, :, :]),
        lambda f, x: jax.hessian(f)(x[0]),
    ],
    ids=["jvp", "forward over reverse", "reverse over reverse", "vmap of grad", "other axis", "hessian"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_every_transformation_goes_through(derive, jit):
    x, weight = _x(3, COLUMNS), _weight("q8_0")
    of = lambda weight: lambda x: derive(lambda x: _loss(x, weight), x)
    found = (jax.jit(of(weight)) if jit else of(weight))(x)
    np.testing.assert_allclose(found, of(quant.decode(weight))(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x_axis", [None, 0])
def test_weights_in_a_batch(x_axis):
    weights = [_weight("q8_0", seed=seed) for seed in (0, 1)]
    x = _x(5, COLUMNS) if x_axis is None else _x(2, 5, COLUMNS)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    found = jax.vmap(jax.grad(_loss), in_axes=(x_axis, 0))(x, stacked)
    for i, weight in enumerate(weights):
        expected = jax.grad(_loss)(x if x_axis is None else x[i], weight)
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_a_gradient_are_not_kept_decoded():
    """What the forward pass keeps for the backward one is the blocks, in their bytes."""
    x, weight = _x(5, COLUMNS), _weight("q8_0")
    kept = jax.tree.leaves(jax.vjp(lambda x: quant.matmul(x, weight), x)[1])
    assert [leaf.shape for leaf in kept] == [weight.blocks.shape] and kept[0].dtype == jnp.uint8


@pytest.mark.skipif(not cpu_kernels.available(), reason=str(cpu_kernels.unavailable_because()))
def test_kernels_compute_the_result_and_xla_the_gradient():
    x, weight = _x(40, COLUMNS), _weight("q8_0")
    loss = lambda x, weight: jnp.sum(jnp.sin(0.1 * quant.matmul(x, weight)))
    with jax.default_matmul_precision(None):
        value, gradient = jax.value_and_grad(loss)(x, weight)
        plain = loss(x, weight)
    assert value == plain
    expected = jax.grad(loss)(x, quant.decode(weight))
    assert jnp.linalg.norm(gradient - expected) < 0.02 * jnp.linalg.norm(expected)


def test_weights_with_an_adapter_are_their_sum():
    base, x = _weight("q4_0"), _x(7, COLUMNS)
    a, b = _x(3, COLUMNS, seed=2), _x(ROWS, 3, seed=3)
    weight = quant.LoraTensor(base=base, a=a, b=b)
    dense = quant.decode(base) + b @ a
    assert weight.shape == dense.shape and weight.ndim == 2
    np.testing.assert_allclose(quant.decode(weight), dense, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(quant.matmul(x, weight), x @ dense.T, rtol=1e-4, atol=1e-4)
    loss = lambda parts: _loss(x, quant.LoraTensor(base=base, a=parts[0], b=parts[1]))
    of_dense = lambda parts: _loss(x, quant.decode(base) + parts[1] @ parts[0])
    for found, expected in zip(jax.grad(loss)((a, b)), jax.grad(of_dense)((a, b)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["f16", "bf16"])
def test_planes_of_plain_numbers_have_a_gradient(dtype):
    """Experts of 16 bits are planes for a GPU, and as trainable there as anywhere."""
    array, x = _x(1, ROWS, COLUMNS, seed=4).astype(dtype), _x(5, COLUMNS)
    loss = lambda array: _loss(x, quant.to_planes(array)[0])
    found = jax.grad(loss)(array)
    expected = jax.grad(lambda array: _loss(x, array[0]))(array)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.01, atol=1e-3)
    assert jnp.abs(expected).max() > 1
