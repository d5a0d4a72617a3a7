import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
from mla_jax import quant
from mla_jax.cache import LatentRows, codec, rotate
from mla_jax.config import CACHE_TYPES
from mla_jax.nn import mla, mla_on_cpu
from mla_jax.nn.up_projections import UpProjections
from mla_jax.quant import dispatch

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
@pytest.mark.parametrize(("lengths", "tokens"), [([300, 7], 1), ([290, 40], 37)])
def test_attention_is_that_of_xla(way, layout, lengths, tokens):
    _compare(way, layout, _rows("f32", len(lengths), 5, 64), lengths, tokens)


def _softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _slots(rows):
    """What each sequence has cached, in order, in float64."""
    decode = lambda part: np.asarray(codec.decode(part), np.float64)[np.asarray(rows.pages)]
    return (part.reshape(part.shape[0], -1, part.shape[-1]) for part in map(decode, (rows.latent, rows.rope)))


def _absorbed(q, q_rope, rows, positions):
    """The definition of `latent_attention`: float64, a query at a time."""
    latent, rope = _slots(rows)
    out = np.empty(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = slice(positions[b, t] + 1)
        scores = latent[b, seen] @ np.float64(q[b, t, n]) + rope[b, seen] @ np.float64(q_rope[b, t, n])
        out[b, t, n] = _softmax(SCALE * scores) @ latent[b, seen]
    return out


def _expanded(q, q_rope, keys, values, rows, positions):
    """The same of `latent_prefill`, with keys [N, H, R] and values [N, V, R]."""
    latent, rope = _slots(rows)
    out = np.empty((*q.shape[:3], values.shape[1]))
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = slice(positions[b, t] + 1)
        scores = latent[b, seen] @ (keys[n].T @ np.float64(q[b, t, n]))
        scores += rope[b, seen] @ np.float64(q_rope[b, t, n])
        out[b, t, n] = _softmax(SCALE * scores) @ latent[b, seen] @ values[n].T
    return out


def _draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _pool(cache_type, batch, rank, rope):
    """Rows for up to 320 slots a sequence, all of a pool of pages in no order."""
    pages = np.random.default_rng(3).permutation(batch * 5).reshape(batch, 5).astype(np.int32)
    parts = (codec.encode(jnp.asarray(_draw(size, batch * 5, 64, size)), cache_type) for size in (rank, rope))
    return LatentRows(latent=next(parts), rope=next(parts)).at(jnp.asarray(pages))


def _rounds(instruction_set, rows):
    """Whether attention meets bfloat16 numbers."""
    return instruction_set in ("amx", "avx512bf16") and codec.type_of(rows.latent) != "f32"


def _check_absorbed(rows, heads, lengths, tokens, instruction_set):
    rank, rope = rows.latent.shape[-1], rows.rope.shape[-1]
    q = _draw(4, len(lengths), tokens, heads, rank)
    q_rope = _draw(5, len(lengths), tokens, heads, rope)
    positions = np.asarray(lengths)[:, None] - tokens + np.arange(tokens)[None]
    cache = mla_on_cpu._cache(_spoil(rows, positions), jnp.asarray(positions, jnp.int32))
    out = np.asarray(cpu_kernels.latent_attention(jnp.asarray(q), jnp.asarray(q_rope), **cache, scale=SCALE))
    expected = _absorbed(q, q_rope, rows, positions)
    exact = tokens * heads < 9 or not _rounds(instruction_set, rows)
    assert np.max(np.abs(out - expected)) < (2e-5 if exact else 2e-2) * np.max(np.abs(expected))


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
@pytest.mark.parametrize("heads", [1, 3, 4, 8, 9, 16, 17, 20, 128])
def test_every_number_of_heads(heads, cache_type, instruction_set):
    """One to three tokens, and rows of no whole vectors."""
    for tokens, lengths in ((1, [1, 129]), (2, [32, 319]), (3, [257, 16])):
        _check_absorbed(_pool(cache_type, 2, 100, 8), heads, lengths, tokens, instruction_set)


@pytest.mark.parametrize("lengths", [[255, 257], [700, 2049]], ids=str)
@pytest.mark.parametrize("heads", [1, 4, 16, 130])
def test_slots_of_one_token_are_split_and_merged(heads, lengths, instruction_set):
    _check_absorbed(_rows("f16", 2, 33, 64), heads, lengths, 1, instruction_set)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_every_cache_type(cache_type, instruction_set):
    rows = _pool(cache_type, 1, 288, 64)
    for heads in (3, 17):
        _check_absorbed(rows, heads, [150], 2, instruction_set)


@pytest.mark.parametrize(("page_size", "lengths"), [(7, [70, 31]), (33, [132, 300])])
@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_few_queries_of_one_token(cache_type, page_size, lengths, instruction_set):
    """Rows are met as they lie in the cache, in tiles that end within pages."""
    rows = _rows(cache_type, 2, -(-max(lengths) // page_size), page_size)
    for heads in (1, 2, 5, 8):
        _check_absorbed(rows, heads, lengths, 1, instruction_set)


@pytest.mark.parametrize("missing", [-1, 2**31 - 1])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
def test_few_queries_see_zeros_where_there_is_no_page(cache_type, missing, instruction_set):
    rows = _rows(cache_type, 1, 5, 7)
    empty = codec.encode(jnp.zeros((7, R)), cache_type), codec.encode(jnp.zeros((7, P)), cache_type)
    page = rows.pages[0, 3]
    put = lambda pool, new: jax.tree.map(lambda part, of_page: part.at[page].set(of_page), pool, new)
    zeros = dataclasses.replace(rows, latent=put(rows.latent, empty[0]), rope=put(rows.rope, empty[1]))
    hole = rows.at(rows.pages.at[0, 3].set(missing))
    np.testing.assert_array_equal(_attend(hole, 3, [[33]]), _attend(zeros, 3, [[33]]))
    assert np.ptp(_attend(hole, 3, [[33]])) > 0


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q5_1"])
def test_cache_types_are_expanded(cache_type, instruction_set):
    if instruction_set == "amx":
        pytest.skip("tiles round prompts: see test_tiled_attention.py")
    _compare("expanded", "kv", _rows(cache_type, 2, 5, 64), [300, 9], 5)


def _attend(rows, heads, positions):
    positions = jnp.asarray(positions, jnp.int32)
    q, q_rope = (
        jnp.asarray(_draw(seed, *positions.shape, heads, part.shape[-1]))
        for seed, part in enumerate((rows.latent, rows.rope))
    )
    return np.asarray(
        cpu_kernels.latent_attention(q, q_rope, **mla_on_cpu._cache(rows, positions), scale=SCALE)
    )


@pytest.mark.parametrize("heads", [4, 12])
def test_what_an_earlier_call_left_behind_does_not_matter(heads, instruction_set):
    full, short = _pool("f16", 1, 96, 32), _pool("f16", 1, 90, 20)
    nothing = dataclasses.replace(full, latent=full.latent * jnp.nan, rope=full.rope * jnp.nan)
    for _ in range(8):  # whichever thread comes
        assert np.isnan(_attend(nothing, heads, [[31]])).all()
        _check_absorbed(short, heads, [3], 1, instruction_set)


@pytest.mark.parametrize("heads", [3, 7])
def test_a_nan_that_only_a_later_token_sees(heads, instruction_set):
    """Queries of two tokens are taken together where heads do not come in fours."""
    rows = _pool("f16", 1, 64, 32)
    spoiled = dataclasses.replace(rows, latent=rows.latent.at[rows.pages[0, 2], 30].set(jnp.nan))
    out = _attend(spoiled, heads, [[100, 200]])
    np.testing.assert_array_equal(out[:, 0], _attend(rows, heads, [[100, 200]])[:, 0])
    assert np.isnan(out[:, 1]).all()


@pytest.mark.parametrize("heads", [3, 12])
def test_weights_add_up_to_one(heads, instruction_set):
    """Where all latents are the same, so is the result, however weights are rounded."""
    rows = _pool("f16", 1, 64, 32)
    value = jnp.round(rows.latent[0, 0] * 8) / 8
    rows = dataclasses.replace(rows, latent=jnp.broadcast_to(value, rows.latent.shape))
    for position in (4, 40, 150):
        out = _attend(rows, heads, [[position]])[0, 0]
        np.testing.assert_allclose(out, np.broadcast_to(value, out.shape), rtol=1e-5, atol=1e-6)


def _operand(weight, name):
    stored = jnp.asarray(weight) if name == "f32" else jax.tree.map(jnp.asarray, quant.encode(weight, name))
    return dispatch.operands(stored)[0], np.asarray(quant.decode(stored), np.float64)


@pytest.mark.parametrize("formats", [("f32", "f32"), ("q8_0", "q8_0"), ("q8_0", "f32"), ("f32", "q8_0")])
def test_prefill_is_the_definition(formats, instruction_set):
    rows, heads, size, value_size = _pool("f32", 2, 64, 20), 3, 36, 34
    weight = _draw(6, heads * (size + value_size), 64) / 8
    (keys, exact_keys), (values, exact_values) = (_operand(weight, name) for name in formats)
    by_head = lambda exact: exact.reshape(heads, size + value_size, 64)
    tolerance = 2e-5 if formats == ("f32", "f32") else 2e-2  # 8-bit weights meet 8-bit latents
    for tokens, lengths in ((1, [1, 129]), (5, [5, 300]), (37, [128, 257])):
        q, q_rope = _draw(7, 2, tokens, heads, size), _draw(8, 2, tokens, heads, 20)
        positions = np.maximum(np.asarray(lengths)[:, None] - tokens + np.arange(tokens)[None], 0)
        layout = dict(key_stride=size + value_size, value_stride=size + value_size, value_first=size)
        cache = mla_on_cpu._cache(_spoil(rows, positions), jnp.asarray(positions, jnp.int32))
        sizes = dict(value_size=value_size, scale=SCALE)
        arguments = dict(formats=formats, **sizes, **layout, **cache)
        out = np.asarray(
            cpu_kernels.latent_prefill(*map(jnp.asarray, (q, q_rope)), keys, values, **arguments)
        )
        parts = by_head(exact_keys)[:, :size], by_head(exact_values)[:, size:]
        expected = _expanded(q, q_rope, *parts, rows, positions)
        assert np.max(np.abs(out - expected)) < tolerance * np.max(np.abs(expected))


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


_NONE = jnp.zeros((0,), jnp.uint8)


def _absorbed_arguments():
    cache = mla_on_cpu._cache(_pool("q8_0", 2, 64, 32), jnp.zeros((2, 1), jnp.int32))
    return dict(q=jnp.ones((2, 1, 3, 64)), q_rope=jnp.ones((2, 1, 3, 32)), scale=SCALE, **cache)


def _expanded_arguments():
    arguments = _absorbed_arguments() | dict(q=jnp.ones((2, 1, 3, 48)), keys=(jnp.ones((192, 64)), _NONE))
    layout = dict(key_stride=64, value_stride=64, value_first=48, value_size=16)
    return arguments | dict(values=(jnp.ones((192, 64)), _NONE), formats=("f32", "f32"), **layout)


_REFUSED = [
    (None, dict(q_rope=jnp.ones((2, 1, 2, 32))), "rotated parts do not fit"),
    (None, dict(q_rope=jnp.ones((2, 2, 3, 32))), "rotated parts do not fit"),
    (cpu_kernels.latent_attention, dict(q_rope=jnp.ones((2, 3, 32))), "must have four axes"),
    (cpu_kernels.latent_attention, dict(q=jnp.ones((2, 1, 3, 96))), "rows of 96 numbers of type q8_0"),
    (None, dict(q_rope=jnp.ones((2, 1, 3, 64))), "rows of 64 numbers of type q8_0"),
    (None, dict(positions=jnp.zeros((2, 2), jnp.int32)), "positions do not fit"),
    (None, dict(positions=jnp.zeros((3, 1), jnp.int32)), "positions do not fit"),
    (None, dict(pages=jnp.zeros((1, 5), jnp.int32)), "pages do not fit"),
    (None, dict(pages=jnp.zeros((10,), jnp.int32)), "pages do not fit"),
    (None, dict(latent_type="q4_0"), "rows of 64 numbers of type q4_0"),
    (None, dict(rope_type="f32"), "rows of 32 numbers of type f32"),
    (None, dict(latent_type="q9_9"), "no reader of cache type q9_9"),
    (cpu_kernels.latent_prefill, dict(q=jnp.ones((2, 1, 3, 80))), "rows for all heads"),
    (
        cpu_kernels.latent_prefill,
        dict(q=jnp.ones((2, 1, 4, 48)), q_rope=jnp.ones((2, 1, 4, 32))),
        "rows for all heads",
    ),
    (cpu_kernels.latent_prefill, dict(value_first=49), "rows for all heads"),
    (cpu_kernels.latent_prefill, dict(value_stride=-64), "rows for all heads"),
    (cpu_kernels.latent_prefill, dict(key_stride=2**40), "rows for all heads"),
    (cpu_kernels.latent_prefill, dict(keys=(jnp.ones((9, 64)), _NONE)), "rows for all heads"),
    (cpu_kernels.latent_prefill, dict(values=(jnp.ones((192, 32)), _NONE)), "rows for all heads"),
]


@pytest.mark.parametrize(
    ("kernel", "change", "message"), _REFUSED, ids=lambda x: " ".join(x) if isinstance(x, dict) else ""
)
def test_what_does_not_fit_is_refused(kernel, change, message):
    ways = (
        (cpu_kernels.latent_attention, _absorbed_arguments),
        (cpu_kernels.latent_prefill, _expanded_arguments),
    )
    for way, arguments in ways:
        if kernel in (None, way):
            assert np.isfinite(way(**arguments())).all()
            with pytest.raises(jax.errors.JaxRuntimeError, match=message):
                jax.block_until_ready(way(**arguments() | change))


@pytest.mark.parametrize("kernel", [cpu_kernels.latent_attention, cpu_kernels.latent_prefill])
@pytest.mark.parametrize("part", ["latent", "rope"])
@pytest.mark.parametrize("plane", range(4))
def test_cache_arrays_of_the_wrong_size_are_refused(kernel, part, plane):
    """One row too few, or what this type does not have."""
    way = _absorbed_arguments if kernel is cpu_kernels.latent_attention else _expanded_arguments
    arrays = list(way()[part])
    arrays[plane] = arrays[plane][:-1] if arrays[plane].size else jnp.zeros((10, 64, 1), jnp.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="arrays of the cache do not fit"):
        jax.block_until_ready(kernel(**way() | {part: tuple(arrays)}))


_RUN = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import numpy as np, jax, mla_jax
from mla_jax import init_cache
model = mla_jax.load(ctx_size=1024, compilation_cache=None, progress=lambda *_: None)
apply = jax.jit(mla_jax.apply, static_argnames=("config", "run"))
cache = init_cache(model.config, model.run, batch=1, ctx_size=1024)
tokens = np.arange(5, 605, dtype=np.int32)[None]
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
