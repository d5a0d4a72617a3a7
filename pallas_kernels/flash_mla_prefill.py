"""FlashMLA-3 prefill: causal attention of many queries to decompressed keys and values.

A score is the sum of two products, of the parts without position (a key per head) and of the rotated parts
(one key for all heads), so the parts are never joined and the shared key is never repeated.

Letters as in `mla_jax.nn`: B sequences, T queries, N heads, S slots, H no-position head, P rotary head,
V value head. A lower-case letter is a tile of that axis; h, p and v are column planes, whose
widths are powers of two: 192 columns are a plane of 128 and one of 64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import dispatch, flash_mla_prefill_gradient, tuning

DTYPES = ("float32", "bfloat16", "float16")
MIN_WIDTH = 16  # of a tile in a product of tensor cores
MAX_PLANES = 3

_LOWEST = -1e30  # finite: queries that see nothing must not produce inf - inf
_LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunables. They change the speed, never the result."""

    block_t: int = 128  # queries per program, a power of two from 16 on
    block_s: int = 64  # slots per step, the same
    num_warps: int = 8
    num_stages: int = 3

    @classmethod
    def for_sizes(cls, *, queries: int, widths: tuple[int, int, int], itemsize: int, shared_memory: int):
        """Returns the largest tiles that fit.

        Args:
          queries: T.
          widths: H, P and V.
          itemsize: bytes of a number.
          shared_memory: bytes that a program may take.
        """
        fits = lambda config: config._shared_memory(widths, itemsize, shared_memory) <= shared_memory
        configs = _CONFIGS if itemsize < 4 else _CONFIGS[-2:]  # float32 has no tensor cores: its sums spill
        config = next(filter(fits, configs), _CONFIGS[-1])
        if queries > config.block_t // 2:
            return config
        block_t = max(MIN_WIDTH, pl.next_power_of_2(queries))
        return dataclasses.replace(config, block_t=block_t, num_warps=4)

    def _shared_memory(self, widths, itemsize, limit):
        """Estimates the bytes: tiles of queries and weights, and of keys and values for each stage."""
        H, P, V = widths
        in_flight = self.num_stages if limit > _AMPERE_SHARED_MEMORY else max(2, self.num_stages - 1)
        once = self.block_t * (H + P + self.block_s)
        return itemsize * (once + in_flight * self.block_s * (H + P + V))


_AMPERE_SHARED_MEMORY = 163 << 10  # up to there registers hold the tile in use: one stage less is kept
_CONFIGS = (
    Config(),
    Config(num_stages=2),
    Config(block_s=32),
    Config(block_t=64, block_s=32, num_warps=4),
    Config(block_t=32, block_s=32, num_warps=4, num_stages=2),
    Config(block_t=16, block_s=16, num_warps=4, num_stages=2),
)


# --- 1. reference: defines the result ---------------------------------------------------------


def reference(q, q_rope, k, k_rope, v, start, length, num_queries, *, sm_scale):
    """Computes every score in float32. Slow and obvious."""
    T, S = q.shape[1], k.shape[1]
    t_T, s_S = jnp.arange(T), jnp.arange(S)
    asked_BT, there_BS = t_T[None] < num_queries[:, None], s_S[None] < length[:, None]
    q_BTNH, qr_BTNP = (_zero_unless(asked_BT, part) for part in (q, q_rope))
    k_BSNH, kr_BSP, v_BSNV = (_zero_unless(there_BS, part) for part in (k, k_rope, v))
    position_BT = start[:, None] + t_T[None]
    seen_BTS = (s_S[None, None] <= position_BT[:, :, None]) & there_BS[:, None]
    seen_BNTS = (seen_BTS & asked_BT[:, :, None])[:, None]

    score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest")
    score_BNTS += jnp.einsum("BTNP,BSP->BNTS", qr_BTNP, kr_BSP, precision="highest")
    score_BNTS = jnp.where(seen_BNTS, score_BNTS * sm_scale, _LOWEST)
    m_BNT = jax.lax.stop_gradient(score_BNTS.max(axis=-1, initial=_LOWEST))  # it cancels out of the result
    weight_BNTS = jnp.where(seen_BNTS, jnp.exp(score_BNTS - m_BNT[..., None]), 0.0)
    l_BNT = weight_BNTS.sum(axis=-1)
    some_BNT = l_BNT != 0
    l_BNT = jnp.where(some_BNT, l_BNT, 1.0)
    o_BTNV = jnp.einsum("BNTS,BSNV->BTNV", weight_BNTS / l_BNT[..., None], v_BSNV, precision="highest")
    lse_BNT = jnp.where(some_BNT, m_BNT + jnp.log(l_BNT), -jnp.inf)
    return o_BTNV.astype(q.dtype), lse_BNT.swapaxes(1, 2)


