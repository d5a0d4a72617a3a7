"""Safetensors files are read as the library reads them, and bad ones refused in a sentence."""

import json
import os
import re
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_folder import save, save_file, write_json

from checkpoints_tools import GGUFError, json_file, safetensors_file
from checkpoints_tools.safetensors_file import open_folder

ONE = {"a": np.arange(12, dtype=np.float32).reshape(3, 4)}


def _tensors():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 5), dtype=np.float32)
    return {
        "matrix": matrix,
        "half": matrix.astype(np.float16),
        "brain": matrix.astype(ml_dtypes.bfloat16),
        "eight": matrix.astype(ml_dtypes.float8_e4m3fn),
        "vector": matrix[0],
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
    }


def test_files_of_the_library_are_read(tmp_path):
    tensors = {name: array for name, array in _tensors().items() if array.dtype.name.startswith("float")}
    del tensors["eight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    folder = open_folder(tmp_path)
    assert folder.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(folder.read(name), array.reshape(1) if array.ndim == 0 else array)


@pytest.mark.parametrize("num_files", [1, 3])
def test_rows_of_every_type(tmp_path, num_files):
    tensors = _tensors()
    save(tmp_path, tensors, num_files)
    folder = open_folder(tmp_path)
    assert folder.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        info = folder.tensors[name]
        assert safetensors_file.DTYPES[info.dtype] == array.dtype and info.shape == array.shape
        rows = folder.read(name, 1, 3) if array.ndim and len(array) > 3 else folder.read(name)
        expected = array[1:3] if array.ndim and len(array) > 3 else array.reshape(rows.shape)
        assert rows.tobytes() == expected.tobytes() and rows.dtype == array.dtype


def test_a_single_file_goes_before_an_index(tmp_path):
    save(tmp_path, {"old": ONE["a"]}, 2)
    save(tmp_path, ONE)
    assert list(open_folder(tmp_path).tensors) == ["a"]


def test_links_are_followed(tmp_path):
    """The cache of the hub has links to files elsewhere."""
    save_file(tmp_path / "blob", ONE)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").symlink_to(tmp_path / "blob")
    np.testing.assert_array_equal(open_folder(tmp_path / "hub").read("a"), ONE["a"])


def test_a_file_must_not_change(tmp_path):
    save(tmp_path, ONE)
    folder = open_folder(tmp_path)
    os.utime(tmp_path / "model.safetensors", (1, 1))
    with pytest.raises(GGUFError, match="must not change"):
        folder.read("a")


def _header(**changes):
    return lambda folder: save_file(folder / "model.safetensors", ONE, **changes)


def _entry(**changes):
    return _header(a=dict(dtype="F32", shape=[3, 4], data_offsets=[0, 48]) | changes)


def _raw(data):
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def _text(text):
    return _raw(len(text).to_bytes(8, "little") + text)


def _cut(num_bytes):
    def make(folder):
        save(folder, ONE)
        os.truncate(folder / "model.safetensors", os.path.getsize(folder / "model.safetensors") - num_bytes)

    return make


def _longer(folder):
    save(folder, ONE)
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0")


def _index(weight_map):
    def make(folder):
        save(folder, ONE, 2)
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})

    return make


