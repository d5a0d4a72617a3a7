"""Adapters with random factors, and what they add to weights."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import names
from mla_jax import RunConfig, apply
from mla_jax import lora as lora_lib

EVERY = (*lora_lib.LINEAR, r"^output\.weight")


def random_lora(params, *, targets=EVERY, rank=4, alpha=6.0, seed=0):
    """Returns adapters of the weights that `targets` are found in, which change them by about a tenth."""
    rng, adapters = np.random.default_rng(seed), {}
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    for name, weight in names.flatten(params).items():
        if any(re.search(target, name) for target in targets):
            *lead, out, size = weight.shape
            a = draw(*lead, rank, size) * np.float32(size**-0.5)
            adapters[name] = lora_lib.Adapter(a=a, b=np.float32(0.06) * draw(*lead, out, rank))
    return lora_lib.Lora(adapters=adapters, alpha=alpha)


def update(lora, name):
    """Returns what the adapter of a weight adds to it, float64."""
    adapter = lora.adapters[name]
    a, b = (np.asarray(part, np.float64) for part in (adapter.a, adapter.b))
    return lora.alpha / adapter.rank * b @ a


def logits(params, config, tokens):
    """Returns f32[T, W] of tokens [T]."""
    return np.asarray(_apply()(params, jnp.asarray([tokens], jnp.int32), None, config, RunConfig())[0][0])


@functools.cache
def _apply():
    return jax.jit(apply, static_argnums=(3, 4), compiler_options={"xla_backend_optimization_level": 0})
