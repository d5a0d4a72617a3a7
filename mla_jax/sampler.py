"""Logits to token ids: penalties, top-k, typical, top-p, min-p, temperature and the draw, in this order.

A sort of a vocabulary of 129k takes 30 ms on a CPU, the 256 largest logits take 0.25 ms, so each row takes
the cheapest route that is exact for it; a route that no row of the batch needs is not run:

greedy     temperature 0: the largest penalised logit
unsorted   neither top-k, typical nor top-p: min-p is a threshold, no order is needed
largest    the filters provably keep only tokens among the `_NUM_CANDIDATES` largest logits
sorted     the rest: the same computation over the whole vocabulary

The route of a row depends on that row alone, and so does its key, which is made from its seed and its
position: what a row draws does not depend on what else is in the batch.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

NUM_RECENT = 64  # tokens that penalties look back on, at most
_NUM_CANDIDATES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens of one request are drawn. The defaults are those of ik_llama.cpp.

    Attributes:
      temperature: divides the logits before the draw; 0 takes the most likely token, whatever the filters.
      top_k: keeps this many of the most likely tokens; 0 keeps all.
      top_p: keeps the most likely tokens until their probabilities reach this sum; 1 keeps all.
      min_p: keeps tokens at least this probable relative to the most likely one; 0 keeps all.
      typical_p: keeps the tokens whose information is nearest to the entropy, until their probabilities
        exceed this sum; 1 keeps all.
      repeat_penalty: divides positive and multiplies negative logits of recent tokens; 1 changes none.
      presence_penalty: is subtracted from logits of recent tokens.
      frequency_penalty: is subtracted from logits of recent tokens once per occurrence.
      penalty_last_n: how many of the last tokens are recent, at most `NUM_RECENT`.
      seed: of the draws; None where the caller has yet to choose one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = NUM_RECENT
    seed: int | None = None

    def __post_init__(self):
        self._require("temperature", 0 <= self.temperature < math.inf, "finite and at least 0")
        for name in _INTEGER_FIELDS:
            if name != "seed" or self.seed is not None:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        self._require("top_k", 0 <= self.top_k < 2**31, "at least 0 and below 2**31")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("min_p", 0 <= self.min_p < 1, "in [0, 1)")
        self._require("typical_p", 0 < self.typical_p <= 1, "in (0, 1]")
        self._require("repeat_penalty", 0 < self.repeat_penalty < math.inf, "finite and positive")
        self._require("presence_penalty", math.isfinite(self.presence_penalty), "finite")
        self._require("frequency_penalty", math.isfinite(self.frequency_penalty), "finite")
        self._require("penalty_last_n", 0 <= self.penalty_last_n <= NUM_RECENT, f"in [0, {NUM_RECENT}]")
        self._require("seed", self.seed is None or 0 <= self.seed < 2**32, "in [0, 2**32)")

    def _require(self, name, holds, requirement):
        if not holds:
            raise ValueError(f"{name} must be {requirement}, got {getattr(self, name)}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingState:
    """`SamplingParams` of the rows of a batch, an array [B] per field: other values do not recompile."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repeat_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    penalty_last_n: jax.Array
    seed: jax.Array


_INTEGER_FIELDS = {"top_k": np.int32, "penalty_last_n": np.int32, "seed": np.uint32}


def batch(params: Sequence[SamplingParams]) -> SamplingState:
    """Gathers the parameters of some requests as the rows of one state, in host memory.

    Raises:
      ValueError: if one of them has no seed.
    """
    for row, row_params in enumerate(params):
        if row_params.seed is None:
            raise ValueError(f"seed must be chosen before sampling, got None in row {row}.")
    columns = {
        field.name: np.array(
            [getattr(row_params, field.name) for row_params in params],
            _INTEGER_FIELDS.get(field.name, np.float32),
        )
        for field in dataclasses.fields(SamplingState)
    }
    return SamplingState(**columns)


