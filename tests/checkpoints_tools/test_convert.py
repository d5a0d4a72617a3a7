"""Checkpoints become GGUF files that hold every weight of them, a part at a time."""

import itertools
import json
import os
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hf_folder import change_config, from_fp8, save, write_folder

from checkpoints_tools import GGUFError, convert, hf_config, hf_names, load_gguf, names, quantize
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.hparams import model_config
from mla_jax import quant

V2_LITE = dict(q_lora=False, gating="softmax", scale=1.0, shared=2)
V2 = dict(gating="softmax", groups=4, groups_used=2, shared=2, yarn=True)
V3 = dict(groups=4, groups_used=2, yarn=True)
MODELS = {"v2-lite": V2_LITE, "v2": V2, "v3": V3, "dense": dict(layers=2, dense=2, experts=0)}


def _read(path):
    """Returns the tensors of a file in float32 by GGUF name, those that the network does not read too."""
    checkpoint = load_gguf(path)
    tensors = {
        name: np.asarray(quant.decode(leaf)) for name, leaf in names.flatten(checkpoint.params).items()
    }
    for name, kept in checkpoint.unread.items():
        tensors[name] = kept.data.view(np.float32).reshape(kept.shape)
    return tensors


def _stacked(tensors):
    """Returns the tensors of a checkpoint in float32 by GGUF name."""
    found, stacks = {}, {}
    for theirs, array in tensors.items():
        if theirs.endswith("_scale_inv"):
            continue
        if array.dtype == ml_dtypes.float8_e4m3fn:
            array = from_fp8(array, tensors[theirs + "_scale_inv"])
        name, expert = hf_names.to_gguf(theirs)
        if expert is None:
            found[name] = array.astype(np.float32)
        else:
            stacks.setdefault(name, {})[expert] = array.astype(np.float32)
    return found | {name: np.stack([rows[e] for e in range(len(rows))]) for name, rows in stacks.items()}


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_file_holds_the_weights_of_the_checkpoint(tmp_path, model, num_files):
    tensors = write_folder(tmp_path / "hf", num_files=num_files, **MODELS[model])
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
    _assert_same(_read(tmp_path / "a.gguf"), _stacked(tensors))
    file = open_gguf(tmp_path / "a.gguf")
    config = model_config(file.metadata, file.tensors)
    assert hf_config.to_json(config) == json.loads((tmp_path / "hf" / "config.json").read_text())
    assert file.metadata["general.name"] == "hf"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("type_name", ["f32", "bf16"])
def test_half_precision(tmp_path, dtype, type_name):
    tensors = write_folder(tmp_path / "hf", dtype=dtype)
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type=type_name)
    expected = _stacked(tensors)
    if type_name == "bf16":
        expected = {
            name: array if array.ndim == 1 or "gate_inp" in name else _through(array, ml_dtypes.bfloat16)
            for name, array in expected.items()
        }
    _assert_same(_read(tmp_path / "a.gguf"), expected)


def _through(array, dtype):
    return array.astype(dtype).astype(np.float32)


def test_vectors_and_routers_stay_exact(tmp_path):
    write_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16, nextn=1)
    chosen = convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf")
    for name, info in open_gguf(tmp_path / "a.gguf").tensors.items():
        is_small = len(info.shape) == 1 or name.endswith("ffn_gate_inp.weight")
        assert info.type_name == ("f32" if is_small else "bf16")
    assert chosen.metadata["general.file_type"] == 32


@pytest.mark.parametrize("type_name", ["q8_0", "Q8_0"])
def test_blocks_are_those_of_the_encoder(tmp_path, type_name):
    """Rows of 40 are no whole number of blocks of any type and keep the one they have."""
    tensors = write_folder(tmp_path / "hf", dtype=np.float16, sizes=dict(kv_lora=40))
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type=type_name)
    checkpoint = load_gguf(tmp_path / "a.gguf")
    leaves, expected = names.flatten(checkpoint.params), _stacked(tensors)
    for name, leaf in leaves.items():
        array = expected[name]
        if array.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            assert leaf.dtype == np.float32
        elif array.shape[-1] == 40:
            assert name.endswith("attn_kv_b.weight") and leaf.dtype == np.float16
        else:
            encoded = quant.encode(array, type_name.lower())
            np.testing.assert_array_equal(np.asarray(leaf.blocks), encoded.blocks, err_msg=name)
    assert checkpoint.metadata["general.quantization_version"] == 2


