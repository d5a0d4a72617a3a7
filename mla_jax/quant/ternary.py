"""Decoders of weights of two or three values: blocks with a scale, or with one `d` for the row.

Source: ggml, and ik_llama.cpp for the latter: its plain functions leave out `d`, its matrix products have it.
"""

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


def decode_iq1_bn(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 64 weights, each `d * (digit - 1)`; a byte has 5 digits, the last byte one for each quarter.

    Digits are those of `decode_tq1_0`, but the last one of a byte comes first, and the last byte has 4.
    """
    fives = bits.split(_digits(blocks[..., :12], 5), 5)[..., ::-1, :].swapaxes(-1, -2)
    fifteens = bits.split(bits.join(fives, 2), 4)
    last = _digits(blocks[..., 12:], 5)[..., :0:-1]
    digits = bits.join(jnp.concatenate([fifteens, last[..., None]], axis=-1), 2).astype(jnp.float32)
    return bits.float16(header, 0)[..., None] * (digits - jnp.float32(1))


def decode_iq2_bn(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 64 weights, each `d * (code - 1)` with codes of 2 bits."""
    codes = bits.planes(blocks, 2).astype(jnp.float32)
    return bits.float32(header, 0)[..., None] * (codes - jnp.float32(1))


def _digits(packed: jax.Array, count: int) -> jax.Array:
    """Unpacks digits of base 3, those of one place side by side: uint8[..., n] -> uint16[..., count * n]."""
    shifted = jnp.stack([packed * jnp.uint8(3**place) for place in range(count)], axis=-2)
    return bits.join((shifted.astype(jnp.uint16) * jnp.uint16(3)) >> jnp.uint16(8), 2)
