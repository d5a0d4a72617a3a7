"""What a row gives is the same to the last bit, whatever rows are beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights

import cpu_kernels
from mla_jax import quant
from mla_jax.cache import LatentRows, codec
from mla_jax.nn import layers, mla_on_cpu
from mla_jax.quant import dispatch

FLOAT = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}
# In registers by groups of 32 and of 16, unpacked by both, of a codebook, with a header, and plain.
FORMATS = ("q8_0", "q4_K", "q6_K", "iq4_xs", "q5_1", "iq6_k", "iq2_xxs", "iq1_kt", "mxfp4", *FLOAT)
FEW, MANY = 16, 600
PIECES = (  # of `MANY`: rows, rows of the call, and of those how many come before
    (1, 1, 0),
    (2, 2, 0),
    (1, 3, 1),
    (17, 17, 0),
    (31, 32, 1),
    (1, 32, 31),
    (128, 128, 0),
    (77, 128, 9),
    (512, 512, 0),
    (400, 512, 63),
)


@functools.cache
def _weight(name, rows, size, seed=0):
    if name in FLOAT or name in quant.ENCODABLE:
        values = np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)
        return jnp.asarray(values, FLOAT[name]) if name in FLOAT else quant.encode(values, name)
    return random_weights.random_weight(name, rows, size)


def _odd_size(name):
    """Returns a size that is no multiple of 256 where blocks are smaller."""
    return 300 if name in FLOAT else 9 * quant.FORMATS[name].block_size


def _stack(name, count, rows, size, seed):
    parts = [_weight(name, rows, size, seed * count + i) for i in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def _draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _take(arrays, index):
    return [array[index] for array in arrays]


def _check_few(function, *arrays):
    """Each of `FEW` rows alone, against the same in groups, in an order and company that change."""
    alone = np.concatenate([function(*_take(arrays, [row])) for row in range(FEW)])
    assert np.isfinite(alone).all() and np.ptp(alone) > 0
    for size in (2, 3, 5, 8, FEW):
        order = np.random.default_rng(size).permutation(FEW)
        for first in range(0, FEW, size):
            rows = np.resize(order[first : first + size], size)  # a group that is too small has copies
            np.testing.assert_array_equal(function(*_take(arrays, rows)), alone[rows], err_msg=str(rows))


def _check_many(function, *arrays, pieces=PIECES):
    """`MANY` rows at once, against pieces of them in wider calls, after zeros and before other rows."""
    together = function(*arrays)
    assert np.isfinite(together).all() and np.ptp(together) > 0
    for place, (count, width, before) in enumerate(pieces):
        first = 9 * place
        call = [np.zeros((width, *array.shape[1:]), array.dtype) for array in arrays]
        for padded, array in zip(call, arrays, strict=True):
            padded[before : before + count] = array[first : first + count]
            padded[before + count :] = array[MANY - width + before + count :]
        out = function(*call)[before : before + count]
        np.testing.assert_array_equal(out, together[first : first + count], err_msg=str((count, width)))


def _checked(rows):
    return (_check_few, FEW) if rows == "few" else (_check_many, MANY)


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("name", FORMATS)
def test_matmul(name, rows, instruction_set):
    check, count = _checked(rows)
    for out, size in ((37, 768), (16, _odd_size(name))):
        arrays, _ = dispatch.operands(_weight(name, out, size))
        multiply = jax.jit(functools.partial(cpu_kernels.matmul, format=name))
        check(lambda x: np.asarray(multiply(x, *arrays)), _draw(1, count, size))  # noqa: B023


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_of_heads(name, rows, instruction_set):
    check, count = _checked(rows)
    heads, stride, size = 3, 11, _odd_size(name)
    arrays, _ = dispatch.operands(_weight(name, heads * stride, size))
    down = jax.jit(functools.partial(cpu_kernels.head_matmul, format=name, out=5, stride=stride, first=6))
    up = jax.jit(functools.partial(cpu_kernels.head_transposed, format=name, size=size, stride=stride))
    check(lambda x: np.asarray(down(x, *arrays)), _draw(1, count, heads, size))
    check(lambda x: np.asarray(up(x, *arrays)), _draw(2, count, heads, 6))


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("name", FORMATS)
def test_experts(name, rows, instruction_set):
    """An expert that one of a few tokens has to itself serves many of the others in another company."""
    check, count = _checked(rows)
    E, D, F = 5, 256, 256
    experts = {part: _stack(name, E, F, D, seed) for seed, part in enumerate(("gate", "up"))}
    experts["down"] = _stack(name, E, D, F, 2)
    ids = np.minimum(np.random.default_rng(3).exponential(1.5, (count, 3)), E).astype(np.int32)  # E is none
    ids[:, 0] %= E
    ffn = jax.jit(layers.experts_on_cpu)
    weights = np.abs(_draw(4, count, 3)) / 8
    check(lambda *call: np.asarray(ffn(*call, experts)), _draw(5, count, D) / 8, ids, weights)


RANK, ROPE = 64, 32


@functools.cache
def _pool(cache_type, sequences, table=12):
    """Rows for `sequences` of up to 64 * `table` slots, all of a pool of pages in no order."""
    pages = np.random.default_rng(3).permutation(sequences * table).reshape(sequences, table)
    parts = [
        codec.encode(jnp.asarray(_draw(size, sequences * table, 64, size)), cache_type)
        for size in (RANK, ROPE)
    ]
    return LatentRows(latent=parts[0], rope=parts[1]), pages.astype(np.int32)


@jax.jit
def _absorbed(q, q_rope, pages, positions, rows):
    return cpu_kernels.latent_attention(q, q_rope, **mla_on_cpu._cache(rows.at(pages), positions), scale=0.1)


H, V = 24, 20


@functools.partial(jax.jit, static_argnames="formats")
def _expanded(q, q_rope, pages, positions, rows, keys, values, formats):
    layout = dict(key_stride=H, value_stride=V, value_first=0, value_size=V)
    cache = mla_on_cpu._cache(rows.at(pages), positions)
    return cpu_kernels.latent_prefill(q, q_rope, keys, values, formats=formats, **layout, **cache, scale=0.1)


def _of_sequence(function, rows, pages):
    """Makes tokens the first axis of what attends to one sequence."""

    def attend(*call):
        *queries, positions = (jnp.asarray(array)[None] for array in call)
        return np.asarray(function(*queries, pages[:1], positions, rows)[0])

    return attend


LENGTHS = np.random.default_rng(6).integers(1, 769, FEW)


@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("heads", [1, 3, 4, 12, 16])
def test_absorbed_attention(heads, cache_type, instruction_set):
    rows, pages = _pool(cache_type, FEW)
    positions = (LENGTHS - 1)[:, None].astype(np.int32)
    queries = _draw(7, FEW, 1, heads, RANK), _draw(8, FEW, 1, heads, ROPE)
    _check_few(lambda *call: np.asarray(_absorbed(*call, rows)), *queries, pages, positions)
    queries = _draw(9, MANY, heads, RANK), _draw(10, MANY, heads, ROPE)
    positions = np.arange(MANY, dtype=np.int32)
    _check_many(_of_sequence(_absorbed, rows, pages), *queries, positions, pieces=PIECES[3:])


@pytest.mark.parametrize("cache_type", ["f32", "q8_0"])
@pytest.mark.parametrize("formats", [("f32", "f32"), ("q8_0", "q8_0"), ("q4_0", "bf16")], ids="-".join)
def test_expanded_attention(formats, cache_type, instruction_set):
    rows, pages = _pool(cache_type, FEW)
    heads, tokens = 3, 5
    keys, values = (
        dispatch.operands(_weight(name, heads * size, RANK, seed))[0]
        for seed, (name, size) in enumerate(zip(formats, (H, V), strict=True))
    )
    attend = lambda *call: _expanded(*call, keys, values, formats)
    positions = np.maximum(LENGTHS[:, None] - tokens + np.arange(tokens), 0).astype(np.int32)
    queries = _draw(7, FEW, tokens, heads, H), _draw(8, FEW, tokens, heads, ROPE)
    _check_few(lambda *call: np.asarray(attend(*call, rows)), *queries, pages, positions)
    queries = _draw(9, MANY, heads, H), _draw(10, MANY, heads, ROPE)
    _check_many(_of_sequence(attend, rows, pages), *queries, np.arange(MANY, dtype=np.int32))
