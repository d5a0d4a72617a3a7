"""How a block of numbers becomes codes: the rules of ggml for weights, and of ik_llama.cpp for a cache.

Each takes float32[..., blocks, n] and returns codes of the same shape, and scale and offset (None where the
type has none) float32[..., blocks], still unrounded: codes are chosen by the unrounded scale. Codes of the
8-bit types are signed, all others count from 0. GPU kernels call them too, so they do without what Pallas
cannot lower to Triton: `rint`, gathers, `any`, optimisation barriers.

q4_0, q6_0 and iq4_nl refit their scale once the codes are known: the least squares solution for codes c,
weighted by the squares of the values, d = sum(x^2 c x) / sum(x^2 c^2).

Source: iqk_quantize.cpp and ggml-quants.c of ik_llama.cpp; restated, and tested code for code against it.
"""

import jax
import jax.numpy as jnp

from mla_jax.quant.i_quants import VALUES_4

_MIDPOINTS = (VALUES_4[1:] + VALUES_4[:-1]) / 2
_MAX_MOVES = 1024  # no block comes near it; a bound in case rounding makes the search go in a circle


def q8_0(x):
    """Rounds to the nearest multiple of the largest magnitude / 127, ties to even."""
    largest = jnp.max(jnp.abs(x), axis=-1)
    inverse = 127.0 / largest
    inverse = jnp.where(jnp.isfinite(inverse), inverse, 0.0)  # of zeros, or numbers too small for a scale
    return _nearest(x * inverse[..., None], -128.0, 127.0), _divide(largest, 127.0), None


def q8_kv(x):
    """As `q8_0`, but codes come from the reciprocal of the rounded scale; a block is a whole row."""
    scale = _divide(jnp.max(jnp.abs(x), axis=-1), 127.0)
    return _nearest(x * _inverse(scale, 1.0)[..., None], -128.0, 127.0), scale, None


def q6_0(x):
    """Puts the number of largest magnitude at code 0, and refits the scale."""
    return _from_extreme(x, 32, refit=True)


def q5_0(x):
    """Puts the number of largest magnitude at code 0."""
    return _from_extreme(x, 16, refit=False)


def q5_1(x):
    """Spreads the codes evenly from the smallest to the largest number."""
    return _from_minimum(x, 31)


def q4_1(x):
    """Spreads the codes evenly from the smallest to the largest number."""
    return _from_minimum(x, 15)


def q4_0(x):
    """Puts the number of largest magnitude at code 0, rounds ties to even, and refits the scale."""
    largest, smallest = jnp.max(x, axis=-1), jnp.min(x, axis=-1)
    extreme = jnp.where(jnp.abs(largest) > jnp.abs(smallest), largest, smallest)
    inverse = jnp.where(jnp.abs(extreme) > 1e-13, _inverse(extreme, -8.0), 0.0)
    codes = _nearest(x * inverse[..., None], -8.0, 7.0)
    return codes + 8.0, _refit(x, codes, x * x, extreme / -8.0), None


def q4_0_plain(x):
    """Puts the number of largest magnitude at code 0: what files have, where a cache has `q4_0`."""
    return _from_extreme(x, 8, refit=False)


def iq4_nl(x):
    """Takes the nearest of 16 uneven levels, refits, then moves single codes as long as the fit improves."""
    extreme = _extreme(x)
    scaled = x * _inverse(extreme, float(VALUES_4[0]))[..., None]
    codes = sum((scaled >= float(midpoint)).astype(jnp.int32) for midpoint in _MIDPOINTS)
    codes = jnp.where(extreme[..., None] == 0, 0, codes)
    state = codes, *_fit(x, _level(codes), x * x), extreme != 0
    step = lambda i_state: (i_state[0] + 1, _move_one_code(x, *i_state[1]))
    goes_on = lambda i_state: _any(i_state[1][-1]) & (i_state[0] < _MAX_MOVES)
    _, (codes, along, length, _) = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state))
    return codes, jnp.where(length > 0, along / length, 0.0), None


def _level(codes):
    level = jnp.full(codes.shape, float(VALUES_4[0]))
    for code, value in enumerate(VALUES_4[1:], start=1):
        level = jnp.where(codes >= code, float(value), level)
    return level


