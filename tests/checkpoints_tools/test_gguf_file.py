"""The container: what is written is read back, other readers agree, bad bytes raise nothing but GGUFError."""

import io
import struct

import gguf
import numpy as np
import pytest
from synthetic import write_deepseek2

from checkpoints_tools import buffers, gguf_file, gguf_header, gguf_writer
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_metadata import Field, Metadata

VALUES = {
    "general.architecture": "test",
    "a.u8": Field.of(200, "u8"),
    "a.i8": Field.of(-3, "i8"),
    "a.u16": Field.of(60_000, "u16"),
    "a.i16": Field.of(-30_000, "i16"),
    "a.u32": 4_000_000_000,
    "a.i32": -5,
    "a.u64": 2**63,
    "a.i64": Field.of(-(2**40), "i64"),
    "a.f32": 0.5,
    "a.f64": Field.of(0.1, "f64"),
    "a.bool": True,
    "a.text": "naïve 漢字 \x00 end",
    "a.empty": "",
    "a.ints": [1, -2, 3],
    "a.floats": np.array([0.25, np.inf], np.float32),
    "a.bools": [True, False],
    "a.texts": ["x", "", "é"],
    "a.none": Field.of([], "string"),
    "a.bytes": np.arange(5, dtype=np.uint8),
}


def _tensors(rng):
    for name, ggml_type, shape in (
        ("f32", 0, (3, 5)),
        ("f16", 1, (7,)),
        ("q8_0", 8, (2, 3, 64)),
        ("one", 0, ()),
    ):
        entry = TYPES[ggml_type]
        row_size = shape[-1] if shape else 1
        num_bytes = int(np.prod(shape[:-1])) * entry.row_bytes(row_size)
        yield gguf_writer.TensorData(name, shape, ggml_type, rng.integers(0, 256, num_bytes, np.uint8))


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.gguf"
    tensors = list(_tensors(np.random.default_rng(0)))
    gguf_writer.write_gguf(path, VALUES, tensors)
    return path, tensors


