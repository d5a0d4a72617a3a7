"""Routing by the kernel against `moe.select_experts`, which is tested against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG

import cpu_kernels
from mla_jax import taps
from mla_jax.config import MoEConfig, RunConfig
from mla_jax.nn import moe, transformer
from mla_jax.nn.moe import ExpertReduction

SOFTMAX = MoEConfig(
    num_experts=16, num_experts_per_token=6, expert_hidden_dim=16, num_shared_experts=0, gating="softmax"
)
SIGMOID = dataclasses.replace(
    SOFTMAX, gating="sigmoid", has_selection_bias=True, normalize_weights=True, weights_scale=2.5
)
V3 = dataclasses.replace(SIGMOID, num_experts=256, num_experts_per_token=8, num_groups=8, num_groups_used=4)
CONFIGS = {
    "softmax": SOFTMAX,
    "normalised softmax": dataclasses.replace(SOFTMAX, normalize_weights=True),
    "sigmoid": SIGMOID,
    "V2": dataclasses.replace(SOFTMAX, num_experts=160, num_groups=8, num_groups_used=3, weights_scale=16.0),
    "V3": V3,
    "groups of one": dataclasses.replace(SIGMOID, num_groups=16, num_groups_used=6),
    "all of them": dataclasses.replace(SIGMOID, num_experts_per_token=16),
    "one of one": dataclasses.replace(SOFTMAX, num_experts=1, num_experts_per_token=1),
}


def _operands(config, X, seed=0):
    """Logits in quarters, so that there are ties, and a bias that leaves no two experts alike."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-12, 13, (X, config.num_experts)).astype(np.float32) / 4
    bias = rng.standard_normal(config.num_experts).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(bias) if config.has_selection_bias else None


@functools.partial(jax.jit, static_argnames="config")
def _select(logits, bias, reduction, config):
    return moe._select_on_cpu(logits, bias, reduction, config=config, group_routing=True)


@functools.partial(jax.jit, static_argnames="config")
def _expected(logits, bias, reduction, config):
    gate = moe.softmax if config.gating == "softmax" else jax.nn.sigmoid
    return moe.select_experts(gate(logits), bias, config, reduction=reduction)


def _check(logits, bias, reduction, config):
    (ids, weights), expected = (way(logits, bias, reduction, config) for way in (_select, _expected))
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=3e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("X", [1, 700])
def test_routing_is_that_of_xla(name, X):
    _check(*_operands(CONFIGS[name], X), None, CONFIGS[name])


def test_no_rows():
    ids, weights = _select(*_operands(V3, 0), None, V3)
    assert ids.shape == weights.shape == (0, 8)


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_left_out_as_by_xla(name):
    X, config, rng = 2000, CONFIGS[name], np.random.default_rng(3)
    minimum = jnp.asarray(rng.integers(1, config.num_experts_per_token + 2, X), jnp.int32)
    threshold = jnp.asarray(rng.choice([0, 0.21, 0.43, 1, 2, np.inf], X), jnp.float32)
    _check(*_operands(config, X), ExpertReduction(minimum=minimum, threshold=threshold), config)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_any_size(name):
    config = CONFIGS[name]
    logits, bias = _operands(config, 300)
    scale = jnp.asarray(10.0 ** np.random.default_rng(0).integers(-3, 3, (300, 1)), jnp.float32)
    _check(logits * scale, bias, None, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_no_number_is_told_and_stays_in_its_row(name):
    config = CONFIGS[name]
    logits, bias = _operands(config, 9)
    clean = _select(logits, bias, None, config)
    ids, weights = _select(logits.at[4, -1].set(jnp.nan), bias, None, config)
    assert np.isnan(weights[4]).any() and ((ids >= 0) & (ids < config.num_experts)).all()
    for spoiled, whole in zip((ids, weights), clean, strict=True):
        np.testing.assert_array_equal(np.delete(spoiled, 4, axis=0), np.delete(whole, 4, axis=0))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_alone_and_among_others(name):
    config = CONFIGS[name]
    logits, bias = _operands(config, 400)
    among = _select(logits, bias, None, config)
    for row in (0, 1, 399):
        alone = _select(logits[row : row + 1], bias, None, config)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[row]), alone, among)  # noqa: B023


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_groups=3), "groups and numbers of experts do not fit"),
        (dict(num_groups=4, num_groups_used=1, num_chosen=5), "groups and numbers of experts do not fit"),
        (dict(bias=jnp.zeros((5,))), "bias, minimum and threshold do not fit"),
        (dict(minimum=jnp.zeros((2,), jnp.int32)), "bias, minimum and threshold do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(logits=jnp.zeros((3, 16)), bias=None, minimum=None, threshold=None, num_chosen=4)
    arguments |= dict(gating="sigmoid", num_groups=1, num_groups_used=1, normalize=True, scale=1.0)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(cpu_kernels.select_experts(**arguments | change))


@pytest.mark.parametrize("record", [(), ("router.*",), ("expert_ids.*",)])
def test_the_model_routes_by_the_kernel(record):
    run = taps.tapped(RunConfig(cache_type="f32"), record)
    step = lambda params: taps.run(params, jnp.zeros((1, 1), jnp.int32), None, config=CONFIG, run=run)
    params = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), CONFIG))
    assert "mla_select_experts" in jax.jit(step).lower(params).as_text()
