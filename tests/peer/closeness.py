"""How far the network of this project is from ik_llama.cpp, in the measures that the README states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import apply, init_cache


@dataclasses.dataclass(frozen=True)
class Closeness:
    """Mean over tokens of KL(reference || ours) in nats, and the share of tokens with the same best token."""

    kl: float
    top1: float

    @classmethod
    def of(cls, reference, ours):
        """Compares logits [T, W] with logits [T, W]."""
        p, q = _log_softmax(reference), _log_softmax(ours)
        kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
        return cls(float(kl), float((reference.argmax(axis=-1) == ours.argmax(axis=-1)).mean()))


def network_logits(checkpoint, tokens, run, *, config=None, step=False) -> np.ndarray:
    """Returns f32[T, W] of this project's network, through a cache.

    Args:
      checkpoint: from `load_gguf`.
      tokens: [T] ids.
      run: how to run it.
      config: instead of the checkpoint's.
      step: feed one token at a time, and not all at once.
    """
    config = config or checkpoint.config
    cache = init_cache(config, run, batch=1, ctx_size=len(tokens))
    batch, parts = jnp.asarray(np.asarray(tokens, np.int32)[None]), []
    for piece in jnp.split(batch, len(tokens) if step else 1, axis=1):
        logits, cache = _apply()(checkpoint.params, piece, cache, config, run)
        parts.append(np.asarray(logits[0]))
    return np.concatenate(parts)


@functools.cache
def _apply():
    return jax.jit(apply, static_argnums=(3, 4))


def _log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
