"""latent_append: the kernel against its reference, and the reference against the modules it stands for."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cache_parts import part_of
from gpu_target import lowered_for_gpu, needs_gpu

from mla_jax import cache
from mla_jax.cache import codec
from mla_jax.config import CACHE_TYPES, PLAIN_CACHE_TYPES
from mla_jax.nn import layers, rope
from pallas_kernels import cache_tiles
from pallas_kernels import latent_append as op

EPSILON = 1e-6
FREQUENCIES = (10000.0 ** -np.linspace(0, 1, 32)).astype(np.float32)
PARTS = ("low", "high", "scale", "offset")

each_type = pytest.mark.parametrize("name", CACHE_TYPES)


def quantiser(name):
    return None if name in codec.PLAIN else codec.BLOCK_TYPES[name].quantise


def to_stored(parts, name):
    """Returns the array or `Codes` of the four arrays of a part."""
    if name in codec.PLAIN:
        return parts[0]
    fields = {field: part if part.size else None for field, part in zip(PARTS, parts, strict=True)}
    return codec.Codes(**fields, type=name)


def garbage(name, Z, G, size, rng):
    """Returns a pool in which numbers, scales and offsets are NaN and codes are random."""

    def fill(part):
        if jnp.issubdtype(part.dtype, jnp.floating):
            return jnp.full(part.shape, jnp.nan, part.dtype)
        return jnp.asarray(rng.integers(0, 100, part.shape), part.dtype)

    return jax.tree.map(fill, part_of(codec.empty((Z, G, size), name)))


def make_case(name, *, rope_name=None, B=3, T=2, R=128, P=64, G=4, M=3, rotations=(None, None)):
    """Tokens on shuffled pages, on both sides of the end of a page, and two that are dropped."""
    rope_name, rng = rope_name or name, np.random.default_rng(7)
    Z = B * M + 2
    pages = rng.permutation(Z)[: B * M].reshape(B, M)
    slots = rng.permuted(np.tile(np.arange(5, 2 * G), (B, 1)), axis=1)[:, :T]
    slots[0, :2], slots[1, 0], slots[2, 0] = (3, 4)[:T], M * G, 2 * G
    pages[2, 2] = Z
    positions = slots + 100
    angle = positions[..., None] * FREQUENCIES[: P // 2]
    return dict(
        latent=jnp.asarray(
            rng.standard_normal((B, T, R)) * np.exp(rng.standard_normal((B, T, 1))), jnp.float32
        ),
        rope=jnp.asarray(rng.standard_normal((B, T, P)), jnp.float32),
        norm=jnp.asarray(rng.uniform(0.5, 2, (R,)), jnp.float32),
        cos=jnp.cos(jnp.asarray(angle, jnp.float32)),
        sin=jnp.sin(jnp.asarray(angle, jnp.float32)),
        pages=jnp.asarray(pages, jnp.int32),
        slots=jnp.asarray(slots, jnp.int32),
        latent_pool=garbage(name, Z, G, R, rng),
        rope_pool=garbage(rope_name, Z, G, P, rng),
    ), dict(
        latent_type=name,
        rope_type=rope_name,
        epsilon=EPSILON,
        latent_rotation=rotations[0],
        rope_rotation=rotations[1],
        quantisers=(quantiser(name), quantiser(rope_name)),
    )


def rotations_of(name):
    return (None, None) if name in PLAIN_CACHE_TYPES else (64, 32)


def leaves(pools):
    """Returns (name, numpy array) of each part."""
    names = [f"{part} {field}" for part in ("latent", "rope") for field in PARTS]
    return [(name, np.asarray(array)) for name, array in zip(names, jax.tree.leaves(pools), strict=True)]


def assert_same_bits(found, expected):
    for (name, got), (_, wanted) in zip(leaves(found), leaves(expected), strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8), err_msg=name)


def assert_same_to_rounding(found, expected):
    """Sums of squares may be added in another order: numbers and scales may be a unit off, codes may not."""
    for (name, got), (_, wanted) in zip(leaves(found), leaves(expected), strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        if not jnp.issubdtype(got.dtype, jnp.floating):
            np.testing.assert_array_equal(got, wanted, err_msg=name)
        else:
            unit = 1e-6 if got.dtype == np.float32 else float(jnp.finfo(got.dtype).eps)
            got, wanted = got.astype(np.float32), wanted.astype(np.float32)
            np.testing.assert_allclose(got, wanted, rtol=unit, err_msg=name)


@functools.partial(jax.jit, static_argnames=("latent_type", "rope_type", "latent_rotation", "rope_rotation"))
def composed(latent, rope_part, norm, positions, pages, slots, pools, **how):
    """The modules of the model, one after the other."""
    rows = cache.LatentRows(
        latent=to_stored(pools[0], how["latent_type"]),
        rope=to_stored(pools[1], how["rope_type"]),
        pages=pages,
    )
    latent = layers.RMSNorm(EPSILON).apply({"params": {"weight": norm}}, latent)
    latent = cache.rotate(latent, how["latent_rotation"])
    rope_part = rope.rotate(rope_part, positions, FREQUENCIES[: rope_part.shape[-1] // 2])
    rows = rows.append(latent, cache.rotate(rope_part, how["rope_rotation"]), slots)
    return part_of(rows.latent), part_of(rows.rope)


def compose(arrays, how):
    how = {key: value for key, value in how.items() if key not in ("epsilon", "quantisers")}
    positions, pools = arrays["slots"] + 100, (arrays["latent_pool"], arrays["rope_pool"])
    tokens = (arrays[key] for key in ("latent", "rope", "norm"))
    return composed(*tokens, positions, arrays["pages"], arrays["slots"], pools, **how)


@each_type
def test_kernel_matches_reference(name):
    arrays, how = make_case(name, rotations=rotations_of(name))
    expected = op.latent_append(**arrays, **how, implementation="reference")
    assert_same_to_rounding(op.latent_append(**arrays, **how, implementation="interpret"), expected)


@each_type
def test_reference_is_norm_rotation_and_append(name):
    arrays, how = make_case(name, rotations=rotations_of(name))
    found = op.latent_append(**arrays, **how, implementation="reference")
    assert_same_to_rounding(found, compose(arrays, how))


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_types_of_the_parts_are_independent_and_rows_of_512_rotate(implementation):
    arrays, how = make_case("q4_0", rope_name="bf16", R=512, B=3, T=1, rotations=(512, None))
    found = op.latent_append(**arrays, **how, implementation=implementation)
    assert_same_to_rounding(found, compose(arrays, how))


def test_reference_is_its_definition():
    arrays, how = make_case("f32", rotations=(64, 32))
    pools = op.latent_append(**arrays, **how, implementation="reference")
    x, y, norm, cos, sin = (
        np.asarray(arrays[key], np.float64) for key in ("latent", "rope", "norm", "cos", "sin")
    )
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * norm
    turned = (y[..., ::2] + 1j * y[..., 1::2]) * (cos + 1j * sin)
    y = np.stack([turned.real, turned.imag], axis=-1).reshape(y.shape)
    for part, rows, size in zip(pools, (x, y), (64, 32), strict=True):
        matrix = np.ones((1, 1))
        while len(matrix) < size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        rows = (rows.reshape(-1, size) @ matrix).reshape(rows.shape) / np.sqrt(size)
        for b, t in ((0, 0), (0, 1), (1, 1), (2, 1)):
            page, place = np.divmod(arrays["slots"][b, t], 4)
            np.testing.assert_allclose(part[0][arrays["pages"][b, page], place], rows[b, t], atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("name", ["f32", "q8_0", "q5_1"])
def test_only_the_rows_of_kept_tokens_change(name, implementation):
    arrays, how = make_case(name, rotations=rotations_of(name))
    pools = op.latent_append(**arrays, **how, implementation=implementation)
    pages, slots = np.asarray(arrays["pages"]), np.asarray(arrays["slots"])
    Z, G = arrays["latent_pool"][0].shape[:2]
    written = {
        (pages[b, slots[b, t] // G], slots[b, t] % G)
        for b, t in np.ndindex(slots.shape)
        if slots[b, t] < pages.shape[1] * G and pages[b, slots[b, t] // G] < Z
    }
    assert len(written) == slots.size - 2
    before = leaves((arrays["latent_pool"], arrays["rope_pool"]))
    for (field, old), (_, new) in zip(before, leaves(pools), strict=True):
        for place in np.ndindex(Z, G) if old.size else ():
            is_same = old[place].tobytes() == new[place].tobytes()
            assert is_same == (place not in written), (field, place)


@pytest.mark.parametrize("dropped", ["page -1", "page Z", "slot M * G", "slot -1"])
@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_a_token_without_a_place_is_dropped(dropped, implementation):
    arrays, how = make_case("f16")
    where, value = dropped.split(" ", 1)
    value = {"-1": -1, "Z": arrays["latent_pool"][0].shape[0], "M * G": 12}[value]
    key = where + "s"
    arrays[key] = jnp.full_like(arrays[key], value)
    pools = op.latent_append(**arrays, **how, implementation=implementation)
    assert_same_bits(pools, (arrays["latent_pool"], arrays["rope_pool"]))


@pytest.mark.parametrize("name", ["f32", "fp8_e4m3", "q8_KV", "q6_0", "q4_1", "q4_0", "iq4_nl"])
def test_a_nan_stays_in_its_row(name):
    arrays, how = make_case(name, rotations=rotations_of(name))
    clean = op.latent_append(**arrays, **how, implementation="interpret")
    spoilt = {key: arrays[key].at[0, 1, 40].set(jnp.nan) for key in ("latent", "rope")}
    found = op.latent_append(**arrays | spoilt, **how, implementation="interpret")
    page, place = arrays["pages"][0, 1], 0
    for old, new, kind in zip(clean, found, ("latent", "rope"), strict=True):
        row = np.asarray(codec.decode(to_stored(new, name)))[page, place]
        spoils_all = kind == "latent" or name == "q8_KV"
        assert np.isnan(row).all() if spoils_all else np.isnan(row[40])
        assert spoils_all or np.isfinite(row[:32]).all()
        same = jax.tree.map(lambda part: part.at[page, place].set(0) if part.size else part, (old, new))
        assert_same_bits((same[0], same[0]), (same[1], same[1]))


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("name", ["f16", "fp8_e4m3", "q8_0", "q4_1"])
def test_large_numbers_saturate(name, implementation):
    arrays, how = make_case(name, rotations=rotations_of(name))
    arrays["rope"] = arrays["rope"].at[0, 0, ::7].set(1e30)
    pools = op.latent_append(**arrays, **how, implementation=implementation)
    row = np.asarray(codec.decode(to_stored(pools[1], name)))[arrays["pages"][0, 0], 3]
    assert np.isfinite(row).all() and np.abs(row).max() > 400
    assert_same_to_rounding(pools, compose(arrays, how))


def test_rows_do_not_depend_on_their_neighbours():
    arrays, how = make_case("q5_0", rotations=rotations_of("q5_0"))
    order = jnp.asarray([2, 0, 1])
    by_sequence = ("latent", "rope", "cos", "sin", "pages", "slots")
    moved = arrays | {key: arrays[key][order] for key in by_sequence}
    expected = op.latent_append(**arrays, **how, implementation="interpret")
    assert_same_bits(op.latent_append(**moved, **how, implementation="interpret"), expected)


def test_float8_is_that_of_ml_dtypes():
    every = np.arange(2**16, dtype=np.uint32) << 16  # all signs, exponents and 7 bits: ties among them
    x = np.concatenate([every, every + 1, every - 1, every + 0x8000]).astype(np.uint32).view(np.float32)
    x = x[~np.isnan(x) & ((np.abs(x) > 1e-30) | (x == 0))]  # XLA takes the smallest numbers for zeros
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    found = np.asarray(jax.jit(op._float8)(jnp.asarray(x)))
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))
    assert np.isnan(np.asarray(op._float8(jnp.asarray([np.nan, -np.nan]))).astype(np.float32)).all()


@pytest.mark.parametrize("rotations", [(None, None), (512, 64)], ids=["plain", "khad"])
@each_type
def test_lowers_in_place(name, rotations):
    _, how = make_case(name, rotations=rotations)
    arrays = jax.eval_shape(lambda: make_case(name, R=512, G=64)[0])
    text = lowered_for_gpu(functools.partial(op.latent_append, **how), **arrays)
    assert "__gpu$xla.gpu.triton" in text
    num_parts = sum(part.size > 0 for part in jax.tree.leaves((arrays["latent_pool"], arrays["rope_pool"])))
    pairs = re.findall(r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)", text)
    assert [(int(i or 0), int(operand)) for i, operand in pairs] == [(i, 7 + i) for i in range(num_parts)]


def test_other_widths_are_left_to_the_reference():
    arrays, how = make_case("q8_0", R=96)
    expected = op.latent_append(**arrays, **how, implementation="reference")
    assert_same_bits(op.latent_append(**arrays, **how), expected)
    with pytest.raises(NotImplementedError, match="rows of latent must be a power of two wide"):
        op.latent_append(**arrays, **how, implementation="interpret")
    assert "triton" not in lowered_for_gpu(functools.partial(op.latent_append, **how), **arrays)


def test_a_byte_pool_beyond_32_bit_addresses_is_left_to_the_reference():
    arrays, how = make_case("q8_0", R=512)
    pool = jax.ShapeDtypeStruct((2**17 + 1, 32, 512), jnp.int8), *arrays["latent_pool"][1:]
    arrays["latent_pool"] = pool
    with pytest.raises(NotImplementedError, match="latent_low must have at most"):
        jax.eval_shape(functools.partial(op.latent_append, **how, implementation="interpret"), **arrays)


def test_the_compiler_gets_the_config():
    arrays, how = make_case("q8_0")
    lower = lambda config: lowered_for_gpu(
        functools.partial(op.latent_append, **how, config=config), **arrays
    )
    assert lower(op.Config.for_rank(128)) == lower(None) != lower(op.Config(num_warps=4))


def test_cost_counts_every_byte_once():
    arrays, _ = make_case("q4_1")
    tokens = {key: arrays[key] for key in ("latent", "rope", "norm", "cos", "sin")}
    pools = arrays["latent_pool"], arrays["rope_pool"]
    places = pools[0][0].shape[0] * pools[0][0].shape[1]
    row_bytes = sum(part.nbytes for part in jax.tree.leaves(pools)) // places
    kind = cache_tiles.TYPES["q4_1"]
    assert row_bytes == kind.row_bytes(128) + kind.row_bytes(64)
    expected = sum(array.nbytes for array in tokens.values()) + 6 * row_bytes
    assert op.cost(tokens=6, rank=128, rope=64, row_bytes=row_bytes).bytes_accessed == expected


@needs_gpu
@pytest.mark.gpu
@each_type
def test_compiled_kernel_matches_reference(name):
    """Products and sums may be fused, and division be one unit off: of 100 codes one may be a neighbour."""
    arrays, how = make_case(name, B=16, T=8, R=512, G=64, rotations=rotations_of(name))
    decoded = [
        [
            np.asarray(codec.decode(to_stored(part, name)))
            for part in op.latent_append(**arrays, **how, implementation=i)
        ]
        for i in ("triton", "reference")
    ]
    for found, expected in zip(*decoded, strict=True):
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        is_off = ~np.isclose(found, expected, rtol=2e-3, atol=1e-5, equal_nan=True)
        assert is_off.sum() <= 0.01 * np.isfinite(expected).sum()
