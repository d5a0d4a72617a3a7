import concurrent.futures
import ctypes
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights

import cpu_kernels
from cpu_kernels import library
from mla_jax import quant
from mla_jax.nn import layers, moe
from mla_jax.quant import codebooks, dispatch

INTEGER = sorted(cpu_kernels.formats() - {"f32", "f16", "bf16"})
FLOAT = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}
FORMATS = [*INTEGER, *FLOAT]
# The others are unpacked to memory, after which all are multiplied by the same code.
IN_REGISTERS = ("q8_0", "q4_0", "q6_0", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs", "iq4_ks")
FULLY_TESTED = (*IN_REGISTERS, *FLOAT, "q5_1", "iq6_k")  # groups of 32 and of 16


@functools.cache
def _weight(name, *shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if name in FLOAT:
        return jnp.asarray(values, FLOAT[name])
    if name not in quant.ENCODABLE:
        return random_weights.random_weight(name, *shape)
    return jax.tree.map(jnp.asarray, quant.encode(values, name))


@functools.cache
def _decoded(name, *shape):
    return np.asarray(jax.jit(quant.decode)(_weight(name, *shape)), np.float64)


def _size(name, blocks_of_32=21):
    """Rows that end within a chunk of 256 where the format allows it."""
    block = 32 if name in FLOAT else quant.FORMATS[name].block_size
    return 32 * blocks_of_32 // block * block if block < 256 else 768


def _rounded(x):
    """Activations as the kernels take them: 32 neighbours share a scale, largest magnitude / 127."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, where=scale > 0, out=np.zeros_like(scale))
    return (np.rint(groups * inverse).astype(np.float64) * scale).reshape(x.shape)


def _definition(x, name, *shape):
    x = x.astype(np.float64) if name in FLOAT else _rounded(x)
    return x @ _decoded(name, *shape).T


def _distance(out, expected):
    return np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("name", FORMATS)
def test_matmul_is_the_definition(name, instruction_set):
    arrays, _ = dispatch.operands(_weight(name, 37, _size(name)))
    for rows in (0, 1, 2, 3, 7, 8, 13, 29) if name in FULLY_TESTED else (1, 9):
        x = np.random.default_rng(rows).standard_normal((rows, _size(name))).astype(np.float32)
        out = np.asarray(cpu_kernels.matmul(jnp.asarray(x), *arrays, format=name))
        chex.assert_shape(out, (rows, 37))
        assert _distance(out, _definition(x, name, 37, _size(name))) < 2e-5


@pytest.mark.parametrize("name", FULLY_TESTED)
def test_matmul_with_many_rows_is_the_definition(name, instruction_set):
    shape = 1211, _size(name, 9)  # for each thread several panels at a time, and some that are left
    arrays, _ = dispatch.operands(_weight(name, *shape))
    x = np.random.default_rng(0).standard_normal((35, shape[1])).astype(np.float32)
    out = np.asarray(cpu_kernels.matmul(jnp.asarray(x), *arrays, format=name))
    assert _distance(out, _definition(x, name, *shape)) < 2e-5
    alone = cpu_kernels.matmul(jnp.asarray(x[:2]), *arrays, format=name)
    np.testing.assert_array_equal(alone, out[:2])


@pytest.mark.parametrize("name", ["q8_0", "f16"])
def test_rows_do_not_depend_on_their_neighbours(name, instruction_set):
    arrays, _ = dispatch.operands(_weight(name, 40, 256))
    x = np.random.default_rng(0).standard_normal((17, 256)).astype(np.float32)
    order = np.random.default_rng(1).permutation(17)
    out, permuted = (
        np.asarray(cpu_kernels.matmul(jnp.asarray(a), *arrays, format=name)) for a in (x, x[order])
    )
    np.testing.assert_allclose(permuted, out[order], rtol=2e-5, atol=1e-4)
    x[3, 5], x[4, 200] = np.nan, np.inf
    spoiled = np.asarray(cpu_kernels.matmul(jnp.asarray(x), *arrays, format=name))
    assert not np.isfinite(spoiled[[3, 4]]).any()
    np.testing.assert_array_equal(np.delete(spoiled, [3, 4], axis=0), np.delete(out, [3, 4], axis=0))


def test_rows_of_nan_and_of_tiny_numbers(instruction_set):
    arrays, _ = dispatch.operands(_weight("q8_0", 40, 64))
    x = np.stack([np.full(64, np.nan), np.full(64, 1e-38), np.ones(64)]).astype(np.float32)
    out = np.asarray(cpu_kernels.matmul(jnp.asarray(x), *arrays, format="q8_0"))
    assert np.isnan(out[0]).all() and (out[1] == 0).all() and np.isfinite(out[2]).all()


@pytest.mark.parametrize("name", ["q8_0", "q4_K", "iq4_xs", "f16"])
def test_products_that_keep_the_rest_are_nearly_those_of_float32(name, instruction_set):
    weight, exact_weight = _weight(name, 37, 512), _decoded(name, 37, 512)
    x = np.random.default_rng(1).standard_normal((2, 3, 512)).astype(np.float32)
    x[0, 1, :32], x[1, 0] = 0, 0
    multiply = jax.jit(functools.partial(quant.matmul, keeps_rest=True))
    out, exact = multiply(x, weight), x @ exact_weight.T
    assert _distance(out, exact) < 1e-4
    if name in FLOAT:
        np.testing.assert_array_equal(out, quant.matmul(x, weight))
    else:
        assert _distance(quant.matmul(x, weight), exact) > 2e-3
    gradient = jax.grad(lambda x: multiply(x, weight).sum())(x)
    assert _distance(gradient, np.broadcast_to(exact_weight.sum(0), x.shape)) < 1e-4
    x[0, 2, 7], x[1, 1, 40] = np.nan, np.inf
    spoiled = multiply(x, weight)
    assert not np.isfinite(spoiled[(0, 1), (2, 1)]).any()
    np.testing.assert_array_equal(spoiled[0, :2], out[0, :2])


@pytest.mark.parametrize("name", FORMATS)
def test_head_products_are_the_definition(name, instruction_set):
    N, stride, out, size = 3, 11, 5, _size(name, 8)
    arrays, _ = dispatch.operands(_weight(name, N * stride, size))
    decoded = _decoded(name, N * stride, size).reshape(N, stride, size)
    for tokens in (0, 1, 9) if name in FULLY_TESTED else (2,):
        x = np.random.default_rng(0).standard_normal((tokens, N, size)).astype(np.float32)
        values = cpu_kernels.head_matmul(
            jnp.asarray(x), *arrays, format=name, out=out, stride=stride, first=6
        )
        exact = x.astype(np.float64) if name in FLOAT else _rounded(x)
        assert _distance(np.asarray(values), np.einsum("xni,noi->xno", exact, decoded[:, 6:])) < 2e-5
        y = x[..., :6]
        keys = cpu_kernels.head_transposed(jnp.asarray(y), *arrays, format=name, size=size, stride=stride)
        assert _distance(np.asarray(keys), np.einsum("xno,noi->xni", y, decoded[:, :6])) < 2e-5


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("name", ["q8_0", "q4_K", "f16", "f32"])
@pytest.mark.parametrize("X", [0, 1, 5, 40])
def test_expert_ffn_is_xla_of_the_same_weights(name, merged, X, instruction_set):
    E, K, D, F = 6, 3, 256, 512
    experts = {"gate_up": _weight(name, E, 2 * F, D)} if merged else {}
    if not merged:
        experts = {"gate": _weight(name, E, F, D, seed=1), "up": _weight(name, E, F, D, seed=2)}
    experts["down"] = _weight(name, E, D, F, seed=3)
    rng = np.random.default_rng(X)
    x = jnp.asarray(rng.standard_normal((X, D)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, E + 1, (X, K)), jnp.int32)  # E is none
    weights = jnp.asarray(rng.random((X, K)), jnp.float32)
    out = np.asarray(layers.experts_on_cpu(x, ids, weights, experts))
    with jax.default_matmul_precision("highest"):
        expected = (
            np.asarray(moe._grouped_ffn(x, ids, weights, experts, num_experts=E, multiply=moe._tiles_in_turn))
            if X
            else out
        )
    assert _distance(out, expected) < (1e-5 if name in FLOAT else 2e-2)


def test_unselected_experts_may_hold_anything():
    E, D, F = 4, 32, 64
    experts = {
        "gate": _weight("f32", E, F, D),
        "up": _weight("f32", E, F, D),
        "down": _weight("f32", E, D, F),
    }
    x, ids, weights = jnp.ones((2, D)), jnp.asarray([[1, E], [1, 3]], jnp.int32), jnp.ones((2, 2))
    clean = layers.experts_on_cpu(x, ids, weights, experts)
    spoiled = {name: weight.at[jnp.asarray([0, 2])].set(jnp.nan) for name, weight in experts.items()}
    np.testing.assert_array_equal(layers.experts_on_cpu(x, ids, weights, spoiled), clean)


def test_products_use_the_kernels_unless_float32_is_asked_for():
    weight, x = _weight("q8_0", 64, 256), jnp.ones((1, 256))
    assert "mla_matmul" in jax.jit(quant.matmul).lower(x, weight).as_text()
    with jax.default_matmul_precision("highest"):
        assert "mla_matmul" not in jax.jit(quant.matmul).lower(x, weight).as_text()


def test_gradients_are_those_of_xla():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 256)), jnp.float32)
    weights = {
        "gate": _weight("q8_0", 64, 256),
        "up": _weight("q8_0", 64, 256),
        "down": _weight("q4_0", 256, 64),
    }
    direction = jnp.ones((3, 256))

    def loss(x):
        return jnp.sum(dispatch.run(x, weights, cpu=layers._one_expert_on_cpu, default=layers.gated_ffn))

    def product(x):
        return jnp.sum(quant.matmul(x, weights["gate"]))

    for function in (loss, product):
        value, slope = jax.jit(functools.partial(jax.jvp, function))((x,), (direction,))
        gradient = jax.jit(jax.grad(function))(x)
        with jax.default_matmul_precision("highest"):
            exact, exact_slope = jax.jvp(function, (x,), (direction,))
            exact_gradient = jax.grad(function)(x)
        np.testing.assert_allclose(value, exact, rtol=2e-2)
        np.testing.assert_allclose(slope, exact_slope, rtol=2e-2)
        assert _distance(gradient, exact_gradient) < 2e-2


def test_vmap_is_a_loop():
    weight = _weight("q6_K", 33, 512)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 512)), jnp.float32)
    mapped = jax.jit(jax.vmap(quant.matmul, in_axes=(0, None)))(x, weight)
    np.testing.assert_array_equal(mapped, jnp.stack([quant.matmul(row, weight) for row in x]))
    stacked = _weight("q6_K", 4, 33, 512)
    mapped = jax.jit(jax.vmap(quant.matmul))(x, stacked)
    np.testing.assert_array_equal(mapped, jnp.stack([quant.matmul(x[i], stacked[i]) for i in range(4)]))


def test_unaligned_weights():
    """A slice of a larger array may begin at any byte."""
    weight, x = _weight("q8_0", 9, 96), jnp.ones((2, 96))
    aligned = cpu_kernels.matmul(x, weight.blocks, jnp.zeros((0,), jnp.uint8), format="q8_0")
    large = np.zeros(weight.blocks.size + 64, np.uint8)
    for shift in (1, 2, 33):
        view = large[shift : shift + weight.blocks.size].reshape(weight.blocks.shape)
        view[:] = weight.blocks
        out = cpu_kernels.matmul(x, jnp.asarray(view), jnp.zeros((0,), jnp.uint8), format="q8_0")
        np.testing.assert_array_equal(out, aligned)


def test_every_block_format_has_kernels():
    assert cpu_kernels.formats() == {*quant.FORMATS, *FLOAT}


@pytest.mark.parametrize(
    "change", [dict(stride=1 << 24), dict(stride=9), dict(first=1), dict(first=-1), dict(out=17)], ids=str
)
def test_heads_beyond_the_weight_are_refused(change):
    arrays, _ = dispatch.operands(_weight("q8_0", 32, 64))
    settings = dict(format="q8_0", out=8, stride=8, first=0)
    x = jnp.ones((1, 4, 64))
    jax.block_until_ready(cpu_kernels.head_matmul(x, *arrays, **settings))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit each other"):
        jax.block_until_ready(cpu_kernels.head_matmul(x, *arrays, **settings | change))


@pytest.mark.parametrize("change", [dict(stride=1 << 24), dict(stride=9), dict(size=96)], ids=str)
def test_transposed_heads_beyond_the_weight_are_refused(change):
    arrays, _ = dispatch.operands(_weight("q8_0", 32, 64))
    settings = dict(format="q8_0", size=64, stride=8)
    x = jnp.ones((1, 4, 8))
    jax.block_until_ready(cpu_kernels.head_transposed(x, *arrays, **settings))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit each other"):
        jax.block_until_ready(cpu_kernels.head_transposed(x, *arrays, **settings | change))


def test_calls_at_the_same_time_do_not_disturb_each_other():
    arrays, _ = dispatch.operands(_weight("q8_0", 2048, 512))
    multiply = jax.jit(lambda x: cpu_kernels.matmul(x, *arrays, format="q8_0"))
    callers = 18  # more than others help at a time
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((callers, 3, 512)), jnp.float32)
    alone = [np.asarray(multiply(x)) for x in inputs]

    def repeat(i):
        return [np.asarray(multiply(inputs[i])) for _ in range(100)]

    with concurrent.futures.ThreadPoolExecutor(callers) as threads:
        for expected, results in zip(alone, threads.map(repeat, range(callers)), strict=True):
            for result in results:
                np.testing.assert_array_equal(result, expected)


def test_products_without_their_codebook_are_refused():
    weight, x = _weight("iq1_s", 37, 256), jnp.ones((1, 256))
    arrays, _ = dispatch.operands(weight)
    book = codebooks.codebook("iq1")
    library._load()[0].mla_set_codebook(b"iq1", None, ctypes.c_int64(book.size))
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="codebook of format iq1_s was not set"):
            jax.block_until_ready(cpu_kernels.matmul(x, *arrays, format="iq1_s"))
    finally:
        cpu_kernels.set_codebook("iq1", book)
    assert np.isfinite(cpu_kernels.matmul(x, *arrays, format="iq1_s")).all()


@pytest.mark.parametrize(("name", "shape"), [("iq7", (2048, 8)), ("iq1", (2048, 4))])
def test_codebook_of_another_name_or_size_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"must be those of a codebook, got '{name}' and .*{shape[1]}"):
        cpu_kernels.set_codebook(name, np.zeros(shape, np.int8))


def test_unknown_format_and_instruction_set_are_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="no kernel for format q9_9"):
        jax.block_until_ready(
            cpu_kernels.matmul(
                jnp.ones((1, 32)), jnp.zeros((1, 1, 34), jnp.uint8), jnp.zeros((0,), jnp.uint8), format="q9_9"
            )
        )
    with pytest.raises(jax.errors.JaxRuntimeError, match="x does not fit the weight"):
        jax.block_until_ready(
            cpu_kernels.matmul(
                jnp.ones((1, 64)), jnp.zeros((1, 1, 34), jnp.uint8), jnp.zeros((0,), jnp.uint8), format="q8_0"
            )
        )
    with pytest.raises(ValueError, match=r"name must be one of .*generic, got 'mmx'"):
        cpu_kernels.use_instruction_set("mmx")
