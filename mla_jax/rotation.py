"""Rotations of the latent that are learned for a quantised cache and cost nothing when the model runs.

An orthogonal matrix leaves the norm of a vector as it is. So once the weight of the norm of latents is moved
into the up-projections, a rotation can be moved into the weights on both sides of the cache: the model is the
same, what is cached is rotated, and a file of it needs nothing of its reader.

    rotations = rotation.learn(model.params, tokens, config=model.config, cache_type="q4_0")
    params = rotation.fold(model.params, model.config, rotations)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mla_jax import quant, taps
from mla_jax.cache import codec, rotate
from mla_jax.config import ModelConfig, RunConfig


def fold(
    params, config: ModelConfig, rotations: Mapping[int, jax.Array] | None = None, *, weight_type: str = "f32"
):
    """Returns weights of the same model that caches rotated latents, whose norm has weights of one.

    To be run without `hadamard_size`, which would rotate once more.

    Args:
      params: nested dict of weights.
      config: the model.
      rotations: f32[R, R] by layer, orthogonal; other layers are not rotated.
      weight_type: what the weights that change are kept as: the up-projections, and the down-projection of
        latents where there is a rotation. One of `quant.ENCODABLE`; the others stay as they are.

    Raises:
      ValueError: for a layer that there is not, a matrix of another size or one that is not orthogonal.
    """
    rotations = dict(rotations or {})
    for layer, rotation in rotations.items():
        _check(config, layer, rotation)
    params = dict(params)
    for i in range(config.num_layers):
        layer = params[f"layers_{i}"]
        params[f"layers_{i}"] = layer | {"attn": _fold(layer["attn"], config, rotations.get(i), weight_type)}
    return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a rotation is learned.

    Attributes:
      steps: of Adam.
      learning_rate: of the first; it falls to 0 by a cosine.
      batch: latents that a step sees.
      seed: of which they are.
    """

    steps: int = 200
    learning_rate: float = 2e-3
    batch: int = 512
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def learn(
    params,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    cache_type: str,
    start: jax.Array | None = None,
    plan: Plan = Plan(),
    report: Callable[[str], None] | None = None,
) -> dict[int, jax.Array]:
    """Learns for each layer the rotation by which quantised latents change keys and values the least.

    Args:
      params: nested dict of weights.
      tokens: i32[B, T], a text of the kind that the model will read.
      config: the model.
      cache_type: of latents, as for `learn_one`, and so are `start` and `plan`.
      start: orthogonal f32[R, R], or None.
      plan: how to learn.
      report: called with a line per layer.

    Returns:
      f32[R, R] by layer, for `fold`.

    Raises:
      ValueError: for a cache type without codes.
    """
    _check_type(cache_type)
    unit = fold(params, config)
    _, _, seen = taps.run(unit, tokens, config=config, run=RunConfig(), record=("latent.*",))
    rotations = {}
    for i in range(config.num_layers):
        latents, gram = seen[f"latent.{i}"].reshape(-1, config.mla.kv_lora_rank), _gram(unit, i)
        first = hadamard(latents.shape[1]) if start is None else start
        rotations[i] = learn_one(latents, gram, cache_type=cache_type, start=first, plan=plan)
        if report is not None:
            before, after = (float(error(q, latents, gram, cache_type)) for q in (first, rotations[i]))
            report(f"layer {i}: error {before:.3g} at the start, {after:.3g} learned")
    return rotations


def learn_one(
    latents: jax.Array,
    gram: jax.Array,
    *,
    cache_type: str,
    start: jax.Array | None = None,
    plan: Plan = Plan(),
) -> jax.Array:
    """Returns the orthogonal matrix f32[R, R] that minimises `error`, found by Adam.

    It is Q = (I + A)^-1 (I - A) start with A skew (Cayley), and so orthogonal throughout.

    Args:
      latents: f32[X, R], of a norm without weight.
      gram: f32[R, R], see `error`.
      cache_type: one that keeps codes.
      start: orthogonal f32[R, R]; None for `hadamard`.
      plan: how to learn.
    """
    start = hadamard(latents.shape[1]) if start is None else jnp.asarray(start)
    return _minimise(latents, gram, start, cache_type=cache_type, plan=plan)


def hadamard(size: int) -> jax.Array:
    """Returns f32[size, size], the Hadamard rotation in the largest blocks that divide `size`."""
    return rotate(jnp.eye(size, dtype=jnp.float32), size & -size)


def error(rotation: jax.Array, latents: jax.Array, gram: jax.Array, cache_type: str) -> jax.Array:
    """Returns how far quantised latents move what is computed from them, squared, as a share of its square.

    Args:
      rotation: f32[R, R].
      latents: f32[X, R], of a norm without weight.
      gram: f32[R, R], U^T U for the matrix U that latents are multiplied by; the identity for themselves.
      cache_type: one that keeps codes.
    """
    rotated_XR = jnp.matmul(latents, rotation.T, precision="highest")
    moved_XR = straight_through(rotated_XR, cache_type) - rotated_XR
    moved_XR = jnp.matmul(moved_XR, rotation, precision="highest")
    square = lambda x_XR: jnp.vdot(jnp.matmul(x_XR, gram, precision="highest"), x_XR, precision="highest")
    return square(moved_XR) / square(latents)