SHARD = "model-00001-of-00002.safetensors"
BAD = {
    "nothing there": (lambda folder: None, r"model\.safetensors: cannot be read: No such file"),
    "a folder for a file": (lambda folder: (folder / "model.safetensors").mkdir(), "Is a directory"),
    "a pipe for a file": (lambda folder: os.mkfifo(folder / "model.safetensors"), "must be a regular file"),
    "empty": (_raw(b""), "is not a safetensors file"),
    "no length": (_raw(b"\x10\0\0"), "is not a safetensors file"),
    "a length past the end": (_raw(b"\xff\0\0\0\0\0\0\0{}"), "the header needs 255 bytes, 2 are left"),
    "a length past all bounds": (_raw(b"\xff" * 8 + b"{}"), "is not a safetensors file"),
    "another format": (_raw(b"GGUF\3\0\0\0" * 4), "is not a safetensors file"),
    "no JSON": (_text(b"{'a'"), "must be a JSON object"),
    "no UTF-8": (_text(b'{"\xff": 1}'), "must be a JSON object"),
    "no object": (_text(b"[1, 2]"), "must be a JSON object, got a list"),
    "nested too deeply": (_text(b"[" * 100_000), "must be a JSON object"),
    "a tensor twice": (_text(b'{"a": 1, "a": 2}'), "key 'a' is there twice"),
    "a number of too many digits": (_text(b'{"a": ' + b"9" * 5000 + b"}"), "must be a JSON object"),
    "a tensor that is no object": (_header(a=7), "tensor 'a' must have a dtype"),
    "an unknown dtype": (_entry(dtype="F12"), "tensor 'a' must have a dtype"),
    "a dtype of no text": (_entry(dtype=["F32"]), "tensor 'a' must have a dtype"),
    "a shape of no list": (_entry(shape=12), "tensor 'a' must have a shape"),
    "a negative size": (_entry(shape=[-3, -4]), "tensor 'a' must have a shape"),
    "a size of true": (_entry(shape=[True, 12]), "tensor 'a' must have a shape"),
    "a shape that overflows": (_entry(shape=[1 << 61, 1 << 61]), "must have 2126"),
    "too many axes": (_entry(shape=[1] * 9), "at most 8"),
    "one offset": (_entry(data_offsets=[0]), "two data_offsets"),
    "offsets of a wrong size": (_entry(data_offsets=[0, 44]), "must have 48 bytes"),
    "offsets in reverse": (_entry(data_offsets=[48, 0]), "must have 48 bytes"),
    "a gap": (_entry(data_offsets=[4, 52]), "must begin at byte"),
    "two in one place": (
        _header(b=dict(dtype="F32", shape=[3, 4], data_offsets=[0, 48])),
        "must begin at byte .*, where tensor '[ab]' ends",
    ),
    "cut off": (_cut(1), "tensor 'a' ends at byte .*; the file is cut off"),
    "cut off in the header": (_cut(60), "the header needs"),
    "more than its tensors": (_longer, "must end at byte"),
    "an index without a map": (_index(None), "key 'weight_map' must be an object"),
    "an index with an empty map": (_index({}), "key 'weight_map' must be an object"),
    "a path upwards": (_index({"a": "../model.safetensors"}), "files of the same folder"),
    "an absolute path": (_index({"a": "/etc/model.safetensors"}), "files of the same folder"),
    "a path of Windows": (_index({"a": "..\\x.safetensors"}), "files of the same folder"),
    "a name with a zero byte": (_index({"a": "\0.safetensors"}), "files of the same folder"),
    "a name of half a character": (_index({"a": "\ud800.safetensors"}), "files of the same folder"),
    "another kind of file": (_index({"a": "config.json"}), "files of the same folder"),
    "a file of no text": (_index({"a": 1}), "files of the same folder"),
    "a shard that is missing": (_index({"a": "b.safetensors"}), r"b\.safetensors: cannot be read"),
    "a tensor that is missing": (_index({"a": SHARD, "b": SHARD}), f"{SHARD}: tensor 'b' is missing"),
    "a tensor that the index lacks": (_index({"b": SHARD}), "must say that 'a' is in"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_files_are_refused_in_a_sentence(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(GGUFError, match=message) as caught:
        open_folder(tmp_path)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/[^\n]{{10,700}}\.", str(caught.value))


def test_a_key_that_is_there_twice_is_found_in_a_time_that_grows_with_the_text():
    """Comparing each of these keys with each took 12 seconds, and a header may have millions."""
    text = b"{" + b"".join(b'"%d":0,' % number for number in range(40_000)) + b'"39999":0}'
    begun = time.process_time()
    with pytest.raises(GGUFError, match="key '39999' is there twice"):
        json_file.parse_object(text, "header")
    assert time.process_time() - begun < 2


def test_a_name_is_not_repeated_at_length(tmp_path):
    header = {"x" * 100_000: dict(dtype="F12", shape=[], data_offsets=[0, 0])}
    _text(json.dumps(header).encode())(tmp_path)
    with pytest.raises(GGUFError) as caught:
        open_folder(tmp_path)
    assert len(str(caught.value)) < 1000
