"""`check` finds each number that is not finite, wherever it hides, and says where that is."""

import numpy as np
import pytest
from synthetic import write_deepseek2

from checkpoints_tools import row_chunks
from checkpoints_tools.check import check
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_file import GGUFError, open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from mla_jax import quant

# Where a block has its scales: (byte in the block, NumPy type).
SCALES = {
    "f32": [(0, "<f4")],
    "f16": [(0, "<f2")],
    "q4_0": [(0, "<f2")],
    "q5_0": [(0, "<f2")],
    "q8_0": [(0, "<f2")],
    "q4_K": [(0, "<f2"), (2, "<f2")],
    "q6_K": [(208, "<f2")],
    "iq4_k": [(0, "<f2")],
}
CASES = [(name, at, dtype) for name, scales in SCALES.items() for at, dtype in scales]
NUM_ROWS, ROW_SIZE = 40, 512


def _write(path, type_name, plant=None, alignment=64):
    """Writes two tensors of zeros; in the second, `plant` is called with the bytes [rows, bytes of a row]."""
    entry = TYPES[IDS[type_name]]
    zeros, data = (np.zeros((NUM_ROWS, entry.row_bytes(ROW_SIZE)), np.uint8) for _ in range(2))
    if plant is not None:
        plant(data)
    values = {"general.architecture": "llama", "general.alignment": alignment}
    tensors = [("a.weight", zeros), ("b.weight", data)]
    write_gguf(path, values, [TensorData(n, (NUM_ROWS, ROW_SIZE), IDS[type_name], d) for n, d in tensors])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name, at, dtype", CASES, ids=lambda value: str(value))
def test_a_bad_scale_is_found_where_it_is(tmp_path, monkeypatch, name, at, dtype, bad):
    monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", 16 * ROW_SIZE)  # three chunks, of which two overlap
    entry, row = TYPES[IDS[name]], 37
    block = ROW_SIZE // entry.block_size - 1
    offset = block * entry.block_bytes

    def plant(data):
        scale = np.frombuffer(np.dtype(dtype).type(bad).tobytes(), np.uint8)
        data[row, offset + at : offset + at + scale.size] = scale
        data[row, offset + entry.block_bytes - 1 if entry.block_size > 1 and at == 0 else offset + at] |= 1

    _write(tmp_path / "a.gguf", name, plant)
    (problem,) = check(tmp_path / "a.gguf").problems
    info = open_gguf(tmp_path / "a.gguf").tensors["b.weight"]
    number = row * (ROW_SIZE // entry.block_size) + block
    byte = info.offset + row * entry.row_bytes(ROW_SIZE) + offset
    what = "value" if entry.block_size == 1 else "block"
    assert problem == (
        f"{tmp_path / 'a.gguf'}: tensor 'b.weight' of type {name} must be finite, but {what} {number}, "
        f"in row 37 and at byte {byte}, is not."
    )


@pytest.mark.parametrize("name", ["iq4_ks", "iq2_kt", "q8_KV"])
def test_a_bad_scale_of_a_row_is_found(tmp_path, name):
    entry = TYPES[IDS[name]]
    if name not in quant.FORMATS:
        pytest.skip(f"{name} has no decoder")

    def plant(data):
        data[5] = 1
        half = np.float32(np.nan) if entry.row_header >= 4 else np.float16(np.nan)
        data[5, : half.nbytes] = np.frombuffer(half.tobytes(), np.uint8)

    _write(tmp_path / "a.gguf", name, plant)
    (problem,) = check(tmp_path / "a.gguf").problems
    info = open_gguf(tmp_path / "a.gguf").tensors["b.weight"]
    assert (
        f"in row 5 and at byte {info.offset + 5 * entry.row_bytes(ROW_SIZE) + entry.row_header}," in problem
    )


def test_finite_files_are_sound(tmp_path):
    for name in SCALES:
        _write(tmp_path / "a.gguf", name)
        assert check(tmp_path / "a.gguf").problems == ()


def test_what_was_checked_of_a_model(tmp_path):
    write_deepseek2(tmp_path / "a.gguf", weight_type="Q8_0", kv="both")
    findings, infos = check(tmp_path / "a.gguf"), open_gguf(tmp_path / "a.gguf").tensors.values()
    assert findings.problems == ()
    assert findings.checked == (
        f"{tmp_path / 'a.gguf'}: container, config, tensor names, shapes and types; {len(infos)} tensors of "
        f"{sum(info.num_bytes for info in infos):,} bytes, all values finite."
    )


def test_other_architectures_are_checked_as_containers(tmp_path):
    _write(tmp_path / "a.gguf", "f32")
    checked = check(tmp_path / "a.gguf").checked
    assert (
        "container (its architecture is 'llama', so no more is known of its structure); 2 tensors" in checked
    )


def test_what_cannot_be_decoded_is_told(tmp_path):
    tensors = [
        TensorData("a", (1, 256), IDS["q8_K"], np.full(296, 255, np.uint8)),
        TensorData("b", (1, 256), IDS["f64"], np.zeros(256)),
        TensorData("c", (4,), IDS["i32"], np.full(4, -1, np.int32)),
        TensorData("d", (), IDS["f32"], np.zeros((), np.float32)),
    ]
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "clip"}, tensors)
    findings = check(tmp_path / "a.gguf")
    assert findings.problems == ()
    assert "except that those in 1 of type q8_K, 1 of type f64 cannot be decoded" in findings.checked


def test_faults_of_the_model_and_of_its_weights_are_told_together(tmp_path):
    write_deepseek2(tmp_path / "a.gguf", metadata={"deepseek2.expert_used_count": 99})
    file = open_gguf(tmp_path / "a.gguf")

    def bad(name):
        data = file.read(name).view(np.float32).copy()
        data[-1] = np.inf
        return data

    tensors = [TensorData(n, info.shape, info.ggml_type, bad(n)) for n, info in file.tensors.items()]
    write_gguf(tmp_path / "a.gguf", file.metadata, tensors)
    problems = check(tmp_path / "a.gguf").problems
    assert "expert_used_count' must be an integer in [1, 8], got 99" in problems[0]
    assert len(problems) == 12
    assert [problem.split("'")[1] for problem in problems[1:11]] == list(file.tensors)[:10]
    assert problems[11].endswith(f": {len(file.tensors) - 10} more tensors hold values that are not finite.")


def test_a_container_that_is_not_sound_is_refused(tmp_path):
    _write(tmp_path / "a.gguf", "q4_0")
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:-100])
    with pytest.raises(GGUFError, match="the file is cut off or damaged"):
        check(tmp_path / "a.gguf")


def test_progress(tmp_path):
    calls = []
    _write(tmp_path / "a.gguf", "q4_0")
    check(tmp_path / "a.gguf", progress=lambda *call: calls.append(call))
    size = NUM_ROWS * ROW_SIZE // 32 * 18
    assert calls == [(1, 2, size, 2 * size), (2, 2, 2 * size, 2 * size)]