def _zero_unless(kept, rows):
    """Returns [B, rows, ...] as float32 with zeros in the rows that are not kept, whatever is there."""
    kept = kept.reshape(kept.shape + (1,) * (rows.ndim - 2))
    return jnp.where(kept, rows.astype(jnp.float32), 0.0)


# --- 2. kernel: the same result, a tile of queries against a tile of slots at a time -----------


def planes(width: int) -> tuple[tuple[int, int], ...] | None:
    """Cuts columns into planes (first, width) of powers of two, largest first, or returns None."""
    found, first = [], 0
    for bit in reversed(range(width.bit_length())):
        if width >> bit & 1:
            found.append((first, 1 << bit))
            first += 1 << bit
    fits = 1 <= len(found) <= MAX_PLANES and found[-1][1] >= MIN_WIDTH
    return tuple(found) if fits else None


def _dot(x, y, **kwargs):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return plgpu.dot(x, y, precision=precision, **kwargs)


def _rows_mask(kept, width):
    return jnp.broadcast_to(kept[:, None], (kept.shape[0], width))


def _load(view_of, planes_of_row, kept):
    """Loads the planes of rows; where they are not kept, zeros. None keeps all."""
    if kept is None:
        return [plgpu.load(view_of(pl.ds(*plane))) for plane in planes_of_row]
    load = lambda plane: plgpu.load(view_of(pl.ds(*plane)), mask=_rows_mask(kept, plane[1]), other=0.0)
    return [load(plane) for plane in planes_of_row]


def _body(
    q_ref,
    qr_ref,
    k_ref,
    kr_ref,
    v_ref,
    start_ref,
    length_ref,
    queries_ref,
    o_ref,
    lse_ref,
    *,
    sm_scale,
    config,
):
    """Grid (T / t, N, B): online softmax in base 2 over the slots that all queries see, then the others."""
    t, s, num_tiles = config.block_t, config.block_s, pl.num_programs(0)
    H_planes, P_planes, V_planes = (planes(ref.shape[-1]) for ref in (q_ref, qr_ref, v_ref))
    scale = sm_scale * _LOG2_E
    n, b = pl.program_id(1), pl.program_id(2)
    first = (num_tiles - 1 - pl.program_id(0)) * t  # the longest first, so that none is left for the end
    start, length, num_queries = start_ref[b], length_ref[b], queries_ref[b]
    rows_t = first + jnp.arange(t)
    asked_t = rows_t < num_queries
    q_th = _load(lambda plane: q_ref.at[b, pl.ds(first, t), n, plane], H_planes, asked_t)
    qr_tp = _load(lambda plane: qr_ref.at[b, pl.ds(first, t), n, plane], P_planes, asked_t)

    def visit(i, carry, *, masked):
        m_t, l_t, o_tv = carry
        slots, slot_s = pl.ds(i * s, s), i * s + jnp.arange(s)
        there_s = slot_s < length if masked else None
        k_sh = _load(lambda plane: k_ref.at[b, slots, n, plane], H_planes, there_s)
        kr_sp = _load(lambda plane: kr_ref.at[b, slots, plane], P_planes, there_s)
        v_sv = _load(lambda plane: v_ref.at[b, slots, n, plane], V_planes, there_s)
        score_ts = sum(_dot(x, y, trans_b=True) for x, y in zip(q_th + qr_tp, k_sh + kr_sp, strict=True))
        if masked:
            seen_ts = (slot_s[None] <= start + rows_t[:, None]) & there_s[None]
            score_ts = jnp.where(seen_ts, score_ts, -jnp.inf)
        new_m_t = jnp.maximum(m_t, score_ts.max(axis=1))
        weight_ts = jnp.exp2(score_ts * scale - (new_m_t * scale)[:, None])  # one fused multiply and add
        shrink_t = jnp.exp2((m_t - new_m_t) * scale)
        update_tv = [_dot(weight_ts.astype(v.dtype), v) for v in v_sv]
        o_tv = [o * shrink_t[:, None] + update for o, update in zip(o_tv, update_tv, strict=True)]
        return new_m_t, l_t * shrink_t + weight_ts.sum(axis=1), o_tv

    last = jnp.minimum(first + t, num_queries)
    end = jnp.where(first < last, jnp.clip(start + last, 0, length), 0)
    seen_by_all = jnp.clip(start + first + 1, 0, end) // s
    lowest_t, zero_t = jnp.full((t,), _LOWEST, jnp.float32), jnp.zeros((t,), jnp.float32)
    carry = lowest_t, zero_t, [jnp.zeros((t, width), jnp.float32) for _, width in V_planes]
    carry = jax.lax.fori_loop(0, seen_by_all, functools.partial(visit, masked=False), carry)
    m_t, l_t, o_tv = jax.lax.fori_loop(
        seen_by_all, pl.cdiv(end, s), functools.partial(visit, masked=True), carry
    )
    _write(o_ref, lse_ref, (b, pl.ds(first, t), n), rows_t, asked_t, m_t * sm_scale, l_t, o_tv)


