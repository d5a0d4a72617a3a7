"""An exported folder holds every weight of the file under its published name, a part at a time."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
import tokenizers
from hf_folder import write_folder
from synthetic import NANO, vocabulary, write_deepseek2

from checkpoints_tools import convert, export, hf_names, safetensors_writer
from checkpoints_tools.diff import diff
from checkpoints_tools.export import to_safetensors
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_file import GGUFError, open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.hparams import model_config
from checkpoints_tools.safetensors_file import open_folder
from mla_jax.tokenizer import Tokenizer, Vocabulary

VARIANTS = {
    "plain": {},
    "v2": dict(gating="softmax", scale=1.0, q_lora=False, groups=2, groups_used=1),
    "k_b, v_b": dict(kv="k_b_v_b"),
    "old k_b, v_b": dict(kv="k_b_v_b_2d"),
    "both": dict(kv="both"),
    "merged": dict(merged=True),
    "q8_0": dict(weight_type="Q8_0", kv="k_b_v_b", merged=True),
    "dense": dict(dense=3, experts=0),
}


def _published(stored, d):
    """Returns the tensors of a file by their published names: the definition of the export."""
    found = {}
    for name, array in stored.items():
        block = name.rpartition(".attn" if ".attn" in name else ".ffn")[0]
        if name.endswith("gate_up_exps.weight"):
            for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                found |= _experts(f"{block}.ffn_{part}_exps.weight", half)
        elif name.endswith("exps.weight"):
            found |= _experts(name, array)
        elif name.endswith("attn_k_b.weight"):
            k_b = array.reshape(d["heads"], d["kv_lora"], d["nope"]).transpose(0, 2, 1)
            v_b = stored[f"{block}.attn_v_b.weight"].reshape(d["heads"], d["v"], d["kv_lora"])
            joined = np.concatenate([k_b, v_b], axis=1).reshape(-1, d["kv_lora"])
            found[hf_names.to_hf(f"{block}.attn_kv_b.weight")] = joined
        elif not name.endswith("attn_v_b.weight"):
            found[hf_names.to_hf(name)] = array
    return found


def _experts(name, stack):
    return {hf_names.to_hf(name, expert): matrix for expert, matrix in enumerate(stack)}


def _read(folder):
    source = open_folder(folder)
    return {name: source.read(name).reshape(info.shape) for name, info in source.tensors.items()}


@pytest.mark.parametrize("weights", [1 << 22, 500], ids=["one part", "some parts"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_weight_has_its_published_name(tmp_path, monkeypatch, options, weights):
    monkeypatch.setattr(export, "CHUNK_WEIGHTS", weights)
    stored = write_deepseek2(tmp_path / "a.gguf", **options)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf", dtype="float32")
    found, expected = _read(tmp_path / "hf"), _published(stored, NANO)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "hf"]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_converting_the_folder_gives_the_model_back(tmp_path, options):
    write_deepseek2(tmp_path / "a.gguf", **options)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf", dtype="float32")
    convert.to_gguf(tmp_path / "hf", tmp_path / "b.gguf", type="f32")
    before, after = (open_gguf(tmp_path / f"{name}.gguf") for name in "ab")
    assert model_config(after.metadata, after.tensors) == model_config(before.metadata, before.tensors)
    for key in vocabulary(320):
        assert after.metadata[key] == before.metadata[key], key
    if options.get("kv") != "k_b_v_b" and "merged" not in options:
        changed = [t for t in diff(tmp_path / "a.gguf", tmp_path / "b.gguf").tensors if not t.is_identical]
        assert {tensor.name.rpartition(".attn_")[2] for tensor in changed} <= {
            "kv_b.weight",
            "k_b.weight",
            "v_b.weight",
        }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_the_type_are_copied_bit_by_bit(tmp_path, dtype):
    weight_type = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    stored = write_deepseek2(tmp_path / "a.gguf", weight_type=weight_type, kv="k_b_v_b")
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf", dtype=dtype)
    found, expected = _read(tmp_path / "hf"), _published(stored, NANO)
    for name, array in expected.items():
        wanted = np.float32 if name.endswith("e_score_correction_bias") else np.dtype(dtype)
        assert found[name].dtype == wanted
        np.testing.assert_array_equal(found[name], array.astype(wanted), err_msg=name)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == dtype


def test_every_bit_pattern_is_copied(tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    path = tmp_path / "a.gguf"
    _changed(path, **{"blk.0.ffn_up.weight": ("bf16", patterns)}, sizes={"ff": 1024})
    to_safetensors(path, tmp_path / "hf")
    found = _read(tmp_path / "hf")["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found.view(np.uint16).ravel(), patterns.view(np.uint16))


def _changed(path, sizes=(), **changes):
    """Writes a file of which some tensors have another type and other data, or are additional."""
    write_deepseek2(path, sizes=dict(sizes))
    file = open_gguf(path)
    tensors = {
        name: TensorData(name, info.shape, info.ggml_type, file.read(name))
        for name, info in file.tensors.items()
    }
    for name, (type_name, data) in changes.items():
        shape = tensors[name].shape if name in tensors else data.shape
        tensors[name] = TensorData(name, shape, IDS[type_name], data)
    write_gguf(path, file.metadata, tensors.values())
    return path


@pytest.mark.parametrize("max_bytes", [1, 50_000, 10**9], ids=["one each", "some", "one file"])
def test_shards(tmp_path, max_bytes):
    write_deepseek2(tmp_path / "a.gguf", weight_type="BF16", sizes={"embed": 63})
    calls = []
    to_safetensors(
        tmp_path / "a.gguf",
        tmp_path / "hf",
        max_shard_bytes=max_bytes,
        progress=lambda *call: calls.append(call),
    )
    whole = open_folder(tmp_path / "hf").tensors
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    names = []
    for path in files:
        with safetensors.safe_open(path, "np") as opened:
            names += (here := list(opened.keys()))
            assert opened.metadata() == {"format": "pt"}
        sizes = {"BF16": 2, "F32": 4}
        assert all(whole[name].offset % sizes[whole[name].dtype] == 0 for name in here)
        size = sum(sizes[whole[name].dtype] * int(np.prod(whole[name].shape)) for name in here)
        assert size <= max_bytes or len(here) == 1
    assert sorted(names) == sorted(whole)
    total = sum(path.stat().st_size for path in files)
    assert [done for done, *_ in calls] == list(range(1, len(names) + 1)) and calls[-1][0] == calls[-1][1]
    assert calls[-1][2] == calls[-1][3] and total - 20_000 < calls[-1][3] < total
    if max_bytes == 10**9:
        assert [path.name for path in files] == ["model.safetensors"]
        return
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": calls[-1][3]}


@pytest.mark.parametrize("nextn", [1, 2])
def test_layers_that_predict_a_second_token_are_kept(tmp_path, nextn):
    tensors = write_folder(tmp_path / "hf", nextn=nextn, yarn=True, groups=2, groups_used=1)
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
    to_safetensors(tmp_path / "a.gguf", tmp_path / "again", dtype="float32")
    found = _read(tmp_path / "again")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    assert after == before | {"torch_dtype": "float32"}


def test_a_layer_for_a_second_token_that_is_not_there(tmp_path):
    keys = {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    write_deepseek2(tmp_path / "a.gguf", metadata=keys)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["num_hidden_layers"] == 3 and values["num_nextn_predict_layers"] == 0


def test_other_tensors_are_left_out_and_named(tmp_path, caplog):
    path = _changed(tmp_path / "a.gguf", **{"rope_freqs.weight": ("f32", np.ones(8, np.float32))})
    to_safetensors(path, tmp_path / "hf")
    assert "left out, as checkpoints have no such tensors: rope_freqs.weight." in caplog.text
    assert not any("rope_freqs" in name for name in _read(tmp_path / "hf"))


CLASSES = {
    "v3": ({}, "DeepseekV3ForCausalLM"),
    "v2": (dict(gating="softmax"), "DeepseekV2ForCausalLM"),
    "glm by name": (dict(metadata={"general.name": "GLM 4.7 Flash"}), "Glm4MoeLiteForCausalLM"),
    "glm by vocabulary": (dict(metadata={"tokenizer.ggml.pre": "glm4"}), "Glm4MoeLiteForCausalLM"),
    "glm that does not say sigmoid": (
        dict(layers=47, dense=46, gating=None, bias=True, normalize=True, metadata={"general.name": "flash"}),
        "Glm4MoeLiteForCausalLM",
    ),
    "v2 named glm": (dict(gating="softmax", metadata={"general.name": "glm"}), "DeepseekV2ForCausalLM"),
}


@pytest.mark.parametrize(("options", "architecture"), CLASSES.values(), ids=CLASSES)
def test_the_class_of_the_model(tmp_path, options, architecture):
    write_deepseek2(tmp_path / "a.gguf", **options)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["architectures"] == [architecture]
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (0, 1, 2)


ENDS = {
    "one": ({}, 1),
    "two": ({"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 1}, [1, 7]),
}


@pytest.mark.parametrize(("keys", "eos"), ENDS.values(), ids=ENDS)
def test_generation_config(tmp_path, keys, eos):
    write_deepseek2(tmp_path / "a.gguf", metadata=keys)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert values == {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 2}


@pytest.mark.parametrize("pre", ["deepseek-v3", "deepseek-llm", "kimi-k2", "glm4", "default"])
def test_the_tokenizer_gives_the_same_ids(tmp_path, pre):
    tokens = vocabulary(320)["tokenizer.ggml.tokens"]
    tokens[-3:] = ["<think>", "<|im_end|>", "[PAD319]"]  # the second is known to end a generation
    types = [3] * 3 + [1] * 314 + [4, 1, 5]
    keys = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": vocabulary(317)["tokenizer.ggml.merges"],
        "tokenizer.ggml.add_eos_token": True,
    }
    write_deepseek2(tmp_path / "a.gguf", metadata=keys)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    ours = Tokenizer(Vocabulary.from_metadata(open_gguf(tmp_path / "a.gguf").metadata))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in ("", "the tents' 1234!! \n\n of <think>it<eos>x<|im_end|> <pad>", "中文é\t[PAD319] 12 <bos"):
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.token_to_id("[PAD319]") is None and theirs.id_to_token(318) == "<|im_end|>"
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 4096 and config["add_eos_token"] is True


def test_a_file_without_a_vocabulary(tmp_path):
    keys = dict.fromkeys(vocabulary(320))
    write_deepseek2(tmp_path / "a.gguf", metadata=keys)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors"]


REFUSED = {
    "architecture": (dict(metadata={"general.architecture": "llama"}), "general.architecture"),
    "no bias": (dict(bias=False), "has_selection_bias must be True with sigmoid gating"),
    "softmax, normalised": (dict(gating="softmax", normalize=True), "normalize_weights must be false"),
    "scaled attention": (
        dict(metadata={"deepseek2.rope.scaling.attn_factor": 2.0}),
        "attention_factor must be 1",
    ),
    "vocabulary": (
        dict(metadata={"tokenizer.ggml.model": "llama"}),
        r"tokenizer\.ggml\.model must be 'gpt2'",
    ),
}


@pytest.mark.parametrize(("options", "match"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_published_form_is_refused(tmp_path, options, match):
    write_deepseek2(tmp_path / "a.gguf", **options)
    with pytest.raises(GGUFError, match=rf"a\.gguf: .*{match}"):
        to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_settings_are_checked(tmp_path):
    write_deepseek2(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"dtype must be one of float32, float16, bfloat16, got 'f32'\."):
        to_safetensors(tmp_path / "a.gguf", tmp_path / "hf", dtype="f32")
    with pytest.raises(ValueError, match=r"max_shard_bytes must be at least 1, got 0\."):
        to_safetensors(tmp_path / "a.gguf", tmp_path / "hf", max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"must be a new or an empty folder"):
        to_safetensors(tmp_path / "a.gguf", tmp_path)
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (np.nan, "bfloat16"), (3.4e38, "bfloat16")])
def test_a_weight_that_is_not_finite_leaves_nothing(tmp_path, value, dtype):
    weight = np.ones((64, 96), np.float32)
    weight[63, 95] = value
    path = _changed(tmp_path / "a.gguf", **{"blk.0.ffn_down.weight": ("f32", weight)})
    with pytest.raises(
        GGUFError, match=rf"a\.gguf: tensor 'blk\.0\.ffn_down\.weight' must be finite in {dtype}"
    ):
        to_safetensors(path, tmp_path / "hf", dtype=dtype)
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_tensor_must_have_its_bytes(tmp_path):
    tensor = safetensors_writer.NewTensor("w", (2, 2), "float32", lambda: [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match=r"tensor 'w' of shape \(2, 2\) .* must have 16 bytes, got 12\."):
        safetensors_writer.write_shards(tmp_path, [tensor], 100, print)


def test_a_failed_run_leaves_the_empty_folder(tmp_path):
    write_deepseek2(tmp_path / "a.gguf")
    (tmp_path / "hf").mkdir()

    def stop(done, *_):
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_safetensors(tmp_path / "a.gguf", tmp_path / "hf", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "hf"] and os.listdir(tmp_path / "hf") == []
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    assert len(os.listdir(tmp_path / "hf")) == 5


_CHILD = """
import resource, sys
import jax
from checkpoints_tools.export import to_safetensors

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, large, folder = sys.argv[1:]
to_safetensors(small, folder + "/small", dtype="float32")
before = peak()
to_safetensors(large, folder + "/large", dtype="float32")
print(peak() - before)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    to_safetensors(small, folder + "/full")
except OSError as error:
    print(error.strerror, error.filename)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets a limit on the size of files")
def test_memory_and_a_full_disk(tmp_path):
    write_deepseek2(tmp_path / "small.gguf", weight_type="Q8_0")
    sizes = dict(embed=1024, ff_exp=1024)
    write_deepseek2(tmp_path / "large.gguf", weight_type="Q8_0", layers=1, dense=0, experts=64, sizes=sizes)
    largest = max(info.num_bytes for info in open_gguf(tmp_path / "large.gguf").tensors.values())
    assert largest > 70e6  # 268 MB when decoded; compiling takes some of what is measured
    command = [sys.executable, "-c", _CHILD, tmp_path / "small.gguf", tmp_path / "large.gguf", tmp_path]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    grown, error = output.splitlines()
    assert int(grown) < 1.5 * largest
    assert error == f"File too large {tmp_path / 'full'}"
    assert sorted(os.listdir(tmp_path)) == ["large", "large.gguf", "small", "small.gguf"]
