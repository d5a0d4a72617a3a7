"""The table between names of checkpoints and of GGUF files reads the same in both directions."""

import pytest

from checkpoints_tools import hf_names, layout
from mla_jax.presets import PRESETS

KNOWN = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.60.self_attn.q_a_layernorm.weight": "blk.60.attn_q_a_norm.weight",
    "model.layers.7.self_attn.kv_a_proj_with_mqa.weight": "blk.7.attn_kv_a_mqa.weight",
    "model.layers.7.self_attn.o_proj.weight": "blk.7.attn_output.weight",
    "model.layers.7.post_attention_layernorm.weight": "blk.7.ffn_norm.weight",
    "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
    "model.layers.7.mlp.gate.weight": "blk.7.ffn_gate_inp.weight",
    "model.layers.7.mlp.gate.e_score_correction_bias": "blk.7.exp_probs_b.bias",
    "model.layers.7.mlp.shared_experts.up_proj.weight": "blk.7.ffn_up_shexp.weight",
    "model.layers.61.eh_proj.weight": "blk.61.nextn.eh_proj.weight",
    "model.layers.61.shared_head.head.weight": "blk.61.nextn.shared_head_head.weight",
}


@pytest.mark.parametrize("theirs, name", KNOWN.items())
def test_known_names(theirs, name):
    assert hf_names.to_gguf(theirs) == (name, None)
    assert hf_names.to_hf(name) == theirs


def test_experts_are_rows_of_a_stack():
    theirs = "model.layers.3.mlp.experts.11.gate_proj.weight"
    assert hf_names.to_gguf(theirs) == ("blk.3.ffn_gate_exps.weight", 11)
    assert hf_names.to_hf("blk.3.ffn_gate_exps.weight", 11) == theirs
    assert hf_names.to_hf("blk.3.ffn_gate_exps.weight") is None
    assert hf_names.to_hf("blk.3.ffn_gate.weight", 11) is None


def test_every_row_goes_there_and_back():
    rows = [("blk.5.", table) for table in (hf_names._LAYER, hf_names._EXPERT)] + [("", hf_names._MODEL)]
    seen = set()
    for block, table in rows:
        for name in table:
            expert = 2 if hf_names.is_stack(block + name) else None
            theirs = hf_names.to_hf(block + name, expert)
            assert hf_names.to_gguf(theirs) == (block + name, expert)
            seen.add(theirs)
    assert len(seen) == sum(len(table) for _, table in rows)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_tensor_of_a_published_model_has_a_name(config):
    for name in layout.expected_shapes(config, ()):
        assert hf_names.to_hf(name, 0 if hf_names.is_stack(name) else None)


@pytest.mark.parametrize(
    "theirs",
    [
        "model.layers.01.self_attn.q_proj.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.01.gate_proj.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.self_attn.q_proj.weight_scale_inv",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight\n",
        "",
    ],
)
def test_unknown_names(theirs):
    assert hf_names.to_gguf(theirs) is None


@pytest.mark.parametrize("name", ["blk.01.attn_q.weight", "blk.1.attn_k_b.weight", "rope_freqs.weight", ""])
def test_names_that_checkpoints_do_not_have(name):
    assert hf_names.to_hf(name) is None
