"""Decoders of the quants that only ik_llama.cpp has, but for trellises and ternary weights.

A super-block has 256 weights in 8 runs of 32, often halved to 16 runs of 16. A weight is `d * scale * value`:
the scale is a small integer of its run, and codes choose the values from a table without even steps. Each
table has two versions, the second shifted a little; a bit of the run tells which. In the formats ending in
s or l, and in q8_KV, `d` is in front of the row and serves all of its blocks.

Source: ik_llama.cpp, ggml-common.h and iqk_quantize.cpp.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits, i_quants


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), np.float32)


def _two_versions(values: np.ndarray, shift: int) -> np.ndarray:
    return np.concatenate([values, values + np.float32(shift)])


_VALUES_2 = _two_versions(_numbers("-31 -13 1 17"), 5)
_VALUES_3 = _two_versions(_numbers("-63 -40 -23 -10 1 13 28 47"), 4)
_VALUES_4 = _two_versions(i_quants.VALUES_4, 4)
_VALUES_5 = _two_versions(
    _numbers("""
        -126 -114 -103 -92 -83 -74 -65 -57 -50 -43 -36 -30 -24 -18 -12 -6
        -1 5 11 17 23 29 36 43 51 59 68 77 87 97 109 121
    """),
    2,
)
# In plain C, ik_llama.cpp has the cubic that these are rounded from; its matrix products have these.
_VALUES_6 = _two_versions(
    _numbers("""
        -127 -121 -115 -109 -104 -98 -93 -88 -84 -79 -74 -70 -66 -62 -58 -54
        -51 -47 -44 -40 -37 -34 -31 -28 -25 -22 -19 -16 -13 -11 -8 -5
        -2 0 3 6 9 12 14 17 20 23 27 30 33 36 40 44
        47 51 55 59 63 68 72 77 82 87 92 98 103 109 115 121
    """),
    1,
)
# Pairs of neighbours, each one of the first half of `_VALUES_3`.
_PAIRS = _numbers("""
    -63 -23  -63 13   -40 -63  -40 -10  -40 13   -40 47   -23 -40  -23 -23
    -23 1    -23 13   -23 28   -10 -63  -10 1    -10 13   -10 47   1 -23
    1 -10    1 1      1 13     1 28     13 -40   13 -23   13 -10   13 1
    13 13    28 -63   28 -23   28 1     28 28    28 47    47 -23   47 13
""").reshape(-1, 2)


def decode_q6_0(blocks: jax.Array) -> jax.Array:
    """Decodes 32 weights, `d * (code - 32)`; a code is 4 low and 2 high bits."""
    # Byte i has the high bits of codes i, i + 16, i + 8 and i + 24.
    high = bits.fields(blocks[..., 2:10], (0, 4, 2, 6), 0x03)
    codes = bits.planes(blocks[..., 10:26], 4) | (bits.join(high, 2) << jnp.uint8(4))
    return bits.float16(blocks, 0) * (codes.astype(jnp.float32) - jnp.float32(32))


def decode_q8_kv(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes `d * code`, a code being a signed byte; the sum of the codes in the header is not needed."""
    codes = jax.lax.bitcast_convert_type(blocks, jnp.int8).astype(jnp.float32)
    return bits.float32(header, 0)[..., None] * codes


def decode_iq2_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights with codes of 2 bits."""
    scale = bits.float16(blocks, 0) * _signed(bits.unpack(blocks[..., 4:12], 4), 8)
    codes = bits.planes(blocks[..., 12:76], 2, runs=2)
    return _scaled_values(scale, codes, _VALUES_2, bits.unpack(blocks[..., 2:4], 1))


def decode_iq2_ks(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights with codes of 2 bits."""
    high = bits.unpack(blocks[..., 1:2], 1) << jnp.uint8(4)
    scales = _signed(bits.unpack(blocks[..., 2:6], 4) | high, 16)
    codes = bits.planes(blocks[..., 6:70], 2, runs=2)
    scale = bits.float16(header, 0)[..., None] * scales
    return _scaled_values(scale, codes, _VALUES_2, bits.unpack(blocks[..., :1], 1))


