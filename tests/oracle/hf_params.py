"""Turns a DeepSeek-V2 or -V3 model of `transformers` into this project's config and parameters."""

import jax.numpy as jnp
import numpy as np

from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig

_MODEL = {
    "model.embed_tokens.weight": "embed/weight",
    "model.norm.weight": "output_norm/weight",
    "lm_head.weight": "output/weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm/weight",
    "self_attn.q_proj.weight": "attn/q/weight",
    "self_attn.q_a_proj.weight": "attn/q_a/weight",
    "self_attn.q_a_layernorm.weight": "attn/q_a_norm/weight",
    "self_attn.q_b_proj.weight": "attn/q_b/weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn/kv_a/weight",
    "self_attn.kv_a_layernorm.weight": "attn/kv_a_norm/weight",
    "self_attn.kv_b_proj.weight": "attn/kv_b/weight",
    "self_attn.o_proj.weight": "attn/out/weight",
    "post_attention_layernorm.weight": "ffn_norm/weight",
    "mlp.gate_proj.weight": "ffn/gate/weight",
    "mlp.up_proj.weight": "ffn/up/weight",
    "mlp.down_proj.weight": "ffn/down/weight",
    "mlp.gate.weight": "ffn/router/weight",
    "mlp.gate.e_score_correction_bias": "ffn/router/bias",
    "mlp.experts.gate_up_proj": "ffn/experts/gate_up/weight",
    "mlp.experts.down_proj": "ffn/experts/down/weight",
    "mlp.shared_experts.gate_proj.weight": "ffn/shared/gate/weight",
    "mlp.shared_experts.up_proj.weight": "ffn/shared/up/weight",
    "mlp.shared_experts.down_proj.weight": "ffn/shared/down/weight",
}


def model_config(hf) -> ModelConfig:
    """Returns the config of a `DeepseekV2Config` or `DeepseekV3Config`.

    Raises:
      ValueError: if `mscale` and `mscale_all_dim` differ: the rotated parts would be rescaled, which no
        published model does and a GGUF file cannot say.
    """
    is_v3 = hf.model_type == "deepseek_v3"
    has_groups = is_v3 or hf.topk_method == "group_limited_greedy"
    return ModelConfig(
        vocab_size=hf.vocab_size,
        context_length=hf.max_position_embeddings,
        embed_dim=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_dense_layers=hf.first_k_dense_replace,
        dense_hidden_dim=hf.intermediate_size,
        norm_epsilon=hf.rms_norm_eps,
        mla=MLAConfig(
            num_heads=hf.num_attention_heads,
            q_lora_rank=hf.q_lora_rank,
            kv_lora_rank=hf.kv_lora_rank,
            qk_nope_head_dim=hf.qk_nope_head_dim,
            qk_rope_head_dim=hf.qk_rope_head_dim,
            v_head_dim=hf.v_head_dim,
        ),
        moe=MoEConfig(
            num_experts=hf.n_routed_experts,
            num_experts_per_token=hf.num_experts_per_tok,
            expert_hidden_dim=hf.moe_intermediate_size,
            num_shared_experts=hf.n_shared_experts,
            gating="sigmoid" if is_v3 else "softmax",
            has_selection_bias=is_v3,
            normalize_weights=bool(hf.norm_topk_prob),
            weights_scale=hf.routed_scaling_factor,
            num_groups=hf.n_group if has_groups else 1,
            num_groups_used=hf.topk_group if has_groups else 1,
        ),
        rope=_rope_config(hf.rope_parameters),
    )


def _rope_config(rope) -> RopeConfig:
    if rope["rope_type"] == "default":
        return RopeConfig(base=rope["rope_theta"])
    if rope["mscale"] != rope["mscale_all_dim"]:
        raise ValueError(f"mscale must equal mscale_all_dim, got {rope['mscale']}, {rope['mscale_all_dim']}.")
    return RopeConfig(
        base=rope["rope_theta"],
        scaling="yarn",
        factor=rope["factor"],
        original_context_length=rope["original_max_position_embeddings"],
        yarn_log_multiplier=0.1 * rope["mscale_all_dim"],
    )


def params_of(state, config: ModelConfig, *, as_mainline: bool):
    """Returns the parameter tree of a state dict, in float32.

    Args:
      state: tensors by name. Every name must be known.
      config: from `model_config`.
      as_mainline: True splits kv_b into k_b and v_b and leaves gate and up of experts merged; False leaves
        kv_b and splits gate and up. Files have either, and the network reads both.
    """
    params = {}
    for name, tensor in state.items():
        _put(params, _path(name), np.asarray(tensor, dtype=np.float32))
    for i in range(config.num_layers):
        layer = params[f"layers_{i}"]
        if as_mainline:
            kv_b = layer["attn"].pop("kv_b")["weight"]
            layer["attn"] |= _split_kv_b(kv_b, config.mla)
        elif not config.is_dense(i):
            gate, up = jnp.split(layer["ffn"]["experts"].pop("gate_up")["weight"], 2, axis=1)
            layer["ffn"]["experts"] |= {"gate": {"weight": gate}, "up": {"weight": up}}
    return params


def _path(name):
    if name in _MODEL:
        return _MODEL[name]
    _, _, layer, rest = name.split(".", 3)
    return f"layers_{layer}/{_LAYER[rest]}"


def _put(tree, path, array):
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = jnp.asarray(array)


def _split_kv_b(kv_b, mla: MLAConfig):
    joined = kv_b.reshape(mla.num_heads, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
    k_b, v_b = jnp.split(joined, [mla.qk_nope_head_dim], axis=1)
    return {"k_b": {"weight": k_b.swapaxes(1, 2)}, "v_b": {"weight": v_b}}
