"""What the GPU benchmark runs: the kernels at sizes of DeepSeek models, what others do there, and bars."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from benchmarks import gpu_peers
from mla_jax import quant
from mla_jax.nn import moe
from pallas_kernels import cache_tiles, flash_mla_decode, flash_mla_prefill, grouped_matmul, weight_tiles

OURS = "kernel"
REFERENCE, EXPANDED, CUDNN = "XLA reference", "expand to f16", "cuDNN"
PAGE_SIZE = 64
RANK, NOPE, ROPE, VALUE = 512, 128, 64, 128  # R, H, P and V of DeepSeek-V2 and V3
COLD_BYTES = 256 << 20  # read before a call meets what an earlier one read: more than the L2 of a GPU
LARGE_CACHE = 256 << 10  # cached tokens from which decoding has a bar
# D, F, E and K of each model.
EXPERTS = {"v2-lite": (2048, 1408, 64, 6), "v3": (7168, 2048, 256, 8)}

_FORMAT_OF_ODD_ROWS = "q8_0"  # as GGUF files have them: 1408 columns are no blocks of 256
_SCALE = (NOPE + ROPE) ** -0.5
_COPY_BARS = {"f16": 0.75, "bf16": 0.75, "q8_0": 0.55, "q4_0": 0.40}
_COMPUTE_BARS = {"f16": 300.0, "bf16": 300.0}
_COMPUTE_BAR_OF_CODES = 230.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A way to compute one case.

    Attributes:
      run: (number of the call, result of the call before, operands) -> result.
      result: shapes and types of the result.
      workspace: bytes that it needs besides operands and results, roughly.
      prepare: operands of the case -> its own, which are not timed.
      first: its operands -> what its first call takes for the result before it; None: zeros.
    """

    run: Callable
    result: Any
    workspace: int = 0
    prepare: Callable = lambda operands: operands
    first: Callable | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """What a case must reach.

    Attributes:
      of: "copy", for a share of its bandwidth, "TFLOP/s", or a way that the kernel must be ahead of.
      least: the share, the speed, or how many times as fast.
    """

    of: str
    least: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes at which ways are compared.

    Attributes:
      part: "decode", "prefill", "experts" or "model".
      sizes: what tells it from the others of its part.
      cost: of one call, whatever the way.
      operands: draws them.
      ways: by name, `OURS` first.
      peers: by library, of other ways with operands of their own, see `gpu_peers`.
      bars: what `OURS` must reach.
    """

    part: str
    sizes: dict
    cost: pl.CostEstimate
    operands: Callable[[], tuple]
    ways: dict[str, Way]
    peers: dict[str, gpu_peers.Peer] = dataclasses.field(default_factory=dict)
    bars: tuple[Bar, ...] = ()


def _nothing(previous):
    """Returns i32 0 that XLA takes for a number of the call before: so it runs one call after the other."""
    leaf = jax.tree.leaves(previous)[0]
    return jnp.isnan(leaf[(0,) * leaf.ndim]).astype(jnp.int32)


def _bytes(*shape, size):
    return math.prod(shape) * size


def fill(key, shape, dtype):
    """Returns random bits, or numbers that are small enough for any of them to scale others."""
    if jnp.issubdtype(dtype, jnp.floating):
        return (jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5) / 128).astype(dtype)
    bits = jax.random.bits(key, shape, jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}"))
    return jax.lax.bitcast_convert_type(bits, dtype)


def _normal(*shapes):
    """Returns bfloat16 arrays of the shapes."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


# --- decode ------------------------------------------------------------------------------------


def decode_cases(
    batches: Sequence[int], contexts: Sequence[int], heads: Sequence[int], types: Sequence[str], **settings
) -> Iterator[Case]:
    """Yields a case for each batch, context, number of heads and type of the cache.

    Args:
      batches: sequences.
      contexts: cached tokens of each.
      heads: query heads.
      types: keys of `cache_tiles.TYPES`, of the latent and the rope part.
      **settings: `implementation` of the kernel, and `cold_bytes` in place of `COLD_BYTES`.
    """
    for sizes in itertools.product(batches, contexts, heads, types):
        yield _decode_case(*sizes, **settings)


