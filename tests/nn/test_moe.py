"""Routing against its definition on rows full of ties, and grouped products against a loop over tokens."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import quant
from mla_jax.config import MoEConfig, RunConfig
from mla_jax.nn import moe, taps

D, F = 32, 32

PLAIN = MoEConfig(
    num_experts=12, num_experts_per_token=3, expert_hidden_dim=F, num_shared_experts=0, gating="softmax"
)
V2 = dataclasses.replace(PLAIN, num_groups=4, num_groups_used=2, weights_scale=16.0)
V3 = dataclasses.replace(V2, gating="sigmoid", has_selection_bias=True, normalize_weights=True)


def select_by_definition(probs, bias, config):
    """Sorts groups, then experts, by (score, lowest id): one token at a time."""
    ids, weights = [], []
    for row in probs.astype(np.float64):
        score = row if bias is None else row + bias
        groups = np.split(np.arange(config.num_experts), config.num_groups)
        num_best = 1 if config.gating == "softmax" else 2
        best = [sorted(score[group], reverse=True)[:num_best] for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: (-sum(best[g]), g))[: config.num_groups_used]
        allowed = itertools.chain(*(groups[g] for g in kept))
        ids.append(sorted(allowed, key=lambda e: (-score[e], e))[: config.num_experts_per_token])
        weight = row[ids[-1]]
        weight = weight / weight.sum() if config.normalize_weights else weight
        weights.append(weight * config.weights_scale)
    return np.array(ids), np.array(weights)


def _draw_scores(config, seed):
    """Draws multiples of 1/8, exact in float32, so that experts and groups tie in most rows."""
    rng = np.random.default_rng(seed)
    probs = rng.integers(1, 9, (300, config.num_experts)).astype(np.float32) / 8
    bias = rng.integers(-16, 5, config.num_experts).astype(np.float32) / 8
    return probs, bias if config.has_selection_bias else None


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(dataclasses.replace(PLAIN, normalize_weights=True, weights_scale=2.5), id="normalised"),
        pytest.param(
            dataclasses.replace(PLAIN, gating="sigmoid", has_selection_bias=True), id="sigmoid-and-bias"
        ),
        pytest.param(dataclasses.replace(PLAIN, num_experts_per_token=12), id="all-experts"),
        pytest.param(V2, id="V2-groups"),
        pytest.param(V3, id="V3-groups"),
        pytest.param(dataclasses.replace(V3, has_selection_bias=False), id="V3-groups-without-bias"),
        pytest.param(dataclasses.replace(V3, num_experts_per_token=6), id="V3-whole-groups"),
        pytest.param(dataclasses.replace(V3, num_groups=12, num_groups_used=4), id="V3-groups-of-one"),
    ],
)
def test_selection_is_the_definition(config):
    probs, bias = _draw_scores(config, seed=config.num_experts_per_token)
    ids, weights = moe.select_experts(probs, None if bias is None else jnp.asarray(bias), config)
    expected_ids, expected_weights = select_by_definition(probs, bias, config)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)


def test_scores_that_are_all_zero_give_no_weight():
    """As sigmoids are in float32 far below 0."""
    config = dataclasses.replace(PLAIN, gating="sigmoid", normalize_weights=True)
    _, weights = moe.select_experts(jnp.zeros((1, config.num_experts)), None, config)
    np.testing.assert_array_equal(weights, np.zeros_like(weights))


def test_without_group_routing_groups_are_ignored():
    probs, bias = _draw_scores(V3, seed=0)
    ids, _ = moe.select_experts(probs, jnp.asarray(bias), V3, group_routing=False)
    ungrouped = dataclasses.replace(V3, num_groups=1, num_groups_used=1)
    np.testing.assert_array_equal(ids, select_by_definition(probs, bias, ungrouped)[0])
    assert (ids != select_by_definition(probs, bias, V3)[0]).any()


def test_router_records_its_choice():
    run, positions = taps.tapped(RunConfig(), ("expert_ids",)), jnp.arange(9, dtype=jnp.int32)[None]
    x, router = jnp.asarray(_draw_tokens(9, 3)[0]), moe.Router(V3, run)
    weight, bias = _draw_experts(V3.num_experts)["gate"][:, 0], np.linspace(-1, 1, V3.num_experts)
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias, jnp.float32)}
    (ids, _), recorded = router.apply({"params": params}, x, positions, mutable=taps.COLLECTION)
    np.testing.assert_array_equal(recorded[taps.COLLECTION]["expert_ids"][0], ids)
    expected, _ = select_by_definition(1 / (1 + np.exp(-np.asarray(x) @ weight.T)), bias, V3)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    ("num_pairs", "num_experts", "tile"),
    [(1, 8, 1), (8, 8, 1), (15, 8, 1), (16, 8, 2), (31, 8, 2), (32, 8, 4), (1 << 20, 8, 128), (200, 1, 128)],
)
def test_tile_size(num_pairs, num_experts, tile):
    assert moe.tile_size(num_pairs, num_experts) == tile


def _draw_ids(kind, X, K, E, seed=0):
    """Draws K different experts per token; "one" gives the last experts to every token."""
    rng = np.random.default_rng(seed)
    if kind == "one":
        return np.tile(np.arange(E - K, E, dtype=np.int32), (X, 1))
    return np.stack([rng.permutation(E)[:K] for _ in range(X)]).astype(np.int32)


_SIZES = [  # kind, X tokens, K experts each, of E
    ("random", 1, 1, 8),
    ("random", 1, 3, 4),
    ("random", 5, 2, 64),
    ("random", 7, 3, 5),
    ("random", 41, 2, 3),
    ("one", 41, 2, 16),
    ("one", 131, 1, 1),
    ("one", 9, 1, 2),
]


@pytest.mark.parametrize(("kind", "X", "K", "E"), _SIZES[3:6])
@pytest.mark.parametrize("tile", [1, 4, 128])
@pytest.mark.parametrize("share_dropped", [0, 0.5, 1])
def test_tiles_hold_every_pair_once(kind, X, K, E, tile, share_dropped):
    ids = _draw_ids(kind, X, K, E)
    if share_dropped:
        ids = np.where(np.random.default_rng(2).random(ids.shape) < share_dropped, E, ids).astype(np.int32)
    assign = jax.jit(moe.assign_tiles, static_argnums=(1, 2))
    expert, slot, num_needed = map(np.asarray, assign(ids, E, tile))
    kept = ids < E
    assert slot.shape == ids.shape and len(set(slot[kept])) == kept.sum()
    assert (slot[~kept] == expert.size * tile).all() and expert.size <= ids.size
    assert slot.min() >= 0 and (slot[kept] < num_needed * tile).all()
    np.testing.assert_array_equal(expert[slot[kept] // tile], ids[kept])
    assert set(expert[:num_needed]) == set(ids[kept])
    assert num_needed == sum(-(-np.sum(ids == e) // tile) for e in range(E))


def _draw_experts(E, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
    return dict(gate=draw(E, F, D), up=draw(E, F, D), down=draw(E, D, F))


def _draw_tokens(X, K, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((X, D), dtype=np.float32), rng.random((X, K), dtype=np.float32)


def ffn_by_definition(x, ids, weights, experts):
    """Loops over tokens and their experts in float64."""
    gate, up, down = (np.asarray(experts[name], np.float64) for name in ("gate", "up", "down"))
    out = np.zeros(x.shape)
    for token, k in np.ndindex(ids.shape):
        e, row = ids[token, k], x[token].astype(np.float64)
        hidden = gate[e] @ row
        out[token] += weights[token, k] * (down[e] @ (hidden / (1 + np.exp(-hidden)) * (up[e] @ row)))
    return out


@functools.partial(jax.jit, static_argnames="num_experts")
def _grouped_ffn(x, ids, weights, experts, num_experts):
    return moe.grouped_ffn(x, ids, weights, experts, num_experts=num_experts)


@pytest.mark.parametrize(("kind", "X", "K", "E"), _SIZES)
def test_grouped_ffn_is_the_definition(kind, X, K, E):
    ids, experts, (x, weights) = _draw_ids(kind, X, K, E), _draw_experts(E), _draw_tokens(X, K)
    out = _grouped_ffn(x, ids, weights, experts, E)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, ffn_by_definition(x, ids, weights, experts), rtol=1e-5, atol=2e-6)


def test_unselected_experts_and_other_tokens_stay_out():
    """An expert that no token selects may hold NaN, and a token of NaN spoils no other token."""
    X, K, E = 41, 2, 8
    ids, experts, (x, weights) = _draw_ids("random", X, K, 6), _draw_experts(E), _draw_tokens(X, K)
    ids += ids >= 3  # experts 3 and 7 are selected by none
    clean = np.asarray(_grouped_ffn(x, ids, weights, experts, E))
    for weight in experts.values():
        weight[[3, 7]] = np.nan
    x[5] = np.nan
    out = np.asarray(_grouped_ffn(x, ids, weights, experts, E))
    others = np.arange(X) != 5
    np.testing.assert_array_equal(out[others], clean[others])
    assert np.isnan(out[5]).all()


def test_merged_gate_and_up_equal_them_apart():
    X, K, E = 7, 3, PLAIN.num_experts
    ids, experts, (x, weights) = _draw_ids("random", X, K, E), _draw_experts(E), _draw_tokens(X, K)
    merged = dict(gate_up=np.concatenate([experts["gate"], experts["up"]], axis=1), down=experts["down"])

    @jax.jit
    def apply(leaves):
        params = {name: {"weight": jnp.asarray(leaf)} for name, leaf in leaves.items()}
        experts = moe.Experts(PLAIN.num_experts, PLAIN.expert_hidden_dim, 1.0)
        return experts.apply({"params": params}, jnp.asarray(x), ids, weights)

    expected = ffn_by_definition(x, ids, weights, experts)
    np.testing.assert_allclose(apply(experts), expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(apply(merged), expected, rtol=1e-5, atol=2e-6)


def _with_row_scales(weight):
    """Returns the weight as q8_KV, which has the scale of a row and a sum that is not read in a header."""
    scale = np.abs(weight).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(weight / scale).astype(np.int8).view(np.uint8)
    header = np.pad(scale.view(np.uint8), [(0, 0)] * (scale.ndim - 1) + [(0, 4)])
    blocks = codes.reshape(*codes.shape[:-1], -1, 32)
    return quant.QuantizedTensor(blocks=blocks, header=header, format="q8_KV")


@pytest.mark.parametrize(("X", "K", "E"), [(1, 3, 4), (41, 2, 3)], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "quantise", [lambda weight: quant.encode(weight, "q8_0"), _with_row_scales], ids=["q8_0", "q8_KV"]
)
def test_quantised_experts_equal_their_decoded_selves(X, K, E, quantise):
    ids, experts, (x, weights) = _draw_ids("random", X, K, E), _draw_experts(E), _draw_tokens(X, K)
    blocks = {name: jax.tree.map(jnp.asarray, quantise(weight)) for name, weight in experts.items()}
    decoded = jax.tree.map(quant.decode, blocks, is_leaf=lambda leaf: isinstance(leaf, quant.QuantizedTensor))
    out = _grouped_ffn(x, ids, weights, blocks, E)
    np.testing.assert_allclose(out, ffn_by_definition(x, ids, weights, decoded), rtol=1e-5, atol=2e-6)
    rounding = np.abs(out - ffn_by_definition(x, ids, weights, experts)).max()
    assert rounding > 1e-4  # the blocks are not the weights they were made from


def test_gradients_reach_tokens_weights_and_selected_experts():
    X, K, E = 7, 2, 5
    ids = _draw_ids("random", X, K, 4)
    at = (*_draw_tokens(X, K), _draw_experts(E))
    way = (*_draw_tokens(X, K, seed=2), _draw_experts(E, seed=3))
    loss = lambda x, weights, experts: jnp.sum(moe.grouped_ffn(x, ids, weights, experts, num_experts=E) ** 2)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at)

    def loss_at(step):
        moved = jax.tree.map(lambda a, b: a.astype(np.float64) + step * b, at, way)
        x, weights, experts = moved
        return (ffn_by_definition(x, ids, weights, experts) ** 2).sum()

    slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(way), strict=True))
    assert slope == pytest.approx((loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-4)
    assert not gradients[2]["down"][4].any()


@pytest.mark.parametrize("num_experts", [1, 6, 8, 64, 160])
def test_softmax_of_a_row_is_the_same_in_any_batch(num_experts):
    logits = 3 * np.random.default_rng(0).standard_normal((512, num_experts)).astype(np.float32)
    softmax = jax.jit(moe.softmax)
    whole = np.asarray(softmax(logits))
    np.testing.assert_allclose(whole, jax.nn.softmax(logits), rtol=1e-6)
    for first, count in ((0, 1), (3, 2), (200, 4), (64, 16), (3, 128)):
        np.testing.assert_array_equal(softmax(logits[first : first + count]), whole[first : first + count])
