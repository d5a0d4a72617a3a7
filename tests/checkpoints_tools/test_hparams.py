"""Metadata to config: rules where keys are absent or ambiguous, and the way back."""

import dataclasses

import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import gguf_file, hparams
from checkpoints_tools.gguf_metadata import Metadata
from mla_jax import presets

A = "deepseek2."


def read(path, **options):
    write_deepseek2(path, **options)
    file = gguf_file.open_gguf(path)
    return hparams.model_config(file.metadata, file.tensors, file.path)


def test_all_sizes(tmp_path):
    config = read(tmp_path / "a.gguf", groups=4, groups_used=2, shared=2, yarn=True)
    assert dataclasses.asdict(config.mla) == dict(
        num_heads=2, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    assert dataclasses.asdict(config.moe) == dict(
        num_experts=8,
        num_experts_per_token=3,
        expert_hidden_dim=32,
        num_shared_experts=2,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=1.5,
        num_groups=4,
        num_groups_used=2,
    )
    assert dataclasses.asdict(config.rope) == dict(
        base=10000.0,
        scaling="yarn",
        factor=40.0,
        original_context_length=128,
        yarn_log_multiplier=pytest.approx(0.1),
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=1.0,
    )
    assert (config.vocab_size, config.context_length, config.embed_dim) == (320, 4096, 64)
    assert (config.num_layers, config.num_dense_layers, config.dense_hidden_dim) == (3, 1, 96)
    assert config.norm_epsilon == pytest.approx(1e-6)


@pytest.mark.parametrize("kv", ["k_b_v_b", "k_b_v_b_2d", "both", "both_2d"])
def test_layouts_of_kv_b_mean_the_same_config(tmp_path, kv):
    assert read(tmp_path / "a.gguf", kv=kv) == read(tmp_path / "b.gguf")


def test_one_head_is_not_taken_for_the_mainline_layout(tmp_path):
    one = read(tmp_path / "a.gguf", sizes={"heads": 1})
    assert one == read(tmp_path / "b.gguf", sizes={"heads": 1}, kv="k_b_v_b")
    assert (one.mla.num_heads, one.mla.v_head_dim) == (1, 32)


@pytest.mark.parametrize("kv", ["kv_b", "k_b_v_b"])
def test_lite_is_told_by_its_tensors(tmp_path, kv):
    key = {A + "attention.q_lora_rank": 64}
    assert read(tmp_path / "a.gguf", q_lora=False, kv=kv).mla.q_lora_rank is None
    assert read(tmp_path / "b.gguf", q_lora=False, kv=kv, metadata=key).mla.q_lora_rank is None


@pytest.mark.parametrize(
    "gating, layers, expected",
    [
        ("softmax", 3, "softmax"),
        ("sigmoid", 3, "sigmoid"),
        (None, 3, "softmax"),
        (None, 46, "softmax"),
        (None, 47, "sigmoid"),
        (None, 48, "sigmoid"),
        ("softmax", 47, "softmax"),
    ],
)
def test_gating(tmp_path, gating, layers, expected):
    small = dict(embed=8, heads=1, q_lora=8, kv_lora=8, nope=8, rope=8, v=8, ff=8, ff_exp=8)
    config = read(tmp_path / "a.gguf", gating=gating, layers=layers, sizes=small, experts=4)
    assert config.moe.gating == expected
    zero = read(
        tmp_path / "b.gguf", gating=None, layers=layers, sizes=small, metadata={A + "expert_gating_func": 0}
    )
    assert zero.moe.gating == ("sigmoid" if layers in (47, 48) else "softmax")


@pytest.mark.parametrize("bias", [True, False])
def test_selection_bias_is_told_by_its_tensors(tmp_path, bias):
    assert read(tmp_path / "a.gguf", gating="softmax", bias=bias).moe.has_selection_bias is bias


@pytest.mark.parametrize(
    "changes, scaling, factor",
    [
        ({}, "none", 1.0),
        ({"scaling.factor": 4.0}, "linear", 4.0),
        ({"scaling.factor": 0.0}, "none", 1.0),
        ({"scale_linear": 2.0}, "linear", 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, "none", 1.0),
        ({"scaling.type": "linear", "scaling.factor": 4}, "linear", 4.0),
        ({"scaling.type": "yarn"}, "yarn", 1.0),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, "yarn", 4.0),
    ],
)
def test_rope_scaling(tmp_path, changes, scaling, factor):
    rope = read(tmp_path / "a.gguf", metadata={f"{A}rope.{k}": v for k, v in changes.items()}).rope
    assert (rope.scaling, rope.factor) == (scaling, factor)
    assert rope.original_context_length == (4096 if scaling == "yarn" else 0)


def test_yarn_betas_are_those_of_the_file(tmp_path):
    betas = {f"{A}rope.scaling.yarn_beta_fast": 1.0, f"{A}rope.scaling.yarn_beta_slow": 0.5}
    rope = read(tmp_path / "a.gguf", yarn=True, metadata=betas).rope
    assert (rope.beta_fast, rope.beta_slow) == (1.0, 0.5)
    assert read(tmp_path / "b.gguf", metadata=betas) == read(tmp_path / "c.gguf")


def test_blocks_that_predict_a_second_token_are_no_layers(tmp_path):
    key = {A + "nextn_predict_layers": 1}
    assert read(tmp_path / "a.gguf", layers=4, metadata=key) == read(tmp_path / "b.gguf", layers=3)
    checkpoint = checkpoints_tools.load_gguf(tmp_path / "a.gguf")
    assert "layers_3" not in checkpoint.params and "blk.3.attn_norm.weight" in checkpoint.unread
    with pytest.raises(
        gguf_file.GGUFError, match=r"nextn_predict_layers' must be an integer in \[0, 2\], got 3"
    ):
        read(tmp_path / "c.gguf", metadata={A + "nextn_predict_layers": 3})


def test_missing_keys_with_defaults(tmp_path):
    absent = ("vocab_size", "rope.freq_base", "attention.head_count_kv", "expert_weights_norm")
    config = read(tmp_path / "a.gguf", gating="softmax", metadata={A + key: None for key in absent})
    assert config == read(tmp_path / "b.gguf", gating="softmax")


def test_per_layer_feed_forward_length(tmp_path):
    key = A + "feed_forward_length"
    config = read(tmp_path / "a.gguf", dense=2, metadata={key: [96, 96, 0]})
    assert config == read(tmp_path / "b.gguf", dense=2)
    with pytest.raises(gguf_file.GGUFError, match="must be the same in layers 0 to 1"):
        read(tmp_path / "c.gguf", dense=2, metadata={key: [96, 64, 0]})


def test_dense_model(tmp_path):
    config = read(tmp_path / "a.gguf", dense=3, experts=0)
    assert config.moe is None and config.num_dense_layers == 3


CONFIGS = presets.PRESETS | {"packaged": presets.PACKAGED}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_metadata_reads_back_as_the_config(config):
    names = ["blk.0.attn_q_a.weight" if config.mla.q_lora_rank else "blk.0.attn_q.weight"]
    if config.moe is not None and config.moe.has_selection_bias:
        names.append("blk.1.exp_probs_b.bias")
    found = hparams.model_config(Metadata.of(hparams.metadata(config)), names)
    assert _rounded(found) == _rounded(config)


def _rounded(config):
    """Returns all fields as a dict, numbers as the float32 that a file holds."""

    def visit(value):
        if isinstance(value, dict):
            return {key: visit(child) for key, child in value.items()}
        return float(np.float32(value)) if isinstance(value, float) else value

    return visit(dataclasses.asdict(config))
