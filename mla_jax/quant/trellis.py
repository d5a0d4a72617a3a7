"""Decoders of ik_llama.cpp's trellis quants: a few bits seed a generator that yields several weights.

A state is multiplied by a constant, modulo 2**32, for each weight: the value is the sum of the low 6 bits
of the 4 bytes of the state, less 126, so that values gather around 0 as weights do. A super-block has 256
weights in 8 runs of 32, each with a scale; the float32 scale `d` is in front of the row. Two formats take
their scales from the values of 4-bit codes.

Source: ik_llama.cpp, iqk_quantize.cpp.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits
from mla_jax.quant.i_quants import VALUES_4

_MULTIPLIER = 0xCBAC1FED
_POWERS = np.array([pow(_MULTIPLIER, step, 1 << 32) for step in range(1, 9)], np.uint32)
_FIRST_SEED = 4096


def decode_iq1_kt(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 32 groups of 8 weights from seeds of 13 bits; scales are looked up."""
    low = blocks[..., 8:40].astype(jnp.uint32)
    middle = bits.planes(blocks[..., 40:56], 4).astype(jnp.uint32)
    high = bits.fields(blocks[..., :8], (4, 5, 6, 7), 0x01).swapaxes(-1, -2)
    high = bits.join(high, 2).astype(jnp.uint32)
    seeds = low | (middle << jnp.uint32(8)) | (high << jnp.uint32(12))
    scales = bits.lookup(VALUES_4, blocks[..., :8] & jnp.uint8(0x0F))
    return _scaled(header, scales, _generate(seeds + jnp.uint32(_FIRST_SEED), 8))


def decode_iq2_kt(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 32 groups of 8 weights from seeds of 16 bits; scales are looked up."""
    scales = bits.lookup(VALUES_4, bits.planes(blocks[..., :4], 4))
    return _scaled(header, scales, _generate(_seeds_of_16_bits(blocks[..., 4:68]), 8))


def decode_iq3_kt(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 32 groups of 8 magnitudes from seeds of 16 bits, and a sign for each."""
    scales = bits.planes(blocks[..., :4], 4).astype(jnp.float32)
    magnitudes = jnp.abs(_generate(_seeds_of_16_bits(blocks[..., 4:68]), 8))
    is_negative = bits.planes(blocks[..., 68:100], 1) == jnp.uint8(1)
    return _scaled(header, scales, jnp.where(is_negative, -magnitudes, magnitudes))


def decode_iq4_kt(blocks: jax.Array, header: jax.Array) -> jax.Array:
    """Decodes 64 groups of 4 weights from seeds of 16 bits.

    A run has a word of 32 bits: 8 times the 3 high bits of a seed, 7 bits of the scale and, lowest, one that
    moves its seeds up.
    """
    words = jax.lax.bitcast_convert_type(bits.split(blocks[..., :32], 8), jnp.uint32)
    low = blocks[..., 32:96].astype(jnp.uint32)
    middle = bits.planes(blocks[..., 96:128], 4).astype(jnp.uint32)
    high = bits.join(bits.fields(words, tuple(range(8, 32, 3)), 0x07).swapaxes(-1, -2), 2)
    seeds = low | (middle << jnp.uint32(8)) | (high << jnp.uint32(12))
    first = (words & jnp.uint32(1)) * jnp.uint32(1 << 15) + jnp.uint32(_FIRST_SEED)
    seeds = bits.join(bits.split(seeds, 8) + first[..., None], 2)
    scales = ((words >> jnp.uint32(1)) & jnp.uint32(0x7F)).astype(jnp.float32) - jnp.float32(64)
    return _scaled(header, scales, _generate(seeds, 4))


def _seeds_of_16_bits(packed: jax.Array) -> jax.Array:
    """Returns uint32[..., 32] of uint8[..., 64]."""
    seeds = jax.lax.bitcast_convert_type(bits.split(packed, 32), jnp.uint16)
    return seeds.astype(jnp.uint32) + jnp.uint32(_FIRST_SEED)


def _generate(seeds: jax.Array, steps: int) -> jax.Array:
    """Returns the values of the `steps` states after each seed: uint32[..., n] -> float32[..., n * steps]."""
    powers = _POWERS[:steps].reshape(*(1,) * seeds.ndim, steps)
    states = seeds[..., None] * powers  # all at once: step after step would leave nothing to vectorise
    parts = states & jnp.uint32(0x3F3F3F3F)
    sums = (parts * jnp.uint32(0x01010101)) >> jnp.uint32(24)  # of 4 bytes: at most 252, no carry is lost
    return bits.join(sums.astype(jnp.float32), 2) - jnp.float32(126)


def _scaled(header: jax.Array, scales: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `d * scale * value`: header of the row, float32[..., n, 8] and float32[..., n, 256]."""
    scale = bits.float32(header, 0)[..., None] * scales
    return bits.join(scale[..., None] * bits.split(values, 8), 2)
