"""flash_mla_decode: the reference against the definition, and the kernel against the reference."""

import dataclasses
import functools

import cache_parts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_target import lowered_for_gpu, needs_gpu

from mla_jax.config import CACHE_TYPES
from pallas_kernels import cache_tiles
from pallas_kernels import flash_mla_decode as op

N, R, P, G, M = 4, 128, 64, 32, 3
SM_SCALE = 0.1
LENGTHS = (0, 1, G - 1, G, G + 1, 3 * G)
TOLERANCE = {"f32": 1e-5, "bf16": 2e-2}  # of the largest number; float16 products give 3e-3

each_type = pytest.mark.parametrize("name", CACHE_TYPES)
run = functools.partial(op.flash_mla_decode, sm_scale=SM_SCALE)


def make_case(lengths, *, T=1, latent_type="q8_0", rope_type=None, heads=N, rank=R, table=M, page_size=G):
    """A shuffled pool in which every slot that no query sees holds NaN, or any code under a NaN scale."""
    rng = np.random.default_rng(len(lengths))
    B, Z = len(lengths), len(lengths) * table + 3
    pages = rng.permutation(Z)[: B * table].reshape(B, table)
    owned = np.zeros((Z, page_size), bool)
    for b, length in enumerate(lengths):
        slots = np.arange(length)
        owned[pages[b, slots // page_size], slots % page_size] = True
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def spoil(array):
        if not array.size:
            return array
        floats = jnp.issubdtype(array.dtype, jnp.floating)
        nothing = np.full(array.shape, np.nan) if floats else rng.integers(-100, 100, array.shape)
        return jnp.where(jnp.asarray(owned)[..., None], array, jnp.asarray(nothing).astype(array.dtype))

    pool = lambda size, name: tuple(
        map(spoil, cache_parts.part_of(cache_parts.draw(rng, (Z, page_size, size), name)))
    )
    positions = np.maximum(np.asarray(lengths)[:, None] - T + np.arange(T)[None], -1)
    return dict(
        q=draw(B, T, heads, rank),
        q_rope=draw(B, T, heads, P),
        latent=pool(rank, latent_type),
        rope=pool(P, rope_type or latent_type),
        pages=jnp.asarray(pages, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        latent_type=latent_type,
        rope_type=rope_type or latent_type,
    )


def definition(case):
    """Attends in float64, a query at a time, to the slots that it sees and no others."""
    latent, rope = (
        np.asarray(cache_tiles.decode(case[name], case[f"{name}_type"]), np.float64)
        for name in ("latent", "rope")
    )
    q, q_rope, pages, positions = (np.asarray(case[name]) for name in ("q", "q_rope", "pages", "positions"))
    out = np.zeros(q.shape)
    for b, t in np.ndindex(positions.shape):
        slots = np.arange(positions[b, t] + 1)
        page, place = pages[b, slots // latent.shape[1]], slots % latent.shape[1]
        missing = ((page < 0) | (page >= len(latent)))[:, None]
        seen = np.where(missing, 0, latent[page % len(latent), place])
        turned = np.where(missing, 0, rope[page % len(latent), place])
        for n in range(q.shape[2]):
            score = SM_SCALE * (seen @ np.float64(q[b, t, n]) + turned @ np.float64(q_rope[b, t, n]))
            weight = np.exp(score - np.max(score, initial=-np.inf))
            out[b, t, n] = weight @ seen / weight.sum() if len(slots) else 0
    return out


def check_equal(got, expected, tolerance):
    assert np.max(np.abs(np.asarray(got, np.float64) - expected)) <= tolerance * np.max(np.abs(expected))


@each_type
def test_reference_is_the_definition(name):
    case = make_case(LENGTHS, T=4, latent_type=name)
    check_equal(run(**case, implementation="reference"), definition(case), 1e-5)


@each_type
def test_kernel_is_the_reference(name):
    case = make_case(LENGTHS, latent_type=name)
    expected = definition(case)
    assert np.all(expected[0] == 0)
    check_equal(run(**case, implementation="interpret"), expected, TOLERANCE.get(name, 3e-3))


@each_type
def test_kernel_reads_a_rope_of_bf16(name):
    case = make_case((G + 1, 2 * G + 5), latent_type=name, rope_type="bf16")
    check_equal(run(**case, implementation="interpret"), definition(case), TOLERANCE["bf16"])


@pytest.mark.parametrize(("T", "heads"), [(4, 3), (8, 20)])
def test_kernel_takes_a_few_tokens(T, heads):
    case = make_case((0, 1, T, G + 2), T=T, heads=heads)
    check_equal(run(**case, implementation="interpret"), definition(case), 3e-3)


@pytest.mark.parametrize(
    ("name", "splits", "prefetch"), [("q4_0", 2, False), ("q4_0", 8, True), ("bf16", 3, True)]
)
def test_splits_change_nothing(name, splits, prefetch):
    case = make_case(LENGTHS, T=2, latent_type=name)
    config = op.Config(slots=16, prefetch=prefetch)
    once = run(**case, implementation="interpret", config=config)
    split = dataclasses.replace(config, splits=splits)
    for got in (once, run(**case, implementation="interpret", config=split)):
        check_equal(got, definition(case), TOLERANCE.get(name, 3e-3))


def test_a_result_keeps_the_dtype_of_the_queries():
    case = make_case((G,))
    case |= {name: case[name].astype(jnp.bfloat16) for name in ("q", "q_rope")}
    for splits in (1, 2):
        got = run(**case, implementation="interpret", config=op.Config(splits=splits))
        assert got.dtype == jnp.bfloat16
        check_equal(got, definition(case), 1e-2)


def test_rows_do_not_depend_on_their_neighbours():
    case, order = make_case(LENGTHS, T=2), jnp.asarray([2, 0, 3, 5, 1, 4])
    moved = case | {name: case[name][order] for name in ("q", "q_rope", "pages", "positions")}
    expected = run(**case, implementation="interpret")[order]
    assert np.array_equal(run(**moved, implementation="interpret"), expected)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("nowhere", [-1, 99])
def test_a_missing_page_reads_as_zeros(implementation, nowhere):
    case = make_case((3 * G - 1,))
    case |= dict(pages=case["pages"].at[0, 1].set(nowhere))
    check_equal(run(**case, implementation=implementation), definition(case), 3e-3)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_positions_past_the_table_see_what_there_is(implementation):
    case = make_case((3 * G,))
    past = case | dict(positions=case["positions"] + 100)
    expected = run(**case, implementation=implementation)
    assert np.array_equal(run(**past, implementation=implementation), expected)


@pytest.mark.parametrize("latent_type", CACHE_TYPES)
@pytest.mark.parametrize(("heads", "rope"), [*((n, "own") for n in (16, 20, 64, 128)), (16, "bf16")])
def test_lowers_for_a_gpu(latent_type, heads, rope):
    rope_type = latent_type if rope == "own" else rope
    shapes = jax.eval_shape(lambda: _arrays(latent_type, heads, rope_type))
    call = functools.partial(run, latent_type=latent_type, rope_type=rope_type)
    assert "flash_mla_decode" in lowered_for_gpu(call, **shapes)


def _arrays(latent_type, heads, rope_type=None, *, num_pages=64):
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)

    def pool(size, name):
        return cache_parts.part_of(jax.tree.map(zeros, cache_parts.shapes((num_pages, 64, size), name)))

    return dict(
        q=jnp.zeros((2, 1, heads, 512), jnp.bfloat16),
        q_rope=jnp.zeros((2, 1, heads, 64), jnp.bfloat16),
        latent=pool(512, latent_type),
        rope=pool(64, rope_type or latent_type),
        pages=jnp.zeros((2, 32), jnp.int32),
        positions=jnp.zeros((2, 1), jnp.int32),
    )


def test_without_a_gpu_the_reference_computes():
    shapes = jax.eval_shape(lambda: _arrays("q8_0", 16))
    lowered = jax.jit(functools.partial(run, latent_type="q8_0", rope_type="q8_0")).trace(**shapes).lower()
    assert "triton" not in lowered.as_text()


@pytest.mark.parametrize("latent_type, bits", [("q8_0", 8), ("fp8_e4m3", 8), ("q4_0", 4)])
def test_a_pool_of_two_to_four_gibibytes_is_refused(latent_type, bits):
    num_pages = 2**31 * 8 // (bits * 64 * 512)
    shapes = lambda pages: jax.eval_shape(lambda: _arrays(latent_type, 16, num_pages=pages))
    call = functools.partial(run, latent_type=latent_type, rope_type=latent_type)
    triton = functools.partial(call, implementation="triton")
    jax.eval_shape(triton, **shapes(num_pages))
    with pytest.raises(NotImplementedError, match="latent must have at most"):
        jax.eval_shape(triton, **shapes(num_pages + 1))
    assert "triton" not in lowered_for_gpu(call, **shapes(num_pages + 1))


@pytest.mark.parametrize(
    ("changes", "word"),
    [(dict(rank=96), "power of two"), (dict(page_size=24), "multiple of 16 slots")],
    ids=["rank", "page size"],
)
def test_what_the_kernel_cannot_take_the_reference_computes(changes, word):
    case = make_case((5,), **changes)
    with pytest.raises(NotImplementedError, match=word):
        run(**case, implementation="interpret")
    check_equal(run(**case), definition(case), 1e-5)


@pytest.mark.parametrize(
    ("sizes", "pairs", "splits"),
    [
        (dict(batch=1, pairs=16, slots=65536, shared_memory=227 << 10), 16, 128),
        (dict(batch=128, pairs=128, slots=65536, shared_memory=227 << 10), 64, 2),
        (dict(batch=128, pairs=128, slots=65536, shared_memory=99 << 10), 16, 1),
        (dict(batch=1, pairs=128, slots=256, shared_memory=227 << 10), 64, 1),
    ],
)
def test_config_fills_the_gpu(sizes, pairs, splits):
    config = op.Config.for_shapes(latent_type="q8_0", **sizes)
    assert (config.pairs, config.splits) == (pairs, splits)


@pytest.mark.parametrize(
    ("latent_type", "slots", "num_stages"),
    [("bf16", 32, 4), ("q8_0", 32, 4), ("fp8_e4m3", 32, 4), ("q4_0", 64, 2)],
)
def test_large_tiles_are_those_that_compile(latent_type, slots, num_stages):
    """Compiled by benchmarks/gpu_compile.py: 64 slots of one byte do not fit an H200."""
    sizes = dict(batch=1, pairs=128, slots=65536, shared_memory=227 << 10)
    config = op.Config.for_shapes(latent_type=latent_type, **sizes)
    assert (config.pairs, config.slots, config.num_stages) == (64, slots, num_stages)


def test_cost_counts_the_arrays():
    arrays = _arrays("q4_0", 16)
    cost = op.cost(
        batch=2,
        tokens=1,
        heads=16,
        rank=512,
        rope=64,
        cached_tokens=64 * 64,
        latent_type="q4_0",
        rope_type="q4_0",
    )
    cached = sum(array.nbytes for part in (arrays["latent"], arrays["rope"]) for array in part)
    assert cost.bytes_accessed == cached + 2 * arrays["q"].nbytes + arrays["q_rope"].nbytes
    assert cost.flops == 2 * 16 * 64 * 64 * (512 + 512 + 64)


@needs_gpu
@pytest.mark.gpu
@each_type
@pytest.mark.parametrize(("T", "heads"), [(1, 16), (1, 128), (4, 20)])
def test_compiled_kernel_is_the_reference(name, T, heads):
    case = make_case(
        (0, 1, 63, 64, 65, 1000), T=T, latent_type=name, heads=heads, rank=512, table=16, page_size=64
    )
    got = run(**case, implementation="triton")
    check_equal(got, run(**case, implementation="reference"), TOLERANCE.get(name, 3e-3))
