"""Grouped products: layouts against the blocks of GGUF, kernels against the definition and reference."""

import functools

import chex
import gpu_target
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import quant
from pallas_kernels import grouped_matmul as op
from pallas_kernels import grouped_matmul_bodies as bodies
from pallas_kernels import weight_tiles

PLAIN = {"f16": jnp.float16, "bf16": jnp.bfloat16}
# Where the float16 numbers of a block are, and how large its codes and scales make a weight.
SCALES = {
    "q8_0": ((0,), 127),
    "q4_0": ((0,), 8),
    "iq4_xs": ((0,), 127 * 32),
    "iq4_ks": ((), 127 * 127),
    "q4_K": ((0, 2), 63 * 15),
    "q6_K": ((208,), 128 * 32),
}
FORMATS = [*SCALES, *PLAIN]
ROUNDING = {"bf16": 4e-3}  # of the operands of tensor cores; a scale that is left out changes everything
E, F = 3, 24

each_format = pytest.mark.parametrize("name", FORMATS)


def tolerance(name, tokens):
    return 1e-6 if tokens == 1 else ROUNDING.get(name, 4e-4)


def columns(name):
    """Rows whose last tile overlaps the one before, in one body at least."""
    return 328 if name in PLAIN else 320 if quant.FORMATS[name].block_size == 32 else 768


@functools.cache
def random_weight(name, *shape, seed=0):
    """Returns random bits with scales that make weights of usual size, and what they decode to."""
    rng = np.random.default_rng(seed)
    if name in PLAIN:
        weight = jnp.asarray(rng.standard_normal(shape), PLAIN[name])
        return weight_tiles.repack(weight, None, name), np.asarray(weight, np.float64)
    fmt, (places, largest) = quant.FORMATS[name], SCALES[name]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // fmt.block_size, fmt.block_bytes), np.uint8)
    random_scale = lambda size, dtype: (
        (rng.uniform(0.5, 2, (*size, 1)) / largest).astype(dtype).view(np.uint8)
    )
    for place in places:
        blocks[..., place : place + 2] = random_scale(blocks.shape[:-1], np.float16)
    header = jnp.asarray(random_scale(shape[:-1], np.float32)) if fmt.header_bytes else None
    weight = quant.QuantizedTensor(blocks=jnp.asarray(blocks), header=header, format=name)
    planes = jax.jit(functools.partial(weight_tiles.repack, format=name))(weight.blocks, header)
    return planes, np.asarray(jax.jit(quant.decode)(weight), np.float64)


def tokens_of(num_tiles, num_tokens, size, dtype=jnp.float32):
    x = np.random.default_rng(num_tokens).standard_normal((num_tiles, num_tokens, size))
    return jnp.asarray(x, dtype)


def without(planes, expert):
    """Spoils one expert: its floats are NaN, its other numbers as large as they can be."""
    largest = lambda dtype: jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max
    return tuple(part.at[expert].set(largest(part.dtype)) for part in planes)


def definition(x, decoded, experts):
    """Loops over tiles in float64."""
    out = np.zeros((*x.shape[:2], decoded.shape[1]))
    for y, expert in enumerate(experts):
        if 0 <= expert < len(decoded):
            out[y] = np.asarray(x[y], np.float64) @ decoded[expert].T
    return out


def distance(out, expected):
    return np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALES)
def test_decode_is_that_of_the_blocks(name):
    fmt, rng = quant.FORMATS[name], np.random.default_rng(0)
    blocks = jnp.asarray(rng.integers(0, 256, (2, 5, 4, fmt.block_bytes), np.uint8))
    header = (
        jnp.asarray(rng.integers(0, 256, (2, 5, fmt.header_bytes), np.uint8)) if fmt.header_bytes else None
    )
    planes = jax.jit(functools.partial(weight_tiles.repack, format=name))(blocks, header)
    decoded = jax.jit(quant.decode)(quant.QuantizedTensor(blocks=blocks, header=header, format=name))
    decode = jax.jit(functools.partial(weight_tiles.decode, format=name))
    np.testing.assert_array_equal(decode(planes), decoded)
    np.testing.assert_array_equal(decode(tuple(part[1, 2] for part in planes)), decoded[1, 2])
    assert weight_tiles.num_columns(planes, name) == decoded.shape[-1]


