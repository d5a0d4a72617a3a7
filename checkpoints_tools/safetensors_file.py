"""Reads the tensors of a Hugging Face checkpoint: `model.safetensors`, or the shards that an index names.

Knows nothing about models. A file may be anything: each length is checked against the bytes that are there
before it is used, and nothing is read but headers and the rows that are asked for.
"""

import dataclasses
import io
import math
import os
import struct

import ml_dtypes
import numpy as np

from checkpoints_tools import json_file
from checkpoints_tools.gguf_file import GGUFError, opened, read_at, size_and_time

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPES = {  # those that weights are read from
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_SIZES |= {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}

_MAX_HEADER_BYTES = 100_000_000  # as the format has it
_MAX_DIMS = 8


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
      name: its name there.
      dtype: as the format spells it, for example "BF16".
      shape: number of elements along each axis.
      offset: position of the first byte in the file.
      path: the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    path: str

    def fail(self, what: str) -> GGUFError:
        """Returns the error that says `what` is wrong with the tensor."""
        return GGUFError(f"{self.path}: tensor {self.name!r} {what}.")


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder:
    """A checked checkpoint, of which only headers have been read; its files must not change.

    Attributes:
      path: the folder, or the file if only one was opened.
      tensors: tensors by name, file after file.
    """

    path: str
    tensors: dict[str, StoredTensor]
    _stats: dict[str, tuple[int, int]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads a tensor, or some of its rows.

        Args:
          name: key of `tensors`, of a dtype in `DTYPES`.
          start: first row, along the first axis.
          stop: row after the last one; None for all that follow.

        Returns:
          The rows in the tensor's own dtype.

        Raises:
          GGUFError: if the file cannot be read, or is not the one that was opened any more.
        """
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        rows = info.shape[0] if info.shape else 1
        stop = rows if stop is None else stop
        row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
        data = np.empty((stop - start) * row_bytes, np.uint8)
        done = read_at(info.path, self._stats[info.path], info.offset + start * row_bytes, data)
        if done < data.size:
            raise info.fail(f"ends {data.size - done} bytes too early")
        return data.view(dtype).reshape(stop - start, *info.shape[1:])


def open_folder(folder: str | os.PathLike) -> SafetensorsFolder:
    """Opens a checkpoint and checks the headers of all its files.

    Args:
      folder: holds `model.safetensors`, or else `model.safetensors.index.json` and the files it names.

    Returns:
      The checkpoint. No tensor has been read.

    Raises:
      GGUFError: if a file is missing, cannot be read or breaks a rule of the format, or if the index and the
        files differ.
    """
    folder = os.fspath(folder)
    single, index = os.path.join(folder, SINGLE_NAME), os.path.join(folder, INDEX_NAME)
    if os.path.exists(single) or not os.path.exists(index):
        return dataclasses.replace(open_file(single), path=folder)
    file_of = _weight_map(index)
    tensors, stats = {}, {}
    for file_name in dict.fromkeys(file_of.values()):
        path = os.path.join(folder, file_name)
        found, stats[path] = _open_file(path)
        for name in found:
            if file_of.get(name) != file_name:
                raise GGUFError(f"{index}: key 'weight_map' must say that {name!r:.160} is in {file_name}.")
        tensors |= found
    missing = next((name for name in file_of if name not in tensors), None)
    if missing is not None:
        raise GGUFError(f"{os.path.join(folder, file_of[missing])}: tensor {missing!r:.160} is missing.")
    return SafetensorsFolder(folder, tensors, stats)


def open_file(path: str | os.PathLike) -> SafetensorsFolder:
    """Opens a single file and checks its header; errors as for `open_folder`."""
    path = os.fspath(path)
    tensors, stat = _open_file(path)
    return SafetensorsFolder(path, tensors, {path: stat})


def _weight_map(path: str) -> dict[str, str]:
    """Reads which file holds each tensor; the files must lie beside the index."""
    weight_map = json_file.read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GGUFError(
            f"{path}: key 'weight_map' must be an object of tensor names, got {weight_map!r:.80}."
        )
    for name, file_name in weight_map.items():
        is_plain = isinstance(file_name, str) and file_name.isprintable() and not set(file_name) & set("/\\")
        if not is_plain or not file_name.endswith(".safetensors"):
            raise GGUFError(
                f"{path}: key 'weight_map' must name .safetensors files of the same folder, "
                f"got {file_name!r:.80} for {name!r:.160}."
            )
    return weight_map


def _open_file(path: str) -> tuple[dict[str, StoredTensor], tuple[int, int]]:
    with opened(path) as raw, io.BufferedReader(raw) as file:
        stat = size_and_time(file)
        header = _read_header(file, path, stat[0])
    values = json_file.parse_object(header, f"{path}: the header")
    values.pop("__metadata__", None)
    start = 8 + len(header)
    entries = [_entry(name, value, path, start) for name, value in values.items()]
    end, previous = start, None
    for info, info_end in sorted(entries, key=lambda entry: (entry[0].offset, entry[1])):
        if info.offset != end:
            after = "at the start of the data" if previous is None else f"where tensor {previous!r} ends"
            raise info.fail(f"must begin at byte {end}, {after}, got {info.offset}")
        end, previous = info_end, info.name
        if end > stat[0]:
            raise info.fail(f"ends at byte {end} of {stat[0]}; the file is cut off or damaged")
    if end != stat[0]:
        raise GGUFError(f"{path}: must end at byte {end}, where its last tensor does, got {stat[0]} bytes.")
    return {info.name: info for info, _ in entries}, stat


def _read_header(file, path: str, size: int) -> bytes:
    raw = file.read(8)
    length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise GGUFError(f"{path}: is not a safetensors file: its first 8 bytes are {raw!r}, no length.")
    if length > size - 8:
        raise GGUFError(f"{path}: the header needs {length} bytes, {size - 8} are left; it is cut off.")
    return file.read(length)


def _entry(name: str, value: object, path: str, start: int) -> tuple[StoredTensor, int]:
    """Checks one tensor of the header; returns it and the position of the byte after it."""
    what = f"{path}: tensor {name!r:.160}"
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise GGUFError(f"{what} must have a dtype of the format, got {dtype!r:.80}.")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise GGUFError(f"{what} must have a shape of at most {_MAX_DIMS} sizes, got {shape!r:.80}.")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise GGUFError(f"{what} must have two data_offsets, got {offsets!r:.80}.")
    num_bytes = math.prod(shape) * _SIZES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise GGUFError(
            f"{what} of dtype {dtype} and shape {tuple(shape)} must have {num_bytes} bytes, "
            f"got data_offsets {offsets}."
        )
    return StoredTensor(name, dtype, tuple(shape), start + offsets[0], path), start + offsets[1]


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