def sample(logits: jax.Array, recent: jax.Array, positions: jax.Array, sampling: SamplingState) -> jax.Array:
    """Draws the next token of each row.

    Args:
      logits: float32[B, W], finite or -inf, at least one finite in a row.
      recent: int32[B, NUM_RECENT], the last tokens of each row, newest last; -1 where there are none.
      positions: int32[B], position of the token to draw; with the seed it makes the key.
      sampling: fields [B].

    Returns:
      int32[B], token ids. Of equally likely tokens the lowest id counts as the more likely.

    Source: the sampler chain of ik_llama.cpp; the random numbers are this module's own.
    """
    num_rows = logits.shape[0]
    chex.assert_shape(recent, (num_rows, NUM_RECENT))
    chex.assert_shape([positions, *jax.tree.leaves(sampling)], (num_rows,))
    rows = jax.tree.map(lambda column: column[:, None], sampling)
    is_penalized = (rows.repeat_penalty != 1) | (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)
    unpenalized = logits.astype(jnp.float32)
    penalize = lambda: _penalize(unpenalized, recent, rows)
    logits = _where_any(is_penalized, penalize, unpenalized)
    greedy = _most_likely(logits)
    is_drawn = rows.temperature > 0

    def draw():
        uniform = _uniform(sampling.seed, positions)[:, None]
        is_unsorted = (rows.top_p >= 1) & (rows.typical_p >= 1) & (_limit(logits, rows) == logits.shape[-1])
        unsorted = lambda: _draw_unsorted(logits, uniform, rows)
        ranked = lambda: _draw_ranked(logits, uniform, rows, is_drawn & ~is_unsorted)
        drawn = _where_any(is_drawn & is_unsorted, unsorted, greedy)
        return _where_any(is_drawn & ~is_unsorted, ranked, drawn)

    return jax.lax.cond(jnp.any(is_drawn), draw, lambda: greedy)[:, 0]