def straight_through(values: jax.Array, cache_type: str) -> jax.Array:
    """Returns f32[..., n] `values` as a cache type keeps them, with a gradient.

    Rounding counts as the identity there, relative to the largest magnitude of the block, or to its range in
    types with an offset: what makes that smaller makes the error smaller.

    Raises:
      ValueError: for a cache type without codes.
    """
    _check_type(cache_type)
    encoded = codec.encode(jax.lax.stop_gradient(values), cache_type)
    shape = (*values.shape[:-1], -1, codec.BLOCK_TYPES[cache_type].block or values.shape[-1])
    blocks, kept = values.reshape(shape), codec.decode(encoded).reshape(shape)
    spread = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    if encoded.offset is not None:
        spread = jnp.max(blocks, axis=-1, keepdims=True) - jnp.min(blocks, axis=-1, keepdims=True)
    spread = jnp.maximum(spread, jnp.finfo(jnp.float32).tiny)
    ratio = blocks / spread
    ratio += jax.lax.stop_gradient(kept / spread - ratio)
    return (ratio * spread).reshape(values.shape)


def _cayley(skew, start):
    skew -= skew.T
    eye = jnp.eye(len(skew), dtype=jnp.float32)
    turn = jnp.linalg.solve(eye + skew, eye - skew)
    return jnp.matmul(turn, start, precision="highest")


@functools.partial(jax.jit, static_argnames=("cache_type", "plan"))
def _minimise(latents, gram, start, *, cache_type, plan):
    optimiser = optax.adam(optax.cosine_decay_schedule(plan.learning_rate, plan.steps))

    def step(state, key):
        skew, moments = state
        chosen = latents[jax.random.randint(key, (plan.batch,), 0, len(latents))]
        loss = lambda skew: error(_cayley(skew, start), chosen, gram, cache_type)
        updates, moments = optimiser.update(jax.grad(loss)(skew), moments)
        return (optax.apply_updates(skew, updates), moments), None

    skew = jnp.zeros_like(start)
    keys = jax.random.split(jax.random.key(plan.seed), plan.steps)
    (skew, _), _ = jax.lax.scan(step, (skew, optimiser.init(skew)), keys)
    return _cayley(skew, start)


def _fold(attn, config, rotation, weight_type):
    attn, R = dict(attn), config.mla.kv_lora_rank
    norm = quant.decode(attn["kv_a_norm"]["weight"])
    keep = lambda value: {"weight": jax.tree.map(jnp.asarray, quant.encode(np.asarray(value), weight_type))}
    matmul = functools.partial(jnp.matmul, precision="highest")
    turn = lambda rows: rows if rotation is None else matmul(rows, rotation.T)
    for name in {"kv_b", "v_b"} & set(attn):
        up = quant.decode(attn[name]["weight"])
        attn[name] = keep(turn(up * norm.reshape((1,) * (up.ndim - 1) + (-1,))))
    if "k_b" in attn:
        up_NHR = quant.decode(attn["k_b"]["weight"]).swapaxes(1, 2) * norm[None, None]
        attn["k_b"] = keep(turn(up_NHR).swapaxes(1, 2))
    if rotation is not None:
        down = quant.decode(attn["kv_a"]["weight"])
        attn["kv_a"] = keep(jnp.concatenate([matmul(rotation, down[:R]), down[R:]]))
    attn["kv_a_norm"] = {"weight": jnp.ones_like(norm)}
    return attn


def _gram(params, layer):
    attn = params[f"layers_{layer}"]["attn"]
    if "kv_b" in attn:
        parts = [quant.decode(attn["kv_b"]["weight"])]
    else:
        parts = [quant.decode(attn["k_b"]["weight"]).swapaxes(1, 2), quant.decode(attn["v_b"]["weight"])]
    ups = [part.reshape(-1, part.shape[-1]) for part in parts]
    return sum(jnp.matmul(up.T, up, precision="highest") for up in ups)


def _check_type(cache_type):
    if cache_type not in codec.BLOCK_TYPES:
        raise ValueError(f"cache_type must be one of {', '.join(codec.BLOCK_TYPES)}, got {cache_type!r}.")


def _check(config, layer, rotation):
    R = config.mla.kv_lora_rank
    if not 0 <= layer < config.num_layers:
        raise ValueError(f"layers of rotations must be in [0, {config.num_layers}), got {layer}.")
    if rotation.shape != (R, R):
        raise ValueError(f"a rotation must be {(R, R)}, as wide as a latent, got {rotation.shape}.")
    off = np.abs(np.asarray(rotation, np.float64) @ np.asarray(rotation, np.float64).T - np.eye(R)).max()
    if not off < 1e-4:
        raise ValueError(
            f"a rotation must be orthogonal, but its rows are off by {off:.3g} in layer {layer}."
        )
