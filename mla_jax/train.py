"""Trains a small deepseek2 model from nothing: AdamW, warm-up and cosine, balanced by the router bias."""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from mla_jax import perplexity
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn import taps
from mla_jax.nn.moe import ExpertReduction
from mla_jax.nn.transformer import Transformer, init_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast and how often; sizes in tokens."""

    steps: int = 7400
    batch: int = 4
    window: int = 256
    long_steps: int = 300  # the last steps see windows of `long_window`, about as many tokens in all
    long_window: int = 2048
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_rate: float = 1e-3  # step of the router bias towards even load, DeepSeek-V3 section 2.1.2
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "window", "long_window", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("long_steps", "warmup_steps"):
            if not 0 <= getattr(self, name) < self.steps:
                raise ValueError(f"{name} must be in [0, {self.steps}), got {getattr(self, name)}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint holds: parameters, optimiser state and the number of steps done (i32[])."""

    params: dict
    optimizer: optax.OptState
    step: jax.Array


def schedule(plan) -> optax.Schedule:
    """Returns warm-up and cosine decay to a tenth, by the steps and the peak learning rate of a plan."""
    peak = plan.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, plan.warmup_steps, plan.steps, 0.1 * peak)


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """Returns AdamW with clipping, warm-up and cosine decay to a tenth; matrices alone are decayed."""
    is_matrix = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(schedule(train), b1=0.9, b2=0.95, weight_decay=train.weight_decay, mask=is_matrix),
    )


def cross_entropy(params, tokens: jax.Array, config: ModelConfig):
    """Returns the mean loss in nats of predicting `tokens` i32[B, T + 1], and expert loads f32[E] each."""
    routed = () if config.moe is None else ("expert_ids.*",)
    losses, seen = _losses(params, tokens, config, taps.tapped(RunConfig(), routed))
    count = lambda ids: jnp.bincount(ids.reshape(-1), length=config.moe.num_experts).astype(jnp.float32)
    return losses.mean(), {name.replace("expert_ids.", "layers_"): count(ids) for name, ids in seen.items()}


