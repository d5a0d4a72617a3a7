"""Latent attention of a sequence to itself, without a cache: the way that has a gradient.

Keys and values are up-projected once. Some queries are visited at a time, and in the backward pass their
scores are computed again, so that the scores of one block are the most that is held.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import flash_mla_prefill

BLOCK = 256  # queries

_MASKED = -1e30  # a query sees at least itself, so that this is never the largest


def attend(q, q_rope, latent, rope, k_up, v_up, positions, *, sm_scale, for_gpu):
    """Attends to the tokens of the same call, causally.

    Args:
      q: f32[B, T, N, H] query part without position.
      q_rope: f32[B, T, N, P] rotated query part.
      latent: f32[B, T, R] normalised.
      rope: f32[B, T, P] rotated key part.
      k_up: f32[N, H, R] `W_uk`.
      v_up: f32[N, V, R] `W_uv`.
      positions: i32[B, T] ascending from 0; padding repeats the last one.
      sm_scale: multiplies the scores, YaRN's squared temperature included.
      for_gpu: take `flash_mla_prefill`, in bfloat16, and its gradient.

    Returns:
      f32[B, T, N, V], and f32[B, T, N], the natural logarithm of the sum of exp(score).
    """
    k_BSNH = jnp.einsum("BSR,NHR->BSNH", latent, k_up)
    v_BSNV = jnp.einsum("BSR,NVR->BSNV", latent, v_up)
    if for_gpu:
        length_B = positions[:, -1] + 1
        half = [part.astype(jnp.bfloat16) for part in (q, q_rope, k_BSNH, rope, v_BSNV)]
        starts = jnp.zeros_like(length_B), length_B
        out, lse = flash_mla_prefill.flash_mla_prefill(*half, *starts, sm_scale=sm_scale)
        return out.astype(jnp.float32), lse
    one = functools.partial(_attend, k_BSNH=k_BSNH, rope_BSP=rope, v_BSNV=v_BSNV, sm_scale=sm_scale)
    return _in_blocks(one, q, q_rope, positions)


def _attend(q_BTNH, qr_BTNP, positions_BT, *, k_BSNH, rope_BSP, v_BSNV, sm_scale):
    score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
    score_BNTS += jnp.einsum("BTNP,BSP->BNTS", qr_BTNP, rope_BSP)
    slots_S = jnp.arange(k_BSNH.shape[1], dtype=jnp.int32)
    seen_BNTS = (slots_S[None, None] <= positions_BT[:, :, None])[:, None]
    score_BNTS = jnp.where(seen_BNTS, score_BNTS * sm_scale, _MASKED)
    lse_BNT = jax.nn.logsumexp(score_BNTS, axis=-1)
    prob_BNTS = jnp.exp(score_BNTS - lse_BNT[..., None])
    return jnp.einsum("BNTS,BSNV->BTNV", prob_BNTS, v_BSNV), lse_BNT.swapaxes(1, 2)


def _in_blocks(attend, *queries):
    """Applies `attend` to whole blocks of queries [B, T, ...] in turn, then to the rest."""
    T = queries[0].shape[1]
    whole = T // BLOCK * BLOCK
    if T <= BLOCK:
        return attend(*queries)
    blocks = [jnp.stack(jnp.split(part[:, :whole], T // BLOCK, axis=1)) for part in queries]
    results = jax.lax.map(lambda block: jax.checkpoint(attend)(*block), blocks)
    parts = [[part.swapaxes(0, 1).reshape(-1, whole, *part.shape[3:]) for part in results]]
    if whole < T:
        parts.append(jax.checkpoint(attend)(*(part[:, whole:] for part in queries)))
    return tuple(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
