"""Writes the GGUF container, version 3, little endian: whole files, or nothing."""

import contextlib
import dataclasses
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from checkpoints_tools.ggml_types import TYPES
from checkpoints_tools.gguf_header import MAGIC, alignment_of
from checkpoints_tools.gguf_metadata import Metadata

_VERSION = 3


@dataclasses.dataclass(frozen=True)
class TensorData:
    """A tensor to be written.

    Attributes:
      name: GGUF name.
      shape: number of weights along each axis in NumPy order.
      ggml_type: key of `ggml_types.TYPES`.
      data: array whose bytes are the tensor's, for example uint8 blocks, fetched from its device on writing;
        or a function that yields such arrays one after another, called when the tensor's turn has come.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    data: Any

    @property
    def num_bytes(self) -> int:
        """Size that the shape and the type ask for."""
        return TYPES[self.ggml_type].num_bytes(self.shape)


def write_gguf(path: str | os.PathLike, metadata: Mapping[str, Any], tensors: Iterable[TensorData]) -> None:
    """Writes a GGUF file beside its place and moves it there when it is complete and on the disk.

    Args:
      path: the file; one that is there is replaced, and kept as it was if anything fails.
      metadata: key-values in the order to be written, of a file or plain values as for `Field.of`. New files
        give `general.alignment`: with 64 or more, readers can use the data in place.
      tensors: the tensors, in the order of the table and of the data.

    Raises:
      ValueError: if a value has no GGUF type, or an array does not have the bytes its tensor needs.
      OSError: if the file cannot be written.
    """
    metadata = metadata if isinstance(metadata, Metadata) else Metadata.of(metadata)
    tensors = list(tensors)
    alignment = alignment_of(metadata)
    with _replacing(os.fspath(path)) as file:
        file.write(_header(metadata, tensors, alignment))
        for tensor in tensors:
            file.write(bytes(-file.tell() % alignment))
            what = f"tensor {tensor.name!r} of shape {tensor.shape} and type {TYPES[tensor.ggml_type].name}"
            parts = tensor.data() if callable(tensor.data) else [tensor.data]
            write_parts(file, parts, tensor.num_bytes, what)
        file.write(bytes(-file.tell() % alignment))


def write_parts(file: BinaryIO, parts: Iterable[Any], num_bytes: int, what: str) -> None:
    """Writes the bytes of arrays one after another.

    Args:
      file: where to.
      parts: the arrays.
      num_bytes: that all of them together have; what goes beyond is not written.
      what: names the tensor in a message.

    Raises:
      ValueError: if they have not that many bytes.
      OSError: if the file cannot be written.
    """
    written = 0
    for part in parts:
        part = np.ascontiguousarray(part)
        written += part.nbytes
        if written <= num_bytes:
            file.write(memoryview(part.reshape(-1).view(np.uint8)))
    if written != num_bytes:
        raise ValueError(f"{what} must have {num_bytes} bytes, got {written}.")


def _header(metadata: Metadata, tensors: list[TensorData], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, field in metadata.fields.items():
        parts += [_string(key), struct.pack("<I", field.type), field.raw]
    offset = 0
    for tensor in tensors:
        dims = tuple(reversed(tensor.shape))
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.ggml_type, offset))
        offset += tensor.num_bytes
        offset += -offset % alignment
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


@contextlib.contextmanager
def _replacing(path: str) -> Iterator:
    """Opens a new file that takes the place of `path` on success and vanishes on failure."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            error.filename = path  # a full disk does not say where
        raise
    sync_folder(os.path.dirname(path) or ".")


def sync_folder(folder: str) -> None:
    """Makes the rename itself last; folders cannot be opened everywhere, and need not be."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
