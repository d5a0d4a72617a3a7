"""Reads importance matrices: how much each column of a weight matters, as `llama-imatrix` has counted it.

The importance of a column is the mean square of what it was multiplied by. There are two kinds of file: GGUF
files of the general type "imatrix", and the older format ("legacy", `.dat`) that ik_llama.cpp writes.

Source: tools/imatrix and common/imatrix-loader.cpp of llama.cpp, examples/imatrix of ik_llama.cpp.
"""

import io
import os
import struct
from collections.abc import Sequence

import numpy as np

from checkpoints_tools.gguf_file import GGUFError, GGUFFile, open_gguf, opened
from checkpoints_tools.gguf_header import MAGIC, TensorInfo, shown

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_ENTRIES = 1_000_000
_MAX_NAME_BYTES = 1024
_INT = struct.Struct("<i")


def read_imatrix(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the importance of the columns of weights.

    Args:
      path: the file, of either kind.

    Returns:
      GGUF name of a weight -> float32[size], finite and not negative, which broadcasts to the weight; for
      experts float32[experts, 1, size]. Legacy files do not say which weights are experts: of these they give
      float32[experts * size], which `fit` puts in shape. Experts that saw no token have ones.

    Raises:
      GGUFError: if the file cannot be read, is no sound importance matrix, or holds numbers that are negative
        or not finite.
    """
    path = os.fspath(path)
    with opened(path) as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    return _read_gguf(open_gguf(path)) if is_gguf else _read_legacy(path)


def fit(importance: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Shapes an importance for the weight that it belongs to.

    Args:
      importance: float32[...], from `read_imatrix`.
      shape: of the weight.

    Returns:
      float32[experts, 1, size] if the weight is [experts, rows, size] and there is a number for each column
      of each expert; otherwise the importance as it was, which may not fit.
    """
    if len(shape) == 3 and importance.shape == (shape[0] * shape[2],) and shape[0] > 1:
        return importance.reshape(shape[0], 1, shape[2])
    return importance


def _read_gguf(file: GGUFFile) -> dict[str, np.ndarray]:
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise GGUFError(f"{file.path}: key 'general.type' must be 'imatrix', got {shown(kind)}.")
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if not names:
        raise GGUFError(f"{file.path}: must hold tensors named *{_SUMS}, got none.")
    return {name: _mean(file, name) for name in names}


def _mean(file: GGUFFile, name: str) -> np.ndarray:
    if name + _COUNTS not in file.tensors:
        raise GGUFError(f"{file.path}: tensor {name + _COUNTS!r} must be beside {name + _SUMS!r}, it is not.")
    sums, counts = (_numbers(file, file.tensors[name + end]) for end in (_SUMS, _COUNTS))
    size = sums.shape[-1] if sums.ndim else 1
    sums = sums.reshape(-1, size)
    if counts.size != len(sums):
        raise GGUFError(
            f"{file.path}: tensor {name + _COUNTS!r} must have {len(sums)} numbers, one for each row of "
            f"{name + _SUMS!r}, got {counts.size}."
        )
    counts = counts.reshape(-1, 1)
    with np.errstate(over="ignore"):
        mean = np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.float32(1))
    if not np.isfinite(mean).all():
        raise GGUFError(f"{file.path}: tensor {name + _SUMS!r} must have finite means, got one that is not.")
    return mean[0] if len(mean) == 1 else mean[:, None, :]


def _numbers(file: GGUFFile, info: TensorInfo) -> np.ndarray:
    if info.type_name != "f32":
        raise GGUFError(
            f"{info.path}: tensor {info.name!r} at byte {info.offset} must be f32, got {info.type_name}."
        )
    numbers = file.read(info.name).view("<f4").reshape(info.shape)
    return _checked(numbers, f"{info.path}: tensor {info.name!r} at byte {info.offset}")


def _checked(numbers: np.ndarray, what: str) -> np.ndarray:
    if not (numbers >= 0).all() or np.isinf(numbers).any():
        raise GGUFError(f"{what} must hold finite numbers that are not negative, got another one.")
    return numbers


def _read_legacy(path: str) -> dict[str, np.ndarray]:
    """Reads the number of entries, the entries, and what some writers have after them: a count and a text."""
    with opened(path) as raw:
        reader = _Reader(path, io.BufferedReader(raw), os.fstat(raw.fileno()).st_size)
        num_entries = reader.integer("the number of entries, with which an imatrix begins,", 1, _MAX_ENTRIES)
        entries: dict[str, np.ndarray] = {}
        for _ in range(num_entries):
            start = reader.offset
            name, values = reader.entry()
            if name in entries:
                raise reader.fail(f"entry {shown(name)} is there twice.", start)
            entries[name] = values
        if reader.left:
            reader.integer("the number of the last call", -(2**31))
            reader.read(reader.integer("the length of the name of the data", 0), "the name of the data")
        if reader.left:
            raise reader.fail(f"the file must end here, got {reader.left} bytes more.")
    return entries


class _Reader:
    """Reads forwards through a legacy file."""

    def __init__(self, path: str, file: io.BufferedReader, size: int):
        self.path, self.file, self.left = path, file, size
        self.offset = 0

    def fail(self, what: str, at: int | None = None) -> GGUFError:
        return GGUFError(f"{self.path}: at byte {self.offset if at is None else at}: {what}")

    def read(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.fail(
                f"{what} needs {count} bytes, {self.left} are left; it is no importance matrix, or damaged."
            )
        data = self.file.read(count)
        if len(data) < count:
            raise self.fail(f"{count} bytes were there, only {len(data)} could be read.")
        self.offset, self.left = self.offset + count, self.left - count
        return data

    def integer(self, what: str, lowest: int, highest: int = 2**31 - 1) -> int:
        start = self.offset
        (number,) = _INT.unpack(self.read(_INT.size, what))
        if not lowest <= number <= highest:
            raise self.fail(f"{what} must be {lowest} to {highest}, got {number}.", start)
        return number

    def entry(self) -> tuple[str, np.ndarray]:
        """Reads a name, by what the numbers are to be divided (if it is not 0), and the numbers."""
        start = self.offset
        length = self.integer("the length of a name", 1, _MAX_NAME_BYTES)
        try:
            name = self.read(length, "a name").decode()
        except UnicodeDecodeError:
            raise self.fail("a name must be UTF-8, got other bytes.", start) from None
        num_calls = self.integer(f"the number of calls of {shown(name)}", 0)
        count = self.integer(f"the size of {shown(name)}", 1)
        start = self.offset
        values = np.frombuffer(self.read(4 * count, f"entry {shown(name)}"), "<f4")
        values = _checked(values, f"{self.path}: entry {shown(name)} at byte {start}")
        return name, values / np.float32(max(num_calls, 1))
