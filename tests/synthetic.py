"""Small deepseek2 GGUF files with random weights, for any test that needs a whole model in a file."""

import dataclasses
import itertools
from pathlib import Path

import ml_dtypes
import numpy as np

from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.gguf_writer import TensorData, write_gguf

NANO = dict(embed=64, heads=2, q_lora=64, kv_lora=32, nope=32, rope=16, v=32, ff=96, ff_exp=32)
FULL = dict(embed=256, heads=4, q_lora=128, kv_lora=512, nope=128, rope=64, v=128, ff=512, ff_exp=128)
SIZES = {"nano": NANO, "full": FULL}
TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the file holds; `write_deepseek2` takes these as keywords.

    Attributes:
      kv: "kv_b", "k_b_v_b" as llama.cpp writes it, or "both"; "k_b_v_b_2d" and "both_2d" as in old files.
      gating: "softmax", "sigmoid", or None for a file that does not say.
      sizes: changes to the sizes of NANO or FULL.
    """

    size: str = "nano"
    sizes: dict = dataclasses.field(default_factory=dict)
    seed: int = 0
    layers: int = 3
    dense: int = 1
    q_lora: bool = True
    kv: str = "kv_b"
    experts: int = 8
    used: int = 3
    shared: int = 1
    gating: str | None = "sigmoid"
    bias: bool | None = None  # None: with sigmoid
    normalize: bool | None = None  # None: with sigmoid
    scale: float = 1.5
    groups: int = 0
    groups_used: int = 0
    merged: bool = False  # gate and up of the experts in one tensor
    yarn: bool = False
    context: int = 4096
    weight_type: str = "F32"
    vocab: int = 320
    alignment: int = 64
    metadata: dict = dataclasses.field(default_factory=dict)  # added; None takes a key away


def write_deepseek2(path: str | Path, **options) -> dict[str, np.ndarray]:
    """Writes a file and returns its tensors by GGUF name as float32, decoded from their stored type."""
    o = Options(**options)
    dims = SIZES[o.size] | o.sizes
    tensors, stored = [], {}
    for name, array in _weights(o, dims, np.random.default_rng(o.seed)):
        weight_type = o.weight_type if array.ndim > 1 and "ffn_gate_inp" not in name else "F32"
        data, stored[name] = _store(array, weight_type)
        tensors.append(TensorData(name, array.shape, TYPES[weight_type], data))
    values = _hparams(o, dims) | vocabulary(o.vocab) | o.metadata
    write_gguf(path, {key: value for key, value in values.items() if value is not None}, tensors)
    return stored


def _hparams(o: Options, dims: dict) -> dict:
    is_mainline = o.kv.startswith("k_b_v_b")
    qk = dims["nope"] + dims["rope"]
    is_sigmoid = o.gating == "sigmoid"
    values = {
        "block_count": o.layers,
        "context_length": o.context,
        "embedding_length": dims["embed"],
        "feed_forward_length": dims["ff"],
        "attention.head_count": dims["heads"],
        "attention.head_count_kv": 1 if is_mainline else dims["heads"],
        "attention.key_length": dims["kv_lora"] + dims["rope"] if is_mainline else qk,
        "attention.value_length": dims["kv_lora"] if is_mainline else dims["v"],
        "attention.key_length_mla": qk if is_mainline else None,
        "attention.value_length_mla": dims["v"] if is_mainline else None,
        "attention.q_lora_rank": dims["q_lora"] if o.q_lora else None,
        "attention.kv_lora_rank": dims["kv_lora"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": dims["rope"],
        "vocab_size": o.vocab,
        "leading_dense_block_count": o.dense,
        "expert_count": o.experts,
        "expert_used_count": o.used,
        "expert_feed_forward_length": dims["ff_exp"],
        "expert_shared_count": o.shared,
        "expert_weights_scale": float(o.scale),
        "expert_weights_norm": is_sigmoid if o.normalize is None else o.normalize,
        "expert_gating_func": {None: None, "softmax": 1, "sigmoid": 2}[o.gating],
        "expert_group_count": o.groups or None,
        "expert_group_used_count": o.groups_used or None,
    }
    if o.yarn:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_log_multiplier": 0.1,
        }
    general = {
        "general.architecture": "deepseek2",
        "general.name": "synthetic",
        "general.alignment": o.alignment,
    }
    return general | {f"deepseek2.{key}": value for key, value in values.items()}


def vocabulary(size: int) -> dict:
    """Returns tokenizer keys: 3 special tokens, 256 bytes, then pairs of letters, all made by merges."""
    letters = [chr(code) for code in _byte_characters()]
    tokens = ["<bos>", "<eos>", "<pad>", *letters]
    pairs = itertools.product("Ġetaoinshrdlu", "etaoinshrdlucmfwypvbgk")
    merges = [f"{left} {right}" for left, right in itertools.islice(pairs, max(0, size - len(tokens)))]
    tokens += [merge.replace(" ", "") for merge in merges]
    if len(tokens) != size:
        raise ValueError(f"vocab must be in [259, {len(tokens)}], got {size}.")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (size - 3),
        "tokenizer.ggml.merges": merges or Field.of([], "string"),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def _byte_characters():
    """Yields the character that stands for each byte in byte-level BPE."""
    spare = itertools.count(256)
    for byte in range(256):
        is_visible = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte
        yield byte if is_visible else next(spare)


def _weights(o: Options, d: dict, rng: np.random.Generator):
    def matrix(*shape, scale=None):
        scale = shape[-1] ** -0.5 if scale is None else scale
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def vector(size):
        return np.float32(1) + np.float32(0.1) * rng.standard_normal(size, dtype=np.float32)

    embed, hidden = d["embed"], d["ff_exp"]
    yield "token_embd.weight", matrix(o.vocab, embed, scale=1.0)
    yield "output_norm.weight", vector(embed)
    yield "output.weight", matrix(o.vocab, embed)
    for layer in range(o.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", vector(embed)
        for name, array in _attention(o, d, matrix, vector):
            yield block + name, array
        yield block + "ffn_norm.weight", vector(embed)
        if layer < o.dense:
            ffn = {"gate": (d["ff"], embed), "up": (d["ff"], embed), "down": (embed, d["ff"])}
            for part, shape in ffn.items():
                yield f"{block}ffn_{part}.weight", matrix(*shape)
            continue
        yield block + "ffn_gate_inp.weight", matrix(o.experts, embed)
        has_bias = o.gating == "sigmoid" if o.bias is None else o.bias
        if has_bias:
            yield block + "exp_probs_b.bias", np.float32(0.1) * (vector(o.experts) - np.float32(1))
        gate, up = matrix(o.experts, hidden, embed), matrix(o.experts, hidden, embed)
        if o.merged:
            yield block + "ffn_gate_up_exps.weight", np.concatenate([gate, up], axis=1)
        else:
            yield block + "ffn_gate_exps.weight", gate
            yield block + "ffn_up_exps.weight", up
        yield block + "ffn_down_exps.weight", matrix(o.experts, embed, hidden)
        if o.shared:
            yield block + "ffn_gate_shexp.weight", matrix(hidden * o.shared, embed)
            yield block + "ffn_up_shexp.weight", matrix(hidden * o.shared, embed)
            yield block + "ffn_down_shexp.weight", matrix(embed, hidden * o.shared)


def _attention(o: Options, d: dict, matrix, vector):
    heads, latent, width = d["heads"], d["kv_lora"], d["nope"] + d["v"]
    query = heads * (d["nope"] + d["rope"])
    if o.q_lora:
        yield "attn_q_a.weight", matrix(d["q_lora"], d["embed"])
        yield "attn_q_a_norm.weight", vector(d["q_lora"])
        yield "attn_q_b.weight", matrix(query, d["q_lora"])
    else:
        yield "attn_q.weight", matrix(query, d["embed"])
    yield "attn_kv_a_mqa.weight", matrix(latent + d["rope"], d["embed"])
    yield "attn_kv_a_norm.weight", vector(latent)
    joined = matrix(heads, width, latent)
    if not o.kv.startswith("k_b_v_b"):
        yield "attn_kv_b.weight", joined.reshape(-1, latent)
    if o.kv != "kv_b":
        k_b, v_b = joined[:, : d["nope"]].transpose(0, 2, 1), joined[:, d["nope"] :]
        if o.kv.endswith("_2d"):
            k_b, v_b = k_b.reshape(-1, k_b.shape[-1]), v_b.reshape(-1, latent)
        yield "attn_k_b.weight", np.ascontiguousarray(k_b)
        yield "attn_v_b.weight", np.ascontiguousarray(v_b)
    yield "attn_output.weight", matrix(d["embed"], heads * d["v"])


def _store(array: np.ndarray, weight_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to write and the float32 weights they stand for."""
    if weight_type != "Q8_0":
        data = array.astype({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[weight_type])
        return data, data.astype(np.float32)
    blocks = array.reshape(*array.shape[:-1], -1, 32)
    scale = (np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16)
    codes = np.rint(blocks / np.maximum(scale.astype(np.float32), np.float32(1e-12))).clip(-127, 127)
    data = np.concatenate([scale.view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=-1)
    return data, (codes * scale.astype(np.float32)).astype(np.float32).reshape(array.shape)
