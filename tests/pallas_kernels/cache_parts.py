"""Random rows of the cache, as it stores them and as the four arrays that kernels take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.cache import codec


def part_of(stored):
    """Returns low, high, scale and offset; what a type lacks is empty."""
    none = jnp.zeros((0,), jnp.uint8)
    if not isinstance(stored, codec.Codes):
        return stored, none, none, none
    parts = stored.low, stored.high, stored.scale, stored.offset
    return tuple(none if part is None else part for part in parts)


def draw(rng, shape, name):
    """Returns any codes there are, under scales that keep numbers near one; negative scales too."""
    largest = 1 if name in codec.PLAIN else float(np.abs(_levels(name)).max())

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(leaf.shape) / largest, jnp.float32).astype(leaf.dtype)
        return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8).view(leaf.dtype))

    return jax.tree.map(fill, shapes(shape, name))


def shapes(shape, name):
    """Returns rows of which there are but shapes and types."""
    *lead, size = shape
    extend = lambda leaf: jax.ShapeDtypeStruct((*lead, leaf.shape[-1]), leaf.dtype)
    return jax.tree.map(extend, _one_row(size, name))


_one_row = functools.cache(lambda size, name: codec.empty((size,), name))


def _levels(name):
    kind = codec.BLOCK_TYPES[name]
    bits = kind.low_bits + kind.high_bits
    return 2 ** (bits - 1) if isinstance(kind.levels, int) else kind.levels
