"""`describe` says what a file holds, whatever it is, in text that a terminal shows as it is."""

import numpy as np
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf


def _rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}


def test_a_model(tmp_path):
    stored = write_deepseek2(tmp_path / "a.gguf", size="full", weight_type="Q8_0", groups=4, groups_used=2)
    text = checkpoints_tools.describe(tmp_path / "a.gguf")
    num_weights = sum(array.size for array in stored.values())
    assert f"{len(stored)}, {num_weights:,} weights" in text
    assert "3 of 8 by sigmoid, best 2 of 4 groups, 1 shared, hidden 128" in text
    assert f"{3 * (512 + 64) * 2:,} bytes of latent" in text
    assert f"{3 * 4 * (192 + 128) * 2:,} bytes of keys and values" in text
    cache = 3 * (512 + 64) * 2 * 4096 / 2**20
    num_bytes = sum(info.num_bytes for info in open_gguf(tmp_path / "a.gguf").tensors.values())
    assert f"{num_bytes / 2**20:,.1f} MiB of weights, {cache:.1f} MiB of cache for all 4,096 tokens" in text
    rows = _rows(text)
    assert rows["architecture"] == ["deepseek2"]
    assert 8.5 < float(rows["bits"][2]) < 8.7
    assert rows["deepseek2.rope.freq_base"] == ["f32", "10000"]
    assert rows["tokenizer.ggml.token_type"] == "i32[] [3, 3, 3, 1, 1, 1, ...] (320)".split()
    assert rows["blk.1.ffn_down_exps.weight"] == ["8", "x", "256", "x", "128", "q8_0", f"{8 * 256 * 136:,}"]
    assert "cannot be run" not in text


def test_a_model_without_a_vocabulary(tmp_path):
    write_deepseek2(tmp_path / "a.gguf")
    file = open_gguf(tmp_path / "a.gguf")
    keys = {key: field for key, field in file.metadata.fields.items() if not key.startswith("tokenizer.")}
    tensors = [TensorData(i.name, i.shape, i.ggml_type, file.read(i.name)) for i in file.tensors.values()]
    write_gguf(tmp_path / "b.gguf", keys, tensors)
    assert "cannot be run" not in checkpoints_tools.describe(tmp_path / "a.gguf")
    told = [line for line in checkpoints_tools.describe(tmp_path / "b.gguf").splitlines() if "cannot" in line]
    assert len(told) == 1 and "tokenizer.ggml" in told[0]


def test_another_architecture(tmp_path):
    tensor = TensorData("strange\x1b[31m", (2, 256), IDS["iq4_ks"], np.zeros(2 * (4 + 136), np.uint8))
    values = {
        "general.architecture": "llama",
        "evil": "\x1b[2J",
        "long": "x" * 1000,
        "long_list": ["y" * 99] * 99,
    }
    write_gguf(tmp_path / "a.gguf", values, [tensor])
    text = checkpoints_tools.describe(tmp_path / "a.gguf")
    assert "cannot be run" in text and "supported is 'deepseek2'" in text
    assert "iq4_ks" in text and "280" in text
    assert "\x1b" not in text and r"'strange\x1b[31m'" in text
    assert max(map(len, text.splitlines())) < 500


def test_no_tensors(tmp_path):
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "clip"}, [])
    assert "0, 0 weights, 0 bytes" in checkpoints_tools.describe(tmp_path / "a.gguf")
