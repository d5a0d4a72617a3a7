"""Decoders of the i-quants: codes stand for values in a table, or for groups of 4 or 8 values in a codebook.

Each product of a float16, a scale and a value has at most 22 bits: exact in float32, in any order.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits
from mla_jax.quant.codebooks import codebook

VALUES_4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def decode_iq4_nl(blocks: jax.Array) -> jax.Array:
    """Decodes 32 weights, each `d * value`; low nibbles are the first half of the block."""
    return bits.float16(blocks, 0) * bits.lookup(VALUES_4, bits.planes(blocks[..., 2:], 4))


def decode_iq4_xs(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights, each `d * (scale - 32) * value`; a scale is 4 low and 2 high bits."""
    scales = bits.unpack(blocks[..., 4:8], 4) | (bits.unpack(blocks[..., 2:4], 2) << jnp.uint8(4))
    scale = bits.float16(blocks, 0) * (scales.astype(jnp.float32) - jnp.float32(32))
    return _scaled(scale, bits.lookup(VALUES_4, bits.planes(blocks[..., 8:], 4, runs=8)))


def decode_iq2_xxs(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 4 groups of 8 weights, each `d * (2 * scale + 1) / 8 * value`.

    A run is 4 bytes of codes and a word of signs and a scale.
    """
    runs = bits.split(blocks[..., 2:], 8)
    signs, odd = _signs_and_scales(runs[..., 4:])
    values = _signed(codebook("iq2_xxs"), bits.join(runs[..., :4], 2), signs)
    return _scaled(bits.float16(blocks, 0) * odd * jnp.float32(0.125), values)


def decode_iq2_xs(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 2 groups of 8 weights, each `d * (2 * scale + 1) / 8 * value`.

    A group is a word of 9 bits of code and 7 of signs.
    """
    words = _words(bits.split(blocks[..., 2:66], 32), jnp.uint16)
    signs = _with_eighth_sign((words >> jnp.uint16(9)).astype(jnp.uint8))
    values = _signed(codebook("iq2_xs"), words & jnp.uint16(0x01FF), signs)
    odd = _odd(bits.unpack(blocks[..., 66:], 4))
    return _scaled(bits.float16(blocks, 0) * odd * jnp.float32(0.125), values)


def decode_iq2_s(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 2 groups of 8 weights, each `d * (2 * scale + 1) / 8 * value`.

    A group has 8 low and 2 high bits of code, and a byte of signs.
    """
    codes = _codes(blocks[..., 2:34], bits.unpack(blocks[..., 66:74], 2))
    values = _signed(codebook("iq2_s"), codes, blocks[..., 34:66])
    odd = _odd(bits.unpack(blocks[..., 74:], 4))
    return _scaled(bits.float16(blocks, 0) * odd * jnp.float32(0.125), values)


def decode_iq3_xxs(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 8 groups of 4 weights, each `d * (2 * scale + 1) / 4 * value`.

    A group has a byte of code. After all of them each run has a word of signs and a scale.
    """
    signs, odd = _signs_and_scales(bits.split(blocks[..., 66:], 8))
    values = _signed(codebook("iq3_xxs"), blocks[..., 2:66], signs)
    return _scaled(bits.float16(blocks, 0) * odd * jnp.float32(0.25), values)


def decode_iq3_s(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 8 groups of 4 weights, each `d * (2 * scale + 1) * value`.

    A group has 8 low bits and a high bit of code, two groups have a byte of signs.
    """
    codes = _codes(blocks[..., 2:66], bits.unpack(blocks[..., 66:74], 1))
    values = _signed(codebook("iq3_s"), codes, blocks[..., 74:106])
    return _scaled(bits.float16(blocks, 0) * _odd(bits.unpack(blocks[..., 106:], 4)), values)


def decode_iq1_s(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 4 groups of 8 weights, each `d * (2 * scale + 1) * (value + shift)`.

    A group has 8 low bits of code. Each run has a word: 3 high bits of code for each group, 3 bits of scale,
    and whether the shift is -1/8 and not 1/8.
    """
    words = _words(bits.split(blocks[..., 34:], 8), jnp.uint16)
    codes = _codes(blocks[..., 2:34], _triples(words))
    odd = _odd((words >> jnp.uint16(12)) & jnp.uint16(7))
    return _scaled(bits.float16(blocks, 0) * odd, _shifted(codes, words >> jnp.uint16(15)))


def decode_iq1_m(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 2 groups of 8 weights, each `d * (2 * scale + 1) * (value + shift)`.

    A group has 8 low bits of code, and a nibble: 3 high bits of code, and whether the shift is -1/8 and not
    1/8. Each of the last 4 words has 3 bits of scale for 4 runs and a nibble of `d`, the lowest nibble first.
    """
    nibbles = bits.unpack(blocks[..., 32:48], 4)
    codes = _codes(blocks[..., :32], nibbles & jnp.uint8(7))
    highest = blocks[..., 49::2] >> jnp.uint8(4)
    d = bits.float16(highest[..., 0::2] | (highest[..., 1::2] << jnp.uint8(4)), 0)
    odd = _odd(_triples(_words(bits.split(blocks[..., 48:], 4), jnp.uint16)))
    return _scaled(d * odd, _shifted(codes, nibbles >> jnp.uint8(3)))


def decode_iq1_s_row(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes what `decode_iq1_s` decodes, one run of 32 weights in a block, with one `d` for the row."""
    words = _words(blocks[..., 4:], jnp.uint16)[..., None]
    codes = _codes(blocks[..., :4], _triples(words))
    odd = _odd((words >> jnp.uint16(12)) & jnp.uint16(7))
    return _scaled(bits.float16(header, 0)[..., None] * odd, _shifted(codes, words >> jnp.uint16(15)))


def decode_iq1_m_row(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 2 runs of 2 groups of 8 weights, each `d * scale * (value + shift)`, with one `d` for the row.

    Groups are those of `decode_iq1_m`. A scale has 4 bits.
    """
    nibbles = bits.unpack(blocks[..., 4:6], 4)
    codes = _codes(blocks[..., :4], nibbles & jnp.uint8(7))
    scales = bits.unpack(blocks[..., 6:], 4).astype(jnp.float32)
    return _scaled(bits.float16(header, 0)[..., None] * scales, _shifted(codes, nibbles >> jnp.uint8(3)))


def _scaled(scale: jax.Array, values: jax.Array) -> jax.Array:
    """Multiplies each run of values by its scale: float32[..., runs], float32[..., n] -> float32[..., n]."""
    return bits.join(scale[..., None] * bits.split(values, scale.shape[-1]), 2)


def _odd(scales: jax.Array) -> jax.Array:
    """Returns `2 * scale + 1` as float32."""
    return scales.astype(jnp.float32) * jnp.float32(2) + jnp.float32(1)


def _words(parts: jax.Array, dtype) -> jax.Array:
    """Reads the bytes of the last axis as one little-endian word."""
    return jax.lax.bitcast_convert_type(parts, dtype)


def _codes(low: jax.Array, high: jax.Array) -> jax.Array:
    """Joins the low byte and the high bits of each code, uint16."""
    return low.astype(jnp.uint16) | (high.astype(jnp.uint16) << jnp.uint16(8))


def _triples(words: jax.Array) -> jax.Array:
    """Unpacks the low 12 bits of words: uint16[..., n] -> uint16[..., 4 * n], numbers of 3 bits."""
    return bits.join(bits.fields(words, (0, 3, 6, 9), 0x07).swapaxes(-1, -2), 2)


def _signs_and_scales(parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes words of 7 sign bits for each 8 weights and a scale in the 4 highest bits apart.

    Args:
      parts: uint8[..., runs, 4].

    Returns:
      Signs uint8[..., 4 * runs], one bit for each weight, and `2 * scale + 1`, float32[..., runs].
    """
    words = _words(parts, jnp.uint32)
    sevens = bits.join(bits.fields(words, (0, 7, 14, 21), 0x7F).swapaxes(-1, -2), 2)
    return _with_eighth_sign(sevens.astype(jnp.uint8)), _odd(words >> jnp.uint32(28))


def _with_eighth_sign(sevens: jax.Array) -> jax.Array:
    """Adds to 7 sign bits the eighth, which makes the number of negative weights even."""
    return sevens | (jax.lax.population_count(sevens) << jnp.uint8(7))  # drops all but the lowest bit


def _signed(book: np.ndarray, codes: jax.Array, signs: jax.Array) -> jax.Array:
    """Returns the values of codes [..., n], negative where a bit of signs uint8[..., 32] is set."""
    magnitudes = bits.join(bits.lookup(book, codes), 2).astype(jnp.float32)
    return jnp.where(bits.unpack(signs, 1) == jnp.uint8(1), -magnitudes, magnitudes)


def _shifted(codes: jax.Array, shifts_down: jax.Array) -> jax.Array:
    """Returns the values of codes, shifted by an eighth.

    Args:
      codes: uint16[..., n].
      shifts_down: unsigned [..., runs], 1 for runs of values whose shift is negative, 0 for the others.

    Returns:
      float32[..., 8 * n].
    """
    shifts = jnp.float32(0.125) - jnp.float32(0.25) * shifts_down.astype(jnp.float32)
    values = bits.join(bits.lookup(codebook("iq1"), codes), 2).astype(jnp.float32)
    return bits.join(bits.split(values, shifts.shape[-1]) + shifts[..., None], 2)
