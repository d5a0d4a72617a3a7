"""Parses the header of a GGUF container: key-values and tensor table, little endian, versions 2 and 3.

A file may be anything: each length is checked against the bytes that are left before it is used, and nothing
is allocated on the word of the file alone.
"""

import dataclasses
import struct
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from checkpoints_tools.ggml_types import TYPES
from checkpoints_tools.gguf_metadata import ARRAY, BOOL, SCALARS, STRING, Field, Metadata

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

_MAX_KEYS = 100_000
_MAX_KEY_BYTES = 65_535
_MAX_VALUE_BYTES = 1 << 30  # a vocabulary takes some MiB
_MAX_TENSORS = 10_000_000
_MAX_NAME_BYTES = 127  # ggml allows 63; names up to this are seen in files of other programs
_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 2
_MAX_ALIGNMENT = 1 << 20
_WINDOW_BYTES = 1 << 20
_MAX_SHOWN = 80  # characters of a key or a value in a message

_U32, _U64, _ARRAY_HEAD = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")
_SCALAR_BYTES = {value_type: struct.calcsize(f"<{letter}") for value_type, letter in SCALARS.items()}
_ROWS = [struct.Struct(f"<{'Q' * num_dims}IQ") for num_dims in range(_MAX_DIMS + 1)]


class GGUFError(ValueError):
    """A file that is not a sound GGUF, or not a model that can be read; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
      name: GGUF name.
      shape: number of weights along each axis in NumPy order, the reverse of ggml's.
      ggml_type: key of `ggml_types.TYPES`.
      offset: position of the first byte in the file.
      num_bytes: size of the data.
      path: the file that holds the data; with split files not always the first one.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    num_bytes: int
    path: str

    @property
    def type_name(self) -> str:
        """Name of the type, for example "q8_0"."""
        return TYPES[self.ggml_type].name


def read_header(file: BinaryIO, path: str, size: int) -> tuple[Metadata, dict[str, TensorInfo]]:
    """Reads and checks everything in front of the tensor data.

    Args:
      file: the container, unbuffered.
      path: its path, for messages.
      size: its size in bytes; the tensors must lie within.

    Returns:
      Key-values, and the tensor table by name in file order.

    Raises:
      GGUFError: if the file breaks a rule of the format.
      OSError: if it cannot be read.
    """
    reader = _Reader(file, path, size)
    num_tensors = _read_start(reader)
    metadata = _read_metadata(reader)
    try:
        alignment = alignment_of(metadata)
    except ValueError as error:
        raise GGUFError(f"{path}: {error}") from None
    return metadata, _read_tensor_table(reader, num_tensors, alignment)


def alignment_of(metadata: Metadata) -> int:
    """Returns the alignment of tensor data that the metadata declares.

    Raises:
      ValueError: if it is no power of two up to 1 MiB.
    """
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power = type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0
    if not is_power or alignment > _MAX_ALIGNMENT:
        raise ValueError(
            f"key 'general.alignment' must be a power of two up to {_MAX_ALIGNMENT}, got {shown(alignment)}."
        )
    return alignment


def shown(value: object) -> str:
    """Returns the `repr` of a value from a file, cut to what a message can take."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


