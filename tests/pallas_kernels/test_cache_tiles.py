"""Tiles of the cache: as the cache decodes them, whole and plane by plane in a kernel."""

import types

import cache_parts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from mla_jax.cache import codec
from mla_jax.config import CACHE_TYPES
from pallas_kernels import cache_tiles, dispatch

PAGES, SLOTS, TILE = 3, 32, 16

each_type = pytest.mark.parametrize("name", CACHE_TYPES)


def draw_part(name, size):
    """Random rows in the cache type `name`, and what the cache decodes them to."""
    stored = cache_parts.draw(np.random.default_rng(size), (PAGES, SLOTS, size), name)
    return cache_parts.part_of(stored), codec.decode(stored)


def read_in_kernel(part, name, size, start, live):
    """Reads a tile of each page in a kernel, plane after plane into one result."""
    operands = cache_tiles.operands(part, name)

    def body(live_ref, *refs):
        rows, page = cache_tiles.Rows(refs[:-1], name, size), pl.program_id(0)
        planes = rows.planes(rows.load(page, start, live_ref[...]))
        for columns, plane in zip(rows.columns, planes, strict=True):
            refs[-1][page, :, columns] = plane

    num_pages = part[0].shape[0]
    out = jax.ShapeDtypeStruct((num_pages, len(live), size), cache_tiles.TYPES[name].product_dtype)
    config = types.SimpleNamespace(num_warps=4, num_stages=2)
    call = dict(name="read", grid=(num_pages,), out_shape=out, config=config, interpret=True)
    return np.asarray(dispatch.launch(body, jnp.asarray(live), *operands, **call), np.float32)


def test_every_type_of_the_cache_is_there():
    assert set(cache_tiles.TYPES) == set(CACHE_TYPES)


@each_type
def test_decodes_as_the_cache_does(name):
    part, expected = draw_part(name, 64)
    assert np.array_equal(cache_tiles.decode(part, name), expected)


@each_type
@pytest.mark.parametrize("size", [32, 512])
def test_planes_in_a_kernel_are_what_is_decoded(name, size):
    part, expected = draw_part(name, size)
    got = read_in_kernel(part, name, size, TILE, np.ones(TILE, bool))
    epsilon = float(jnp.finfo(cache_tiles.TYPES[name].product_dtype).eps)
    expected = np.asarray(expected)[:, TILE:]
    assert np.max(np.abs(got - expected)) <= 2 * epsilon * np.max(np.abs(expected))


@each_type
def test_dead_rows_are_zeros_whatever_they_hold(name):
    part, expected = draw_part(name, 64)
    live = np.arange(TILE) % 3 == 0

    def spoil(array):
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        return array.at[:, np.flatnonzero(~live)].set(jnp.nan) if is_float else array

    got = read_in_kernel(tuple(map(spoil, part)), name, 64, 0, live)
    assert np.all(got[:, ~live] == 0)
    assert np.allclose(got[:, live], expected[:, :TILE][:, live], rtol=0.01, atol=0.01)


def test_every_float8_is_read_exactly():
    numbers = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16)
    part = cache_parts.part_of(jax.lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn))
    got = read_in_kernel(part, "fp8_e4m3", 16, 0, np.ones(16, bool))
    assert np.array_equal(got, part[0].astype(jnp.float32), equal_nan=True)


@each_type
def test_row_bytes_are_those_of_the_arrays(name):
    part, _ = draw_part(name, 512)
    expected = sum(array.nbytes for array in part) // (PAGES * SLOTS)
    assert cache_tiles.TYPES[name].row_bytes(512) == expected


@pytest.mark.parametrize(
    ("name", "size", "word"), [("bf16", 96, "power of two"), ("q4_0", 16, "columns"), ("q5_0", 16, "columns")]
)
def test_rows_that_kernels_cannot_read(name, size, word):
    assert word in cache_tiles.unsupported(name, size)
    assert cache_tiles.unsupported(name, 64) is None