@pytest.mark.parametrize("type_name", ["q4_K", "iq4_xs", "Q5_K_M"])
def test_rows_that_do_not_fit_get_the_type_that_quantize_gives_them(tmp_path, type_name):
    """As 1408 weights do not fit Q4_K in DeepSeek-V2-Lite; here some rows do and most do not."""
    write_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16, sizes=dict(embed=256, kv_lora=96))
    chosen = convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type=type_name)
    convert.to_gguf(tmp_path / "hf", tmp_path / "bf16.gguf")
    expected = quantize.plan(tmp_path / "bf16.gguf", type=type_name)
    found = {name: info.type_name for name, info in open_gguf(tmp_path / "a.gguf").tensors.items()}
    assert found == {row.name: row.new for row in expected.rows}
    assert chosen.summary().splitlines()[1:-2] == expected.summary().splitlines()[1:]
    assert len(set(found.values())) > 2 and "no whole number of blocks" in chosen.summary()


@pytest.mark.parametrize("weights", [1 << 22, 1 << 9, 1])
def test_fp8_is_dequantised_by_blocks(tmp_path, monkeypatch, weights):
    """Also when a part begins or ends within a block."""
    monkeypatch.setattr(convert, "CHUNK_WEIGHTS", weights)
    tensors = write_folder(tmp_path / "hf", dtype=ml_dtypes.float8_e4m3fn, nextn=1)
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
    _assert_same(_read(tmp_path / "a.gguf"), _stacked(tensors))
    kinds = {array.dtype.name for array in tensors.values()}
    assert kinds == {"float32", "float8_e4m3fn"}


def test_fp8_whose_rows_fit_no_block_becomes_bf16(tmp_path):
    write_folder(tmp_path / "hf", dtype=ml_dtypes.float8_e4m3fn, sizes=dict(kv_lora=40))
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="q8_0")
    file = open_gguf(tmp_path / "a.gguf")
    assert file.tensors["blk.0.attn_kv_b.weight"].type_name == "bf16"
    assert file.tensors["blk.0.attn_output.weight"].type_name == "q8_0"


def test_layers_that_predict_a_second_token_are_kept(tmp_path):
    tensors = write_folder(tmp_path / "hf", nextn=2)
    chosen = convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
    checkpoint = load_gguf(tmp_path / "a.gguf")
    convert.to_gguf(tmp_path / "hf", tmp_path / "without.gguf", type="f32", keep_nextn=False)
    without = load_gguf(tmp_path / "without.gguf")
    assert checkpoint.config == without.config and chosen.config.model.num_layers == 3
    assert names.flatten(checkpoint.params).keys() == names.flatten(without.params).keys()
    assert checkpoint.metadata["deepseek2.block_count"] == 5
    assert checkpoint.metadata["deepseek2.nextn_predict_layers"] == 2
    assert {name.split(".")[1] for name in checkpoint.unread} == {"3", "4"}
    assert "blk.3.nextn.eh_proj.weight" in checkpoint.unread
    _assert_same(_read(tmp_path / "a.gguf"), _stacked(tensors))


@pytest.mark.parametrize("part", ["embed_tokens.weight", "shared_head.head.weight"])
def test_what_such_a_layer_may_share_with_the_model(tmp_path, part):
    tensors = write_folder(tmp_path / "hf", nextn=1)
    del tensors[f"model.layers.3.{part}"]
    save(tmp_path / "hf", tensors)
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
    _assert_same(_read(tmp_path / "a.gguf"), _stacked(tensors))


@pytest.mark.parametrize("nextn", [0, 1])
def test_without_layers_that_predict_a_second_token(tmp_path, nextn):
    """They can be left out, and are where the config has them but the checkpoint does not."""
    tensors = write_folder(tmp_path / "hf", nextn=nextn)
    change_config(tmp_path / "hf", num_nextn_predict_layers=1)
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32", keep_nextn=nextn == 0)
    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata["deepseek2.block_count"] == 3
    assert "deepseek2.nextn_predict_layers" not in file.metadata
    tensors = {name: array for name, array in tensors.items() if not name.startswith("model.layers.3.")}
    _assert_same(_read(tmp_path / "a.gguf"), _stacked(tensors))


def test_an_output_tied_to_the_embedding_is_written_out(tmp_path):
    tensors = write_folder(tmp_path / "hf")
    change_config(tmp_path / "hf", tie_word_embeddings=True)
    for stored in (tensors, {name: array for name, array in tensors.items() if name != "lm_head.weight"}):
        save(tmp_path / "hf", stored)
        convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
        expected = _stacked(tensors)
        _assert_same(_read(tmp_path / "a.gguf"), expected | {"output.weight": expected["token_embd.weight"]})


