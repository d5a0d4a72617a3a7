"""Searches for the scales of runs of weights: many ways to round, and least squares for each of them.

Once the codes of a run are known, the best scale, and offset, are those of a weighted line through the
weights. The codes depend on the scale again, so a range of scales is tried, and the fit with the least error
kept. A run is the last axis; all runs are searched at once.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Scales tried, as inverse multiples of the one that makes the codes just reach the largest weight. Smaller
# scales cut large weights off, which is worth it where few are large, or large ones matter little.
_NEAR = (0.9, 1.5)  # in steps so that 1 is among them: runs that a type can represent are found exactly
_FAR = (1.7, 2.0, 2.4, 2.8, 3.4, 4.0)
_FEW, _MANY = 13, 25  # near ones
_LEAST_SPREAD = 1e-5  # of codes, against their squares: below, a slope is rounding noise
_LEAST_IMPORTANCE = 1e-6  # of the largest in a block, so that each run has a best fit


@dataclasses.dataclass(frozen=True)
class Levels:
    """The values that the codes of a type stand for, before scaling.

    Attributes:
      nearest: from numbers to the values nearest to them, and the codes of these, all float32[...].
      lowest: the first value, that of largest magnitude.
      num_tries: scales of each sign that are worth trying near 1: more where there are more values.
    """

    nearest: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    lowest: float | jax.Array
    num_tries: int


def integers(lowest: int, highest: int) -> Levels:
    """Returns whole numbers as levels, with codes from 0 on."""

    def nearest(x):
        values = jnp.clip(jnp.rint(x), lowest, highest)
        return values, values - lowest

    return Levels(nearest, float(lowest), _FEW if highest - lowest < 16 else _MANY)


def table(values: np.ndarray, shift: float | jax.Array = 0.0) -> Levels:
    """Returns rising `values`, float32[n], made larger by `shift`, as levels; codes are their indices."""

    def nearest(x):
        unshifted = x - shift
        found, codes = jnp.full_like(x, values[0]), jnp.zeros_like(x)
        for lower, upper in zip(values[:-1].tolist(), values[1:].tolist(), strict=True):
            is_above = unshifted > (lower + upper) / 2
            found += jnp.where(is_above, upper - lower, 0.0)
            codes += jnp.where(is_above, 1.0, 0.0)
        return found + shift, codes

    return Levels(nearest, float(values[0]) + shift, _FEW)


def weights_of(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    """Returns the weight of each squared error, from 0 to about 1 within a block.

    Args:
      x: float32[n, size], blocks.
      importance: float32[n, size], not negative, or None. Blocks without any count all errors alike.

    Returns:
      float32[n, size], positive.
    """
    if importance is None:
        return jnp.ones_like(x)
    largest = jnp.max(importance, axis=-1, keepdims=True)
    relative = importance / jnp.where(largest > 0, largest, 1.0)
    return jnp.where(largest > 0, relative, 1.0) + _LEAST_IMPORTANCE


def inverse(scale: jax.Array) -> jax.Array:
    """Returns 1 / scale, and 0 where the scale is 0."""
    result = jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))
    return jax.lax.optimization_barrier(result)  # or XLA divides once for each weight, not for each run


def extreme(x: jax.Array) -> jax.Array:
    """Returns the number of largest magnitude of the last axis with its sign: [..., n] -> [..., 1]."""
    highest, lowest = jnp.max(x, axis=-1, keepdims=True), jnp.min(x, axis=-1, keepdims=True)
    return jnp.where(highest > -lowest, highest, lowest)


def fit_scale(x: jax.Array, weights: jax.Array, *versions: Levels) -> jax.Array:
    """Finds the scale of runs whose weights become `scale * value`.

    Args:
      x: float32[..., size].
      weights: float32[..., size], positive, of the squared errors.
      versions: the values, or several sets of values of which the best may be taken for each run.

    Returns:
      float32[..., 1], of either sign: the lowest value may serve negative or positive weights.
    """

    def best_of(levels):
        def fit(inverse_scale):
            values, _ = levels.nearest(x * inverse_scale)
            along = jnp.sum(weights * values * x, axis=-1, keepdims=True)
            scale = _ratio(along, jnp.sum(weights * values * values, axis=-1, keepdims=True))
            return along * scale, scale

        ratios = _ratios(levels.num_tries)
        return _search(fit, levels.lowest * inverse(extreme(x)), np.concatenate([ratios, -ratios]))

    return functools.reduce(_better, map(best_of, versions))[1]


def fit_line(
    x: jax.Array, weights: jax.Array, highest: int, *, is_offset_negative: bool
) -> tuple[jax.Array, jax.Array]:
    """Finds scale and offset of runs whose weights become `scale * code + offset`.

    Args:
      x: float32[..., size].
      weights: float32[..., size], positive, of the squared errors.
      highest: codes are 0 to `highest`.
      is_offset_negative: whether the offset can only be negative or zero.

    Returns:
      Scale, not negative, and offset: float32[..., 1] each.
    """
    start = jnp.min(x, axis=-1, keepdims=True)
    start = jnp.minimum(start, 0.0) if is_offset_negative else start
    above = x - start  # small numbers also where the offset is large: their sums keep their digits
    highest_offset = -start if is_offset_negative else jnp.full_like(start, jnp.inf)
    total = lambda numbers: jnp.sum(numbers, axis=-1, keepdims=True)
    sum_w, sum_x = total(weights), total(weights * above)

    def fit(inverse_scale, offset):
        codes = jnp.clip(jnp.rint((above - offset) * inverse_scale), 0, highest)
        weighted = weights * codes
        sum_c, sum_cc, sum_cx = total(weighted), total(weighted * codes), total(weighted * above)
        spread = sum_cc * sum_w - sum_c * sum_c
        spread = jnp.where(spread > _LEAST_SPREAD * sum_cc * sum_w, spread, 0.0)
        scale = _ratio(sum_cx * sum_w - sum_c * sum_x, spread)
        offset = (sum_x - scale * sum_c) / sum_w
        is_beyond = offset > highest_offset
        offset = jnp.minimum(offset, highest_offset)
        scale = jnp.where(is_beyond, _ratio(sum_cx - offset * sum_c, sum_cc), scale)
        scale = jnp.maximum(scale, 0.0)
        gain = scale * (2 * sum_cx - scale * sum_cc - 2 * offset * sum_c)
        return gain + offset * (2 * sum_x - offset * sum_w), scale, offset

    full_range = highest * inverse(jnp.max(above, axis=-1, keepdims=True))
    _, scale, offset = _search(fit, full_range, _ratios(_MANY), jnp.zeros_like(start))
    return scale, offset + start


def choose(
    error_of: Callable[..., jax.Array],
    first: tuple[jax.Array, ...],
    steps: np.ndarray,
    limits: tuple[tuple[int, int], ...],
) -> tuple[jax.Array, ...]:
    """Chooses whole numbers with the least error, among some and their neighbours.

    Args:
      error_of: from numbers float32[...] to the error float32[...] that they leave.
      first: the numbers to begin with.
      steps: float32[trials, len(first)], what to add to them in each trial; the first is zeros.
      limits: lowest and highest of each number.

    Returns:
      The chosen numbers; of equal ones the first.
    """

    def try_step(index, best):
        step = jnp.asarray(steps)[index]
        numbers = [
            jnp.clip(number + step[place], *limit)
            for place, (number, limit) in enumerate(zip(first, limits, strict=True))
        ]
        return _better(best, (-error_of(*numbers), *numbers))

    start = (jnp.full_like(first[0], -jnp.inf), *first)
    return jax.lax.fori_loop(0, len(steps), try_step, start)[1:]


def _ratios(num_near):
    return np.concatenate([np.linspace(*_NEAR, num_near), _FAR]).astype(np.float32)


def _search(fit, full_range, ratios, *offsets):
    """Tries `fit`, from inverse scale and offsets to gain, scale and offsets; at last at the best found."""

    def try_ratio(index, best):
        return _better(best, fit(full_range * jnp.asarray(ratios)[index], *offsets))

    start = (jnp.full_like(full_range, -jnp.inf), jnp.zeros_like(full_range), *offsets)
    best = jax.lax.fori_loop(0, len(ratios), try_ratio, start)
    return _better(best, fit(inverse(best[1]), *best[2:]))


def _better(best, new):
    """Takes the tuple whose first member is larger, number by number; a NaN is never larger."""
    return tuple(jnp.where(new[0] > best[0], b, a) for a, b in zip(best, new, strict=True))


def _ratio(part, whole):
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)
