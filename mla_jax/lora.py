"""Low-rank adapters of frozen weights (LoRA): made, put beside the weights, and merged into them.

An adapter is a pytree of its own, so what is trained is told apart from what is held fixed by being the
argument that is differentiated:

    gradient = jax.grad(lambda lora: loss(attach(params, lora)))(lora)
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints_tools import names
from mla_jax import quant

# Without the up-projections of latents, which kernels apply in two ways: adapters of these slow decoding.
ATTENTION = (r"attn_(q|q_a|q_b|kv_a_mqa|output)\.weight",)
LINEAR = (*ATTENTION, r"attn_(kv_b|k_b|v_b)\.weight", r"ffn_(gate|up|down|gate_up)(_exps|_shexp)?\.weight")
ALPHAS = "from 2^-64 to 2^64"

_SMALLEST_ALPHA = 2.0**-64
_EMBEDDING = "token_embd.weight"
_PLAIN = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The update `b @ a` of one weight [..., out, in]; leading axes are experts, or heads of k_b and v_b.

    Attributes:
      a: f32[..., r, in].
      b: f32[..., out, r].
    """

    a: jax.Array
    b: jax.Array

    @property
    def rank(self) -> int:
        """Rank r of the update."""
        return self.a.shape[-2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of some weights of a model.

    Attributes:
      adapters: by GGUF name of the weight, such as "blk.3.attn_q.weight".
      alpha: an update is scaled by alpha / r; static under jit.
    """

    adapters: dict[str, Adapter]
    alpha: float = dataclasses.field(metadata=dict(static=True))


def init(
    key: jax.Array, params: Mapping[str, Any], *, rank: int, alpha: float, targets: Sequence[str] = ATTENTION
) -> Lora:
    """Returns adapters that change nothing yet: `a` is random, `b` zero.

    Args:
      key: of the random numbers.
      params: nested dict of weights, see `checkpoints_tools.names`.
      rank: r, of each adapter.
      alpha: scale of the updates, times r.
      targets: regular expressions; a weight gets an adapter if one is found in its GGUF name, so that
        `r"blk\\.[0-3]\\.attn_q\\.weight"` means those of four layers.

    Raises:
      ValueError: for a rank below 1 or above a side of a weight, an alpha that is not in `ALPHAS`, or a
        target that is no regular expression, no matrix or not there.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    if not is_alpha(alpha):
        raise ValueError(f"alpha must be a number {ALPHAS}, got {alpha}.")
    weights, adapters = names.flatten(params), {}
    for target in targets:
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(f"targets must be regular expressions, got {target!r}: {error}.") from None
        if not any(re.search(target, name) for name in weights):
            raise ValueError(f"targets must each be found in the name of a weight, got {target!r}.")
    chosen = [name for name in weights if any(re.search(target, name) for target in targets)]
    for name, own_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *lead, out, size = _matrix_shape(name, weights[name])
        if rank > min(out, size):
            raise ValueError(f"rank must be at most {min(out, size)}, a side of {name}, got {rank}.")
        bound = size**-0.5
        a = jax.random.uniform(own_key, (*lead, rank, size), jnp.float32, -bound, bound)
        adapters[name] = Adapter(a=a, b=jnp.zeros((*lead, out, rank)))
    return Lora(adapters=adapters, alpha=float(alpha))


def is_alpha(value: float) -> bool:
    """Whether a number is in `ALPHAS`: as float32 it stays far from 0 and from infinity."""
    return _SMALLEST_ALPHA <= value <= 1 / _SMALLEST_ALPHA


def attach(params: Mapping[str, Any], lora: Lora, strength: float | jax.Array = 1.0) -> dict:
    """Returns parameters with the adapters beside their weights, which are not copied.

    Args:
      params: nested dict of weights; those that have adapters already get these as well.
      lora: the adapters.
      strength: multiplies the updates.

    Raises:
      ValueError: for an adapter of a weight that is not there or has another shape.
    """
    return _replace(params, lora, strength, _beside)


def merge(
    params: Mapping[str, Any], lora: Lora, strength: float | jax.Array = 1.0, format: str | None = None
) -> dict:
    """Returns parameters with the updates added to the weights.

    Args:
      params: nested dict of weights.
      lora: the adapters.
      strength: multiplies the updates.
      format: one of `quant.ENCODABLE` that the changed weights are encoded in, each in its own with None.

    Raises:
      ValueError: as `attach`, or for a format that there is no encoder of.
    """

    def merged(weight, adapter):
        base = weight.base if isinstance(weight, quant.LoraTensor) else weight
        is_array = isinstance(base, jax.Array)
        name = format or (_PLAIN[base.dtype.name] if is_array else base.format)
        if name not in quant.ENCODABLE:
            raise ValueError(f"format must be one of {', '.join(quant.ENCODABLE)}, got {name!r}.")
        return jax.tree.map(jnp.asarray, quant.encode(quant.decode(_beside(weight, adapter)), name))

    return _replace(params, lora, strength, merged)


def _beside(weight, adapter):
    if isinstance(weight, quant.LoraTensor):  # the sum of two updates is one of the sum of their ranks
        a = jnp.concatenate([weight.a, adapter.a], axis=-2)
        b = jnp.concatenate([weight.b, adapter.b], axis=-1)
        return quant.LoraTensor(base=weight.base, a=a, b=b)
    return quant.LoraTensor(base=weight, a=adapter.a, b=adapter.b)


def _replace(params, lora, strength, replace):
    weights = names.flatten(params)
    for name, adapter in lora.adapters.items():
        if name not in weights:
            raise ValueError(f"an adapter must be of a weight that the model has, got {name!r}.")
        *lead, out, size = _matrix_shape(name, weights[name])
        wanted = (*lead, adapter.rank, size), (*lead, out, adapter.rank)
        if (adapter.a.shape, adapter.b.shape) != wanted:
            raise ValueError(
                f"the adapter of {name} must have a and b of shapes {wanted[0]} and {wanted[1]}, "
                f"got {adapter.a.shape} and {adapter.b.shape}."
            )
        scaled = dataclasses.replace(adapter, b=adapter.b * (strength * lora.alpha / adapter.rank))
        weights[name] = replace(weights[name], scaled)
    return names.unflatten(weights)


def _matrix_shape(name, weight):
    if weight.ndim < 2 or name == _EMBEDDING:
        raise ValueError(f"an adapter must be of a matrix that activations are multiplied by, got {name!r}.")
    return weight.shape
