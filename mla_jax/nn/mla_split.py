"""Attention to latents of which each device of a group has a part of every page: split and merge.

A page of n * G slots lies on n devices, G slots on each, so that the host knows of pages as ever. Each device
has all heads attend to its own slots, in latent space, and is then given the partial results of its own
heads, which it merges. Two exchanges a layer, of queries and of results, none of the cache.

Source: the merge of partial softmaxes is that of FlashAttention (arXiv:2205.14135), section 3.1.
"""

import jax
import jax.numpy as jnp

from mla_jax.cache import LatentRows
from mla_jax.config import Shard
from mla_jax.nn.collectives import GROUP


def own_slots(positions: jax.Array, rows: LatentRows, shard: Shard) -> jax.Array:
    """Returns where this device has slots i32[B, T] of the whole cache; its capacity for one of another."""
    page, place = jnp.divmod(positions, shard.group_size * rows.page_size)
    owner, own_place = jnp.divmod(place, rows.page_size)
    is_own = owner == jax.lax.axis_index(GROUP)
    return jnp.where(is_own, page * rows.page_size + own_place, rows.num_slots)


def last_own_slots(positions: jax.Array, rows: LatentRows, shard: Shard) -> jax.Array:
    """Returns the last slot of this device that a query at each position i32[B, T] sees; -1 for none."""
    page, place = jnp.divmod(positions, shard.group_size * rows.page_size)
    in_page = jnp.clip(place + 1 - jax.lax.axis_index(GROUP) * rows.page_size, 0, rows.page_size)
    return page * rows.page_size + in_page - 1


def attend(attend_own, q, q_rope):
    """Attends to the slots of the whole group.

    Args:
      attend_own: from q [B, T, n * N, R] and q_rope [B, T, n * N, P] of all heads to the unnormalised sum
        f32[B, n * N, T, R] over this device's slots, its largest score and its sum of exponentials
        f32[B, n * N, T], both relative to that score; a finite score and zeros where no slot is seen.
      q: [B, T, N, R] absorbed queries of this device's heads.
      q_rope: [B, T, N, P].

    Returns:
      f32[B, T, N, R], of this device's heads.
    """
    gather = lambda part: jax.lax.all_gather(part, GROUP, axis=2, tiled=True)
    o_BNTR, m_BNT, l_BNT = attend_own(gather(q), gather(q_rope))
    sums_BNTU = jnp.concatenate([o_BNTR, m_BNT[..., None], l_BNT[..., None]], axis=-1)
    parts = jax.lax.all_to_all(sums_BNTU[None], GROUP, split_axis=2, concat_axis=0, tiled=True)
    R = q.shape[-1]
    o, m, l = parts[..., :R], parts[..., R], parts[..., R + 1]
    share = jnp.exp(m - m.max(axis=0, keepdims=True))
    total_BNT = (share * l).sum(axis=0)
    return ((share[..., None] * o).sum(axis=0) / total_BNT[..., None]).swapaxes(1, 2)
