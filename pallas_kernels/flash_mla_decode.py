"""FlashMLA-3 decode: a few tokens per sequence attend to a paged latent cache of any type, in latent space.

Letters as in `mla_jax.nn`, with Z pages in the pool, G slots of a page, M pages of a sequence, S = M * G. A
lower-case letter is a tile: n pairs of (token, head), s slots. All pairs of a tile meet a slot once it is
decoded, so the latent is read and decoded once per n pairs. A sequence may be split among programs; what each
finds is merged.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import cache_tiles, dispatch, tuning
from pallas_kernels.cache_tiles import Part

_NOTHING = -1e30  # below every score, and finite: the difference of two must not be inf - inf
_LEAST = 16  # rows of a product on a tensor core

_LARGE_TILES = 220 << 10  # bytes of shared memory that 64 pairs take: those of a Hopper
_PROGRAMS = 264  # that keep a large GPU busy: two on each of 132 multiprocessors
_SPLIT_SLOTS = 512  # of a split at least, below which merging costs more than it gains


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunables. They change the speed, and results only by rounding.

    Attributes:
      pairs: (token, head) pairs of a program.
      slots: slots of a tile, a power of two; less if a page is no multiple of it.
      splits: programs that share the slots of a sequence.
      prefetch: whether a tile is loaded to registers while the one before is computed with.
      num_warps: of a program.
      num_stages: tiles that Triton keeps under way.
    """

    pairs: int = 16
    slots: int = 32
    splits: int = 1
    prefetch: bool = False
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def for_shapes(cls, *, batch: int, pairs: int, slots: int, latent_type: str, shared_memory: int):
        """Returns tile sizes that fit the shared memory, and splits that fill the GPU.

        Args:
          batch: B.
          pairs: T * N.
          slots: capacity S of a sequence.
          latent_type: key of `cache_tiles.TYPES`.
          shared_memory: bytes that a program may take.
        """
        bits = cache_tiles.TYPES[latent_type].low_bits
        if bits == 32:
            config = cls(slots=16)
        elif pairs >= 64 and shared_memory >= _LARGE_TILES:
            tiles = dict(num_stages=4) if bits > 4 else dict(slots=64)
            config = cls(pairs=64, num_warps=8, **tiles)
        else:
            config = cls(num_stages=3) if bits == 16 else cls(prefetch=True)
        programs = batch * pl.cdiv(pairs, config.pairs)
        splits = min(pl.cdiv(_PROGRAMS, programs), pl.cdiv(slots, _SPLIT_SLOTS))
        return dataclasses.replace(config, splits=splits)


# --- 1. reference: defines the result ---------------------------------------------------------


def reference(q, q_rope, latent, rope, pages, positions, *, latent_type, rope_type, sm_scale):
    """Decodes all pages of every sequence and attends in float32."""
    num_pages, page_size = latent[0].shape[:2]
    slots_S = jnp.arange(pages.shape[1] * page_size, dtype=jnp.int32)
    seen_BTS = slots_S[None, None] <= positions[:, :, None]
    is_page_BS = jnp.repeat((pages >= 0) & (pages < num_pages), page_size, axis=1)
    live_BS1 = (seen_BTS.any(axis=1) & is_page_BS)[:, :, None]
    latent_BSR = jnp.where(live_BS1, _slots(latent, latent_type, pages), 0.0)
    rope_BSP = jnp.where(live_BS1, _slots(rope, rope_type, pages), 0.0)

    einsum = functools.partial(jnp.einsum, precision="highest")
    score_BNTS = einsum("BTNR,BSR->BNTS", q.astype(jnp.float32), latent_BSR)
    score_BNTS += einsum("BTNP,BSP->BNTS", q_rope.astype(jnp.float32), rope_BSP)
    seen_BNTS = jnp.broadcast_to(seen_BTS[:, None], score_BNTS.shape)
    score_BNTS = jnp.where(seen_BNTS, score_BNTS * sm_scale, _NOTHING)
    prob_BNTS = jax.nn.softmax(score_BNTS, axis=-1) * seen_BNTS.astype(jnp.float32)
    return einsum("BNTS,BSR->BTNR", prob_BNTS, latent_BSR).astype(q.dtype)


