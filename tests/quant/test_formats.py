"""Decoders of types that the `gguf` package can decode are bit-equal to it on any bytes."""

import gguf
import ik_library
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools import ggml_types
from mla_jax.quant import FORMATS, QuantizedTensor, codebooks, decode

_SCALE_BYTES = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_K": (80, 82),
    "q3_K": (108,),
    "q4_K": (0, 2),
    "q5_K": (0, 2),
    "q6_K": (208,),
    "iq2_xxs": (0,),
    "iq2_xs": (0,),
    "iq2_s": (0,),
    "iq3_xxs": (0,),
    "iq3_s": (0,),
    "iq1_s": (0,),
    "iq1_m": "nibbles",  # the high ones of the last four words
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
_SCALES = {
    "sane": (0.01, -0.02, 1.5),
    "zero": (0.0, -0.0),
    "subnormal": (6e-8, -3e-5),
    "largest": (65504.0, -65504.0),
    "infinite": (np.inf, -np.inf),
    "nan": (np.nan,),
    "any": None,  # whatever the random bytes say
}
_FLOAT4 = {"mxfp4": 1, "nvfp4": 4}  # how many bytes of scale come first
_QUANTISED_BY_GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")
_QUANTISED_BY_PEER = (  # other i-quants take it many seconds to prepare
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K"),
    *("iq4_nl", "iq4_xs", "iq2_xxs", "iq3_xxs", "iq3_s", "mxfp4", "q1_0_g128"),
)
_CODEBOOKS = {
    "iq2_xxs": gguf.quants.IQ2_XXS,
    "iq2_xs": gguf.quants.IQ2_XS,
    "iq2_s": gguf.quants.IQ2_S,
    "iq3_xxs": gguf.quants.IQ3_XXS,
    "iq3_s": gguf.quants.IQ3_S,
    "iq1": gguf.quants.IQ1_S,
}
_jit_decode = jax.jit(decode)


def random_blocks(name, scales, shape=(3, 5)):
    """Returns random blocks uint8[*shape, block_bytes] whose float16 scales are drawn from `scales`."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, FORMATS[name].block_bytes), dtype=np.uint8)
    if scales is None:
        return blocks
    draw = lambda: rng.choice(np.array(scales, np.float16), (*shape, 1))
    if _SCALE_BYTES[name] == "nibbles":
        nibbles = (draw().view(np.uint16) >> np.arange(0, 16, 4, dtype=np.uint16) & 0x0F).astype(np.uint8)
        blocks[..., -7::2] = blocks[..., -7::2] & 0x0F | nibbles << 4
        return blocks
    for start in _SCALE_BYTES[name]:
        blocks[..., start : start + 2] = draw().view(np.uint8)
    return blocks


def gguf_decode(name, blocks):
    """Returns what the `gguf` package makes of blocks: float32[..., size]."""
    rows = blocks.reshape(-1, blocks.shape[-2] * blocks.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(FORMATS[name].ggml_type))
    return values.reshape(*blocks.shape[:-2], -1)


def assert_same_bits(actual, expected, case=""):
    """Checks equality of every bit, signs of zeros included; a NaN equals a NaN of any payload."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    same = (actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))
    assert same.all(), f"{case}: {(~same).sum()} of {same.size} values differ"


def quantisable(name):
    """Returns float32[2, 512], normal numbers, but for ternary weights only what these can be."""
    rng = np.random.default_rng(3)
    if name.startswith("tq"):
        return rng.choice(np.array([-0.375, 0.0, 0.375], np.float32), (2, 512))
    return rng.standard_normal((2, 512), dtype=np.float32)


def assert_is_close(name, values, source):
    """Checks that decoded weights are what was quantised, within what a code of this size can do."""
    error = np.sqrt(np.mean((values - source) ** 2))
    bits = 8 * FORMATS[name].block_bytes / FORMATS[name].block_size
    # No code of this size has less than 2 ** -bits on normal numbers; 1.3 to 2.5 times that is measured.
    assert error == 0 if name.startswith("tq") else 2**-bits < error < 2.6 * 2**-bits


def test_table_agrees_with_that_of_all_types():
    for name, fmt in FORMATS.items():
        kind = ggml_types.TYPES[fmt.ggml_type]
        assert name == fmt.name and kind == (name, fmt.block_size, fmt.block_bytes, fmt.header_bytes)