def test_frequencies_of_rotations_are_no_loss(tmp_path):
    tensors = write_folder(tmp_path / "hf")
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save(tmp_path / "hf", tensors | extra)
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
    _assert_same(_read(tmp_path / "a.gguf"), _stacked(tensors))


def test_memory_is_bounded_by_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_WEIGHTS", 1 << 14)
    write_folder(tmp_path / "hf", vocab=500, sizes=dict(embed=2048, ff=512, ff_exp=512), layers=2)
    convert.to_gguf(tmp_path / "hf", tmp_path / "warm.gguf")
    tracemalloc.start()
    try:
        convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500 * 2048 * 2  # the embedding alone has twice as many bytes


def test_progress_is_told(tmp_path):
    write_folder(tmp_path / "hf", layers=2)
    seen = []
    chosen = convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", progress=lambda *state: seen.append(state))
    total = sum(row.num_bytes for row in chosen.rows)
    assert seen[-1] == (len(chosen.rows), len(chosen.rows), total, total)
    assert [state[0] for state in seen].count(len(chosen.rows)) == 1
    assert all(a[0] <= b[0] and a[2] < b[2] for a, b in itertools.pairwise(seen))


def test_a_plan_writes_nothing_and_tells_everything(tmp_path):
    write_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16, nextn=1)
    before = sorted(os.listdir(tmp_path / "hf"))
    chosen = convert.plan(tmp_path / "hf", type="q8_0")
    assert sorted(os.listdir(tmp_path / "hf")) == before
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="q8_0")
    file = open_gguf(tmp_path / "a.gguf")
    assert [(row.name, row.shape, row.type_name, row.num_bytes) for row in chosen.rows] == [
        (info.name, info.shape, info.type_name, info.num_bytes) for info in file.tensors.values()
    ]
    lines = chosen.table().splitlines()
    assert len(lines) == len(file.tensors) + 1
    line = next(line for line in lines if line.startswith("blk.1.ffn_up_exps.weight"))
    assert re.split(r"\s{2,}", line) == [
        *("blk.1.ffn_up_exps.weight", "8 x 32 x 64", "bf16", "q8_0", "17,408"),
        "model.layers.1.mlp.experts.0.up_proj.weight and 7 more",
    ]
    summary = chosen.summary()
    assert "3 layers, 1 that predict a second token" in summary and "vocabulary: none" in summary


def test_an_unknown_type_is_refused(tmp_path):
    write_folder(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"type must be one of f32, .*got 'q9'"):
        convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="q9")


def test_what_fails_leaves_the_old_file(tmp_path):
    tensors = write_folder(tmp_path / "hf")
    tensors["lm_head.weight"][-1, -1] = np.nan
    save(tmp_path / "hf", tensors)
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(GGUFError, match=r"model\.safetensors: tensor 'lm_head\.weight': every value must be"):
        convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "hf"]


def _tensors(change):
    def make(folder):
        tensors = write_folder(folder)
        change(tensors)
        save(folder, tensors)

    return make


def _fp8(change):
    def make(folder):
        tensors = write_folder(folder, dtype=ml_dtypes.float8_e4m3fn)
        change(tensors)
        save(folder, tensors)

    return make


def _config(**changes):
    def make(folder):
        write_folder(folder)
        change_config(folder, **changes)

    return make


def _without(file_name):
    def make(folder):
        write_folder(folder)
        os.unlink(folder / file_name)

    return make


def _cut(folder):
    write_folder(folder)
    os.truncate(folder / "model.safetensors", 100_000)


def _part_of_a_nextn_layer(folder):
    tensors = write_folder(folder, nextn=1)
    del tensors["model.layers.3.enorm.weight"]
    save(folder, tensors)


def _set(name, value):
    return lambda tensors: tensors.update({name: value})