def _most_likely(logits):
    """Returns the lowest id of the largest logits, int32[B, 1]; of a row with NaN some id.

    It takes a fifth of the time of `argmax` on a CPU.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_less = logits < jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_less, logits.shape[-1], ids), axis=-1, keepdims=True)


def _where_any(mask, compute, otherwise):
    """Returns `compute()` where `mask` holds, and does not run it if `mask` holds nowhere."""
    return jax.lax.cond(jnp.any(mask), lambda: jnp.where(mask, compute(), otherwise), lambda: otherwise)


def _uniform(seeds, positions):
    """Returns one number in [0, 1) per row: float32[B]."""

    def draw(seed, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), position)
        return jax.random.uniform(key, dtype=jnp.float32)

    return jax.vmap(draw)(seeds, positions)


def _penalize(logits, recent, rows):
    """Lowers the logits of recent tokens; -1 and tokens before the last `penalty_last_n` do not count."""
    age = NUM_RECENT - 1 - jax.lax.broadcasted_iota(jnp.int32, recent.shape, 1)
    is_recent = (recent >= 0) & (age < rows.penalty_last_n)
    ids = jnp.where(is_recent, recent, logits.shape[-1])  # one past the end: dropped when written
    count = jnp.sum(ids[:, :, None] == ids[:, None, :], axis=-1).astype(jnp.float32)
    values = jnp.take_along_axis(logits, ids, axis=-1, mode="clip")
    values = jnp.where(values > 0, values / rows.repeat_penalty, values * rows.repeat_penalty)
    values = values - (count * rows.frequency_penalty + rows.presence_penalty)
    row_index = jax.lax.broadcasted_iota(jnp.int32, recent.shape, 0)
    return logits.at[row_index, ids].set(values, mode="drop")


def _limit(logits, rows):
    """Returns how many tokens top-k keeps: int32[B, 1]."""
    size = logits.shape[-1]
    return jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, size), size)


def _draw_unsorted(logits, uniform, rows):
    keep = logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(rows.min_p)
    return _draw(logits, keep, uniform, rows)


def _draw_ranked(logits, uniform, rows, is_needed):
    """Draws from the largest logits, and from the whole sorted vocabulary for the rows that need it."""
    size = logits.shape[-1]
    num_candidates = min(_NUM_CANDIDATES, size)
    limit = _limit(logits, rows)
    total = jnp.sum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1, keepdims=True)

    def draw_from(count):
        # Without the barrier XLA merges later slices into the top-k, and then sorts the whole vocabulary.
        values, ids = jax.lax.top_k(logits, count)
        # In this order: on a mesh XLA would take the pair in the other one for the top-k itself, and abort.
        ids, values = jax.lax.optimization_barrier((ids, values))
        rank = _draw_sorted(values, limit, total, uniform, rows)
        return values, jnp.take_along_axis(ids, rank, axis=-1)

    values, drawn = draw_from(num_candidates)
    if num_candidates == size:
        return drawn
    reaches_top_p = jnp.sum(jnp.exp(values - values[:, :1]), axis=-1, keepdims=True) >= rows.top_p * total
    ends_below_min_p = values[:, -1:] < values[:, :1] + jnp.log(rows.min_p)
    # A top-k between the two sizes needs the sum of exactly its tokens, typical the entropy of all of them.
    keeps_all = (limit == size) & (rows.typical_p >= 1)
    suffices = (limit <= num_candidates) | (keeps_all & (reaches_top_p | ends_below_min_p))
    return _where_any(is_needed & ~suffices, lambda: draw_from(size)[1], drawn)


def _draw_sorted(values, limit, total, uniform, rows):
    """Draws a rank from logits in falling order.

    Args:
      values: float32[B, n], the largest logits of each row.
      limit: int32[B, 1], how many tokens top-k keeps.
      total: float32[B, 1], sum over the whole vocabulary of `exp(logit - largest logit)`.
      uniform: float32[B, 1], in [0, 1).
      rows: fields [B, 1].

    Returns:
      int32[B, 1], indices into `values`.
    """
    weights = jnp.exp(values - values[:, :1])
    keep = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) < limit
    kept = jnp.sum(jnp.where(keep, weights, 0), axis=-1, keepdims=True)
    total = jnp.where(limit > values.shape[-1], total, kept)

    is_typical = rows.typical_p < 1
    keep = _where_any(is_typical, lambda: keep & _is_typical(weights, keep, total, rows.typical_p), keep)
    mass = jnp.where(keep, weights, 0)
    total = jnp.where(is_typical, jnp.sum(mass, axis=-1, keepdims=True), total)
    keep = keep & ((_sum_before(mass) < rows.top_p * total) | (rows.top_p >= 1))
    largest = jnp.max(jnp.where(keep, values, -jnp.inf), axis=-1, keepdims=True)
    keep = keep & (values >= largest + jnp.log(rows.min_p))
    return _draw(values, keep, uniform, rows)


def _is_typical(weights, keep, total, typical_p):
    """Finds the tokens whose information is nearest to the entropy, up to and past a sum of probabilities."""
    probability = jnp.where(keep, weights, 0) / total
    information = -jnp.log(probability)  # infinite where a token is out or its probability underflows
    entropy = jnp.sum(jnp.where(probability > 0, probability * information, 0), axis=-1, keepdims=True)
    order = jnp.argsort(jnp.abs(information - entropy), axis=-1, stable=True)
    before = _sum_before(jnp.take_along_axis(probability, order, axis=-1))
    return jnp.take_along_axis(before <= typical_p, jnp.argsort(order, axis=-1), axis=-1)


def _sum_before(mass):
    """Sums the entries left of each entry."""
    return jnp.pad(jnp.cumsum(mass, axis=-1)[:, :-1], ((0, 0), (1, 0)))


def _draw(values, keep, uniform, rows):
    """Draws an index in proportion to `exp(value / temperature)` by inverting the cumulative sum."""
    values = jnp.where(keep, values, -jnp.inf)
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1)
    cumulative = jnp.cumsum(
        jnp.exp((values - jnp.max(values, axis=-1, keepdims=True)) / temperature), axis=-1
    )
    # The first sum above the target: never a token of weight 0, since a sum first exceeds it where it grows.
    index = jnp.sum(cumulative <= uniform * cumulative[:, -1:], axis=-1, keepdims=True)
    return jnp.minimum(index, values.shape[-1] - 1).astype(jnp.int32)