@each_format
def test_layouts_are_hardly_larger_than_blocks(name):
    planes, _ = random_weight(name, E, F, columns(name))
    num_bytes = sum(part.nbytes for part in planes)
    assert num_bytes == E * F * weight_tiles.row_bytes(columns(name), name)
    if name in SCALES:
        fmt = quant.FORMATS[name]
        of_blocks = E * F * (columns(name) // fmt.block_size * fmt.block_bytes + fmt.header_bytes)
        assert of_blocks <= num_bytes <= 1.03 * of_blocks


@each_format
def test_planes_of_x_are_those_of_the_weight(name):
    (planes, decoded), kind = random_weight(name, E, F, columns(name)), weight_tiles.layout(name)

    @jax.jit
    def in_planes_of(planes):
        table = None if kind.table is None else jnp.asarray(kind.table)
        tile = kind.tile(planes, table, jnp.float32)
        return jnp.stack([tile.plane(n) for n in range(kind.planes)], axis=-2)

    expected = weight_tiles.in_planes(jnp.asarray(decoded, jnp.float32), name)
    np.testing.assert_array_equal(in_planes_of(planes), expected)


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [*((name, m) for name in FORMATS for m in (1, 16)), *((n, m) for n in ("q4_K", "bf16") for m in (3, 32))],
)
def test_kernel_is_the_definition(name, num_tokens):
    """Expert 1 is no tile's and the third tile is no expert's: both hold NaN."""
    size, experts = columns(name), [2, 0, E, -1]
    planes, decoded = random_weight(name, E, F, size)
    x = tokens_of(len(experts), num_tokens, size)
    args = (x.at[2].set(jnp.nan), without(planes, 1), jnp.asarray(experts, jnp.int32))
    out = op.grouped_matmul(*args, format=name, implementation="interpret")
    chex.assert_shape(out, (len(experts), num_tokens, F))
    expected = definition(x, decoded, experts)
    assert distance(out, expected) < tolerance(name, num_tokens)
    assert (np.asarray(out[2:]) == 0).all()


@each_format
def test_reference_is_the_definition(name):
    size, experts = columns(name), [2, 0, E, -1]
    planes, decoded = random_weight(name, E, F, size)
    x = tokens_of(len(experts), 3, size)
    args = (x.at[2].set(jnp.nan), without(planes, 1), jnp.asarray(experts, jnp.int32))
    out = op.grouped_matmul(*args, format=name, implementation="reference")
    assert distance(out, definition(x, decoded, experts)) < 1e-6
    assert (np.asarray(out[2:]) == 0).all()


def test_reference_is_ragged_dot():
    planes, decoded = random_weight("q4_K", E, F, 256)
    experts, tile = jnp.asarray([0, 0, 2], jnp.int32), 8
    x = tokens_of(3, tile, 256)
    weight = jnp.asarray(decoded.swapaxes(1, 2), jnp.float32)
    expected = jax.lax.ragged_dot(x.reshape(-1, 256), weight, jnp.bincount(experts, length=E) * tile)
    out = op.grouped_matmul(x, planes, experts, format="q4_K")
    np.testing.assert_allclose(out.reshape(-1, F), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "config"),
    [
        (1, op.Config(rows=8, words=4)),
        (1, op.Config(rows=1024, words=1024)),
        (32, op.Config(tokens=16, rows=16, words=16)),
        (48, op.Config(tokens=128, rows=128, words=64)),
    ],
    ids=["vector-small", "vector-large", "matrix-small", "matrix-large"],
)
def test_tile_sizes_do_not_change_the_result(num_tokens, config):
    name = "q6_K"
    planes, decoded = random_weight(name, E, 37, 768)
    x, experts = tokens_of(2, num_tokens, 768), jnp.asarray([1, 2], jnp.int32)
    out = op.grouped_matmul(x, planes, experts, format=name, implementation="interpret", config=config)
    assert distance(out, definition(x, decoded, [1, 2])) < tolerance(name, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_permuted_tiles_give_permuted_results(num_tokens):
    planes, _ = random_weight("q4_0", E, F, 320)
    experts, order = jnp.asarray([0, 1, 1, 2], jnp.int32), jnp.asarray([2, 0, 3, 1])
    run = functools.partial(op.grouped_matmul, format="q4_0", implementation="interpret")
    x = tokens_of(4, num_tokens, 320)
    np.testing.assert_array_equal(run(x[order], planes, experts[order]), run(x, planes, experts)[order])


@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(jnp.float32, 1e-35), (jnp.bfloat16, 1e35)], ids=["f32-small", "bf16-large"]
)
def test_rows_of_any_magnitude(dtype, magnitude):
    planes, decoded = random_weight("q4_0", E, F, 320)
    x = tokens_of(1, 16, 320) * jnp.float32(magnitude)
    x = x.at[0, 3].set(0).at[0, 4].set(1).astype(dtype)
    out = op.grouped_matmul(x, planes, jnp.zeros(1, jnp.int32), format="q4_0", implementation="interpret")
    expected = definition(x, decoded, [0])
    assert distance(out, expected) < tolerance("q4_0", 16)
    assert (np.asarray(out[0, 3]) == 0).all() and distance(out[0, 4], expected[0, 4]) < 4e-4


