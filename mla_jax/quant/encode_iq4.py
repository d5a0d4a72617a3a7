"""Encoders of the types whose codes of 4 bits choose among 16 uneven values, in super-blocks of 256 weights.

IQ4_KS has one float32 scale for a row: `fit_iq4_ks` must have seen all its blocks before any is encoded.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits, packing, scale_search
from mla_jax.quant.encode_k import scaled_runs
from mla_jax.quant.i_quants import VALUES_4

_SHIFT = 4.0  # of the values in the second version of the table of IQ4_KS
HIGHEST_SCALE = 127  # scales of IQ4_KS are odd
_NEIGHBOURS = np.array(list(itertools.product([0.0, -2.0, 2.0], [0.0, 1.0])), np.float32)
_LARGEST_UNIT = 2.0**126  # the inverse of a larger one would count as zero


def encode_iq4_xs(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes 8 runs of 32 weights, each `d * (scale - 32) * value`.

    Args:
      x: float32[n, 256].
      importance: float32[n, 256] or None.

    Returns:
      uint8[n, 136].
    """
    levels = scale_search.table(VALUES_4)
    unit, scales, codes = scaled_runs(x, importance, levels, num_runs=8, lowest_scale=-32)
    scales = (scales + 32).astype(jnp.uint8)
    high, low = packing.pack(scales >> jnp.uint8(4), 2), packing.pack(scales & jnp.uint8(0x0F), 4)
    codes = packing.planes(codes.astype(jnp.uint8), 4, runs=8)
    return jnp.concatenate([packing.float16(unit), high, low, codes], axis=-1)


def fit_iq4_ks(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Finds the scales that runs of IQ4_KS should have; the scale of a row is the largest of them / 127.

    Args:
      x: float32[n, 256].
      importance: float32[n, 256] or None.

    Returns:
      float32[n, 8], of either sign.
    """
    size = _power_of_two(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    runs = bits.split(x * scale_search.inverse(size), 8)
    weights = bits.split(scale_search.weights_of(x, importance), 8)
    versions = [scale_search.table(values) for values in (VALUES_4, VALUES_4 + np.float32(_SHIFT))]
    return scale_search.fit_scale(runs, weights, *versions)[..., 0] * size


def encode_iq4_ks(
    x: jax.Array, importance: jax.Array | None, scale: jax.Array, row_scale: jax.Array
) -> jax.Array:
    """Encodes 8 runs of 32 weights, each `d * scale * value` with an odd scale and `d` of the row.

    Args:
      x: float32[n, 256].
      importance: float32[n, 256] or None.
      scale: float32[n, 8], from `fit_iq4_ks`.
      row_scale: float32[n, 1], `d` of the row that each block belongs to.

    Returns:
      uint8[n, 136].
    """
    size = scale_search.inverse(_power_of_two(row_scale))
    runs, scale, row_scale = bits.split(x * size, 8), scale * size, row_scale * size
    weights = bits.split(scale_search.weights_of(x, importance), 8)
    levels_of = lambda version: scale_search.table(VALUES_4, (_SHIFT * version)[..., None])
    inverse_of = lambda scales: scale_search.inverse(row_scale * scales)[..., None]

    def error_of(scales, version):
        values, _ = levels_of(version).nearest(runs * inverse_of(scales))
        difference = runs - (row_scale * scales)[..., None] * values
        return jnp.sum(weights * difference * difference, axis=-1)

    limits = ((-HIGHEST_SCALE, HIGHEST_SCALE), (0, 1))
    halves = jnp.rint((scale * scale_search.inverse(row_scale) + HIGHEST_SCALE) / 2)
    first = jnp.clip(2 * halves - HIGHEST_SCALE, *limits[0])
    scales, version = scale_search.choose(error_of, (first, jnp.zeros_like(first)), _NEIGHBOURS, limits)
    codes = bits.join(levels_of(version).nearest(runs * inverse_of(scales))[1], 2)
    scale_bytes = (scales + HIGHEST_SCALE + version).astype(jnp.uint8)
    return jnp.concatenate([scale_bytes, packing.planes(codes.astype(jnp.uint8), 4, runs=8)], axis=-1)


def _power_of_two(numbers):
    """Returns a power of two near each number: divided by it, any number has squares that are numbers too."""
    exponents = jax.lax.bitcast_convert_type(numbers, jnp.uint32) & jnp.uint32(0x7F800000)
    return jnp.minimum(jax.lax.bitcast_convert_type(exponents, jnp.float32), _LARGEST_UNIT)
