"""The rotation is the Hadamard matrix block by block, undoes itself, and spreads an outlier."""

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.cache import codec, rotate


def _matrix(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_each_block_is_multiplied_by_the_matrix(size):
    x = np.random.default_rng(0).standard_normal((3, 2, 512), dtype=np.float32)
    expected = (x.reshape(3, 2, -1, size) @ _matrix(size)).reshape(x.shape)
    rotated = rotate(jnp.asarray(x), size)
    np.testing.assert_allclose(rotated, expected, atol=1e-5)
    np.testing.assert_allclose(rotate(rotated, size), x, atol=1e-5)


def test_without_a_size_nothing_changes():
    x = jnp.ones((1, 5))
    assert rotate(x, None) is x


def test_it_lowers_the_error_of_few_bits_where_channels_stick_out():
    x = np.random.default_rng(0).standard_normal((256, 512), dtype=np.float32)
    x[:, ::40] *= 20
    store = lambda values: codec.decode(codec.encode(values, "q4_0"))
    plain = np.asarray(store(jnp.asarray(x)))
    rotated = np.asarray(rotate(store(rotate(jnp.asarray(x), 64)), 64))
    error = lambda found: np.sqrt(np.mean((found - x) ** 2))
    assert error(rotated) < 0.67 * error(plain)
