"""Reads the GGUF container: header, key-values and tensor table, little endian, versions 2 and 3, also split.

Knows nothing about models. A file may be anything: each length is checked against the bytes that are left
before it is used, and nothing is allocated on the word of the file alone. A file must not change in use.
"""

import dataclasses
import math
import os
import re
import stat as stat_lib
import struct

import numpy as np

from checkpoints_tools.ggml_types import TYPES
from checkpoints_tools.gguf_metadata import ARRAY, BOOL, SCALARS, STRING, Field, Metadata

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
BUFFER_ALIGNMENT = 64  # what XLA asks of a host buffer that it adopts without a copy

_MAX_KEYS = 100_000
_MAX_KEY_BYTES = 65_535
_MAX_TENSORS = 10_000_000
_MAX_NAME_BYTES = 127  # ggml allows 63; names up to this are seen in files of other programs
_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 2
_MAX_ALIGNMENT = 1 << 20
_WINDOW_BYTES = 1 << 20
_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


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


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A checked container, of which only the header has been read.

    Attributes:
      path: path as given; the first part of split files.
      metadata: key-values; of split files those of the first part without the `split.*` keys.
      tensors: tensor table by name in file order, all parts one after the other.
    """

    path: str
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    _stats: dict[str, tuple[int, int]]

    def read(self, name: str, start: int = 0, size: int | None = None) -> np.ndarray:
        """Reads the bytes of one tensor, or some of them.

        Args:
          name: key of `tensors`.
          start: first byte, counted from the tensor's first.
          size: number of bytes; None for all that follow.

        Returns:
          uint8[size], its address a multiple of `BUFFER_ALIGNMENT`, so that JAX can adopt it on the CPU.

        Raises:
          GGUFError: if the file cannot be read, or is not the one that was opened any more.
        """
        info = self.tensors[name]
        size = info.num_bytes - start if size is None else size
        data = aligned_empty(size)
        view, done = memoryview(data), 0
        try:
            with open(info.path, "rb", buffering=0) as file:
                if _stat(file) != self._stats[info.path]:
                    raise GGUFError(f"{info.path}: the file must not change while it is read, but it did.")
                file.seek(info.offset + start)
                while done < size:
                    count = file.readinto(view[done : done + _READ_BYTES])
                    if not count:
                        raise GGUFError(
                            f"{info.path}: tensor {name!r} at byte {info.offset} ends after {start + done} "
                            f"of {info.num_bytes} bytes."
                        )
                    done += count
        except OSError as error:
            raise GGUFError(f"{info.path}: cannot be read: {error.strerror}.") from error
        return data


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Opens a GGUF file and checks its header; of split files all parts, given the first.

    Args:
      path: the file, or the first part `*-00001-of-0000N.gguf`.

    Returns:
      The container. No tensor data has been read.

    Raises:
      GGUFError: if the file cannot be read or breaks a rule of the format.
    """
    path = os.fspath(path)
    first = _open_part(path)
    num_parts = first.metadata.get("split.count", 1)
    if type(num_parts) is not int or not 0 <= num_parts <= 99_999:
        raise GGUFError(f"{path}: key 'split.count' must be an integer in [0, 99999], got {num_parts!r}.")
    if num_parts <= 1:
        return first
    parts = [first] + [_open_part(part) for part in _part_paths(path, num_parts)[1:]]
    tensors: dict[str, TensorInfo] = {}
    for index, part in enumerate(parts):
        _check_split_key(part, "split.no", index)
        _check_split_key(part, "split.count", num_parts)
        for name, info in part.tensors.items():
            if name in tensors:
                raise GGUFError(f"{part.path}: tensor {name!r} is also in {tensors[name].path}.")
            tensors[name] = info
    _check_split_key(first, "split.tensors.count", len(tensors))
    fields = {key: field for key, field in first.metadata.fields.items() if not key.startswith("split.")}
    stats = {key: stat for part in parts for key, stat in part._stats.items()}
    return GGUFFile(path, Metadata(fields), tensors, stats)


def aligned_empty(num_bytes: int) -> np.ndarray:
    """Returns an unset uint8[num_bytes] whose address is a multiple of `BUFFER_ALIGNMENT`."""
    data = np.empty(num_bytes + BUFFER_ALIGNMENT, np.uint8)
    start = -data.ctypes.data % BUFFER_ALIGNMENT
    return data[start : start + num_bytes]


def alignment_of(metadata: Metadata) -> int:
    """Returns the alignment of tensor data that the metadata declares.

    Raises:
      ValueError: if it is no power of two up to 1 MiB.
    """
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power = type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0
    if not is_power or alignment > _MAX_ALIGNMENT:
        raise ValueError(
            f"key 'general.alignment' must be a power of two up to {_MAX_ALIGNMENT}, got {_short(alignment)}."
        )
    return alignment


