"""Rotary positions against their definition as complex numbers, and YaRN against its closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.config import RopeConfig
from mla_jax.nn import rope
from mla_jax.presets import PRESETS


def _trained(config, head_dim):
    return config.base ** (-np.arange(0, head_dim, 2) / head_dim)


@pytest.mark.parametrize("head_dim", [2, 16, 64])
def test_frequencies_without_scaling(head_dim):
    config = RopeConfig(base=50000.0, factor=40.0)
    frequencies = rope.inverse_frequencies(config, head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, _trained(config, head_dim), rtol=1e-7)


def test_linear_scaling_divides_every_frequency():
    config = RopeConfig(scaling="linear", factor=4.0)
    np.testing.assert_allclose(rope.inverse_frequencies(config, 16), _trained(config, 16) / 4, rtol=1e-7)


# Pairs up to `low` keep their frequency, pairs from `high` on are stretched.
@pytest.mark.parametrize(
    ("config", "head_dim", "low", "high"),
    [
        pytest.param(PRESETS["deepseek-v3"].rope, 64, 10, 23, id="V3"),
        pytest.param(PRESETS["deepseek-v2-lite"].rope, 64, 10, 23, id="V2-Lite"),
        pytest.param(PRESETS["kimi-k2"].rope, 64, 19, 20, id="Kimi-K2"),
        pytest.param(
            RopeConfig(scaling="yarn", factor=40.0, original_context_length=128), 16, 0, 3, id="low"
        ),
        pytest.param(
            RopeConfig(base=8.0, scaling="yarn", factor=4.0, original_context_length=520),
            16,
            3,
            15,
            id="high",
        ),
        pytest.param(
            RopeConfig(scaling="yarn", factor=4.0, original_context_length=1), 16, 0, 0.001, id="no-ramp"
        ),
    ],
)
def test_yarn_ramp(config, head_dim, low, high):
    pair = np.arange(head_dim // 2)
    trained = _trained(config, head_dim)
    stretched = trained / config.factor
    share_kept = (rope.inverse_frequencies(config, head_dim) - stretched) / (trained - stretched)
    np.testing.assert_allclose(share_kept, np.clip((high - pair) / (high - low), 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected", "times"),
    [("deepseek-v3", 0.135234, 1.8739), ("deepseek-v2-lite", 0.114721, 1.5896), ("glm-4.7-flash", 1 / 16, 1)],
)
def test_softmax_scale_of_published_models(name, expected, times):
    """The squared temperature belongs in the scores: without it position 0 is exact and the rest is not."""
    config = PRESETS[name]
    scale = rope.softmax_scale(config.rope, config.mla.qk_head_dim)
    assert scale == pytest.approx(expected, rel=5e-6)
    assert scale * config.mla.qk_head_dim**0.5 == pytest.approx(times, rel=5e-5)


def test_softmax_scale_without_yarn_is_plain():
    assert rope.softmax_scale(RopeConfig(), 64) == pytest.approx(1 / 8)
    linear = RopeConfig(scaling="linear", factor=4.0, yarn_log_multiplier=0.1)
    assert rope.softmax_scale(linear, 64) == pytest.approx(1 / 8)


def test_attention_factor_is_squared():
    config = RopeConfig(attention_factor=3.0)
    assert rope.softmax_scale(config, 64) == pytest.approx(9 / 8)


_POSITIONS = [0, 1, 127, 128, 129, 4095, 4096, 4097, 16383, 16384, 163839]


@pytest.mark.parametrize(
    "shape", [(2, len(_POSITIONS), 16), (2, len(_POSITIONS), 3, 16)], ids=["one", "heads"]
)
def test_rotation_is_a_complex_product(shape):
    """Pair (2i, 2i + 1) is one complex number. The bound is the rounding of a float32 angle, and no more."""
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    positions = np.stack([_POSITIONS, _POSITIONS[::-1]]).astype(np.int32)
    frequencies = rope.inverse_frequencies(RopeConfig(base=10000.0), 16)
    turned = np.asarray(rope.rotate(jnp.asarray(x), jnp.asarray(positions), frequencies))

    angle = positions[..., None] * frequencies.astype(np.float64)
    angle = angle if len(shape) == 3 else angle[:, :, None]
    expected = (x[..., 0::2] + 1j * x[..., 1::2].astype(np.float64)) * np.exp(1j * angle)
    error = np.abs(turned[..., 0::2] + 1j * turned[..., 1::2] - expected)
    assert turned.shape == shape
    assert (error <= 5 * (2.0**-24 * angle + 2e-7)).all()


def test_scores_depend_on_distances_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))
    frequencies = rope.inverse_frequencies(RopeConfig(), 8)
    at = lambda x, position: rope.rotate(x, jnp.full((1, 1), position, jnp.int32), frequencies)
    scores = [float((at(q, start + 5) * at(k, start)).sum()) for start in (0, 3, 100)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(float((at(q, 6) * at(k, 0)).sum()) - scores[0]) > 1e-2


def test_half_precision_is_turned_in_float32():
    x = jax.random.normal(jax.random.key(1), (1, 4, 8)).astype(jnp.bfloat16)
    positions = jnp.arange(4, dtype=jnp.int32)[None] * 37
    frequencies = rope.inverse_frequencies(RopeConfig(), 8)
    turned = rope.rotate(x, positions, frequencies)
    assert turned.dtype == jnp.bfloat16
    exact = rope.rotate(x.astype(jnp.float32), positions, frequencies).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned.astype(jnp.float32), exact.astype(jnp.float32))
