"""The two-way table between tensor names of Hugging Face checkpoints and of GGUF files.

Both have one name for a tensor, but for routed experts: a checkpoint has one matrix for each of them, a GGUF
file stacks those of a layer, `[experts, out, in]`. What GGUF files have in other forms (`attn_k_b` with
`attn_v_b`, `ffn_gate_up_exps`) has no name of its own in a checkpoint.
"""

import re
from typing import NamedTuple

SCALE_SUFFIX = "_scale_inv"  # after the name of an FP8 matrix: the scales of its blocks

_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
    # of a layer that predicts a second token
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.embed_tokens.weight": "embed_tokens.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.shared_head_head.weight": "shared_head.head.weight",
    "nextn.shared_head_norm.weight": "shared_head.norm.weight",
}
_EXPERT = {
    "ffn_gate_exps.weight": "gate_proj.weight",
    "ffn_up_exps.weight": "up_proj.weight",
    "ffn_down_exps.weight": "down_proj.weight",
}
_MODEL_NAMES = {theirs: name for name, theirs in _MODEL.items()}
_LAYER_NAMES = {theirs: name for name, theirs in _LAYER.items()}
_EXPERT_NAMES = {theirs: name for name, theirs in _EXPERT.items()}

_NUMBER = "(0|[1-9][0-9]{0,8})"
_GGUF_NAME = re.compile(rf"blk\.{_NUMBER}\.(.+)")
_EXPERT_NAME = re.compile(rf"model\.layers\.{_NUMBER}\.mlp\.experts\.{_NUMBER}\.(.+)")
_LAYER_NAME = re.compile(rf"model\.layers\.{_NUMBER}\.(.+)")


class Place(NamedTuple):
    """Where a tensor of a checkpoint goes in a GGUF file."""

    name: str  # GGUF name
    expert: int | None = None  # row of the stack, None for a tensor that is none of a routed expert


def to_gguf(name: str) -> Place | None:
    """Returns where the tensor `name` of a checkpoint goes in a GGUF file, None if nowhere."""
    if name in _MODEL_NAMES:
        return Place(_MODEL_NAMES[name])
    if (match := _EXPERT_NAME.fullmatch(name)) and match[3] in _EXPERT_NAMES:
        return Place(f"blk.{match[1]}.{_EXPERT_NAMES[match[3]]}", int(match[2]))
    if (match := _LAYER_NAME.fullmatch(name)) and match[2] in _LAYER_NAMES:
        return Place(f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}")
    return None


def to_hf(name: str, expert: int | None = None) -> str | None:
    """Returns the name in checkpoints of a tensor of a GGUF file: `to_gguf` read backwards.

    Args:
      name: GGUF name.
      expert: which matrix of a stack of experts is meant; None for a tensor that is no such stack.

    Returns:
      The name, None if checkpoints have no such tensor, a stack without `expert` and other tensors with it
      included.
    """
    match = _GGUF_NAME.fullmatch(name)
    if expert is not None:
        is_stack = match and match[2] in _EXPERT
        return f"model.layers.{match[1]}.mlp.experts.{expert}.{_EXPERT[match[2]]}" if is_stack else None
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}"
    return _MODEL.get(name)


def is_stack(name: str) -> bool:
    """Whether a GGUF name is that of a stack of routed experts, one tensor each in checkpoints."""
    match = _GGUF_NAME.fullmatch(name)
    return match is not None and match[2] in _EXPERT