def _slots(part, name, pages):
    gather = lambda array: jnp.take(array, pages, axis=0, mode="clip") if array.size else array
    rows = cache_tiles.decode(tuple(map(gather, part)), name)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


# --- 2. kernel: the same result, tile by tile --------------------------------------------------


def _body(queries, position_ref, pages_ref, latent, rope, outs, *, sm_scale, slots, config):
    """Grid (B, pairs / n, splits): n pairs of a sequence and a share of its slots."""
    b, block, split = (pl.program_id(axis) for axis in range(3))
    pairs, table_size = pl.ds(block * config.pairs, config.pairs), pages_ref.shape[1]
    num_pages, page_size = latent.refs[0].shape[:2]
    tiles_of_page, lead = page_size // slots, int(config.prefetch)

    q_planes = [
        ref[b, pairs, columns]
        for ref, rows in zip(queries, (latent, rope), strict=True)
        for columns in rows.columns
    ]
    position_n = position_ref[b, pairs]
    last = jnp.max(position_n)
    num_tiles = jnp.minimum((jnp.maximum(last, -1) + slots) // slots, table_size * tiles_of_page)
    share = (num_tiles + (config.splits - 1)) // config.splits
    start, stop = split * share, jnp.minimum(split * share + share, num_tiles)
    slots_of = lambda i: i * slots + jax.lax.broadcasted_iota(jnp.int32, (slots,), 0)
    page_of = lambda i: pages_ref[b, jnp.minimum(i // tiles_of_page, table_size - 1)]

    def load(i, page):
        live_s = (slots_of(i) <= last) & (page >= 0) & (page < num_pages)
        place = jnp.clip(page, 0, num_pages - 1), i % tiles_of_page * slots, live_s
        return latent.load(*place), rope.load(*place)

    def visit(i, carry):
        softmax, page, tile = carry
        ahead = load(i + 1, page) if config.prefetch else ()
        latent_tile, rope_tile = tile if config.prefetch else load(i, page)
        values = latent.planes(latent_tile)
        keys = values + rope.planes(rope_tile)
        score_ns = sum(_dot(q, key, transposed=True) for q, key in zip(q_planes, keys, strict=True))
        seen_ns = slots_of(i)[None] <= position_n[:, None]
        softmax = _fold(
            softmax, jnp.where(seen_ns, score_ns * (sm_scale * math.log2(math.e)), -jnp.inf), values
        )
        return softmax, page_of(i + lead + 1), ahead

    m_n, l_n = jnp.full((config.pairs,), _NOTHING, jnp.float32), jnp.zeros((config.pairs,), jnp.float32)
    softmax = m_n, l_n, [jnp.zeros((config.pairs, columns.size), jnp.float32) for columns in latent.columns]
    # The number of a page is read a tile early: Triton would count a load that waits for it as a stage.
    first = load(start, page_of(start)) if config.prefetch else ()
    carry = softmax, page_of(start + lead), first
    (m_n, l_n, sums), *_ = jax.lax.fori_loop(start, stop, visit, carry)
    l_n = jnp.where(l_n == 0, 1.0, l_n)  # pairs that see nothing: zeros
    for columns, sum_np in zip(latent.columns, sums, strict=True):
        outs[0][b, split, pairs, columns] = (sum_np / l_n[:, None]).astype(outs[0].dtype)
    if config.splits > 1:
        outs[1][b, split, pairs] = m_n + jnp.log2(l_n)


def _fold(softmax, score_ns, values):
    """Adds planes of values, weighted by 2 to the power of their scores, to a running softmax."""
    m_n, l_n, sums = softmax
    new_m_n = jnp.maximum(m_n, score_ns.max(axis=1))  # at least _NOTHING, so what is not seen weighs 0
    weight_ns = jnp.exp2(score_ns - new_m_n[:, None])
    shrink_n = jnp.exp2(m_n - new_m_n)
    weigh = lambda value: _dot(weight_ns.astype(value.dtype), value)
    sums = [sum_np * shrink_n[:, None] + weigh(value) for sum_np, value in zip(sums, values, strict=True)]
    return new_m_n, l_n * shrink_n + weight_ns.sum(axis=1), sums


def _dot(a, b, transposed=False):
    precision = "highest" if a.dtype == jnp.float32 else "default"
    contracted = ((1,), (1 if transposed else 0,))
    return jax.lax.dot_general(
        a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _call(q, q_rope, latent, rope, pages, positions, *, latent_type, rope_type, sm_scale, config, interpret):
    B, T, N, R = q.shape
    num_pairs = pl.cdiv(T * N, config.pairs) * config.pairs
    pad = lambda array, value: jnp.pad(
        array, ((0, 0), (0, num_pairs - T * N), *[(0, 0)] * (array.ndim - 2)), constant_values=value
    )
    in_pairs = lambda part, name: pad(
        part.reshape(B, T * N, -1).astype(cache_tiles.TYPES[name].product_dtype), 0
    )
    latent, rope = cache_tiles.operands(latent, latent_type), cache_tiles.operands(rope, rope_type)
    ends = len(latent), len(latent) + len(rope)

    def body(q_ref, q_rope_ref, position_ref, pages_ref, *refs):
        latent_rows = cache_tiles.Rows(refs[: ends[0]], latent_type, R)
        rope_rows = cache_tiles.Rows(refs[ends[0] : ends[1]], rope_type, q_rope.shape[-1])
        slots = min(config.slots, _largest_power(latent[0].shape[1]))
        settings = dict(sm_scale=sm_scale, slots=slots, config=config)
        queries, outs = (q_ref, q_rope_ref), refs[ends[1] :]
        _body(queries, position_ref, pages_ref, latent_rows, rope_rows, outs, **settings)

    found = (B, config.splits, num_pairs, R)
    is_split = config.splits > 1
    shapes = [jax.ShapeDtypeStruct(found, jnp.float32 if is_split else q.dtype)]
    shapes += [jax.ShapeDtypeStruct(found[:3], jnp.float32)] if is_split else []
    outs = dispatch.launch(
        body,
        in_pairs(q, latent_type),
        in_pairs(q_rope, rope_type),
        pad(jnp.repeat(positions, N, axis=1), -1),
        pages,
        *latent,
        *rope,
        name=f"flash_mla_decode_{latent_type}",
        grid=(B, num_pairs // config.pairs, config.splits),
        out_shape=shapes,
        config=config,
        interpret=interpret,
    )
    out = merge(*outs).astype(q.dtype) if is_split else outs[0][:, 0]
    return out[:, : T * N].reshape(B, T, N, R)


def merge(found: jax.Array, total: jax.Array) -> jax.Array:
    """Merges what splits of the slots found.

    Args:
      found: f32[B, splits, pairs, R], averages of the values.
      total: f32[B, splits, pairs], base-2 logarithms of the sums of weights that they were taken with.

    Returns:
      f32[B, pairs, R], the average over all slots.
    """
    weight = jnp.exp2(total - jnp.max(total, axis=1, keepdims=True))
    return jnp.sum(found * (weight / jnp.sum(weight, axis=1, keepdims=True))[..., None], axis=1)


def _largest_power(number):
    """Returns the largest power of two that divides `number`."""
    return number & -number


def _default_config(q, latent, pages, latent_type):
    B, T, N, R = q.shape
    sizes = dict(batch=B, pairs=T * N, slots=pages.shape[1] * latent[0].shape[1], latent_type=latent_type)
    found = tuning.measured(Config, "flash_mla_decode", rank=R, **sizes)
    return found or Config.for_shapes(**sizes, shared_memory=dispatch.shared_memory())


def _unsupported(q, q_rope, latent, rope, latent_type, rope_type):
    page_size = latent[0].shape[1]
    if page_size % _LEAST:
        return f"pages must be a multiple of {_LEAST} slots, got {page_size}."
    pools = dict(latent=latent[0], latent_high=latent[1], rope=rope[0], rope_high=rope[1])
    reasons = (
        cache_tiles.unsupported(latent_type, q.shape[-1]),
        cache_tiles.unsupported(rope_type, q_rope.shape[-1]),
        dispatch.unaddressable(**pools),
    )
    return next(filter(None, reasons), None)


# --- 3. cost: what the roofline of the benchmark is drawn from ---------------------------------


def cost(
    *,
    batch: int,
    tokens: int,
    heads: int,
    rank: int,
    rope: int,
    cached_tokens: int,
    latent_type: str,
    rope_type: str,
) -> pl.CostEstimate:
    """FLOPs, bytes and exponentials of one call; `cached_tokens` is the sum over the batch.

    Queries and results are of two bytes.
    """
    widths = (latent_type, rank), (rope_type, rope)
    row_bytes = sum(cache_tiles.TYPES[name].row_bytes(size) for name, size in widths)
    pairs = tokens * heads
    return pl.CostEstimate(
        flops=2 * pairs * cached_tokens * (2 * rank + rope),
        bytes_accessed=cached_tokens * row_bytes + 2 * batch * pairs * (2 * rank + rope),
        transcendentals=pairs * cached_tokens,
    )


# --- 4. public op ------------------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("latent_type", "rope_type", "sm_scale", "implementation", "config")
)
def flash_mla_decode(
    q: jax.Array,
    q_rope: jax.Array,
    latent: Part,
    rope: Part,
    pages: jax.Array,
    positions: jax.Array,
    *,
    latent_type: str,
    rope_type: str,
    sm_scale: float,
    implementation: str | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Attends to a paged latent cache, in latent space (MLA modes 1 to 3 with few tokens).

    The kernel multiplies in the type of the cache, float16 for quantised ones, and sums in float32; so what
    is cached, and the queries, must be within float16 then. A cache that is rotated needs `q` rotated
    likewise, and gives a rotated result.

    Args:
      q: [B, T, N, R] absorbed queries, `W_uk^T q_nope`; R a power of two for the kernel.
      q_rope: [B, T, N, P] rotated query parts; P the same.
      latent: cached latents, four arrays [Z, G, ...] as `cache_tiles` says. Slots that no query of any
        sequence sees may hold anything, NaN included.
      rope: cached rotary parts.
      pages: i32[B, M] pages of each sequence. Slots of a number outside [0, Z) read as zeros.
      positions: i32[B, T], ascending in T. A query sees the slots up to its own position: from -1 none, which
        gives zeros.
      latent_type: cache type of `latent`, a key of `cache_tiles.TYPES`.
      rope_type: cache type of `rope`.
      sm_scale: multiplies the scores; YaRN's squared temperature is the caller's.
      implementation: None (by platform), "reference", "triton" or "interpret".
      config: tile sizes; None for what was measured, or else those of the shapes.

    Returns:
      [B, T, N, R], weighted means of latents, in the dtype of `q`. The caller multiplies by `W_uv`.

    Raises:
      ValueError: for an unknown `implementation`.
      NotImplementedError: if the kernel is asked for and cannot take these shapes.
    """
    config = config or _default_config(q, latent, pages, latent_type)
    settings = dict(latent_type=latent_type, rope_type=rope_type, sm_scale=sm_scale)
    return dispatch.run(
        implementation,
        q,
        q_rope,
        latent,
        rope,
        pages,
        positions,
        unsupported=_unsupported(q, q_rope, latent, rope, latent_type, rope_type),
        kernel=functools.partial(_call, **settings, config=config),
        reference=functools.partial(reference, **settings),
    )
