"""Cache types against their definitions, one block at a time in numpy, and what must survive each of them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_jax.cache import codec
from mla_jax.config import CACHE_TYPES, QUANTISED_CACHE_TYPES
from mla_jax.quant import i_quants

ROWS, WIDTH = 40, 192
BLOCKS = [name for name in QUANTISED_CACHE_TYPES if name != "fp8_e4m3"]

encode = jax.jit(codec.encode, static_argnums=1)
decode = jax.jit(codec.decode, static_argnums=1)


def _numbers(seed=0):
    """Gaussian numbers with outliers, in blocks of very different size; one block is zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, WIDTH // 32, 32)) * np.exp(2 * rng.standard_normal((ROWS, WIDTH // 32, 1)))
    x[:, :, 5] *= 10
    x[3, 1] = 0
    return x.reshape(ROWS, WIDTH).astype(np.float32)


def _half(number):
    return np.float64(np.float16(number))


def _symmetric(x, half, refit):
    extreme = x[np.argmax(np.abs(x))]
    if extreme == 0:
        return np.zeros_like(x)
    codes = np.minimum(np.trunc(x * (-half / extreme) + half + 0.5), 2 * half - 1) - half
    scale = np.sum(x**3 * codes) / np.sum(x**2 * codes**2) if refit else extreme / -half
    return _half(scale) * codes


def _from_minimum(x, largest_code):
    spread = x.max() - x.min()
    codes = np.trunc((x - x.min()) * largest_code / spread + 0.5) if spread else np.zeros_like(x)
    return _half(spread / largest_code) * codes + _half(x.min())


def _q4_0(x):
    extreme = x.max() if abs(x.max()) > abs(x.min()) else x.min()
    if extreme == 0:
        return np.zeros_like(x)
    codes = np.minimum(np.rint(x * -8 / extreme), 7)
    return _half(np.sum(x**3 * codes) / np.sum(x**2 * codes**2)) * codes


def _nearest_byte(x, rounded):
    scale = np.abs(x).max() / 127
    return rounded(scale) * np.rint(x / scale) if scale else np.zeros_like(x)


DEFINITIONS = {
    "q8_0": lambda x: _nearest_byte(x, _half),
    "q8_KV": lambda x: _nearest_byte(x, np.float32),
    "q6_0": lambda x: _symmetric(x, 32, refit=True),
    "q5_1": lambda x: _from_minimum(x, 31),
    "q5_0": lambda x: _symmetric(x, 16, refit=False),
    "q4_1": lambda x: _from_minimum(x, 15),
    "q4_0": _q4_0,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_block_type_is_its_definition(name):
    x = _numbers()
    size = codec.BLOCK_TYPES[name].block or WIDTH
    expected = [DEFINITIONS[name](block) for block in x.astype(np.float64).reshape(-1, size)]
    expected = np.concatenate(expected).reshape(x.shape)
    found = np.asarray(decode(encode(jnp.asarray(x), name), jnp.float32))
    # float32 may choose the other code next to a tie, and the other float16 for a scale: one number in 1000
    is_off = np.abs(found - expected) > 1e-6 * np.abs(x).max(axis=-1, keepdims=True)
    assert is_off.mean() < 1e-3


def test_iq4_nl_takes_levels_and_fits_better_than_the_nearest_ones():
    x = _numbers()
    codes = encode(jnp.asarray(x), "iq4_nl")
    found = np.asarray(decode(codes, jnp.float32), np.float64).reshape(-1, 32)
    blocks = x.astype(np.float64).reshape(-1, 32)
    scale = np.asarray(codes.scale, np.float64).reshape(-1, 1)
    ratio = np.divide(found, scale, out=np.zeros_like(found), where=scale != 0)
    distance = np.abs(ratio[..., None] - i_quants.VALUES_4).min(axis=-1)
    assert distance[scale[:, 0] != 0].max() < 1e-3
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[:, None], axis=-1)
    levels = i_quants.VALUES_4.astype(np.float64)
    target = np.divide(blocks * -127, extreme, out=np.zeros_like(blocks), where=extreme != 0)
    nearest = levels[np.abs(target[..., None] - levels).argmin(axis=-1)]
    weight = blocks**2
    fit = (weight * nearest * blocks).sum(-1, keepdims=True) / (weight * nearest**2).sum(
        -1, keepdims=True
    ).clip(1e-30)
    error = lambda values: (weight * (values - blocks) ** 2).sum()
    assert error(found) < error(fit * nearest)


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_zeros_stay_zeros(name):
    zeros = codec.empty((2, 64), name)
    assert not np.asarray(decode(zeros, jnp.float32)).any()
    assert not np.asarray(decode(encode(jnp.zeros((2, 64)), name), jnp.float32)).any()


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_a_nan_stays_visible_and_spoils_no_other_row(name):
    x = _numbers()
    clean = np.asarray(decode(encode(jnp.asarray(x), name), jnp.float32))
    x[2, 70] = np.nan
    found = np.asarray(decode(encode(jnp.asarray(x), name), jnp.float32))
    assert np.isnan(found[2, 70])
    np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(clean, 2, axis=0))


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_no_finite_number_becomes_infinite_or_nan(name):
    x = _numbers()
    x[0, 0], x[1, 40], x[5, 100] = 1e30, -1e9, 70000.0
    found = np.asarray(decode(encode(jnp.asarray(x), name), jnp.float32))
    assert np.isfinite(found).all()


def test_fp8_is_the_nearest_number_and_saturates():
    x = jnp.asarray([[0.1, -0.1, 448.0, 500.0, -1e9, 1.0625, 3e-3]], jnp.float32)
    expected = np.asarray([0.1, -0.1, 448, 448, -448, 1.0625, 3e-3], np.float32)
    expected = expected.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(decode(encode(x, "fp8_e4m3"), jnp.float32))[0], expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_do_not_see_their_neighbours(name):
    x = _numbers()
    size = codec.BLOCK_TYPES[name].block or WIDTH
    apart = [
        decode(encode(jnp.asarray(x[:, i : i + size]), name), jnp.float32) for i in range(0, WIDTH, size)
    ]
    together = decode(encode(jnp.asarray(x), name), jnp.float32)
    np.testing.assert_array_equal(np.asarray(together), np.concatenate(apart, axis=-1))


@pytest.mark.parametrize("name", BLOCKS)
def test_parts_have_the_shapes_of_the_docstring(name):
    codes = codec.empty((3, 5, WIDTH), name)
    kind = codec.BLOCK_TYPES[name]
    assert codes.shape == (3, 5, WIDTH) and codes.ndim == 3 and codec.type_of(codes) == name
    assert codes.low.shape == (3, 5, WIDTH * kind.low_bits // 8)
    assert (codes.high is None) == (kind.high_bits == 0)
    assert codes.high is None or codes.high.shape == (3, 5, WIDTH * kind.high_bits // 8)
    assert codes.scale.shape == (3, 5, WIDTH // (kind.block or WIDTH))
    assert (codes.offset is not None) == (name in ("q4_1", "q5_1"))


def test_a_row_must_be_whole_blocks():
    with pytest.raises(ValueError, match="rows of cache type q4_0 must be a multiple of 32 wide, got 48"):
        codec.empty((1, 48), "q4_0")
