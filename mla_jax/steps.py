"""The jit boundary: what runs on the device between two looks of the host.

A prompt goes in by `prefill`, all but its last token; `decode` takes one token per sequence and draws the
next ones. So the logits of a prompt are never formed, and sampling is compiled once.
"""

import functools
import os
import pathlib
import stat

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from mla_jax import cache as cache_lib
from mla_jax import logits as logits_lib
from mla_jax import sampler, sharding
from mla_jax.cache import Cache
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn import collectives, taps
from mla_jax.nn.moe import ExpertReduction
from mla_jax.nn.transformer import Transformer
from pallas_kernels import tuning

_SMALLEST_BUCKET = 32
MAX_STEPS = 32  # of one `decode`
NOT_FINITE = -2  # in place of a token where the largest logit was infinite or NaN


def buckets(ubatch: int) -> tuple[int, ...]:
    """Returns the prefill widths that are compiled: 32, 64, 128, ... up to `ubatch`."""
    sizes = []
    size = _SMALLEST_BUCKET
    while size < ubatch:
        sizes.append(size)
        size *= 2
    return (*sizes, ubatch)


def split_prompt(num_tokens: int, ubatch: int) -> list[tuple[int, int]]:
    """Cuts `num_tokens` into (tokens, bucket): whole `ubatch`es, then the smallest bucket that fits."""
    whole, rest = divmod(num_tokens, ubatch)
    pieces = [(ubatch, ubatch)] * whole
    if rest:
        pieces.append((rest, next(size for size in buckets(ubatch) if size >= rest)))
    return pieces


