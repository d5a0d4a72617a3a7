"""Smart Expert Reduction: selection against its definition; what is dropped costs and shows nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import taps
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RunConfig
from mla_jax.nn import moe
from mla_jax.nn.moe import ExpertReduction
from mla_jax.nn.transformer import init_params

E = 12
SOFTMAX = MoEConfig(
    num_experts=E, num_experts_per_token=6, expert_hidden_dim=16, num_shared_experts=0, gating="softmax"
)
SIGMOID = dataclasses.replace(
    SOFTMAX, gating="sigmoid", has_selection_bias=True, normalize_weights=True, weights_scale=2.5
)
GROUPS = dataclasses.replace(SIGMOID, num_groups=4, num_groups_used=2)
CONFIGS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "groups": GROUPS}


def _reduction(minimum, threshold, temperature=None):
    temperature = None if temperature is None else jnp.float32(temperature)
    minimum, threshold = jnp.asarray(minimum, jnp.int32), jnp.asarray(threshold, jnp.float32)
    return ExpertReduction(minimum=minimum, threshold=threshold, temperature=temperature)


def select_by_definition(probs, score, minimum, threshold, config):
    """One token: sort by (score, lowest id), keep the first `minimum`, then who reaches the bar."""
    order = sorted(range(len(probs)), key=lambda e: (-score[e], e))[: config.num_experts_per_token]
    bar = np.inf if np.isinf(threshold) else threshold * score[order[0]]
    is_off = threshold <= 0
    kept = [e for rank, e in enumerate(order) if is_off or rank < minimum or score[e] >= bar]
    total = sum(probs[e] for e in kept) if config.normalize_weights else 1.0
    return kept, [config.weights_scale * probs[e] / total for e in kept]


@pytest.mark.parametrize(
    ("name", "num_used"),
    [
        (name, used)
        for name, most in [("softmax", E), ("sigmoid", E), ("groups", 6)]
        for used in range(1, most + 1)
    ],
)
def test_selection_is_the_definition(name, num_used):
    """Of 4,000 tokens each: with ties in most rows and, for sigmoids, biased scores below zero."""
    config = dataclasses.replace(CONFIGS[name], num_experts_per_token=num_used)
    rng, X = np.random.default_rng(num_used), 4000
    probs = rng.integers(1, 9, (X, E)).astype(np.float32) / 8
    bias = rng.integers(-10, 5, E).astype(np.float32) / 8 if config.has_selection_bias else None
    minimum = rng.integers(1, E + 2, X)
    threshold = np.float32(rng.choice([0, 0.2, 0.4, 1, 2, np.inf], X))
    select = jax.jit(functools.partial(moe.select_experts, config=config))
    ids, weights = map(np.asarray, select(probs, bias, reduction=_reduction(minimum, threshold)))
    score = probs if bias is None else probs + bias
    if config.num_groups > 1:
        score = np.asarray(moe._keep_best_groups(jnp.asarray(score), config))
    counts = []
    for x in range(X):
        kept, expected = select_by_definition(probs[x], score[x], minimum[x], threshold[x], config)
        is_kept = ids[x] < E
        assert ids[x][is_kept].tolist() == kept
        np.testing.assert_allclose(weights[x][is_kept], expected, rtol=1e-5)
        assert not weights[x][~is_kept].any() and (ids[x][~is_kept] == E).all()
        counts.append(len(kept))
    assert set(counts) == set(range(1, num_used + 1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("minimum", "threshold"), [(1, 0.0), (6, 1.0), (9, 0.5)])
def test_without_effect_it_is_plain_routing_to_the_bit(name, minimum, threshold):
    config, rng = CONFIGS[name], np.random.default_rng(0)
    probs = rng.random((500, E), dtype=np.float32)
    bias = jnp.asarray(rng.standard_normal(E), jnp.float32) if config.has_selection_bias else None
    plain = moe.select_experts(probs, bias, config)
    reduced = moe.select_experts(
        probs, bias, config, reduction=_reduction([minimum] * 500, [threshold] * 500)
    )
    jax.tree.map(np.testing.assert_array_equal, reduced, plain)


MODEL = ModelConfig(
    vocab_size=64,
    context_length=256,
    embed_dim=32,
    num_layers=3,
    num_dense_layers=1,
    dense_hidden_dim=48,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
    moe=dataclasses.replace(SIGMOID, num_shared_experts=1),
)
TOKENS = np.random.default_rng(0).integers(64, size=(4, 40), dtype=np.int32)
SETTINGS = [(1, 1.0), (3, 0.9), (6, 1.0), (2, 0.0)]


@jax.jit
def _forward(params, tokens, reduction):
    record = ("expert_ids.*", "expert_weights.*")
    settings = dict(config=MODEL, run=RunConfig(), record=record, reduction=reduction)
    logits, _, seen = taps.run(params, tokens, **settings)
    return logits, seen


@pytest.fixture
def params():
    params = init_params(jax.random.key(0), MODEL)
    for i in (1, 2):  # scores further apart, so that settings differ
        params[f"layers_{i}"]["ffn"]["router"]["weight"] *= 4.0
    return params


def _logits_and_ids(params, tokens, reduction):
    logits, seen = _forward(params, tokens, reduction)
    of = lambda kind: np.stack([seen[f"{kind}.{i}"] for i in (1, 2)])
    return np.asarray(logits), of("expert_ids"), of("expert_weights")


def test_a_batch_mixes_settings_and_each_row_gets_what_it_gets_alone(params):
    minimum, threshold = zip(*SETTINGS, strict=True)
    mixed, ids, weights = _logits_and_ids(params, TOKENS, _reduction(minimum, threshold))
    compiled = _forward._cache_size()
    _logits_and_ids(params, TOKENS, _reduction(minimum[::-1], threshold))
    assert _forward._cache_size() == compiled  # another setting compiles nothing
    for row, setting in enumerate(SETTINGS):
        alone, alone_ids, _ = _logits_and_ids(
            params, TOKENS[row][None], _reduction(*zip(setting, strict=True))
        )
        np.testing.assert_array_equal(ids[:, row], alone_ids[:, 0])
        np.testing.assert_allclose(mixed[row], alone[0], atol=1e-5)
    counts = (ids < E).sum(-1)
    assert (counts[:, 0] == 1).all() and (counts[:, 2:] == 6).all()
    assert counts[:, 1].min() == 3 and 3 < counts[:, 1].mean() < 6
    np.testing.assert_allclose(weights.sum(-1), 2.5, rtol=1e-5)
    assert np.abs(mixed[0] - _logits_and_ids(params, TOKENS, None)[0][0]).max() > 1e-3


def test_layers_have_settings_of_their_own(params):
    layered = _reduction([[6] * 4, [2] * 4, [5] * 4], np.ones((3, 4)))
    _, ids, _ = _logits_and_ids(params, TOKENS, layered)
    assert ((ids < E).sum(-1) == np.array([2, 5])[:, None, None]).all()


def test_experts_that_are_dropped_everywhere_may_hold_nan(params):
    """Also in a prompt of 2,000 tokens, past any size at which tiles are cut another way."""
    tokens = np.random.default_rng(1).integers(64, size=(1, 2000), dtype=np.int32)
    reduction = _reduction([1], [1.0])
    for layer in (1, 2):  # experts 3 and 7 are among the best six at times, and never the best
        bias = jnp.zeros((E,)).at[jnp.asarray([3, 7])].set(-0.4)
        params[f"layers_{layer}"]["ffn"]["router"]["bias"] = bias
    assert {3, 7} <= set(_logits_and_ids(params, tokens, None)[1].flat)
    clean, ids, _ = _logits_and_ids(params, tokens, reduction)
    poisoned = jax.tree.map(jnp.copy, params)
    for layer in (1, 2):
        unused = sorted(set(range(E)) - set(ids[layer - 1].flat))
        experts = poisoned[f"layers_{layer}"]["ffn"]["experts"]
        for leaf in experts.values():
            leaf["weight"] = leaf["weight"].at[jnp.asarray(unused, jnp.int32)].set(jnp.nan)
        assert {3, 7} <= set(unused)
    np.testing.assert_array_equal(_logits_and_ids(params, tokens, reduction)[0], clean)
    np.testing.assert_array_equal(_logits_and_ids(poisoned, tokens, reduction)[0], clean)


def test_only_tiles_that_are_needed_are_computed():
    """Counted on the host, for decode and prefill: one call of the expert per needed tile."""
    calls = []
    rng = np.random.default_rng(3)
    experts = {name: rng.random((E, 8, 8), dtype=np.float32) for name in ("gate", "up", "down")}

    def run(ids):
        calls.clear()
        x, weights = rng.random((len(ids), 8), dtype=np.float32), rng.random(ids.shape, dtype=np.float32)
        jax.jit(functools.partial(moe.grouped_ffn, num_experts=E))(x, ids, weights, experts)
        jax.effects_barrier()
        return len(calls)

    original = moe.gated_ffn

    def counted(x, weights):
        jax.debug.callback(lambda: calls.append(1))
        return original(x, weights)

    moe.gated_ffn = counted
    try:
        assert run(np.int32([[3, 1, 7, 2, 9, 4]])) == 6
        assert run(np.int32([[3, 1, 7, E, E, E]])) == 3
        prompt = np.tile(np.int32([3, 1, 7, 2, 9, 4]), (48, 1))  # 24 rows a tile at most: 16
        assert run(prompt) == 6 * 3
        prompt[:, 2:] = E
        prompt[:20, 1] = E
        assert run(prompt) == 3 + 2
    finally:
        moe.gated_ffn = original


def test_the_smooth_variant_has_the_hard_one_as_its_limit_and_a_gradient():
    rng = np.random.default_rng(4)
    probs = jax.nn.softmax(jnp.asarray(3 * rng.standard_normal((200, E)), jnp.float32))
    minimum = [2] * 200

    def weights(threshold, temperature):
        reduction = _reduction(minimum, jnp.full((200,), threshold, jnp.float32), temperature)
        return moe.select_experts(probs, None, SOFTMAX, reduction=reduction)[1]

    np.testing.assert_allclose(weights(0.3, 1e-7), weights(0.3, None), atol=1e-6)
    total = lambda threshold: weights(threshold, 0.05).sum()
    slope = jax.grad(total)(jnp.float32(0.3))
    assert slope < 0
    assert float(slope) == pytest.approx(float(total(0.301) - total(0.299)) / 0.002, rel=1e-2)
