"""Writes new tokens to the paged latent cache: norm, both rotations, quantisation, store."""

import jax
import numpy as np

from cpu_kernels.latent_attention import Part
from cpu_kernels.library import write


def latent_append(
    kv: jax.Array,
    norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pages: jax.Array,
    slots: jax.Array,
    latent: Part,
    rope: Part,
    *,
    latent_type: str,
    rope_type: str,
    epsilon: float,
    latent_rotation: int | None = None,
    rope_rotation: int | None = None,
) -> tuple[Part, Part]:
    """Writes what the down-projection gives of new tokens to their places in the cache.

    Args:
      kv: f32[B, T, R + P], latents that are not normalised and shared key parts that are not rotated yet.
      norm: f32[R] weight of the RMSNorm of latents.
      cos: f32[B, T, P / 2] cosines that the pairs (2i, 2i + 1) of a key part are rotated by.
      sin: f32[B, T, P / 2] sines.
      pages: i32[B, M] page ids. A token whose page is not in [0, Z) is dropped.
      slots: i32[B, T]; slot s lies in page pages[b, s // G] at place s % G. Slots outside [0, M * G) drop
        their token. No two tokens may have one place.
      latent: part of the cache, R wide; free places may hold anything.
      rope: the same, P wide.
      latent_type: name of a cache type.
      rope_type: the same.
      epsilon: of the RMSNorm.
      latent_rotation: runs of this many numbers are Hadamard-rotated before they are encoded; a power of two
        that divides R.
      rope_rotation: the same, after the rotation by position.

    Returns:
      Both parts, written in place where they are donated. Numbers beyond the range of f16 or fp8_e4m3 and
      scales beyond float16 saturate; NaN stays NaN in all numbers that depend on it, and in no other row.
    """
    pools = (*latent, *rope)
    written = iter(
        write(
            "mla_latent_append",
            (kv, norm, cos, sin, pages, slots),
            tuple(pool for pool in pools if pool.size),
            latent_type=latent_type,
            rope_type=rope_type,
            epsilon=np.float32(epsilon),
            latent_rotation=np.int64(latent_rotation or 0),
            rope_rotation=np.int64(rope_rotation or 0),
        )
    )
    results = tuple(next(written) if pool.size else pool for pool in pools)
    return results[:4], results[4:]
