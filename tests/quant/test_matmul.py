"""Products with every kind of weight, few rows and many, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.quant import FORMATS, QuantizedTensor, decode, encode, matmul

_ONE_OF_EACH_KIND = {  # of decoder, and where its blocks have float16 scales; formats with a header are apart
    "q8_0": (0,),
    "q4_0": (0,),
    "q5_1": (0, 2),
    "q4_K": (0, 2),
    "q6_K": (208,),
    "iq4_xs": (0,),
    "iq2_s": (0,),
    "iq1_s": (0,),
    "tq1_0": (52,),
}
_KINDS = ["f32", "f16", "bf16", *_ONE_OF_EACH_KIND]


def _weight(kind, size_out=12, size_in=512):
    rng = np.random.default_rng(1)
    if kind not in FORMATS:
        return jnp.asarray(encode(rng.standard_normal((size_out, size_in), dtype=np.float32), kind))
    fmt = FORMATS[kind]
    blocks = rng.integers(0, 256, (size_out, size_in // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    for start in _ONE_OF_EACH_KIND[kind]:
        scales = rng.uniform(0.005, 0.02, (*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., start : start + 2] = scales.view(np.uint8)
    return QuantizedTensor(blocks=jnp.asarray(blocks), format=kind)


def _input(shape):
    return np.random.default_rng(2).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(512,), (1, 1, 512), (2, 512), (2, 5, 512), (0, 512)], ids=str)
@pytest.mark.parametrize("kind", _KINDS)
def test_equals_float64(kind, shape):
    weight, x = _weight(kind), _input(shape)
    weight64 = np.asarray(decode(weight), np.float64)
    expected = x.astype(np.float64) @ weight64.T
    result = np.asarray(jax.jit(matmul)(jnp.asarray(x), weight))
    assert result.shape == expected.shape and result.dtype == np.float32
    # Rounding grows with sum |x w|: 512 float32 terms stay below 1e-6 of it, one bfloat16 operand would not.
    bound = 1e-6 * (np.abs(x.astype(np.float64)) @ np.abs(weight64).T)
    assert (np.abs(result - expected) <= bound).all()


@pytest.mark.parametrize("kind", _KINDS)
def test_rows_do_not_depend_on_how_many_there_are(kind):
    weight, x = _weight(kind), _input((5, 512))
    together = np.asarray(matmul(jnp.asarray(x), weight))
    for row in range(5):
        alone = np.asarray(matmul(jnp.asarray(x[row]), weight))
        np.testing.assert_allclose(alone, together[row], rtol=0, atol=1e-5 * np.abs(together).max())


def test_one_hot_rows_read_the_weight():
    weight = _weight("q8_0", 6, 64)
    columns = matmul(jnp.eye(64, dtype=jnp.float32), weight)
    np.testing.assert_array_equal(np.asarray(columns).T, np.asarray(decode(weight)))


def test_inputs_of_16_bits_are_widened():
    weight, x = _weight("q8_0"), jnp.asarray(_input((2, 512))).astype(jnp.bfloat16)
    result = matmul(x, weight)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(result), np.asarray(matmul(x.astype(jnp.float32), weight)))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_gradient_of_x_is_the_weight(kind, rows):
    weight, x = _weight(kind), jnp.asarray(_input((rows, 512)))
    gradient = jax.grad(lambda x: matmul(x, weight).sum())(x)
    expected = np.broadcast_to(np.asarray(decode(weight), np.float64).sum(0), (rows, 512))
    np.testing.assert_allclose(np.asarray(gradient), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 4])
def test_gradient_of_a_float32_weight_is_x(rows):
    weight, x = _weight("f32"), _input((rows, 512))
    gradient = jax.grad(lambda w: matmul(jnp.asarray(x), w).sum())(weight)
    np.testing.assert_allclose(
        np.asarray(gradient), np.broadcast_to(x.sum(0), weight.shape), rtol=1e-5, atol=1e-5
    )


def test_vmap_over_experts():
    blocks = jnp.stack([_weight("q8_0").blocks, _weight("q8_0").blocks[::-1]])
    experts = QuantizedTensor(blocks=blocks, format="q8_0")
    x = jnp.asarray(_input((2, 3, 512)))
    result = jax.vmap(matmul)(x, experts)
    for e in range(2):
        np.testing.assert_allclose(
            np.asarray(result[e]), np.asarray(matmul(x[e], experts[e])), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("shape", [(511,), (3, 32), ()], ids=str)
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"x \[\.\.\., in\] must fit weight \[out, in\]"):
        matmul(jnp.zeros(shape, jnp.float32), _weight("q8_0"))
