"""deepseek2 GGUF file -> folder that `transformers` loads: config, safetensors and tokenizer.

Weights are decoded and written some rows at a time, so that memory does not depend on the size of the file.
What GGUF files stack or cut otherwise is brought back to the published form: a matrix for each routed expert,
gate and up apart, `kv_b_proj` in one.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from checkpoints_tools import folders, hf_config, hf_names, hparams, layout, safetensors_writer
from checkpoints_tools.gguf_file import GGUFError, GGUFFile, open_gguf
from checkpoints_tools.load import read_weight
from checkpoints_tools.progress import Progress, ProgressLine
from checkpoints_tools.row_chunks import CHUNK_WEIGHTS, decoded
from checkpoints_tools.safetensors_writer import NewTensor
from checkpoints_tools.tokenizer_files import special_ids, tokenizer_files
from mla_jax import quant
from mla_jax.config import MLAConfig, ModelConfig

_GLM_PRE_TYPES = ("glm4", "chatglm-bpe")
_BIAS_DTYPE = "float32"  # of the router, as published: to add it in fewer bits selects other experts


def to_safetensors(
    gguf: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes a GGUF file as a Hugging Face checkpoint; the folder is there whole or not at all.

    Args:
      gguf: the file, or the first part of a split one.
      folder: it must not exist, or be empty.
      dtype: "bfloat16", "float16" or "float32", of all tensors but the selection bias of routers, which is
        float32. Weights that are in this type in the file are copied bit by bit.
      max_shard_bytes: of tensors in a file; a larger tensor has a file of its own.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor. None prints one line
        to stderr, if that is a terminal or it takes over a second.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF of types that can be decoded, a model or a
        vocabulary that has no published form, or a weight that is not finite in the type.
      ValueError: if the type is not one of these, the size not positive or the folder in use.
      OSError: if the folder cannot be written.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}.")
    tensors, files = _planned(gguf, dtype)
    with folders.creating(folder) as temporary:
        for name, values in files.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as out:
                json.dump(values, out, indent=2, ensure_ascii=False)
        report = progress or ProgressLine(folder)
        safetensors_writer.write_shards(temporary, tensors, max_shard_bytes, report)


def plan(gguf: str | os.PathLike, *, dtype: str = "bfloat16") -> list[NewTensor]:
    """Decides which tensors a checkpoint made of a file has; no weight is read.

    Args:
      gguf: as for `to_safetensors`, and so are `dtype` and the errors.

    Returns:
      The tensors, in the order of the file.
    """
    return _planned(gguf, dtype)[0]


def _planned(gguf: str | os.PathLike, dtype: str) -> tuple[list[NewTensor], dict[str, dict[str, Any]]]:
    """Returns the tensors of the checkpoint, and the objects of its JSON files by their names."""
    if dtype not in safetensors_writer.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(safetensors_writer.DTYPES)}, got {dtype!r}.")
    file = open_gguf(gguf)
    config = hparams.model_config(file.metadata, file.tensors, file.path)
    num_nextn = _num_nextn(file, config)
    try:
        files = tokenizer_files(file.metadata, config.context_length)
        files["config.json"] = _config_json(file, config, num_nextn, dtype)
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from None
    return list(_tensors(_Weights(file, dtype), config, num_nextn)), files


def _num_nextn(file: GGUFFile, config: ModelConfig) -> int:
    """Counts the layers that predict a second token: as the file says, or none if it has none of them."""
    num_blocks = file.metadata[f"{hparams.ARCHITECTURE}.block_count"]
    blocks = range(config.num_layers, num_blocks)
    is_there = any(f"blk.{block}.nextn.eh_proj.weight" in file.tensors for block in blocks)
    return len(blocks) if is_there else 0


def _config_json(file: GGUFFile, config: ModelConfig, num_nextn: int, dtype: str) -> dict[str, Any]:
    values = hf_config.to_json(config, num_nextn=num_nextn) | {"torch_dtype": dtype}
    if values["model_type"] == "deepseek_v3" and _is_glm(file.metadata):
        num_sparse = config.num_layers - config.num_dense_layers
        values |= {
            "architectures": ["Glm4MoeLiteForCausalLM"],
            "model_type": "glm4_moe_lite",
            "mlp_layer_types": ["dense"] * config.num_dense_layers + ["sparse"] * num_sparse,
        }
    if "tokenizer.ggml.tokens" in file.metadata:
        values |= special_ids(file.metadata)
    return values


def _is_glm(metadata: Mapping[str, Any]) -> bool:
    """Whether a model with sigmoid gating is a GLM-4.7-Flash; only the name of its class depends on it.

    It is told by its pre-tokenizer or name, or by not saying its gating, which `hparams` then derived.
    """
    names = (metadata.get(f"general.{key}", "") for key in ("name", "basename"))
    is_named = any(isinstance(name, str) and "glm" in name.lower() for name in names)
    is_derived = not metadata.get(f"{hparams.ARCHITECTURE}.expert_gating_func")
    return is_named or is_derived or metadata.get("tokenizer.ggml.pre") in _GLM_PRE_TYPES


class _Weights:
    """Reads weights of a file in the type of the checkpoint.

    Attributes:
      file: the file.
      dtype: key of `safetensors_writer.DTYPES`.
    """

    def __init__(self, file: GGUFFile, dtype: str):
        self.file, self.dtype = file, dtype

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields rows of a tensor seen as a matrix, some at a time."""
        step = max(1, CHUNK_WEIGHTS // self.file.tensors[name].shape[-1])
        for first in range(start, stop, step):
            yield self._read(name, first, min(first + step, stop))

    def kv_b(self, block: str, mla: MLAConfig) -> Iterator[np.ndarray]:
        """Yields the rows of `kv_b_proj` from W_uk [R, H] and W_uv [V, R] of each head, head by head."""
        R, V = mla.kv_lora_rank, mla.v_head_dim
        for head in range(mla.num_heads):
            key = self._read(f"{block}attn_k_b.weight", head * R, (head + 1) * R)
            value = self._read(f"{block}attn_v_b.weight", head * V, (head + 1) * V)
            yield np.concatenate([key.T, value])

    def dtype_of(self, name: str) -> str:
        """Returns the type that a tensor of the file has in the checkpoint."""
        return _BIAS_DTYPE if name.endswith(".exp_probs_b.bias") else self.dtype

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        weight, dtype = read_weight(self.file, name, start, stop), self.dtype_of(name)
        wanted = safetensors_writer.DTYPES[dtype]
        if not isinstance(weight, quant.QuantizedTensor) and weight.dtype == wanted:
            return weight
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.asarray(decoded(weight)).astype(wanted)
        if not np.isfinite(values).all():
            raise GGUFError(f"{self.file.path}: tensor {name!r} must be finite in {dtype}, it is not.")
        return values


def _tensors(weights: _Weights, config: ModelConfig, num_nextn: int) -> Iterator[NewTensor]:
    """Yields the tensors of the checkpoint in the order of the file, after all have been checked."""
    file, num_layers = weights.file, config.num_layers + num_nextn
    num_dense = num_layers if config.moe is None else config.num_dense_layers
    deep = dataclasses.replace(config, num_layers=num_layers, num_dense_layers=num_dense)
    shapes, left_out = layout.check_layout(deep, file.tensors, file.path).shapes, []
    for name, info in file.tensors.items():
        if name in shapes:
            yield from _published(weights, name, shapes[name], config)
        elif num_nextn and ".nextn." in name and hf_names.to_hf(name):
            layout.check_type(info)
            yield from _published(weights, name, info.shape, config)
        elif not name.endswith((".attn_k_b.weight", ".attn_v_b.weight")):  # of which attn_kv_b has both
            left_out.append(name)
    if left_out:
        logging.warning(
            "%s: left out, as checkpoints have no such tensors: %s.", file.path, ", ".join(left_out)
        )


def _published(
    weights: _Weights, name: str, shape: tuple[int, ...], config: ModelConfig
) -> Iterator[NewTensor]:
    """Yields what a tensor of the file is in a checkpoint: itself, a part of `kv_b_proj`, or its experts."""

    def rows_of(theirs: str, part_shape: tuple[int, ...], start: int) -> NewTensor:
        num_rows = math.prod(part_shape[:-1])
        parts = functools.partial(weights.rows, name, start, start + num_rows)
        return NewTensor(theirs, part_shape, weights.dtype_of(name), parts)

    block, _, kind = name.rpartition("attn_" if ".attn_" in name else "ffn_")
    if kind == "k_b.weight":
        mla = config.mla
        width = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        parts = functools.partial(weights.kv_b, block, mla)
        theirs = hf_names.to_hf(f"{block}attn_kv_b.weight")
        yield NewTensor(theirs, (width, mla.kv_lora_rank), weights.dtype, parts)
    elif kind == "gate_up_exps.weight":
        num_experts, width, size = shape
        for index in range(2 * num_experts):
            stack = f"{block}ffn_{('gate', 'up')[index % 2]}_exps.weight"
            yield rows_of(hf_names.to_hf(stack, index // 2), (width // 2, size), index * (width // 2))
    elif hf_names.is_stack(name):
        for expert in range(shape[0]):
            yield rows_of(hf_names.to_hf(name, expert), shape[1:], expert * shape[1])
    elif kind != "v_b.weight":
        yield rows_of(hf_names.to_hf(name), shape, 0)