def test_reads_back_every_value_and_tensor(small):
    path, tensors = small
    file = gguf_file.open_gguf(path)
    expected = {
        key: value.value()
        if isinstance(value, Field)
        else value.tolist()
        if isinstance(value, np.ndarray)
        else value
        for key, value in VALUES.items()
    }
    assert dict(file.metadata) == expected
    assert [type(value) for value in file.metadata.values()] == [type(v) for v in expected.values()]
    assert file.metadata["a.i8"] == -3 and file.metadata["a.u64"] == 2**63 and file.metadata["a.f64"] == 0.1
    assert list(file.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        info, data = file.tensors[tensor.name], file.read(tensor.name)
        assert (info.shape, info.ggml_type) == (tensor.shape, tensor.ggml_type)
        assert data.ctypes.data % buffers.BUFFER_ALIGNMENT == 0
        np.testing.assert_array_equal(data, tensor.data)


def test_writing_what_was_read_gives_the_same_file(small, tmp_path):
    path, tensors = small
    file = gguf_file.open_gguf(path)
    gguf_writer.write_gguf(tmp_path / "again.gguf", file.metadata, tensors)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_text_that_is_not_utf8_keeps_its_bytes(tmp_path):
    raw = struct.pack("<Q", 2) + b"\xff\xe6"
    gguf_writer.write_gguf(tmp_path / "a.gguf", Metadata({"text": Field(8, raw)}), [])
    metadata = gguf_file.open_gguf(tmp_path / "a.gguf").metadata
    assert metadata["text"].encode("utf-8", "surrogateescape") == b"\xff\xe6"
    gguf_writer.write_gguf(tmp_path / "b.gguf", dict(metadata), [])
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_nested_arrays_are_read(tmp_path):
    inner = struct.pack("<IQ2B", 0, 2, 5, 6)
    field = Field(9, struct.pack("<IQ", 9, 2) + inner + inner)
    gguf_writer.write_gguf(tmp_path / "a.gguf", Metadata({"nested": field, "after": Field.of(1)}), [])
    assert dict(gguf_file.open_gguf(tmp_path / "a.gguf").metadata) == {"nested": [[5, 6], [5, 6]], "after": 1}


@pytest.mark.parametrize(
    "value, type_name, raw_type",
    [
        (1, None, "u32"),
        (-1, None, "i32"),
        (2**32, None, "u64"),
        (-(2**32), None, "i64"),
        ([1, 2], None, "i32[]"),
        ([2**31], None, "u32[]"),
        ([1, 0.5], None, "f32[]"),
        (3, "f32", "f32"),
        (np.array([1], np.int64), None, "i64[]"),
    ],
)
def test_field_types(value, type_name, raw_type):
    field = Field.of(value, type_name)
    assert field.type_name == raw_type
    assert np.array_equal(field.value(), value)


@pytest.mark.parametrize("value", [None, [1, "a"], [], 2**64, object(), {"a": 1}, np.zeros(2, np.float16)])
def test_values_without_a_gguf_type_are_refused(value):
    with pytest.raises(ValueError, match="GGUF"):
        Field.of(value)


@pytest.mark.parametrize("weight_type", ["F32", "F16", "BF16", "Q8_0"])
def test_agrees_with_the_gguf_package(tmp_path, weight_type):
    path = tmp_path / "model.gguf"
    write_deepseek2(path, weight_type=weight_type, kv="both")
    ours, theirs = gguf_file.open_gguf(path), gguf.GGUFReader(path)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        assert ours.metadata[key] == theirs.fields[key].contents(), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (info.ggml_type, info.offset) == (tensor.tensor_type, tensor.data_offset)
        np.testing.assert_array_equal(ours.read(tensor.name), tensor.data.reshape(-1).view(np.uint8))


def test_reads_what_the_gguf_package_writes(tmp_path):
    path, rng = tmp_path / "theirs.gguf", np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "test")
    writer.add_array("numbers", [3, -4])
    writer.add_array("texts", ["a", "bc"])
    weights = rng.standard_normal((5, 3), np.float32)
    writer.add_tensor("weights", weights)
    writer.add_tensor("row", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguf_file.open_gguf(path)
    assert dict(file.metadata) == {"general.architecture": "test", "numbers": [3, -4], "texts": ["a", "bc"]}
    np.testing.assert_array_equal(file.read("weights").view(np.float32).reshape(5, 3), weights)
    np.testing.assert_array_equal(file.read("row").view(np.float32), weights[0])


def test_type_sizes_agree_with_the_gguf_package():
    never_in_files = (IDS["q8_1"], IDS["q8_K"])  # their layout is each program's own
    for ggml_type, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        if ggml_type in never_in_files:
            continue
        entry = TYPES[ggml_type]
        assert (entry.block_size, entry.block_bytes) == (block_size, block_bytes), entry.name


class _Counting(io.BytesIO):
    """A file that counts what is read of it."""

    num_reads = num_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        self.num_reads, self.num_bytes = self.num_reads + 1, self.num_bytes + len(data)
        return data


def test_a_large_vocabulary_is_passed_over_until_it_is_asked_for(tmp_path, monkeypatch):
    tokens = [f"token{index}" for index in range(129_280)]
    values = {"tokens": tokens, "merges": [f"{token} x" for token in tokens], "types": [1] * len(tokens)}
    gguf_writer.write_gguf(tmp_path / "vocabulary.gguf", values, [])
    data, decoded = (tmp_path / "vocabulary.gguf").read_bytes(), []
    decode = Field.value
    monkeypatch.setattr(Field, "value", lambda self, limit=None: decoded.append(self) or decode(self, limit))
    file = _Counting(data)
    metadata, _ = gguf_header.read_header(file, "vocabulary.gguf", len(data))
    assert decoded == []
    assert file.num_bytes < 3 * len(data) and file.num_reads < 3 * len(data) // 2**20 + 4
    assert metadata["types"] == values["types"] and metadata["tokens"] == tokens
    assert metadata["tokens"] is metadata["tokens"]
    assert decoded == [metadata.fields["types"], metadata.fields["tokens"]]
    assert metadata.fields["merges"].value(limit=2) == ["token0 x", "token1 x"]


def test_a_value_larger_than_any_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "_MAX_VALUE_BYTES", 3 << 20)
    for size, words in (
        (2 << 20, None),
        (3 << 20, r"at byte \d+: key 'text' must have at most 3145728 bytes"),
    ):
        gguf_writer.write_gguf(tmp_path / "a.gguf", {"first": 1, "text": "x" * size, "last": 2}, [])
        if words is None:
            assert dict(gguf_file.open_gguf(tmp_path / "a.gguf").metadata)["last"] == 2
            continue
        with pytest.raises(gguf_file.GGUFError, match=words):
            gguf_file.open_gguf(tmp_path / "a.gguf")