def _move_one_code(x, codes, along, length, moves):
    """Moves the code whose step needs the least push, in each block that still `moves`, unless that is worse.

    `along` is sum(x^2 c x) and `length` sum(x^2 c^2): the best scale is their ratio, and the error that is
    left falls as along^2 / length grows.
    """
    level, weight, scale = _level(codes), x * x, along / length
    slope = scale[..., None] * weight * (x - scale[..., None] * level)
    moved = codes + jnp.sign(slope).astype(jnp.int32)
    change = _level(jnp.clip(moved, 0, 15)) - level
    is_possible = (slope != 0) & (moved >= 0) & (moved <= 15)
    push = jnp.where(is_possible, change / jnp.where(is_possible, slope, 1.0), jnp.inf)
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    chosen = places == jnp.argmin(push, axis=-1, keepdims=True)
    pick = lambda numbers: jnp.sum(jnp.where(chosen, numbers, 0), axis=-1)
    old, new = pick(level), pick(level) + pick(change)
    new_along = along + pick(weight) * pick(x) * (new - old)
    new_length = length + pick(weight) * (new * new - old * old)
    improves = _any(is_possible, axis=-1) & (new_length > 0)
    improves &= new_along * new_along > scale * along * new_length
    moves &= improves
    codes = jnp.where(moves[..., None] & chosen, moved, codes)
    return codes, jnp.where(moves, new_along, along), jnp.where(moves, new_length, length), moves


def _from_extreme(x, half, *, refit):
    """Codes of `half` below to `half - 1` above zero; the scale has the sign that puts the extreme at 0."""
    extreme = _extreme(x)
    scaled = x * _inverse(extreme, -float(half))[..., None]
    codes = jnp.minimum(jnp.trunc(scaled + (half + 0.5)), 2.0 * half - 1.0)
    scale = extreme / -float(half)
    if refit:
        scale = _refit(x, codes - half, scaled * scaled, scale)
    return codes, scale, None


def _from_minimum(x, largest_code):
    smallest = jnp.min(x, axis=-1)
    spread = jnp.max(x, axis=-1) - smallest
    scaled = (x - smallest[..., None]) * _inverse(spread, float(largest_code))[..., None]
    codes = jnp.minimum(jnp.trunc(scaled + 0.5), float(largest_code))
    return codes, _divide(spread, largest_code), smallest


def _extreme(x):
    """Returns the number of largest magnitude of each block with its sign, of several the first."""
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    is_extreme = places == jnp.argmax(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.sum(jnp.where(is_extreme, x, 0.0), axis=-1)


def _inverse(extreme, code):
    """Returns the factor that brings `extreme` to `code`, by way of the scale; 0 for a block of zeros."""
    scale = _divide(extreme, code)
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def _divide(x, constant):
    """Divides; were the divisor a constant, XLA would multiply by its rounded reciprocal."""
    return x / jnp.where(jnp.isnan(x), x, constant)


def _nearest(x, smallest, largest):
    """Rounds to whole numbers in a range of less than 2**23, ties to even.

    The sum has no bits for a fraction. Its sign hides from XLA that it could be left out, and the clip comes
    first so that no compiler fuses it with the product that `x` is.
    """
    x = jnp.clip(x, smallest, largest)
    shift = jnp.where(x < 0, -(2.0**23), 2.0**23)
    return (x + shift) - shift


def _any(conditions, axis=None):
    return jnp.max(conditions.astype(jnp.int32), axis=axis) > 0


def _fit(x, codes, weights):
    """Returns the two sums of a refit.

    Products are rounded before they are added, so that sums are the same in any batch: compilers fuse some of
    the two and not others. NaN hides from them that the choice could be left out.
    """
    rounded = lambda products: jnp.where(products == products, products, jnp.nan)
    return tuple(jnp.sum(rounded(weights * codes * other), axis=-1) for other in (x, codes))


def _refit(x, codes, weights, scale):
    along, length = _fit(x, codes, weights)
    return jnp.where(length > 0, along / jnp.where(length > 0, length, 1.0), scale)
