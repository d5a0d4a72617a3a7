"""`config.json` <-> `ModelConfig`: published models come back the same, what cannot be said is refused."""

import copy
import dataclasses
import json
import math

import pytest

from checkpoints_tools import GGUFError, hf_config, hparams
from mla_jax.config import ModelConfig, RopeConfig
from mla_jax.presets import PRESETS

# As published, but for keys that say nothing about the network.
DEEPSEEK_V3 = dict(
    architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False,
    bos_token_id=0,
    eos_token_id=1,
    ep_size=1,
    first_k_dense_replace=3,
    hidden_act="silu",
    hidden_size=7168,
    intermediate_size=18432,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    model_type="deepseek_v3",
    moe_intermediate_size=2048,
    moe_layer_freq=1,
    n_group=8,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=128,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    num_key_value_heads=128,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    quantization_config=dict(
        activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]
    ),
    rms_norm_eps=1e-6,
    rope_scaling=dict(
        beta_fast=32,
        beta_slow=1,
        factor=40,
        mscale=1.0,
        mscale_all_dim=1.0,
        original_max_position_embeddings=4096,
        type="yarn",
    ),
    rope_theta=10000,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    tie_word_embeddings=False,
    topk_group=4,
    topk_method="noaux_tc",
    v_head_dim=128,
    vocab_size=129280,
)
KIMI_K2 = DEEPSEEK_V3 | dict(
    model_type="kimi_k2",
    first_k_dense_replace=1,
    max_position_embeddings=131072,
    n_group=1,
    topk_group=1,
    n_routed_experts=384,
    num_attention_heads=64,
    num_key_value_heads=64,
    rope_scaling=DEEPSEEK_V3["rope_scaling"] | dict(beta_fast=1.0, factor=32.0),
    rope_theta=50000.0,
    routed_scaling_factor=2.827,
    vocab_size=163840,
)
GLM_FLASH = dict(
    model_type="glm4_moe_lite",
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=10240,
    max_position_embeddings=202752,
    moe_intermediate_size=1536,
    topk_method="noaux_tc",
    norm_topk_prob=True,
    num_attention_heads=20,
    n_group=1,
    topk_group=1,
    n_routed_experts=64,
    n_shared_experts=1,
    routed_scaling_factor=1.8,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    num_hidden_layers=47,
    num_key_value_heads=20,
    num_nextn_predict_layers=1,
    partial_rotary_factor=1.0,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    rope_theta=1000000,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    vocab_size=154880,
)
PUBLISHED = {"deepseek-v3": DEEPSEEK_V3, "kimi-k2": KIMI_K2, "glm-4.7-flash": GLM_FLASH}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name):
    found = hf_config.from_json(PUBLISHED[name], "config.json")
    assert found.model == PRESETS[name]
    assert found.num_nextn == 1 and not found.is_tied
    assert found.fp8_block == (None if name == "glm-4.7-flash" else (128, 128))


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_preset_goes_there_and_back(config):
    values = json.loads(json.dumps(hf_config.to_json(config, num_nextn=2)))
    found = hf_config.from_json(values, "config.json")
    assert (found.model, found.num_nextn) == (config, 2)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_the_float32_of_a_gguf_file_leave_no_trace(config):
    """A file has 1e-6 as 9.99999997e-07; a checkpoint made of it says 1e-6 again."""
    names = ["blk.0.exp_probs_b.bias"] if config.moe.has_selection_bias else []
    names += ["blk.0.attn_q.weight"] if config.mla.q_lora_rank is None else []
    read = hparams.model_config(_written(config), names)
    assert hf_config.to_json(read) == hf_config.to_json(config)


def _written(config: ModelConfig) -> dict:
    values = hparams.metadata(config)
    return {key: value.value() if hasattr(value, "value") else value for key, value in values.items()}


def test_glm_says_which_layers_are_dense():
    values = GLM_FLASH | dict(num_hidden_layers=3, mlp_layer_types=["dense", "dense", "sparse"])
    assert hf_config.from_json(values, "config.json").model.num_dense_layers == 2


def test_rotations_as_transformers_5_writes_them():
    rope = DEEPSEEK_V3["rope_scaling"] | dict(rope_type="yarn", rope_theta=20000.0)
    values = {key: value for key, value in DEEPSEEK_V3.items() if not key.startswith("rope_")}
    found = hf_config.from_json(values | dict(rope_parameters=rope), "config.json").model.rope
    assert found.base == 20000 and found.scaling == "yarn" and found.yarn_log_multiplier == 0.1


@pytest.mark.parametrize("parameters", [{}, DEEPSEEK_V3["rope_scaling"]], ids=["empty", "the same"])
def test_rotations_under_both_names(parameters):
    values = DEEPSEEK_V3 | dict(rope_parameters=parameters)
    assert hf_config.from_json(values, "config.json").model == PRESETS["deepseek-v3"]


@pytest.mark.parametrize(
    "rope, scaling",
    [
        (dict(mscale=0, mscale_all_dim=0, attention_factor=1.0), 0.0),
        (dict(mscale=0.5, mscale_all_dim=0.707, attention_factor=1), 0.0707),
    ],
)
def test_a_given_attention_factor_goes_before_mscale(rope, scaling):
    values = DEEPSEEK_V3 | dict(rope_scaling=DEEPSEEK_V3["rope_scaling"] | rope)
    assert hf_config.from_json(values, "config.json").model.rope.yarn_log_multiplier == pytest.approx(scaling)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(scaling="yarn", factor=40.0, original_context_length=4096),
        RopeConfig(scaling="linear", factor=4.0, base=50000.0),
    ],
    ids=lambda rope: rope.scaling,
)
def test_rotations_that_no_published_model_has(rope):
    config = dataclasses.replace(PRESETS["deepseek-v3"], rope=rope)
    assert hf_config.from_json(hf_config.to_json(config), "config.json").model == config


