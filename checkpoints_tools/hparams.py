"""GGUF metadata to `ModelConfig` and back; every key is checked for type and range."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from checkpoints_tools.gguf_header import GGUFError, alignment_of, shown
from checkpoints_tools.gguf_metadata import Field, Metadata
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from mla_jax.tokenizer import Vocabulary

ARCHITECTURE = "deepseek2"
NEW_FILE_ALIGNMENT = 64  # tensors of such a file can be used where they lie

_GATING = {1: "softmax", 2: "sigmoid"}
_GATING_ABSENT = {3: "softmax over the selected experts", 4: "square root of softplus"}
_GLM_FLASH_LAYERS = (47, 48)  # GLM-4.7-Flash files without a gating function mean sigmoid
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12
_MAX_CONTEXT = (1 << 31) - 1
_REQUIRED = object()
_KEYS_OF_FIELDS = {  # whose ranges the configs themselves check
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
    "qk_rope_head_dim": "rope.dimension_count",
    "num_groups": "expert_group_count",
    "num_experts_per_token": "expert_used_count",
    "weights_scale": "expert_weights_scale",
    "base": "rope.freq_base",
    "factor": "rope.scaling.factor",
    "attention_factor": "rope.scaling.attn_factor",
    "yarn_log_multiplier": "rope.scaling.yarn_log_multiplier",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def model_config(
    metadata: Mapping[str, Any], tensor_names: Iterable[str], path: str = "metadata"
) -> ModelConfig:
    """Derives what a model is from the key-values of its file.

    Args:
      metadata: key -> plain value.
      tensor_names: names in the tensor table; they tell whether queries are compressed and whether routers
        have a selection bias, which no key says reliably.
      path: the file, for messages.

    Returns:
      The config. That the tensors have its shapes is left to `layout.check_layout`.

    Raises:
      GGUFError: for another architecture, a missing key, or a value of a wrong type or out of range.

    Source: the loader of ik_llama.cpp, src/llama-hparams.cpp, for deepseek2.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise GGUFError(
            f"{path}: key 'general.architecture' is {shown(architecture)}, supported is {ARCHITECTURE!r}."
        )
    keys = _Keys(metadata, path)
    names = set(tensor_names)
    try:
        return _model_config(keys, names)
    except GGUFError:
        raise
    except ValueError as error:  # of a config, and it begins with the name of the field
        field = str(error).split()[0]
        key = _KEYS_OF_FIELDS.get(field, field)
        if key == "rope.scaling.factor" and not keys.has(key):
            key = "rope.scale_linear"
        raise GGUFError(f"{path}: key '{ARCHITECTURE}.{key}': {error}") from None


