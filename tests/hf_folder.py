"""Small Hugging Face checkpoints with random weights: those of `synthetic`, under their other names."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from synthetic import write_deepseek2

from checkpoints_tools import hf_config, hf_names, hparams
from checkpoints_tools.gguf_file import open_gguf

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int64": "I64"}
FP8_BLOCK = (24, 40)  # which divides no size here


def write_folder(folder: Path, *, dtype=np.float32, nextn: int = 0, num_files: int = 1, **options) -> dict:
    """Writes a checkpoint and returns its tensors by their names there.

    Args:
      folder: made if it is not there.
      dtype: of matrices; with ml_dtypes.float8_e4m3fn there are scales beside them.
      nextn: layers that predict a second token.
      num_files: more than one for shards and an index.
      **options: of `synthetic.write_deepseek2`; `kv` and `merged` must stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "synthetic.gguf"
    tensors = _unstacked(write_deepseek2(path, **options))
    file = open_gguf(path)
    values = hf_config.to_json(hparams.model_config(file.metadata, file.tensors), num_nextn=nextn)
    path.unlink()
    layers = [_nextn_layer(tensors, values, index) for index in range(nextn)]
    for layer in layers:
        tensors |= layer
    if dtype == ml_dtypes.float8_e4m3fn:
        values["quantization_config"] = dict(quant_method="fp8", weight_block_size=list(FP8_BLOCK))
    write_json(folder / "config.json", values)
    stored = {}
    for name, array in tensors.items():
        is_matrix = array.ndim == 2 and not name.endswith("mlp.gate.weight")
        if is_matrix and dtype == ml_dtypes.float8_e4m3fn:
            stored[name], stored[name + "_scale_inv"] = to_fp8(array)
        else:
            stored[name] = array.astype(dtype) if is_matrix else array
    save(folder, stored, num_files)
    return stored


def _unstacked(tensors: dict) -> dict:
    found = {}
    for name, array in tensors.items():
        if hf_names.is_stack(name):
            found |= {hf_names.to_hf(name, expert): matrix for expert, matrix in enumerate(array)}
        else:
            found[hf_names.to_hf(name)] = array
    return found


def _nextn_layer(tensors: dict, values: dict, index: int) -> dict:
    """Makes one more layer: the last one's weights in reverse, and what such a layer has besides."""
    last, embed_dim = values["num_hidden_layers"] - 1, values["hidden_size"]
    block = f"model.layers.{last + 1 + index}."
    rng = np.random.default_rng(index)
    layer = {
        block + name.removeprefix(f"model.layers.{last}."): array[::-1].copy()
        for name, array in tensors.items()
        if name.startswith(f"model.layers.{last}.")
    }
    layer[block + "eh_proj.weight"] = rng.standard_normal((embed_dim, 2 * embed_dim), dtype=np.float32)
    for part in ("enorm", "hnorm", "shared_head.norm"):
        layer[f"{block}{part}.weight"] = rng.standard_normal(embed_dim, dtype=np.float32)
    layer[block + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    layer[block + "shared_head.head.weight"] = tensors["lm_head.weight"]
    return layer


def to_fp8(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes, and a scale for each block."""
    scale = np.zeros(
        [-(-size // step) for size, step in zip(array.shape, FP8_BLOCK, strict=True)], np.float32
    )
    for row, column in np.ndindex(*scale.shape):
        scale[row, column] = np.abs(array[_block(row, column)]).max() / np.float32(448)
    return (array / spread(scale, array.shape)).astype(ml_dtypes.float8_e4m3fn), scale


def from_fp8(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns the weights that codes and scales stand for."""
    return codes.astype(np.float32) * spread(scale, codes.shape)


def spread(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns the scale of each weight."""
    out = np.empty(shape, np.float32)
    for row, column in np.ndindex(*scale.shape):
        out[_block(row, column)] = scale[row, column]
    return out


def _block(row: int, column: int) -> tuple[slice, slice]:
    height, width = FP8_BLOCK
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(values), encoding="utf-8")


def change_config(folder: Path, **changes) -> None:
    """Changes keys of `config.json`; None takes a key away."""
    values = json.loads((folder / "config.json").read_text()) | changes
    write_json(folder / "config.json", {key: value for key, value in values.items() if value is not None})


def save(folder: Path, tensors: dict, num_files: int = 1) -> None:
    """Writes `model.safetensors`, or shards that take turns and their index."""
    if num_files == 1:
        save_file(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for index in range(num_files):
        file_name = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[index::num_files])
        save_file(folder / file_name, part)
        weight_map |= dict.fromkeys(part, file_name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def save_file(path: Path, tensors: dict, **changes) -> None:
    """Writes one safetensors file; `changes` replace entries of its header."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        ends = [offset, offset + array.nbytes]
        header[name] = dict(dtype=NAMES[array.dtype.name], shape=list(array.shape), data_offsets=ends)
        offset = ends[1]
    text = json.dumps(header | changes).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
