"""Hugging Face safetensors folder -> GGUF file: planned from headers, then streamed some rows at a time.

Matrices keep their order of rows and columns: both formats have rotated numbers as interleaved pairs, and
`attn_kv_b` is `kv_b_proj`; ik_llama.cpp makes `attn_k_b` and `attn_v_b` of it where it wants them. Experts
are stacked. Layers that predict a second token keep their place after the others and are counted by
`nextn_predict_layers`; readers that do not know that key need a file without them.
"""

import collections
import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from checkpoints_tools import hf_config, hf_names, hf_tokenizer, hparams, json_file, layout, safetensors_file
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_file import GGUFError
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.hf_config import HFConfig
from checkpoints_tools.inspect import columns
from checkpoints_tools.progress import Progress, ProgressLine
from checkpoints_tools.recipe import QUANTIZATION_VERSION, Recipe, fitting, misfits
from checkpoints_tools.row_chunks import CHUNK_WEIGHTS
from checkpoints_tools.safetensors_file import SafetensorsFolder, StoredTensor
from checkpoints_tools.save import file_rows
from mla_jax import quant

_UNQUANTISED = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "bf16"}
_IGNORED = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")  # follow from the config
_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\..+")

_FP8_VALUES = np.arange(256, dtype=np.uint8).view(safetensors_file.DTYPES["F8_E4M3"]).astype(np.float32)
_FP8_NAN = 0x7F  # with either sign


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the new file.

    Attributes:
      name: GGUF name.
      shape: number of weights along each axis in NumPy order.
      type_name: GGUF type.
      wanted: type that was asked for, which `type_name` is not if rows do not fit it.
      sources: tensors of the checkpoint that it is made of: one, or all experts in their order.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    wanted: str
    sources: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data in the new file."""
        return TYPES[IDS[self.type_name]].num_bytes(self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a folder becomes.

    Attributes:
      folder: the checkpoint, opened.
      config: what its `config.json` says.
      metadata: key-values of the new file.
      rows: its tensors.
    """

    folder: SafetensorsFolder
    config: HFConfig
    metadata: dict[str, Any]
    rows: tuple[Row, ...]

    def table(self) -> str:
        """Returns every tensor with its sources, types and sizes, as text of many lines."""
        return columns([("tensor", "shape", "from", "to", "bytes", "made of"), *map(_cells, self.rows)])

    def summary(self) -> str:
        """Returns the totals, as text of a few lines."""
        types = collections.Counter(row.type_name for row in self.rows)
        num_tokens = len(self.metadata.get("tokenizer.ggml.tokens", ()))
        vocabulary = f"{num_tokens} tokens, {self.metadata['tokenizer.ggml.pre']}" if num_tokens else "none"
        num_nextn = self.metadata.get(f"{hparams.ARCHITECTURE}.nextn_predict_layers", 0)
        return "\n".join(
            [
                f"{len(self.folder.tensors)} tensors become {len(self.rows)} of "
                f"{sum(row.num_bytes for row in self.rows):,} bytes: "
                + ", ".join(f"{count} {type_name}" for type_name, count in types.items()),
                *misfits((row.wanted, row.type_name) for row in self.rows),
                f"{self.config.model.num_layers} layers, {num_nextn} that predict a second token",
                f"vocabulary: {vocabulary}",
            ]
        )


def plan(folder: str | os.PathLike, *, type: str = "bf16", keep_nextn: bool = True) -> Plan:
    """Decides what a file made of a checkpoint holds; no weight is read.

    Args:
      folder: `config.json` and safetensors of a DeepSeek-V2, DeepSeek-V3, Kimi-K2 or GLM-4.7-Flash, and its
        tokenizer if it has one. Matrices may be float32, float16, bfloat16, or FP8 with scales of blocks.
      type: type of weight matrices, or a mixture, as for `quantize`. Vectors and routers become f32; matrices
        whose rows are no whole number of blocks get a type that fits them, or keep theirs (FP8 as bf16) if
        rows fit no blocks at all.
      keep_nextn: keep the layers that predict a second token, if there are any.

    Returns:
      The plan.

    Raises:
      GGUFError: if a file is missing or damaged, a key or a tensor is missing or not as it should be, or the
        checkpoint has a tensor that would be lost.
      ValueError: if the type is not known.
    """
    recipe = Recipe.of(type)
    source = safetensors_file.open_folder(folder)
    path = os.path.join(source.path, "config.json")
    config = hf_config.from_json(json_file.read_object(path), path)
    num_nextn = _num_nextn(config, source) if keep_nextn else 0
    rows, used = [], set()
    for name, shape in _expected(config, num_nextn, source).items():
        sources = _sources(name, shape, config, source)
        used.update(info.name for info in sources)
        used.update(info.name + hf_names.SCALE_SUFFIX for info in sources if info.dtype == "F8_E4M3")
        rows.append(Row(name, shape, *_types(name, shape, sources, recipe), sources))
    _check_nothing_is_lost(config, source, used, keep_nextn)
    metadata = _metadata(config, num_nextn, source, recipe, rows)
    metadata |= hf_tokenizer.tokenizer_metadata(source.path, config.model.vocab_size)
    return Plan(source, config, metadata, tuple(rows))


