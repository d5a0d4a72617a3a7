"""GGUF file -> `Checkpoint`: config, parameters and everything else that saving needs."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints_tools import interleave, layout, mapping, names, panels
from checkpoints_tools.buffers import aligned_empty
from checkpoints_tools.ggml_types import TYPES
from checkpoints_tools.gguf_file import GGUFFile, TensorInfo, open_gguf
from checkpoints_tools.gguf_metadata import Metadata
from checkpoints_tools.model_file import check_model
from checkpoints_tools.progress import Progress, ProgressLine
from mla_jax import quant
from mla_jax.config import ModelConfig
from mla_jax.quant import QuantizedTensor

_PIECE_BYTES = 1 << 22  # of tensors that are taken apart, piece by piece so that they are held once
_PLAIN_DTYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnreadTensor:
    """A tensor that the network does not read, as its bytes in host memory."""

    shape: tuple[int, ...]
    ggml_type: int
    data: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model and what its file says about it.

    Attributes:
      config: sizes and constants.
      params: nested dict of arrays f32, f16 or bf16, and `QuantizedTensor`s or, if asked for, `PanelTensor`s;
        paths as in `names`.
      metadata: key-values, as a mapping from key to plain Python value.
      unread: GGUF name -> tensor that the network does not read, for saving.
      file_tensors: tensor table of the file by GGUF name, in file order; empty if the model is of no file.
      path: the file, or None.
    """

    config: ModelConfig
    params: dict[str, Any]
    metadata: Metadata
    unread: Mapping[str, UnreadTensor] = dataclasses.field(default_factory=dict)
    file_tensors: Mapping[str, TensorInfo] = dataclasses.field(default_factory=dict)
    path: str | None = None


def load_gguf(
    path: str | os.PathLike,
    progress: Progress | None = None,
    put: Callable[[str, Any], Any] | None = None,
    *,
    mmap: bool | None = None,
    on_host: Callable[[str], bool] | None = None,
    in_panels: bool | None = False,
) -> Checkpoint:
    """Loads a deepseek2 GGUF file; weights stay quantised, interleaved rows are taken apart.

    Everything is checked before the first weight is read. The bytes are held once: on the CPU, JAX adopts the
    buffers they were read into, or uses them where they lie in the file.

    Args:
      path: the file, or the first part of a split one. It must not change while it is loaded, and if it is
        mapped never.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor. None prints one line
        to stderr, if that is a terminal or loading takes over a second.
      put: called with the GGUF name of each weight and the weight in NumPy arrays, and returns what is to be
        its parameter, such as the same on a device. None puts it on the default device.
      mmap: whether weights on the CPU stay in the file as far as they can, see `mapping`. None: if they take
        more of the memory at hand than `mapping.MOST_OF_MEMORY`.
      on_host: whether the weight of a GGUF name stays in the memory of this machine. None: if the default
        device is the CPU.
      in_panels: whether weights that are read are laid out for the CPU kernels, see `panels`. True: none is
        mapped, so that all are; None: those that are not mapped.

    Returns:
      The checkpoint.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF of supported types.
      ValueError: if weights are to be mapped and in panels.
    """
    if mmap and in_panels:
        raise ValueError("mmap must come without in_panels (run_time_repack): what is laid out is read.")
    file = open_gguf(path)
    config, plan = check_model(file)
    report = progress or ProgressLine(file.path)
    on_host = on_host or (lambda name: jax.default_backend() == "cpu")
    mmap = False if in_panels and mmap is None and panels.formats() else mmap
    views = mapping.views(file, config, arrays=filter(on_host, plan.shapes), kept=plan.unread, mmap=mmap)

    def become(name, weight, is_mapped):
        weight = weight if in_panels is False or is_mapped else panels.lay_out(name, weight, config)
        return jax.device_put(weight) if put is None else put(name, weight)

    leaves, unread = _read_all(file, plan.shapes, views, become, report)
    if in_panels is not False:
        panels.tell(file.path, leaves.values(), is_asked=in_panels)
    return Checkpoint(
        config=config,
        params=names.unflatten(leaves),
        metadata=file.metadata,
        unread=unread,
        file_tensors=file.tensors,
        path=file.path,
    )


def _read_all(file, shapes, views, become, report):
    """Returns what weights of these shapes become, and the other tensors, by GGUF name."""
    num_bytes, bytes_done = sum(info.num_bytes for info in file.tensors.values()), 0
    leaves, unread = {}, {}
    for done, (name, info) in enumerate(file.tensors.items(), start=1):
        view = views.get(name)
        if name in shapes:
            weight = read_weight(file, name) if view is None else _weight(info, _rows_of(info, view))
            leaves[name] = become(name, _reshaped(weight, shapes[name]), view is not None)
        else:
            data = file.read(name) if view is None else view
            unread[name] = UnreadTensor(shape=info.shape, ggml_type=info.ggml_type, data=data)
        bytes_done += info.num_bytes
        report(done, len(file.tensors), bytes_done, num_bytes)
    return leaves, unread