class _Reader:
    """Reads forwards through the header, a window of the file at a time."""

    def __init__(self, file: BinaryIO, path: str, size: int):
        self.file, self.path, self.size = file, path, size
        self.offset = 0
        self._window, self._base = b"", 0

    def fail(self, what: str, at: int | None = None) -> GGUFError:
        return GGUFError(f"{self.path}: at byte {self.offset if at is None else at}: {what}")

    def window_at(self, offset: int, count: int) -> tuple[bytes, int]:
        """Returns bytes of the file with at least `count` from `offset` on, and where in them that is.

        They must be within the size of the file.
        """
        at = offset - self._base
        if at < 0 or at + count > len(self._window):
            self.file.seek(offset)
            self._window = self.file.read(min(max(count, _WINDOW_BYTES), self.size - offset))
            self._base, at = offset, 0
            if len(self._window) < count:
                raise self.fail(f"{count} bytes were there, only {len(self._window)} could be read.", offset)
        return self._window, at

    def take(self, count: int, what: str) -> tuple[bytes, int]:
        """Moves past `count` bytes; returns the window they are in and where in it they begin."""
        window, at = self._window, self.offset - self._base
        if at < 0 or at + count > len(window):
            self._check(count, what)
            window, at = self.window_at(self.offset, count)
        self.offset += count
        return window, at

    def _check(self, count: int, what: str) -> None:
        left = self.size - self.offset
        if count > left:
            raise self.fail(f"{what} needs {count} bytes, {left} are left; the file is cut off or damaged.")
        if count > _MAX_VALUE_BYTES:
            raise self.fail(f"{what} must have at most {_MAX_VALUE_BYTES} bytes, got {count}.")

    def read(self, count: int, what: str) -> bytes:
        window, at = self.take(count, what)
        return window[at : at + count]

    def unpack(self, form: struct.Struct, what: str) -> tuple:
        return form.unpack_from(*self.take(form.size, what))

    def name(self, what: str, max_bytes: int) -> str:
        start = self.offset
        (length,) = self.unpack(_U64, f"the length of a {what}")
        if not 0 < length <= max_bytes:
            raise self.fail(f"a {what} must have 1 to {max_bytes} bytes, got {length}.", start)
        try:
            return self.read(length, f"a {what}").decode()
        except UnicodeDecodeError:
            raise self.fail(f"a {what} must be UTF-8, got other bytes.", start) from None


def _read_start(reader: _Reader) -> int:
    """Leaves the reader before the number of keys and returns the number of tensors."""
    magic = reader.read(min(4, reader.size), "the magic")
    if magic != MAGIC:
        raise GGUFError(f"{reader.path}: is not a GGUF file: it must begin with {MAGIC!r}, got {magic!r}.")
    (version,) = reader.unpack(_U32, "the version")
    if version in (0x02000000, 0x03000000):
        raise GGUFError(f"{reader.path}: is a big-endian GGUF file, only little endian is supported.")
    if version not in (2, 3):
        raise GGUFError(f"{reader.path}: GGUF version must be 2 or 3, got {version}.")
    (num_tensors,) = reader.unpack(_U64, "the number of tensors")
    if num_tensors > _MAX_TENSORS:
        raise reader.fail(f"at most {_MAX_TENSORS} tensors are supported, {num_tensors} are declared.", 8)
    return num_tensors


def _read_metadata(reader: _Reader) -> Metadata:
    (num_keys,) = reader.unpack(_U64, "the number of keys")
    if num_keys > _MAX_KEYS:
        raise reader.fail(f"at most {_MAX_KEYS} keys are supported, {num_keys} are declared.", 16)
    fields: dict[str, Field] = {}
    for _ in range(num_keys):
        start = reader.offset
        key = reader.name("key", _MAX_KEY_BYTES)
        what = f"key {shown(key)}"
        if key in fields:
            raise reader.fail(f"{what} is there twice.", start)
        (value_type,) = reader.unpack(_U32, f"the type of {what}")
        start = reader.offset
        _skip_value(reader, value_type, what, 0)
        length, reader.offset = reader.offset - start, start
        fields[key] = Field(value_type, reader.read(length, what))
    return Metadata(fields)


def _skip_value(reader: _Reader, value_type: int, what: str, depth: int) -> None:
    """Moves past one value, checking everything that decoding will rely on."""
    if value_type in SCALARS:
        window, at = reader.take(_SCALAR_BYTES[value_type], what)
        if value_type == BOOL and window[at] > 1:
            raise reader.fail(f"{what} must be a bool of byte 0 or 1, got {window[at]}.", reader.offset - 1)
    elif value_type == STRING:
        _skip_strings(reader, 1, what)
    elif value_type == ARRAY:
        if depth == _MAX_ARRAY_DEPTH:
            raise reader.fail(f"{what} nests arrays deeper than {_MAX_ARRAY_DEPTH}.")
        element_type, count = reader.unpack(_ARRAY_HEAD, f"the array of {what}")
        _skip_elements(reader, element_type, count, what, depth)
    else:
        raise reader.fail(f"{what} has the unknown value type {value_type}.")


