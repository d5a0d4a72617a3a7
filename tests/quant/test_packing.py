"""What `packing` puts together, `bits` takes apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.quant import bits, packing


def _random_bytes(shape=(3, 48)):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_pack_is_the_inverse_of_unpack(width):
    packed = _random_bytes()
    np.testing.assert_array_equal(packing.pack(bits.unpack(packed, width), width), packed)


@pytest.mark.parametrize("runs", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_planes_are_the_inverse_of_planes(width, runs):
    packed = _random_bytes()
    np.testing.assert_array_equal(packing.planes(bits.planes(packed, width, runs), width, runs), packed)


def test_merge_is_the_inverse_of_fields():
    packed, shifts = _random_bytes(), (0, 4, 2, 6)
    np.testing.assert_array_equal(packing.merge(bits.fields(packed, shifts, 3), shifts), packed)


def test_float16_is_what_a_decoder_reads():
    scales = np.random.default_rng(0).lognormal(0, 4, (5, 2)).astype(np.float32)
    raw = packing.float16(jnp.asarray(scales))
    assert raw.shape == (5, 4)
    read = np.concatenate([bits.float16(raw, 0), bits.float16(raw, 2)], axis=-1)
    np.testing.assert_array_equal(read, scales.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(packing.rounded_to_float16(jnp.asarray(scales)), read)


def test_bytes_of_signed_numbers():
    numbers = jnp.asarray(np.array([[-128, -1, 0, 127]], np.int8))
    np.testing.assert_array_equal(packing.as_bytes(numbers), np.array([[128, 255, 0, 127]], np.uint8))
