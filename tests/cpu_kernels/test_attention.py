import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.cache import LatentRows, codec, rotate
from mla_jax.config import CACHE_TYPES
from mla_jax.nn import mla, mla_on_cpu
from mla_jax.nn.up_projections import UpProjections

N, H, V, R, P = 3, 32, 64, 128, 64
SCALE = 0.1


def _up(layout):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32)
    if layout == "kv":
        return UpProjections(kv=draw(N * (H + V), R), num_heads=N, value_size=V)
    return UpProjections(k=draw(N, R, H), v=draw(N, V, R), num_heads=N, value_size=V)


def _rows(cache_type, batch, table, page_size, seed=0):
    """Rows of a pool in which each sequence owns `table` pages, in no order."""
    rng = np.random.default_rng(seed)
    num_pages = batch * table + 3
    pages = rng.permutation(num_pages)[: batch * table].reshape(batch, table).astype(np.int32)
    draw = lambda size: jnp.asarray(rng.standard_normal((num_pages, page_size, size)), jnp.float32)
    rows = LatentRows(latent=codec.encode(draw(R), cache_type), rope=codec.encode(draw(P), cache_type))
    return rows.at(jnp.asarray(pages))


def _spoil(rows, positions):
    """Fills every slot that no query may see with NaN, or with codes of any kind under a NaN scale."""
    page_size, pages = rows.page_size, np.asarray(rows.pages)
    seen = np.zeros((rows.latent.shape[0], page_size), bool)
    for b, last in enumerate(np.asarray(positions).max(axis=1)):
        for slot in range(last + 1):
            seen[pages[b, slot // page_size], slot % page_size] = True

    def fill(leaf):
        nothing = jnp.asarray(jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0xA5 - 128, leaf.dtype)
        return jnp.where(jnp.asarray(seen)[..., None], leaf, nothing)

    return dataclasses.replace(
        rows, latent=jax.tree.map(fill, rows.latent), rope=jax.tree.map(fill, rows.rope)
    )


def _queries(batch, tokens, lengths):
    rng = np.random.default_rng(2)
    draw = lambda size: jnp.asarray(rng.standard_normal((batch, tokens, N, size)), jnp.float32)
    positions = np.asarray(lengths)[:, None] - tokens + np.arange(tokens)[None]
    return draw(H), draw(P), jnp.asarray(np.maximum(positions, 0), jnp.int32)


def _compare(way, layout, rows, lengths, tokens, rotation=None):
    q, q_rope, positions = _queries(len(lengths), tokens, lengths)
    up = _up(layout)
    chunk = min(rows.page_size, 64)
    kwargs = dict(sm_scale=SCALE, rotation=rotation)
    expected = getattr(mla, f"attend_{way}")(q, q_rope, rows, *up.decode(), positions, chunk=chunk, **kwargs)
    out = jax.jit(lambda rows: getattr(mla_on_cpu, f"attend_{way}")(q, q_rope, rows, up, positions, **kwargs))
    spoiled = out(_spoil(rows, positions))
    assert np.max(np.abs(spoiled - expected)) < 2e-5 * np.max(np.abs(expected))


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
@pytest.mark.parametrize("layout", ["kv", "k and v"])
@pytest.mark.parametrize(
    ("lengths", "tokens"), [([1], 1), ([64], 1), ([65], 3), ([300, 7], 1), ([290, 40], 37), ([300, 300], 130)]
)
def test_attention_is_that_of_xla(way, layout, lengths, tokens, instruction_set):
    _compare(way, layout, _rows("f32", len(lengths), 5, 64), lengths, tokens)


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_every_cache_type(way, cache_type):
    _compare(way, "kv", _rows(cache_type, 2, 5, 64), [300, 9], 5)


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
def test_rotated_latents(way):
    rows = _rows("f32", 1, 2, 64)
    rows = dataclasses.replace(rows, latent=rotate(rows.latent, 64))
    _compare(way, "kv", rows, [100], 5, rotation=64)


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
def test_one_visible_token_returns_its_value(way):
    rows, up = _rows("f32", 1, 1, 64), _up("kv")
    q, q_rope, positions = _queries(1, 1, [1])
    out = getattr(mla_on_cpu, f"attend_{way}")(q, q_rope, rows, up, positions, sm_scale=SCALE, rotation=None)
    latent = np.asarray(rows.latent[rows.pages[0, 0], 0])
    np.testing.assert_allclose(out[0, 0], np.asarray(up.decode()[1]) @ latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["absorbed", "expanded"])
def test_a_number_that_is_no_page_reads_as_zeros(way):
    rows = _rows("f32", 1, 3, 64)
    for number in (-1, rows.latent.shape[0], 2**31 - 1):
        pages = rows.pages.at[0, 1].set(number)
        _compare_holes(way, rows.at(pages))


def _compare_holes(way, rows):
    q, q_rope, positions = _queries(1, 2, [170])
    up, kwargs = _up("kv"), dict(sm_scale=SCALE, rotation=None)
    out = getattr(mla_on_cpu, f"attend_{way}")(q, q_rope, rows, up, positions, **kwargs)
    full = rows.at(jnp.asarray([[0, 1, 2]], jnp.int32))
    pages = [int(page) for page in rows.pages[0]]
    take = lambda pool: jnp.stack([pool[p] if 0 <= p < len(pool) else jnp.zeros_like(pool[0]) for p in pages])
    full = dataclasses.replace(full, latent=take(rows.latent), rope=take(rows.rope))
    expected = getattr(mla_on_cpu, f"attend_{way}")(q, q_rope, full, up, positions, **kwargs)
    np.testing.assert_array_equal(out, expected)


_RUN = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import numpy as np, jax, mla_jax
from mla_jax import init_cache
model = mla_jax.load(ctx_size=512, compilation_cache=None, progress=lambda *_: None)
apply = jax.jit(mla_jax.apply, static_argnames=("config", "run"))
cache = init_cache(model.config, model.run, batch=1, ctx_size=512)
tokens = np.arange(5, 205, dtype=np.int32)[None]
first, cache = apply(model.params, tokens, cache, config=model.config, run=model.run)
second, _ = apply(model.params, tokens[:, :1], cache, config=model.config, run=model.run)
sys.stdout.buffer.write(np.asarray(first).tobytes() + np.asarray(second).tobytes())
"""


def test_thread_counts_are_bit_equal():
    """One thread and as many as there are, through a whole model: prefill and a step of decode."""
    root = pathlib.Path(__file__).parents[2]
    outputs = [
        subprocess.run([sys.executable, "-c", _RUN, count], capture_output=True, check=True, cwd=root).stdout
        for count in ("1", "64")
    ]
    assert len(outputs[0]) > 1000 and outputs[0] == outputs[1]