def _write(o_ref, lse_ref, where, rows_t, asked_t, m_t, l_t, o_tv):
    """Divides by the sums of weights; queries that are not there or see nothing get zeros and -inf."""
    is_row_t = rows_t < o_ref.shape[1]
    some_t = asked_t & (l_t != 0)  # also where the sum is NaN
    l_t = jnp.where(some_t, l_t, 1.0)
    plgpu.store(lse_ref.at[where], jnp.where(some_t, m_t + jnp.log(l_t), -jnp.inf), mask=is_row_t)
    for o, plane in zip(o_tv, planes(o_ref.shape[-1]), strict=True):
        o = jnp.where(some_t[:, None], o / l_t[:, None], 0.0).astype(o_ref.dtype)
        plgpu.store(o_ref.at[*where, pl.ds(*plane)], o, mask=_rows_mask(is_row_t, plane[1]))


def _call(q, q_rope, k, k_rope, v, start, length, num_queries, *, sm_scale, config, interpret):
    (B, T, N, H), P, V = q.shape, q_rope.shape[-1], v.shape[-1]
    sizes = dict(queries=T, heads=B * N, dtype=str(q.dtype), widths=f"{H}/{P}/{V}")
    config = config or tuning.measured(Config, "flash_mla_prefill", **sizes)
    memory = dict(itemsize=q.dtype.itemsize, shared_memory=dispatch.shared_memory())
    config = config or Config.for_sizes(queries=T, widths=(H, P, V), **memory)
    return dispatch.launch(
        functools.partial(_body, sm_scale=sm_scale, config=config),
        *(q, q_rope, k, k_rope, v, start, length, num_queries),
        name="flash_mla_prefill",
        grid=(pl.cdiv(T, config.block_t), N, B),
        out_shape=(
            jax.ShapeDtypeStruct((B, T, N, V), q.dtype),
            jax.ShapeDtypeStruct((B, T, N), jnp.float32),
        ),
        config=config,
        interpret=interpret,
    )


def _unsupported(q, q_rope, v):
    """Says why the kernel cannot take these operands, or returns None."""
    if str(q.dtype) not in DTYPES:
        return f"q must be of one of the types {DTYPES}, got {q.dtype}."
    for name, width in dict(q=q.shape[-1], q_rope=q_rope.shape[-1], v=v.shape[-1]).items():
        if planes(width) is None:
            return (
                f"the width of {name} must be a sum of at most {MAX_PLANES} powers of two from "
                f"{MIN_WIDTH} on, got {width}."
            )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(sm_scale, implementation, config, *operands):
    q, q_rope, k, _, v, *_ = operands
    is_empty = 0 in (q.size, k.size)
    return dispatch.run(
        implementation,
        *operands,
        unsupported="there must be queries and slots." if is_empty else _unsupported(q, q_rope, v),
        kernel=functools.partial(_call, sm_scale=sm_scale, config=config),
        reference=functools.partial(reference, sm_scale=sm_scale),
    )


def _forward(sm_scale, implementation, config, *operands):
    results = _attend(sm_scale, implementation, config, *operands)
    return results, (operands, results)


def _backward(sm_scale, implementation, config, residuals, cotangents):
    """Multiplies numbers of the operands' type where the kernel runs; XLA on the CPU has no such products."""
    gradient = functools.partial(flash_mla_prefill_gradient.gradient, sm_scale=sm_scale)
    of_queries_and_slots = dispatch.run(
        implementation,
        *residuals,
        cotangents,
        unsupported=None,
        kernel=lambda *args, interpret: gradient(*args, is_short=not interpret),
        reference=gradient,
    )
    return *of_queries_and_slots, None, None, None


_attend.defvjp(_forward, _backward)


def merge(out_a, lse_a, out_b, lse_b):
    """Returns (out, lse) of attention to two sets of slots, from those of each.

    Args:
      out_a: [..., V] of the one set.
      lse_a: f32[...] natural logarithm of the sum of exp(score), -inf if nothing was seen.
      out_b: of the other set.
      lse_b: of the other set.
    """
    most = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    most = jnp.where(most == -jnp.inf, 0.0, most)
    a, b = jnp.exp(lse_a - most), jnp.exp(lse_b - most)
    is_some = a + b != 0
    total = jnp.where(is_some, a + b, 1.0)
    out = out_a.astype(jnp.float32) * (a / total)[..., None]
    out += out_b.astype(jnp.float32) * (b / total)[..., None]
    return out.astype(out_a.dtype), jnp.where(is_some, most + jnp.log(total), -jnp.inf)