def _skip_elements(reader: _Reader, element_type: int, count: int, what: str, depth: int) -> None:
    if element_type in SCALARS:
        start = reader.offset
        window, at = reader.take(count * _SCALAR_BYTES[element_type], f"{what}, {count} elements,")
        if element_type == BOOL and np.any(np.frombuffer(window, np.uint8, count, at) > 1):
            raise reader.fail(f"{what} must hold bools of byte 0 or 1, got others.", start)
    elif element_type == STRING:
        _skip_strings(reader, count, what)
    elif element_type == ARRAY:
        for _ in range(count):  # ends with the file: each takes at least 12 bytes of it
            _skip_value(reader, ARRAY, what, depth + 1)
    else:
        raise reader.fail(f"{what} has elements of the unknown value type {element_type}.")


def _skip_strings(reader: _Reader, count: int, what: str) -> None:
    """Moves past `count` strings; written for vocabularies, so a string costs two additions and a look."""
    left = reader.size - reader.offset
    if count * 8 > left:
        raise reader.fail(f"{what} declares {count} strings, {left} bytes are left.")
    unpack_length = _U64.unpack_from
    offset, start, window, base = reader.offset, reader.offset, b"", reader.offset
    for _ in range(count):
        at = offset - base
        if at + 8 > len(window):
            if offset + 8 > reader.size:
                break
            window, at = reader.window_at(offset, 8)
            base = offset - at
        start = offset
        offset += 8 + unpack_length(window, at)[0]
    else:
        if offset <= reader.size:
            reader.offset = offset
            return
    raise reader.fail(f"{what} has a string that ends after the file, of {reader.size} bytes.", start)


def _read_tensor_table(reader: _Reader, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    rows: dict[str, tuple] = {}
    for _ in range(num_tensors):
        start = reader.offset
        name = reader.name("tensor name", _MAX_NAME_BYTES)
        if name in rows:
            raise reader.fail(f"tensor {name!r} is there twice.", start)
        rows[name] = _read_row(reader, name, alignment)
    data_start = reader.offset + -reader.offset % alignment
    tensors = {
        name: TensorInfo(name, shape, ggml_type, data_start + offset, num_bytes, reader.path)
        for name, (shape, ggml_type, offset, num_bytes) in rows.items()
    }
    _check_extents(tensors.values(), data_start, reader)
    return tensors


def _read_row(reader: _Reader, name: str, alignment: int) -> tuple[tuple[int, ...], int, int, int]:
    """Reads a row of the table after its name: shape, type, offset in the data, and bytes."""
    what, start = f"tensor {name!r}", reader.offset
    (num_dims,) = reader.unpack(_U32, what)
    if num_dims > _MAX_DIMS:
        raise reader.fail(f"{what} must have at most {_MAX_DIMS} dimensions, got {num_dims}.", start)
    *dims, ggml_type, offset = reader.unpack(_ROWS[num_dims], what)
    shape = tuple(dims[::-1])
    if ggml_type not in TYPES:
        raise reader.fail(f"{what} has the unknown type {ggml_type}.", start)
    entry = TYPES[ggml_type]
    row_size = shape[-1] if shape else 1
    if 0 in shape or row_size % entry.block_size:
        raise reader.fail(
            f"{what} of type {entry.name} must have rows of a positive multiple of {entry.block_size} "
            f"weights, got shape {shape}.",
            start,
        )
    num_rows = shape[-2] if num_dims > 1 else 1
    if num_rows % entry.rows_per_group:
        raise reader.fail(
            f"{what} of type {entry.name} must have a multiple of {entry.rows_per_group} rows, "
            f"got shape {shape}.",
            start,
        )
    if offset % alignment:
        raise reader.fail(f"{what} must begin at a multiple of {alignment}, got offset {offset}.", start)
    return shape, ggml_type, offset, entry.num_bytes(shape)


def _check_extents(tensors: Iterable[TensorInfo], data_start: int, reader: _Reader) -> None:
    """Checks that tensors lie within the file and apart from each other."""
    end, previous = data_start, None
    for info in sorted(tensors, key=lambda info: info.offset):
        what = f"{reader.path}: tensor {info.name!r} at byte {info.offset}"
        if info.offset < end:
            raise GGUFError(f"{what} overlaps tensor {previous!r}, which ends at byte {end}.")
        end, previous = info.offset + info.num_bytes, info.name
        if end > reader.size:
            raise GGUFError(
                f"{what} needs {info.num_bytes} bytes, {max(0, reader.size - info.offset)} are left; "
                "the file is cut off or damaged."
            )
