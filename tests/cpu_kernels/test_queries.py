"""Queries taken apart: the part without position as it is, the other turned by the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels

SIZES = [(1, 128, 64), (3, 5, 2), (4, 0, 16), (128, 128, 64)]  # heads, H and P


def _draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _angles(batch, tokens, rope):
    angle = 1e3 * np.random.default_rng(1).random((batch, tokens, rope // 2))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.mark.parametrize(("heads", "size", "rope"), SIZES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3), (1, 200), (2, 0)])
def test_parts_are_the_definition(batch, tokens, heads, size, rope):
    q, (cos, sin) = _draw(0, batch, tokens, heads, size + rope), _angles(batch, tokens, rope)
    plain, rotated = jax.jit(cpu_kernels.split_queries)(q, cos, sin)
    np.testing.assert_array_equal(plain, q[..., :size])
    pairs = q[..., size::2].astype(np.float64) + 1j * q[..., size + 1 :: 2]
    turned = pairs * (cos.astype(np.float64) + 1j * sin)[:, :, None]
    np.testing.assert_allclose(rotated[..., 0::2], turned.real, atol=1e-6)
    np.testing.assert_allclose(rotated[..., 1::2], turned.imag, atol=1e-6)


def test_what_is_no_number_stays_in_its_pair():
    q, angles = _draw(0, 1, 4, 2, 12), _angles(1, 4, 8)
    clean = np.array(cpu_kernels.split_queries(jnp.asarray(q), *angles)[1])
    q[0, 2, 1, 7] = np.nan
    spoiled = np.asarray(cpu_kernels.split_queries(jnp.asarray(q), *angles)[1])
    assert np.isnan(spoiled[0, 2, 1, 2:4]).all()
    clean[0, 2, 1, 2:4] = np.nan
    np.testing.assert_array_equal(spoiled, clean)


def test_angles_of_other_tokens_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="angles do not fit the queries"):
        jax.block_until_ready(cpu_kernels.split_queries(jnp.ones((1, 3, 2, 12)), *_angles(1, 4, 8)))
