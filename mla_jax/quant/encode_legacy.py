"""Encoders of the legacy types: blocks of 32 weights with a float16 scale and codes of one width."""

import jax
import jax.numpy as jnp

from mla_jax.quant import quantisers


def encode_q8_0(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Encodes a float16 scale, largest magnitude / 127, and 32 signed bytes, by ggml's rule.

    Source: the vector forms of `quantize_row_q8_0` in ggml; its portable form rounds ties away from zero.
    """
    codes, scale, _ = quantisers.q8_0(x)
    return jnp.concatenate([_half(scale), _bytes(codes.astype(jnp.int8))], axis=-1)


def _half(scale):
    """Returns scales float32[n] as the bytes of float16, uint8[n, 2]."""
    return _bytes(scale.astype(jnp.float16))


def _bytes(values):
    return jax.lax.bitcast_convert_type(values, jnp.uint8)
