"""Crafted files, each with the words its one sentence must have."""

import os
import struct

import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import gguf_file
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.gguf_writer import TensorData, write_gguf

HUGE = 2**64 - 1


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, value_type, raw=b""):
    return text(key) + struct.pack("<I", value_type) + raw


def row(name, dims, ggml_type=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)


def container(pairs=(), rows=(), data=64, version=3, magic=b"GGUF", num_pairs=None, num_rows=None):
    counts = (len(rows) if num_rows is None else num_rows, len(pairs) if num_pairs is None else num_pairs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(rows)
    return head + bytes(-len(head) % 32) + bytes(data)


def array(element_type, count, raw=b""):
    return struct.pack("<IQ", element_type, count) + raw


def u32(value):
    return struct.pack("<I", value)


CONTAINERS = {
    "empty file": (b"", "not a GGUF file"),
    "text": (b"#!/bin/sh\necho hello\n", "not a GGUF file: it must begin with b'GGUF', got b'#!/b'"),
    "magic alone": (b"GGUF", "the version needs 4 bytes, 0 are left"),
    "magic of GGML": (container(magic=b"GGML"), "not a GGUF file"),
    "version 0": (container(version=0), "version must be 2 or 3, got 0"),
    "version 1": (container(version=1), "version must be 2 or 3, got 1"),
    "version 4": (container(version=4), "version must be 2 or 3, got 4"),
    "big endian": (container(version=0x03000000), "big-endian"),
    "huge tensor count": (container(num_rows=HUGE), f"at most 10000000 tensors are supported, {HUGE}"),
    "more tensors than bytes": (
        container(num_rows=9_000_000),
        r"tensor name must have 1 to 127 bytes, got 0",
    ),
    "huge key count": (container(num_pairs=HUGE), f"at most 100000 keys are supported, {HUGE}"),
    "more keys than bytes": (container(num_pairs=5)[:24], "the length of a key needs 8 bytes"),
    "huge key": (container([struct.pack("<Q", HUGE)]), f"key must have 1 to 65535 bytes, got {HUGE}"),
    "empty key": (container([pair("", 4, u32(1))]), "key must have 1 to 65535 bytes, got 0"),
    "key not UTF-8": (container([text(b"\xff\xfe") + u32(4) + u32(1)]), "key must be UTF-8"),
    "key past the end": (container([struct.pack("<Q", 5000)]), "a key needs 5000 bytes"),
    "key twice": (container([pair("k", 4, u32(1))] * 2), "key 'k' is there twice"),
    "unknown value type": (container([pair("k", 13)]), "key 'k' has the unknown value type 13"),
    "unknown element type": (
        container([pair("k", 9, array(77, HUGE))]),
        "key 'k' has elements of the unknown value type 77",
    ),
    "huge string": (
        container([pair("k", 8, struct.pack("<Q", 2**63))]),
        "key 'k' has a string that ends after the file, of 128 bytes",
    ),
    "huge scalar array": (container([pair("k", 9, array(10, 2**61))]), f"key 'k', {2**61} elements, needs"),
    "huge string array": (container([pair("k", 9, array(8, 2**60))]), f"key 'k' declares {2**60} strings"),
    "string array with a huge string": (
        container([pair("k", 9, array(8, 2, struct.pack("<Q", 2**62)))]),
        "key 'k' has a string that ends after the file",
    ),
    "huge array of arrays": (container([pair("k", 9, array(9, 2**60))]), "needs|has|nests"),
    "arrays nested too deep": (
        container([pair("k", 9, array(9, 1) + array(9, 1) + array(9, 1) + array(0, 0))]),
        "key 'k' nests arrays deeper than 2",
    ),
    "bool of 2": (container([pair("k", 7, b"\2")]), "must be a bool of byte 0 or 1, got 2"),
    "bools of 2": (container([pair("k", 9, array(7, 2, b"\1\2"))]), "must hold bools of byte 0 or 1"),
    "alignment 0": (container([pair("general.alignment", 4, u32(0))]), "power of two up to 1048576, got 0"),
    "alignment 48": (container([pair("general.alignment", 4, u32(48))]), "power of two .*, got 48"),
    "alignment 2 GiB": (
        container([pair("general.alignment", 4, u32(2**31))]),
        "power of two .*, got 2147483648",
    ),
    "alignment a text": (container([pair("general.alignment", 8, text("32"))]), "power of two .*, got '32'"),
    "long tensor name": (
        container(rows=[row("n" * 200, (4,))]),
        "tensor name must have 1 to 127 bytes, got 200",
    ),
    "tensor twice": (container(rows=[row("t", (4,)), row("t", (4,), 0, 32)]), "tensor 't' is there twice"),
    "5 dimensions": (container(rows=[row("t", (1,) * 5)]), "'t' must have at most 4 dimensions, got 5"),
    "2**32 - 1 dimensions": (
        container(rows=[text("t") + u32(2**32 - 1)]),
        "at most 4 dimensions, got 4294967295",
    ),
    "dimension 0": (
        container(rows=[row("t", (4, 0))]),
        r"positive multiple of 1 weights, got shape \(0, 4\)",
    ),
    "unknown tensor type": (container(rows=[row("t", (4,), 1000)]), "'t' has the unknown type 1000"),
    "row of half a block": (
        container(rows=[row("t", (48,), 8)]),
        r"'t' of type q8_0 must have rows of a positive multiple of 32 weights, got shape \(48,\)",
    ),
    "product of dimensions wraps": (container(rows=[row("t", (2**33, 2**33))]), f"needs {2**68} bytes"),
    "4 dimensions wrap to little": (container(rows=[row("t", (2**16,) * 4)]), f"needs {2**66} bytes"),
    "odd offset": (
        container(rows=[row("t", (4,), 0, 8)]),
        "'t' must begin at a multiple of 32, got offset 8",
    ),
    "offset past the end": (
        container(rows=[row("t", (4,), 0, 2**20)]),
        "'t' at byte .* needs 16 bytes, 0 are left; the file is cut off or damaged",
    ),
    "offset wraps": (container(rows=[row("t", (4,), 0, 2**64 - 32)]), "'t' at byte .* needs 16 bytes, 0 are"),
    "end past the end": (
        container(rows=[row("t", (17,), 0, 0)]),
        "'t' at byte .* needs 68 bytes, 64 are left",
    ),
    "overlap": (
        container(rows=[row("t", (9,)), row("u", (4,), 0, 32)]),
        "'u' at byte .* overlaps tensor 't', which ends at byte",
    ),
    "same place": (container(rows=[row("t", (4,)), row("u", (4,))]), "'u' at byte .* overlaps tensor 't'"),
    "split count a text": (
        container([pair("split.count", 8, text("2"))]),
        "'split.count' must be an integer",
    ),
    "split count negative": (
        container([pair("split.count", 11, b"\xff" * 8)]),
        "'split.count' must be .* got -1",
    ),
}


@pytest.mark.parametrize("data, words", CONTAINERS.values(), ids=CONTAINERS)
def test_bad_container(tmp_path, data, words):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    for read in (gguf_file.open_gguf, checkpoints_tools.load_gguf, checkpoints_tools.describe):
        with pytest.raises(checkpoints_tools.GGUFError, match=words) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(gguf_file.GGUFError, match=r"pipe\.gguf: cannot be read: it must be a regular file"):
        gguf_file.open_gguf(tmp_path / "pipe.gguf")


def test_the_sound_container_that_the_others_break(tmp_path):
    path = tmp_path / "sound.gguf"
    path.write_bytes(container([pair("k", 4, u32(1))], [row("t", (8,)), row("u", (4,), 0, 32)]))
    file = gguf_file.open_gguf(path)
    assert dict(file.metadata) == {"k": 1} and list(file.tensors) == ["t", "u"]


@pytest.mark.parametrize("missing", ["absent.gguf", "."], ids=["no file", "folder"])
def test_no_file(tmp_path, missing):
    with pytest.raises(checkpoints_tools.GGUFError, match="cannot be read: "):
        checkpoints_tools.load_gguf(tmp_path / missing)


A = "deepseek2."
MODELS = {
    "no architecture": (
        {"general.architecture": None},
        "'general.architecture' is None, supported is 'deepseek2'",
    ),
    "llama": (
        {"general.architecture": "llama"},
        "'general.architecture' is 'llama', supported is 'deepseek2'",
    ),
    "no layers key": ({A + "block_count": None}, r"'deepseek2\.block_count' is missing"),
    "layers 0": ({A + "block_count": 0}, r"block_count' must be an integer in \[1, 4096\], got 0"),
    "layers huge": ({A + "block_count": 2**31}, "block_count' must be an integer .* got 2147483648"),
    "layers a text": ({A + "block_count": "3"}, "block_count' must be an integer .* got '3'"),
    "layers true": ({A + "block_count": True}, "block_count' must be an integer .* got True"),
    "more layers than tensors": (
        {A + "block_count": 4},
        r"'blk\.3\.attn_norm\.weight' of shape \(64,\) is missing",
    ),
    "no context": ({A + "context_length": None}, "context_length' is missing"),
    "context -1": ({A + "context_length": Field.of(-1)}, "context_length' must be an integer .* got -1"),
    "no epsilon": ({A + "attention.layer_norm_rms_epsilon": None}, "rms_epsilon' is missing"),
    "epsilon nan": (
        {A + "attention.layer_norm_rms_epsilon": float("nan")},
        "must be a finite number, got nan",
    ),
    "epsilon 0": (
        {A + "attention.layer_norm_rms_epsilon": 0.0},
        r"norm_epsilon must be in \[1e-30, 1\), got 0",
    ),
    "no latent": ({A + "attention.kv_lora_rank": None}, "kv_lora_rank' is missing"),
    "wrong latent": (
        {A + "attention.kv_lora_rank": 64},
        r"attn_kv_a_mqa\.weight' must have shape \(80, 64\), got",
    ),
    "no query rank": ({A + "attention.q_lora_rank": None}, "q_lora_rank' is missing"),
    "wrong embedding": (
        {A + "embedding_length": 32},
        r"'token_embd\.weight' must have shape \(320, 32\), got",
    ),
    "wrong vocabulary": ({A + "vocab_size": 321}, r"'token_embd\.weight' must have shape \(321, 64\), got"),
    "more tokens than rows": ({A + "vocab_size": 319}, "vocab_size' must be at least the 320 tokens"),
    "heads that do not fit": ({A + "attention.head_count": 3}, "head_count_kv' must be 3 or 1, got 2"),
    "heads of layers differ": (
        {A + "attention.head_count": [2, 2, 4], A + "attention.head_count_kv": None},
        "head_count' must be the same in layers 0 to 2",
    ),
    "heads for too few layers": (
        {A + "attention.head_count": [2, 2]},
        "must have 3 elements, one per layer, got 2",
    ),
    "mainline without real heads": ({A + "attention.head_count_kv": 1}, "key_length_mla' is missing"),
    "mainline with another key length": (
        {A + "attention.head_count_kv": 1, A + "attention.key_length": 64},
        "key_length' must be kv_lora_rank .* = 48 when head_count_kv is 1, got 64",
    ),
    "odd rope": ({A + "rope.dimension_count": 15}, "qk_rope_head_dim must be even and positive, got 15"),
    "rope wider than keys": (
        {A + "rope.dimension_count": 48},
        "dimension_count' must be below the key length 48",
    ),
    "rope base 0": ({A + "rope.freq_base": 0.0}, "freq_base': base must be in .* got 0.0"),
    "longrope": (
        {A + "rope.scaling.type": "longrope"},
        "scaling.type' must be none, linear or yarn, got 'longrope'",
    ),
    "negative factor": ({A + "rope.scaling.factor": -4.0}, "scaling.factor': factor must be in .* got -4.0"),
    "gating 3": ({A + "expert_gating_func": 3}, r"got 3 \(softmax over the selected experts\)"),
    "gating 4": ({A + "expert_gating_func": 4}, r"got 4 \(square root of softplus\)"),
    "gating 9": ({A + "expert_gating_func": 9}, r"got 9 \(unknown\)"),
    "too many used": (
        {A + "expert_used_count": 9},
        r"expert_used_count' must be an integer in \[1, 8\], got 9",
    ),
    "groups that do not divide": ({A + "expert_group_count": 3}, "num_groups must divide num_experts"),
    "no experts": ({A + "expert_count": 0}, "expert_count' must be positive: only 1 of 3 layers are dense"),
    "other experts": (
        {A + "expert_count": 16},
        r"ffn_gate_inp\.weight' must have shape \(16, 64\), got \(8, 64\)",
    ),
    "dense past the end": ({A + "leading_dense_block_count": 4}, r"must be an integer in \[0, 3\], got 4"),
    "one more dense layer": (
        {A + "leading_dense_block_count": 2},
        r"'blk\.1\.ffn_gate\.weight' of shape .* is missing",
    ),
    "norm flag a number": ({A + "expert_weights_norm": 1}, "expert_weights_norm' must be a bool, got 1"),
    "no scale": ({A + "expert_weights_scale": None}, "expert_weights_scale' is missing"),
    "scale inf": (
        {A + "expert_weights_scale": float("inf")},
        "expert_weights_scale' must be a finite number",
    ),
    "tokens a number": ({"tokenizer.ggml.tokens": 4}, "'tokenizer.ggml.tokens' must be an array, got 4"),
}


@pytest.mark.parametrize("changes, words", MODELS.values(), ids=MODELS)
def test_bad_model(tmp_path, changes, words):
    path = tmp_path / "bad.gguf"
    write_deepseek2(path, metadata=changes)
    with pytest.raises(checkpoints_tools.GGUFError, match=words) as caught:
        checkpoints_tools.load_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    description = checkpoints_tools.describe(path)
    assert "cannot be run" in description and "blk.0.attn_norm.weight" in description


def _rewrite(path, change):
    """Writes the file again with `change(tensor)` instead of each tensor; None leaves one out."""
    file = gguf_file.open_gguf(path)
    tensors = [
        TensorData(name, info.shape, info.ggml_type, file.read(name)) for name, info in file.tensors.items()
    ]
    changed = [change(tensor) for tensor in tensors]
    write_gguf(path, file.metadata, [tensor for tensor in changed if tensor is not None])


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("output.weight", None, r"tensor 'output\.weight' of shape \(320, 64\) is missing"),
        ("blk.1.attn_kv_b.weight", None, r"'blk\.1\.attn_kv_b\.weight' of shape \(128, 32\) is missing"),
        ("blk.2.exp_probs_b.bias", None, r"'blk\.2\.exp_probs_b\.bias' of shape \(8,\) is missing"),
        ("blk.2.attn_norm.weight", (1,), r"attn_norm\.weight' must have shape \(64,\), got \(1,\)"),
        (
            "blk.0.attn_output.weight",
            (32, 128),
            r"attn_output\.weight' must have shape \(64, 64\), got \(32, 128\)",
        ),
    ],
)
def test_bad_tensor(tmp_path, name, shape, words):
    path = tmp_path / "bad.gguf"
    write_deepseek2(path)

    def change(tensor):
        if tensor.name != name:
            return tensor
        if shape is None:
            return None
        num_bytes = TensorData(name, shape, tensor.ggml_type, None).num_bytes
        return TensorData(name, shape, tensor.ggml_type, tensor.data[:num_bytes])

    _rewrite(path, change)
    with pytest.raises(checkpoints_tools.GGUFError, match=words):
        checkpoints_tools.load_gguf(path)


@pytest.mark.parametrize(
    "name, type_name, words",
    [
        ("blk.0.ffn_up.weight", "q8_1", r"'blk\.0\.ffn_up\.weight' has type q8_1 \(9\), which cannot be"),
        ("blk.0.ffn_up.weight", "q8_K", r"has type q8_K \(15\), which cannot be decoded"),
        ("blk.0.attn_norm.weight", "q8_0", r"has type q8_0 \(8\), supported for vectors are f32, f16, bf16"),
    ],
)
def test_unsupported_type(tmp_path, name, type_name, words):
    path = tmp_path / "bad.gguf"
    write_deepseek2(path, sizes={"embed": 256})

    def change(tensor):
        if tensor.name != name:
            return tensor
        other = TensorData(name, tensor.shape, IDS[type_name], None)
        return TensorData(name, tensor.shape, other.ggml_type, tensor.data[: other.num_bytes])

    _rewrite(path, change)
    with pytest.raises(checkpoints_tools.GGUFError, match=words):
        checkpoints_tools.load_gguf(path)
    assert type_name in checkpoints_tools.describe(path)
