"""`config.json` of a Hugging Face checkpoint to `ModelConfig` and back; every key is checked.

What a GGUF file cannot say (biases, rescaled rotations, another activation) is refused by the name of its
key. One thing is passed over in silence: the reference models of transformers take 1e-6 as the epsilon of the
two norms of latents, whatever `rms_norm_eps` is; GGUF files and their readers have one epsilon for all norms.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints_tools.gguf_file import GGUFError
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig

_GATING = {  # `model_type`: gating of its routers
    "deepseek_v2": "softmax",
    "deepseek_v3": "sigmoid",
    "kimi_k2": "sigmoid",
    "glm4_moe_lite": "sigmoid",
}
_SELECTION = {"softmax": ("greedy", "group_limited_greedy"), "sigmoid": ("noaux_tc",)}  # `topk_method`
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12
_MAX_CONTEXT = (1 << 31) - 1
_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """What `config.json` says about a checkpoint.

    Attributes:
      model: sizes and constants of the network.
      num_nextn: layers after the others that predict a second token; the checkpoint may leave them out.
      is_tied: whether the output matrix is the embedding.
      fp8_block: rows and columns of an FP8 matrix that share a scale; None if no matrix is FP8.
    """

    model: ModelConfig
    num_nextn: int
    is_tied: bool
    fp8_block: tuple[int, int] | None


def from_json(values: Mapping[str, Any], path: str) -> HFConfig:
    """Derives what a model is from its `config.json`.

    Args:
      values: the object in the file.
      path: the file, for messages.

    Raises:
      GGUFError: for another architecture, a missing key, or a value that is of a wrong type, out of range or
        not to be said in a GGUF file.
    """
    keys = _Keys(values, path)
    model_type = values.get("model_type")
    if model_type not in list(_GATING):
        raise keys.fail("model_type", f"must be one of {', '.join(_GATING)}, got {model_type!r:.80}")
    keys.fixed("hidden_act", "silu", "silu")
    for key in ("attention_bias", "mlp_bias"):
        keys.fixed(key, False, False)
    try:
        model = _model_config(keys, _GATING[model_type])
    except GGUFError:
        raise
    except ValueError as error:  # from the checks of the configs themselves
        raise GGUFError(f"{path}: {error}") from None
    return HFConfig(
        model=model,
        num_nextn=keys.integer("num_nextn_predict_layers", 0, low=0, high=_MAX_LAYERS),
        is_tied=keys.boolean("tie_word_embeddings", False),
        fp8_block=_fp8_block(keys),
    )


def to_json(config: ModelConfig, *, num_nextn: int = 0) -> dict[str, Any]:
    """Returns the `config.json` that says `config`: `from_json` read backwards.

    Args:
      config: the model. With softmax gating it becomes a deepseek_v2, otherwise a deepseek_v3.
      num_nextn: layers after the others that predict a second token.

    Raises:
      ValueError: if neither architecture has such a model.
    """
    mla, moe = config.mla, config.moe if config.num_dense_layers < config.num_layers else None
    is_v3 = moe is not None and moe.gating == "sigmoid"
    name = "DeepseekV3" if is_v3 else "DeepseekV2"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": num_nextn,
        "first_k_dense_replace": config.num_dense_layers,
        "moe_layer_freq": 1,
        "intermediate_size": config.dense_hidden_dim,
        "rms_norm_eps": _shortest(config.norm_epsilon),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        **_moe_json(moe),
        **_rope_json(config.rope),
    }


class _Keys:
    """Reads keys of one object, each with its type and range."""

    def __init__(self, values: Mapping[str, Any], path: str, prefix: str = ""):
        self.values, self.path, self.prefix = values, path, prefix

    def fail(self, key: str, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: key '{self.prefix}{key}' {what}.")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            raise self.fail(key, "is missing")
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"must be an integer in [{low}, {high}], got {value!r:.80}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise self.fail(key, f"must be a finite number, got {value!r:.80}")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.fail(key, f"must be true or false, got {value!r:.80}")
        return value

    def fixed(self, key: str, default: Any, *allowed: Any) -> None:
        value = self.get(key, default)
        if not any(value == entry and type(value) is type(entry) for entry in allowed):
            choice = " or ".join(map(repr, allowed))
            raise self.fail(key, f"must be {choice} in a model that GGUF files hold, got {value!r:.80}")

    def object(self, key: str) -> "_Keys | None":
        value = self.get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, f"must be an object, got {value!r:.80}")
        return None if value is None else _Keys(value, self.path, f"{self.prefix}{key}.")


def _model_config(keys: _Keys, gating: str) -> ModelConfig:
    num_layers = keys.integer("num_hidden_layers", high=_MAX_LAYERS)
    has_experts = keys.get("n_routed_experts", None) is not None
    num_dense = _num_dense_layers(keys, num_layers) if has_experts else num_layers
    num_heads = keys.integer("num_attention_heads")
    keys.fixed("num_key_value_heads", num_heads, num_heads)
    keys.fixed("rope_interleave", True, True)
    has_q_lora = keys.get("q_lora_rank", None) is not None
    return ModelConfig(
        vocab_size=keys.integer("vocab_size"),
        context_length=keys.integer("max_position_embeddings", high=_MAX_CONTEXT),
        embed_dim=keys.integer("hidden_size"),
        num_layers=num_layers,
        num_dense_layers=num_dense,
        dense_hidden_dim=keys.integer("intermediate_size") if num_dense else 0,
        norm_epsilon=keys.number("rms_norm_eps"),
        mla=MLAConfig(
            num_heads=num_heads,
            q_lora_rank=keys.integer("q_lora_rank") if has_q_lora else None,
            kv_lora_rank=keys.integer("kv_lora_rank"),
            qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
            qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
            v_head_dim=keys.integer("v_head_dim"),
        ),
        moe=_moe_config(keys, gating) if num_dense < num_layers else None,
        rope=_rope_config(keys),
    )


def _num_dense_layers(keys: _Keys, num_layers: int) -> int:
    kinds = keys.get("mlp_layer_types", None)
    if kinds is None:
        keys.fixed("moe_layer_freq", 1, 1)
        return min(keys.integer("first_k_dense_replace", low=0), num_layers)
    num_dense = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds != ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense):
        raise keys.fail(
            "mlp_layer_types", f"must be 'dense' some times, then 'sparse', for {num_layers} layers"
        )
    return num_dense


def _moe_config(keys: _Keys, gating: str) -> MoEConfig:
    is_v3 = gating == "sigmoid"
    keys.fixed("scoring_func", gating, gating)
    keys.fixed("topk_method", _SELECTION[gating][0], *_SELECTION[gating])
    if not is_v3:
        keys.fixed("norm_topk_prob", False, False)  # the published code then drops the scale of the weights
    has_groups = is_v3 or keys.get("topk_method", None) == "group_limited_greedy"
    return MoEConfig(
        num_experts=keys.integer("n_routed_experts"),
        num_experts_per_token=keys.integer("num_experts_per_tok"),
        expert_hidden_dim=keys.integer("moe_intermediate_size"),
        num_shared_experts=keys.integer("n_shared_experts", 0, low=0),
        gating=gating,
        has_selection_bias=is_v3,
        normalize_weights=is_v3 and keys.boolean("norm_topk_prob"),
        weights_scale=keys.number("routed_scaling_factor"),
        num_groups=keys.integer("n_group", 1) if has_groups else 1,
        num_groups_used=keys.integer("topk_group", 1) if has_groups else 1,
    )


def _rope_config(keys: _Keys) -> RopeConfig:
    rope = _rope_keys(keys)
    base = (
        keys.number("rope_theta", 10000.0)
        if rope.get("rope_theta", None) is None
        else rope.number("rope_theta")
    )
    for place in (keys, rope):
        place.fixed("partial_rotary_factor", 1.0, 1.0, 1)
    kind_key = "rope_type" if rope.get("rope_type", None) is not None else "type"
    rope.fixed(kind_key, "default", "default", "linear", "yarn")
    kind = rope.get(kind_key, "default")
    if kind == "default":
        return RopeConfig(base=base)
    factor = rope.number("factor")
    if kind == "linear":
        rope.fixed("mscale_all_dim", 0, 0)
        return RopeConfig(base=base, scaling="linear", factor=factor)
    rope.fixed("truncate", True, True)
    _check_magnitude(rope, factor)
    return RopeConfig(
        base=base,
        scaling="yarn",
        factor=factor,
        original_context_length=rope.integer("original_max_position_embeddings", high=_MAX_CONTEXT),
        yarn_log_multiplier=0.1 * rope.number("mscale_all_dim", 0.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )


def _rope_keys(keys: _Keys) -> _Keys:
    """Returns the object that scales rotations, which has another name since version 5 of transformers."""
    found = [place for name in ("rope_parameters", "rope_scaling") if (place := keys.object(name))]
    found = [place for place in found if place.values] or [_Keys({}, keys.path, "rope_scaling.")]
    if found[0].values != found[-1].values:
        raise keys.fail("rope_scaling", f"must be as 'rope_parameters', got {found[-1].values!r:.160}")
    return found[0]


def _check_magnitude(rope: _Keys, factor: float) -> None:
    """Refuses YaRN that rescales the rotated part of heads alone: GGUF files scale all of it or nothing."""
    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if rope.get("attention_factor", None) is not None:
        magnitude, wanted = rope.number("attention_factor"), 1.0
    elif mscale and mscale_all_dim:
        magnitude, wanted = _temperature(factor, mscale), _temperature(factor, mscale_all_dim)
    else:
        magnitude, wanted = _temperature(factor, 1.0), 1.0
    if abs(magnitude - wanted) > 1e-6 * abs(wanted):
        raise rope.fail("mscale", f"must equal mscale_all_dim, {mscale_all_dim}, and not be 0, got {mscale}")


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _fp8_block(keys: _Keys) -> tuple[int, int] | None:
    quantization = keys.object("quantization_config")
    if quantization is None:
        return None
    quantization.fixed("quant_method", None, "fp8")
    quantization.fixed("fmt", "e4m3", "e4m3")
    block = quantization.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or any(type(size) is not int or not 0 < size <= _MAX_SIZE for size in sizes):
        raise quantization.fail("weight_block_size", f"must be two sizes, got {block!r:.80}")
    return sizes[0], sizes[1]


def _moe_json(moe: MoEConfig | None) -> dict[str, Any]:
    if moe is None:
        return {"n_routed_experts": None}
    is_v3 = moe.gating == "sigmoid"
    if moe.has_selection_bias != is_v3:
        raise ValueError(f"has_selection_bias must be {is_v3} with {moe.gating} gating in a checkpoint.")
    if moe.normalize_weights and not is_v3:
        raise ValueError("normalize_weights must be false with softmax gating in a checkpoint, got true.")
    is_grouped = is_v3 or moe.num_groups > 1
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "moe_intermediate_size": moe.expert_hidden_dim,
        "n_shared_experts": moe.num_shared_experts,
        "scoring_func": moe.gating,
        "topk_method": _SELECTION[moe.gating][0] if not is_grouped or is_v3 else "group_limited_greedy",
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": _shortest(moe.weights_scale),
        "n_group": moe.num_groups,
        "topk_group": moe.num_groups_used,
    }


def _rope_json(rope: RopeConfig) -> dict[str, Any]:
    if rope.attention_factor != 1:
        raise ValueError(f"attention_factor must be 1 in a checkpoint, got {rope.attention_factor}.")
    scaling = None
    if rope.scaling != "none":
        scaling = {"type": rope.scaling, "factor": _shortest(rope.factor)}
    if rope.scaling == "yarn":
        mscale = round(10 * _shortest(rope.yarn_log_multiplier), 9)
        scaling |= {
            "original_max_position_embeddings": rope.original_context_length,
            "mscale": mscale,
            "mscale_all_dim": mscale,
            "beta_fast": _shortest(rope.beta_fast),
            "beta_slow": _shortest(rope.beta_slow),
        }
        if not mscale:
            scaling["attention_factor"] = 1.0
    return {"rope_theta": _shortest(rope.base), "rope_scaling": scaling}


def _shortest(value: float) -> float:
    """Returns the number of fewest digits that is the same in float32, in which GGUF files have it."""
    return float(str(np.float32(value)))