def read_weight(
    file: GGUFFile, name: str, start_row: int = 0, stop_row: int | None = None
) -> np.ndarray | QuantizedTensor:
    """Reads rows of one tensor of any type that can be decoded, so that tools can go through a large file.

    Args:
      file: an opened file, of any architecture.
      name: key of `file.tensors`. The tensor is seen as a matrix [rows, row size]; a vector is one row.
      start_row: first row.
      stop_row: row after the last one; None for all that follow. Only these rows are read.

    Returns:
      [stop_row - start_row, row size] in host memory: an array f32, f16 or bf16, or a `QuantizedTensor` whose
      leaves are NumPy arrays.

    Raises:
      GGUFError: if the type cannot be decoded, or the file cannot be read.
      ValueError: if the tensor does not have these rows.
    """
    info = file.tensors[name]
    layout.check_type(info)
    num_rows = math.prod(info.shape[:-1])
    stop_row = num_rows if stop_row is None else stop_row
    if not 0 <= start_row <= stop_row <= num_rows:
        raise ValueError(f"rows of {name!r} must be a range in [0, {num_rows}], got {start_row}:{stop_row}.")
    if not layout.is_taken_apart(info):
        return _weight(info, _read_rows(file, info, start_row, stop_row))
    single = layout.FORMAT_NAMES[info.ggml_type]
    header_bytes = 0 if single in _PLAIN_DTYPES else quant.FORMATS[single].header_bytes
    header, rows = _read_apart(file, info, start_row, stop_row, header_bytes)
    return _weight(info, rows, header if header_bytes else None)


def _weight(
    info: TensorInfo, rows: np.ndarray, header: np.ndarray | None = None
) -> np.ndarray | QuantizedTensor:
    """Returns uint8[rows, bytes of a row], without their headers, as what they mean."""
    format_name = layout.FORMAT_NAMES[info.ggml_type]
    if format_name in _PLAIN_DTYPES:
        return rows.view(_PLAIN_DTYPES[format_name])
    block_bytes = quant.FORMATS[format_name].block_bytes
    blocks = rows.reshape(len(rows), rows.shape[1] // block_bytes, block_bytes)
    return QuantizedTensor(blocks=blocks, header=header, format=format_name)


def _row_bytes(info: TensorInfo) -> int:
    return TYPES[info.ggml_type].row_bytes(info.shape[-1] if info.shape else 1)


def _rows_of(info: TensorInfo, data: np.ndarray) -> np.ndarray:
    """Returns bytes of whole rows as uint8[rows, bytes of a row]."""
    row_bytes = _row_bytes(info)
    return data.reshape(data.size // row_bytes, row_bytes)


def _read_rows(
    file: GGUFFile, info: TensorInfo, start_row: int, stop_row: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Reads rows as uint8[rows, bytes of a row], into `out` if there is one."""
    row_bytes = _row_bytes(info)
    num_bytes = (stop_row - start_row) * row_bytes
    return _rows_of(info, file.read(info.name, start_row * row_bytes, num_bytes, out=out))


def _read_apart(
    file: GGUFFile, info: TensorInfo, start_row: int, stop_row: int, header_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows in the base format: uint8[rows, bytes] of their headers, and of what follows these."""
    row_size, base = info.shape[-1], interleave.BASES.get(info.type_name)
    row_bytes = (base or TYPES[info.ggml_type]).row_bytes(row_size)
    group_rows, num_rows = base.rows if base else 1, stop_row - start_row
    header, body = (
        aligned_empty(num_rows * size).reshape(num_rows, size)
        for size in (header_bytes, row_bytes - header_bytes)
    )
    step = max(1, _PIECE_BYTES // (row_bytes * group_rows)) * group_rows
    memory = np.empty(step * _row_bytes(info), np.uint8)  # not that of weights, which pieces would not leave
    for first in range(start_row // group_rows * group_rows, stop_row, step):
        last = min(first + step, -(-stop_row // group_rows) * group_rows)
        piece = _read_rows(file, info, first, last, out=memory)
        if base:
            piece = interleave.deinterleave(info.type_name, piece, row_size)
        start, stop = max(first, start_row), min(last, stop_row)
        piece, part = piece[start - first : stop - first], slice(start - start_row, stop - start_row)
        header[part], body[part] = piece[:, :header_bytes], piece[:, header_bytes:]
    return header, body


def _reshaped(matrix: np.ndarray | QuantizedTensor, shape: tuple[int, ...]) -> np.ndarray | QuantizedTensor:
    return jax.tree.map(lambda leaf: leaf.reshape(*shape[:-1], *leaf.shape[1:]), matrix)
