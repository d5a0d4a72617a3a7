"""Whole steps of models for the GPU benchmark: decode, from a token to the next, at random weights."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from benchmarks.gpu_cases import OURS, Bar, Case, Way, fill
from checkpoints_tools import names, place_sizes
from checkpoints_tools.plan import is_preset
from mla_jax import cache as cache_lib
from mla_jax import presets, sampler, steps
from mla_jax.cache import PAGE_SIZE, init_pool
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.transformer import lay_out

_BAR = 0.6  # of the copy, by the bytes that a token needs
_SMALL_BYTES = 0x3B  # bits of a byte that make a float16 finite whatever the others are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """A model without its numbers.

    Attributes:
      config: the model.
      run: how it is run.
      params: `ShapeDtypeStruct`s of the weights, as the run reads them.
      bytes_per_token: of weights that one token is multiplied with.
    """

    config: ModelConfig
    run: RunConfig
    params: dict
    bytes_per_token: int


def shapes_of(model: str, format: str, run: RunConfig, num_layers: int | None = None) -> Shapes:
    """Returns the shapes of a GGUF file, or of a preset with weights of a format; of its first layers."""
    kind = dict(type=format) if is_preset(model) else {}
    contents = place_sizes.read_contents(model, **kind).first_layers(num_layers)
    config, tensors = contents.config, contents.tensors
    size = lambda tensor: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensor))
    experts = sum(size(tensor) for name, tensor in tensors.items() if "_exps." in name)
    others = sum(size(tensor) for name, tensor in tensors.items() if "_exps." not in name)
    others -= size(tensors["token_embd.weight"])
    used = experts * config.moe.num_experts_per_token // config.moe.num_experts if config.moe else 0
    params = jax.eval_shape(lambda: lay_out(names.unflatten(tensors), run))
    return Shapes(config=config, run=run, params=params, bytes_per_token=others + used)


def decode_operands(shapes: Shapes, ctx_size: int, num_steps: int = 1) -> tuple:
    """Returns what `steps.decode` takes for one sequence, weights and rows of no meaning."""
    num_pages = ctx_size // PAGE_SIZE
    cache = init_pool(shapes.config, shapes.run, batch=1, num_pages=num_pages)
    pages = jnp.arange(num_pages, dtype=jnp.int32)[None]
    leaves, tree = jax.tree.flatten(shapes.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = jax.tree.unflatten(tree, map(_fill, keys, leaves))
    one, recent = jnp.zeros((1,), jnp.int32), jnp.full((1, sampler.NUM_RECENT), -1, jnp.int32)
    sampling = sampler.batch([sampler.SamplingParams(seed=0)])
    return params, one, recent, cache, sampling, jnp.int32(num_steps), one - 1, pages


def model_cases(
    models: Sequence[str],
    formats: Sequence[str],
    contexts: Sequence[int],
    types: Sequence[str],
    *,
    kernels: bool,
) -> Iterator[Case]:
    """Yields the decoding of `steps.MAX_STEPS` tokens after each context, at batch 1.

    Args:
      models: GGUF files and presets.
      formats: of the weights of presets.
      contexts: cached tokens.
      types: of the cache.
      kernels: whether the kernels compute; False leaves the steps to XLA.
    """
    for model, S, name in itertools.product(models, contexts, types):
        run = RunConfig(cache_type=name, gpu_kernels=kernels)
        for format in formats if is_preset(model) else ("file",):
            yield _case(model, format, S, shapes_of(model, format, run))


def _case(model, format, S, shapes):
    config, count = shapes.config, steps.MAX_STEPS
    ctx_size = -(-(S + count) // PAGE_SIZE) * PAGE_SIZE
    rows = S * cache_lib.bytes_per_token(config, shapes.run)
    scores = 2 * config.num_layers * config.mla.num_heads * S
    per_score = 2 * config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
    cost = pl.CostEstimate(
        flops=count * (2 * presets.active_parameter_count(config) + scores * per_score),
        bytes_accessed=count * (shapes.bytes_per_token + rows),
        transcendentals=0,
    )
    operands = functools.partial(decode_operands, shapes, ctx_size, count)

    def run(index, previous, operands):
        params, tokens, recent, _, *others = operands
        cache = dataclasses.replace(previous, length=jnp.full((1,), S, jnp.int32))
        args = params, tokens, recent, cache, *others
        return steps.decode(*args, config=config, run=shapes.run)[3]

    result = jax.eval_shape(operands)[3]
    return Case(
        part="model",
        sizes=dict(model=pathlib.Path(model).name, format=format, context=S, cache=shapes.run.cache_type),
        cost=cost,
        operands=operands,
        ways={OURS: Way(run=run, result=result, first=lambda operands: operands[3])},
        bars=(Bar(of="copy", least=_BAR),),
    )


def _fill(key, leaf):
    """Returns random numbers of a weight, all finite, in whatever form it is kept."""
    numbers = fill(key, leaf.shape, leaf.dtype)
    return numbers if jnp.issubdtype(leaf.dtype, jnp.floating) else numbers & _SMALL_BYTES
