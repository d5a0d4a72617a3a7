"""The model as a function that can be looked into: its inner values by name, and edits of them.

    logits, _, seen = taps.run(params, tokens, config=config, run=run, record=("resid.*", "attn_lse.3"))
    steered = taps.run(..., edits={"resid.3": lambda value, positions: value + vector})

`PLACES` says which values there are. An edit is a pure function from a value and the positions i32[B, T] of
its tokens to a value of the same shape and dtype; all that follows is computed from what it gives, the cache
included. It may close over arrays that are traced, so that there is a gradient with respect to a vector that
steers, or a `vmap` over many. Functions are told apart by identity: who changes numbers alone, in a loop,
makes them an argument of a function of his own under `jit`, and compiles once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from mla_jax import sampler
from mla_jax.cache import Cache, init_cache
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.moe import ExpertReduction
from mla_jax.nn.taps import COLLECTION, PLACES, Place, collected, in_order, names, tapped
from mla_jax.nn.transformer import Transformer

__all__ = ["PLACES", "Place", "generate", "names", "replay", "run", "tapped"]


def run(
    params,
    tokens: jax.Array,
    cache: Cache | None = None,
    *,
    config: ModelConfig,
    run: RunConfig,
    record: Sequence[str] = (),
    edits: Mapping[str, Callable] | None = None,
    pages: jax.Array | None = None,
    reduction: ExpertReduction | None = None,
):
    """Runs the model like `mla_jax.apply`, with edits, and returns what was recorded. It is jitted.

    To record changes no result: what kernels do not tell is computed once more beside them.

    Args:
      params: nested dict of weights.
      tokens: i32[B, T].
      cache: rows so far, or None to run a sequence on its own, which has a gradient.
      config: the model.
      run: how it is run; edits that it has come first.
      record: names, or patterns such as `"resid.*"` or `"*.3"`, of values to return.
      edits: functions by name or pattern.
      pages: i32[B, M] pages of each sequence in a paged cache.
      reduction: which experts to leave out, of each sequence; None for none.

    Returns:
      logits f32[B, T, W]; the cache with the tokens appended (None for None); and the values by name.

    Raises:
      ValueError: for a name that the model has not, or an edit that gives another shape or dtype.
    """
    settings = dict(config=config, run=tapped(run, record, edits))
    logits, cache, seen = _run(params, jnp.asarray(tokens), cache, pages, reduction, **settings)
    return logits, cache, in_order(seen, config)


def generate(
    params,
    tokens: jax.Array,
    num_tokens: int,
    *,
    config: ModelConfig,
    run: RunConfig,
    record: Sequence[str] = (),
    edits: Mapping[str, Callable] | None = None,
    sampling: sampler.SamplingState | None = None,
    reduction: ExpertReduction | None = None,
):
    """Draws tokens after a batch of prompts, with the edits in the prompt and in each step. It is jitted.

    Args:
      params: nested dict of weights.
      tokens: i32[B, T] prompts of one length.
      num_tokens: how many to draw, at least 1. An end-of-generation token ends nothing.
      config: the model.
      run: as in `run`, and so are `record` and `edits`.
      record: names of values to return.
      edits: functions by name.
      sampling: how to draw, a value per sequence, as from `sampler.batch`; None takes the most likely token.
      reduction: which experts to leave out, of each sequence; None for none.

    Returns:
      tokens drawn i32[B, num_tokens]; and values by name, [B, T + num_tokens, ...], of the tokens of the
      prompt and of those drawn.

    Raises:
      ValueError: as `run`, or for `num_tokens` below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")
    tokens = jnp.asarray(tokens)
    if sampling is None:
        sampling = sampler.batch([sampler.SamplingParams(temperature=0.0, seed=0)] * tokens.shape[0])
    settings = dict(num_tokens=num_tokens, config=config, run=tapped(run, record, edits))
    drawn, seen = _generate(params, tokens, sampling, reduction, **settings)
    return drawn, in_order(seen, config)


def replay(seen: Mapping[str, jax.Array]) -> dict[str, Callable]:
    """Returns edits that force the experts of an earlier run; their weights are those of the new one.

    Args:
      seen: i32[B, T, K] by name, "expert_ids.3" and the like, as `run` or `generate` recorded them; other
        names are ignored. Tokens past the first T choose for themselves. An id E leaves an expert out.

    Raises:
      ValueError: if there are no experts in it; and when the edit is used, for another batch or K.
    """
    edits = {
        name: functools.partial(_forced, jnp.asarray(ids))
        for name, ids in seen.items()
        if name.startswith("expert_ids.")
    }
    if not edits:
        raise ValueError(f"seen must have expert_ids of some layer, got {', '.join(seen) or 'nothing'}.")
    return edits


def _forced(forced, ids, positions):
    if forced.shape[::2] != ids.shape[::2]:
        raise ValueError(f"experts to replay must be {ids.shape[::2]}, (B, K), got {forced.shape[::2]}.")
    at = jnp.take_along_axis(forced, positions[..., None], axis=1, mode="clip")
    return jnp.where(positions[..., None] < forced.shape[1], at, ids)


def _apply(params, tokens, cache, pages, reduction, *, config, run):
    inputs = tokens, cache, None, pages, reduction
    outputs, variables = Transformer(config, run).apply({"params": params}, *inputs, mutable=COLLECTION)
    return *outputs, collected(variables, config)


_run = jax.jit(_apply, static_argnames=("config", "run"))


@functools.partial(jax.jit, static_argnames=("num_tokens", "config", "run"))
def _generate(params, tokens, sampling, reduction, *, num_tokens, config, run):
    B, T = tokens.shape
    none = jnp.full((B, sampler.NUM_RECENT), -1, jnp.int32)
    recent = jnp.concatenate([none, tokens], axis=1)[:, -sampler.NUM_RECENT :]
    settings = dict(config=config, run=run)

    def step(carry, _):
        weights, carry = jax.lax.optimization_barrier((params, carry))  # as in `steps.decode`
        logits, recent, cache = carry
        token = sampler.sample(logits, recent, cache.length, sampling)[:, None]
        recent = jnp.concatenate([recent[:, 1:], token], axis=1)
        logits, cache, seen = _apply(weights, token, cache, None, reduction, **settings)
        return (logits[:, 0], recent, cache), (token, seen)

    cache = init_cache(config, run, batch=B, ctx_size=T + num_tokens)
    logits, cache, of_prompt = _apply(params, tokens, cache, None, reduction, **settings)
    _, (drawn, of_steps) = jax.lax.scan(step, (logits[:, -1], recent, cache), length=num_tokens)
    in_turn = lambda steps: steps.swapaxes(0, 1)[:, :, 0]
    join = lambda start, steps: jnp.concatenate([start, in_turn(steps)], axis=1)
    return in_turn(drawn), jax.tree.map(join, of_prompt, of_steps)
