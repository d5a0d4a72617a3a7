"""The bodies of `grouped_matmul`: a row of x in registers, or tiles of rows by tensor cores.

Letters as in `grouped_matmul`.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, tuning, weight_tiles

LEAST = 16  # rows, columns and depth of a product of tensor cores

_WIDE_TILES = 140 << 10  # bytes of shared memory that tiles of 128 by 128 take in flight, at most on a Hopper


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunables, all powers of two. They change the speed, never the result beyond the order of sums.

    Attributes:
      tokens: rows of x per program; of no effect where a tile has one.
      rows: rows of the weight per program.
      words: columns of each plane per step.
      num_warps: warps per program.
      num_stages: buffers of a pipelined loop.
    """

    tokens: int = 1
    rows: int = 16
    words: int = 64
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self)[:4]:
            value = getattr(self, field.name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two, got {value}.")

    @classmethod
    def for_shape(cls, tokens: int, format: str, num_weights: int, shared_memory: int) -> "Config":
        """Returns tile sizes for `tokens` rows of x in a tile, against `num_weights` weights at once.

        Matrix-vector products want many programs and 16-byte loads in flight; the others 128 columns a step,
        accumulators that fit the registers of their warps and buffers that fit `shared_memory` bytes.
        """
        planes = weight_tiles.layout(format).planes
        if tokens == 1:
            return cls(words=512 // planes)
        tokens = min(128, _largest_power_dividing(padded(tokens)))
        rows = (128 if tokens >= 64 else 64) // num_weights
        words = min(64, 128 // planes)
        wide = tokens * rows * num_weights >= 128 * 128
        if wide and shared_memory < _WIDE_TILES:
            rows //= 2
        return cls(tokens=tokens, rows=rows, words=words, num_warps=8 if wide else 4, num_stages=3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a body knows when it is compiled.

    Attributes:
      kind: layout of the weights.
      num_arrays: arrays of a weight.
      sources: for each weight, the place of its first array among the refs and its first row.
      num_experts, num_rows, num_words: E, F of the result, W.
      operand: type of both operands of a product of tensor cores.
      config: tile sizes that fit the shapes.
    """

    kind: weight_tiles.Layout
    num_arrays: int
    sources: tuple[tuple[int, int], ...]
    num_experts: int
    num_rows: int
    num_words: int
    operand: jnp.dtype
    config: Config

    @property
    def num_steps(self) -> int:
        """Steps over the columns."""
        return pl.cdiv(self.num_words, self.config.words)

    def tiles(self, refs: Sequence, expert, first, start, dtype) -> Iterator[weight_tiles.Tile]:
        """Loads the tile of each weight: rows from `first`, words from `start`."""
        *refs, table = refs if self.kind.table is not None else (*refs, None)
        for place, first_row in self.sources:
            arrays = refs[place : place + self.num_arrays]
            rows = pl.ds(first_row + first, self.config.rows)
            spans = self.kind.spans(start, self.config.words)
            parts = [ref[expert, rows, pl.ds(*span)] for ref, span in zip(arrays, spans, strict=True)]
            yield self.kind.tile(parts, table, dtype)


def _start(index, tile: int, size: int):
    """Returns where tile `index` begins. The last one ends at `size`, so that it may overlap its neighbour.

    It is a multiple of a constant for the compiler to see, which loads 16 bytes at once if that is aligned.
    """
    if size % tile == 0:
        return index * tile
    unit = min(tile, _largest_power_dividing(size))
    return jnp.minimum(index * (tile // unit), (size - tile) // unit) * unit


def _expert_and_steps(expert, plan):
    """Returns an expert that exists, and no steps for a tile of none: its sums stay 0."""
    is_one = (expert >= 0) & (expert < plan.num_experts)
    num_steps = jnp.where(is_one, jnp.int32(plan.num_steps), 0)  # Pallas makes two plain numbers booleans
    return jnp.where(is_one, expert, 0), num_steps


def _without_overlap(x, step, start, plan):
    """Zeroes the columns of x [..., words] that the step before has already summed."""
    words = plan.config.words
    if plan.num_words % words == 0:
        return x
    column = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(column >= step * words, x, jnp.zeros_like(x))


def combined(outs):
    """Returns the product with one weight, or `silu(gate) * up` of those with two."""
    if len(outs) == 1:
        return outs[0]
    gate, up = outs
    return jax.nn.silu(gate) * up


def vector_body(expert_ref, x_ref, *refs, plan):
    """Grid (Y, F / f): one token, f rows of its expert."""
    *refs, o_ref = refs
    config, kind = plan.config, plan.kind
    y, first = pl.program_id(0), _start(pl.program_id(1), config.rows, plan.num_rows)
    expert, num_steps = _expert_and_steps(expert_ref[y], plan)
    group = math.gcd(config.words, kind.words_of_group)

    def add_columns(step, sums):
        start = _start(step, config.words, plan.num_words)
        x_Gg = []
        for n in range(kind.planes):
            x_w = x_ref[y, 0, n, pl.ds(start, config.words)].astype(jnp.float32)
            x_Gg.append(_without_overlap(x_w, step, start, plan).reshape(1, -1, group))
        tiles = plan.tiles(refs, expert, first, start, jnp.float32)
        return tuple(sum_fG + _dot_in_registers(x_Gg, tile) for sum_fG, tile in zip(sums, tiles, strict=True))

    zeros = jnp.zeros((config.rows, config.words // group), jnp.float32)
    sums = jax.lax.fori_loop(0, num_steps, add_columns, (zeros,) * len(plan.sources))
    o_ref[y, 0, pl.ds(first, config.rows)] = combined([sum_fG.sum(axis=1) for sum_fG in sums])


def _dot_in_registers(x_Gg, tile):
    """Returns [f, G]: the product with each row, summed over planes and the words of a group."""
    products = sum(tile.values(n) * x_1Gg for n, x_1Gg in enumerate(x_Gg))
    out_fG = products.sum(axis=2)
    if tile.scale is not None:
        out_fG *= tile.scale
    if tile.offset is not None:
        out_fG += tile.offset * sum(x_Gg).sum(axis=2)
    return out_fG


def matrix_body(expert_ref, x_ref, scale_ref, *refs, plan):
    """Grid (Y * M / m, F / f): m tokens of a tile, f rows of its expert.

    Its first axis runs fastest: neighbouring tiles of one expert read the same rows at the same time.
    """
    *refs, o_ref = refs
    config, kind = plan.config, plan.kind
    tiles_of_y = x_ref.shape[1] // config.tokens
    y, tokens = pl.program_id(0) // tiles_of_y, pl.program_id(0) % tiles_of_y
    tokens = pl.ds(tokens * config.tokens, config.tokens)
    first = _start(pl.program_id(1), config.rows, plan.num_rows)
    expert, num_steps = _expert_and_steps(expert_ref[y], plan)
    dtype = plan.operand if kind.rounds_once else jnp.float32

    def add_columns(step, sums):
        start = _start(step, config.words, plan.num_words)
        tiles, sums = list(plan.tiles(refs, expert, first, start, dtype)), list(sums)
        for n in range(kind.planes):
            x_mw = x_ref[y, tokens, n, pl.ds(start, config.words)]
            x_mw = _without_overlap(x_mw, step, start, plan)
            for i, tile in enumerate(tiles):
                sums[i] += _dot(x_mw, tile.plane(n).astype(plan.operand))
        return tuple(sums)

    zeros = jnp.zeros((config.tokens, config.rows), jnp.float32)
    sums = jax.lax.fori_loop(0, num_steps, add_columns, (zeros,) * len(plan.sources))
    scale_m1 = scale_ref[y, tokens][:, None]
    o_ref[y, tokens, pl.ds(first, config.rows)] = combined([sum_mf * scale_m1 for sum_mf in sums])


def _dot(x_mw, weight_fw):
    contract_last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_mw, weight_fw, contract_last, preferred_element_type=jnp.float32)


def plan_for(num_tokens, weights, format, is_gated, config):
    """Returns the plan, with tile sizes cut to what the shapes have."""
    kind = weight_tiles.layout(format)
    num_experts, num_rows, num_words = weights[0][0].shape
    sources = [(i * len(weights[0]), 0) for i in range(len(weights))]
    if is_gated and len(weights) == 1:
        num_rows //= 2
        sources.append((0, num_rows))
    sizes = dict(tokens=num_tokens, rows=num_rows, columns=num_words * kind.planes, format=format)
    config = config or tuning.measured(Config, "grouped_matmul", **sizes, weights=len(sources))
    config = config or Config.for_shape(num_tokens, format, len(sources), dispatch.shared_memory())
    least, tokens = (1, 1) if num_tokens == 1 else (LEAST, _largest_power_dividing(padded(num_tokens)))
    config = dataclasses.replace(
        config,
        tokens=min(max(config.tokens, least), tokens),
        rows=min(max(config.rows, least), _power_up_to(num_rows)),
        words=min(max(config.words, least, kind.words_of_group), _power_up_to(num_words)),
    )
    return Plan(
        kind=kind,
        num_arrays=len(weights[0]),
        sources=tuple(sources),
        num_experts=num_experts,
        num_rows=num_rows,
        num_words=num_words,
        operand=jnp.bfloat16 if weights[0][0].dtype == jnp.bfloat16 else jnp.float16,
        config=config,
    )


def padded(num_tokens: int) -> int:
    """Returns the tokens that a tile is filled up to for tensor cores."""
    return pl.cdiv(num_tokens, LEAST) * LEAST


def _largest_power_dividing(size: int) -> int:
    return size & -size


def _power_up_to(size: int) -> int:
    return 1 << (size.bit_length() - 1)
