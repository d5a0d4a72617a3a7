"""Encoding against the `gguf` package, how much it loses, and what may not be encoded."""

import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.quant import ENCODABLE, FORMATS, decode, encode

CHUNK = 1 << 13  # weights; every test of more goes through several chunks
SHAPE = (37, 512)  # of most tests, for few compilations

# Root mean square of what is lost of N(0, 1), how much of that importance leaves where it matters, and how
# much more is lost when the decoded weights are encoded again.
LOST = {
    "q8_0": (0.00538, 1, 0),
    "q4_0": (0.08642, 0.890, 0),
    "q4_1": (0.07805, 0.813, 0),
    "q5_0": (0.04319, 0.889, 0),
    "q5_1": (0.03780, 0.809, 0),
    "q6_0": (0.01977, 0.936, 0),
    "iq4_nl": (0.07335, 0.926, 0),
    "q2_K": (0.26561, 0.897, 0.097),
    "q3_K": (0.14425, 0.927, 0.018),
    "q4_K": (0.07049, 0.909, 0.103),
    "q5_K": (0.03460, 0.918, 0.136),
    "q6_K": (0.01665, 0.921, 0.083),
    "iq4_xs": (0.07401, 0.927, 0),
    "iq4_ks": (0.07120, 0.917, 0.001),
}
each_format = pytest.mark.parametrize("name", LOST)
few_formats = pytest.mark.parametrize("name", ["q4_0", "q5_1", "q4_K", "iq4_ks"])


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[encode.__module__], "_CHUNK", CHUNK)
        yield


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


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_types_with_a_rule_equal_gguf_package(name):
    values = _values((64, 1024))
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(encode(values, name).blocks.reshape(64, -1), expected)


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


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 2e-37, 1e-10], ids=str)
def test_tiny_rows_give_finite_blocks(magnitude):
    values = np.full((1, 32), magnitude, np.float32)
    weight = encode(values, "q8_0")
    assert (weight.blocks[..., :2] == 0).all()
    assert (weight.blocks == 0).all() or magnitude > 1e-36  # 127 / magnitude is finite
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


def _normal(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


_decode = jax.jit(decode)


def _decoded(values, name, importance=None):
    weight = encode(values, name, importance)
    assert weight.format == name and weight.shape == values.shape
    assert all(leaf is None or type(leaf) is np.ndarray for leaf in (weight.blocks, weight.header))
    return np.asarray(_decode(weight))


def _norm(values, weights=1.0):
    return np.sqrt((weights * values.astype(np.float64) ** 2).mean())


def _assert_equal(found, expected):
    np.testing.assert_array_equal(found.blocks, expected.blocks)
    assert (found.header is None) == (expected.header is None)
    if found.header is not None:
        np.testing.assert_array_equal(found.header, expected.header)


def test_every_type_is_tested():
    assert ENCODABLE == ("f32", "f16", "bf16", *LOST)


@each_format
def test_what_is_lost(name):
    values = _normal()
    lost, _, again = LOST[name]
    once = _decoded(values, name)
    assert _norm(once - values) < 1.01 * lost
    assert _norm(_decoded(once, name) - once) <= 1.1 * again * lost


@each_format
def test_importance_moves_the_loss_to_where_it_matters_less(name):
    values, importance = _normal(), np.random.default_rng(1).lognormal(0, 1, SHAPE[-1]).astype(np.float32)
    plain, weighted = (_decoded(values, name, given) - values for given in (None, importance))
    assert _norm(weighted, importance) <= 1.03 * LOST[name][1] * _norm(plain, importance)
    assert _norm(weighted) <= 1.7 * _norm(plain)


@each_format
def test_shape_of_the_distribution_does_not_matter_much(name):
    values = np.random.default_rng(2).standard_t(3, SHAPE).astype(np.float32)
    for sample in (values, np.abs(values), -np.abs(values), values + 10):
        assert _norm(_decoded(sample, name) - sample) < 4 * LOST[name][0] * _norm(sample)


@each_format
def test_zeros_stay_zeros(name):
    values = _normal()
    values[1], values[2, :256] = 0, 0
    for importance in (None, np.ones(1, np.float32)):
        found = _decoded(values, name, importance)
        assert (found[1] == 0).all() and np.isfinite(found).all()
        # A row of IQ4_KS has one scale, and no scale of a run is 0.
        assert np.abs(found[2, :256]).max() <= (1e-3 if name == "iq4_ks" else 0)


@each_format
def test_an_outlier_is_kept(name):
    values, rows = 1e-3 * _normal(), np.arange(SHAPE[0])
    values[rows, 13 * rows] = np.where(rows % 2, 1000, -1000)
    found = _decoded(values, name)
    assert _norm(found - values) < 0.05 * _norm(values)


@each_format
def test_a_constant_is_kept(name):
    for constant in (3.0, -3.0):
        values = np.full(SHAPE, constant, np.float32)
        np.testing.assert_allclose(_decoded(values, name), values, rtol=0.08)


@each_format
def test_size_does_not_matter_within_the_range_of_scales(name):
    values = _normal()
    found = _decoded(values, name)
    for factor in (2.0**-9, 2.0**9):
        scaled = _decoded(values * np.float32(factor), name) / np.float32(factor)
        assert _norm(scaled - values) < 1.05 * _norm(found - values)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30, 2.0**127 / 3])