def _part_paths(path: str, num_parts: int) -> list[str]:
    match = _SPLIT_NAME.fullmatch(path)
    if match is None or int(match[3]) != num_parts:
        raise GGUFError(
            f"{path}: is one of {num_parts} parts, so its name must end in -00001-of-{num_parts:05}.gguf."
        )
    if int(match[2]) != 1:
        raise GGUFError(
            f"{path}: is part {int(match[2])} of {num_parts}, open the first, "
            f"{match[1]}-00001-of-{match[3]}.gguf."
        )
    return [f"{match[1]}-{part:05}-of-{match[3]}.gguf" for part in range(1, num_parts + 1)]


def _check_split_key(part: GGUFFile, key: str, expected: int) -> None:
    found = part.metadata.get(key)
    if type(found) is not int or found != expected:
        raise GGUFError(f"{part.path}: key {key!r} must be {expected}, got {_short(found)}.")


def _stat(file) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _open_part(path: str) -> GGUFFile:
    try:
        if stat_lib.S_ISFIFO(os.stat(path).st_mode):  # to open it would wait for its other end
            raise GGUFError(f"{path}: cannot be read: it must be a regular file, not a pipe.")
        with open(path, "rb", buffering=0) as file:
            stat = _stat(file)
            reader = _Reader(file, path, stat[0])
            num_tensors = _read_header(reader)
            metadata = _read_metadata(reader)
            try:
                alignment = alignment_of(metadata)
            except ValueError as error:
                raise GGUFError(f"{path}: {error}") from None
            tensors = _read_tensor_table(reader, num_tensors, alignment)
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}.") from error
    return GGUFFile(path, metadata, tensors, {path: stat})