# --- 3. cost: what the roofline of the benchmark is drawn from ---------------------------------


def cost(
    *, batch: int, queries: int, history: int, heads: int, widths: tuple[int, int, int], itemsize: int = 2
) -> pl.CostEstimate:
    """FLOPs, bytes and exponentials of one call.

    Args:
      batch: B.
      queries: T, all there.
      history: slots before the first query.
      heads: N.
      widths: H, P and V.
      itemsize: bytes of a number.
    """
    H, P, V = widths
    slots = history + queries
    pairs = batch * heads * (queries * history + queries * (queries + 1) // 2)
    numbers = heads * (queries * (H + P + V) + slots * (H + V)) + slots * P
    return pl.CostEstimate(
        flops=2 * pairs * (H + P + V),
        bytes_accessed=batch * (itemsize * numbers + 4 * heads * queries),
        transcendentals=pairs,
    )


# --- 4. public op ------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("sm_scale", "implementation", "config"))
def flash_mla_prefill(
    q,
    q_rope,
    k,
    k_rope,
    v,
    start,
    length,
    *,
    sm_scale,
    num_queries=None,
    implementation=None,
    config=None,
):
    """Attends many queries per sequence to keys and values per head, causally (MLA modes 2 and 3).

    Query t has position `start + t` and sees the slots up to it, of those that are there. Differentiable in
    reverse mode with respect to the first five operands.

    A sequence may be visited in parts: give the keys and values of slots [c, d) with `start - c`,
    `clip(length - c, 0, d - c)` and the `num_queries` of the whole, and `merge` the results. The heads may
    be split too.

    Args:
      q: [B, T, N, H] queries; f32, bf16 or f16, like the next four.
      q_rope: [B, T, N, P] rotated part of the queries.
      k: [B, S, N, H] keys. H, P and V are sums of at most three powers of two from 16 on: other widths are
        left to the reference.
      k_rope: [B, S, P] rotated part of the keys, that of all heads.
      v: [B, S, N, V] values.
      start: i32[B] slots before the first query. Below 0 the first queries see nothing.
      length: i32[B] slots that are there, in [0, S]. Those past it may hold anything, NaN included.
      sm_scale: multiplies the scores, above 0; the YaRN `mscale ** 2` is the caller's.
      num_queries: i32[B] queries that are there, or None: `length - start`. Those past it may hold
        anything, NaN included; they see nothing.
      implementation: None (by platform), "reference", "triton" or "interpret".
      config: tile sizes, None for what was measured, or else those that fit the device.

    Returns:
      [B, T, N, V] in the type of `q`, and f32[B, T, N], the natural logarithm of the sum of exp(score). A
      query that sees nothing gives zeros and -inf.

    Raises:
      ValueError: for shapes that do not fit, an `sm_scale` not above 0 or an unknown `implementation`.
      NotImplementedError: if the kernel is asked for and cannot take the types or the widths.
    """
    _check(sm_scale, num_queries, q=q, q_rope=q_rope, k=k, k_rope=k_rope, v=v, start=start, length=length)
    if num_queries is None:
        num_queries = length - start
    length = jnp.clip(length, 0, k.shape[1])
    num_queries = jnp.clip(num_queries, 0, q.shape[1])
    operands = q, q_rope, k, k_rope, v, start, length, num_queries
    if implementation == "reference":
        return reference(*operands, sm_scale=sm_scale)
    return _attend(sm_scale, implementation, config, *operands)


def _check(sm_scale, num_queries, **operands):
    """Raises a sentence for operands that do not fit together."""
    (B, T, N, H), P = operands["q"].shape, operands["q_rope"].shape[-1]
    S, V = operands["k"].shape[1], operands["v"].shape[-1]
    shapes = dict(
        q_rope=(B, T, N, P), k=(B, S, N, H), k_rope=(B, S, P), v=(B, S, N, V), start=(B,), length=(B,)
    )
    if num_queries is not None:
        operands["num_queries"], shapes["num_queries"] = num_queries, (B,)
    for name, shape in shapes.items():
        operand = operands[name]
        dtype = jnp.int32 if len(shape) == 1 else operands["q"].dtype
        if operand.shape != shape or operand.dtype != dtype:
            raise ValueError(
                f"{name} must be {jnp.dtype(dtype)}{list(shape)}, got {operand.dtype}{list(operand.shape)}."
            )
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be above 0, got {sm_scale}.")
