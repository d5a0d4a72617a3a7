"""What differs between two files: numbers against their definition, and everything named."""

import dataclasses

import numpy as np
import pytest
from synthetic import write_deepseek2

from checkpoints_tools import diff as diff_lib
from checkpoints_tools import row_chunks
from checkpoints_tools.diff import diff, table
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_file import GGUFError, open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.split import split


def _write(path, arrays, **keys):
    """Writes arrays by name: float ones as they are, and (type name, shape, bytes) as such."""
    tensors = []
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            type_name = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[array.dtype.name]
            tensors.append(TensorData(name, array.shape, IDS[type_name], array))
        else:
            type_name, shape, data = array
            tensors.append(TensorData(name, shape, IDS[type_name], data))
    write_gguf(path, {"general.architecture": "any"} | keys, tensors)
    return path


def _expected(x, y):
    """The definition of each error, in float64."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    rmse = np.sqrt(np.mean((x - y) ** 2))
    return diff_lib.Errors(
        largest=np.abs(x - y).max(),
        rmse=rmse,
        relative_rmse=rmse / np.sqrt(np.mean(x**2)),
        cosine=(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)),
    )


@pytest.mark.parametrize("weights", [100, 64 * 48 * 3, None], ids=["many chunks", "some chunks", "one chunk"])
@pytest.mark.parametrize("weight_type", ["Q8_0", "BF16", "F16"])
def test_errors_are_those_of_the_definition(tmp_path, monkeypatch, weight_type, weights):
    if weights is not None:
        monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", weights)
    before = write_deepseek2(tmp_path / "a.gguf", layers=2)
    after = write_deepseek2(tmp_path / "b.gguf", layers=2, weight_type=weight_type)
    found = diff(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert [tensor.name for tensor in found.tensors] == list(before) and not found.keys
    for tensor in found.tensors:
        assert tensor.num_weights == before[tensor.name].size and not tensor.reason
        is_vector = tensor.a.type_name == tensor.b.type_name
        assert tensor.is_identical == is_vector
        if is_vector:
            assert tensor.errors == diff_lib.Errors(0, 0, 0, 1)
            continue
        expected = dataclasses.astuple(_expected(before[tensor.name], after[tensor.name]))
        np.testing.assert_allclose(
            dataclasses.astuple(tensor.errors), expected, rtol=1e-9, err_msg=tensor.name
        )
        assert 0 < tensor.errors.relative_rmse < 0.01


def test_equal_files(tmp_path):
    for name in "ab":
        write_deepseek2(tmp_path / f"{name}.gguf", weight_type="Q8_0")
    found = diff(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert found.is_identical and all(tensor.is_identical for tensor in found.tensors)
    assert table(found) == (
        "0 keys differ; 49 of 49 tensors are identical; 0 only in the first file, 0 only in the second."
    )


def test_a_split_file_is_its_whole(tmp_path):
    write_deepseek2(tmp_path / "a.gguf")
    part = split(tmp_path / "a.gguf", tmp_path / "m", max_tensors=20)[0]
    assert diff(tmp_path / "a.gguf", part).is_identical


@pytest.mark.parametrize("position", [0, 70_000, -1], ids=["first", "middle", "last"])
def test_one_bit_is_found(tmp_path, monkeypatch, position):
    monkeypatch.setattr(diff_lib, "_COMPARED_BYTES", 4096)
    data = np.random.default_rng(0).integers(0, 256, 256 * 296, np.uint8)
    changed = data.copy()
    changed[position] ^= 1
    a = _write(tmp_path / "a.gguf", {"w": ("q8_K", (64, 1024), data)})
    b = _write(tmp_path / "b.gguf", {"w": ("q8_K", (64, 1024), changed)})
    assert diff(a, a).is_identical
    (tensor,) = diff(a, b).tensors
    assert not tensor.is_identical and tensor.errors is None and tensor.reason == "bytes differ"


def test_what_cannot_be_compared_is_said(tmp_path):
    ones = np.ones((2, 256), np.float32)
    block = np.zeros(2 * 296, np.uint8)
    a = {"only_a": ones, "shape": ones, "coded": ("q8_K", (2, 256), block), "same": ones}
    b = {"same": ones, "coded": ones, "shape": np.ones((256, 2), np.float32), "only_b": ones}
    found = diff(_write(tmp_path / "a.gguf", a), _write(tmp_path / "b.gguf", b))
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert list(by_name) == ["only_a", "shape", "coded", "same", "only_b"]
    assert by_name["only_a"].b is None and by_name["only_b"].a is None
    assert by_name["shape"].reason == "shapes differ" and by_name["coded"].reason == "bytes differ"
    assert [name for name in by_name if by_name[name].is_identical] == ["same"]
    assert [name for name in by_name if by_name[name].errors is not None] == ["same"]
    rows = {line.split()[0]: line.split()[1:] for line in table(found).splitlines() if line}
    assert rows["only_a"] == "2 x 256 f32 - 512 - - - -".split()
    assert rows["only_b"] == "- 2 x 256 f32 512 - - - -".split()
    assert rows["shape"] == "2 x 256 f32 256 x 2 f32 512 shapes differ - - -".split()
    assert rows["coded"] == "2 x 256 q8_K 2 x 256 f32 512 bytes differ - - -".split()
    assert "same" not in rows
    assert table(found).endswith(
        "1 of 5 tensors are identical; 1 only in the first file, 1 only in the second."
    )


def test_keys(tmp_path):
    texts = [str(number) for number in range(999)]
    a = _write(tmp_path / "a.gguf", {}, only_a=True, number=3, same=0.5, texts=texts, evil="\x1b[2J")
    b = _write(tmp_path / "b.gguf", {}, number=3.0, same=0.5, texts=texts[1:], evil="\x1b", only_b="x" * 999)
    found = diff(a, b)
    assert not found.is_identical
    assert {key.name: (key.a, key.b) for key in found.keys} == {
        "only_a": ("bool True", None),
        "number": ("u32 3", "f32 3"),
        "texts": ("string[] [0, 1, 2, 3, 4, 5, ...] (999)", "string[] [1, 2, 3, 4, 5, 6, ...] (998)"),
        "evil": (r"string '\x1b[2J'", r"string '\x1b'"),
        "only_b": (None, "string " + "x" * 57 + "..."),
    }
    assert "\x1b" not in table(found)
    assert table(found).endswith(
        "5 keys differ; 0 of 0 tensors are identical; 0 only in the first file, 0 only in the second."
    )


def test_weights_at_the_limits(tmp_path):
    zeros, values = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    broken = values.copy()
    broken[1, 1] = np.nan
    a = {
        "zeros": zeros,
        "minus": zeros,
        "nan": values,
        "inf": values,
        "nans": broken,
        "scalar": np.float32([2]),
    }
    b = {"zeros": values, "minus": -zeros, "nan": broken, "inf": values * np.float32(np.inf), "nans": broken}
    b["scalar"] = np.float32([-2])
    found = diff(_write(tmp_path / "a.gguf", a), _write(tmp_path / "b.gguf", b))
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name["zeros"].errors.largest == 1 and by_name["zeros"].errors.relative_rmse == np.inf
    assert by_name["minus"].errors == diff_lib.Errors(0, 0, 0, 1) and not by_name["minus"].is_identical
    assert np.isnan(dataclasses.astuple(by_name["nan"].errors)).all()
    assert by_name["inf"].errors.largest == np.inf
    assert by_name["nans"].is_identical
    assert by_name["scalar"].errors == diff_lib.Errors(4, 4, 2, -1)
    assert table(found).endswith("largest relative RMSE nan in nan.")


def test_progress_is_reported_after_each_tensor(tmp_path):
    calls = []
    write_deepseek2(tmp_path / "a.gguf")
    write_deepseek2(tmp_path / "b.gguf", kv="both", weight_type="Q8_0")
    diff(tmp_path / "a.gguf", tmp_path / "b.gguf", progress=lambda *call: calls.append(call))
    infos = [open_gguf(tmp_path / f"{name}.gguf").tensors.values() for name in "ab"]
    total = sum(info.num_bytes for file in infos for info in file)
    assert [done for done, *_ in calls] == list(range(1, 56))
    assert calls[-1] == (55, 55, total, total)


def test_a_bad_file_is_named(tmp_path):
    write_deepseek2(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:-100])
    with pytest.raises(GGUFError, match=r"b\.gguf: tensor .* cut off"):
        diff(tmp_path / "a.gguf", tmp_path / "b.gguf")
