"""The gradient of `flash_mla_prefill` in plain JAX, some slots at a time.

The weights are computed again from the scores and the logarithm of their sums, so that only the scores of one
chunk of slots are held. Letters as in `mla_jax.nn`; C is a chunk of S.
"""

import jax
import jax.numpy as jnp

CHUNK = 256  # slots


def gradient(operands, results, cotangents, *, sm_scale, is_short=False, chunk=CHUNK):
    """Returns the cotangents of the queries, keys and values.

    With d the derivative of what is differentiated, d score = weight * (d weight - sum(d o * o) + d lse).

    Args:
      operands: q, q_rope, k, k_rope, v, start, length and num_queries of `flash_mla_prefill`.
      results: its (o, lse).
      cotangents: of the results. Those of queries that see nothing are not read.
      sm_scale: multiplies the scores.
      is_short: multiply numbers of the type of `q` into float32 sums, not float32 numbers.
      chunk: slots visited at a time.

    Returns:
      Cotangents of q, q_rope, k, k_rope and v, each in its type; zeros for what is not there.

    Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2.
    """
    (q, q_rope, *slots, start, length, _), (o, lse) = operands, results
    T, S = q.shape[1], slots[0].shape[1]
    dtype = q.dtype if is_short else jnp.float32
    chunk = max(1, min(chunk, S))
    num_chunks = max(1, -(-S // chunk))
    position_BT = start[:, None] + jnp.arange(T)[None]
    some_BTN = lse != -jnp.inf
    of_some = lambda x: jnp.where(some_BTN[..., None], x, 0).astype(dtype)
    q_BTNH, qr_BTNP, do_BTNV = map(of_some, (q, q_rope, cotangents[0]))
    row_BTN = (do_BTNV.astype(jnp.float32) * o.astype(jnp.float32)).sum(axis=-1) - cotangents[1]
    row_BTN, lse_BTN = (jnp.where(some_BTN, x, 0.0) for x in (row_BTN, lse))
    row_BNT, lse_BNT, some_BNT = (x.swapaxes(1, 2) for x in (row_BTN, lse_BTN, some_BTN))
    slots = [_whole_chunks(rows, length, num_chunks * chunk).astype(dtype) for rows in slots]
    exact = dict(preferred_element_type=jnp.float32, precision="highest")

    def visit(carry, i):
        dq_BTNH, dqr_BTNP = carry
        k_BCNH, kr_BCP, v_BCNV = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in slots)
        slot_C = i * chunk + jnp.arange(chunk)
        seen_BTC = slot_C[None, None] <= position_BT[:, :, None]
        seen_BTC &= slot_C[None, None] < length[:, None, None]
        score_BNTC = jnp.einsum("BTNH,BCNH->BNTC", q_BTNH, k_BCNH, **exact)
        score_BNTC += jnp.einsum("BTNP,BCP->BNTC", qr_BTNP, kr_BCP, **exact)
        weight_BNTC = jnp.exp(score_BNTC * sm_scale - lse_BNT[..., None])
        weight_BNTC = jnp.where(seen_BTC[:, None] & some_BNT[..., None], weight_BNTC, 0.0)
        dweight_BNTC = jnp.einsum("BTNV,BCNV->BNTC", do_BTNV, v_BCNV, **exact)
        dscore_BNTC = (weight_BNTC * (dweight_BNTC - row_BNT[..., None]) * sm_scale).astype(dtype)
        dv_BCNV = jnp.einsum("BNTC,BTNV->BCNV", weight_BNTC.astype(dtype), do_BTNV, **exact)
        dk_BCNH = jnp.einsum("BNTC,BTNH->BCNH", dscore_BNTC, q_BTNH, **exact)
        dkr_BCP = jnp.einsum("BNTC,BTNP->BCP", dscore_BNTC, qr_BTNP, **exact)
        dq_BTNH += jnp.einsum("BNTC,BCNH->BTNH", dscore_BNTC, k_BCNH, **exact)
        dqr_BTNP += jnp.einsum("BNTC,BCP->BTNP", dscore_BNTC, kr_BCP, **exact)
        return (dq_BTNH, dqr_BTNP), tuple(x.astype(q.dtype) for x in (dk_BCNH, dkr_BCP, dv_BCNV))

    zeros = jnp.zeros(q.shape, jnp.float32), jnp.zeros(q_rope.shape, jnp.float32)
    of_queries, of_slots = jax.lax.scan(visit, zeros, jnp.arange(num_chunks))
    return *(x.astype(q.dtype) for x in of_queries), *(_joined(x, S) for x in of_slots)


def _whole_chunks(rows, length, num_slots):
    """Puts zeros for what is not there, and appends zeros up to whole chunks."""
    kept = (jnp.arange(rows.shape[1])[None] < length[:, None]).reshape(
        (*rows.shape[:2], *(1,) * (rows.ndim - 2))
    )
    more = num_slots - rows.shape[1]
    return jnp.pad(jnp.where(kept, rows, 0), [(0, 0), (0, more), *[(0, 0)] * (rows.ndim - 2)])


def _joined(chunks, num_slots):
    """Returns [B, S, ...] of [chunks of S, B, C, ...]."""
    num_chunks, B, chunk, *rest = chunks.shape
    return jnp.moveaxis(chunks, 0, 1).reshape(B, num_chunks * chunk, *rest)[:, :num_slots]
