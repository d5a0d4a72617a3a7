"""Decoders of types that the `gguf` package can decode are bit-equal to it on any bytes."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.quant import FORMATS, QuantizedTensor, decode

_SCALE_BYTES = {"q8_0": (0,), "q4_0": (0,), "q5_0": (0,), "q4_K": (0, 2), "q6_K": (208,)}
_SCALES = {
    "sane": (0.01, -0.02, 1.5),
    "zero": (0.0, -0.0),
    "subnormal": (6e-8, -3e-5),
    "largest": (65504.0, -65504.0),
    "infinite": (np.inf, -np.inf),
    "nan": (np.nan,),
    "any": None,  # whatever the random bytes say
}


def random_blocks(name, scales, shape=(3, 5)):
    """Returns random blocks uint8[*shape, block_bytes] whose float16 scales are drawn from `scales`."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, FORMATS[name].block_bytes), dtype=np.uint8)
    for start in _SCALE_BYTES[name] if scales is not None else ():
        values = rng.choice(np.array(scales, np.float16), (*shape, 1))
        blocks[..., start : start + 2] = values.view(np.uint8)
    return blocks


def gguf_decode(name, blocks):
    """Returns what the `gguf` package makes of blocks: float32[..., size]."""
    rows = blocks.reshape(-1, blocks.shape[-2] * blocks.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(FORMATS[name].ggml_type))
    return values.reshape(*blocks.shape[:-2], -1)


def assert_same_bits(actual, expected):
    """Checks equality of every bit, signs of zeros included; a NaN equals a NaN of any payload."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    same = (actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"


def test_table_agrees_with_gguf_package():
    for name in _SCALE_BYTES:
        fmt = FORMATS[name]
        kind = gguf.GGMLQuantizationType(fmt.ggml_type)
        assert name == fmt.name and kind.name.lower() == name.lower()
        assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block_size, fmt.block_bytes)


@pytest.mark.parametrize("scales", _SCALES.values(), ids=_SCALES)
@pytest.mark.parametrize("name", _SCALE_BYTES)
def test_decode_is_bit_equal(name, scales):
    blocks = random_blocks(name, scales)
    weight = QuantizedTensor(blocks=jnp.asarray(blocks), format=name)
    expected = gguf_decode(name, blocks)
    assert_same_bits(np.asarray(jax.jit(decode)(weight)), expected)
    assert_same_bits(np.asarray(decode(weight)), expected)


@pytest.mark.parametrize("name", _SCALE_BYTES)
def test_decode_takes_any_leading_axes(name):
    blocks = random_blocks(name, _SCALES["sane"], (2, 3, 2))
    for sample in (blocks, blocks[0], blocks[0, 0], blocks[0, 0, 0]):
        values = FORMATS[name].decode(jnp.asarray(sample))
        assert values.shape == (*sample.shape[:-1], FORMATS[name].block_size)
        flat = sample.reshape(1, -1, sample.shape[-1])
        assert_same_bits(np.asarray(values).reshape(1, -1), gguf_decode(name, flat))


def test_q8_0_by_hand():
    block = np.zeros(34, np.uint8)
    block[:2] = np.array([0.5], np.float16).view(np.uint8)
    block[2:5] = np.array([1, -128, 127], np.int8).view(np.uint8)
    values = np.asarray(FORMATS["q8_0"].decode(jnp.asarray(block)))
    np.testing.assert_array_equal(values[:4], np.array([0.5, -64.0, 63.5, 0.0], np.float32))
