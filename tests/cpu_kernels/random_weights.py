"""Weights of random bytes whose numbers are of usual size, in any block format."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import quant

_CANDIDATES = 16384  # of random scales at least a hundredth are sane


@functools.cache
def random_weight(name: str, rows: int, size: int) -> quant.QuantizedTensor:
    """Returns [rows, size] of random blocks, those among many whose largest magnitude is in [1/4, 4)."""
    fmt = quant.FORMATS[name]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (_CANDIDATES, 1, fmt.block_bytes), np.uint8)
    header = rng.integers(0, 256, (_CANDIDATES, fmt.header_bytes), np.uint8) if fmt.header_bytes else None
    values = jax.jit(quant.decode)(_weight(name, blocks, header))
    largest = np.abs(np.asarray(values)).max(axis=1)
    sane = np.flatnonzero((largest >= 0.25) & (largest < 4))
    if header is None:
        return _weight(name, blocks[rng.choice(sane, (rows, size // fmt.block_size)), 0], None)
    chosen = rng.integers(0, _CANDIDATES, (rows, size // fmt.block_size))
    return _weight(name, blocks[chosen, 0], header[rng.choice(sane, rows)])


def _weight(name, blocks, header):
    header = None if header is None else jnp.asarray(header)
    return quant.QuantizedTensor(blocks=jnp.asarray(blocks), header=header, format=name)
