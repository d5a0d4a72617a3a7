"""Writes new tokens to the paged latent cache: norm, rotary position, Hadamard rotation, quantisation, store.

Letters as in `mla_jax.nn`, and X = B * T new tokens. A part of the cache is laid out as in `cache_tiles`; how
numbers become its codes is an argument.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import cache_tiles, dispatch, tuning
from pallas_kernels.cache_tiles import Part

# From float32[..., blocks, block] to whole codes of that shape, and scale and offset (or None)
# float32[..., blocks], by operations that lower in kernels. None for a type without codes.
Quantiser = Callable | None

_LARGEST = 2.0**24  # no float16 scale reaches further, and its square times itself is finite in float32


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunables. They change the speed, never the result."""

    num_warps: int = 2
    num_stages: int = 1  # nothing is loaded in a loop

    @classmethod
    def for_rank(cls, rank: int) -> "Config":
        """Returns a warp per 256 numbers of a row: few, as every step of a rotation meets in them."""
        return cls(num_warps=min(max(rank // 256, 1), 8))


@dataclasses.dataclass(frozen=True)
class _Store:
    """How a part is kept: its type, the dtype of plain numbers, the runs that are rotated, the quantiser."""

    name: str
    dtype: jnp.dtype
    rotation: int | None
    quantise: Quantiser


# --- 1. reference: defines the result ---------------------------------------------------------


def reference(latent, rope, norm, cos, sin, pages, slots, latent_pool, rope_pool, **settings):
    """Makes all rows at once and scatters them."""
    rows = _rows(latent, rope, norm, cos, sin, **settings)
    Z, G, _ = latent_pool[0].shape
    is_slot = (slots >= 0) & (slots < pages.shape[1] * G)
    slots = jnp.where(is_slot, slots, 0)
    page = jnp.take_along_axis(pages, slots // G, axis=1)
    page = jnp.where(is_slot & (page >= 0), page, Z)

    def write(part, new):
        return part if new is None else part.at[page, slots % G].set(new, mode="drop")

    return tuple(tuple(map(write, *pair)) for pair in zip((latent_pool, rope_pool), rows, strict=True))


def _rows(latent, rope, norm, cos, sin, *, epsilon, latent_store, rope_store):
    """Returns what is kept of [..., R] and [..., P]: four arrays each, None for those that a type lacks."""
    square = jnp.mean(latent * latent, axis=-1, keepdims=True)
    latent = latent * jax.lax.rsqrt(square + epsilon) * jnp.broadcast_to(norm, latent.shape)
    even, odd = jnp.unstack(rope.reshape(*cos.shape, 2), axis=-1)
    rope = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(rope.shape)
    return _encode(latent, latent_store), _encode(rope, rope_store)


def _hadamard(x, size):
    """Multiplies each run of `size` numbers by the Hadamard matrix over sqrt(size), in natural order."""
    if size is None:
        return x
    shape, distance = x.shape, 1
    while distance < size:
        x = x.reshape(*shape[:-1], -1, 2, distance)
        is_upper = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2) == 0
        total = jnp.sum(x, axis=-2, keepdims=True)  # values cannot be sliced in a kernel, but summed
        difference = jnp.sum(jnp.where(is_upper, x, -x), axis=-2, keepdims=True)
        x = jnp.where(is_upper, total, difference)
        distance *= 2
    scale = np.float32(1) / np.float32(math.sqrt(size))
    return x.reshape(shape) * float(scale)


def _encode(x, store):
    x, kind = _hadamard(x, store.rotation), cache_tiles.TYPES[store.name]
    if kind.scale_dtype is None:
        return _rounded(x, store.dtype), None, None, None
    size, block = x.shape[-1], kind.block or x.shape[-1]
    blocks = _bounded(x, _LARGEST).reshape(*x.shape[:-1], size // block, block)
    codes, scale, offset = store.quantise(blocks)
    scale = jnp.where(jnp.isnan(jnp.sum(blocks, axis=-1)), jnp.nan, scale)  # a maximum may skip a NaN
    scale = _rounded(scale, kind.scale_dtype)
    offset = None if offset is None else _rounded(offset, kind.scale_dtype)
    codes = codes.astype(jnp.int32).reshape(x.shape)
    if kind.low_bits == 8:
        return codes.astype(jnp.int8), None, scale, offset
    high = _planes(codes >> 4, kind.high_bits) if kind.high_bits else None
    return _planes(codes & 15, 4), high, scale, offset


def _planes(numbers, bits):
    """Packs int32[..., n] in planes: byte j of uint8[..., n * bits / 8] has numbers j, j + its width, ..."""
    count = 8 // bits
    places = numbers.reshape(*numbers.shape[:-1], count, numbers.shape[-1] // count)
    plane = jax.lax.broadcasted_iota(jnp.int32, places.shape, places.ndim - 2)
    return jnp.sum(places << plane * bits, axis=-2).astype(jnp.uint8)


def _rounded(x, dtype):
    if dtype == jnp.float8_e4m3fn:
        return _float8(x)
    return (_bounded(x, float(jnp.finfo(dtype).max)) if dtype == jnp.float16 else x).astype(dtype)


def _bounded(x, largest):
    """Clips but for NaN, which the GPU's minimum and maximum drop."""
    return jnp.where(jnp.isnan(x), x, jnp.clip(x, -largest, largest))


def _float8(x):
    """Rounds to float8_e4m3fn, ties to even, and saturates: GPUs before compute capability 8.9 cannot."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    is_odd = (magnitude >> 20) & 1
    normal = (magnitude + 0x7FFFF + is_odd >> 20) - (120 << 3)  # the exponent counts from -7, not from -127
    counted = jax.lax.bitcast_convert_type(jnp.abs(x) + 2.0**14, jnp.int32)  # in steps of 2**-9
    code = jnp.where(magnitude < (121 << 23), counted - 0x46800000, normal)  # which is 2**14
    code = jnp.minimum(code, 0x7E)
    code = jnp.where(jnp.isnan(x), 0x7F, code) | ((bits >> 24) & 0x80)
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.float8_e4m3fn)


# --- 2. kernel: the same result, one token at a time -------------------------------------------


def _body(latent_ref, rope_ref, norm_ref, cos_ref, sin_ref, pages_ref, slots_ref, *refs, **settings):
    """Grid (X,): one token. `refs` are the parts of the pools twice, as operands and as results."""
    part_refs = refs[len(refs) // 2 :]
    Z, G, _ = part_refs[0].shape
    M, T = pages_ref.shape[1], slots_ref.shape[1]
    b, t = _divide(pl.program_id(0), T)
    slot = slots_ref[b, t]
    is_slot = (slot >= 0) & (slot < M * G)
    column, place = _divide(jnp.where(is_slot, slot, 0), G)
    page = pages_ref[b, column]

    @pl.when(is_slot & (page >= 0) & (page < Z))
    def _():
        token = latent_ref[b, t, :], rope_ref[b, t, :], norm_ref[...], cos_ref[b, t, :], sin_ref[b, t, :]
        rows = jax.tree.leaves(_rows(*token, **settings))  # leaves out None
        for part_ref, row in zip(part_refs, rows, strict=True):
            part_ref[page, place, :] = row


def _divide(x, divisor):
    divisor = np.int32(divisor)
    return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)


def _call(*args, config, interpret, **settings):
    *token, latent_pool, rope_pool = args
    rank, name = token[0].shape[-1], settings["latent_store"].name
    sizes = dict(tokens=token[-1].size, rank=rank, latent_type=name)
    config = config or tuning.measured(Config, "latent_append", **sizes) or Config.for_rank(rank)
    parts = [part for part in (*latent_pool, *rope_pool) if part.size]
    written = iter(
        dispatch.launch(
            functools.partial(_body, **settings),
            *token,
            *parts,
            name="latent_append",
            grid=(token[-1].size,),
            out_shape=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts],
            config=config,
            interpret=interpret,
            aliases={len(token) + i: i for i in range(len(parts))},
        )
    )
    return tuple(
        tuple(next(written) if part.size else part for part in pool) for pool in (latent_pool, rope_pool)
    )


def _unsupported(latent, rope, latent_pool, rope_pool):
    for name, size in dict(latent=latent.shape[-1], rope=rope.shape[-1]).items():
        if size & (size - 1):
            return f"rows of {name} must be a power of two wide for the kernel, got {size}."
    return dispatch.unaddressable(
        latent_low=latent_pool[0], latent_high=latent_pool[1], rope_low=rope_pool[0], rope_high=rope_pool[1]
    )


# --- 3. cost: what the roofline of the benchmark is drawn from ---------------------------------


def cost(*, tokens: int, rank: int, rope: int, row_bytes: int) -> pl.CostEstimate:
    """FLOPs, bytes and square roots of one call; `row_bytes` is what the cache keeps of a token.

    Quantising is counted as 8 operations a number, the rotation is not: it is a part of few types.
    """
    return pl.CostEstimate(
        flops=tokens * (4 * rank + 3 * rope + 8 * (rank + rope)),
        bytes_accessed=tokens * (4 * rank + 8 * rope + row_bytes) + 4 * rank,
        transcendentals=tokens,
    )


# --- 4. public op ------------------------------------------------------------------------------


@functools.partial(
    jax.jit,
    static_argnames=(
        "latent_type",
        "rope_type",
        "epsilon",
        "latent_rotation",
        "rope_rotation",
        "quantisers",
        "implementation",
        "config",
    ),
)
def latent_append(
    latent,
    rope,
    norm,
    cos,
    sin,
    pages,
    slots,
    latent_pool: Part,
    rope_pool: Part,
    *,
    latent_type: str,
    rope_type: str,
    epsilon: float,
    quantisers: tuple[Quantiser, Quantiser] = (None, None),
    latent_rotation: int | None = None,
    rope_rotation: int | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> tuple[Part, Part]:
    """Writes what the down-projection gives of new tokens to their places in the cache.

    Args:
      latent: f32[B, T, R], not normalised yet.
      rope: f32[B, T, P] shared key part, not rotated yet.
      norm: f32[R] weight of the RMSNorm.
      cos: f32[B, T, P / 2] cosines that the pairs (2i, 2i + 1) of `rope` are rotated by.
      sin: f32[B, T, P / 2] sines.
      pages: i32[B, M] page ids. A token whose page is not in [0, Z) is dropped.
      slots: i32[B, T]; slot s lies in page pages[b, s // G] at place s % G. Slots outside [0, M * G) drop
        their token. No two tokens may have one place.
      latent_pool: part of the cache, R wide; free places may hold anything.
      rope_pool: the same, P wide.
      latent_type: key of `cache_tiles.TYPES`.
      rope_type: the same.
      epsilon: of the RMSNorm.
      latent_rotation: runs of this many numbers are Hadamard-rotated first; a power of two that divides R.
      rope_rotation: the same, after the rotation by position.
      quantisers: of latent and rope; they get numbers of at most 2**24.
      implementation: None (by platform), "reference", "triton" or "interpret".
      config: tunables; None takes what was measured, or else those for R.

    Returns:
      Both pools, written in place where they are donated. Numbers beyond the range of float16 or float8 and
      scales beyond float16 saturate; NaN stays NaN in all numbers that depend on it, and in no other row.

    Raises:
      ValueError: for an unknown `implementation`.
      NotImplementedError: if the kernel is asked for and cannot take these shapes.
    """
    latent_store = _Store(latent_type, latent_pool[0].dtype, latent_rotation, quantisers[0])
    rope_store = _Store(rope_type, rope_pool[0].dtype, rope_rotation, quantisers[1])
    settings = dict(epsilon=epsilon, latent_store=latent_store, rope_store=rope_store)
    return dispatch.run(
        implementation,
        *(latent, rope, norm, cos, sin, pages, slots, latent_pool, rope_pool),
        unsupported=_unsupported(latent, rope, latent_pool, rope_pool),
        kernel=functools.partial(_call, config=config, **settings),
        reference=functools.partial(reference, **settings),
    )
