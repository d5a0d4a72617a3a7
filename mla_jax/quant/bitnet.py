"""Decoders of ik_llama.cpp's ternary weights: -d, 0 or d, with one `d` for the row, in blocks of 64.

Source: ik_llama.cpp, iqk_quantize.cpp. The plain functions there leave out `d`; its matrix products apply it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits

_POWERS = np.array([81, 27, 9, 3, 1], np.uint8)


def decode_iq1_bn(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes digits of base 3: 5 in each of 12 bytes, 4 in the last.

    A byte is a fraction of 256. Times a power of 3, it has the wanted digit first behind the point, and what
    is in front of the point is lost in 8 bits. A quarter of the block is 3 bytes and a digit of the last.
    """
    digits = bits.split(_first_digits(blocks[..., :12], _POWERS), 4)
    last = _first_digits(blocks[..., 12:], _POWERS[:4])
    codes = bits.join(jnp.concatenate([digits, last[..., None]], axis=-1), 2).astype(jnp.float32)
    return bits.float16(header, 0)[..., None] * (codes - jnp.float32(1))


def decode_iq2_bn(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes codes of 2 bits."""
    codes = bits.planes(blocks, 2).astype(jnp.float32)
    return bits.float32(header, 0)[..., None] * (codes - jnp.float32(1))


def _first_digits(values: jax.Array, powers: np.ndarray) -> jax.Array:
    """Returns a ternary digit for each byte and power: uint8[..., n] -> uint16[..., n * powers]."""
    fractions = values[..., None] * powers.reshape(*(1,) * values.ndim, -1)
    return bits.join((fractions.astype(jnp.uint16) * jnp.uint16(3)) >> jnp.uint16(8), 2)
