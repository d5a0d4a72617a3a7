"""Decoders of the legacy types: blocks of 32 weights with a float16 scale and codes of one width.

Some have a minimum as well. The product of a float16 and a code is exact in float32, so that the result is
the same whether or not the compiler contracts the product and the sum into one operation.
"""

import jax
import jax.numpy as jnp

from mla_jax.quant import bits


def decode_q8_0(blocks: jax.Array) -> jax.Array:
    """Decodes `d * code`, a code being a signed byte."""
    codes = jax.lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
    return codes.astype(jnp.float32) * bits.float16(blocks, 0)


def decode_q4_0(blocks: jax.Array) -> jax.Array:
    """Decodes `d * (code - 8)`; low nibbles are the first half of the block."""
    codes = bits.planes(blocks[..., 2:], 4)
    return bits.float16(blocks, 0) * (codes.astype(jnp.float32) - jnp.float32(8))


def decode_q4_1(blocks: jax.Array) -> jax.Array:
    """Decodes `d * code + minimum`; low nibbles are the first half of the block."""
    codes = bits.planes(blocks[..., 4:], 4)
    return bits.float16(blocks, 0) * codes.astype(jnp.float32) + bits.float16(blocks, 2)


def decode_q5_0(blocks: jax.Array) -> jax.Array:
    """Decodes `d * (code - 16)`."""
    codes = _codes_of_5_bits(blocks[..., 2:])
    return bits.float16(blocks, 0) * (codes.astype(jnp.float32) - jnp.float32(16))


def decode_q5_1(blocks: jax.Array) -> jax.Array:
    """Decodes `d * code + minimum`."""
    codes = _codes_of_5_bits(blocks[..., 4:])
    return bits.float16(blocks, 0) * codes.astype(jnp.float32) + bits.float16(blocks, 2)


def _codes_of_5_bits(packed: jax.Array) -> jax.Array:
    """Joins 32 fifth bits to the nibbles after them, of which the low ones are the first half."""
    return bits.planes(packed[..., 4:], 4) | (bits.unpack(packed[..., :4], 1) << jnp.uint8(4))
