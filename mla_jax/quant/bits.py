"""Bit fields of blocks, pure so that they run inside jit: the parts that decoders are made of."""

import jax
import jax.numpy as jnp
import numpy as np


def float16(blocks: jax.Array, start: int) -> jax.Array:
    """Returns the little-endian float16 at byte `start` of each block as float32[..., 1]."""
    scale = jax.lax.bitcast_convert_type(blocks[..., start : start + 2], jnp.float16)
    return scale[..., None].astype(jnp.float32)


def float32(blocks: jax.Array, start: int) -> jax.Array:
    """Returns the little-endian float32 at byte `start` of each block as float32[..., 1]."""
    return jax.lax.bitcast_convert_type(blocks[..., start : start + 4], jnp.float32)[..., None]


def split(values: jax.Array, count: int) -> jax.Array:
    """Splits the last axis into `count` equal runs: [..., n] -> [..., count, n / count]."""
    *lead, size = values.shape
    return values.reshape(*lead, count, size // count)


def join(values: jax.Array, axes: int) -> jax.Array:
    """Merges the last `axes` axes into one."""
    return values.reshape(*values.shape[:-axes], -1)


def fields(values: jax.Array, shifts: tuple[int, ...], mask: int) -> jax.Array:
    """Extracts bit fields of words: [..., n] -> [..., shifts, n], field s being `(word >> s) & mask`."""
    kept = jnp.full_like(values, mask)
    parts = [jax.lax.shift_right_logical(values, jnp.full_like(values, s)) & kept for s in shifts]
    return jnp.stack(parts, axis=-2)


def unpack(values: jax.Array, width: int) -> jax.Array:
    """Unpacks bytes into the numbers of `width` bits packed in them, low bits first: [..., n] -> [..., m]."""
    parts = fields(values, tuple(range(0, 8, width)), (1 << width) - 1)
    return join(parts.swapaxes(-1, -2), 2)


def planes(values: jax.Array, width: int, runs: int = 1) -> jax.Array:
    """Unpacks numbers of `width` bits stored in planes: [..., n] -> [..., 8 n / width].

    The bytes are `runs` runs of equal length. Byte i of a run has the numbers at place i of 8 / width planes,
    the first in its lowest bits; the result is in the order of runs, planes and places.
    """
    return join(fields(split(values, runs), tuple(range(0, 8, width)), (1 << width) - 1), 3)


def lookup(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Returns `table[codes]`: unsigned codes [...] below the length of the table [n, ...] -> [..., ...]."""
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
