"""Decoders of the k-quants: super-blocks of 256 weights, whose runs have scales quantised in turn."""

import jax
import jax.numpy as jnp

from mla_jax.quant import bits


def decode_q4_k(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights, each `d * scale * code - dmin * minimum` with 6-bit scales and minima.

    The products of a float16, a 6-bit and a 4-bit number are exact in float32, so that the result is the same
    whether or not the compiler contracts the last product and difference into one operation.
    """
    low, high, mixed = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    six, two, four = jnp.uint8(0x3F), jnp.uint8(2), jnp.uint8(4)
    scales = jnp.concatenate([low & six, (mixed & jnp.uint8(0x0F)) | ((low >> two) & jnp.uint8(0x30))], -1)
    minima = jnp.concatenate([high & six, (mixed >> four) | ((high >> two) & jnp.uint8(0x30))], -1)
    codes = bits.fields(bits.split(blocks[..., 16:], 4), (0, 4), 0x0F)
    codes = codes.reshape(*blocks.shape[:-1], 8, 32).astype(jnp.float32)
    scale = bits.float16(blocks, 0) * scales.astype(jnp.float32)
    minimum = bits.float16(blocks, 2) * minima.astype(jnp.float32)
    return bits.join(scale[..., None] * codes - minimum[..., None], 2)


def decode_q6_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights, each `d * scale * (code - 32)`; a code is 4 low and 2 high bits."""
    shape = (*blocks.shape[:-1], 16, 16)
    low = bits.fields(bits.split(blocks[..., :128], 2), (0, 4), 0x0F).reshape(shape)
    high = bits.fields(bits.split(blocks[..., 128:192], 2), (0, 2, 4, 6), 0x03).reshape(shape)
    codes = (low | (high << jnp.uint8(4))).astype(jnp.float32) - jnp.float32(32)
    scales = jax.lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8).astype(jnp.float32)
    return bits.join((bits.float16(blocks, 208) * scales)[..., None] * codes, 2)
