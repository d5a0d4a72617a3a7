"""Bytes of GGUF files piece by piece, and of one small model: what crafted files and mutations are made of.

Written without the project's own writer, which refuses most of what is needed here.
"""

import itertools
import math
import struct

import numpy as np

HUGE = 2**64 - 1
ALIGNMENT = 16  # of the model

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
LETTERS |= {U64: "Q", I64: "q", F64: "d"}
F32_TENSOR, F16_TENSOR = 0, 1
TENSOR_BYTES = {F32_TENSOR: 4, F16_TENSOR: 2}

# A value is (number of its type, its bytes).


def scalar(value_type, value):
    return value_type, struct.pack("<" + LETTERS[value_type], value)


def u32(value):
    return scalar(U32, value)


def i32(value):
    return scalar(I32, value)


def f32(value):
    return scalar(F32, value)


def f64(value):
    return scalar(F64, value)


def boolean(value):
    return scalar(BOOL, value)


def text(value):
    return STRING, counted(value)


def counted(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(element_type, count, raw=b""):
    """Returns an array that says it has `count` elements, followed by any bytes."""
    return ARRAY, struct.pack("<IQ", element_type, count) + raw


def numbers(element_type, values):
    return array(element_type, len(values), struct.pack(f"<{len(values)}{LETTERS[element_type]}", *values))


def texts(values):
    return array(STRING, len(values), b"".join(map(counted, values)))


def pair(key, value):
    """Returns a key-value as it is in the file."""
    value_type, raw = value
    return counted(key) + struct.pack("<I", value_type) + raw


def row(name, dims, ggml_type=F32_TENSOR, offset=0):
    """Returns a row of the tensor table, its dimensions in the order of the file."""
    return counted(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)


def start(num_rows, num_pairs, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, num_rows, num_pairs)


def container(pairs=(), rows=(), data=64, *, num_pairs=None, num_rows=None, alignment=32, **changes):
    """Returns a file of these key-values and rows, and of tensors: bytes, or a number of zeros."""
    counts = (len(rows) if num_rows is None else num_rows, len(pairs) if num_pairs is None else num_pairs)
    head = start(*counts, **changes) + b"".join(pairs) + b"".join(rows)
    return head + bytes(-len(head) % alignment) + (bytes(data) if isinstance(data, int) else data)


A, T = "deepseek2.", "tokenizer.ggml."

# A model of two layers with all that the architecture has; each size is another number.
KEYS = {
    "general.architecture": text("deepseek2"),
    "general.alignment": u32(ALIGNMENT),
    "general.name": text("a model of a few numbers"),
    A + "block_count": u32(2),
    A + "nextn_predict_layers": u32(0),
    A + "context_length": u32(4096),
    A + "embedding_length": u32(8),
    A + "feed_forward_length": numbers(I32, [7, 7]),
    A + "vocab_size": u32(12),
    A + "leading_dense_block_count": u32(1),
    A + "attention.head_count": u32(2),
    A + "attention.head_count_kv": numbers(U32, [2, 2]),
    A + "attention.layer_norm_rms_epsilon": f32(1e-6),
    A + "attention.key_length": u32(5),
    A + "attention.value_length": u32(9),
    A + "attention.q_lora_rank": u32(4),
    A + "attention.kv_lora_rank": u32(6),
    A + "rope.dimension_count": u32(2),
    A + "rope.freq_base": f32(10000.0),
    A + "rope.scaling.type": text("yarn"),
    A + "rope.scaling.factor": f32(40.0),
    A + "rope.scaling.original_context_length": u32(128),
    A + "rope.scaling.attn_factor": f32(1.0),
    A + "rope.scaling.yarn_log_multiplier": f32(0.1),
    A + "rope.scaling.yarn_beta_fast": f64(32.0),
    A + "rope.scaling.yarn_beta_slow": f32(1.0),
    A + "expert_count": u32(4),
    A + "expert_used_count": u32(2),
    A + "expert_feed_forward_length": u32(3),
    A + "expert_shared_count": u32(1),
    A + "expert_weights_scale": f32(1.5),
    A + "expert_weights_norm": boolean(True),
    A + "expert_gating_func": u32(2),
    A + "expert_group_count": u32(2),
    A + "expert_group_used_count": u32(1),
    T + "model": text("gpt2"),
    T + "pre": text("deepseek-v3"),
    T + "tokens": texts(["<s>", "</s>", "a", "b", "c", "ab", "abc", "Ġ", "é", "~", "", "<u>"]),
    T + "token_type": numbers(I32, [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4]),
    T + "merges": texts(["a b", "ab c"]),
    T + "bos_token_id": u32(0),
    T + "eos_token_id": u32(1),
    T + "add_bos_token": boolean(True),
    T + "add_eos_token": boolean(False),
    "tokenizer.chat_template": text("{% for m in messages %}{{ m.content }}{% endfor %}"),
}
# The same as llama.cpp says it: the latent as one head, the sizes of real heads apart.
LATENT_KEYS = {
    A + "attention.head_count_kv": u32(1),
    A + "attention.key_length": u32(8),
    A + "attention.value_length": u32(6),
    A + "attention.key_length_mla": u32(5),
    A + "attention.value_length_mla": u32(9),
    A + "rope.scaling.factor": None,
    A + "rope.scaling.type": text("linear"),
    A + "rope.scale_linear": f32(4.0),
}


def _attention(block):
    return {
        block + "attn_norm.weight": (8,),
        block + "attn_q_a.weight": (4, 8),
        block + "attn_q_a_norm.weight": (4,),
        block + "attn_q_b.weight": (10, 4),
        block + "attn_kv_a_mqa.weight": (8, 8),
        block + "attn_kv_a_norm.weight": (6,),
        block + "attn_kv_b.weight": (24, 6),
        block + "attn_output.weight": (8, 18),
        block + "ffn_norm.weight": (8,),
    }


SHAPES = {
    "token_embd.weight": (12, 8),
    "output_norm.weight": (8,),
    "output.weight": (12, 8),
    **_attention("blk.0."),
    "blk.0.ffn_gate.weight": (7, 8),
    "blk.0.ffn_up.weight": (7, 8),
    "blk.0.ffn_down.weight": (8, 7),
    **_attention("blk.1."),
    "blk.1.ffn_gate_inp.weight": (4, 8),
    "blk.1.exp_probs_b.bias": (4,),
    "blk.1.ffn_gate_exps.weight": (4, 3, 8),
    "blk.1.ffn_up_exps.weight": (4, 3, 8),
    "blk.1.ffn_down_exps.weight": (4, 8, 3),
    "blk.1.ffn_gate_shexp.weight": (3, 8),
    "blk.1.ffn_up_shexp.weight": (3, 8),
    "blk.1.ffn_down_shexp.weight": (8, 3),
}
TENSORS = {
    name: (shape, F16_TENSOR if len(shape) > 1 and "gate_inp" not in name else F32_TENSOR)
    for name, shape in SHAPES.items()
}


def changed(table, changes):
    """Returns a table with entries replaced, added, or, where they are None, taken away."""
    return {key: value for key, value in (table | changes).items() if value is not None}


def model_rows(tensors):
    """Returns the rows of a tensor table, in whose order the data lies, and the bytes of the data.

    Args:
      tensors: name -> (shape, type), or (shape, type, bytes of the data) for types other than f32 and f16.
    """
    rows, offset = [], 0
    for name, (shape, ggml_type, *size) in tensors.items():
        rows.append(row(name, shape[::-1], ggml_type, offset))
        offset += size[0] if size else math.prod(shape) * TENSOR_BYTES[ggml_type]
        offset += -offset % ALIGNMENT
    return rows, offset


def model(keys=None, tensors=None):
    """Returns the small model as a file, with some keys and tensors changed as in `changed`."""
    values = changed(KEYS, keys or {})
    rows, num_bytes = model_rows(changed(TENSORS, tensors or {}))
    halves = np.resize(np.array([0.25, -0.5, 1.0, 0.125, -0.75], np.float16), num_bytes // 2)
    pairs = list(itertools.starmap(pair, values.items()))
    return container(pairs, rows, halves.tobytes(), alignment=ALIGNMENT)
