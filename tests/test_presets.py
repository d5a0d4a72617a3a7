"""Presets have the published parameter counts, and those of lists of tensors and of the reference models."""

import math

import pytest

from mla_jax.config import MLAConfig, ModelConfig
from mla_jax.presets import PRESETS, active_parameter_count, parameter_count

# Billions as published, and half a unit of the last published digit.
_PUBLISHED = {
    "deepseek-v2-lite": (15.7, 0.05),
    "deepseek-v2": (236, 0.5),
    "deepseek-v3": (671, 0.5),
    "kimi-k2": (1026, 0.5),
    "glm-4.7-flash": (30, 0.5),
    "moonlight-16b-a3b": (16, 0.5),
}

# DeepSeek-V2-Lite's "2.4B" is 2.45 and GLM-4.7-Flash's "3B" is 3.58 cut off, the others are rounded.
_PUBLISHED_ACTIVE = {
    "deepseek-v2-lite": (2.4, 2.5),
    "deepseek-v2": (20.5, 21.5),
    "deepseek-v3": (36.5, 37.5),
    "kimi-k2": (31.5, 32.5),
    "glm-4.7-flash": (3.0, 4.0),
    "moonlight-16b-a3b": (2.5, 3.5),
}


def _tensor_shapes(config):
    """Lists the shape of every tensor of a model's file, without those of routed experts."""
    d, mla = config.embed_dim, config.mla
    heads, rank = mla.num_heads, mla.kv_lora_rank
    shapes = [(config.vocab_size, d), (d,), (config.vocab_size, d)]
    for layer in range(config.num_layers):
        shapes += [(d,), (d,), (rank + mla.qk_rope_head_dim, d), (rank,), (d, heads * mla.v_head_dim)]
        shapes += [(heads, mla.qk_nope_head_dim, rank), (heads, mla.v_head_dim, rank)]
        if mla.q_lora_rank is None:
            shapes += [(heads * mla.qk_nope_head_dim, d), (heads * mla.qk_rope_head_dim, d)]
        else:
            shapes += [(mla.q_lora_rank, d), (mla.q_lora_rank,), (heads * mla.qk_head_dim, mla.q_lora_rank)]
        if config.is_dense(layer):
            shapes += [(config.dense_hidden_dim, d)] * 2 + [(d, config.dense_hidden_dim)]
            continue
        shapes += [(config.moe.num_experts, d)] + [(config.moe.num_experts,)] * config.moe.has_selection_bias
        shapes += [(config.moe.expert_hidden_dim, d)] * 3 * config.moe.num_shared_experts
    return shapes


@pytest.mark.parametrize("name", PRESETS)
def test_total_is_the_published_one(name):
    published, half_unit = _PUBLISHED[name]
    assert abs(parameter_count(PRESETS[name]) / 1e9 - published) <= half_unit


@pytest.mark.parametrize("name", PRESETS)
def test_active_count_is_the_published_one(name):
    low, high = _PUBLISHED_ACTIVE[name]
    assert low <= active_parameter_count(PRESETS[name]) / 1e9 < high


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_sums_over_tensors(name):
    config = PRESETS[name]
    rest = sum(map(math.prod, _tensor_shapes(config)))
    expert = 3 * config.embed_dim * config.moe.expert_hidden_dim
    layers = config.num_layers - config.num_dense_layers
    embedding = config.vocab_size * config.embed_dim
    assert parameter_count(config) == rest + layers * config.moe.num_experts * expert
    assert (
        active_parameter_count(config)
        == rest + layers * config.moe.num_experts_per_token * expert - embedding
    )


def test_deepseek_v3_to_the_last_parameter():
    # 671,026,404,352 in matrices and norms, and a selection bias for each expert of 58 layers.
    assert parameter_count(PRESETS["deepseek-v3"]) == 671_026_404_352 + 58 * 256


def test_moonlight_without_embedding_and_output():
    # The report gives 15.29B and 2.24B, leaving out the embedding and the output weight.
    config = PRESETS["moonlight-16b-a3b"]
    table = config.vocab_size * config.embed_dim
    assert abs((parameter_count(config) - 2 * table) / 1e9 - 15.29) < 0.005
    assert abs((active_parameter_count(config) - table) / 1e9 - 2.24) < 0.005


def test_a_model_of_dense_layers_only():
    mla = MLAConfig(
        num_heads=2, q_lora_rank=None, kv_lora_rank=3, qk_nope_head_dim=5, qk_rope_head_dim=2, v_head_dim=7
    )
    config = ModelConfig(
        vocab_size=11,
        context_length=8,
        embed_dim=4,
        num_layers=1,
        num_dense_layers=1,
        dense_hidden_dim=6,
        norm_epsilon=1e-6,
        mla=mla,
        moe=None,
    )
    embed_and_output, norms = 2 * 11 * 4, 3 * 4
    attention = 4 * 2 * 7 + 4 * (3 + 2) + 3 + 3 * 2 * (5 + 7) + 2 * 7 * 4
    total = embed_and_output + norms + attention + 3 * 4 * 6
    assert parameter_count(config) == total
    assert active_parameter_count(config) == total - 11 * 4


@pytest.mark.parametrize(
    ("name", "yarn_log_multiplier"),
    [("deepseek-v2-lite", 0.0707), ("deepseek-v2", 0.0707), ("deepseek-v3", 0.1), ("kimi-k2", 0.1)],
)
def test_yarn_as_converters_write_it(name, yarn_log_multiplier):
    rope = PRESETS[name].rope
    assert rope.scaling == "yarn" and rope.original_context_length == 4096
    assert rope.yarn_log_multiplier == pytest.approx(yarn_log_multiplier, rel=1e-12)
    assert PRESETS[name].context_length == 4096 * rope.factor


def _reference_model(transformers, config):
    mla, moe = config.mla, config.moe
    sizes = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.num_layers,
        intermediate_size=config.dense_hidden_dim,
        num_attention_heads=mla.num_heads,
        num_key_value_heads=mla.num_heads,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_token,
        moe_intermediate_size=moe.expert_hidden_dim,
        n_shared_experts=moe.num_shared_experts,
        first_k_dense_replace=config.num_dense_layers,
        tie_word_embeddings=False,
    )
    if moe.has_selection_bias:
        return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes))
    return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**sizes))


@pytest.mark.oracle
@pytest.mark.parametrize("name", PRESETS)
def test_oracle_has_as_many_parameters(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):  # shapes alone, no memory
        model = _reference_model(transformers, PRESETS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    count += sum(
        buffer.numel() for key, buffer in model.named_buffers() if key.endswith("score_correction_bias")
    )
    assert parameter_count(PRESETS[name]) == count


@pytest.mark.oracle
def test_oracle_has_the_sizes_of_deepseek_v3_and_glm_as_defaults():
    transformers = pytest.importorskip("transformers")
    for name, reference in (
        ("deepseek-v3", transformers.DeepseekV3Config()),
        ("glm-4.7-flash", transformers.Glm4MoeLiteConfig()),
    ):
        config = PRESETS[name]
        assert config.vocab_size == reference.vocab_size
        assert config.embed_dim == reference.hidden_size
        assert config.num_layers == reference.num_hidden_layers
        assert config.dense_hidden_dim == reference.intermediate_size
        assert config.moe.weights_scale == reference.routed_scaling_factor
        assert config.moe.normalize_weights == reference.norm_topk_prob
        assert (config.moe.num_groups, config.moe.num_groups_used) == (
            reference.n_group,
            reference.topk_group,
        )