def test_table_agrees_with_gguf_package():
    for name in (*_SCALE_BYTES, *_FLOAT4):
        fmt = FORMATS[name]
        kind = gguf.GGMLQuantizationType(fmt.ggml_type)
        assert kind.name.lower() == name.lower()
        assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block_size, fmt.block_bytes)


@pytest.mark.parametrize("name", _SCALE_BYTES)
def test_decode_is_bit_equal(name):
    blocks = np.stack([random_blocks(name, scales) for scales in _SCALES.values()])
    values = np.asarray(_jit_decode(QuantizedTensor(blocks=jnp.asarray(blocks), format=name)))
    for case, actual, part in zip(_SCALES, values, blocks, strict=True):
        assert_same_bits(actual, gguf_decode(name, part), case)


@pytest.mark.parametrize("name", _FLOAT4)
def test_decode_is_bit_equal_at_every_scale_and_code(name):
    runs = _FLOAT4[name]
    blocks = random_blocks(name, None, (2, 256 // runs))
    blocks[..., :runs] = np.arange(256, dtype=np.uint8).reshape(-1, runs)
    codes = np.arange(8, dtype=np.uint8) * 0x22 + 0x10  # 16 codes in 8 bytes
    blocks[0, :, runs:] = np.tile(codes, (FORMATS[name].block_bytes - runs) // 8)
    weight = QuantizedTensor(blocks=jnp.asarray(blocks), format=name)
    assert_same_bits(np.asarray(_jit_decode(weight)), gguf_decode(name, blocks))


@pytest.mark.parametrize("name", FORMATS)
def test_decode_takes_any_leading_axes(name):
    fmt = FORMATS[name]
    for lead in ((4,), (2, 3, 2, 4)):
        arrays = [jax.ShapeDtypeStruct((*lead, fmt.block_bytes), jnp.uint8)]
        if fmt.header_bytes:
            arrays.append(jax.ShapeDtypeStruct((*lead[:-1], fmt.header_bytes), jnp.uint8))
        values = jax.eval_shape(fmt.decode, *arrays)
        assert values.shape == (*lead, fmt.block_size) and values.dtype == jnp.float32


@pytest.mark.parametrize("name", ["q5_1", "iq1_m", "mxfp4"])
def test_decode_of_one_block_outside_jit(name):
    block = random_blocks(name, _SCALES["sane"] if name in _SCALE_BYTES else None, (1, 1))
    values = FORMATS[name].decode(jnp.asarray(block[0, 0]))
    assert_same_bits(np.asarray(values)[None], gguf_decode(name, block))


@pytest.mark.parametrize("name", _QUANTISED_BY_GGUF)
def test_weights_quantised_by_gguf_package(name):
    source = quantisable(name)
    stored = gguf.quants.quantize(source, gguf.GGMLQuantizationType(FORMATS[name].ggml_type))
    blocks = stored.reshape(len(source), -1, FORMATS[name].block_bytes)
    values = np.asarray(_jit_decode(QuantizedTensor(blocks=jnp.asarray(blocks), format=name)))
    assert_same_bits(values, gguf_decode(name, blocks))
    assert_is_close(name, values, source)


@pytest.mark.peer
@pytest.mark.parametrize("name", _QUANTISED_BY_PEER)
def test_weights_quantised_by_ggml(name):
    source = quantisable(name)
    quantised, _ = ik_library.quantise(name, source)
    blocks = np.concatenate([quantised, random_blocks(name, None, quantised.shape[:-1])])
    values = np.asarray(_jit_decode(QuantizedTensor(blocks=jnp.asarray(blocks), format=name)))
    expected = [ik_library.dequantise_row(name, row, source.shape[-1]) for row in blocks]
    assert_same_bits(values, np.stack(expected))
    assert_is_close(name, values[: len(source)], source)


@pytest.mark.parametrize("name", _CODEBOOKS)
def test_codebook_equals_that_of_gguf_package(name):
    book, reference = codebooks.codebook(name), _CODEBOOKS[name]
    reference.init_grid()
    assert book.dtype == np.int8 and not book.flags.writeable and codebooks.codebook(name) is book
    np.testing.assert_array_equal(book, reference.grid[0, 0])


def test_q8_0_by_hand():
    block = np.zeros(34, np.uint8)
    block[:2] = np.array([0.5], np.float16).view(np.uint8)
    block[2:5] = np.array([1, -128, 127], np.int8).view(np.uint8)
    values = np.asarray(FORMATS["q8_0"].decode(jnp.asarray(block)))
    np.testing.assert_array_equal(values[:4], np.array([0.5, -64.0, 63.5, 0.0], np.float32))