def test_greedy_selection_has_no_groups():
    """As in DeepSeek-V2-Lite, whatever the other keys say."""
    values = hf_config.to_json(PRESETS["deepseek-v2"]) | dict(topk_method="greedy")
    moe = hf_config.from_json(values, "config.json").model.moe
    assert values["n_group"] == 8 and moe.num_groups == moe.num_groups_used == 1


@pytest.mark.parametrize(
    "part, changes",
    [
        ("moe", dict(has_selection_bias=False)),
        ("moe", dict(gating="softmax")),
        ("moe", dict(gating="softmax", has_selection_bias=False)),
        ("rope", dict(attention_factor=2.0)),
    ],
)
def test_what_no_checkpoint_can_say(part, changes):
    config = PRESETS["deepseek-v3"]
    config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})
    with pytest.raises(ValueError, match=r"^\w+ must be .* in a checkpoint"):
        hf_config.to_json(config)


def test_experts_may_be_absent():
    values = GLM_FLASH | dict(n_routed_experts=None)
    config = hf_config.from_json(values, "config.json").model
    assert config.moe is None and config.num_dense_layers == 47
    assert hf_config.from_json(hf_config.to_json(config), "config.json").model == config


MISTAKES = {
    "no architecture": (dict(model_type=None), "model_type"),
    "another architecture": (dict(model_type="deepseek_v32"), "model_type"),
    "architecture of no text": (dict(model_type=["deepseek_v3"]), "model_type"),
    "no size": (dict(hidden_size=None), "hidden_size"),
    "size of a wrong type": (dict(hidden_size=64.0), "hidden_size"),
    "size out of range": (dict(vocab_size=-1), "vocab_size"),
    "huge": (dict(num_hidden_layers=1 << 40), "num_hidden_layers"),
    "true for a size": (dict(kv_lora_rank=True), "kv_lora_rank"),
    "biases": (dict(attention_bias=True), "attention_bias"),
    "another activation": (dict(hidden_act="gelu"), "hidden_act"),
    "halves, not pairs": (dict(rope_interleave=False), "rope_interleave"),
    "grouped queries": (dict(num_key_value_heads=8), "num_key_value_heads"),
    "experts in some layers": (dict(moe_layer_freq=2), "moe_layer_freq"),
    "layers in disorder": (dict(mlp_layer_types=["sparse"] * 60 + ["dense"]), "mlp_layer_types"),
    "layers of no list": (dict(mlp_layer_types="dense"), "mlp_layer_types"),
    "another gating": (dict(scoring_func="softmax"), "scoring_func"),
    "another selection": (dict(topk_method="greedy"), "topk_method"),
    "more experts than there are": (dict(num_experts_per_tok=500), "num_experts_per_token"),
    "a scale that is no number": (dict(routed_scaling_factor="2.5"), "routed_scaling_factor"),
    "an infinite scale": (dict(routed_scaling_factor=float("inf")), "routed_scaling_factor"),
    "an infinite epsilon": (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "rope of no object": (dict(rope_scaling="yarn"), "rope_scaling"),
    "another scaling": (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling.type"),
    "rotations that contradict each other": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=10000)),
        "rope_scaling' must be as 'rope_parameters'",
    ),
    "a temperature of 0": (
        dict(rope_scaling=DEEPSEEK_V3["rope_scaling"] | dict(factor=math.e, mscale_all_dim=-10.0)),
        "rope_scaling.mscale",
    ),
    "no factor": (dict(rope_scaling=dict(type="yarn")), "rope_scaling.factor"),
    "rotated parts rescaled": (
        dict(rope_scaling=DEEPSEEK_V3["rope_scaling"] | dict(mscale=0.707)),
        "rope_scaling.mscale",
    ),
    "linear scaling with a temperature": (
        dict(rope_scaling=dict(type="linear", factor=2.0, mscale_all_dim=1.0)),
        "rope_scaling.mscale_all_dim",
    ),
    "YaRN that does not round": (
        dict(rope_scaling=DEEPSEEK_V3["rope_scaling"] | dict(truncate=False)),
        "rope_scaling.truncate",
    ),
    "a YaRN without mscale": (
        dict(rope_scaling=DEEPSEEK_V3["rope_scaling"] | dict(mscale=0, mscale_all_dim=0)),
        "rope_scaling.mscale",
    ),
    "part of a head rotated": (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "another quantisation": (dict(quantization_config=dict(quant_method="awq")), "quant_method"),
    "a scale per tensor": (
        dict(quantization_config=dict(quant_method="fp8", weight_block_size=None)),
        "weight_block_size",
    ),
    "a block of no size": (
        dict(quantization_config=dict(quant_method="fp8", weight_block_size=[128, 0])),
        "weight_block_size",
    ),
}


@pytest.mark.parametrize("changes, key", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(changes, key):
    values = copy.deepcopy(DEEPSEEK_V3) | changes
    with pytest.raises(GGUFError, match=rf"^[^\n]*somewhere/config\.json: [^\n]*{key}[^\n]*\.$"):
        hf_config.from_json(values, "somewhere/config.json")


def test_a_v2_that_normalises_is_refused():
    """The published code drops the scale of the weights then, transformers keeps it."""
    values = hf_config.to_json(PRESETS["deepseek-v2"]) | dict(norm_topk_prob=True)
    with pytest.raises(GGUFError, match="norm_topk_prob"):
        hf_config.from_json(values, "config.json")