def token_losses(
    params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    run: RunConfig,
    reduction: ExpertReduction | None = None,
) -> jax.Array:
    """Returns the losses f32[B, T] in nats of predicting `tokens` i32[B, T + 1], each from those before it.

    Differentiable in whatever weights are arrays, in adapters and, where it has a temperature, in the
    threshold of `reduction`. The logits of some tokens are held at a time, also in the backward pass.

    Raises:
      ValueError: if there is nothing to predict, or for taps that would have no effect.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [B, T + 1] with T from 1 on, got {tokens.shape}.")
    taps.check_edits_alone(run.taps)
    return _losses(params, tokens, config, run, reduction)[0]


def _losses(params, tokens, config, run, reduction=None):
    model, inputs = Transformer(config, run), (tokens[:, :-1], None, None, None, reduction)
    (x, _), recorded = model.apply({"params": params}, *inputs, method="hidden", mutable=taps.COLLECTION)

    def of_some(x, ids):
        logits = perplexity.unembed(params, x, config, run)
        return perplexity.cross_entropy(logits, ids)

    rows, targets = x.reshape(-1, x.shape[-1]), tokens[:, 1:].reshape(-1)
    losses = perplexity.in_pieces(jax.checkpoint(of_some), rows, targets, vocab_size=config.vocab_size)
    return losses.reshape(tokens.shape[0], -1), taps.collected(recorded, config)


@functools.partial(jax.jit, static_argnames=("config", "train"), donate_argnames="state")
def train_step(state: TrainState, tokens: jax.Array, *, config: ModelConfig, train: TrainConfig):
    """Returns the state after one batch `tokens` i32[B, T + 1], and its loss."""
    (loss, loads), grads = jax.value_and_grad(cross_entropy, has_aux=True)(state.params, tokens, config)
    updates, optimizer = make_optimizer(train).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    for layer, load in loads.items():
        router = params[layer]["ffn"]["router"]
        if config.moe.has_selection_bias:
            router["bias"] += train.bias_rate * jnp.sign(load.mean() - load)
    return TrainState(params=params, optimizer=optimizer, step=state.step + 1), loss


def draw_batch(stream: np.ndarray, train: TrainConfig, step: int) -> np.ndarray:
    """Returns windows i32[batch, window + 1] of `stream` at places that depend on (seed, step) alone."""
    batch, window = train.batch, train.window
    if step >= train.steps - train.long_steps:
        batch, window = max(1, batch * window // train.long_window), train.long_window
    rng = np.random.default_rng([train.seed, step])
    starts = rng.integers(0, stream.size - window - 1, batch)
    return np.stack([stream[s : s + window + 1] for s in starts]).astype(np.int32)


def fit(stream: np.ndarray, config: ModelConfig, train: TrainConfig, folder: pathlib.Path, report=print):
    """Trains on a token stream, resuming from the newest checkpoint in `folder`.

    Args:
      stream: integer[tokens].
      config: the model.
      train: the plan. A resumed run must be given the same one.
      folder: where checkpoints go.
      report: called with one line of progress at a time.

    Returns:
      The trained parameters.

    Raises:
      ValueError: if the stream is shorter than one window.
    """
    longest = max(train.window, train.long_window)
    if stream.size <= longest + 1:
        raise ValueError(f"the corpus must be longer than a window of {longest}, got {stream.size} tokens.")
    params = init_params(jax.random.key(train.seed), config)
    state = TrainState(params=params, optimizer=make_optimizer(train).init(params), step=jnp.int32(0))
    take = functools.partial(train_step, config=config, train=train)
    draw = functools.partial(draw_batch, stream, train)
    about = dict(plan=dataclasses.asdict(train), model=repr(config), text=digest(stream))
    return run_steps(state, take, draw, train, folder, about=about, report=report).params


def digest(*arrays: np.ndarray) -> str:
    """Returns what tells texts apart."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def run_steps(
    state: TrainState, take, draw, train, folder: pathlib.Path, *, about: dict, report
) -> TrainState:
    """Takes the steps of a plan, resuming from the newest checkpoint, and returns the last state.

    Args:
      state: the first one, which says what a checkpoint must look like.
      take: from a state and a batch to the next state and its loss.
      draw: from the number of a step to its batch, of which the first array is tokens i32[B, T + 1].
      train: has `steps` and `checkpoint_every`.
      folder: where checkpoints go.
      about: JSON values that say what is trained, by name; kept beside the checkpoints.
      report: called with one line of progress at a time.

    Raises:
      ValueError: if a loss is not finite, or the folder is of a run that is about something else.
    """
    _check_same(pathlib.Path(folder), about)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=train.checkpoint_every)
    with ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            report(f"resuming from step {manager.latest_step()} in {manager.directory}")
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        losses, done, seen = [], int(state.step), 0
        for step in range(done, train.steps):
            batch = draw(step)
            state, loss = take(state, batch)
            losses.append(float(loss))
            tokens = jax.tree.leaves(batch)[0]
            if step == done:
                began = time.perf_counter()  # when all is compiled
            else:
                seen += tokens.size - len(tokens)
            if not math.isfinite(losses[-1]):
                raise ValueError(f"loss must be finite, got {losses[-1]} at step {step}.")
            last = step + 1 == train.steps
            manager.save(step + 1, args=ocp.args.StandardSave(state), force=last)
            if (step + 1) % 10 == 0 or last:
                seconds = max(time.perf_counter() - began, 1e-9)
                left = (train.steps - step - 1) * seconds / max(step - done, 1)
                mean = float(np.mean(losses[-10:]))
                done_of = f"step {step + 1}/{train.steps}"
                report(f"{done_of}  loss {mean:.3f}  {seen / seconds:.0f} tokens/s  {left / 60:.0f} min left")
        manager.wait_until_finished()
    return state


def _check_same(folder, about):
    """Refuses to go on with another run; the checkpoints themselves do not say what they are of."""
    path, about = folder / "run.json", json.loads(json.dumps(about))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=2) + "\n")
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        before = None
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    flat = lambda tree: {name(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}
    if before != about:
        ours, theirs = flat(about), flat(before)
        told = lambda key: (
            f"{key.removeprefix('plan.')} was {theirs.get(key)!r:.40} and is {ours.get(key)!r:.40}"
        )
        changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        differences = ", ".join(map(told, changed))
        raise ValueError(
            f"{folder} must be empty or hold checkpoints of this very run, but {differences}: give another."
        )


def bits_per_byte(
    params, stream: np.ndarray, num_bytes: int, config: ModelConfig, window: int = 2048
) -> float:
    """Returns the cross-entropy of a held-out token stream in bits per byte of its text.

    Args:
      params: parameters, plain or quantised.
      stream: integer[tokens], cut into windows that are predicted each on its own.
      num_bytes: bytes of the text that the stream encodes.
      config: the model.
      window: tokens of context at most.
    """
    loss = jax.jit(lambda params, tokens: cross_entropy(params, tokens, config)[0])
    nats, full = 0.0, (stream.size - 1) // window
    for i in range(full):
        nats += window * float(loss(params, stream[None, i * window : (i + 1) * window + 1].astype(np.int32)))
    rest = stream[None, full * window :].astype(np.int32)
    if rest.shape[1] > 1:
        nats += (rest.shape[1] - 1) * float(loss(params, rest))
    return nats / math.log(2) / num_bytes
