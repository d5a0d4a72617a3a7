"""Configs refuse what no model can be, in a sentence that names the field and what was found."""

import dataclasses
import math

import pytest

from mla_jax.config import CACHE_TYPES, MLAConfig, MLAMode, ModelConfig, MoEConfig, RopeConfig, RunConfig

MLA = MLAConfig(
    num_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
MOE = MoEConfig(
    num_experts=8, num_experts_per_token=2, expert_hidden_dim=16, num_shared_experts=1, gating="sigmoid"
)
ROPE = RopeConfig()
MODEL = ModelConfig(
    vocab_size=32,
    context_length=64,
    embed_dim=16,
    num_layers=3,
    num_dense_layers=1,
    dense_hidden_dim=24,
    norm_epsilon=1e-6,
    mla=MLA,
    moe=MOE,
)
RUN = RunConfig()
_TYPES = ", ".join(CACHE_TYPES)

_GROUPS = "num_groups must divide num_experts and be at least num_groups_used, got 8 experts, "
_REFUSED = [
    (MLA, dict(num_heads=0), "num_heads must be at least 1, got 0."),
    (MLA, dict(q_lora_rank=0), "q_lora_rank must be at least 1, got 0."),
    (MLA, dict(kv_lora_rank=-1), "kv_lora_rank must be at least 1, got -1."),
    (MLA, dict(qk_nope_head_dim=0), "qk_nope_head_dim must be at least 1, got 0."),
    (MLA, dict(v_head_dim=0), "v_head_dim must be at least 1, got 0."),
    (MLA, dict(qk_rope_head_dim=5), "qk_rope_head_dim must be even and positive, got 5."),
    (MLA, dict(qk_rope_head_dim=0), "qk_rope_head_dim must be even and positive, got 0."),
    (MOE, dict(num_experts=0), "num_experts must be at least 1, got 0."),
    (MOE, dict(num_experts_per_token=0), "num_experts_per_token must be at least 1, got 0."),
    (MOE, dict(expert_hidden_dim=0), "expert_hidden_dim must be at least 1, got 0."),
    (MOE, dict(num_groups=0), "num_groups must be at least 1, got 0."),
    (MOE, dict(num_groups_used=0), "num_groups_used must be at least 1, got 0."),
    (MOE, dict(num_shared_experts=-1), "num_shared_experts must be at least 0, got -1."),
    (MOE, dict(gating="tanh"), "gating must be 'softmax' or 'sigmoid', got 'tanh'."),
    (
        MOE,
        dict(num_groups=3),
        _GROUPS + "3 groups, 1 used.",
    ),
    (
        MOE,
        dict(num_groups=2, num_groups_used=3),
        _GROUPS + "2 groups, 3 used.",
    ),
    (
        MOE,
        dict(num_experts_per_token=9),
        "num_experts_per_token must be at most the experts of the used groups, got 9 of 8.",
    ),
    (
        MOE,
        dict(num_groups=4, num_groups_used=2, num_experts_per_token=5),
        "num_experts_per_token must be at most the experts of the used groups, got 5 of 8.",
    ),
    (MOE, dict(weights_scale=0.0), "weights_scale must be in [0.001, 1000], got 0.0."),
    (MOE, dict(weights_scale=math.nan), "weights_scale must be in [0.001, 1000], got nan."),
    (ROPE, dict(scaling="ntk"), "scaling must be 'none', 'linear' or 'yarn', got 'ntk'."),
    (MOE, dict(weights_scale=1001.0), "weights_scale must be in [0.001, 1000], got 1001.0."),
    (ROPE, dict(base=1.0), "base must be in (1, 1e+12], got 1.0."),
    (ROPE, dict(base=math.inf), "base must be in (1, 1e+12], got inf."),
    (ROPE, dict(factor=0.0), "factor must be in [1e-06, 1e+06], got 0.0."),
    (ROPE, dict(factor=math.nan), "factor must be in [1e-06, 1e+06], got nan."),
    (ROPE, dict(beta_fast=1e300), "beta_fast must be in [1e-06, 1e+06], got 1e+300."),
    (ROPE, dict(beta_slow=1e-320), "beta_slow must be in [1e-06, 1e+06], got 1e-320."),
    (ROPE, dict(attention_factor=3e38), "attention_factor must be in [0.001, 1000], got 3e+38."),
    (ROPE, dict(yarn_log_multiplier=-0.1), "yarn_log_multiplier must be in [0, 1000], got -0.1."),
    (ROPE, dict(beta_slow=33.0), "beta_slow must be at most beta_fast = 32.0, got 33.0."),
    (ROPE, dict(scaling="yarn"), "original_context_length must be positive with YaRN, got 0."),
    (MODEL, dict(vocab_size=0), "vocab_size must be at least 1, got 0."),
    (MODEL, dict(context_length=0), "context_length must be at least 1, got 0."),
    (MODEL, dict(embed_dim=0), "embed_dim must be at least 1, got 0."),
    (MODEL, dict(num_layers=0), "num_layers must be at least 1, got 0."),
    (MODEL, dict(num_dense_layers=4), "num_dense_layers must be in [0, 3], got 4."),
    (MODEL, dict(num_dense_layers=-1), "num_dense_layers must be in [0, 3], got -1."),
    (MODEL, dict(dense_hidden_dim=0), "dense_hidden_dim must be at least 1, got 0."),
    (MODEL, dict(moe=None), "moe must be given when some layers are not dense, got None."),
    (MODEL, dict(norm_epsilon=0.0), "norm_epsilon must be in [1e-30, 1), got 0.0."),
    (MODEL, dict(norm_epsilon=math.nan), "norm_epsilon must be in [1e-30, 1), got nan."),
    (
        RUN,
        dict(cache_type="q9"),
        f"cache_type must be one of {_TYPES}, got 'q9'.",
    ),
    (
        RUN,
        dict(cache_type_rope="q9"),
        f"cache_type_rope must be one of {_TYPES}, got 'q9'.",
    ),
    (RUN, dict(hadamard_size=32), "hadamard_size must be one of 64, 128, 256, 512, or None, got 32."),
    (
        RUN,
        dict(mla=0, cache_type_rope="f16"),
        "cache_type_rope must not be given with mla 0, whose keys are cached whole, got 'f16'.",
    ),
    (RUN, dict(mla=4), "mla must be 0, 1, 2 or 3, got 4."),
]


@pytest.mark.parametrize(("config", "changes", "sentence"), _REFUSED, ids=[s[2][:45] for s in _REFUSED])
def test_refused_in_a_sentence(config, changes, sentence):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(config, **changes)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MLA, dict(q_lora_rank=1, qk_rope_head_dim=2)),
        (MOE, dict(num_experts_per_token=8, num_shared_experts=0)),
        (MOE, dict(num_groups=4, num_groups_used=2, num_experts_per_token=4)),
        (ROPE, dict(scaling="yarn", original_context_length=1)),
        (MODEL, dict(num_dense_layers=3, moe=None)),
        (MODEL, dict(num_dense_layers=0, dense_hidden_dim=0)),
    ],
)
def test_limits_themselves_are_allowed(config, changes):
    made = dataclasses.replace(config, **changes)
    assert {name: getattr(made, name) for name in changes} == changes


def test_only_the_first_layers_are_dense():
    assert [MODEL.is_dense(layer) for layer in range(3)] == [True, False, False]


def test_head_width_is_both_parts():
    assert MLA.qk_head_dim == 6 + 4


def test_run_takes_modes_by_number():
    assert [RunConfig(mla=mode).mla for mode in range(4)] == list(MLAMode)
    assert RunConfig(mla=2) == RunConfig(mla=MLAMode.MIXED)


def test_configs_are_static_under_jit():
    """Equal configs must hash equal, or each would compile anew; none may change afterwards."""
    again = dataclasses.replace(MODEL, mla=dataclasses.replace(MLA), moe=dataclasses.replace(MOE))
    assert again == MODEL and hash(again) == hash(MODEL)
    assert hash(RunConfig(mla=1)) == hash(RunConfig(mla=MLAMode.ABSORBED))
    assert dataclasses.replace(MODEL, embed_dim=8) != MODEL
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.embed_dim = 8