def decode_iq2_kl(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 8 runs of 16 pairs of weights; a code is 4 low and 1 high bits."""
    high = bits.unpack(blocks[..., :2], 2) << jnp.uint8(4)
    scales = _signed(bits.planes(blocks[..., 2:6], 4) | high, 32)
    codes = bits.planes(blocks[..., 6:70], 4, runs=4) | (bits.planes(blocks[..., 70:86], 1) << jnp.uint8(4))
    scale = bits.float16(header, 0)[..., None] * scales
    pairs = bits.lookup(_PAIRS, bits.split(codes, 8))
    return bits.join(scale[..., None, None] * pairs, 3)


def decode_iq3_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights; a code is 2 low and 1 high bits, a scale an odd number and its sign."""
    magnitude = _signed(bits.unpack(blocks[..., 6:14], 4) * jnp.uint8(2), -1)
    sign = jnp.float32(1) - jnp.float32(2) * bits.unpack(blocks[..., 4:6], 1).astype(jnp.float32)
    codes = _codes_3(blocks[..., 14:110])
    scale = bits.float16(blocks, 0) * (magnitude * sign)
    return _scaled_values(scale, codes, _VALUES_3, bits.unpack(blocks[..., 2:4], 1))


def decode_iq3_ks(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights; a code is 2 low and 1 high bits."""
    high = bits.unpack(blocks[..., :1], 1) << jnp.uint8(4)
    scales = _signed(bits.planes(blocks[..., 2:6], 4) | high, 16)
    codes = _codes_3(blocks[..., 6:102])
    scale = bits.float16(header, 0)[..., None] * scales
    return _scaled_values(scale, codes, _VALUES_3, bits.unpack(blocks[..., 1:2], 1))


def decode_iq4_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights with codes of 4 bits."""
    codes = bits.planes(blocks[..., 16:144], 4, runs=8)
    return _scaled_values(_scale_of_6_bits(blocks), codes, _VALUES_4, bits.unpack(blocks[..., 2:4], 1))


def decode_iq4_ks(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights with codes of 4 bits."""
    codes = bits.planes(blocks[..., 8:136], 4, runs=8)
    return _with_scale_bytes(header, blocks[..., :8], codes, _VALUES_4)


def decode_iq4_kss(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights from 8 words of 16 bits each.

    The lowest bits of the words are the scale of the run. The others are 4 codes as a Gray code, from which a
    bit of each word follows: the number of bits that are set in its 4 codes is even.
    """
    words = jax.lax.bitcast_convert_type(blocks.reshape(*blocks.shape[:-1], 8, 8, 2), jnp.uint16)
    scales = jnp.packbits((words & jnp.uint16(1)).astype(jnp.uint8), axis=-1, bitorder="little")
    gray = words & jnp.uint16(0xFFFE)
    packed = jax.lax.bitcast_convert_type(gray ^ (gray >> jnp.uint16(1)), jnp.uint8)
    codes = bits.planes(bits.join(packed, 3), 4, runs=8)
    return _with_scale_bytes(header, scales[..., 0], codes, _VALUES_4)


def decode_iq5_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights; a code is 4 low and 1 high bits."""
    codes = _codes_5(blocks[..., 16:176])
    return _scaled_values(_scale_of_6_bits(blocks), codes, _VALUES_5, bits.unpack(blocks[..., 2:4], 1))


def decode_iq5_ks(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights; a code is 4 low and 1 high bits."""
    return _with_scale_bytes(header, blocks[..., :8], _codes_5(blocks[..., 8:168]), _VALUES_5)


def decode_iq6_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights; a code is 4 low and 2 high bits, a scale a signed byte."""
    scales = jax.lax.bitcast_convert_type(blocks[..., 4:20], jnp.int8).astype(jnp.float32)
    high = bits.planes(blocks[..., 148:212], 2, runs=2)
    codes = bits.planes(blocks[..., 20:148], 4, runs=4) | (high << jnp.uint8(4))
    scale = bits.float16(blocks, 0) * scales
    return _scaled_values(scale, codes, _VALUES_6, bits.unpack(blocks[..., 2:4], 1))


def _signed(numbers: jax.Array, offset: int) -> jax.Array:
    return numbers.astype(jnp.float32) - jnp.float32(offset)


def _codes_3(packed: jax.Array) -> jax.Array:
    """Joins 64 bytes of 2 low bits and 32 bytes of a high bit: uint8[..., 96] -> uint8[..., 256]."""
    return bits.planes(packed[..., :64], 2, runs=2) | (bits.planes(packed[..., 64:], 1) << jnp.uint8(2))


def _codes_5(packed: jax.Array) -> jax.Array:
    """Joins 128 bytes of 4 low bits and 32 bytes of a high bit: uint8[..., 160] -> uint8[..., 256]."""
    return bits.planes(packed[..., :128], 4, runs=4) | (bits.planes(packed[..., 128:], 1) << jnp.uint8(4))


def _scale_of_6_bits(blocks: jax.Array) -> jax.Array:
    """Returns `d * scale` of each of 16 runs, its 4 low bits at byte 8 and its 2 high bits at byte 4."""
    high = bits.unpack(blocks[..., 4:8], 2) << jnp.uint8(4)
    return bits.float16(blocks, 0) * _signed(bits.unpack(blocks[..., 8:16], 4) | high, 32)


def _with_scale_bytes(
    header: jax.Array, scales: jax.Array, codes: jax.Array, values: np.ndarray
) -> jax.Array:
    """Decodes 8 runs whose scale is 7 bits of a byte, the lowest bit telling the version of the table."""
    scale = bits.float32(header, 0)[..., None] * _signed(scales & jnp.uint8(0xFE), 127)
    return _scaled_values(scale, codes, values, scales & jnp.uint8(1))


def _scaled_values(scale: jax.Array, codes: jax.Array, values: np.ndarray, version: jax.Array) -> jax.Array:
    """Multiplies the values that codes stand for by the scale of their run.

    Args:
      scale: float32[..., runs].
      codes: uint8[..., 256].
      values: float32[2 * n], both versions of the table.
      version: uint8[..., runs], 0 or 1.

    Returns:
      float32[..., 256].
    """
    start = version * jnp.uint8(len(values) // 2)
    codes = bits.split(codes, scale.shape[-1]) + start[..., None]
    return bits.join(scale[..., None] * bits.lookup(values, codes), 2)
