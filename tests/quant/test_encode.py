"""Encoding against the `gguf` package, and what may not be encoded."""

import gguf
import numpy as np
import pytest

from mla_jax.quant import decode, encode


def _values(shape=(64, 256)):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, dtype=np.float32) * rng.lognormal(0, 3, (*shape[:-1], 1)).astype(
        np.float32
    )


def test_q8_0_equals_gguf_package_up_to_ties():
    values = _values()
    blocks = encode(values, "q8_0").blocks.reshape(-1, 34)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    np.testing.assert_array_equal(blocks[:, :2], expected[:, :2])
    rows = values.reshape(-1, 32).astype(np.float64)
    position = rows * 127 / np.abs(rows).max(axis=1, keepdims=True)
    is_tie = np.abs(np.abs(position) % 1 - 0.5) < 1e-4  # beyond float32 rounding of a code of at most 127
    assert is_tie.mean() < 1e-3
    codes, expected_codes = blocks[:, 2:].view(np.int8), expected[:, 2:].view(np.int8)
    np.testing.assert_array_equal(codes[~is_tie], expected_codes[~is_tie])
    np.testing.assert_array_equal(codes[~is_tie], np.rint(position[~is_tie]))


def test_q8_0_rounds_ties_to_even_with_the_unrounded_scale():
    values = np.zeros((1, 32), np.float32)
    values[0, :7] = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    np.testing.assert_array_equal(
        encode(values, "q8_0").blocks[0, 0, 2:9].view(np.int8), np.array([127, 0, 2, 2, 0, -2, -2], np.int8)
    )
    scaled = values * np.float32(1.0002)  # the float16 scale is 1, the codes are not those of values / 1
    np.testing.assert_array_equal(
        encode(scaled, "q8_0").blocks[0, 0, 2:4].view(np.int8), np.array([127, 0], np.int8)
    )


def test_q8_0_round_trip_is_within_half_a_step():
    values = _values()
    weight = encode(values, "q8_0")
    step = np.abs(values.reshape(64, -1, 32)).max(axis=-1, keepdims=True) / 127
    error = np.abs(np.asarray(decode(weight)) - values).reshape(64, -1, 32)
    # Half a step, and 127 times the rounding of the scale: 2**-11 of it, or half a float16 subnormal.
    assert (error <= step * (0.5 + 127 * 2**-11 + 1e-4) + 127 * 2**-25).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-10], ids=str)
def test_tiny_rows_give_finite_blocks(magnitude):
    values = np.full((1, 32), magnitude, np.float32)
    weight = encode(values, "q8_0")
    assert (weight.blocks[..., :2] == 0).all()
    np.testing.assert_array_equal(np.asarray(decode(weight)), np.zeros((1, 32), np.float32))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_16_bit_types_equal_gguf_package(name):
    values = _values()
    encoded = encode(values, name)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(encoded.view(np.uint8), expected.view(np.uint8))


def test_f32_is_unchanged():
    values = _values()
    np.testing.assert_array_equal(encode(values, "f32"), values)


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        (np.zeros((2, 33), np.float32), "q8_0", "multiple of 32"),
        (np.zeros((), np.float32), "q8_0", "multiple of 32"),
        (np.full((1, 32), 1e9, np.float32), "q8_0", "finite in q8_0"),
        (np.full((1, 32), np.nan, np.float32), "q8_0", "finite in q8_0"),
        (np.full((1, 32), 1e6, np.float32), "f16", "finite in f16"),
        (np.zeros((1, 32), np.float64), "q8_0", "must be float32"),
        (np.zeros((1, 256), np.float32), "iq1_s", "name must be one of"),
    ],
    ids=["width", "scalar", "overflow", "nan", "f16", "dtype", "name"],
)
def test_what_cannot_be_encoded_is_refused(values, name, message):
    with pytest.raises(ValueError, match=message):
        encode(values, name)
