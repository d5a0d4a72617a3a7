"""Trains adapters of a model whose weights stay in the blocks of its file (QLoRA on what will be served)."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mla_jax import cache as cache_lib
from mla_jax import lora as lora_lib
from mla_jax import train as train_lib
from mla_jax.config import ModelConfig, RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What is adapted, how long and how fast; sizes in tokens."""

    steps: int = 200
    batch: int = 4
    window: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    clip_norm: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = lora_lib.ATTENTION
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "window", "rank", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be in [0, {self.steps}), got {self.warmup_steps}.")
        for name in ("learning_rate", "clip_norm", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Texts one after the other.

    Attributes:
      tokens: i32[n].
      counts: bool[n], whether a token is to be learned; the others, as in a prompt, are only read.
    """

    tokens: np.ndarray
    counts: np.ndarray

    def __post_init__(self):
        if self.tokens.ndim != 1 or self.tokens.shape != self.counts.shape:
            raise ValueError(
                f"tokens and counts must be [n] both, got {self.tokens.shape} and {self.counts.shape}."
            )


def make_optimizer(plan: FinetuneConfig) -> optax.GradientTransformation:
    """Returns Adam with clipping, warm-up and cosine decay to a tenth."""
    return optax.chain(optax.clip_by_global_norm(plan.clip_norm), optax.adam(train_lib.schedule(plan)))


def first_state(lora: lora_lib.Lora, plan: FinetuneConfig) -> train_lib.TrainState:
    """Returns the state before the first step."""
    return train_lib.TrainState(params=lora, optimizer=make_optimizer(plan).init(lora), step=jnp.int32(0))


def loss(lora, params, tokens: jax.Array, counts: jax.Array, *, config: ModelConfig, run: RunConfig):
    """Returns the sum of the losses in nats f32[] of the tokens that count.

    Args:
      lora: what is differentiated, `lora.Lora`.
      params: nested dict of frozen weights.
      tokens: i32[B, T + 1].
      counts: bool[B, T + 1], whether a token is to be predicted; the first of a row never is.
      config: the model.
      run: how it is run; with `remat` one layer is held at a time.
    """
    losses = train_lib.token_losses(lora_lib.attach(params, lora), tokens, config=config, run=run)
    return jnp.sum(losses * counts[:, 1:].astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("config", "run", "plan"), donate_argnames="state")
def step(
    state: train_lib.TrainState,
    params,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    config: ModelConfig,
    run: RunConfig,
    plan: FinetuneConfig,
):
    """Returns the state after one batch, its `params` a `lora.Lora`, and the mean loss; see `loss`.

    Windows are differentiated one after the other, so that memory does not depend on their number.
    """
    differentiate = jax.value_and_grad(functools.partial(loss, config=config, run=run))

    def add(total, window):
        found = differentiate(state.params, params, *(part[None] for part in window))
        return jax.tree.map(jnp.add, total, found), None

    nothing = jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.params)
    total, _ = jax.lax.scan(add, nothing, (tokens, counts))
    num_counted = jnp.maximum(jnp.sum(counts[:, 1:].astype(jnp.float32)), 1.0)
    value, gradient = jax.tree.map(lambda part: part / num_counted, total)
    updates, optimizer = make_optimizer(plan).update(gradient, state.optimizer, state.params)
    lora = optax.apply_updates(state.params, updates)
    return train_lib.TrainState(params=lora, optimizer=optimizer, step=state.step + 1), value


def draw_batch(stream: Stream, plan: FinetuneConfig, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows of a stream, i32 and bool [batch, window + 1], that depend on (seed, index) alone."""
    rng = np.random.default_rng([plan.seed, index])
    starts = rng.integers(0, len(stream.tokens) - plan.window, plan.batch)
    cut = lambda values: np.stack([values[s : s + plan.window + 1] for s in starts])
    return cut(stream.tokens).astype(np.int32), cut(stream.counts)


def fit(
    params: Mapping[str, Any],
    stream: Stream,
    config: ModelConfig,
    plan: FinetuneConfig,
    folder: pathlib.Path,
    *,
    run: RunConfig | None = None,
    report: Callable[[str], None] = print,
) -> lora_lib.Lora:
    """Trains adapters, resuming from the newest checkpoint in `folder`.

    Args:
      params: nested dict of weights in any form, which are not changed.
      stream: what is learned.
      config: the model.
      plan: a resumed run must be given the same one, as it must the same model and stream.
      folder: where checkpoints go; they hold adapters and optimiser, not the model.
      run: how the model is run; None for a layer at a time.
      report: called with one line of progress at a time.

    Raises:
      ValueError: if the stream is no longer than a window or nothing in it counts, a target has no weight, or
        the folder is of another run.
    """
    if len(stream.tokens) <= plan.window:
        raise ValueError(
            f"the text must be longer than a window of {plan.window} tokens, got {len(stream.tokens)}."
        )
    if not stream.counts.any():
        raise ValueError("the text must have tokens that are to be learned, got none.")
    run = run or RunConfig(remat=True)
    key = jax.random.key(plan.seed)
    lora = lora_lib.init(key, params, rank=plan.rank, alpha=plan.alpha, targets=plan.targets)
    settings = dict(config=config, run=run, plan=plan)
    take = lambda state, batch: step(state, params, *batch, **settings)
    draw = functools.partial(draw_batch, stream, plan)
    text = train_lib.digest(stream.tokens, stream.counts)
    about = dict(plan=dataclasses.asdict(plan), model=cache_lib.fingerprint(config, params), text=text)
    start = first_state(lora, plan)
    return train_lib.run_steps(start, take, draw, plan, folder, about=about, report=report).params


def held_out_loss(
    params: Mapping[str, Any],
    lora: lora_lib.Lora | None,
    stream: Stream,
    config: ModelConfig,
    *,
    window: int = 256,
    batch: int = 4,
    run: RunConfig | None = None,
) -> float:
    """Returns the mean loss in nats of the tokens of a stream that count; exp of it is the perplexity.

    Args:
      params: nested dict of weights.
      lora: adapters, or None.
      stream: cut into windows that are predicted each on its own; what is left at the end is not.
      config: the model.
      window: tokens of a window.
      batch: windows at a time.
      run: how the model is run.

    Raises:
      ValueError: if the stream is no longer than a window or nothing in its windows counts.
    """
    count = (len(stream.tokens) - 1) // window
    if count < 1:
        raise ValueError(
            f"the held-out text must be longer than a window of {window} tokens, got {len(stream.tokens)}."
        )
    cut = lambda values: np.stack([values[i * window : (i + 1) * window + 1] for i in range(count)])
    tokens, counts = cut(stream.tokens).astype(np.int32), cut(stream.counts)
    attached = params if lora is None else lora_lib.attach(params, lora)
    total, share = 0.0, int(counts[:, 1:].sum())
    if not share:
        raise ValueError("the held-out text must have tokens that are to be learned, got none.")
    for start in range(0, count, batch):
        rows = [min(i, count - 1) for i in range(start, start + batch)]
        losses = np.asarray(_token_losses(attached, tokens[rows], config=config, run=run or RunConfig()))
        num_new = min(batch, count - start)
        total += float((losses * counts[rows, 1:])[:num_new].sum())
    return total / share


_token_losses = jax.jit(train_lib.token_losses, static_argnames=("config", "run"))