# --- gate and up --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("names", [("q4_K", "q4_K"), ("iq4_ks", None), ("f16", "q8_0")], ids=str)
def test_fused_is_unfused(names, num_tokens):
    is_merged, size = names[1] is None, 512
    gate, gate_decoded = random_weight(names[0], E, 2 * F if is_merged else F, size)
    up, up_decoded = (None, gate_decoded[:, F:]) if is_merged else random_weight(names[1], E, F, size, seed=1)
    x, experts = tokens_of(3, num_tokens, size), [2, 1, E]
    run = functools.partial(
        op.grouped_gated,
        x / np.sqrt(size),
        without(gate, 0),
        up,
        jnp.asarray(experts, jnp.int32),
        formats=(names[0], names[1] or names[0]),
    )
    gated, multiplied = (
        definition(x / np.sqrt(size), part, experts) for part in (gate_decoded[:, :F], up_decoded)
    )
    expected = gated / (1 + np.exp(-gated)) * multiplied
    assert distance(run(implementation="interpret"), expected) < 2 * tolerance(names[0], num_tokens)
    assert distance(run(implementation="reference"), expected) < 2e-6


# --- what can run, and where ----------------------------------------------------------------------


def shapes_of(name, *shape):
    """Returns the shapes of a weight's arrays without making it."""
    if name in PLAIN:
        return (jax.ShapeDtypeStruct(shape, PLAIN[name]),)
    fmt = quant.FORMATS[name]
    bytes_of = lambda *sizes: jax.ShapeDtypeStruct((*shape[:-1], *sizes), jnp.uint8)
    blocks = bytes_of(shape[-1] // fmt.block_size, fmt.block_bytes)
    header = bytes_of(fmt.header_bytes) if fmt.header_bytes else None
    return jax.eval_shape(functools.partial(weight_tiles.repack, format=name), blocks, header)


@pytest.mark.parametrize("num_tokens", [1, 128])
@pytest.mark.parametrize("sizes", [(64, 1408, 2048), (256, 2048, 7168)], ids=["V2-Lite", "V3"])
@each_format
def test_lowers_for_a_gpu(name, sizes, num_tokens):
    experts, rows, size = sizes
    x = jax.ShapeDtypeStruct((6, num_tokens, size), jnp.float32)
    ids, weight = jax.ShapeDtypeStruct((6,), jnp.int32), shapes_of(name, experts, rows, size)
    text = gpu_target.lowered_for_gpu(functools.partial(op.grouped_matmul, format=name), x, weight, ids)
    assert "__gpu$xla.gpu.triton" in text
    gated = functools.partial(op.grouped_gated, formats=(name, name))
    assert gpu_target.lowered_for_gpu(gated, x, weight, weight, ids).count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(("shared_memory", "rows"), [(227, (128, 64)), (163, (128, 64)), (99, (64, 32))])
def test_wide_tiles_fit_the_shared_memory(shared_memory, rows):
    """Compiled by benchmarks/gpu_compile.py: three buffers of 128 rows do not fit an RTX 4090."""
    for num_weights in (1, 2):
        config = bodies.Config.for_shape(512, "iq4_xs", num_weights, shared_memory << 10)
        assert (config.tokens, config.rows) == (128, rows[num_weights - 1])


def test_cpu_takes_the_reference():
    planes, _ = random_weight("q8_0", E, F, 320)
    x, experts = tokens_of(2, 3, 320), jnp.asarray([0, 2], jnp.int32)
    run = functools.partial(op.grouped_matmul, x, planes, experts, format="q8_0")
    assert "triton" not in jax.jit(run).lower().as_text()
    np.testing.assert_array_equal(run(), run(implementation="reference"))


@pytest.mark.parametrize(
    ("x", "weight", "sentence"),
    [
        ((1, 16, 256), (1, 8, 256), "at least 16 rows and 128 columns"),
        ((1, 16, 96), (1, 32, 96), "at least 16 rows and 128 columns"),
        ((0, 1, 256), (1, 8, 256), "must not be empty"),
    ],
)
def test_small_shapes_are_for_the_reference(x, weight, sentence):
    planes, _ = random_weight("q4_0", *weight)
    args = (jnp.ones(x), planes, jnp.zeros(x[:1], jnp.int32))
    with pytest.raises(NotImplementedError, match=sentence):
        op.grouped_matmul(*args, format="q4_0", implementation="interpret")
    chex.assert_shape(op.grouped_matmul(*args, format="q4_0"), (*x[:2], weight[1]))


def test_arrays_beyond_the_reach_of_the_kernel_are_refused():
    x, ids = jax.ShapeDtypeStruct((1, 1, 7168), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    run = functools.partial(op.grouped_matmul, format="q6_K", implementation="triton")
    with pytest.raises(NotImplementedError, match="array 2 of the weight must have at most 2"):
        jax.eval_shape(run, x, shapes_of("q6_K", 256, 19000, 7168), ids)


def test_wrong_arguments_are_refused():
    planes, _ = random_weight("q4_0", E, F, 320)
    x, experts = tokens_of(2, 1, 320), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="must fit weights"):
        op.grouped_matmul(x[..., :288], planes, experts, format="q4_0")
    with pytest.raises(ValueError, match=r"experts must be \[Y\]"):
        op.grouped_matmul(x, planes, experts[:1], format="q4_0")
    with pytest.raises(ValueError, match="format must be one of"):
        op.grouped_matmul(x, planes, experts, format="q3_K")
    with pytest.raises(ValueError, match="even number of rows"):
        odd, _ = random_weight("q4_0", E, 37, 320)
        op.grouped_gated(x, odd, None, experts, formats=("q4_0", "q4_0"))
    with pytest.raises(ValueError, match="rows must be a power of two, got 24"):
        op.Config(rows=24)


def test_cost_counts_each_expert_once():
    cost = op.cost(tokens=12, rows=1408, columns=2048, format="q4_0", num_experts=5, num_weights=2)
    assert cost.flops == 2 * 12 * 2 * 1408 * 2048
    assert cost.bytes_accessed == 5 * 2 * 1408 * 2048 * 18 // 32 + 4 * 12 * (1408 + 2048)
    assert cost.transcendentals == 12 * 1408


@pytest.mark.gpu
@gpu_target.needs_gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 128])
@each_format
def test_compiled_kernel_is_the_definition(name, num_tokens):
    planes, decoded = random_weight(name, 4, 1408, 2048)
    experts = [2, 2, 0, 4, 3]
    x = tokens_of(len(experts), num_tokens, 2048)
    args = (x, without(planes, 1), jnp.asarray(experts, jnp.int32))
    out = op.grouped_matmul(*args, format=name, implementation="triton")
    assert distance(out, definition(x, decoded, experts)) < tolerance(name, num_tokens)
    gated = op.grouped_gated(*args[:2], None, args[2], formats=(name, name), implementation="triton")
    expected = op.grouped_gated(*args[:2], None, args[2], formats=(name, name), implementation="reference")
    assert distance(gated, np.asarray(expected, np.float64)) < 3 * tolerance(name, num_tokens)
