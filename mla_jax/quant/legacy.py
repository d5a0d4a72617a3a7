"""Decoders of the legacy types: blocks of 32 weights with a float16 scale and codes of one width."""

import jax
import jax.numpy as jnp

from mla_jax.quant import bits


def decode_q8_0(blocks: jax.Array) -> jax.Array:
    """Decodes `d * code`, a code being a signed byte."""
    codes = jax.lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
    return codes.astype(jnp.float32) * bits.float16(blocks, 0)


def decode_q4_0(blocks: jax.Array) -> jax.Array:
    """Decodes `d * (code - 8)`; low nibbles are the first half of the block."""
    codes = bits.join(bits.fields(blocks[..., 2:], (0, 4), 0x0F), 2)
    return bits.float16(blocks, 0) * (codes.astype(jnp.float32) - jnp.float32(8))


def decode_q5_0(blocks: jax.Array) -> jax.Array:
    """Decodes `d * (code - 16)`; bit j of bytes 2 to 5 is the fifth bit of code j."""
    low = bits.join(bits.fields(blocks[..., 6:], (0, 4), 0x0F), 2)
    high = bits.join(bits.fields(blocks[..., 2:6], tuple(range(8)), 0x01).swapaxes(-1, -2), 2)
    codes = low | (high << jnp.uint8(4))
    return bits.float16(blocks, 0) * (codes.astype(jnp.float32) - jnp.float32(16))