def test_a_file_that_shrinks_or_grows_while_it_is_opened_is_refused(tmp_path):
    gguf_writer.write_gguf(tmp_path / "a.gguf", {"text": "x" * 5000}, [])
    data = (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(gguf_file.GGUFError, match=r"a\.gguf: at byte \d+: .* only .* could be read"):
        gguf_header.read_header(io.BytesIO(data[:3000]), "a.gguf", len(data))
    with pytest.raises(gguf_file.GGUFError, match=r"a\.gguf: at byte \d+: .* ends after the file, of 3000"):
        gguf_header.read_header(io.BytesIO(data), "a.gguf", 3000)
    with pytest.raises(gguf_file.GGUFError, match=r"a\.gguf: at byte 24: .* needs 8 bytes, 4 are left"):
        gguf_header.read_header(io.BytesIO(data), "a.gguf", 28)


def _split(folder, counts=(2, 1, 1), **changes):
    """Writes a model in parts; `changes` maps "no0", "count1", "total" to wrong values."""
    tensors = list(_tensors(np.random.default_rng(0)))
    paths, start = [], 0
    for index, count in enumerate(counts):
        values = {"split.no": changes.get(f"no{index}", index), "split.count": changes.get("count1", 3)}
        if index == 0:
            values = VALUES | values | {"split.count": 3, "split.tensors.count": changes.get("total", 4)}
        paths.append(folder / f"model-{index + 1:05}-of-00003.gguf")
        gguf_writer.write_gguf(paths[-1], values, tensors[start : start + count])
        start += count
    return paths, tensors


def test_split_files_read_as_one(tmp_path):
    paths, tensors = _split(tmp_path)
    file = gguf_file.open_gguf(paths[0])
    assert list(file.metadata) == list(VALUES)
    assert list(file.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        np.testing.assert_array_equal(file.read(tensor.name), tensor.data)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"no1": 2}, r"00002-of-00003.*'split\.no' must be 1, got 2"),
        ({"count1": 4}, r"'split\.count' must be 3, got 4"),
        ({"total": 5}, r"'split\.tensors\.count' must be 4, got 5"),
        ({"total": "x"}, r"'split\.tensors\.count' must be 4, got 'x'"),
    ],
)
def test_split_files_that_disagree_are_refused(tmp_path, changes, words):
    paths, _ = _split(tmp_path, **changes)
    with pytest.raises(gguf_file.GGUFError, match=words):
        gguf_file.open_gguf(paths[0])


def test_split_files_name_what_is_missing(tmp_path):
    paths, _ = _split(tmp_path)
    with pytest.raises(gguf_file.GGUFError, match=r"part 2 of 3, open the first, .*00001-of-00003\.gguf"):
        gguf_file.open_gguf(paths[1])
    paths[1].unlink()
    with pytest.raises(
        gguf_file.GGUFError, match=r"model-00002-of-00003\.gguf: cannot be read: No such file"
    ):
        gguf_file.open_gguf(paths[0])
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(gguf_file.GGUFError, match=r"one of 3 parts, so its name must end in -00001-of-00003"):
        gguf_file.open_gguf(tmp_path / "renamed.gguf")


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    paths, tensors = _split(tmp_path)
    gguf_writer.write_gguf(paths[2], {"split.no": 2, "split.count": 3}, tensors[:1])
    with pytest.raises(gguf_file.GGUFError, match=r"00003-of.*'f32' is also in .*00001-of"):
        gguf_file.open_gguf(paths[0])


def test_a_file_that_changes_in_use_is_refused(small):
    path, _ = small
    file = gguf_file.open_gguf(path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(gguf_file.GGUFError, match="must not change while it is read"):
        file.read("one")


def test_a_failed_write_leaves_the_old_file(small):
    path, tensors = small
    before = path.read_bytes()
    wrong = gguf_writer.TensorData("wrong", (4,), 0, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"'wrong' of shape \(4,\) and type f32 must have 16 bytes, got 12"):
        gguf_writer.write_gguf(path, VALUES, [*tensors, wrong])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_alignment_is_kept(tmp_path):
    tensors = list(_tensors(np.random.default_rng(0)))
    for alignment in (1, 64, 4096):
        path = tmp_path / f"{alignment}.gguf"
        gguf_writer.write_gguf(path, {"general.alignment": alignment}, tensors)
        file = gguf_file.open_gguf(path)
        assert all(info.offset % alignment == 0 for info in file.tensors.values())
        np.testing.assert_array_equal(file.read("one"), tensors[-1].data)


def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path):
    with pytest.raises(OSError) as caught:
        gguf_writer.write_gguf(tmp_path / "absent" / "a.gguf", {}, [])
    assert caught.value.filename == str(tmp_path / "absent" / "a.gguf")
