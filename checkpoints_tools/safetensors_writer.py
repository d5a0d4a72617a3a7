"""Writes safetensors files tensor by tensor, in shards of a bounded size with the index that names them."""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator

import ml_dtypes
import numpy as np

from checkpoints_tools.gguf_writer import write_parts
from checkpoints_tools.progress import Progress
from checkpoints_tools.safetensors_file import INDEX_NAME, SINGLE_NAME
from checkpoints_tools.split import groups_within

DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SPELLINGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in the header
_ALIGNMENT = 8  # of the data in the file


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Attributes:
      name: its name in the file.
      shape: number of elements along each axis.
      dtype: key of `DTYPES`.
      parts: yields arrays of this dtype one after another, called when the tensor's turn has come.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_shards(folder: str, tensors: list[NewTensor], max_bytes: int, progress: Progress) -> None:
    """Writes `model.safetensors`, or if that is too large its shards and their index, into a new folder.

    Args:
      folder: where they go. It is the caller's to sync it and to move it to its place.
      tensors: the tensors. Within a file wide numbers come first, so that all are aligned.
      max_bytes: of tensors in a file; a larger tensor has a file of its own.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor.

    Raises:
      ValueError: if the parts of a tensor do not have the bytes that it needs.
      OSError: if a file cannot be written.
    """
    shards = groups_within(tensors, max_bytes=max_bytes)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    done = bytes_done = 0
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        for tensor in _write(os.path.join(folder, name), shard):
            done, bytes_done = done + 1, bytes_done + tensor.num_bytes
            progress(done, len(tensors), bytes_done, num_bytes)
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        with open(os.path.join(folder, INDEX_NAME), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)


def _write(path: str, tensors: list[NewTensor]) -> Iterator[NewTensor]:
    """Yields each tensor when it has been written."""
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    with open(path, "xb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            what = f"tensor {tensor.name!r} of shape {tensor.shape} and dtype {tensor.dtype}"
            parts = (np.asarray(part, DTYPES[tensor.dtype]) for part in tensor.parts())
            write_parts(file, parts, tensor.num_bytes, what)
            yield tensor


def _header(tensors: list[NewTensor]) -> bytes:
    values, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        offsets = [offset, offset + tensor.num_bytes]
        values[tensor.name] = {
            "dtype": _SPELLINGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        offset = offsets[1]
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
