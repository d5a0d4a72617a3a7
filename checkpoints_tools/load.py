"""GGUF file -> `Checkpoint`: config, parameters and everything else that saving needs."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints_tools import names
from checkpoints_tools.gguf_file import TensorInfo, open_gguf
from checkpoints_tools.gguf_metadata import Metadata
from checkpoints_tools.layout import BLOCK_TYPES
from checkpoints_tools.model_file import check_model
from checkpoints_tools.progress import Progress, ProgressLine
from mla_jax.config import ModelConfig
from mla_jax.quant import QuantizedTensor

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
      params: nested dict of arrays f32, f16 or bf16, and `QuantizedTensor`s; paths as in `names`.
      metadata: key-values, as a mapping from key to plain Python value.
      unread: GGUF name -> tensor that the network does not read, for saving.
      file_shapes: GGUF name -> shape in the file, in file order; empty for a model that comes from no file.
      path: the file, or None.
    """

    config: ModelConfig
    params: dict[str, Any]
    metadata: Metadata
    unread: Mapping[str, UnreadTensor] = dataclasses.field(default_factory=dict)
    file_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    path: str | None = None


def load_gguf(path: str | os.PathLike, progress: Progress | None = None) -> Checkpoint:
    """Loads a deepseek2 GGUF file; weights stay in their blocks.

    Everything is checked before the first weight is read. The bytes are held once: on the CPU, JAX adopts the
    buffers they were read into.

    Args:
      path: the file, or the first part of a split one. It must not change while it is loaded.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor. None prints one line
        to stderr, if that is a terminal or loading takes over a second.

    Returns:
      The checkpoint, its parameters on the default device.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF of supported types.
    """
    file = open_gguf(path)
    config, plan = check_model(file)
    report = progress or ProgressLine(file.path)
    num_bytes, bytes_done = sum(info.num_bytes for info in file.tensors.values()), 0
    leaves, unread = {}, {}
    for done, (name, info) in enumerate(file.tensors.items(), start=1):
        data = file.read(name)
        if name in plan.shapes:
            leaves[name] = _leaf(data, info, plan.shapes[name])
        else:
            unread[name] = UnreadTensor(shape=info.shape, ggml_type=info.ggml_type, data=data)
        bytes_done += info.num_bytes
        report(done, len(file.tensors), bytes_done, num_bytes)
    return Checkpoint(
        config=config,
        params=names.unflatten(leaves),
        metadata=file.metadata,
        unread=unread,
        file_shapes={name: info.shape for name, info in file.tensors.items()},
        path=file.path,
    )


def _leaf(data: np.ndarray, info: TensorInfo, shape: tuple[int, ...]) -> jax.Array | QuantizedTensor:
    """Gives bytes their shape on the default device; `device_put` adopts aligned host memory on the CPU."""
    block = BLOCK_TYPES.get(info.ggml_type)
    if block is None:
        return jax.device_put(data.view(_PLAIN_DTYPES[info.type_name]).reshape(shape))
    rows, header = data.reshape(*shape[:-1], -1), None
    if block.header_bytes:
        header, rows = jax.device_put(rows[..., : block.header_bytes].copy()), rows[..., block.header_bytes :]
    blocks = rows.reshape(*shape[:-1], shape[-1] // block.block_size, block.block_bytes)
    return QuantizedTensor(blocks=jax.device_put(blocks), header=header, format=block.name)
