"""Sizes of published models, and parameter counts by arithmetic over shapes: no weights are read or made."""

from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig


def parameter_count(config: ModelConfig) -> int:
    """Returns how many parameters a model has, selection biases of routers included."""
    return _count(config, _num_experts(config))


def active_parameter_count(config: ModelConfig) -> int:
    """Returns how many parameters one token is multiplied with.

    Left out are the routed experts that the token does not use, and the embedding, of which it reads one row.
    """
    num_used = 0 if config.moe is None else config.moe.num_experts_per_token
    return _count(config, num_used) - config.vocab_size * config.embed_dim


def _num_experts(config):
    return 0 if config.moe is None else config.moe.num_experts


def _count(config, num_experts):
    """Counts parameters as if every mixture had `num_experts` routed experts behind its full router."""
    embed_and_output = 2 * config.vocab_size * config.embed_dim + config.embed_dim
    norms = 2 * config.embed_dim
    count = embed_and_output + config.num_layers * (norms + _attention_count(config))
    count += config.num_dense_layers * _ffn_count(config.embed_dim, config.dense_hidden_dim)
    return count + (config.num_layers - config.num_dense_layers) * _moe_count(config, num_experts)


def _attention_count(config):
    mla = config.mla
    query_width = mla.num_heads * mla.qk_head_dim
    if mla.q_lora_rank is None:
        query = config.embed_dim * query_width
    else:
        query = mla.q_lora_rank * (config.embed_dim + 1 + query_width)
    latent = config.embed_dim * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank
    keys_and_values = mla.kv_lora_rank * mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return query + latent + keys_and_values + mla.num_heads * mla.v_head_dim * config.embed_dim


def _ffn_count(embed_dim, hidden_dim):
    return 3 * embed_dim * hidden_dim


def _moe_count(config, num_experts):
    moe = config.moe
    if moe is None:
        return 0
    router = moe.num_experts * (config.embed_dim + moe.has_selection_bias)
    return router + (num_experts + moe.num_shared_experts) * _ffn_count(
        config.embed_dim, moe.expert_hidden_dim
    )


def _yarn(base, factor, mscale_all_dim, beta_fast=32.0):
    return RopeConfig(
        base=base,
        scaling="yarn",
        factor=factor,
        original_context_length=4096,
        yarn_log_multiplier=0.1 * mscale_all_dim,
        beta_fast=beta_fast,
    )


_DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102400,
    context_length=163840,
    embed_dim=2048,
    num_layers=27,
    num_dense_layers=1,
    dense_hidden_dim=10944,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        num_experts=64,
        num_experts_per_token=6,
        expert_hidden_dim=1408,
        num_shared_experts=2,
        gating="softmax",
    ),
    rope=_yarn(10000.0, 40.0, 0.707),
)

_DEEPSEEK_V2 = ModelConfig(
    vocab_size=102400,
    context_length=163840,
    embed_dim=5120,
    num_layers=60,
    num_dense_layers=1,
    dense_hidden_dim=12288,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        num_experts=160,
        num_experts_per_token=6,
        expert_hidden_dim=1536,
        num_shared_experts=2,
        gating="softmax",
        weights_scale=16.0,
        num_groups=8,
        num_groups_used=3,
    ),
    rope=_yarn(10000.0, 40.0, 0.707),
)

# Also DeepSeek-R1. The 671B leave out the layer that predicts a second token, as GGUF files do.
_DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    context_length=163840,
    embed_dim=7168,
    num_layers=61,
    num_dense_layers=3,
    dense_hidden_dim=18432,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        num_experts=256,
        num_experts_per_token=8,
        expert_hidden_dim=2048,
        num_shared_experts=1,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=2.5,
        num_groups=8,
        num_groups_used=4,
    ),
    rope=_yarn(10000.0, 40.0, 1.0),
)

_KIMI_K2 = ModelConfig(
    vocab_size=163840,
    context_length=131072,
    embed_dim=7168,
    num_layers=61,
    num_dense_layers=1,
    dense_hidden_dim=18432,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        num_experts=384,
        num_experts_per_token=8,
        expert_hidden_dim=2048,
        num_shared_experts=1,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=2.827,
    ),
    rope=_yarn(50000.0, 32.0, 1.0, beta_fast=1.0),
)

_GLM_4_7_FLASH = ModelConfig(
    vocab_size=154880,
    context_length=202752,
    embed_dim=2048,
    num_layers=47,
    num_dense_layers=1,
    dense_hidden_dim=10240,
    norm_epsilon=1e-5,
    mla=MLAConfig(
        num_heads=20,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
    ),
    moe=MoEConfig(
        num_experts=64,
        num_experts_per_token=4,
        expert_hidden_dim=1536,
        num_shared_experts=1,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=1.8,
    ),
    rope=RopeConfig(base=1e6),
)

_MOONLIGHT_16B_A3B = ModelConfig(
    vocab_size=163840,
    context_length=8192,
    embed_dim=2048,
    num_layers=27,
    num_dense_layers=1,
    dense_hidden_dim=11264,
    norm_epsilon=1e-5,
    mla=MLAConfig(
        num_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        num_experts=64,
        num_experts_per_token=6,
        expert_hidden_dim=1408,
        num_shared_experts=2,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=2.446,
    ),
    rope=RopeConfig(base=50000.0),
)

PRESETS: dict[str, ModelConfig] = {
    "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
    "deepseek-v2": _DEEPSEEK_V2,
    "deepseek-v3": _DEEPSEEK_V3,
    "kimi-k2": _KIMI_K2,
    "glm-4.7-flash": _GLM_4_7_FLASH,
    "moonlight-16b-a3b": _MOONLIGHT_16B_A3B,
}

# The packaged model: DeepSeek-V3's layer without expert groups, small enough to train on two cores.
PACKAGED = ModelConfig(
    vocab_size=4096,
    context_length=2048,
    embed_dim=256,
    num_layers=6,
    num_dense_layers=1,
    dense_hidden_dim=768,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=4,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        num_experts=16,
        num_experts_per_token=6,
        expert_hidden_dim=96,
        num_shared_experts=1,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=2.5,
    ),
)