def _put(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


Q_A = "model.layers.0.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"
BAD = {
    "no config": (_without("config.json"), r"config\.json: cannot be read: No such file"),
    "no tensors": (_without("model.safetensors"), r"model\.safetensors: cannot be read: No such file"),
    "unknown architecture": (_config(model_type="llama"), "key 'model_type' must be one of deepseek_v2"),
    "a config of another size": (_config(hidden_size=128), "'model.embed_tokens.weight' must have shape"),
    "more layers": (
        _config(num_hidden_layers=4),
        "'model.layers.3.input_layernorm.weight' of shape .* missing",
    ),
    "fewer layers": (_config(num_hidden_layers=2), "'model.layers.2.* has no place in a GGUF file"),
    "fewer experts": (_config(n_routed_experts=4), "must have shape"),
    "endless experts": (_config(n_routed_experts=1 << 24, num_hidden_layers=4095), "must have shape"),
    "a tensor missing": (_tensors(lambda t: t.pop(Q_A)), f"tensor '{Q_A}' of shape .64, 64. is missing"),
    "an expert missing": (_tensors(lambda t: t.pop(EXPERT.format(7))), f"{EXPERT.format(7)}' .* is missing"),
    "an expert too many": (
        _tensors(_set(EXPERT.format(8), np.zeros((32, 64), np.float32))),
        f"tensor '{EXPERT.format(8)}' has no place",
    ),
    "an unknown tensor": (_tensors(_set("model.layers.0.x.weight", np.zeros(2, np.float32))), "has no place"),
    "a bias": (
        _tensors(_set("model.layers.0.self_attn.q_a_proj.bias", np.zeros(64, np.float32))),
        "'model.layers.0.self_attn.q_a_proj.bias' has no place",
    ),
    "a transposed tensor": (
        _tensors(_set("model.layers.1.self_attn.kv_b_proj.weight", np.zeros((32, 128), np.float32))),
        r"kv_b_proj.weight' must have shape \(128, 32\), got \(32, 128\)",
    ),
    "integers": (_tensors(_set(Q_A, np.zeros((64, 64), np.int64))), f"'{Q_A}' must be one of .*, got I64"),
    "an infinite weight": (
        _tensors(_put(Q_A, (1, 2), np.inf)),
        f"tensor '{Q_A}': every value must be finite",
    ),
    "a NaN in a norm": (
        _tensors(_put("model.norm.weight", 3, np.nan)),
        "tensor 'model.norm.weight': every value must be finite",
    ),
    "a cut file": (_cut, "the file is cut off"),
    "a part of a layer": (_part_of_a_nextn_layer, "'model.layers.3.enorm.weight' of shape .64,. is missing"),
    "FP8 without scales": (_fp8(lambda t: t.pop(Q_A + "_scale_inv")), f"'{Q_A}' is FP8, so it must"),
    "FP8 with other scales": (
        _fp8(_set(Q_A + "_scale_inv", np.ones((3, 1), np.float32))),
        f"'{Q_A}_scale_inv' must be F32 of shape .3, 2., got F32 of .3, 1.",
    ),
    "FP8 with scales of another type": (
        _fp8(_set(Q_A + "_scale_inv", np.ones((3, 2), np.float16))),
        f"'{Q_A}_scale_inv' must be F32 of shape .3, 2., got F16",
    ),
    "FP8 with a scale that is infinite": (
        _fp8(_put(Q_A + "_scale_inv", (2, 1), np.inf)),
        f"'{Q_A}' must have finite scales",
    ),
    "FP8 with a NaN": (_fp8(_put(Q_A, (63, 63), np.nan)), f"'{Q_A}' must have finite weights, got a NaN"),
    "an FP8 norm": (
        _fp8(_set("model.norm.weight", np.ones(64, ml_dtypes.float8_e4m3fn))),
        "'model.norm.weight' is FP8, so it must be a matrix",
    ),
    "scales of nothing": (
        _tensors(_set(Q_A + "_scale_inv", np.ones((3, 2), np.float32))),
        f"'{Q_A}_scale_inv' has no place",
    ),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_folders_are_refused_in_a_sentence(tmp_path, make, message):
    folder = tmp_path / "hf"
    make(folder)
    with pytest.raises(GGUFError, match=message) as caught:
        convert.to_gguf(folder, tmp_path / "a.gguf")
    assert re.fullmatch(rf"{re.escape(str(folder))}[^\n]{{10,600}}\.", str(caught.value))
    assert os.listdir(tmp_path) == ["hf"]


def test_fp8_needs_the_size_of_its_blocks(tmp_path):
    write_folder(tmp_path / "hf", dtype=ml_dtypes.float8_e4m3fn)
    change_config(tmp_path / "hf", quantization_config=None)
    with pytest.raises(GGUFError, match="must have the key 'quantization_config'"):
        convert.plan(tmp_path / "hf")


def test_float16_that_overflows_is_named(tmp_path):
    tensors = write_folder(tmp_path / "hf")
    tensors[Q_A][0, 0] = 1e6
    save(tmp_path / "hf", tensors)
    with pytest.raises(GGUFError, match=f"tensor '{Q_A}': every value must be finite in f16"):
        convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f16")
