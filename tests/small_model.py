"""A model of two layers, one of them with experts, for tests that look into it."""

import functools

import jax
import numpy as np

from mla_jax import taps
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RunConfig
from mla_jax.nn.transformer import init_params

CONFIG = ModelConfig(
    vocab_size=64,
    context_length=1024,
    embed_dim=32,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden_dim=48,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=2,
        q_lora_rank=24,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
    ),
    moe=MoEConfig(
        num_experts=6,
        num_experts_per_token=3,
        expert_hidden_dim=16,
        num_shared_experts=1,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=2.5,
    ),
    rope=RopeConfig(scaling="yarn", factor=40.0, original_context_length=64, yarn_log_multiplier=0.1),
)


RUN = RunConfig(cache_type="f32")


def run(params, tokens, cache=None, *, run=RUN, record=(), edits=None, pages=None, reduction=None):
    """Calls `taps.run`, and has it compiled in half the time, without LLVM's optimisations."""
    return _run(params, tokens, cache, pages, reduction, run=taps.tapped(run, record, edits))


@functools.partial(jax.jit, static_argnames="run", compiler_options={"xla_backend_optimization_level": 0})
def _run(params, tokens, cache, pages, reduction, *, run):
    settings = dict(config=CONFIG, run=run, pages=pages, reduction=reduction)
    return taps.run(params, tokens, cache, **settings)


def draw_params(seed: int = 0):
    """Draws every weight, so that none is at a special value; heads prefer some tokens by far."""
    rng = np.random.default_rng(seed)
    middles = {"bias": 0.0, "q_a_norm": 2.0}

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, dtype=np.float32)
        if len(leaf.shape) > 1:
            return values * np.float32(leaf.shape[-1] ** -0.5)
        middle = middles.get(path[-1].key, middles.get(path[-2].key, 1.0))
        return np.float32(middle) + np.float32(0.2) * values

    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_tokens(batch: int, length: int) -> np.ndarray:
    """Draws i32[batch, length]."""
    return np.random.default_rng(length).integers(CONFIG.vocab_size, size=(batch, length), dtype=np.int32)