def to_gguf(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    type: str = "bf16",
    keep_nextn: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Writes a checkpoint as a GGUF file; memory does not depend on its size.

    Args:
      folder: as for `plan`, and so are `type` and `keep_nextn`.
      out: file to write. One that is there is replaced when the new one is complete, and kept as it was if
        anything fails.
      progress: called with (tensors done, tensors, bytes done, bytes) after each part. None prints one line
        to stderr, if that is a terminal or it takes over a second.

    Returns:
      The plan that was carried out.

    Raises:
      GGUFError: as `plan`, and for a weight that is not finite.
      ValueError: as `plan`.
      OSError: if the file cannot be written.
    """
    chosen = plan(folder, type=type, keep_nextn=keep_nextn)
    stream = _Stream(chosen, progress or ProgressLine(out))
    write_gguf(out, chosen.metadata, [stream.tensor(row) for row in chosen.rows])
    return chosen


def _num_nextn(config: HFConfig, source: SafetensorsFolder) -> int:
    """Counts the layers that predict a second token: as many as the config says, or none if none is there."""
    layers = {int(match[1]) for name in source.tensors if (match := _LAYER.fullmatch(name))}
    first = config.model.num_layers
    return config.num_nextn if any(first <= layer < first + config.num_nextn for layer in layers) else 0


def _expected(config: HFConfig, num_nextn: int, source: SafetensorsFolder) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of the new file with their shapes."""
    model, embed_dim = config.model, config.model.embed_dim
    num_layers = model.num_layers + num_nextn
    num_dense = num_layers if model.moe is None else model.num_dense_layers
    deep = dataclasses.replace(model, num_layers=num_layers, num_dense_layers=num_dense)
    shapes = layout.expected_shapes(deep, ())
    for layer in range(model.num_layers, num_layers):
        block = f"blk.{layer}.nextn."
        shapes[block + "eh_proj.weight"] = (embed_dim, 2 * embed_dim)
        for part in ("enorm", "hnorm", "shared_head_norm"):
            shapes[f"{block}{part}.weight"] = (embed_dim,)
        for part in ("embed_tokens", "shared_head_head"):  # or those of the model serve here too
            if hf_names.to_hf(f"{block}{part}.weight") in source.tensors:
                shapes[f"{block}{part}.weight"] = (model.vocab_size, embed_dim)
    return shapes


def _sources(
    name: str, shape: tuple[int, ...], config: HFConfig, source: SafetensorsFolder
) -> tuple[StoredTensor, ...]:
    """Finds and checks the tensors that one of the new file is made of."""
    if hf_names.is_stack(name):
        names, shape = (hf_names.to_hf(name, expert) for expert in range(shape[0])), shape[1:]
    elif name == "output.weight" and config.is_tied:
        names = [hf_names.to_hf("token_embd.weight")]
    else:
        names = [hf_names.to_hf(name)]
    found = []
    for theirs in names:
        if theirs not in source.tensors:
            raise GGUFError(f"{source.path}: tensor {theirs!r} of shape {shape} is missing.")
        info = source.tensors[theirs]
        if info.shape != shape:
            raise info.fail(f"must have shape {shape}, got {info.shape}")
        if info.dtype not in safetensors_file.DTYPES:
            raise info.fail(f"must be one of {', '.join(safetensors_file.DTYPES)}, got {info.dtype}")
        if info.dtype == "F8_E4M3":
            _check_scale(info, config.fp8_block, source)
        found.append(info)
    return tuple(found)


def _check_scale(info: StoredTensor, block: tuple[int, int] | None, source: SafetensorsFolder) -> None:
    if block is None:
        raise info.fail("is FP8, so config.json must have the key 'quantization_config', it has not")
    scale = source.tensors.get(info.name + hf_names.SCALE_SUFFIX)
    if scale is None or len(info.shape) != 2:
        raise info.fail(f"is FP8, so it must be a matrix with a tensor {info.name + hf_names.SCALE_SUFFIX!r}")
    shape = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=True))
    if scale.dtype != "F32" or scale.shape != shape:
        raise scale.fail(f"must be F32 of shape {shape}, got {scale.dtype} of {scale.shape}")


