"""Attention over the paged latent cache: absorbed for decode, decompressed tile by tile for prefill.

A part of the cache is four arrays [pages, slots of a page, ...]: low and high bits of codes, scale and
offset, as `mla_jax.cache.codec` lays them out; those that a type lacks are empty. Numbers that are no page
read as zeros; slots that no query sees may hold anything.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cpu_kernels.library import call

Part = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def split_queries(q: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes queries apart, and rotates the part with position.

    Args:
      q: f32[B, T, N, H + P], the rotary part last.
      cos: f32[B, T, P / 2] cosines that its pairs (2i, 2i + 1) are rotated by.
      sin: f32[B, T, P / 2] sines.

    Returns:
      f32[B, T, N, H], and the rotated part f32[B, T, N, P].
    """
    P = 2 * cos.shape[-1]
    shapes = [jax.ShapeDtypeStruct((*q.shape[:-1], size), jnp.float32) for size in (q.shape[-1] - P, P)]
    plain, rotated = jax.ffi.ffi_call("mla_split_queries", shapes, vmap_method="sequential")(q, cos, sin)
    return plain, rotated


def latent_attention(
    q: jax.Array,
    q_rope: jax.Array,
    latent: Part,
    rope: Part,
    pages: jax.Array,
    positions: jax.Array,
    *,
    latent_type: str,
    rope_type: str,
    scale: float,
) -> jax.Array:
    """Attends to the latents themselves: split over the slots among threads, then merged.

    Args:
      q: f32[B, T, N, R] absorbed queries.
      q_rope: f32[B, T, N, P] rotated query parts.
      latent: cached latents, R wide.
      rope: cached rotary parts, P wide.
      pages: i32[B, M] pages of each sequence.
      positions: i32[B, T]. A query sees the slots up to its own position.
      latent_type: cache type of `latent`.
      rope_type: cache type of `rope`.
      scale: multiplies the scores.

    Returns:
      f32[B, T, N, R], weighted sums of latents.
    """
    types = dict(latent_type=latent_type, rope_type=rope_type, scale=np.float32(scale))
    return call("mla_latent_attention", q.shape)(q, q_rope, pages, positions, *latent, *rope, **types)


def latent_prefill(
    q: jax.Array,
    q_rope: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    latent: Part,
    rope: Part,
    pages: jax.Array,
    positions: jax.Array,
    *,
    formats: tuple[str, str],
    key_stride: int,
    value_stride: int,
    value_first: int,
    value_size: int,
    **cache,
) -> jax.Array:
    """Attends to keys and values per head that are up-projected from the latents, 128 slots at a time.

    Args:
      q: f32[B, T, N, H] query parts without position.
      q_rope: f32[B, T, N, P] rotated query parts.
      keys: blocks and header, as in `matmul`; the rows from n * key_stride on are W_uk of head n.
      values: the same; the rows from n * value_stride + value_first on are W_uv.
      latent: cached latents.
      rope: cached rotary parts, P wide.
      pages: i32[B, M] pages of each sequence.
      positions: i32[B, T]. A query sees the slots up to its own position.
      formats: of `keys` and of `values`.
      key_stride: rows from a head to the next.
      value_stride: the same.
      value_first: row of the first head.
      value_size: width V of a value.
      **cache: `latent_type`, `rope_type` and `scale` as in `latent_attention`.

    Returns:
      f32[B, T, N, V].
    """
    return call("mla_latent_prefill", (*q.shape[:-1], value_size))(
        q,
        q_rope,
        *keys,
        *values,
        pages,
        positions,
        *latent,
        *rope,
        key_format=formats[0],
        value_format=formats[1],
        key_stride=np.int64(key_stride),
        value_stride=np.int64(value_stride),
        value_first=np.int64(value_first),
        **cache | dict(scale=np.float32(cache["scale"])),
    )
