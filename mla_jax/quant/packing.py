"""Bit fields put together, pure so that they run inside jit: the parts that encoders are made of.

The inverses of what `bits` takes apart.
"""

import jax
import jax.numpy as jnp

from mla_jax.quant import bits


def as_bytes(values: jax.Array) -> jax.Array:
    """Returns the little-endian bytes of numbers: [..., n] -> uint8[..., n * bytes of a number]."""
    parts = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return parts if parts.ndim == values.ndim else bits.join(parts, 2)


def float16(scales: jax.Array) -> jax.Array:
    """Returns the bytes of scales rounded to float16: float32[..., n] -> uint8[..., 2 n]."""
    return as_bytes(scales.astype(jnp.float16))


def rounded_to_float16(scales: jax.Array) -> jax.Array:
    """Returns what a decoder will read of scales that `float16` writes: float32[...]."""
    return scales.astype(jnp.float16).astype(jnp.float32)


def merge(fields: jax.Array, shifts: tuple[int, ...]) -> jax.Array:
    """Merges bit fields into bytes: uint8[..., shifts, n] -> [..., n], field s being shifted left by s."""
    merged = jnp.zeros_like(fields[..., 0, :])
    for place, shift in enumerate(shifts):
        merged |= fields[..., place, :] << jnp.uint8(shift)
    return merged


def pack(numbers: jax.Array, width: int) -> jax.Array:
    """Packs numbers of `width` bits, low bits of a byte first: uint8[..., m] -> [..., m * width / 8]."""
    count = numbers.shape[-1] * width // 8
    return merge(bits.split(numbers, count).swapaxes(-1, -2), tuple(range(0, 8, width)))


def planes(numbers: jax.Array, width: int, runs: int = 1) -> jax.Array:
    """Packs numbers of `width` bits into planes, as `bits.planes` reads them: uint8[..., m] -> [..., n]."""
    places = bits.split(bits.split(numbers, runs), 8 // width)
    return bits.join(merge(places, tuple(range(0, 8, width))), 2)
