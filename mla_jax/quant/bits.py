"""Bit fields of blocks, pure so that they run inside jit: the parts that decoders are made of."""

import jax
import jax.numpy as jnp


def float16(blocks: jax.Array, start: int) -> jax.Array:
    """Returns the little-endian float16 at byte `start` of each block as float32[..., 1]."""
    scale = jax.lax.bitcast_convert_type(blocks[..., start : start + 2], jnp.float16)
    return scale[..., None].astype(jnp.float32)


def split(values: jax.Array, count: int) -> jax.Array:
    """Splits the last axis into `count` equal runs: [..., n] -> [..., count, n / count]."""
    *lead, size = values.shape
    return values.reshape(*lead, count, size // count)


def join(values: jax.Array, axes: int) -> jax.Array:
    """Merges the last `axes` axes into one."""
    return values.reshape(*values.shape[:-axes], -1)


def fields(values: jax.Array, shifts: tuple[int, ...], mask: int) -> jax.Array:
    """Extracts bit fields of bytes: [..., n] -> [..., shifts, n], field s being `(byte >> s) & mask`."""
    parts = [jax.lax.shift_right_logical(values, jnp.full_like(values, s)) & jnp.uint8(mask) for s in shifts]
    return jnp.stack(parts, axis=-2)
