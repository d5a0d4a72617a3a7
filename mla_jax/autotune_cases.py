"""What the GPU kernels compute for a model, operation by operation, as `autotune` measures it."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.layout import FORMAT_NAMES, PLAIN_TYPES, expected_shapes
from checkpoints_tools.model_file import check_model
from mla_jax import presets, quant
from mla_jax.cache import codec
from mla_jax.cache.rows import PAGE_SIZE, SLOT_MULTIPLE
from mla_jax.config import MLAConfig, ModelConfig, RunConfig
from mla_jax.nn import mla_on_gpu, moe
from pallas_kernels import (
    dispatch,
    flash_mla_decode,
    flash_mla_prefill,
    grouped_matmul,
    grouped_matmul_bodies,
    latent_append,
    tuning,
    weight_tiles,
)

_COLD_BYTES = 256 << 20  # calls in turn read as much before they come back: more than GPUs keep on chip
_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 1024, 65536
_MOST_TILES = 32  # of a prompt's tokens: enough to fill a GPU
_NOT_MULTIPLIED = ("token_embd", "attn_kv_b", "attn_k_b", "attn_v_b", "ffn_gate_inp")  # by these kernels
_PLAIN = tuple(FORMAT_NAMES[kind] for kind in PLAIN_TYPES)

_WARPS, _STAGES = (2, 4, 8), (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
      op: name of the operation.
      sizes: what `tuning.key` is made of.
      heuristic: the Config without measurements.
      choices: field of the Config -> values to try, in this order.
      operands: returns the operands; the first are carried from call to call, the others stay.
      step: takes a Config, what is carried and what stays, and calls the operation; returns what is carried.
    """

    op: str
    sizes: Mapping[str, int | str]
    heuristic: Any
    choices: Mapping[str, Sequence]
    operands: Callable[[], tuple]
    step: Callable

    @property
    def key(self) -> str:
        """Name under which the result is kept."""
        return tuning.key(**self.sizes)


def weights_of(model: str | os.PathLike, format: str) -> tuple[ModelConfig, dict[str, tuple]]:
    """Returns the config of a model and, by name, shape and format of each of its tensors.

    Args:
      model: a GGUF file, of which no weight is read, or the name of a preset.
      format: that of a preset's weights.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF.
    """
    if str(model) in presets.PRESETS and not os.path.exists(model):
        config = presets.PRESETS[str(model)]
        return config, {name: (shape, format) for name, shape in expected_shapes(config, ()).items()}
    file = open_gguf(model)
    config, layout = check_model(file)
    format_of = lambda name: FORMAT_NAMES[file.tensors[name].ggml_type]
    return config, {name: (shape, format_of(name)) for name, shape in layout.shapes.items()}


def cases(
    config: ModelConfig,
    weights: Mapping[str, tuple],
    run: RunConfig,
    *,
    ctx_size: int,
    ubatch: int,
    implementation: str = "triton",
) -> list[Case]:
    """Returns what a model computes by kernels when one sequence is read and continued.

    Args:
      config: the model.
      weights: from `weights_of`.
      run: its cache types count.
      ctx_size: longest context.
      ubatch: prompt tokens at a time.
      implementation: that of the operations.
    """
    mla, make = config.mla, dict(implementation=implementation)
    lengths = sorted({min(length, ctx_size) for length in _contexts()})
    found = [_decode_case(mla, run, slots, **make) for slots in lengths]
    found.append(_prefill_case(mla, ubatch, ctx_size, **make))
    found += [_append_case(mla, run, tokens, **make) for tokens in (1, ubatch)]
    found += _product_cases(config, weights, ubatch, **make)
    first = {}
    for case in found:  # routed experts come before the shared ones, which may have the same key
        first.setdefault((case.op, case.key), case)
    return list(first.values())


def _contexts() -> Iterator[int]:
    length = _SHORTEST_CONTEXT
    while length <= _LONGEST_CONTEXT:
        yield length
        length *= 2


def _pool(num_pages, size, name):
    """Returns a part of the cache with numbers of no meaning in it, as kernels take it."""
    shapes = jax.eval_shape(lambda: codec.empty((num_pages, PAGE_SIZE, size), name))
    return codec.parts(jax.tree.map(_fill, shapes))


