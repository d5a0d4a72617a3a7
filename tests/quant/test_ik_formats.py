"""Formats of ik_llama.cpp against their definitions, and against its own library."""

import chex
import ik_definitions
import ik_library
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools.interleave import deinterleave
from mla_jax.quant import FORMATS, QuantizedTensor, decode, matmul, take_rows

NAMES = tuple(ik_definitions.DEFINITIONS)
SANE = "sane"
SCALES = {  # of the type of the scale; None for whatever the random bytes say
    SANE: lambda kind: (0.01, -0.02, 1.5),
    "zero": lambda kind: (0.0, -0.0),
    "subnormal": lambda kind: (np.finfo(kind).smallest_subnormal, -3 * np.finfo(kind).smallest_subnormal),
    "largest": lambda kind: (np.finfo(kind).max, np.finfo(kind).min),
    "infinite": lambda kind: (np.inf, -np.inf),
    "nan": lambda kind: (np.nan,),
    "any": None,
}
ROWS, COUNT = 2, 3
TERNARY = ("iq1_bn", "iq2_bn")
GROUPS = {"iq1_s_r4": 4, "iq1_m_r4": 4, "q8_k_r8": 8}  # rows that the library interleaves

each_format = pytest.mark.parametrize("name", NAMES)
jit_decode = jax.jit(decode)


def random_weight(name, cases, shape=(ROWS,), count=COUNT):
    """Returns random rows of blocks on the host, [len(cases), *shape] of them, with scales as a case says."""
    rng = np.random.default_rng(0)
    fmt, (source, kind, _) = FORMATS[name], ik_definitions.DEFINITIONS[name]
    lead = (len(cases), *shape)
    blocks = rng.integers(0, 256, (*lead, count, fmt.block_bytes), dtype=np.uint8)
    header = rng.integers(0, 256, (*lead, fmt.header_bytes), dtype=np.uint8)
    held = blocks if source == "block" else header
    size = np.dtype(kind).itemsize
    for case, part in zip(cases, held, strict=True):
        if SCALES[case] is not None:
            scales = rng.choice(np.array(SCALES[case](kind), kind), (*part.shape[:-1], 1))
            part[..., :size] = scales.view(np.uint8)
    return QuantizedTensor(blocks=blocks, header=header if fmt.header_bytes else None, format=name)


def by_definition(weight):
    """Returns float32[..., size] of the slow definition."""
    size = FORMATS[weight.format].block_size
    values = ik_definitions.decode_by_definition(weight.format, weight.blocks, weight.header, size)
    return values.reshape(*weight.blocks.shape[:-2], -1)


