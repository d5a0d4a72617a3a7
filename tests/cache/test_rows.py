"""The contiguous cache writes the slots it is told and no other, and reads zeros past a sequence's end."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_jax.cache import HeadRows, LatentRows, bytes_per_token, init_cache
from mla_jax.config import MLAMode, RunConfig
from mla_jax.presets import PRESETS

B, T, S = 3, 4, 256
_WIDTHS = {LatentRows: dict(latent=(5,), rope=(4,)), HeadRows: dict(key=(2, 6), value=(2, 3))}
_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
# Slots in any order, a jump, and what is to be dropped: S itself and, when the capacity is passed, beyond.
SLOTS = np.array([[0, 1, 2, 3], [254, 255, S, S + 1], [S, 9, S, 7]], np.int32)


def _filled(kind, dtype, rng):
    """Makes rows of random numbers with a NaN here and there: any change anywhere shows in the bytes."""
    pools = {name: rng.standard_normal((B, S, *width)) for name, width in _WIDTHS[kind].items()}
    for pool in pools.values():
        pool[:, ::7] = np.nan
    return kind(**{name: jnp.asarray(pool.astype(dtype)) for name, pool in pools.items()})


@pytest.mark.parametrize("cache_type", _DTYPES)
@pytest.mark.parametrize("kind", _WIDTHS)
def test_append_changes_the_given_slots_alone(kind, cache_type):
    rng, dtype = np.random.default_rng(0), _DTYPES[cache_type]
    rows = _filled(kind, dtype, rng)
    new = {name: rng.standard_normal((B, T, *w), dtype=np.float32) for name, w in _WIDTHS[kind].items()}
    after = rows.append(**new, slots=jnp.asarray(SLOTS))
    assert type(after) is kind
    for name, values in new.items():
        expected = np.array(getattr(rows, name))
        for b, t in np.ndindex(B, T):
            if SLOTS[b, t] < S:
                expected[b, SLOTS[b, t]] = values[b, t].astype(dtype)
        assert getattr(after, name).dtype == dtype
        assert np.asarray(getattr(after, name)).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("cache_type", "stored"),
    [
        ("f16", [65504, -65504, 65504, np.nan, 65504, 1.5]),
        ("bf16", [999424, -999424, np.inf, np.nan, 65536, 1.5]),
        ("f32", [1e6, -1e6, np.inf, np.nan, 65510, 1.5]),
    ],
)
def test_only_float16_saturates(cache_type, stored):
    """An infinity in the cache would be inf - inf in every later softmax; a NaN must stay visible."""
    values = jnp.asarray([1e6, -1e6, np.inf, np.nan, 65510, 1.5], jnp.float32).reshape(1, 1, 6)
    empty = jnp.zeros((1, S, 6), _DTYPES[cache_type])
    rows = LatentRows(latent=empty, rope=empty).append(values, values, jnp.full((1, 1), 8, jnp.int32))
    for pool in (rows.latent, rows.rope):
        np.testing.assert_array_equal(np.asarray(pool[0, 8], np.float32), np.float32(stored))


@pytest.mark.parametrize("cache_type", _DTYPES)
@pytest.mark.parametrize("kind", _WIDTHS)
@pytest.mark.parametrize("start", [0, 64])
def test_read_gives_zeros_past_each_length(kind, cache_type, start):
    rows = _filled(kind, _DTYPES[cache_type], np.random.default_rng(1))
    length = np.array([0, 70, S], np.int32)
    read = rows.read(jnp.int32(start), 64, jnp.asarray(length), jnp.float32)
    for name, chunk in zip(_WIDTHS[kind], read, strict=True):
        expected = np.array(getattr(rows, name)[:, start : start + 64], np.float32)
        for b in range(B):
            expected[b, max(0, length[b] - start) :] = 0
        assert chunk.dtype == jnp.float32
        np.testing.assert_array_equal(chunk, expected)


@pytest.mark.parametrize("none", [4, 9, -1])
def test_what_is_no_page_is_neither_read_nor_written(none):
    """The second sequence has no page for its slots 2 to 5, and the table ends at slot 6."""
    pool = jnp.arange(4 * 2 * 3, dtype=jnp.float32).reshape(4, 2, 3) + 1
    rows = LatentRows(latent=pool, rope=pool).at(jnp.asarray([[3, 0, 2], [1, none, none]], jnp.int32))
    read = rows.read(jnp.int32(0), 8, jnp.asarray([8, 8], jnp.int32), jnp.float32)[0]
    expected = np.zeros((2, 8, 3), np.float32)
    expected[0, :6], expected[1, :2] = np.asarray(pool)[[3, 0, 2]].reshape(6, 3), pool[1]
    np.testing.assert_array_equal(read, expected)
    new = jnp.full((2, 2, 3), -1.0)
    after = rows.append(new, new, jnp.asarray([[0, 6], [2, 5]], jnp.int32)).latent
    np.testing.assert_array_equal(after, np.asarray(pool.at[3, 0].set(-1.0)))


_CONFIG = dataclasses.replace(PRESETS["deepseek-v2-lite"], num_layers=2)


@pytest.mark.parametrize(("ctx_size", "num_slots"), [(1, 256), (256, 256), (257, 512)])
@pytest.mark.parametrize("cache_type", _DTYPES)
def test_init_cache_is_empty_and_rounded_up(ctx_size, num_slots, cache_type):
    cache = init_cache(_CONFIG, RunConfig(cache_type=cache_type), batch=B, ctx_size=ctx_size)
    np.testing.assert_array_equal(cache.length, np.zeros(B, np.int32))
    assert len(cache.layers) == 2
    for rows in cache.layers:
        assert type(rows) is LatentRows and rows.num_slots == num_slots
        assert rows.latent.shape == (B, num_slots, 512) and rows.rope.shape == (B, num_slots, 64)
        assert rows.latent.dtype == rows.rope.dtype == _DTYPES[cache_type]
        assert not rows.latent.any() and not rows.rope.any()


@pytest.mark.parametrize("mode", MLAMode)
def test_only_mode_0_caches_heads(mode):
    init = lambda: init_cache(_CONFIG, RunConfig(mla=mode), batch=1, ctx_size=300)
    rows = jax.eval_shape(init).layers[1]
    assert rows.num_slots == 512
    if mode == MLAMode.EXPANDED:
        assert (rows.key.shape, rows.value.shape) == ((1, 512, 16, 192), (1, 512, 16, 128))
    else:
        assert (rows.latent.shape, rows.rope.shape) == ((1, 512, 512), (1, 512, 64))


@pytest.mark.parametrize(
    ("name", "mode", "cache_type", "expected"),
    [
        ("deepseek-v3", 3, "f32", 140_544),
        ("deepseek-v3", 3, "f16", 70_272),
        ("deepseek-v3", 1, "bf16", 70_272),
        ("kimi-k2", 2, "f16", 70_272),
        ("deepseek-v2", 3, "f16", 69_120),
        ("deepseek-v2-lite", 3, "f16", 31_104),
        ("deepseek-v2-lite", 3, "f32", 62_208),
        ("glm-4.7-flash", 3, "f16", 54_144),
        ("deepseek-v3", 0, "f16", 4_997_120),
        ("deepseek-v3", 0, "f32", 9_994_240),
    ],
)
def test_bytes_per_token(name, mode, cache_type, expected):
    assert bytes_per_token(PRESETS[name], RunConfig(mla=mode, cache_type=cache_type)) == expected