def _fill(shape):
    """Returns ones, or codes that differ from each other."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.ones(shape.shape, shape.dtype)
    return jax.random.bits(jax.random.key(0), shape.shape, jnp.uint8).astype(shape.dtype)


def _depend(x, result):
    """Returns x for the next call, which must not start before this one has ended."""
    return x + (result.reshape(-1)[0] * 0).astype(x.dtype)


def _decode_case(mla: MLAConfig, run, slots, *, implementation):
    kinds = dict(latent_type=run.cache_type, rope_type=run.rope_type)
    slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
    num_pages, sizes = slots // PAGE_SIZE, dict(batch=1, pairs=mla.num_heads, slots=slots)
    heuristic = flash_mla_decode.Config.for_shapes(
        **sizes, latent_type=run.cache_type, shared_memory=dispatch.shared_memory()
    )

    def operands():
        latent, rope = (_pool(1, size, kind) for size, kind in _widths(mla, run))
        page_bytes = sum(part.nbytes for part in (*latent, *rope))
        copies = max(1, _COLD_BYTES // (page_bytes * num_pages))
        latent, rope = (_pool(copies * num_pages, size, kind) for size, kind in _widths(mla, run))
        pages = jnp.arange(num_pages, dtype=jnp.int32)[None]
        q = jnp.ones((1, 1, mla.num_heads, mla.kv_lora_rank), jnp.float32)
        q_rope = jnp.ones((1, 1, mla.num_heads, mla.qk_rope_head_dim), jnp.float32)
        return (q, pages), (q_rope, latent, rope, jnp.full((1, 1), slots - 1, jnp.int32))

    def step(config, carried, kept):
        (q, pages), (q_rope, latent, rope, positions) = carried, kept
        settings = dict(**kinds, sm_scale=mla.qk_head_dim**-0.5, implementation=implementation, config=config)
        out = flash_mla_decode.flash_mla_decode(q, q_rope, latent, rope, pages, positions, **settings)
        return _depend(q, out), (pages + num_pages) % latent[0].shape[0]

    splits = sorted({max(1, heuristic.splits * share // 4) for share in (1, 2, 4, 8, 16)})
    choices = dict(pairs=(16, 32, 64), slots=(16, 32, 64), prefetch=(False, True))
    choices |= dict(num_warps=_WARPS[1:], num_stages=_STAGES, splits=splits)
    sizes |= dict(rank=mla.kv_lora_rank, latent_type=run.cache_type)
    return Case("flash_mla_decode", sizes, heuristic, choices, operands, step)


def _widths(mla, run):
    return (mla.kv_lora_rank, run.cache_type), (mla.qk_rope_head_dim, run.rope_type)


def _prefill_case(mla: MLAConfig, ubatch, ctx_size, *, implementation):
    N, widths = mla.num_heads, (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim)
    (H, P, V), slots = widths, max(ubatch, min(ctx_size, mla_on_gpu.EXPANDED_SLOTS))
    heuristic = flash_mla_prefill.Config.for_sizes(
        queries=ubatch, widths=widths, itemsize=2, shared_memory=dispatch.shared_memory()
    )

    def operands():
        ones = lambda *shape: jnp.ones((1, *shape), jnp.bfloat16)
        kept = ones(ubatch, N, P), ones(slots, N, H), ones(slots, P), ones(slots, N, V)
        return (ones(ubatch, N, H),), kept

    def step(config, carried, kept):
        (q,), ends = carried, (jnp.full((1,), slots - ubatch, jnp.int32), jnp.full((1,), slots, jnp.int32))
        settings = dict(sm_scale=mla.qk_head_dim**-0.5, implementation=implementation, config=config)
        out, _ = flash_mla_prefill.flash_mla_prefill(q, *kept, *ends, **settings)
        return (_depend(q, out),)

    sizes = dict(queries=ubatch, heads=N, dtype="bfloat16", widths=f"{H}/{P}/{V}")
    choices = dict(block_t=(64, 128), block_s=(32, 64, 128), num_warps=_WARPS[1:], num_stages=_STAGES)
    return Case("flash_mla_prefill", sizes, heuristic, choices, operands, step)


def _append_case(mla: MLAConfig, run, tokens, *, implementation):
    kinds = dict(latent_type=run.cache_type, rope_type=run.rope_type)
    quantisers = tuple(map(codec.quantiser, kinds.values()))
    R, P, num_pages = mla.kv_lora_rank, mla.qk_rope_head_dim, -(-tokens // PAGE_SIZE)

    def operands():
        ones = lambda *shape: jnp.ones(shape, jnp.float32)
        angles = ones(1, tokens, P // 2), ones(1, tokens, P // 2)
        places = jnp.arange(num_pages, dtype=jnp.int32)[None], jnp.arange(tokens, dtype=jnp.int32)[None]
        pools = tuple(_pool(num_pages, size, kind) for size, kind in _widths(mla, run))
        return pools, (ones(1, tokens, R), ones(1, tokens, P), ones(R), *angles, *places)

    def step(config, carried, kept):
        settings = dict(**kinds, epsilon=1e-6, quantisers=quantisers)
        settings |= dict(implementation=implementation, config=config)
        return latent_append.latent_append(*kept, *carried, **settings)

    sizes = dict(tokens=tokens, rank=R, latent_type=run.cache_type)
    heuristic = latent_append.Config.for_rank(R)
    return Case("latent_append", sizes, heuristic, dict(num_warps=(1, *_WARPS)), operands, step)


def _product_cases(config, weights, ubatch, *, implementation):
    """Yields products with quantised weights that have a kernel: of one token, and of a prompt."""
    experts = config.moe.num_experts if config.moe else 1
    for weight in dict.fromkeys(_products(weights)):
        name, *sizes = weight
        if name == "output":  # of the last token alone
            widths = [(1, 1)]
        elif name.endswith("_exps"):
            used = config.moe.num_experts_per_token
            tile = moe.tile_size(ubatch * used, experts)
            widths = [(used, 1), (min(_MOST_TILES, max(1, ubatch * used // tile)), tile)]
        else:
            widths = [(1, 1), (1, ubatch)]
        for num_tiles, tokens in widths:
            yield _product_case(num_tiles, tokens, *sizes, implementation=implementation)


def _products(weights):
    """Yields name, rows, columns, format and how many weights are multiplied at once."""
    for tensor, (shape, format) in weights.items():
        name = re.sub(r"^blk\.[0-9]+\.|\.weight$", "", tensor)
        is_quantised = format in weight_tiles.LAYOUTS and format not in _PLAIN
        if not is_quantised or len(shape) < 2 or name in _NOT_MULTIPLIED:
            continue
        *_, rows, columns = shape
        if columns % weight_tiles.layout(format).block_size:
            continue
        if name == "ffn_gate_up_exps":
            yield name, rows // 2, columns, format, 2
        elif not name.startswith(("ffn_gate", "ffn_up")):
            yield name, rows, columns, format, 1
        elif weights[tensor.replace("_up", "_gate")][1] != weights[tensor.replace("_gate", "_up")][1]:
            yield name, rows, columns, format, 1
        elif name.startswith("ffn_gate"):
            yield name, rows, columns, format, 2


def _product_case(num_tiles, tokens, rows, columns, format, num_weights, *, implementation):
    sizes = tokens, format, num_weights, dispatch.shared_memory()
    heuristic = grouped_matmul_bodies.Config.for_shape(*sizes)

    def operands():
        kind = quant.FORMATS[format]
        weight_bytes = num_weights * rows * weight_tiles.row_bytes(columns, format)
        num_experts = max(num_tiles, _COLD_BYTES // weight_bytes)
        u8 = lambda *sizes: jax.ShapeDtypeStruct((num_experts, rows, *sizes), jnp.uint8)
        blocks, header = u8(columns // kind.block_size, kind.block_bytes), u8(kind.header_bytes)
        shapes = jax.eval_shape(lambda *parts: weight_tiles.repack(*parts, format), blocks, header)
        x = jnp.ones((num_tiles, tokens, columns), jnp.float32)
        experts = jnp.arange(num_tiles, dtype=jnp.int32)
        return (x, experts), tuple(jax.tree.map(_fill, shapes) for _ in range(num_weights))

    def step(config, carried, kept):
        (x, experts), settings = carried, dict(implementation=implementation, config=config)
        if num_weights == 2:
            out = grouped_matmul.grouped_gated(x, *kept, experts, formats=(format, format), **settings)
        else:
            out = grouped_matmul.grouped_matmul(x, *kept, experts, format=format, **settings)
        return _depend(x, out), (experts + num_tiles) % kept[0][0].shape[0]

    words = heuristic.words
    if tokens == 1:
        choices = dict(rows=(4, 8, 16, 32), words=(words // 4, words // 2, words, words * 2))
        choices |= dict(num_warps=(1, *_WARPS), num_stages=_STAGES[:3])
    else:
        choices = dict(tokens=(32, 64, 128), rows=(32, 64, 128), words=(words // 2, words, words * 2))
        choices |= dict(num_warps=_WARPS[1:], num_stages=_STAGES[1:])
    sizes = dict(tokens=tokens, rows=rows, columns=columns, format=format, weights=num_weights)
    return Case("grouped_matmul", sizes, heuristic, choices, operands, step)
