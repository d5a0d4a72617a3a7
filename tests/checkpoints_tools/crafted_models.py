"""Crafted files that are sound containers, but no model that can be run or no vocabulary; see `crafted`."""

import math
import struct

from gguf_pieces import (
    BOOL,
    F16_TENSOR,
    F32_TENSOR,
    I32,
    I64,
    LATENT_KEYS,
    U32,
    U64,
    A,
    T,
    array,
    boolean,
    f32,
    f64,
    i32,
    model,
    numbers,
    scalar,
    text,
    texts,
    u32,
)

I32_TENSOR, I64_TENSOR, F64_TENSOR, I8_TENSOR = 26, 27, 28, 24


def _keys(words, **changes):
    """Makes an entry of changes to keys of the architecture, "__" for a dot."""
    return words, lambda: model({A + key.replace("__", "."): value for key, value in changes.items()})


def _latent(words, **changes):
    changes = {A + key.replace("__", "."): value for key, value in changes.items()}
    return words, lambda: model(LATENT_KEYS | changes)


def _tensor(words, name, *entry):
    return words, lambda: model(tensors={name: entry or None})


def _wide(words, ggml_type, block_size, block_bytes):
    """Makes an entry of weights in blocks, in a layer wide enough for them."""
    shapes = {"gate": ((256, 8), F16_TENSOR), "up": ((256, 8), F16_TENSOR)}
    shapes["down"] = ((8, 256), ggml_type, 8 * 256 // block_size * block_bytes)
    tensors = {f"blk.0.ffn_{part}.weight": entry for part, entry in shapes.items()}
    return words, lambda: model({A + "feed_forward_length": u32(256)}, tensors)


def _integer(low, high, got):
    return rf"must be an integer in \[{low}, {high}\], got {got}"


_CONFIGS = {
    "no architecture": (
        "'general.architecture' is None, supported is 'deepseek2'",
        lambda: model({"general.architecture": None}),
    ),
    "llama": (
        "'general.architecture' is 'llama', supported is 'deepseek2'",
        lambda: model({"general.architecture": text("llama")}),
    ),
    "architecture of control characters": (
        r"'general.architecture' is '.x1b\[2J.n', supported",
        lambda: model({"general.architecture": text("\x1b[2J\n")}),
    ),
    "no layers key": _keys("'deepseek2.block_count' is missing", block_count=None),
    "0 layers": _keys("block_count' " + _integer(1, 4096, 0), block_count=u32(0)),
    "2**31 layers": _keys("block_count' " + _integer(1, 4096, 2**31), block_count=u32(2**31)),
    "layers a text": _keys("block_count' must be an integer .* got '3'", block_count=text("3")),
    "layers true": _keys("block_count' must be an integer .* got True", block_count=boolean(True)),
    "layers 2.0": _keys("block_count' must be an integer .* got 2.0", block_count=f32(2.0)),
    "more layers than tensors": _keys(
        r"tensor 'blk\.2\.attn_norm\.weight' of shape \(8,\) is missing",
        block_count=u32(3),
        feed_forward_length=u32(7),
        attention__head_count_kv=u32(2),
    ),
    "4096 layers": _keys(
        "is missing", block_count=u32(4096), feed_forward_length=u32(7), attention__head_count_kv=u32(2)
    ),
    "all layers predict ahead": _keys(
        "nextn_predict_layers' " + _integer(0, 1, 2), nextn_predict_layers=u32(2)
    ),
    "no context": _keys("context_length' is missing", context_length=None),
    "context -1": _keys("context_length' must be an integer .* got -1", context_length=i32(-1)),
    "context 2**31": _keys("context_length' must be an integer .* got 2147483648", context_length=u32(2**31)),
    "no epsilon": _keys("rms_epsilon' is missing", attention__layer_norm_rms_epsilon=None),
    "epsilon nan": _keys("must be a finite number, got nan", attention__layer_norm_rms_epsilon=f32(math.nan)),
    "epsilon 0": _keys(r"rms_epsilon'.*must be in \[1e-30, 1\)", attention__layer_norm_rms_epsilon=f32(0.0)),
    "epsilon tiny": _keys(r"rms_epsilon'.*in \[1e-30, 1\)", attention__layer_norm_rms_epsilon=f32(1e-45)),
    "embedding 0": _keys("embedding_length' " + _integer(1, 2**24, 0), embedding_length=u32(0)),
    "another embedding": _keys(
        r"'token_embd\.weight' must have shape \(12, 6\), got", embedding_length=u32(6)
    ),
    "another vocabulary": _keys(r"'token_embd\.weight' must have shape \(13, 8\), got", vocab_size=u32(13)),
    "more tokens than rows": _keys("vocab_size' must be at least the 12 tokens", vocab_size=u32(11)),
    "vocabulary 2**63": _keys("vocab_size' must be an integer", vocab_size=scalar(U64, 2**63)),
    "tokens a number": (
        "'tokenizer.ggml.tokens' must be an array, got 4",
        lambda: model({T + "tokens": u32(4)}),
    ),
    "no latent": _keys("kv_lora_rank' is missing", attention__kv_lora_rank=None),
    "another latent": _keys(
        r"attn_kv_a_mqa\.weight' must have shape \(9, 8\)", attention__kv_lora_rank=u32(7)
    ),
    "no query rank": _keys("q_lora_rank' is missing", attention__q_lora_rank=None),
    "another query rank": _keys(r"attn_q_a\.weight' must have shape \(5, 8\)", attention__q_lora_rank=u32(5)),
    "heads that do not fit": _keys("head_count_kv' must be 3 or 1, got 2", attention__head_count=u32(3)),
    "no heads": _keys("head_count' must be an integer .* got 0", attention__head_count=u32(0)),
    "heads of layers differ": _keys(
        "head_count' must be the same in layers 0 to 1, it is not",
        attention__head_count=numbers(I32, [2, 4]),
    ),
    "heads for too few layers": _keys(
        "head_count' must have 2 elements, one per layer, got 1", attention__head_count=numbers(I32, [2])
    ),
    "heads an empty array": _keys(
        "head_count' must have 2 elements, one per layer, got 0", attention__head_count=numbers(I32, [])
    ),
    "heads of texts": _keys("head_count' must be an int.* got '2'", attention__head_count=texts(["2", "2"])),
    "latent without real heads": _latent("key_length_mla' is missing", attention__key_length_mla=None),
    "latent with another key length": _latent(
        "key_length' must be kv_lora_rank .* = 8 when head_count_kv is 1, got 9",
        attention__key_length=u32(9),
    ),
    "latent with another value length": _latent(
        "value_length' must be kv_lora_rank = 6 when head_count_kv is 1, got 9",
        attention__value_length=u32(9),
    ),
    "odd rope": _keys(
        "rope.dimension_count': qk_rope_head_dim must be even and positive, got 3",
        rope__dimension_count=u32(3),
    ),
    "rope as wide as keys": _keys(
        "dimension_count' must be below the key length 5", rope__dimension_count=u32(5)
    ),
    "rope base 0": _keys(r"freq_base': base must be in \(1, 1e\+12\], got 0.0", rope__freq_base=f32(0.0)),
    "rope base 1e300": _keys(
        r"freq_base': base must be in \(1, 1e\+12\], got 1e\+300", rope__freq_base=f64(1e300)
    ),
    "rope base nan": _keys("freq_base' must be a finite number, got nan", rope__freq_base=f32(math.nan)),
    "rope base a text": _keys("freq_base' must be a finite number, got '1'", rope__freq_base=text("1")),
    "longrope": _keys("scaling.type' must be none, .* got 'longrope'", rope__scaling__type=text("longrope")),
    "scaling a number": _keys("scaling.type' must be a string, got 1", rope__scaling__type=u32(1)),
    "negative factor": _keys(
        "scaling.factor': factor must be in .* got -4.0", rope__scaling__factor=f32(-4.0)
    ),
    "factor that overflows": _keys("scaling.factor': factor must be in", rope__scaling__factor=f32(1e-38)),
    "factor inf": _keys(
        "scaling.factor' must be a finite number, got inf", rope__scaling__factor=f32(math.inf)
    ),
    "trained context 0": _keys(
        "original_context_length' must be an integer .* got 0",
        rope__scaling__original_context_length=u32(0),
    ),
    "turns 1e300": _keys("beta_fast': beta_fast must be in", rope__scaling__yarn_beta_fast=f64(1e300)),
    "turns 1e-320": _keys("beta_slow': beta_slow must be in", rope__scaling__yarn_beta_slow=f64(1e-320)),
    "turns crossed": _keys(
        "beta_slow must be at most beta_fast = 32", rope__scaling__yarn_beta_slow=f32(64.0)
    ),
    "multiplier -1": _keys(
        "yarn_log_multiplier': yarn_log_multiplier must be in", rope__scaling__yarn_log_multiplier=f32(-1.0)
    ),
    "attention factor 0": _keys(
        "attn_factor': attention_factor must be in", rope__scaling__attn_factor=f32(0.0)
    ),
    "gating 3": _keys(r"got 3 \(softmax over the selected experts\)", expert_gating_func=u32(3)),
    "gating 4": _keys(r"got 4 \(square root of softplus\)", expert_gating_func=u32(4)),
    "gating 9": _keys(r"got 9 \(unknown\)", expert_gating_func=u32(9)),
    "more used than there are": _keys("expert_used_count' " + _integer(1, 4, 5), expert_used_count=u32(5)),
    "more used than in groups": _keys("expert_used_count': .* at most the experts", expert_used_count=u32(3)),
    "groups that do not divide": _keys("group_count': num_groups must divide", expert_group_count=u32(3)),
    "more groups used than there are": _keys("group_count': num_groups must", expert_group_used_count=u32(3)),
    "no experts": _keys("expert_count' must be positive: only 1 of 2 layers are dense", expert_count=u32(0)),
    "other experts": _keys(
        r"ffn_gate_inp\.weight' must have shape \(8, 8\), got \(4, 8\)", expert_count=u32(8)
    ),
    "dense past the end": _keys("dense_block_count' " + _integer(0, 2, 3), leading_dense_block_count=u32(3)),
    "one more dense layer": _keys(
        r"'blk\.1\.ffn_gate\.weight' of .* missing", leading_dense_block_count=u32(2)
    ),
    "experts alone, but a wide layer": _keys(
        "'blk.0.ffn_gate_inp.weight' of", leading_dense_block_count=u32(0)
    ),
    "widths of layers too few": _keys(
        "feed_forward_length' must have 2", feed_forward_length=numbers(I32, [7])
    ),
    "norm flag a number": _keys("expert_weights_norm' must be a bool, got 1", expert_weights_norm=u32(1)),
    "no scale": _keys("expert_weights_scale' is missing", expert_weights_scale=None),
    "scale inf": _keys("expert_weights_scale' must be a finite number", expert_weights_scale=f32(math.inf)),
    "scale 1e38": _keys(r"weights_scale': .* must be in \[0.001, 1000\]", expert_weights_scale=f32(1e38)),
    "scale an array": _keys("weights_scale' must be a finite", expert_weights_scale=array(U32, 9, bytes(36))),
}

_TENSORS = {
    "no output": _tensor(r"tensor 'output\.weight' of shape \(12, 8\) is missing", "output.weight"),
    "no kv_b": _tensor(r"'blk\.1\.attn_kv_b\.weight' of .*missing", "blk.1.attn_kv_b.weight"),
    "no bias in a layer": (
        r"'blk\.0\.exp_probs_b\.bias' of shape \(4,\) is missing",
        lambda: model(
            {A + "leading_dense_block_count": u32(0)},
            {"blk.0.ffn_gate_inp.weight": ((4, 8), F32_TENSOR)},
        ),
    ),
    "norm of one weight": _tensor(
        r"attn_norm\.weight' must have shape \(8,\), got \(1,\)", "blk.1.attn_norm.weight", (1,), F32_TENSOR
    ),
    "norm of no dimensions": _tensor(
        r"attn_norm\.weight' must have shape \(8,\), got \(\)", "blk.1.attn_norm.weight", (), F32_TENSOR
    ),
    "norm of one row": _tensor(
        r"ffn_norm\.weight' must have shape \(8,\), got \(1, 8\)", "blk.0.ffn_norm.weight", (1, 8), F32_TENSOR
    ),
    "matrix the other way round": _tensor(
        r"attn_output\.weight' must have shape \(8, 18\), got \(18, 8\)",
        "blk.0.attn_output.weight",
        (18, 8),
        F16_TENSOR,
    ),
    "experts in one matrix": _tensor(
        r"ffn_up_exps\.weight' must have shape \(4, 3, 8\), got \(12, 8\)",
        "blk.1.ffn_up_exps.weight",
        (12, 8),
        F16_TENSOR,
    ),
    "weights of a type for activations": _wide(r"ffn_down\.weight' has type q8_1 \(9\), which", 9, 32, 36),
    "weights of a type for sums": _wide(r"ffn_down\.weight' has type q8_K \(15\), which", 15, 256, 296),
    "weights of i32": _tensor(r"has type i32 \(26\)", "output.weight", (12, 8), I32_TENSOR, 12 * 8 * 4),
    "weights of i64": _tensor(r"has type i64 \(27\)", "output.weight", (12, 8), I64_TENSOR, 12 * 8 * 8),
    "weights of f64": _tensor(r"has type f64 \(28\)", "output.weight", (12, 8), F64_TENSOR, 12 * 8 * 8),
    "scale of a weight": _tensor(
        r"'blk\.1\.ffn_down_exps\.scale' must not be there: no scale of a weight is supported",
        "blk.1.ffn_down_exps.scale",
        (4,),
        F32_TENSOR,
    ),
    "bias of a weight": _tensor(
        r"'blk\.0\.attn_q_a\.bias' must not .* no bias", "blk.0.attn_q_a.bias", (4,), F32_TENSOR
    ),
    "norm of i8": _tensor(
        r"'output_norm\.weight' has type i8 \(24\), supported for vectors",
        "output_norm.weight",
        (8,),
        I8_TENSOR,
        8,
    ),
}

MODELS = _CONFIGS | _TENSORS


def _vocabulary(words, **changes):
    return words, lambda: model({T + key: value for key, value in changes.items()})


def _tokens(words, tokens, **changes):
    """Makes an entry of other tokens, by default all of them normal and with no merges."""
    changes = dict(token_type=None, merges=texts([]), add_bos_token=None) | changes
    changes |= dict(bos_token_id=None, eos_token_id=None)
    keys = {T + key: value for key, value in changes.items()}
    return words, lambda: model(keys | {T + "tokens": texts(tokens() if callable(tokens) else tokens)})


_TWELVE = ["<s>", "</s>", "a", "b", "c", "ab", "abc", "d", "e", "f", "g", "h"]

VOCABULARIES = {
    "no tokenizer": _vocabulary(r"tokenizer\.ggml\.model is missing", model=None),
    "tokenizer of sentence pieces": _vocabulary("model must be 'gpt2' .*, got 'llama'", model=text("llama")),
    "tokenizer a number": _vocabulary("model must be a string, got int", model=u32(2)),
    "tokenizer of bytes": _vocabulary("model must be UTF-8 text", model=text(b"gpt2\xff")),
    "tokenizer of a long name": _vocabulary("got 'x{56,59}\\.?", model=text("x" * 900_000)),
    "pre-tokenizer unknown": _vocabulary("pre must be one of .*, got 'qwen2'", pre=text("qwen2")),
    "pre-tokenizer of a long name": _vocabulary("pre must be one of .*, got 'x{50}", pre=text("x" * 900_000)),
    "pre-tokenizer an array": _vocabulary("pre must be a string, got list", pre=texts(["deepseek-v3"])),
    "no tokens": _vocabulary(r"tokenizer\.ggml\.tokens is missing", tokens=None),
    "tokens none": _tokens("tokens must not be empty", []),
    "tokens of numbers": _vocabulary(
        r"tokens\[0\] must be a string, got int", tokens=numbers(I32, range(12))
    ),
    "tokens of bools": _vocabulary(r"tokens\[0\] must be a string, got bool", tokens=numbers(BOOL, [1] * 12)),
    "tokens of arrays": _vocabulary(
        r"tokens\[0\] must be a string, got list", tokens=array(9, 12, struct.pack("<IQ", 8, 0) * 12)
    ),
    "tokens too few": _tokens("must have the 12 tokens of the embedding, got 11", _TWELVE[:11]),
    "token of bytes": _tokens(r"tokens\[2\] must be UTF-8 text", ["<s>", "</s>", b"\xff", *_TWELVE[3:]]),
    "token of half a character": _tokens(r"tokens\[11\] must be UTF-8", [*_TWELVE[:11], "é".encode()[:1]]),
    "token of a surrogate": _tokens(r"tokens\[11\] must be UTF-8", [*_TWELVE[:11], b"\xed\xa0\x80"]),
    "token twice": _tokens("tokens must differ from each other, got 'a' 2 times", [*_TWELVE[:11], "a"]),
    "token like the name of an empty one": _tokens(
        r"tokens must differ .* got '\[EMPTY_0\]' 2 times", ["", "[EMPTY_0]", *_TWELVE[2:]]
    ),
    "80000 times one token": _tokens("must differ .* got 'a' 80000 times", lambda: ["a"] * 80_000),
    "100000 empty tokens": _tokens("must have the 12 tokens of the embedding", lambda: [""] * 100_000),
    "types too few": _vocabulary(
        "token_type must have one entry .* 12 tokens, got 11", token_type=numbers(I32, [1] * 11)
    ),
    "types too many": _vocabulary("token_type must have .*, got 13", token_type=numbers(I32, [1] * 13)),
    "types none": _vocabulary("token_type must have .*, got 0", token_type=numbers(I32, [])),
    "type 7": _vocabulary(
        r"token_type\[11\] must be in \[0, 6\], got 7", token_type=numbers(I32, [1] * 11 + [7])
    ),
    "type -1": _vocabulary(r"token_type\[0\] must be in .* got -1", token_type=numbers(I32, [-1] * 12)),
    "type 2**63": _vocabulary(r"token_type\[0\] must be in .* got 92", token_type=numbers(U64, [2**63] * 12)),
    "types of texts": _vocabulary(
        "token_type must be an array of int.*, got .'1'", token_type=texts(["1"] * 12)
    ),
    "types of fractions": _vocabulary(
        "token_type must be an array of integers", token_type=numbers(6, [1.0] * 12)
    ),
    "types of bools": _vocabulary(
        "token_type must be an array of integers", token_type=numbers(BOOL, [1] * 12)
    ),
    "types a number": _vocabulary("token_type must be an array of integers, got 1", token_type=u32(1)),
    "no merges": _vocabulary("merges is missing; only kimi-k2", merges=None),
    "merges a text": _vocabulary("merges must be an array of strings, got str", merges=text("a b")),
    "merges a number": _vocabulary("merges must be an array of strings, got int", merges=u32(1)),
    "merges of numbers": _vocabulary(r"merges\[0\] must be a string, got int", merges=numbers(U32, [1])),
    "merge of bytes": _vocabulary(r"merges\[0\] must be UTF-8", merges=texts([b"a \xff"])),
    "merge of one token": _vocabulary(r"merges\[1\] must be two tokens", merges=texts(["a b", "ab"])),
    "merge of three": _vocabulary(r"merges\[0\] must be two tokens", merges=texts(["a b c"])),
    "merge of nothing": _vocabulary(r"merges\[0\] must be two tokens .* got ''", merges=texts([""])),
    "merge with nothing": _vocabulary(r"merges\[0\] must be two tokens", merges=texts(["a "])),
    "merge of a long text": _vocabulary("two tokens with .* got 'x{50}", merges=texts(["x" * 900_000])),
    "merge of absent tokens": _vocabulary(
        r"merges\[1\] must join two tokens to a third, got 'x' and 'y'", merges=texts(["a b", "x y"])
    ),
    "merge to an absent token": _vocabulary(r"merges\[0\] must join .* 'c' and 'a'", merges=texts(["c a"])),
    "70000 merges and a bad one": (
        r"merges\[70000\] must join two tokens",
        lambda: model({T + "merges": texts(["a b"] * 70_000 + ["b b"])}),
    ),
    "first token past the end": _vocabulary(
        r"bos_token_id must be in \[0, 12\), got 12", bos_token_id=u32(12)
    ),
    "first token -1": _vocabulary(r"bos_token_id must be in \[0, 12\), got -1", bos_token_id=i32(-1)),
    "last token 2**63": _vocabulary(r"eos_token_id must be in \[0, 12\)", eos_token_id=scalar(U64, 2**63)),
    "last token far below 0": _vocabulary(r"eos_token_id must be in \[0", eos_token_id=scalar(I64, -(2**63))),
    "last token a text": _vocabulary("eos_token_id must be an integer, got '1'", eos_token_id=text("1")),
    "last token true": _vocabulary("eos_token_id must be an integer, got True", eos_token_id=boolean(True)),
    "end of turn an array": _vocabulary("eot_token_id must be an integer", eot_token_id=numbers(U32, [1])),
    "end of message nan": _vocabulary("eom_token_id must be an integer, got nan", eom_token_id=f32(math.nan)),
    "filler past the end": _vocabulary(r"fim_pad_token_id must be in \[0, 12\)", fim_pad_token_id=u32(99)),
    "first token asked for, but unknown": _vocabulary("bos_token_id must be given when", bos_token_id=None),
    "last token asked for, but unknown": _vocabulary(
        "eos_token_id must be given", eos_token_id=None, add_eos_token=boolean(True)
    ),
    "flag 2": _vocabulary("add_bos_token must be a boolean, got 2", add_bos_token=u32(2)),
    "flag a text": _vocabulary("add_eos_token must be a boolean, got 'no'", add_eos_token=text("no")),
    "flag an array": _vocabulary("add_bos_token must be a boolean", add_bos_token=numbers(BOOL, [1])),
    "template a number": (
        "tokenizer.chat_template must be a string, got int",
        lambda: model({"tokenizer.chat_template": u32(1)}),
    ),
    "template of bytes": (
        "tokenizer.chat_template must be UTF-8 text",
        lambda: model({"tokenizer.chat_template": text(b"\xff" * 900_000)}),
    ),
    "a long token without merges": _tokens(
        "must have the 12 tokens of the embedding, got 1",
        lambda: ["é" * 450_000],
        merges=None,
        pre=text("kimi-k2"),
    ),
    "tokens that join in many ways": _tokens(
        "merges must be given when tokens join in so many ways, got more than 27",
        lambda: ["a" * length for length in range(1, 1301)],
        merges=None,
        pre=text("kimi-k2"),
    ),
}
