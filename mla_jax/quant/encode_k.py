"""Encoders of the k-quants: super-blocks of 256 weights, whose runs have scales quantised in turn.

Each takes float32[n, 256] and importance of that shape or None, and returns uint8[n, bytes of a block].
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits, packing, scale_search

_NEIGHBOURS = np.array([[0.0], [-1.0], [1.0]], np.float32)
_NEIGHBOURS_2 = np.array(list(itertools.product([0.0, -1.0, 1.0], repeat=2)), np.float32)


def encode_q2_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes 16 runs of 16 weights, each `d * scale * code - dmin * minimum`, with 4-bit factors."""
    halves, scales, minima, codes = _lines(x, importance, num_runs=16, highest=3, highest_scale=15)
    return jnp.concatenate([scales | (minima << jnp.uint8(4)), packing.planes(codes, 2, runs=2), halves], -1)


def encode_q3_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes 16 runs of 16 weights, each `d * (scale - 32) * (code - 4)`."""
    levels = scale_search.integers(-4, 3)
    unit, scales, codes = scaled_runs(x, importance, levels, num_runs=16, lowest_scale=-32)
    scales, codes = (scales + 32).astype(jnp.uint8), codes.astype(jnp.uint8)
    parts = [
        packing.planes(codes >> jnp.uint8(2), 1),
        packing.planes(codes & jnp.uint8(3), 2, runs=2),
        packing.planes(scales & jnp.uint8(0x0F), 4),
        packing.planes(scales >> jnp.uint8(4), 2),
        packing.float16(unit),
    ]
    return jnp.concatenate(parts, axis=-1)


def encode_q4_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes 8 runs of 32 weights, each `d * scale * code - dmin * minimum` with 6-bit scales and minima."""
    halves, scales, minima, codes = _lines(x, importance, num_runs=8, highest=15, highest_scale=63)
    return jnp.concatenate([halves, _scales_and_minima(scales, minima), packing.planes(codes, 4, runs=4)], -1)


def encode_q5_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes what `encode_q4_k` encodes, with a fifth bit for each code."""
    halves, scales, minima, codes = _lines(x, importance, num_runs=8, highest=31, highest_scale=63)
    parts = [
        halves,
        _scales_and_minima(scales, minima),
        packing.planes(codes >> jnp.uint8(4), 1),
        packing.planes(codes & jnp.uint8(0x0F), 4, runs=4),
    ]
    return jnp.concatenate(parts, axis=-1)


def encode_q6_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes 16 runs of 16 weights, each `d * scale * (code - 32)`."""
    levels = scale_search.integers(-32, 31)
    unit, scales, codes = scaled_runs(x, importance, levels, num_runs=16, lowest_scale=-128)
    codes = codes.astype(jnp.uint8)
    parts = [
        packing.planes(codes & jnp.uint8(0x0F), 4, runs=2),
        packing.planes(codes >> jnp.uint8(4), 2, runs=2),
        packing.as_bytes(scales.astype(jnp.int8)),
        packing.float16(unit),
    ]
    return jnp.concatenate(parts, axis=-1)


def scaled_runs(
    x: jax.Array,
    importance: jax.Array | None,
    levels: scale_search.Levels,
    *,
    num_runs: int,
    lowest_scale: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encodes runs of weights as `unit * scale * value`.

    Args:
      x: float32[n, 256].
      importance: float32[n, 256] or None.
      levels: the values.
      num_runs: runs with a scale each.
      lowest_scale: scales are from this to `-lowest_scale - 1`.

    Returns:
      Unit float32[n, 1] as float16 has it, scales float32[n, num_runs] and codes float32[n, 256], whole.
    """
    weights = bits.split(scale_search.weights_of(x, importance), num_runs)
    runs = bits.split(x, num_runs)
    scale = scale_search.fit_scale(runs, weights, levels)[..., 0]
    unit = packing.rounded_to_float16(scale_search.extreme(scale) / lowest_scale)
    value = lambda scales: levels.nearest(runs * scale_search.inverse(unit * scales)[..., None])

    def error_of(scales):
        difference = runs - (unit * scales)[..., None] * value(scales)[0]
        return jnp.sum(weights * difference * difference, axis=-1)

    limits = (lowest_scale, -lowest_scale - 1)
    first = jnp.clip(jnp.rint(scale * scale_search.inverse(unit)), *limits)
    (scales,) = scale_search.choose(error_of, (first,), _NEIGHBOURS, (limits,))
    return unit, scales, bits.join(value(scales)[1], 2)


def _lines(x, importance, *, num_runs, highest, highest_scale):
    """Encodes runs of weights as `d * scale * code - dmin * minimum`.

    Args:
      x: float32[n, 256].
      importance: float32[n, 256] or None.
      num_runs: runs with a scale and a minimum each.
      highest: codes are 0 to `highest`.
      highest_scale: scales and minima are 0 to `highest_scale`.

    Returns:
      The bytes of `d` and `dmin`, uint8[n, 4]; scales and minima uint8[n, num_runs], codes uint8[n, 256].
    """
    weights = bits.split(scale_search.weights_of(x, importance), num_runs)
    runs = bits.split(x, num_runs)
    scale, offset = scale_search.fit_line(runs, weights, highest, is_offset_negative=True)
    scale, minimum = scale[..., 0], -offset[..., 0]
    d, dmin = (
        packing.rounded_to_float16(jnp.max(numbers, axis=-1, keepdims=True) / highest_scale)
        for numbers in (scale, minimum)
    )

    def codes_of(scales, minima):
        shifted = runs + (dmin * minima)[..., None]
        return jnp.clip(jnp.rint(shifted * scale_search.inverse(d * scales)[..., None]), 0, highest)

    def error_of(scales, minima):
        line = (d * scales)[..., None] * codes_of(scales, minima) - (dmin * minima)[..., None]
        return jnp.sum(weights * (runs - line) * (runs - line), axis=-1)

    limits = (0, highest_scale)
    first = tuple(
        jnp.clip(jnp.rint(numbers * scale_search.inverse(unit)), *limits)
        for numbers, unit in ((scale, d), (minimum, dmin))
    )
    scales, minima = scale_search.choose(error_of, first, _NEIGHBOURS_2, (limits, limits))
    codes = bits.join(codes_of(scales, minima), 2)
    halves = packing.float16(jnp.concatenate([d, dmin], axis=-1))
    return halves, *(numbers.astype(jnp.uint8) for numbers in (scales, minima, codes))


def _scales_and_minima(scales, minima):
    """Packs 8 scales and 8 minima of 6 bits into 12 bytes: uint8[n, 8] twice -> uint8[n, 12].

    The first four of each have a byte, whose two high bits belong to the last four; the low bits of these are
    nibbles of the last bytes.
    """
    four, six, low = jnp.uint8(4), jnp.uint8(6), jnp.uint8(0x0F)
    whole = [numbers[:, :4] | ((numbers[:, 4:] >> four) << six) for numbers in (scales, minima)]
    mixed = (scales[:, 4:] & low) | ((minima[:, 4:] & low) << four)
    return jnp.concatenate([*whole, mixed], axis=-1)
