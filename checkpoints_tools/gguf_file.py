"""GGUF files as containers, also split over several files: opening and checking them, and reading tensors.

Knows nothing about models. The header is checked whole when a file is opened, tensor data is read when it is
asked for. A file must not change in use.
"""

import contextlib
import dataclasses
import mmap
import os
import re
import stat as stat_lib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from checkpoints_tools.buffers import aligned_empty
from checkpoints_tools.gguf_header import GGUFError, TensorInfo, read_header, shown
from checkpoints_tools.gguf_metadata import Metadata

_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once
_MAX_PARTS = 99_999  # what five digits of a name count
_SPLIT_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


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

    def read(
        self, name: str, start: int = 0, size: int | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads the bytes of one tensor, or some of them.

        Args:
          name: key of `tensors`.
          start: first byte, counted from the tensor's first.
          size: number of bytes; None for all that follow.
          out: uint8[size or more] to read into; None for memory that JAX can adopt on the CPU, see
            `buffers.aligned_empty`.

        Returns:
          uint8[size].

        Raises:
          GGUFError: if the file cannot be read, or is not the one that was opened any more.
        """
        info = self.tensors[name]
        size = info.num_bytes - start if size is None else size
        data = aligned_empty(size) if out is None else out[:size]
        done = read_at(info.path, self._stats[info.path], info.offset + start, data)
        if done < size:
            raise GGUFError(
                f"{info.path}: tensor {name!r} at byte {info.offset} ends after {start + done} of "
                f"{info.num_bytes} bytes."
            )
        return data

    def map_parts(self) -> dict[str, np.ndarray]:
        """Maps the file for reading alone: path of each part -> uint8[its bytes], which cannot be written.

        Pages are read when they are used; a file that is truncated in the meantime ends the process then.

        Raises:
          GGUFError: if the file cannot be mapped, or is not the one that was opened any more.
        """
        parts = {}
        for path, stat in self._stats.items():
            with _opened_again(path, stat) as file:
                parts[path] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return parts

    def read_pieces(self, name: str, max_bytes: int) -> Iterator[np.ndarray]:
        """Yields the bytes of one tensor as `read` does, at most `max_bytes` at a time."""
        num_bytes = self.tensors[name].num_bytes
        for start in range(0, num_bytes, max_bytes):
            yield self.read(name, start, min(max_bytes, num_bytes - start))


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Opens a GGUF file and checks its header; of split files all parts, given the first.

    Args:
      path: the file, or the first part `*-00001-of-0000N.gguf`.

    Returns:
      The container. No tensor data has been read.

    Raises:
      GGUFError: if the file cannot be read or breaks a rule of the format.
    """
    path = os.fsdecode(path)
    first = _open_part(path)
    num_parts = first.metadata.get("split.count", 1)
    if type(num_parts) is not int or not 0 <= num_parts <= _MAX_PARTS:
        raise GGUFError(
            f"{path}: key 'split.count' must be an integer in [0, {_MAX_PARTS}], got {shown(num_parts)}."
        )
    if num_parts <= 1:
        return first
    tensors: dict[str, TensorInfo] = {}
    stats: dict[str, tuple[int, int]] = {}
    for index, part_path in enumerate(_part_paths(path, num_parts)):
        part = _open_part(part_path) if index else first
        _check_part(part, first, index, num_parts)
        for name, info in part.tensors.items():
            if name in tensors:
                raise GGUFError(f"{part.path}: tensor {name!r} is also in {tensors[name].path}.")
            tensors[name] = info
        stats |= part._stats
    _check_key(first, "split.tensors.count", len(tensors))
    fields = {key: field for key, field in first.metadata.fields.items() if not key.startswith("split.")}
    return GGUFFile(path, Metadata(fields), tensors, stats)


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


def _check_part(part: GGUFFile, first: GGUFFile, index: int, num_parts: int) -> None:
    _check_key(part, "split.no", index)
    _check_key(part, "split.count", num_parts)
    architecture = "general.architecture"  # later parts need not say it
    if architecture in part.metadata:
        _check_key(part, architecture, first.metadata.get(architecture))


def _check_key(part: GGUFFile, key: str, expected: object) -> None:
    found = part.metadata.get(key)
    if type(found) is not type(expected) or found != expected:
        raise GGUFError(f"{part.path}: key {key!r} must be {shown(expected)}, got {shown(found)}.")


def _open_part(path: str) -> GGUFFile:
    with opened(path) as file:
        stat = size_and_time(file)
        metadata, tensors = read_header(file, path, stat[0])
    return GGUFFile(path, metadata, tensors, {path: stat})


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Opens a regular file without waiting for anything; what the system refuses is a `GGUFError`."""
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if not stat_lib.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise GGUFError(f"{path}: cannot be read: it must be a regular file, not a pipe or a device.")
            yield file
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}.") from error


def read_at(path: str, stat: tuple[int, int], offset: int, data: np.ndarray) -> int:
    """Fills an array with the bytes of a file.

    Args:
      path: the file.
      stat: `size_and_time` of it when it was opened first.
      offset: of the first byte in the file.
      data: uint8[size], which is written.

    Returns:
      How many bytes there were, less than asked for at the end of the file.

    Raises:
      GGUFError: if the file cannot be read, or is not the one that was opened first any more.
    """
    view, done = memoryview(data), 0
    with _opened_again(path, stat) as file:
        file.seek(offset)
        while done < len(view):
            count = file.readinto(view[done : done + _READ_BYTES])
            if not count:
                break
            done += count
    return done


@contextlib.contextmanager
def _opened_again(path: str, stat: tuple[int, int]) -> Iterator[BinaryIO]:
    with opened(path) as file:
        if size_and_time(file) != stat:
            raise GGUFError(f"{path}: the file must not change while it is read, but it did.")
        yield file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its other end


def size_and_time(file: BinaryIO) -> tuple[int, int]:
    """Returns what tells whether a file was changed since: its size and when it was last written, in ns."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns
