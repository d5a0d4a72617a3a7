"""Each tapped value against its definition in numpy float64, in every mode and through a cache in chunks."""

import functools

import jax
import numpy as np
import pytest
from small_model import CONFIG, draw_params, draw_tokens
from small_model import run as run_model

from mla_jax import taps
from mla_jax.cache import init_cache
from mla_jax.config import RunConfig
from mla_jax.nn import rope as rope_lib

MLA, MOE = CONFIG.mla, CONFIG.moe
BATCH, NUM_TOKENS, STEP = 2, 300, 100  # two chunks of flash attention, in three calls
RUNS = {
    f"mla{mode}-{'flash' if flash else 'whole'}": RunConfig(mla=mode, flash=flash, cache_type="f32")
    for mode, flash in [(0, True), (1, True), (1, False), (3, True)]
}
LAYERS = range(CONFIG.num_layers)


@functools.cache
def _model():
    """Returns parameters, and the weights in float64."""
    params = draw_params()
    return params, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@functools.cache
def _seen(name):
    """Returns all values in float64, of a run through a cache or, with None, of one without."""
    params, tokens = _model()[0], draw_tokens(BATCH, NUM_TOKENS)
    run, parts = RUNS.get(name, RunConfig()), []
    cache = None if name is None else init_cache(CONFIG, run, batch=BATCH, ctx_size=NUM_TOKENS)
    for start in range(0, NUM_TOKENS, NUM_TOKENS if name is None else STEP):
        piece = tokens[:, start : start + (NUM_TOKENS if name is None else STEP)]
        logits, cache, seen = run_model(params, piece, cache, run=run, record=("*",))
        np.testing.assert_array_equal(seen["logits"], logits)
        parts.append(seen)
    join = lambda *values: np.concatenate(values, axis=1)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.tree.map(join, *parts))


def _norm(x, leaf):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon) * leaf["weight"]


def _rotate(x):
    """Rotates [B, T, ..., P] by position."""
    frequency = np.asarray(rope_lib.inverse_frequencies(CONFIG.rope, MLA.qk_rope_head_dim), np.float64)
    angle = np.arange(x.shape[1])[:, None] * frequency
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(
        1j * angle.reshape(-1, *[1] * (x.ndim - 3), len(frequency))
    )
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def _queries(seen, layer, w):
    q = _norm(
        _norm(seen[f"resid.{layer}"], w["attn_norm"]) @ w["attn"]["q_a"]["weight"].T, w["attn"]["q_a_norm"]
    )
    q = (q @ w["attn"]["q_b"]["weight"].T).reshape(BATCH, NUM_TOKENS, MLA.num_heads, -1)
    return {"q": q[..., : MLA.qk_nope_head_dim], "q_rope": _rotate(q[..., MLA.qk_nope_head_dim :])}


def _latents(seen, layer, w):
    raw = _norm(seen[f"resid.{layer}"], w["attn_norm"]) @ w["attn"]["kv_a"]["weight"].T
    latent, rope = raw[..., : MLA.kv_lora_rank], raw[..., MLA.kv_lora_rank :]
    return {"latent": _norm(latent, w["attn"]["kv_a_norm"]), "k_rope": _rotate(rope)}


def _attention(seen, layer, w):
    """Of the queries, latents and rotary parts that were seen."""
    q, q_rope, latent, rope = (seen[f"{name}.{layer}"] for name in ("q", "q_rope", "latent", "k_rope"))
    up = w["attn"]["kv_b"]["weight"].reshape(MLA.num_heads, -1, MLA.kv_lora_rank)
    k, v = (np.einsum("bsr,nhr->bsnh", latent, part) for part in np.split(up, [MLA.qk_nope_head_dim], axis=1))
    score = np.einsum("btnh,bsnh->bnts", q, k) + np.einsum("btnp,bsp->bnts", q_rope, rope)
    score *= rope_lib.softmax_scale(CONFIG.rope, MLA.qk_head_dim)
    score = np.where(np.tril(np.ones((NUM_TOKENS, NUM_TOKENS), bool)), score, -np.inf)
    lse = np.log(np.exp(score - score.max(-1, keepdims=True)).sum(-1)) + score.max(-1)
    heads = np.einsum("bnts,bsnv->btnv", np.exp(score - lse[..., None]), v)
    return {"attn_lse": lse.swapaxes(1, 2), "attn_heads": heads}


