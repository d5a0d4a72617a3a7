"""What a mesh comes to, before anything is loaded: bytes of each device, and what devices tell each other."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax

from checkpoints_tools.inspect import columns
from mla_jax import sharding
from mla_jax.cache import PAGE_SIZE, init_pool
from mla_jax.config import MLAMode, ModelConfig, RunConfig, Shard
from mla_jax.sharding import WeightInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """An exchange between devices in one pass of the network.

    Attributes:
      place: where: "embedding", "attention", "dense FFN", "experts" or "output".
      kind: "all-reduce", "all-gather", "reduce-scatter" or "all-to-all".
      axis: which devices take part, as an axis of the mesh: "group" for `expert` and `model` together.
      count: how many times in one pass.
      numbers: f32 or i32 that each device has of it at the end, for each token of its sequences.
    """

    place: str
    kind: str
    axis: str
    count: int
    numbers: int


def collectives(config: ModelConfig, run: RunConfig) -> list[Collective]:
    """Returns every exchange of one pass of the network."""
    shard, sizes = run.shard, run.sizes(config)
    mla, D = config.mla, config.embed_dim
    num_moe = config.num_layers - config.num_dense_layers
    found = []

    def add(place, kind, axis, count, numbers):
        if count:
            found.append(Collective(place=place, kind=kind, axis=axis, count=count, numbers=numbers))

    if shard.group_size > 1:
        add("embedding", "all-reduce", "group", 1, D)
        if shard.splits_cache:
            heads, queries = sizes.num_heads * shard.group_size, mla.kv_lora_rank
            add("attention", "all-gather", "group", config.num_layers, heads * queries)
            add("attention", "all-gather", "group", config.num_layers, heads * mla.qk_rope_head_dim)
            add("attention", "all-to-all", "group", config.num_layers, heads * (queries + 2))
        add("attention", "all-reduce", "group", config.num_layers, D)
        add("dense FFN", "all-reduce", "group", config.num_dense_layers, D)
    if shard.data > 1:
        per_token = config.moe.num_experts_per_token if config.moe else 0
        for numbers in (D, per_token, per_token):
            add("experts", "all-gather", "data", num_moe, numbers * shard.data)
        add("experts", "reduce-scatter", "data", num_moe, D)
    if shard.group_size > 1:
        add("experts", "all-reduce", "group", num_moe, D)
        add("output", "all-gather", "group", 1, sizes.vocab_size * shard.group_size)
    return found


def weight_bytes(weights: Iterable[WeightInfo], config: ModelConfig, shard: Shard) -> int:
    """Returns the bytes of weights of one device, padding included.

    Args:
      weights: all of the model.
      config: the model.
      shard: the device's part.
    """
    total = 0
    for weight in weights:
        axes = [axis for axis in sharding.logical_axes(weight.path) if axis is not None]
        parts = [sharding.size_of(shard.sizes, axis, 0) for axis in axes]
        wholes = [sharding.size_of(config.sizes, axis, 0) for axis in axes]
        total += weight.num_bytes * math.prod(parts) // math.prod(wholes)
    return total


def cache_bytes(config: ModelConfig, run: RunConfig, num_tokens: int) -> int:
    """Returns the bytes of the pool on one device, for `num_tokens` tokens of its sequences."""
    num_pages = -(-num_tokens // PAGE_SIZE) * run.shard.data
    pool = jax.eval_shape(lambda: init_pool(config, run, batch=1, num_pages=num_pages))
    parts = run.shard.data * (run.shard.group_size if _shares_rows(run) else 1)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool.layers)) // parts


def describe(weights: Sequence[WeightInfo], config: ModelConfig, run: RunConfig, num_tokens: int) -> str:
    """Describes what a mesh comes to: bytes of each device, padding, and every exchange of a pass.

    Args:
      weights: all of the model.
      config: the model.
      run: its shard.
      num_tokens: tokens that the cache of each group holds.

    Returns:
      Text of some lines, without a newline at the end.
    """
    shard, mib = run.shard, lambda count: f"{count / 2**20:,.1f} MiB"
    whole = sum(weight.num_bytes for weight in weights)
    head = [
        ("mesh", f"{shard.mesh}: {shard.num_devices} devices"),
        ("weights", f"{mib(weight_bytes(weights, config, shard))} a device, {mib(whole)} as one"),
        ("cache", f"{mib(cache_bytes(config, run, num_tokens))} a device, for {num_tokens:,} tokens a group"),
    ]
    if padded := _padding(config, shard):
        head.append(("padding", ", ".join(padded)))
    exchanges = collectives(config, run)
    table = [("exchange", "in", "among", "times a pass", "numbers a token")]
    table += [(it.kind, it.place, it.axis, str(it.count), f"{it.numbers:,}") for it in exchanges]
    return columns(head) + ("\n\n" + columns(table) if exchanges else "")


def _padding(config, shard):
    """Returns which sizes grow, in words."""
    found = []
    for axis in sharding.SHARED:
        whole = sharding.size_of(config.sizes, axis, 0)
        padded = sharding.size_of(shard.sizes, axis, 0) * sharding.num_parts(shard, axis)
        if padded > whole:
            found.append(f"{axis.replace('_', ' ')} {whole:,} to {padded:,}")
    return found


def _shares_rows(run):
    return run.shard.splits_cache or run.mla == MLAMode.EXPANDED
