"""The Walsh-Hadamard rotation that spreads an outlier over its neighbours before they are quantised.

It is orthogonal and its own inverse, so products of rotated vectors are those of the vectors themselves: a
query is rotated like the keys, and a sum of rotated latents is rotated back.
"""

import math

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, size: int | None) -> jax.Array:
    """Multiplies each run of `size` numbers of the last axis by the Hadamard matrix over sqrt(size).

    Args:
      x: [..., n], n a multiple of `size`.
      size: a power of two; None leaves `x` as it is.

    Returns:
      An array like `x`. Twice gives `x` back, up to rounding.

    Source: natural (Sylvester) order, H of size 2n = [[H, H], [H, -H]], as ik_llama.cpp's `-khad`.
    """
    if size is None:
        return x
    values, distance = x.astype(jnp.float32), 1
    while distance < size:
        pairs = values.reshape(*x.shape[:-1], -1, 2, distance)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        values = jnp.stack([upper + lower, upper - lower], axis=-2).reshape(x.shape)
        distance *= 2
    return (values * (1 / math.sqrt(size))).astype(x.dtype)