def within(limit: float, seconds: float) -> int:
    """Returns how many steps of `seconds` each fit `limit` seconds: at least 1, at most `MAX_STEPS`."""
    return int(min(max(limit // seconds, 1), MAX_STEPS))


@functools.partial(jax.jit, static_argnames=("config", "run"), donate_argnames="cache")
def prefill(
    params,
    tokens: jax.Array,
    num_tokens: jax.Array,
    cache: Cache,
    pages: jax.Array | None = None,
    reduction: ExpertReduction | None = None,
    *,
    config: ModelConfig,
    run: RunConfig,
) -> Cache:
    """Returns the cache with `num_tokens` i32[B] of `tokens` i32[B, T] appended; the rest pads.

    `pages` and `reduction` as in `decode`.
    """

    def append(params, *inputs):
        return Transformer(config, run).apply({"params": params}, *inputs, method=Transformer.hidden)[1]

    args = params, tokens, cache, num_tokens, pages, reduction
    return sharding.run_on_mesh(append, run, args, sharding.cache_specs(run))


@functools.partial(jax.jit, static_argnames=("config", "run"), donate_argnames="cache")
def route(
    params,
    tokens: jax.Array,
    num_tokens: jax.Array,
    cache: Cache,
    reduction: ExpertReduction | None = None,
    *,
    config: ModelConfig,
    run: RunConfig,
):
    """Prefills like `prefill`, and tells which experts were used.

    Returns:
      the cache, and of the L layers with experts ids i32[L, B, T, K], E for one that was left out, and
      weights f32[L, B, T, K].
    """
    inputs = tokens, cache, num_tokens, None, reduction
    transformer = Transformer(config, taps.tapped(run, ("expert_ids.*", "expert_weights.*")))
    (_, cache), variables = transformer.apply(
        {"params": params}, *inputs, method="hidden", mutable=taps.COLLECTION
    )
    seen = taps.collected(variables, config)
    of = lambda kind: jnp.stack([value for name, value in seen.items() if name.startswith(kind)])
    return cache, of("expert_ids"), of("expert_weights")


@functools.partial(jax.jit, static_argnames=("config", "run"), donate_argnames=("recent", "cache"))
def decode(
    params,
    tokens: jax.Array,
    recent: jax.Array,
    cache: Cache,
    sampling: sampler.SamplingState,
    num_steps: jax.Array,
    eog_ids: jax.Array,
    pages: jax.Array | None = None,
    reduction: ExpertReduction | None = None,
    *,
    config: ModelConfig,
    run: RunConfig,
):
    """Takes steps, each of which appends one token per sequence and draws the next.

    It stops early once every sequence has drawn an end-of-generation token in this call. Until then sequences
    that have drawn one go on like the others: what they draw after it is to be thrown away.

    Args:
      params: nested dict of weights.
      tokens: i32[B] newest token of each sequence; -1 of one that is not there, whose text is none.
      recent: i32[B, 64] tokens before it that penalties look at, newest last, -1 for none.
      cache: rows of all tokens before, with room for `num_steps` more.
      sampling: how to draw, a value per sequence.
      num_steps: i32 how many steps to take, at most `MAX_STEPS`; other values do not recompile.
      eog_ids: i32[n] end-of-generation tokens, -1 for none.
      pages: i32[B, M] pages of each sequence in a paged cache, None for a contiguous one.
      reduction: which experts to leave out, of each sequence; None for none.
      config: the model.
      run: how it is run.

    Returns:
      tokens drawn i32[B, MAX_STEPS], -1 after the last step, `NOT_FINITE` of a row whose logits were not; the
      steps taken, i32; `recent` and the cache with all tokens but those that the last step drew.
    """
    loop = functools.partial(_decode, transformer=Transformer(config, run))
    args = params, tokens, recent, cache, sampling, pages, reduction
    rows = sharding.PER_SEQUENCE
    out_specs = sharding.SAME, sharding.SAME, rows, sharding.cache_specs(run)
    return sharding.run_on_mesh(loop, run, args, out_specs, same=(num_steps, eog_ids))


def _decode(
    params, tokens, recent, cache, sampling, pages, reduction, num_steps, eog_ids, *, transformer: Transformer
):
    shard = transformer.run.shard
    if reduction is not None:
        reduction = reduction.by_layer(transformer.config.num_layers)

    def goes_on(carry):
        step, has_ended = carry[0], carry[1]
        is_over = collectives.all_over_data(jnp.all(has_ended), shard)
        return (step < jnp.minimum(num_steps, MAX_STEPS)) & ~is_over

    def take(carry):
        step, has_ended, tokens, drawn, recent, cache = carry
        # Else XLA sees that weights decode alike in every step, and holds them all decoded during the loop.
        weights, step = jax.lax.optimization_barrier((params, step))
        recent = jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
        inputs = tokens[:, None], cache, None, pages, reduction
        logits, cache = transformer.apply({"params": weights}, *inputs)
        tokens = sampler.sample(logits[:, 0], recent, cache.length, sampling)
        tokens = if_finite(tokens, logits[:, 0])
        has_ended |= jnp.any(tokens[:, None] == eog_ids[None], axis=1)
        drawn = jax.lax.dynamic_update_slice_in_dim(drawn, tokens[:, None], step, axis=1)
        return step + 1, has_ended, tokens, drawn, recent, cache

    B = tokens.shape[0]
    drawn = jnp.full((B, MAX_STEPS), -1, jnp.int32)
    start = jnp.int32(0), tokens < 0, tokens, drawn, recent, cache
    step, _, _, drawn, recent, cache = jax.lax.while_loop(goes_on, take, start)
    return collectives.gather_over_data(drawn, shard), step, recent, cache


@functools.partial(jax.jit, static_argnames=("config", "run"), donate_argnames="cache")
def draw(
    params,
    tokens: jax.Array,
    recent: jax.Array,
    cache: Cache,
    sampling: sampler.SamplingState,
    constraints: logits_lib.Constraints,
    pages: jax.Array | None = None,
    reduction: ExpertReduction | None = None,
    *,
    config: ModelConfig,
    run: RunConfig,
):
    """Takes one step of `decode` under `constraints`; other arguments as there.

    Returns:
      tokens drawn i32[B], `NOT_FINITE` for a row whose logits were not; `logits.logprobs` of them; the cache.
    """

    def step(params, tokens, recent, cache, sampling, constraints, pages, reduction):
        inputs = tokens[:, None], cache, None, pages, reduction
        logits, cache = Transformer(config, run).apply({"params": params}, *inputs)
        told = draw_bound(logits, tokens, recent, cache.length, constraints, sampling)
        return *jax.tree.map(lambda part: collectives.gather_over_data(part, run.shard), told), cache

    args = params, tokens, recent, cache, sampling, constraints, pages, reduction
    out_specs = sharding.SAME, sharding.SAME, sharding.cache_specs(run)
    return sharding.run_on_mesh(step, run, args, out_specs)


def draw_bound(logits, tokens, recent, length, constraints: logits_lib.Constraints, sampling):
    """Draws under constraints after `tokens` i32[B], with logits f32[B, 1, W]; for within a jit.

    Returns:
      tokens drawn i32[B], and `logits.logprobs` of them, as of `draw`.
    """
    logits, recent = logits[:, 0], jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
    allowed = logits_lib.constrain(logits, constraints)
    drawn = sampler.sample(allowed, recent, length, sampling)
    return if_finite(drawn, logits), logits_lib.logprobs(logits, drawn)


def if_finite(tokens: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns tokens i32[B], `NOT_FINITE` for a row of logits [B, W] whose largest is not finite."""
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), tokens, NOT_FINITE)


def init_pool(config: ModelConfig, run: RunConfig, **sizes: int) -> Cache:
    """Returns an empty pool as `cache.init_pool` does, on the mesh if the run has one."""
    if run.shard is None:
        return cache_lib.init_pool(config, run, **sizes)
    init = functools.partial(cache_lib.init_pool, config, run, **sizes)
    return jax.jit(init, out_shardings=sharding.shardings(sharding.cache_specs(run), run.shard))()


copy_pages = jax.jit(cache_lib.copy_pages, donate_argnames="cache")
_take_pages = jax.jit(cache_lib.take_pages)
put_pages = jax.jit(cache_lib.put_pages, donate_argnames="cache")


def take_pages(cache: Cache, pages: jax.Array):
    """Returns what `cache.take_pages` does, whole in every process of a mesh."""
    layers = _take_pages(cache, pages)
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(layers)):
        return layers
    whole = jax.tree.map(lambda leaf: NamedSharding(leaf.sharding.mesh, PartitionSpec()), layers)
    return jax.jit(lambda layers: layers, out_shardings=whole)(layers)


COMPILATION_CACHE = pathlib.Path(os.path.expanduser(tuning.cache_home()), "mla_jax", "xla")  # never raises


def use_compilation_cache(folder: pathlib.Path) -> None:
    """Keeps compiled code in `folder` (created for this user alone), so that later processes start fast.

    Raises:
      ValueError: if the folder belongs to another user or anyone may write to it: compiled code in it is run
        as it is.
      OSError: if the folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    is_ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()  # Windows has no such ids
    if not is_ours or status.st_mode & stat.S_IWOTH:
        raise ValueError(
            f"the compilation cache {folder} must belong to this user, and others must not write to it."
        )
    if jax.config.jax_compilation_cache_dir != str(folder):
        compilation_cache.reset_cache()  # else JAX stays with the folder of the first compilation
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
