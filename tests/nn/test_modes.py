"""Modes 0 to 3, with and without flash attention: one model, the same logits, whatever the calls are.

Slots that hold no token are NaN throughout, so a single read of one would show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.cache import init_cache
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RunConfig
from mla_jax.nn.transformer import Transformer, init_params

CONFIG = ModelConfig(
    vocab_size=96,
    context_length=2560,
    embed_dim=32,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden_dim=48,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
    ),
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_token=2,
        expert_hidden_dim=16,
        num_shared_experts=1,
        gating="sigmoid",
        normalize_weights=True,
        weights_scale=2.5,
    ),
    rope=RopeConfig(scaling="yarn", factor=40.0, original_context_length=64, yarn_log_multiplier=0.1),
)
TOLERANCE = 1e-5  # of the largest logit
NUM_TOKENS = 300  # two chunks of the flash attention
BATCH = 2

RUNS = {
    f"mla{mode}-{'flash' if flash else 'whole'}": RunConfig(mla=mode, flash=flash, cache_type="f32")
    for mode in range(4)
    for flash in (True, False)
}
# Calls as (padded length, tokens that count in each sequence). From length 128 on, modes 2 and 3 expand.
STEPS = [(1, (1, 1))] * 12
PLANS = {
    "prefill": [(150, (150, 137))],
    "chunks": [(40, (40, 3)), (40, (5, 0)), (150, (150, 140)), (40, (40, 17)), (40, (40, 40))],
    "decode": [*STEPS, (150, (150, 150)), (40, (40, 40)), (40, (40, 40)), (40, (40, 30)), *STEPS],
}


# Without LLVM's optimisations a compilation takes half the time.
@functools.partial(jax.jit, static_argnames="run", compiler_options={"xla_backend_optimization_level": 0})
def _step(params, tokens, cache, num_tokens, run):
    return Transformer(CONFIG, run).apply({"params": params}, tokens, cache, num_tokens)


@functools.cache
def _model():
    """Returns parameters, tokens and the logits of each sequence on its own."""
    params = init_params(jax.random.key(0), CONFIG)
    for i in range(CONFIG.num_layers):  # scores further apart, so that the running maximum moves
        params[f"layers_{i}"]["attn"]["q_a_norm"]["weight"] *= 2.0
    shape = (BATCH, NUM_TOKENS)
    tokens = np.random.default_rng(0).integers(CONFIG.vocab_size, size=shape, dtype=np.int32)
    return params, tokens, _logits_alone(params, tokens)


def _logits_alone(params, tokens):
    num_tokens = jnp.full((BATCH,), NUM_TOKENS, jnp.int32)
    logits, _ = _step(params, jnp.asarray(tokens), None, num_tokens, RunConfig(mla=0))
    return np.asarray(logits)


def _follow(plan, run):
    """Yields sequence, position and logits of every token, in the calls of `plan`; and checks the cache."""
    params, tokens, _ = _model()
    cache = init_cache(CONFIG, run, batch=BATCH, ctx_size=NUM_TOKENS)
    cache = dataclasses.replace(cache, layers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache.layers))
    done = np.zeros(BATCH, np.int32)
    for length, counts in plan:
        padded = np.zeros((BATCH, length), np.int32)
        for row, count in enumerate(counts):
            padded[row, :count] = tokens[row, done[row] : done[row] + count]
        out, cache = _step(params, jnp.asarray(padded), cache, jnp.asarray(counts, jnp.int32), run)
        for row, count in enumerate(counts):
            yield row, done[row], np.asarray(out[row, :count])
        done += np.asarray(counts, np.int32)
    np.testing.assert_array_equal(cache.length, done)
    for leaf in jax.tree.leaves(cache.layers):
        for row in range(BATCH):
            slots = np.asarray(leaf[row]).reshape(leaf.shape[1], -1)
            assert np.isfinite(slots[: done[row]]).all()
            assert np.isnan(slots[done[row] :]).all()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("run", RUNS)
def test_logits_do_not_depend_on_mode_or_calls(run, plan):
    expected = _model()[2]
    for row, start, logits in _follow(PLANS[plan], RUNS[run]):
        error = np.abs(logits - expected[row, start : start + len(logits)])
        assert error.max(initial=0.0) < TOLERANCE * np.abs(expected).max()


def test_the_logits_depend_on_every_earlier_token():
    """Otherwise equal logits would say little about the cache."""
    params, tokens, expected = _model()
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % CONFIG.vocab_size
    difference = np.abs(_logits_alone(params, changed) - expected).max(axis=-1)
    assert difference.min() > 10 * TOLERANCE * np.abs(expected).max()
