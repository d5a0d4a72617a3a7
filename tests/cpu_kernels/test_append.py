"""New rows of the cache: what is kept of a token is what the codec gives, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG

import cpu_kernels
from mla_jax import sampler, steps
from mla_jax.cache import LatentRows, codec, init_cache, init_pool, rotate
from mla_jax.config import CACHE_TYPES, RunConfig
from mla_jax.nn import rope, transformer

B, T, G, M, R, P = 3, 5, 4, 3, 96, 64
EPSILON = 1e-6
FREQUENCIES = (10000.0 ** -np.linspace(0, 1, P // 2)).astype(np.float32)
SIZES = {"no number": np.nan, "infinite": np.inf, "huge": -3e38, "beyond float16": 1e30, "tiny": 1e-42}

REFITTED = ("q6_0", "q4_0", "iq4_nl")  # whose scale is a ratio of sums, which XLA adds in an order of its own

HALF, NONE = jnp.ones((B, T, 8)), jnp.zeros((0,), jnp.uint8)  # the angles of 16 numbers, and no plane

each_type = pytest.mark.parametrize("name", CACHE_TYPES)


def _garbage(name, size, Z):
    """A part of the cache with NaN in every number and scale, under codes of any kind."""
    fill = lambda leaf: jnp.asarray(jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 77, leaf.dtype)
    empty = codec.empty((Z, G, size), name)
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, fill(leaf)), empty)


def _case(seed=0, tokens=T):
    """Tokens on pages in no order; one past the end, one on a page that is none, one at no slot."""
    rng = np.random.default_rng(seed)
    pages = rng.permutation(B * M + 2)[: B * M].reshape(B, M).astype(np.int32)
    slots = np.stack([rng.permutation(M * G)[:tokens] for _ in range(B)]).astype(np.int32)
    pages[2, 2] = B * M + 2
    if tokens > 1:
        slots[0, 0], slots[1, 0] = M * G, -1
    kv = rng.standard_normal((B, tokens, R + P)).astype(np.float32)
    return kv, pages, slots


def _append(kv, norm, pages, slots, rows, rotation=None, is_first=False):
    """Also returns what is kept of each token, by the kernels that stand alone."""
    kv, slots = jnp.asarray(kv), jnp.asarray(slots)
    angles = rope.cos_and_sin(jnp.zeros_like(slots) if is_first else slots + 1000, FREQUENCIES)
    latent = cpu_kernels.rms_norm(kv[..., :R], norm, epsilon=EPSILON)
    rotated = cpu_kernels.split_queries(kv[:, :, None, R:], *angles)[1][:, :, 0]
    rows = rows.at(jnp.asarray(pages))
    settings = dict(epsilon=EPSILON, latent_rotation=rotation, rope_rotation=rotation)
    appended = rows.append_by(cpu_kernels.latent_append, kv, norm, *angles, slots, **settings)
    return appended, (rotate(latent, rotation), rotate(rotated, rotation))


def _expected(rows, parts, pages, slots):
    """Sets the rows of the tokens that have a place one after the other."""
    pools = []
    for pool, part in zip((rows.latent, rows.rope), parts, strict=True):
        encoded = codec.encode(part, codec.type_of(pool))
        old, new = ([np.array(leaf) for leaf in jax.tree.leaves(tree)] for tree in (pool, encoded))
        num_written = 0
        for b, t in np.ndindex(slots.shape):
            slot = slots[b, t]
            page = pages[b, slot // G] if 0 <= slot < M * G else -1
            if 0 <= page < len(old[0]):
                num_written += 1
                for target, source in zip(old, new, strict=True):
                    target[page, slot % G] = source[b, t]
        assert num_written > slots.size // 2
        pools.append(old)
    return pools


def _same(found, wanted):
    np.testing.assert_array_equal(*(np.asarray(array).astype(np.float32) for array in (found, wanted)))


def _same_rows(found, wanted):
    """Compares what is kept, as numbers: codes under a NaN do not count, and few refits may differ."""
    name = codec.type_of(found)
    decoded, expected = (np.asarray(codec.decode(part)) for part in (found, wanted))
    if name not in REFITTED:
        np.testing.assert_array_equal(decoded, expected)
        return
    np.testing.assert_allclose(decoded, expected, rtol=2**-10, atol=1e-30)  # a unit in the scale's last place
    differ = (decoded != expected) & ~(np.isnan(decoded) & np.isnan(expected))
    blocks = differ.reshape(*differ.shape[:-1], -1, 32).any(axis=-1)
    assert blocks.sum() <= max(1, 2e-3 * blocks.size)


def _check(kv, pages, slots, name, rope_name=None, rotation=None):
    norm = jnp.asarray(np.random.default_rng(9).standard_normal(R), jnp.float32)
    rows = LatentRows(latent=_garbage(name, R, B * M + 2), rope=_garbage(rope_name or name, P, B * M + 2))
    appended, parts = _append(kv, norm, pages, slots, rows, rotation)
    expected = _expected(rows, parts, pages, slots)
    for pool, leaves in zip((appended.latent, appended.rope), expected, strict=True):
        _same_rows(pool, jax.tree.unflatten(jax.tree.structure(pool), leaves))
    return appended


@each_type
@pytest.mark.parametrize("tokens", [1, T])
def test_rows_are_those_of_the_codec(name, tokens, instruction_set):
    _check(*_case(tokens=tokens), name)


@each_type
@pytest.mark.parametrize("rotation", [2, 32])
def test_rows_are_rotated_before_they_are_encoded(name, rotation):
    _check(*_case(), name, rotation=rotation)


@pytest.mark.parametrize("names", [("q8_0", "f16"), ("f16", "q6_0"), ("bf16", "q5_1"), ("q8_KV", "iq4_nl")])
def test_parts_may_be_of_two_types(names, instruction_set):
    _check(*_case(), *names)


@each_type
@pytest.mark.parametrize("kind", SIZES)
def test_numbers_at_the_ends_of_their_range(name, kind, instruction_set):
    """In the rotary part, which no norm brings into the middle."""
    kv, pages, slots = _case()
    slots[:] = np.arange(T) + 1
    kv[0, 1, R + 7], kv[1, 2, R:] = SIZES[kind], SIZES[kind]
    appended = _check(kv, pages, slots, name)
    dense = np.asarray(codec.decode(appended.rope))[pages[2, :2]].reshape(-1, P)[1 : T + 1]
    assert np.isfinite(dense).all()  # the third sequence has only numbers


@each_type
def test_many_roundings(name, instruction_set):
    """Of 3,000 rows of any size, halves between two codes among them."""
    rng = np.random.default_rng(5)
    kv = rng.standard_normal((1, 3000, R + P)).astype(np.float32)
    kv[:, :, R:] *= np.float32(10) ** rng.uniform(-12, 9, (1, 3000, 1)).astype(np.float32)
    kv[:, 1000:2000, R:] = rng.integers(-254, 255, (1, 1000, P)) / np.float32(2)
    pages, slots = np.arange(750, dtype=np.int32)[None], np.arange(3000, dtype=np.int32)[None]
    norm = jnp.ones((R,), jnp.float32)
    rows = LatentRows(latent=_garbage(name, R, 750), rope=_garbage(name, P, 750))
    appended, parts = _append(kv, norm, pages, slots, rows, is_first=True)  # which leaves halves as they are
    for pool, part in zip((appended.latent, appended.rope), parts, strict=True):
        wanted = codec.encode(part[0], name)
        _same_rows(jax.tree.map(lambda leaf, other: leaf.reshape(other.shape), pool, wanted), wanted)


def test_no_tokens_change_nothing():
    kv, pages, slots = _case(tokens=0)
    rows = LatentRows(latent=_garbage("q8_0", R, B * M + 2), rope=_garbage("q8_0", P, B * M + 2))
    appended, _ = _append(kv, jnp.ones((R,)), pages, slots, rows)
    jax.tree.map(_same, appended.at(None), rows)


@pytest.mark.parametrize("page", [-1, -(2**31), B * M + 2, 2**31 - 1])
def test_numbers_that_are_no_page_drop_their_tokens(page):
    """As the kernel gets them: who has `LatentRows` never hands on a negative one."""
    kv, pages, slots = map(jnp.asarray, _case())
    parts = [codec.parts(_garbage("q8_0", size, B * M + 2)) for size in (R, P)]
    angles = rope.cos_and_sin(slots, FREQUENCIES)
    arguments = dict(latent_type="q8_0", rope_type="q8_0", epsilon=EPSILON)
    nowhere = jnp.full_like(pages, page)
    written = cpu_kernels.latent_append(kv, jnp.ones((R,)), *angles, nowhere, slots, *parts, **arguments)
    jax.tree.map(_same, written, tuple(parts))


def test_a_donated_cache_stays_where_it_is():
    kv, pages, slots = _case()
    rows = LatentRows(latent=_garbage("q8_0", R, B * M + 2), rope=_garbage("q8_0", P, B * M + 2))
    append = lambda rows: _append(kv, jnp.ones((R,)), pages, slots, rows)[0].at(None)
    text = jax.jit(append, donate_argnums=0).lower(rows).compile().as_text()
    assert "output_to_operand_aliasing" in text and " copy(" not in text


def test_steps_of_decode_copy_no_part_of_the_cache():
    run, config = RunConfig(cache_type="f16"), CONFIG
    cache = init_pool(config, run, batch=1, num_pages=7, page_size=16)
    arrays = dict(
        params=jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), config)),
        tokens=jnp.zeros((1,), jnp.int32),
        recent=jnp.zeros((1, sampler.NUM_RECENT), jnp.int32),
        cache=cache,
        sampling=sampler.batch([sampler.SamplingParams(temperature=0.0, seed=0)]),
        num_steps=jnp.int32(4),
        eog_ids=jnp.zeros((1,), jnp.int32),
        pages=jnp.arange(7, dtype=jnp.int32)[None],
    )
    text = steps.decode.lower(**arrays, config=config, run=run).compile().as_text()
    copies = [line for line in text.splitlines() if " copy(" in line]
    assert "mla_latent_append" in text and copies and not [line for line in copies if "f16[7,16" in line]


def test_under_vmap_every_sequence_has_its_own_cache():
    kv, _, slots = _case()
    slots = np.clip(slots, 0, M * G - 1)
    pages, norm = np.arange(M, dtype=np.int32)[None], jnp.ones((R,), jnp.float32)
    rows = LatentRows(latent=_garbage("q8_0", R, M), rope=_garbage("q8_0", P, M))
    one = lambda kv, slots: _append(kv[None], norm, pages, slots[None], rows)[0].at(None)
    together = jax.vmap(one)(jnp.asarray(kv), jnp.asarray(slots))
    for b in range(B):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[b], y), together, one(kv[b], slots[b]))  # noqa: B023


@pytest.mark.parametrize("name", CACHE_TYPES)
@pytest.mark.parametrize("rotation", [None, 64])
def test_the_model_appends_by_the_kernel(name, rotation):
    config = dataclasses.replace(CONFIG, mla=dataclasses.replace(CONFIG.mla, qk_rope_head_dim=64))
    run = RunConfig(cache_type=name, hadamard_size=rotation)
    step = lambda params, cache: transformer.apply(params, jnp.zeros((1, 1), jnp.int32), cache, config, run)
    params = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), config))
    text = jax.jit(step).lower(params, init_cache(config, run, batch=1, ctx_size=256)).as_text()
    assert "mla_latent_append" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pages=jnp.zeros((2, M), jnp.int32)), "norm, angles, slots and pages do not fit"),
        (dict(norm=jnp.ones((R + P + 2,))), "norm, angles, slots and pages do not fit"),
        (dict(kv=jnp.ones((B * T, R + P))), "must have three axes"),
        (dict(latent_type="q3_0"), "no encoder of cache type q3_0"),
        (dict(latent_rotation=64), f"rows of {R} numbers have no runs of 64"),
        (dict(rope_rotation=6), f"rows of {P} numbers have no runs of 6"),
        (dict(rope_rotation=-2), f"rows of {P} numbers have no runs of -2"),
        (dict(latent_type="f32"), f"do not fit rows of {R} numbers of type f32"),
        (dict(rope_type="q8_0"), f"do not fit rows of {P} numbers of type q8_0"),
        (
            dict(kv=jnp.ones((B, T, R + 16)), cos=HALF, sin=HALF, rope=(NONE,) * 4, rope_type="q4_0"),
            "do not fit rows of 16 numbers of type q4_0",
        ),
        (dict(rope=codec.parts(_garbage("q8_0", P, 4)), rope_type="q8_0"), f"do not fit rows of {P} numbers"),
        (dict(rope=codec.parts(_garbage("q8_0", P * 2, 11)), rope_type="f16"), "arrays that its types lack"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    kv, pages, slots = map(jnp.asarray, _case())
    cos, sin = rope.cos_and_sin(slots, FREQUENCIES)
    latent, rotary = (codec.parts(_garbage("f16", size, 11)) for size in (R, P))
    arguments = dict(kv=kv, norm=jnp.ones((R,)), cos=cos, sin=sin, pages=pages, slots=slots)
    arguments |= dict(latent=latent, rope=rotary, latent_type="f16", rope_type="f16", epsilon=EPSILON)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(cpu_kernels.latent_append(**arguments | change))
