"""Prompts by tiles of bfloat16 numbers (AMX): 16 queries, 16 keys and 32 numbers of them at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights

import cpu_kernels
from cpu_kernels import panels
from mla_jax import quant
from mla_jax.cache import LatentRows, codec
from mla_jax.nn import mla_on_cpu
from mla_jax.quant import dispatch

pytestmark = pytest.mark.usefixtures("tiles")
N, SCALE = 3, 0.1


def _draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _pool(cache_type, rank, rope, batch=2, table=5):
    """Rows of pages of 64 slots, in no order, with NaN in one that no sequence has."""
    pages = np.random.default_rng(3).permutation(batch * table).reshape(batch, table).astype(np.int32)
    parts = [codec.encode(jnp.asarray(_draw(s, batch * table, 64, s)), cache_type) for s in (rank, rope)]
    dead = lambda leaf: jnp.pad(leaf, ((0, 1), (0, 0), (0, 0)), constant_values=_nothing(leaf.dtype))
    latent, rope = jax.tree.map(dead, parts)
    return LatentRows(latent=latent, rope=rope).at(jnp.asarray(pages))


def _nothing(dtype):
    return np.nan if jnp.issubdtype(dtype, jnp.floating) else 0x5A


def _weight(name, rows, rank):
    if name in ("f32", "f16", "bf16"):
        weight = jnp.asarray(
            _draw(6, rows, rank) / 8, dict(f32="float32", f16="float16", bf16="bfloat16")[name]
        )
        return weight, np.asarray(weight, np.float64)
    weight = random_weights.random_weight(name, rows, rank)
    return weight, np.asarray(quant.decode(weight), np.float64)


def _call(q, q_rope, rows, weight, positions):
    """Each head has rows of the weight for its keys, and then those of its values."""
    arrays, format = dispatch.operands(weight)
    size, rows_of_head = q.shape[-1], weight.shape[0] // N
    layout = dict(key_stride=rows_of_head, value_stride=rows_of_head, value_first=size)
    sizes = dict(value_size=rows_of_head - size, scale=SCALE, formats=(format, format))
    cache = mla_on_cpu._cache(rows, jnp.asarray(positions, jnp.int32))
    q, q_rope = jnp.asarray(q), jnp.asarray(q_rope)
    return np.asarray(cpu_kernels.latent_prefill(q, q_rope, arrays, arrays, **layout, **sizes, **cache))


def _queries(rows, positions, size=32):
    shape = (*np.shape(positions), N)
    return _draw(7, *shape, size), _draw(8, *shape, rows.rope.shape[-1])


def _attend(rows, weight, positions):
    return _call(*_queries(rows, positions), rows, weight, positions)


def _definition(q, q_rope, rows, weight, positions):
    """In float64, of a weight [N * (keys, values), rank]."""
    decode = lambda part: np.asarray(codec.decode(part), np.float64)[np.asarray(rows.pages)]
    latent, rope = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in map(decode, (rows.latent, rows.rope)))
    expanded = np.einsum("bsr,nhr->bnsh", latent, weight.reshape(N, -1, latent.shape[-1]))
    keys, values = np.split(expanded, [q.shape[-1]], axis=-1)
    scores = np.einsum("btnh,bnsh->bnts", q, keys) + np.einsum("btnp,bsp->bnts", q_rope, rope)
    seen = np.arange(latent.shape[1]) <= np.asarray(positions)[:, None, :, None]
    scores = np.where(seen, SCALE * scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bnsv->btnv", weights / weights.sum(axis=-1, keepdims=True), values)


def _check(rows, weight, exact, positions, size=32, bound=1e-2):
    q, q_rope = _queries(rows, positions, size)
    q /= np.std(exact) * exact.shape[1] ** 0.5  # for scores as small as those of a model
    expected = _definition(q, q_rope, rows, exact, positions)
    assert np.max(np.abs(_call(q, q_rope, rows, weight, positions) - expected)) < bound * np.max(
        np.abs(expected)
    )


@pytest.mark.parametrize("name", sorted(cpu_kernels.formats()))
def test_every_format(name):
    _check(_pool("f16", 512, 32), *_weight(name, N * 64, 512), [[3, 60, 200], [0, 64, 300]])


@pytest.mark.parametrize("cache_type", ["f16", "bf16", "q8_0", "q4_0", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("rank", "rope", "size", "value_size"), [(64, 32, 48, 16), (96, 32, 33, 65), (288, 64, 128, 50)]
)
def test_sizes_that_are_no_whole_tiles(rank, rope, size, value_size, cache_type):
    positions = np.stack([np.arange(200, 237), np.arange(37)])
    weight = _weight("f32", N * (size + value_size), rank)
    _check(_pool(cache_type, rank, rope), *weight, positions, size)


def test_latents_and_rotary_parts_of_no_whole_registers():
    _check(_pool("f16", 100, 18), *_weight("f32", N * 64, 100), [[130], [5]])


@pytest.mark.parametrize("name", ["q8_0", "q4_K", "q6_K", "iq4_ks"])
def test_panels_are_blocks_to_the_last_bit(name):
    rows, positions = _pool("f16", 256, 32), [[3, 200], [64, 300]]
    weight, _ = _weight(name, N * 64, 256)
    laid_out = panels.pack(np.array(weight.blocks), format=name)
    packed = quant.PanelTensor(panels=jnp.asarray(laid_out), header=weight.header, format=name)
    np.testing.assert_array_equal(_attend(rows, packed, positions), _attend(rows, weight, positions))


@pytest.mark.parametrize("last", [0, 15, 16, 63, 64, 127, 128, 290])
def test_a_token_does_not_see_how_a_prompt_is_cut(last):
    """The same bits alone, as the last of some, and with later ones behind it."""
    rows, (weight, _) = _pool("q8_0", 64, 32, batch=1), _weight("q8_0", N * 64, 64)
    q, q_rope = _queries(rows, np.zeros((1, 320)))

    def of_last(first, end):
        part = slice(max(first, 0), min(end, 320))
        out = _call(q[:, part], q_rope[:, part], rows, weight, np.arange(320)[None, part])
        return out[0, last - part.start]

    alone = of_last(last, last + 1)
    assert np.isfinite(alone).all()
    for before in (1, 3, 14, 16, 63, 128, 290):
        np.testing.assert_array_equal(of_last(last - before, last + 1), alone)
    np.testing.assert_array_equal(of_last(last - 5, last + 140), alone)


@pytest.mark.parametrize("positions", [[100, 200], [130, 200], [157, 158], [128, 191]], ids=str)
@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_what_is_no_number_spoils_only_who_sees_it(spoil, positions):
    """Slot 158, in another tile of slots than those that the first token sees, and in the same."""
    rows, (weight, _) = _pool("f16", 64, 32, batch=1), _weight("f32", N * 64, 64)
    spoiled = dataclasses.replace(rows, latent=rows.latent.at[rows.pages[0, 2], 30].set(spoil))
    out, whole = (_attend(some, weight, [positions]) for some in (spoiled, rows))
    np.testing.assert_array_equal(out[:, 0], whole[:, 0])
    assert np.isnan(out[:, 1]).all()
    heads = 7  # two tokens together are many queries
    q, q_rope = jnp.asarray(_draw(7, 1, 2, heads, 64)), jnp.asarray(_draw(8, 1, 2, heads, 32))
    cache = lambda some: mla_on_cpu._cache(some, jnp.asarray([positions], jnp.int32))
    out, whole = (cpu_kernels.latent_attention(q, q_rope, **cache(x), scale=SCALE) for x in (spoiled, rows))
    np.testing.assert_array_equal(out[:, 0], whole[:, 0])
    assert np.isnan(out[:, 1]).all()


def test_many_queries_of_no_whole_registers():
    """Absorbed, with 16 queries and 4, and rows of 100 and 18 numbers; queries do not see each other."""
    rows, positions = _pool("f16", 100, 18, batch=1), jnp.asarray([[200]], jnp.int32)
    q, q_rope = _draw(7, 1, 1, 20, 100), _draw(8, 1, 1, 20, 18)
    call = lambda q: np.asarray(
        cpu_kernels.latent_attention(
            jnp.asarray(q), jnp.asarray(q_rope), **mla_on_cpu._cache(rows, positions), scale=SCALE
        )
    )
    whole = call(q)
    assert np.isfinite(whole).all()
    q[:, :, :16] = np.nan
    np.testing.assert_array_equal(call(q)[:, :, 16:], whole[:, :, 16:])


@pytest.mark.parametrize("missing", [-1, 2**31 - 1])
def test_what_is_no_page_is_zeros(missing):
    rows, (weight, _) = _pool("q8_0", 64, 32, batch=1), _weight("q8_0", N * 64, 64)
    zero = lambda leaf: leaf.at[rows.pages[0, 1]].set(jnp.zeros((), leaf.dtype))
    zeros = dataclasses.replace(
        rows, latent=jax.tree.map(zero, rows.latent), rope=jax.tree.map(zero, rows.rope)
    )
    hole = rows.at(rows.pages.at[0, 1].set(missing))
    one, other = (_attend(some, weight, [[90, 170]]) for some in (hole, zeros))
    np.testing.assert_array_equal(one, other)
    assert np.ptp(one) > 0


def test_who_keeps_float32_has_exactness():
    _check(_pool("f32", 64, 32), *_weight("f32", N * 64, 64), [[3, 200], [64, 300]], bound=1e-5)


@pytest.mark.parametrize(("score", "is_finite"), [(-np.inf, True), (np.inf, False), (np.nan, False)])
def test_a_score_that_is_no_number_or_endless(score, is_finite):
    """Minus infinity is a weight of zero; where the largest is endless there is no result."""
    rows, (weight, _) = _pool("f16", 64, 32, batch=1), _weight("f32", N * 64, 64)
    spoiled = dataclasses.replace(rows, rope=rows.rope.at[rows.pages[0, 0], 3].set(score))
    q, q_rope = np.zeros((1, 1, N, 32), np.float32), np.ones((1, 1, N, 32), np.float32)
    assert np.isfinite(_call(q, q_rope, spoiled, weight, [[70]])).all() == is_finite