class _Reader:
    """Reads forwards through the header, a window of the file at a time."""

    def __init__(self, file, path: str, size: int):
        self.file, self.path, self.size = file, path, size
        self.offset = 0
        self._window, self._base = b"", 0

    def fail(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: at byte {self.offset}: {what}")

    def window_at(self, offset: int, count: int) -> tuple[bytes, int]:
        """Returns bytes of the file with at least `count` from `offset` on, and where in them that is."""
        if count > self.size - offset:
            raise self.fail(f"{count} bytes are needed at byte {offset}, {self.size - offset} are left.")
        if not self._base <= offset <= offset + count <= self._base + len(self._window):
            self.file.seek(offset)
            self._window, self._base = self.file.read(max(count, _WINDOW_BYTES)), offset
            if len(self._window) < count:
                raise self.fail(f"{count} bytes were there, only {len(self._window)} could be read.")
        return self._window, offset - self._base

    def read(self, count: int, what: str) -> bytes:
        if count > self.size - self.offset:
            left = self.size - self.offset
            raise self.fail(f"{what} needs {count} bytes, {left} are left; the file is cut off or damaged.")
        window, at = self.window_at(self.offset, count)
        self.offset += count
        return window[at : at + count]

    def unpack(self, letters: str, what: str) -> tuple:
        form = "<" + letters
        return struct.unpack(form, self.read(struct.calcsize(form), what))

    def name(self, what: str, max_bytes: int) -> str:
        (length,) = self.unpack("Q", f"the length of a {what}")
        if not 0 < length <= max_bytes:
            raise self.fail(f"a {what} must have 1 to {max_bytes} bytes, got {length}.")
        try:
            return self.read(length, f"a {what}").decode()
        except UnicodeDecodeError:
            raise self.fail(f"a {what} must be UTF-8, got other bytes.") from None


def _read_header(reader: _Reader) -> int:
    """Leaves the reader before the number of keys and returns the number of tensors."""
    magic = reader.read(min(4, reader.size), "the magic")
    if magic != MAGIC:
        raise GGUFError(f"{reader.path}: is not a GGUF file: it must begin with {MAGIC!r}, got {magic!r}.")
    (version,) = reader.unpack("I", "the version")
    if version in (0x02000000, 0x03000000):
        raise GGUFError(f"{reader.path}: is a big-endian GGUF file, only little endian is supported.")
    if version not in (2, 3):
        raise GGUFError(f"{reader.path}: GGUF version must be 2 or 3, got {version}.")
    (num_tensors,) = reader.unpack("Q", "the number of tensors")
    if num_tensors > _MAX_TENSORS:
        raise reader.fail(f"at most {_MAX_TENSORS} tensors are supported, {num_tensors} are declared.")
    return num_tensors


def _read_metadata(reader: _Reader) -> Metadata:
    (num_keys,) = reader.unpack("Q", "the number of keys")
    if num_keys > _MAX_KEYS:
        raise reader.fail(f"at most {_MAX_KEYS} keys are supported, {num_keys} are declared.")
    fields: dict[str, Field] = {}
    for _ in range(num_keys):
        key = reader.name("key", _MAX_KEY_BYTES)
        if key in fields:
            raise reader.fail(f"key {_short(key)} is there twice.")
        (value_type,) = reader.unpack("I", f"the type of key {_short(key)}")
        start = reader.offset
        _skip_value(reader, value_type, f"key {_short(key)}", 0)
        length, reader.offset = reader.offset - start, start
        fields[key] = Field(value_type, reader.read(length, f"key {_short(key)}"))
    return Metadata(fields)


def _skip_value(reader: _Reader, value_type: int, what: str, depth: int) -> None:
    """Moves past one value, checking everything that decoding will rely on."""
    if value_type in SCALARS:
        raw = reader.read(struct.calcsize(SCALARS[value_type]), what)
        if value_type == BOOL and raw not in (b"\0", b"\1"):
            raise reader.fail(f"{what} must be a bool of byte 0 or 1, got {raw[0]}.")
    elif value_type == STRING:
        _skip_strings(reader, 1, what)
    elif value_type == ARRAY:
        if depth == _MAX_ARRAY_DEPTH:
            raise reader.fail(f"{what} nests arrays deeper than {_MAX_ARRAY_DEPTH}.")
        element_type, count = reader.unpack("IQ", f"the array of {what}")
        _skip_elements(reader, element_type, count, what, depth)
    else:
        raise reader.fail(f"{what} has the unknown value type {value_type}.")


def _skip_elements(reader: _Reader, element_type: int, count: int, what: str, depth: int) -> None:
    if element_type in SCALARS:
        raw = reader.read(count * struct.calcsize(SCALARS[element_type]), f"{what}, {count} elements,")
        if element_type == BOOL and np.any(np.frombuffer(raw, np.uint8) > 1):
            raise reader.fail(f"{what} must hold bools of byte 0 or 1, got others.")
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
    unpack_length = struct.Struct("<Q").unpack_from
    offset, window, base = reader.offset, b"", reader.offset
    for _ in range(count):
        at = offset - base
        if at + 8 > len(window):
            if offset + 8 > reader.size:
                raise reader.fail(f"{what} has a string that ends after the file, of {reader.size} bytes.")
            window, at = reader.window_at(offset, 8)
            base = offset - at
        offset += 8 + unpack_length(window, at)[0]
    reader.offset = offset  # past the end if the last string is: reading the whole value refuses that


def _read_tensor_table(reader: _Reader, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    table: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name = reader.name("tensor name", _MAX_NAME_BYTES)
        if name in table:
            raise reader.fail(f"tensor {name!r} is there twice.")
        table[name] = _read_tensor_info(reader, name, alignment)
    data_start = reader.offset + -reader.offset % alignment
    tensors = {
        name: dataclasses.replace(info, offset=data_start + info.offset) for name, info in table.items()
    }
    end, previous = data_start, None
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        what = f"{reader.path}: tensor {info.name!r} at byte {info.offset}"
        if info.offset < end:
            raise GGUFError(f"{what} overlaps tensor {previous!r}, which ends at byte {end}.")
        end, previous = info.offset + info.num_bytes, info.name
        if end > reader.size:
            raise GGUFError(
                f"{what} needs {info.num_bytes} bytes, {max(0, reader.size - info.offset)} are left; "
                "the file is cut off or damaged."
            )
    return tensors


def _read_tensor_info(reader: _Reader, name: str, alignment: int) -> TensorInfo:
    """Reads a row of the table; its offset is still relative to the data."""
    what = f"tensor {name!r}"
    (num_dims,) = reader.unpack("I", what)
    if num_dims > _MAX_DIMS:
        raise reader.fail(f"{what} must have at most {_MAX_DIMS} dimensions, got {num_dims}.")
    *dims, ggml_type, offset = reader.unpack("Q" * num_dims + "IQ", what)
    shape = tuple(reversed(dims))
    if ggml_type not in TYPES:
        raise reader.fail(f"{what} has the unknown type {ggml_type}.")
    entry = TYPES[ggml_type]
    row_size = shape[-1] if shape else 1
    if 0 in shape or row_size % entry.block_size:
        raise reader.fail(
            f"{what} of type {entry.name} must have rows of a positive multiple of {entry.block_size} "
            f"weights, got shape {shape}."
        )
    if offset % alignment:
        raise reader.fail(f"{what} must begin at a multiple of {alignment}, got offset {offset}.")
    num_bytes = math.prod(shape[:-1]) * entry.row_bytes(row_size)
    return TensorInfo(name, shape, ggml_type, offset, num_bytes, reader.path)
