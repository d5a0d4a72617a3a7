"""Decoders of the k-quants: super-blocks of 256 weights, whose runs have scales quantised in turn.

Each product of a float16, a scale and a code has at most 23 bits: exact in float32, so that the result is the
same whether or not the compiler contracts the last product and difference into one operation.
"""

import jax
import jax.numpy as jnp

from mla_jax.quant import bits


def decode_q2_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights, each `d * scale * code - dmin * minimum`, with 4-bit factors."""
    scales, minima = blocks[..., :16] & jnp.uint8(0x0F), blocks[..., :16] >> jnp.uint8(4)
    codes = bits.split(bits.planes(blocks[..., 16:80], 2, runs=2), 16).astype(jnp.float32)
    return _scaled_less_minimum(blocks[..., 80:84], scales, minima, codes)


def decode_q3_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights, each `d * (scale - 32) * (code - 4)`.

    A scale is 4 low and 2 high bits, a code 2 low bits and a high one.
    """
    low, high = bits.planes(blocks[..., 32:96], 2, runs=2), bits.planes(blocks[..., :32], 1)
    codes = _joined(low, high, 2, runs=16) - jnp.float32(4)
    scales = bits.planes(blocks[..., 96:104], 4) | (bits.planes(blocks[..., 104:108], 2) << jnp.uint8(4))
    scale = bits.float16(blocks, 108) * (scales.astype(jnp.float32) - jnp.float32(32))
    return bits.join(scale[..., None] * codes, 2)


def decode_q4_k(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights, each `d * scale * code - dmin * minimum` with 6-bit scales and minima."""
    codes = bits.split(bits.planes(blocks[..., 16:144], 4, runs=4), 8).astype(jnp.float32)
    return _scaled_less_minimum(blocks[..., :4], *_scales_and_minima(blocks[..., 4:16]), codes)


def decode_q5_k(blocks: jax.Array) -> jax.Array:
    """Decodes what `decode_q4_k` decodes, with a fifth bit for each code."""
    low, high = bits.planes(blocks[..., 48:176], 4, runs=4), bits.planes(blocks[..., 16:48], 1)
    codes = _joined(low, high, 4, runs=8)
    return _scaled_less_minimum(blocks[..., :4], *_scales_and_minima(blocks[..., 4:16]), codes)


def decode_q6_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights, each `d * scale * (code - 32)`; a code is 4 low and 2 high bits."""
    low, high = bits.planes(blocks[..., :128], 4, runs=2), bits.planes(blocks[..., 128:192], 2, runs=2)
    codes = _joined(low, high, 4, runs=16) - jnp.float32(32)
    scales = jax.lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8).astype(jnp.float32)
    return bits.join((bits.float16(blocks, 208) * scales)[..., None] * codes, 2)


def _scales_and_minima(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unpacks 8 scales and 8 minima of 6 bits from 12 bytes: uint8[..., 12] -> uint8[..., 8] twice.

    The first four of each have a byte, whose two high bits belong to the last four; the low bits of these are
    nibbles of the last bytes.
    """
    low, high, mixed = (packed[..., 4 * i : 4 * i + 4] for i in range(3))
    six, two, four = jnp.uint8(0x3F), jnp.uint8(2), jnp.uint8(4)
    scales = jnp.concatenate([low & six, (mixed & jnp.uint8(0x0F)) | ((low >> two) & jnp.uint8(0x30))], -1)
    minima = jnp.concatenate([high & six, (mixed >> four) | ((high >> two) & jnp.uint8(0x30))], -1)
    return scales, minima


def _joined(low: jax.Array, high: jax.Array, width: int, runs: int) -> jax.Array:
    """Joins `width` low bits and the high bits of codes: uint8[..., n] twice -> float32[..., runs, n / runs].

    Splitting comes first: in the shape of the result, joining fuses better into sums over the weights, which
    then take a quarter to a half of the time.
    """
    return (bits.split(low, runs) | (bits.split(high, runs) << jnp.uint8(width))).astype(jnp.float32)


def _scaled_less_minimum(halves, scales, minima, codes):
    """Returns `d * scale * code - dmin * minimum`, `d` and `dmin` being the two float16 of `halves`.

    Scales and minima are uint8[..., runs], codes float32[..., runs, weights].
    """
    scale = bits.float16(halves, 0) * scales.astype(jnp.float32)
    minimum = bits.float16(halves, 2) * minima.astype(jnp.float32)
    return bits.join(scale[..., None] * codes - minimum[..., None], 2)
