"""Encoders of the types with blocks of 32 weights: float16 scale, for some an offset, and codes of one width.

Each takes float32[n, 32] and importance of that shape or None, and returns uint8[n, bytes of a block].
Without importance q8_0, q4_0, q4_1, q5_0 and q5_1 are byte for byte what ik_llama.cpp's `llama-quantize`
writes; all else comes from a search over scales.
"""

import jax
import jax.numpy as jnp

from mla_jax.quant import bits, packing, quantisers, scale_search
from mla_jax.quant.i_quants import VALUES_4


def encode_q8_0(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes a scale, largest magnitude / 127, and 32 signed bytes; the importance is not needed.

    Source: the vector forms of `quantize_row_q8_0` in ggml; its portable form rounds ties away from zero.
    """
    codes, scale, _ = quantisers.q8_0(x)
    return jnp.concatenate([packing.float16(scale[:, None]), packing.as_bytes(codes.astype(jnp.int8))], -1)


def encode_q4_0(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes `d * (code - 8)`."""
    return _block(*(quantisers.q4_0_plain(x) if importance is None else _scaled(x, importance, 8)))


def encode_q4_1(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes `d * code + m`."""
    return _block(*(quantisers.q4_1(x) if importance is None else _line(x, importance, 15)))


def encode_q5_0(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes `d * (code - 16)`."""
    return _block_of_5_bits(*(quantisers.q5_0(x) if importance is None else _scaled(x, importance, 16)))


def encode_q5_1(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes `d * code + m`."""
    return _block_of_5_bits(*(quantisers.q5_1(x) if importance is None else _line(x, importance, 31)))


def encode_q6_0(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes `d * (code - 32)`."""
    codes, scale, _ = _scaled(x, importance, 32)
    codes = codes.astype(jnp.uint8)
    high = packing.merge(bits.split(codes >> jnp.uint8(4), 4), (0, 4, 2, 6))
    return jnp.concatenate([packing.float16(scale[:, None]), high, _nibbles(codes)], axis=-1)


def encode_iq4_nl(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Encodes `d * value`, a code of 4 bits choosing one of 16 uneven values."""
    return _block(*_nearest(x, importance, scale_search.table(VALUES_4)))


def _scaled(x, importance, half):
    return _nearest(x, importance, scale_search.integers(-half, half - 1))


def _nearest(x, importance, levels):
    """Returns codes float32[n, 32], their scale float32[n], and no offset."""
    scale = scale_search.fit_scale(x, scale_search.weights_of(x, importance), levels)
    scale = packing.rounded_to_float16(scale)
    return levels.nearest(x * scale_search.inverse(scale))[1], scale[:, 0], None


def _line(x, importance, highest):
    """Returns codes float32[n, 32], their scale and their offset, float32[n] each."""
    weights = scale_search.weights_of(x, importance)
    line = scale_search.fit_line(x, weights, highest, is_offset_negative=False)
    scale, offset = (packing.rounded_to_float16(number) for number in line)
    codes = jnp.clip(jnp.rint((x - offset) * scale_search.inverse(scale)), 0, highest)
    return codes, scale[:, 0], offset[:, 0]


def _block(codes, scale, offset):
    return jnp.concatenate([_halves(scale, offset), _nibbles(codes.astype(jnp.uint8))], axis=-1)


def _block_of_5_bits(codes, scale, offset):
    codes = codes.astype(jnp.uint8)
    fifth = packing.pack(codes >> jnp.uint8(4), 1)
    return jnp.concatenate([_halves(scale, offset), fifth, _nibbles(codes)], axis=-1)


def _halves(scale, offset):
    numbers = [scale] if offset is None else [scale, offset]
    return packing.float16(jnp.stack(numbers, axis=-1))


def _nibbles(codes):
    return packing.planes(codes & jnp.uint8(0x0F), 4)