def _decode_case(B, S, N, name, *, implementation, cold_bytes=COLD_BYTES):
    cost = flash_mla_decode.cost(
        **dict(batch=B, tokens=1, heads=N, rank=RANK, rope=ROPE, cached_tokens=B * S),
        latent_type=name,
        rope_type=name,
    )
    settings = dict(latent_type=name, rope_type=name, sm_scale=_SCALE)

    def run(index, previous, operands, *, attend):
        *arrays, tables, positions = operands
        pages = tables[index % tables.shape[0]] + _nothing(previous)
        return attend(*arrays, pages, positions)

    def way(attend, workspace=0):
        result = jax.ShapeDtypeStruct((B, 1, N, RANK), jnp.bfloat16)
        return Way(run=functools.partial(run, attend=attend), result=result, workspace=workspace)

    attend = functools.partial(flash_mla_decode.flash_mla_decode, **settings)
    op = lambda chosen: functools.partial(attend, implementation=chosen)
    row, scores = RANK + ROPE, B * N * S
    is_large = B * S >= LARGE_CACHE
    num_sets = max(1, pl.cdiv(cold_bytes, cost.bytes_accessed))
    peers = {}
    bars = [Bar(of=EXPANDED, least=1.0)]
    if name == "bf16":
        peers = gpu_peers.decode_peers(B, S, N, RANK, ROPE, num_sets=num_sets, sm_scale=_SCALE)
        bars.append(Bar(of=gpu_peers.VLLM, least=1.0))
    if is_large and N <= 16 and name in _COPY_BARS:
        bars.append(Bar(of="copy", least=_COPY_BARS[name]))
    if is_large and N >= 128:
        bars.append(Bar(of="TFLOP/s", least=_COMPUTE_BARS.get(name, _COMPUTE_BAR_OF_CODES)))
    return Case(
        part="decode",
        sizes=dict(batch=B, context=S, heads=N, cache=name),
        cost=cost,
        operands=functools.partial(_decode_operands, B, S, N, name, num_sets),
        ways={
            OURS: way(op(implementation)),
            REFERENCE: way(op("reference"), 2 * _bytes(B, S, row, size=4) + 3 * 4 * scores),
            EXPANDED: way(
                functools.partial(_attend_expanded, name=name), _bytes(B, S, row, size=2 + 4) + 10 * scores
            ),
        },
        peers=peers,
        bars=tuple(bars),
    )


def _decode_operands(B, S, N, name, num_sets):
    """Returns queries, a pool, tables of pages for as many calls as `num_sets`, and positions."""
    num_pages = pl.cdiv(S, PAGE_SIZE)
    q, q_rope = _normal((B, 1, N, RANK), (B, 1, N, ROPE))
    Z = num_sets * B * num_pages
    if cache_tiles.TYPES[name].low_bits == 8 and 2**31 < Z * PAGE_SIZE * RANK <= 2**32:
        Z = 2**32 // (PAGE_SIZE * RANK) + 1  # between these sizes the kernel would refuse the pool
    keys = jax.random.split(jax.random.key(1))
    latent, rope = (_part(keys[i], (Z, PAGE_SIZE, width), name) for i, width in enumerate((RANK, ROPE)))
    tables = _shuffled(Z)[: num_sets * B * num_pages].reshape(num_sets, B, num_pages)
    return q, q_rope, latent, rope, tables, jnp.full((B, 1), S - 1, jnp.int32)


def _shuffled(count):
    return jnp.asarray(np.random.default_rng(0).permutation(count), jnp.int32)


