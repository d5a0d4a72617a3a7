"""What some requests ask about the logits beyond sampling: biases, a grammar's mask, and their logarithms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

MAX_LOGPROBS = 20  # most likely tokens that are told beside the one drawn
MAX_BIASED = 300  # token ids with a bias in a request


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Which tokens may be drawn, and what is added to the logits of some; a row per sequence.

    Attributes:
      allowed: u32[B, ceil(W / 32)], token i in bit i % 32 of word i // 32.
      bias_ids: i32[B, MAX_BIASED], W or more for none.
      bias: f32[B, MAX_BIASED].
    """

    allowed: jax.Array
    bias_ids: jax.Array
    bias: jax.Array


def no_constraints(batch: int, vocab_size: int) -> Constraints:
    """Returns constraints, in NumPy arrays to be filled in, that change nothing."""
    return Constraints(
        allowed=np.full((batch, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
        bias_ids=np.full((batch, MAX_BIASED), vocab_size, np.int32),
        bias=np.zeros((batch, MAX_BIASED), np.float32),
    )


def constrain(logits: jax.Array, constraints: Constraints) -> jax.Array:
    """Returns logits f32[B, W] with the biases added, and -inf for tokens that must not be drawn."""
    num_rows, size = logits.shape
    rows = jax.lax.broadcasted_iota(jnp.int32, constraints.bias_ids.shape, 0)
    logits = logits.at[rows, constraints.bias_ids].add(constraints.bias, mode="drop")
    bits = jnp.arange(32, dtype=jnp.uint32)[None, None]
    allowed = (constraints.allowed[:, :, None] >> bits) & jnp.uint32(1)
    return jnp.where(allowed.reshape(num_rows, -1)[:, :size] > 0, logits, -jnp.inf)


def logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns natural logarithms of probabilities.

    Args:
      logits: f32[B, W], of the model itself.
      tokens: i32[B] that were drawn.

    Returns:
      those of `tokens` f32[B]; the most likely ids i32[B, n], the likeliest first, n at most `MAX_LOGPROBS`;
      and theirs f32[B, n].
    """
    values = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(values, min(MAX_LOGPROBS, logits.shape[-1]))
    return jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0], ids, top
