"""`QuantizedTensor` as a pytree leaf, its indexing, and the reading of rows."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_jax.quant import FORMATS, QuantizedTensor, decode, encode, take_rows


def _weight(shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return jax.tree.map(jnp.asarray, encode(values, "q8_0"))


def test_sizes_are_those_of_the_decoded_weight():
    weight = _weight((4, 6, 64))
    assert (weight.shape, weight.ndim, weight.dtype) == ((4, 6, 64), 3, jnp.float32)
    assert decode(weight).shape == weight.shape


@pytest.mark.parametrize("name", FORMATS)
def test_shape_of_every_format(name):
    fmt = FORMATS[name]
    weight = QuantizedTensor(blocks=jnp.zeros((2, 3, fmt.block_bytes), jnp.uint8), format=name)
    assert weight.shape == (2, 3 * fmt.block_size)


@pytest.mark.parametrize(
    "index", [1, -1, slice(1, 3), (2, 3), (slice(None), 2), np.array([3, 0, 3])], ids=repr
)
def test_indexing_is_indexing_of_the_decoded_weight(index):
    weight = _weight((4, 6, 64))
    chex.assert_trees_all_equal(decode(weight[index]), decode(weight)[index])


@pytest.mark.parametrize("index", [(0, 0, 0), Ellipsis, None, (0, None)], ids=repr)
def test_rows_of_blocks_cannot_be_cut(index):
    with pytest.raises(ValueError, match="takes at most 2 indices"):
        _weight((4, 6, 64))[index]


def test_is_a_pytree_with_a_static_format():
    weight = _weight((4, 64))
    leaves, treedef = jax.tree.flatten(weight)
    assert len(leaves) == 1 and leaves[0].dtype == jnp.uint8
    other = QuantizedTensor(blocks=weight.blocks, format="q4_0")
    assert treedef != jax.tree.structure(other)


def test_vmap_and_scan_pass_slices():
    weight = _weight((4, 6, 64))
    expected = decode(weight)
    chex.assert_trees_all_equal(jax.vmap(decode)(weight), expected)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, decode(layer)), None, weight)
    chex.assert_trees_all_equal(scanned, expected)


def test_decode_of_plain_arrays_and_other_types():
    array = jnp.asarray(np.linspace(-2, 2, 8, dtype=np.float32)).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(decode(array), array.astype(jnp.float32))
    weight = _weight((2, 32))
    chex.assert_trees_all_equal(decode(weight, jnp.float16), decode(weight).astype(jnp.float16))


@pytest.mark.parametrize("kind", ["q8_0", "f32", "f16", "bf16"])
def test_take_rows_equals_numpy_indexing(kind):
    values = np.random.default_rng(0).standard_normal((7, 64), dtype=np.float32)
    weight = jax.tree.map(jnp.asarray, encode(values, kind))
    ids = np.array([[0, 6, 3], [6, 6, 1]], np.int32)
    rows = jax.jit(take_rows)(weight, jnp.asarray(ids))
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(decode(weight))[ids])


def test_take_rows_decodes_only_the_rows_it_takes():
    weight = _weight((1000, 64))
    text = jax.jit(take_rows).lower(weight, jnp.zeros((2,), jnp.int32)).as_text()
    assert "tensor<2x2x32xf32>" in text and "x1000x" not in text and "<1000x2x32" not in text


def test_bfloat16_arrays_are_the_type_jax_knows():
    assert (
        jnp.asarray(encode(np.ones((1, 2), np.float32), "bf16")).dtype == jnp.bfloat16 == ml_dtypes.bfloat16
    )