def _part(key, shape, name):
    """Returns random rows of a type of cache, as `cache_tiles` lays them out."""
    kind, (*lead, size) = cache_tiles.TYPES[name], shape
    keys, none = jax.random.split(key, 4), jnp.zeros((0,), jnp.uint8)
    draw = lambda i, width, dtype: fill(keys[i], (*lead, width), dtype)
    if kind.scale_dtype is None:
        dtype = jnp.float8_e4m3fn if kind.low_bits == 8 else kind.product_dtype
        return draw(0, size, dtype), none, none, none
    blocks = size // (kind.block or size)
    return (
        draw(0, size * kind.low_bits // 8, jnp.int8 if kind.low_bits == 8 else jnp.uint8),
        draw(1, size * kind.high_bits // 8, jnp.uint8) if kind.high_bits else none,
        draw(2, blocks, kind.scale_dtype),
        draw(3, blocks, kind.scale_dtype) if kind.has_offset else none,
    )


def _attend_expanded(q, q_rope, latent, rope, pages, positions, *, name):
    """Writes the whole cache to memory as float16, then attends to that: what ik_llama.cpp does on a GPU."""
    gather = lambda array: jnp.take(array, pages, axis=0, mode="clip") if array.size else array

    def rows(part):
        decoded = cache_tiles.decode(tuple(map(gather, part)), name)
        return decoded.reshape(pages.shape[0], -1, decoded.shape[-1]).astype(jnp.float16)

    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    key_BSC = jax.lax.optimization_barrier(jnp.concatenate([rows(latent), rows(rope)], axis=-1))
    q_BNC = jnp.concatenate([q, q_rope], axis=-1)[:, 0].astype(jnp.float16)
    seen_BS = jnp.arange(key_BSC.shape[1], dtype=jnp.int32)[None] <= positions
    score_BNS = einsum("BNC,BSC->BNS", q_BNC, key_BSC) * _SCALE
    prob_BNS = jax.nn.softmax(jnp.where(seen_BS[:, None], score_BNS, -jnp.inf), axis=-1)
    o_BNR = einsum("BNS,BSR->BNR", prob_BNS.astype(jnp.float16), key_BSC[..., :RANK])
    return o_BNR[:, None].astype(q.dtype)


# --- prefill -----------------------------------------------------------------------------------


def prefill_cases(queries: Sequence[int], heads: Sequence[int], *, implementation: str) -> Iterator[Case]:
    """Yields a case for each length of a prompt and number of heads."""
    for T, N in itertools.product(queries, heads):
        yield _prefill_case(T, N, implementation)


def _prefill_case(T, N, implementation):
    cost = flash_mla_prefill.cost(batch=1, queries=T, history=0, heads=N, widths=(NOPE, ROPE, VALUE))
    result = (
        jax.ShapeDtypeStruct((1, T, N, VALUE), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, T, N), jnp.float32),
    )

    def run(index, previous, operands, *, chosen):
        start, length = (jnp.full((1,), value, jnp.int32) + _nothing(previous) for value in (0, T))
        settings = dict(sm_scale=_SCALE, num_queries=length, implementation=chosen)
        return flash_mla_prefill.flash_mla_prefill(*operands, start, length, **settings)

    rows = _bytes(T, N, 2 * (NOPE + ROPE) + VALUE, size=4)
    joined = jax.ShapeDtypeStruct((1, T, N, NOPE + ROPE), jnp.bfloat16)
    return Case(
        part="prefill",
        sizes=dict(queries=T, heads=N),
        cost=cost,
        operands=lambda: tuple(
            _normal((1, T, N, NOPE), (1, T, N, ROPE), (1, T, N, NOPE), (1, T, ROPE), (1, T, N, VALUE))
        ),
        ways={
            OURS: Way(run=functools.partial(run, chosen=implementation), result=result),
            REFERENCE: Way(
                run=functools.partial(run, chosen="reference"),
                result=result,
                workspace=rows + 3 * _bytes(N, T, T, size=4),
            ),
            CUDNN: Way(
                run=_attend_by_cudnn,
                result=joined,
                workspace=4 * _bytes(T, N, NOPE + ROPE, size=2),
                prepare=_joined,
                first=lambda operands: operands[0],
            ),
        },
        peers=gpu_peers.prefill_peers(T, N, NOPE + ROPE, VALUE, sm_scale=_SCALE),
        bars=(Bar(of="TFLOP/s", least=350.0),),
    )


def _joined(operands):
    """Returns queries, keys and values of one width: keys joined, values filled up with zeros."""
    q, q_rope, k, k_rope, v = operands
    k_rope = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
    join = lambda *parts: jnp.concatenate(parts, axis=-1)
    return join(q, q_rope), join(k, k_rope), jnp.pad(v, ((0, 0),) * 3 + ((0, NOPE + ROPE - VALUE),))


def _attend_by_cudnn(index, previous, operands):
    """Takes the result of the call before, which has their shape, for queries: so none can be left out."""
    _, k, v = operands
    return jax.nn.dot_product_attention(previous, k, v, scale=_SCALE, is_causal=True, implementation="cudnn")


# --- experts -----------------------------------------------------------------------------------


def expert_cases(
    shapes: dict[str, tuple[int, int, int, int]],
    tokens: Sequence[int],
    formats: Sequence[str],
    *,
    implementation: str,
) -> Iterator[Case]:
    """Yields a case for each model, number of tokens and format: gate, up and down of their experts.

    Args:
      shapes: name -> D, F, E and K.
      tokens: that go through the layer at once; 1 decodes.
      formats: of all three weights; of gate and up alone where the rows of down are no whole blocks.
      implementation: of the kernel.
    """
    for (name, shape), T, format in itertools.product(shapes.items(), tokens, formats):
        yield _expert_case(name, shape, T, format, implementation)


def _expert_case(model, shape, T, format, implementation):
    D, F, E, K = shape
    expert_CY, M, num_used = _tiles(T, E, K)
    cost = functools.partial(grouped_matmul.cost, tokens=T * K, num_experts=num_used)
    has_blocks = F % weight_tiles.layout(format).block_size == 0
    down_format = format if has_blocks else _FORMAT_OF_ODD_ROWS
    gated = cost(rows=F, columns=D, num_weights=2, format=format)
    down = cost(rows=D, columns=F, format=down_format)
    total = pl.CostEstimate(
        flops=gated.flops + down.flops,
        bytes_accessed=gated.bytes_accessed + down.bytes_accessed,
        transcendentals=gated.transcendentals + down.transcendentals,
    )

    def run(index, previous, operands, *, chosen):
        x, gate, up, down = operands
        experts = expert_CY[index % expert_CY.shape[0]] + _nothing(previous)
        middle = grouped_matmul.grouped_gated(
            x, gate, up, experts, formats=(format, format), implementation=chosen
        )
        return grouped_matmul.grouped_matmul(middle, down, experts, format=down_format, implementation=chosen)

    Y = expert_CY.shape[1]
    result = jax.ShapeDtypeStruct((Y, M, D), jnp.float32)
    way = lambda chosen, workspace=0: Way(
        run=functools.partial(run, chosen=chosen), result=result, workspace=workspace
    )
    return Case(
        part="experts",
        sizes=dict(model=model, tokens=T, format=format, down=down_format),
        cost=total,
        operands=functools.partial(_expert_operands, (Y, M, D), (E, F, D), format, down_format),
        ways={OURS: way(implementation), REFERENCE: way("reference", 4 * _bytes(F, D, size=4))},
        bars=(Bar(of="copy", least=0.6),) if T == 1 else (),
    )


def _tiles(T, E, K):
    """Returns the experts of tiles i32[C, Y] of C calls, the rows M of a tile and the experts in use."""
    if T == 1:  # no two calls in a row share an expert, so none finds its weights in the L2
        return _shuffled(E)[: E // K * K].reshape(-1, K), 1, K
    draw = lambda key: jax.random.choice(key, E, (K,), replace=False).astype(jnp.int32)
    ids_TK = jax.vmap(draw)(jax.random.split(jax.random.key(2), T))
    M = moe.tile_size(T * K, E)
    expert_Y, _, num_needed = moe.assign_tiles(ids_TK, E, M)
    num_needed = int(num_needed)
    return expert_Y[None, :num_needed], M, len(set(expert_Y[:num_needed].tolist()))


def _expert_operands(x_shape, weight_shape, format, down_format):
    E, F, D = weight_shape
    keys = jax.random.split(jax.random.key(3), 4)
    x = jax.random.normal(keys[0], x_shape, jnp.float32)
    weights = ((E, F, D), format), ((E, F, D), format), ((E, D, F), down_format)
    return x, *(_weight(key, *weight) for key, weight in zip(keys[1:], weights, strict=True))


def _weight(key, shape, format):
    """Returns random numbers in place of the arrays that a weight is taken apart into."""
    *lead, size = shape
    kind = weight_tiles.layout(format)
    blocks = jax.ShapeDtypeStruct(
        (*lead, size // kind.block_size, quant.FORMATS[format].block_bytes), jnp.uint8
    )
    arrays = jax.eval_shape(functools.partial(weight_tiles.repack, header=None, format=format), blocks)
    keys = jax.random.split(key, len(arrays))
    return tuple(fill(key, array.shape, array.dtype) for key, array in zip(keys, arrays, strict=True))
