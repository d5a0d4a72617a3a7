"""Decoders of blocks with a float16 scale and weights of two or three values."""

import jax
import jax.numpy as jnp

from mla_jax.quant import bits


def decode_q1_0_g128(blocks: jax.Array) -> jax.Array:
    """Decodes 128 weights, each `d` where its bit is set and `-d` elsewhere; low bits come first."""
    signs = bits.unpack(blocks[..., 2:], 1).astype(jnp.float32) * jnp.float32(2) - jnp.float32(1)
    return bits.float16(blocks, 0) * signs


def decode_tq1_0(blocks: jax.Array) -> jax.Array:
    """Decodes 256 weights, each `d * (digit - 1)`; a byte has 5 digits of base 3, the last four have 4 each.

    A byte is a fraction of 256 with these digits: multiplied by a power of 3, wrapping, it loses the first
    ones; multiplied by 3 once more, what exceeds a byte is the next.
    """
    parts = [
        _digits(blocks[..., :32], 5),
        _digits(blocks[..., 32:48], 5),
        _digits(blocks[..., 48:52], 4),
    ]
    digits = jnp.concatenate(parts, axis=-1).astype(jnp.float32)
    return bits.float16(blocks, 52) * (digits - jnp.float32(1))


def decode_tq2_0(blocks: jax.Array) -> jax.Array:
    """Decodes 256 weights, each `d * (code - 1)` with codes of 2 bits."""
    codes = bits.planes(blocks[..., :64], 2, runs=2)
    return bits.float16(blocks, 64) * (codes.astype(jnp.float32) - jnp.float32(1))


def _digits(packed: jax.Array, count: int) -> jax.Array:
    """Unpacks digits of base 3, those of one place side by side: uint8[..., n] -> uint16[..., count * n]."""
    shifted = jnp.stack([packed * jnp.uint8(3**place) for place in range(count)], axis=-2)
    return bits.join((shifted.astype(jnp.uint16) * jnp.uint16(3)) >> jnp.uint16(8), 2)
