"""`Checkpoint` -> GGUF file: loaded models byte by byte as they were, trained ones as new files."""

import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from checkpoints_tools import hparams, interleave, layout, names
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_file import TensorInfo
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.load import Checkpoint
from mla_jax import quant
from mla_jax.config import ModelConfig
from mla_jax.quant import LoraTensor, PlanarTensor, QuantizedTensor

_PIECE_BYTES = 1 << 22  # of tensors whose bytes must be put together, made one after another
_PLAIN_TYPES = {"float32": IDS["f32"], "float16": IDS["f16"], "bfloat16": IDS["bf16"]}


def save_gguf(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint; one that was loaded gets back every key and tensor byte by byte, in order.

    Args:
      path: the file; it may be the one that the checkpoint came from. Split files become one.
      checkpoint: from `load_gguf`, or made of trained parameters.

    Raises:
      ValueError: if a parameter has no GGUF name or type, or one that the file had is gone.
      OSError: if the file cannot be written.
    """
    leaves = names.flatten(checkpoint.params)
    order = dict.fromkeys([*checkpoint.file_tensors, *leaves, *checkpoint.unread])
    tensors = []
    for name in order:
        if name in leaves:
            tensors.append(_tensor(name, leaves[name], checkpoint.file_tensors.get(name)))
        elif name in checkpoint.unread:
            kept = checkpoint.unread[name]
            tensors.append(TensorData(name, kept.shape, kept.ggml_type, kept.data))
        else:
            raise ValueError(
                f"{os.fspath(path)}: parameter {name!r} of the loaded file must be there, it is not."
            )
    write_gguf(path, checkpoint.metadata, tensors)


def export_gguf(
    path: str | os.PathLike,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    tokenizer_metadata: Mapping[str, Any],
    weight_type: str = "q8_0",
) -> None:
    """Writes parameters trained here as a new GGUF file.

    Args:
      path: the file.
      params: nested dict of float32 arrays, as `nn.init_params` makes it.
      config: the model.
      tokenizer_metadata: key-values `tokenizer.*`, plain values; keys `general.*` may be among them.
      weight_type: one of `quant.ENCODABLE`, for matrices; vectors and routers stay float32, and so do
        matrices whose rows are no whole number of blocks.

    Raises:
      ValueError: if a parameter has no GGUF name, is not finite in the type, or does not have the shape that
        the config asks for.
      OSError: if the file cannot be written.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in names.flatten(params).items()}
    expected = layout.expected_shapes(config, leaves)
    for name in dict.fromkeys([*expected, *leaves]):
        found = leaves[name].shape if name in leaves else None
        if found != expected.get(name):
            raise ValueError(f"parameter {name!r} must have shape {expected.get(name)}, got {found}.")
    tensors = [_encode(name, leaves[name], weight_type) for name in expected]
    write_gguf(path, hparams.metadata(config) | dict(tokenizer_metadata), tensors)


def _encode(name: str, weight: np.ndarray, weight_type: str) -> TensorData:
    if weight_type not in quant.ENCODABLE:
        raise ValueError(f"weight_type must be one of {', '.join(quant.ENCODABLE)}, got {weight_type!r}.")
    is_small = weight.ndim == 1 or name.endswith("ffn_gate_inp.weight")
    if is_small or weight.shape[-1] % TYPES[IDS[weight_type]].block_size:
        weight_type = "f32"
    return _tensor(name, quant.encode(weight, weight_type), None)


def _tensor(name: str, leaf: jax.Array | QuantizedTensor, info: TensorInfo | None) -> TensorData:
    """Describes a parameter as a tensor, in the shape of the file and interleaved if it is so there."""
    leaf = quant.in_blocks(leaf)
    if isinstance(leaf, QuantizedTensor):
        ggml_type = quant.FORMATS[leaf.format].ggml_type
    elif isinstance(leaf, LoraTensor):
        raise ValueError(f"parameter {name!r} must have no adapter beside it: merge it first (lora.merge).")
    elif isinstance(leaf, PlanarTensor):
        raise ValueError(f"parameter {name!r} must be in blocks, got planes: load it with gpu_kernels=False.")
    elif leaf.dtype.name in _PLAIN_TYPES:
        ggml_type = _PLAIN_TYPES[leaf.dtype.name]
    else:
        raise ValueError(
            f"parameter {name!r} must be float32, float16, bfloat16 or blocks, got {leaf.dtype}."
        )
    shape = leaf.shape
    is_same_rows = info is not None and info.shape[-1:] == shape[-1:]
    if is_same_rows and math.prod(info.shape) == math.prod(shape):
        shape = info.shape  # old files have some as matrices, with the same bytes
        is_of_file = layout.FORMAT_NAMES.get(info.ggml_type) == layout.FORMAT_NAMES[ggml_type]
        ggml_type = info.ggml_type if is_of_file else ggml_type
    type_name = TYPES[ggml_type].name
    has_header = isinstance(leaf, QuantizedTensor) and leaf.header is not None
    if has_header or type_name in interleave.BASES:
        return TensorData(name, shape, ggml_type, functools.partial(_pieces, type_name, leaf, shape))
    return TensorData(name, shape, ggml_type, file_rows(leaf))


def _pieces(
    type_name: str, weight: jax.Array | QuantizedTensor, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Yields the bytes of a weight that is interleaved in the file, or has headers, some rows at a time."""
    num_rows, base = math.prod(shape[:-1]), interleave.BASES.get(type_name)
    group_rows = base.rows if base else 1
    matrix = jax.tree.map(
        lambda part: np.asarray(part).reshape(num_rows, *part.shape[weight.ndim - 1 :]), weight
    )
    step = max(1, _PIECE_BYTES // (group_rows * TYPES[IDS[type_name]].row_bytes(shape[-1]))) * group_rows
    for first in range(0, num_rows, step):
        rows = file_rows(jax.tree.map(lambda part, first=first: part[first : first + step], matrix))
        rows = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        yield interleave.interleave(type_name, rows, shape[-1]) if base else rows


def file_rows(weight: jax.Array | np.ndarray | QuantizedTensor) -> jax.Array | np.ndarray:
    """Returns an array whose bytes are those that a file has of a weight, headers in front of their rows."""
    if not isinstance(weight, QuantizedTensor):
        return weight
    if weight.header is None:
        return weight.blocks
    rows = np.asarray(weight.blocks).reshape(*weight.blocks.shape[:-2], -1)
    return np.concatenate([np.asarray(weight.header), rows], axis=-1)