def vocabulary(metadata: Mapping[str, Any], config: ModelConfig, path: str = "metadata") -> Vocabulary:
    """Reads the vocabulary of a model from the key-values of its file.

    Args:
      metadata: key -> plain value.
      config: the model; its embedding has a row for each token.
      path: the file, for messages.

    Returns:
      The vocabulary.

    Raises:
      GGUFError: if there is none, or it cannot be used.
    """
    try:
        found = Vocabulary.from_metadata(metadata)
    except ValueError as error:
        raise GGUFError(f"{path}: {error}") from None
    if len(found.tokens) != config.vocab_size:
        raise GGUFError(
            f"{path}: key 'tokenizer.ggml.tokens' must have the {config.vocab_size} tokens of the embedding, "
            f"got {len(found.tokens)}."
        )
    return found


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Returns the key-values that say `config` in a new file: `model_config` read backwards.

    The file must hold `attn_kv_b`, as models trained here do.
    """
    mla, moe, rope = config.mla, config.moe, config.rope
    values = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.dense_hidden_dim,
        "attention.head_count": mla.num_heads,
        "attention.head_count_kv": mla.num_heads,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "attention.key_length": mla.qk_head_dim,
        "attention.value_length": mla.v_head_dim,
        "attention.kv_lora_rank": mla.kv_lora_rank,
        "rope.dimension_count": mla.qk_rope_head_dim,
        "rope.freq_base": rope.base,
        "vocab_size": config.vocab_size,
        "leading_dense_block_count": config.num_dense_layers,
    }
    if mla.q_lora_rank is not None:
        values["attention.q_lora_rank"] = mla.q_lora_rank
    if moe is not None:
        values |= _moe_metadata(moe)
    if rope.attention_factor != 1:
        values["rope.scaling.attn_factor"] = rope.attention_factor
    if rope.scaling != "none":
        values["rope.scaling.type"] = rope.scaling
        values["rope.scaling.factor"] = rope.factor
    if rope.scaling == "yarn":
        values["rope.scaling.original_context_length"] = rope.original_context_length
        values["rope.scaling.yarn_log_multiplier"] = rope.yarn_log_multiplier
        values["rope.scaling.yarn_beta_fast"] = rope.beta_fast
        values["rope.scaling.yarn_beta_slow"] = rope.beta_slow
    general = {"general.architecture": ARCHITECTURE, "general.alignment": NEW_FILE_ALIGNMENT}
    return general | {
        f"{ARCHITECTURE}.{key}": Field.of(value, "f32") if isinstance(value, float) else value
        for key, value in values.items()
    }


def of_new_file(fields: Mapping[str, Field]) -> dict[str, Field]:
    """Returns the keys of a file for one that is written anew: of an alignment that lets it be mapped."""
    alignment = max(alignment_of(Metadata(dict(fields))), NEW_FILE_ALIGNMENT)
    return {**fields, "general.alignment": Field.of(alignment, "u32")}


def _moe_metadata(moe: MoEConfig) -> dict[str, Any]:
    values = {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.num_experts_per_token,
        "expert_feed_forward_length": moe.expert_hidden_dim,
        "expert_shared_count": moe.num_shared_experts,
        "expert_weights_scale": float(moe.weights_scale),
        "expert_weights_norm": moe.normalize_weights,
        "expert_gating_func": {name: number for number, name in _GATING.items()}[moe.gating],
    }
    if moe.num_groups > 1:
        values["expert_group_count"] = moe.num_groups
        values["expert_group_used_count"] = moe.num_groups_used
    return values


class _Keys:
    """Reads keys of the architecture, each with its type and range."""

    def __init__(self, values: Mapping[str, Any], path: str):
        self.values, self.path = values, path

    def fail(self, key: str, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: key '{ARCHITECTURE}.{key}' {what}.")

    def has(self, key: str) -> bool:
        return f"{ARCHITECTURE}.{key}" in self.values

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(f"{ARCHITECTURE}.{key}")
        if value is None:
            if default is _REQUIRED:
                raise self.fail(key, "is missing")
            return default
        return value

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = _MAX_SIZE) -> int:
        return self._checked(key, self._get(key, default), low, high)

    def _checked(self, key: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"must be an integer in [{low}, {high}], got {shown(value)}")
        return value

    def per_layer(self, key: str, layers: range, num_blocks: int, default: Any = _REQUIRED) -> int:
        """Reads one integer, or one per block of which those in `layers` must be equal."""
        value = self._get(key, default)
        if isinstance(value, list):
            if len(value) != num_blocks:
                raise self.fail(key, f"must have {num_blocks} elements, one per layer, got {len(value)}")
            chosen = [value[layer] for layer in layers] or value[:1]
            if any(element != chosen[0] for element in chosen):
                raise self.fail(key, f"must be the same in layers {layers[0]} to {layers[-1]}, it is not")
            value = chosen[0]
        return self._checked(key, value, 1, _MAX_SIZE)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.fail(key, f"must be a finite number, got {shown(value)}")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.fail(key, f"must be a bool, got {shown(value)}")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default)
        if type(value) is not str:
            raise self.fail(key, f"must be a string, got {shown(value)}")
        return value


def _model_config(keys: _Keys, names: set[str]) -> ModelConfig:
    num_blocks = keys.integer("block_count", high=_MAX_LAYERS)
    # The last blocks may predict a second token; they are no part of the network and stay unread.
    num_layers = num_blocks - keys.integer("nextn_predict_layers", 0, low=0, high=num_blocks - 1)
    num_experts = keys.integer("expert_count", 0, low=0)
    num_dense = keys.integer(
        "leading_dense_block_count", _REQUIRED if num_experts else num_layers, low=0, high=num_layers
    )
    if not num_experts and num_dense < num_layers:
        raise keys.fail(
            "expert_count", f"must be positive: only {num_dense} of {num_layers} layers are dense"
        )
    dense_hidden_dim = 0
    if num_dense:
        dense_hidden_dim = keys.per_layer("feed_forward_length", range(num_dense), num_blocks)
    context_length = keys.integer("context_length", high=_MAX_CONTEXT)
    embed_dim = keys.integer("embedding_length")
    return ModelConfig(
        vocab_size=_vocab_size(keys),
        context_length=context_length,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_dense_layers=num_dense,
        dense_hidden_dim=dense_hidden_dim,
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        mla=_mla_config(keys, names, range(num_layers), num_blocks, embed_dim),
        moe=_moe_config(keys, names, num_blocks, num_experts) if num_experts else None,
        rope=_rope_config(keys, context_length),
    )


def _vocab_size(keys: _Keys) -> int:
    tokens = keys.values.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, list):
        raise GGUFError(f"{keys.path}: key 'tokenizer.ggml.tokens' must be an array, got {shown(tokens)}.")
    vocab_size = keys.integer("vocab_size", len(tokens) if tokens else _REQUIRED)
    if tokens and len(tokens) > vocab_size:
        raise keys.fail(
            "vocab_size", f"must be at least the {len(tokens)} tokens of the file, got {vocab_size}"
        )
    return vocab_size


def _mla_config(keys: _Keys, names: set[str], layers: range, num_blocks: int, embed_dim: int) -> MLAConfig:
    num_heads = keys.per_layer("attention.head_count", layers, num_blocks)
    num_kv_heads = keys.per_layer("attention.head_count_kv", layers, num_blocks, num_heads)
    kv_lora_rank = keys.integer("attention.kv_lora_rank")
    key_length = keys.integer("attention.key_length", embed_dim // num_heads)
    rope_dim = keys.integer("rope.dimension_count", key_length)
    value_length = keys.integer("attention.value_length", embed_dim // num_heads)
    if num_kv_heads == 1 and (num_heads > 1 or keys.has("attention.key_length_mla")):
        # llama.cpp's files describe the latent as one head and give the sizes of real heads apart.
        if key_length != kv_lora_rank + rope_dim:
            raise keys.fail(
                "attention.key_length",
                f"must be kv_lora_rank + rope.dimension_count = {kv_lora_rank + rope_dim} when head_count_kv "
                f"is 1, got {key_length}",
            )
        if value_length != kv_lora_rank:
            raise keys.fail(
                "attention.value_length",
                f"must be kv_lora_rank = {kv_lora_rank} when head_count_kv is 1, got {value_length}",
            )
        key_length = keys.integer("attention.key_length_mla")
        value_length = keys.integer("attention.value_length_mla")
    elif num_kv_heads != num_heads:
        raise keys.fail("attention.head_count_kv", f"must be {num_heads} or 1, got {num_kv_heads}")
    if key_length <= rope_dim:
        raise keys.fail("rope.dimension_count", f"must be below the key length {key_length}, got {rope_dim}")
    has_q_a = "blk.0.attn_q_a.weight" in names
    is_compressed = has_q_a or ("blk.0.attn_q.weight" not in names and keys.has("attention.q_lora_rank"))
    return MLAConfig(
        num_heads=num_heads,
        q_lora_rank=keys.integer("attention.q_lora_rank") if is_compressed else None,
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=key_length - rope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=value_length,
    )


def _moe_config(keys: _Keys, names: set[str], num_blocks: int, num_experts: int) -> MoEConfig:
    gating = keys.integer("expert_gating_func", 0, low=0)
    if gating == 0:
        gating = 2 if num_blocks in _GLM_FLASH_LAYERS else 1
    if gating not in _GATING:
        what = f"{gating} ({_GATING_ABSENT.get(gating, 'unknown')})"
        raise keys.fail("expert_gating_func", f"must be 1 (softmax) or 2 (sigmoid), got {what}")
    num_groups = keys.integer("expert_group_count", 0, low=0) or 1
    num_groups_used = keys.integer("expert_group_used_count", 0, low=0) or num_groups
    return MoEConfig(
        num_experts=num_experts,
        num_experts_per_token=keys.integer("expert_used_count", high=num_experts),
        expert_hidden_dim=keys.integer("expert_feed_forward_length"),
        num_shared_experts=keys.integer("expert_shared_count", low=0),
        gating=_GATING[gating],
        has_selection_bias=any(name.endswith(".exp_probs_b.bias") for name in names),
        normalize_weights=keys.boolean("expert_weights_norm", False),
        weights_scale=keys.number("expert_weights_scale"),
        num_groups=num_groups,
        num_groups_used=num_groups_used,
    )


def _rope_config(keys: _Keys, context_length: int) -> RopeConfig:
    factor = keys.number("rope.scaling.factor", 0) or keys.number("rope.scale_linear", 0) or 1.0
    scaling = keys.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise keys.fail("rope.scaling.type", f"must be none, linear or yarn, got {shown(scaling)}")
    if scaling == "linear" and factor == 1:
        scaling = "none"
    is_yarn = scaling == "yarn"
    original = keys.integer("rope.scaling.original_context_length", context_length, high=_MAX_CONTEXT)
    log_multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0)
    beta_fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
    beta_slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    return RopeConfig(
        base=keys.number("rope.freq_base", 10000.0),
        scaling=scaling,
        factor=1.0 if scaling == "none" else factor,
        original_context_length=original if is_yarn else 0,
        yarn_log_multiplier=log_multiplier if is_yarn else 0.0,
        beta_fast=beta_fast if is_yarn else 32.0,
        beta_slow=beta_slow if is_yarn else 1.0,
        attention_factor=keys.number("rope.scaling.attn_factor", 1.0),
    )