def assert_same_bits(actual, expected, lost=False):
    """Checks equality of every bit, or of NaN and NaN; where `lost`, a zero of the same sign will do."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    same = (actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))
    same |= lost & (actual == 0) & (np.signbit(actual) == np.signbit(expected))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"


@each_format
def test_decode_is_bit_equal_to_the_definition(name):
    weight = random_weight(name, tuple(SCALES))
    # XLA reads subnormal float32 numbers as zeros on CPUs; float16 scales are normal once they are widened.
    scale = ik_definitions.scale_of(name, weight.blocks, weight.header)
    lost = (np.abs(scale) < np.finfo(np.float32).smallest_normal).any(axis=(-2, -1), keepdims=True)[..., 0]
    assert_same_bits(np.asarray(jit_decode(weight)), by_definition(weight), lost)


@pytest.mark.parametrize("name", ["iq2_kl", "iq4_ks", "q8_KV", "iq1_bn"])
def test_rows_and_experts_keep_their_header(name):
    weight = jax.tree.map(jnp.asarray, random_weight(name, (SANE,) * 4, (6,)))
    values = np.asarray(jit_decode(weight))
    assert weight.shape == values.shape == (4, 6, COUNT * FORMATS[name].block_size)
    for index in (1, -1, slice(1, 3), (2, 3), (slice(None), 2), np.array([3, 0, 3])):
        chosen = weight[index]
        assert chosen.shape == values[index].shape
        chex.assert_trees_all_equal(chosen.header, weight.header[index])
    chex.assert_trees_all_equal(np.asarray(jit_decode(weight[2, 3])), values[2, 3])
    chex.assert_trees_all_equal(np.asarray(jax.jit(jax.vmap(decode))(weight)), values)
    ids = np.array([[0, 5, 3], [5, 5, 1]], np.int32)
    rows = jax.jit(take_rows)(weight[1], jnp.asarray(ids))
    chex.assert_trees_all_equal(np.asarray(rows), values[1][ids])


@pytest.mark.parametrize(
    "name", ["q6_0", "iq2_kl", "iq4_k", "iq4_kss", "iq1_kt", "iq4_kt", "q8_KV", "iq2_bn"]
)
def test_matmul_is_decoding_and_a_dot(name):
    experts = jax.tree.map(jnp.asarray, random_weight(name, (SANE,) * 2, (6,)))
    values = np.asarray(jit_decode(experts), np.float64)
    x = np.random.default_rng(1).standard_normal((2, 5, values.shape[-1]), dtype=np.float32)
    for rows in (1, 5):
        result = jax.jit(jax.vmap(matmul))(jnp.asarray(x[:, :rows]), experts)
        expected = np.einsum("ebi,eoi->ebo", x[:, :rows].astype(np.float64), values)
        bound = 1e-6 * np.einsum("ebi,eoi->ebo", np.abs(x[:, :rows]).astype(np.float64), np.abs(values))
        assert (np.abs(np.asarray(result) - expected) <= bound).all()


def dequantise(weight):
    """Returns what the library makes of a weight of 2 axes, float32[rows, size]."""
    values = np.zeros(weight.shape, np.float32)
    for row, blocks in enumerate(weight.blocks.reshape(len(values), -1)):
        has_scale = weight.header is not None and weight.format not in TERNARY
        stored = np.concatenate([weight.header[row], blocks]) if has_scale else blocks.copy()
        values[row] = ik_library.dequantise_row(weight.format, stored, values.shape[1])
    if weight.format in TERNARY:  # for these it gives codes, and does not expect a header
        values *= ik_definitions.scale_of(weight.format, weight.blocks, weight.header)[..., 0]
    return values


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in NAMES if name not in GROUPS])
def test_decode_is_bit_equal_to_ggml(name):
    """Compares random blocks and blocks that the library has quantised, and these with their source."""
    weight = random_weight(name, (SANE,) * len(SCALES))
    rng, shape = np.random.default_rng(2), (ROWS, weight.shape[-1])
    source = rng.standard_normal(shape, dtype=np.float32)
    if name in TERNARY:
        source = rng.choice(np.array([-0.375, 0.0, 0.375], np.float32), shape)
    weight.blocks[-1], header = ik_library.quantise(name, source)
    if weight.header is not None:
        weight.header[-1] = header
    values = np.asarray(jit_decode(weight))
    if name in TERNARY:
        np.testing.assert_array_equal(values[-1], source)
    else:
        # No code of so many bits has a smaller error than 2 ** -bits; 1.3 to 1.8 times that is measured.
        limit = 2 ** (-8 * FORMATS[name].block_bytes / FORMATS[name].block_size)
        assert limit < np.sqrt(np.mean((values[-1] - source) ** 2)) < 2 * limit
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), weight)
    values, expected = values.reshape(flat.shape), dequantise(flat)
    if name != "iq6_k":
        assert_same_bits(values, expected)
        return
    # The library evaluates the cubic from which the table is rounded, so that a value is off by up to 0.488.
    size = FORMATS[name].block_size
    scale, _ = ik_definitions.parts_of(name, flat.blocks, size)
    scale = ik_definitions.scale_of(name, flat.blocks, None) * scale
    assert (np.abs(values - expected) <= 0.488 * np.abs(scale).reshape(values.shape)).all()


@pytest.mark.peer
@pytest.mark.parametrize("name", GROUPS)
def test_decode_is_bit_equal_to_ggml_on_rows_taken_apart(name):
    """Compares a group of random rows: to quantise one takes the library many seconds."""
    rng = np.random.default_rng(3)
    fmt, rows = FORMATS[name], GROUPS[name]
    size = COUNT * fmt.block_size
    stored = rng.integers(0, 256, rows * (fmt.header_bytes + COUNT * fmt.block_bytes), dtype=np.uint8)
    for start in (0,) if fmt.header_bytes else range(0, stored.size, rows * fmt.block_bytes):
        scales = rng.uniform(0.001, 0.1, rows).astype(np.float16)
        stored[start : start + scales.nbytes] = scales.view(np.uint8)
    header, blocks = np.split(deinterleave(name, stored, size), [fmt.header_bytes], axis=1)
    weight = QuantizedTensor(
        blocks=blocks.reshape(rows, COUNT, -1), header=header if fmt.header_bytes else None, format=name
    )
    expected = ik_library.dequantise_row(name, stored, rows * size).reshape(rows, size)
    assert_same_bits(np.asarray(jit_decode(weight)), expected)