def test_iq4_ks_has_the_range_of_float32(factor):
    values = np.clip(_normal(), -4.9, 4.9)
    scaled = _decoded(values * np.float32(factor), "iq4_ks") / np.float32(factor)
    assert _norm(scaled - values) < 1.01 * _norm(_decoded(values, "iq4_ks") - values)


@each_format
def test_tiny_numbers_become_zeros_or_stay_tiny(name):
    for magnitude in (1e-45, 1e-38, 1e-20, 1e-10):
        assert np.abs(_decoded(_normal() * np.float32(magnitude), name)).max() < 1e-6


@few_formats
def test_chunks_do_not_show(name):
    values, importance = _normal(), np.abs(_normal((1, 512), seed=1))
    assert values.size > 2 * CHUNK and values.size % CHUNK
    whole = encode(values, name, importance)
    for start, stop in ((0, 1), (1, 4), (4, 37)):
        _assert_equal(encode(values[start:stop], name, importance), whole[start:stop])


@few_formats
def test_rows_do_not_see_their_neighbours(name):
    values, importance = _normal((4, 3, 512)), np.abs(_normal((4, 1, 512), seed=1))
    whole = encode(values, name, importance)
    for index in np.ndindex(4, 3):
        _assert_equal(encode(values[index], name, importance[index[0], 0]), whole[index])


@few_formats
def test_inputs_of_any_kind_give_the_same(name):
    values, importance = _normal((6, 512)), np.abs(_normal(512, seed=1))
    expected = encode(values, name, importance)
    _assert_equal(encode(jnp.asarray(values), name, jnp.asarray(importance)), expected)
    _assert_equal(encode(np.asfortranarray(values), name, np.tile(importance, (6, 1))), expected)
    _assert_equal(encode(np.repeat(values, 2, axis=0)[::2], name, importance * np.float32(4)), expected)
    assert encode(values[:0], name, importance).shape == (0, 512)


@each_format
def test_no_importance_at_all_counts_all_alike(name):
    values, importance = _normal(), np.zeros(512, np.float32)
    expected = encode(values, name)
    _assert_equal(encode(values, name, importance), expected)
    importance[:256] = 1
    found = _decoded(values, name, importance)
    assert _norm(found[:, 256:] - values[:, 256:]) < 1.1 * LOST[name][0]


@pytest.mark.parametrize("name", [name for name in LOST if name != "iq4_ks"])
def test_scales_beyond_float16_are_refused(name):
    assert np.isfinite(_decoded(np.full(SHAPE, 60000, np.float32), name)).all()
    for value in (1e9, -1e9, 1e12, -3e38):
        values = _normal((3, 256))
        values[1, 7] = value
        with pytest.raises(ValueError, match=f"every value must be finite in {name}"):
            encode(values, name)


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_offsets_beyond_float16_are_refused(name):
    for offset in (1e5, -1e5):
        with pytest.raises(ValueError, match=f"every value must be finite in {name}"):
            encode(_normal() + np.float32(offset), name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ENCODABLE)
def test_what_is_not_finite_is_refused(name, value):
    values = _normal((3, 256))
    values[2, 200] = value
    with pytest.raises(ValueError, match=f"every value must be finite in {name}"):
        encode(values, name)


ZEROS = np.zeros((2, 256), np.float32)


@pytest.mark.parametrize(
    ("values", "name", "importance", "message"),
    [
        (np.zeros((2, 33), np.float32), "q8_0", None, "multiple of 32"),
        (np.zeros((), np.float32), "q8_0", None, "multiple of 32"),
        (np.zeros((2, 128), np.float32), "q4_K", None, "rows of q4_K must be a multiple of 256 long"),
        (np.zeros((2, 128), np.float32), "iq4_ks", None, "rows of iq4_ks must be a multiple of 256 long"),
        (np.full((1, 32), 1e6, np.float32), "f16", None, "finite in f16"),
        (np.zeros((1, 32), np.float64), "q8_0", None, "array must be float32, got float64"),
        (ZEROS, "iq1_s", None, "name must be one of f32, f16, .* iq4_ks, got 'iq1_s'"),
        (ZEROS, "q4_0", np.ones(256), "importance must be float32, got float64"),
        (ZEROS, "q4_0", np.full(256, -1, np.float32), "finite and not negative"),
        (ZEROS, "q4_0", np.full(256, np.nan, np.float32), "finite and not negative"),
        (ZEROS, "q4_0", np.full(256, np.inf, np.float32), "finite and not negative"),
        (ZEROS, "q4_0", np.ones(255, np.float32), r"must broadcast to \(2, 256\), got \(255,\)"),
        (ZEROS, "iq4_ks", np.ones((3, 2, 256), np.float32), r"must broadcast to \(2, 256\), got"),
    ],
    ids=[
        *["width", "scalar", "width of K", "width with header", "f16", "dtype", "name"],
        *["importance float64", "negative", "nan", "infinite", "shape", "axes"],
    ],
)
def test_what_cannot_be_encoded_is_refused(values, name, importance, message):
    with pytest.raises(ValueError, match=message):
        encode(values, name, importance)


def test_formats_agree():
    for name in LOST:
        assert encode(ZEROS, name).blocks.shape[-1] == FORMATS[name].block_bytes