def _branches(seen, layer, w):
    heads = seen[f"attn_heads.{layer}"].reshape(BATCH, NUM_TOKENS, -1)
    normed = _norm(seen[f"resid.{layer}"] + seen[f"attn_out.{layer}"], w["ffn_norm"])
    ffn = w["ffn"]
    out = {"attn_out": heads @ w["attn"]["out"]["weight"].T}
    if CONFIG.is_dense(layer):
        return out | {"ffn_out": _swiglu(normed, ffn)}
    ids = seen[f"expert_ids.{layer}"].astype(int)
    added = _swiglu(normed, ffn["shared"])
    for e in range(MOE.num_experts):
        share = np.where(ids == e, seen[f"expert_weights.{layer}"], 0).sum(-1, keepdims=True)
        expert = {name: {"weight": leaf["weight"][e]} for name, leaf in ffn["experts"].items()}
        added = added + share * _swiglu(normed, expert)
    return out | {"router": normed @ ffn["router"]["weight"].T, "ffn_out": added}


def _swiglu(x, w):
    gate, up = x @ w["gate"]["weight"].T, x @ w["up"]["weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w["down"]["weight"].T


@pytest.mark.parametrize("part", [_queries, _latents, _attention, _branches])
@pytest.mark.parametrize("name", [None, *RUNS])
def test_values_are_those_of_the_definition(name, part):
    seen, weights = _seen(name), _model()[1]
    for layer in LAYERS:
        for tap, expected in part(seen, layer, weights[f"layers_{layer}"]).items():
            assert np.abs(expected).max() > 1e-2
            np.testing.assert_allclose(seen[f"{tap}.{layer}"], expected, rtol=1e-4, atol=2e-5, err_msg=tap)


@pytest.mark.parametrize("name", [None, *RUNS])
def test_the_residual_is_the_sum_of_what_the_branches_add(name):
    seen, weights = _seen(name), _model()[1]
    np.testing.assert_array_equal(seen["resid.0"], weights["embed"]["weight"][draw_tokens(BATCH, NUM_TOKENS)])
    for i in LAYERS:
        total = seen[f"resid.{i}"] + seen[f"attn_out.{i}"] + seen[f"ffn_out.{i}"]
        np.testing.assert_allclose(seen[f"resid.{i + 1}"], total, atol=1e-5)
    last = _norm(seen[f"resid.{CONFIG.num_layers}"], weights["output_norm"])
    np.testing.assert_allclose(seen["logits"], last @ weights["output"]["weight"].T, atol=2e-5)


@pytest.mark.parametrize(("mode", "rope"), [(0, None), (1, "f16")])
def test_the_lse_of_a_rotated_quantised_cache_some_heads_at_a_time(mode, rope):
    kinds = dict(cache_type="q8_0", cache_type_rope=rope, hadamard_size=64)
    run = RunConfig(mla=mode, flash=False, attention_max_batch=1, **kinds)
    cache = init_cache(CONFIG, run, batch=BATCH, ctx_size=NUM_TOKENS)
    tokens = draw_tokens(BATCH, NUM_TOKENS)
    _, _, seen = run_model(_model()[0], tokens, cache, run=run, record=("attn_lse.0",))
    np.testing.assert_allclose(seen["attn_lse.0"], _seen(None)["attn_lse.0"], atol=0.1)


@pytest.mark.parametrize("name", [None, "mla3-flash"])
def test_experts_are_those_that_the_router_prefers(name):
    seen, weights = _seen(name), _model()[1]
    for layer in LAYERS[CONFIG.num_dense_layers :]:
        probs = 1 / (1 + np.exp(-seen[f"router.{layer}"]))
        score = probs + weights[f"layers_{layer}"]["ffn"]["router"]["bias"]
        ids = np.argsort(-score, axis=-1)[..., : MOE.num_experts_per_token]
        np.testing.assert_array_equal(seen[f"expert_ids.{layer}"], ids)
        chosen = np.take_along_axis(probs, ids, axis=-1)
        expected = chosen / chosen.sum(-1, keepdims=True) * MOE.weights_scale
        np.testing.assert_allclose(seen[f"expert_weights.{layer}"], expected, rtol=1e-4)


def test_every_value_is_seen_in_the_shape_of_the_table():
    sizes = dict(B=BATCH, T=NUM_TOKENS, D=CONFIG.embed_dim, N=MLA.num_heads, H=MLA.qk_nope_head_dim)
    sizes |= dict(P=MLA.qk_rope_head_dim, R=MLA.kv_lora_rank, V=MLA.v_head_dim, E=MOE.num_experts)
    sizes |= dict(K=MOE.num_experts_per_token, W=CONFIG.vocab_size)
    seen = _seen(None)
    assert sorted(seen) == sorted(taps.names(CONFIG))
    for name, value in seen.items():
        assert value.shape == tuple(sizes[axis] for axis in taps.PLACES[name.split(".")[0]].axes), name


def test_layers_without_experts_have_no_router():
    names = taps.names(CONFIG)
    assert {"latent.0", "router.1", "resid.2", "logits"} <= set(names)
    assert not {"router.0", "expert_ids.0", "latent.2", "router.2"} & set(names)
