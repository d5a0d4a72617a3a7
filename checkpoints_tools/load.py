"""GGUF file -> `Checkpoint`: config, parameters and everything else that saving needs."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints_tools import hparams, layout, names
from checkpoints_tools.gguf_file import TensorInfo, open_gguf
from checkpoints_tools.gguf_metadata import Metadata
from checkpoints_tools.layout import BLOCK_TYPES
from mla_jax.config import ModelConfig
from mla_jax.quant import QuantizedTensor

Progress = Callable[[int, int, int, int], None]

_PLAIN_DTYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}
_SLOW_SECONDS = 1.0


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
    config = hparams.model_config(file.metadata, file.tensors, file.path)
    plan = layout.check_layout(config, file.tensors, file.path)
    report = progress or _ProgressLine(file.path)
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


class _ProgressLine:
    """Tells on stderr how far loading is: on a terminal all along, elsewhere once, if it was slow."""

    def __init__(self, path: str):
        self.path, self.start, self.shown = path, time.monotonic(), 0.0
        self.is_terminal = sys.stderr.isatty()

    def __call__(self, done: int, num_tensors: int, bytes_done: int, num_bytes: int) -> None:
        now = time.monotonic()
        seconds, is_last = now - self.start, done == num_tensors
        line = (
            f"{os.path.basename(self.path)}: {done}/{num_tensors} tensors, {bytes_done / 1e9:.2f} of "
            f"{num_bytes / 1e9:.2f} GB, {bytes_done / 1e9 / max(seconds, 1e-9):.2f} GB/s"
        )
        if self.is_terminal and (is_last or now - self.shown > 0.1):
            self.shown = now
            print(f"\r{line}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        elif is_last and not self.is_terminal and seconds > _SLOW_SECONDS:
            print(line, file=sys.stderr, flush=True)
