"""Rotary positions of the deepseek2 family: interleaved pairs, linear and YaRN scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import config as config_lib


def inverse_frequencies(config: config_lib.RopeConfig, head_dim: int) -> np.ndarray:
    """Returns the angle per position of each pair, context scaling included.

    Args:
      config: base and scaling.
      head_dim: width P of the rotary part.

    Returns:
      float32[P / 2], radians per position.

    Source: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071) equations 23 to 25.
    """
    pair = np.arange(head_dim // 2, dtype=np.float64)
    trained = config.base ** (-2.0 * pair / head_dim)
    stretched = trained / config.factor
    if config.scaling == "none":
        return trained.astype(np.float32)
    if config.scaling == "linear":
        return stretched.astype(np.float32)

    def pair_with(turns):
        wavelength = config.original_context_length / (2 * math.pi * turns)
        return head_dim * math.log(wavelength) / (2 * math.log(config.base))

    low = max(0, math.floor(pair_with(config.beta_fast)))
    high = min(head_dim - 1, math.ceil(pair_with(config.beta_slow)))
    keep = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
    return (stretched * (1.0 - keep) + trained * keep).astype(np.float32)


def softmax_scale(config: config_lib.RopeConfig, head_dim: int) -> float:
    """Returns the factor of the attention scores: YaRN's squared temperature over sqrt(head width).

    Args:
      config: base and scaling. `yarn_log_multiplier` is 0.1 * mscale_all_dim.
      head_dim: width H + P of an expanded head, in absorbed attention too.

    Source: DeepSeek-V3 inference/model.py; YaRN (arXiv:2309.00071).
    """
    stretch = config.yarn_log_multiplier * math.log(config.factor) if config.scaling == "yarn" else 0.0
    return (config.attention_factor * (1.0 + stretch)) ** 2 / math.sqrt(head_dim)


def cos_and_sin(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns both of each pair's angle, f32[B, T, P / 2], for i32[B, T] and f32[P / 2]."""
    angle = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies)[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates the pairs (2i, 2i + 1) of the last axis by `positions * frequencies[i]`.

    Args:
      x: [B, T, P] or [B, T, N, P].
      positions: i32[B, T].
      frequencies: f32[P / 2] from `inverse_frequencies`.

    Returns:
      An array like `x`.
    """
    cos, sin = cos_and_sin(positions, frequencies)
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