def _types(
    name: str, shape: tuple[int, ...], sources: tuple[StoredTensor, ...], recipe: Recipe
) -> tuple[str, str]:
    """Returns the type that a tensor gets, and the one that was asked for."""
    if len(shape) == 1 or name.endswith(".ffn_gate_inp.weight"):
        return "f32", "f32"
    wanted = recipe.wanted(name)
    found = fitting(wanted, shape[-1])
    if found == "f16" != wanted:  # which fits every row, but not every weight
        found = _UNQUANTISED[sources[0].dtype]
    return found, wanted


def _check_nothing_is_lost(
    config: HFConfig, source: SafetensorsFolder, used: set[str], keep_nextn: bool
) -> None:
    if config.is_tied:
        used.add(hf_names.to_hf("output.weight"))
    for name, info in source.tensors.items():
        match = _LAYER.fullmatch(name)
        is_left_out = match and not keep_nextn and int(match[1]) >= config.model.num_layers
        if name not in used and not is_left_out and not _IGNORED.fullmatch(name):
            raise info.fail("has no place in a GGUF file of this model")


def _metadata(
    config: HFConfig, num_nextn: int, source: SafetensorsFolder, recipe: Recipe, rows: list[Row]
) -> dict[str, Any]:
    values = hparams.metadata(config.model)
    if num_nextn:
        values[f"{hparams.ARCHITECTURE}.block_count"] = config.model.num_layers + num_nextn
        values[f"{hparams.ARCHITECTURE}.nextn_predict_layers"] = num_nextn
    values["general.name"] = os.path.basename(os.path.abspath(source.path))
    if recipe.file_type is not None:
        values["general.file_type"] = recipe.file_type
    if any(row.type_name in quant.FORMATS for row in rows):
        values["general.quantization_version"] = QUANTIZATION_VERSION
    return values


def _cells(row: Row) -> tuple[str, ...]:
    first, count = row.sources[0], len(row.sources)
    shape = " x ".join(map(str, row.shape))
    made_of = first.name if count == 1 else f"{first.name} and {count - 1} more"
    return row.name, shape, first.dtype.lower(), row.type_name, f"{row.num_bytes:,}", made_of


class _Stream:
    """Yields the bytes of tensors as they are to be written, part by part, and reports how far it is."""

    def __init__(self, chosen: Plan, progress: Progress):
        self._folder, self._block, self._progress = chosen.folder, chosen.config.fp8_block, progress
        self._num_tensors, self._num_bytes = len(chosen.rows), sum(row.num_bytes for row in chosen.rows)
        self._done = self._bytes_done = 0

    def tensor(self, row: Row) -> TensorData:
        """Returns a tensor whose data is made when its turn comes."""
        return TensorData(row.name, row.shape, IDS[row.type_name], functools.partial(self._parts, row))

    def _parts(self, row: Row) -> Iterator[np.ndarray]:
        for index, info in enumerate(row.sources):
            for values, is_last in self._values(info):
                try:
                    part = np.asarray(file_rows(quant.encode(values, row.type_name)))
                except ValueError as error:
                    raise GGUFError(f"{info.path}: tensor {info.name!r}: {error}") from None
                yield part
                self._bytes_done += part.nbytes
                self._done += is_last and index == len(row.sources) - 1
                self._progress(self._done, self._num_tensors, self._bytes_done, self._num_bytes)

    def _values(self, info: StoredTensor) -> Iterator[tuple[np.ndarray, bool]]:
        """Yields float32 rows, and whether they are the last of the tensor."""
        scale = None
        if info.dtype == "F8_E4M3":
            scale = self._folder.read(info.name + hf_names.SCALE_SUFFIX)
            if not np.isfinite(scale).all():
                raise info.fail("must have finite scales, got one that is not")
        num_rows = info.shape[0]
        step = max(1, CHUNK_WEIGHTS // math.prod(info.shape[1:]))
        for start in range(0, num_rows, step):
            stop = min(num_rows, start + step)
            stored = self._folder.read(info.name, start, stop)
            if scale is None:
                values = stored.astype(np.float32)
            else:
                values = self._dequantised(info, stored, scale[np.arange(start, stop) // self._block[0]])
            yield values, stop == num_rows

    def _dequantised(self, info: StoredTensor, stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Multiplies rows of FP8 codes with the scales of their blocks, float32[rows, blocks]."""
        codes = stored.view(np.uint8)
        if np.any(codes & _FP8_NAN == _FP8_NAN):
            raise info.fail("must have finite weights, got a NaN")
        return _FP8_VALUES[codes] * scale[:, np.arange(codes.shape[1]) // self._block[1]]
