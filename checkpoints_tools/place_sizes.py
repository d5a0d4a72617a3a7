"""What the devices of one machine hold of a model, told from the header of its file or from a preset."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints_tools import layout
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.inspect import columns
from checkpoints_tools.model_file import check_model
from checkpoints_tools.plan import is_preset
from mla_jax import placement as placement_lib
from mla_jax import presets, quant
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.placement import Placement

_PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_KEPT_IN_F32 = ("ffn_gate_inp.weight", "exp_probs_b.bias")  # what files have in it whatever their type


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A model without its weights.

    Attributes:
      config: the model.
      tensors: by GGUF name, `ShapeDtypeStruct`s, or `QuantizedTensor`s of them.
    """

    config: ModelConfig
    tensors: Mapping[str, Any]

    def first_layers(self, count: int | None) -> "Contents":
        """Returns the model with its first `count` layers alone; None for all."""
        if count is None:
            return self
        is_in = lambda name: not name.startswith("blk.") or int(name.split(".")[1]) < count
        tensors = {name: tensor for name, tensor in self.tensors.items() if is_in(name)}
        return Contents(config=dataclasses.replace(self.config, num_layers=count), tensors=tensors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceSizes:
    """Bytes on a device: weights, rows of the cache, and about what a step takes besides."""

    weights: int
    rows: int
    workspace: int


def read_contents(model: str | os.PathLike, type: str = "q4_K") -> Contents:
    """Reads what a model has.

    Args:
      model: a GGUF file, or the name of a preset.
      type: block format of the matrices of a preset; "f16" where its blocks do not divide a row.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF.
      ValueError: for a type that there is not.
    """
    if type not in quant.FORMATS and type not in _PLAIN:
        raise ValueError(f"--type must be one of {', '.join([*_PLAIN, *quant.FORMATS])}, got {type!r}.")
    if is_preset(model):
        config = presets.PRESETS[str(model)]
        shapes = layout.expected_shapes(config, ())
        formats = {name: _preset_format(name, shape, type) for name, shape in shapes.items()}
    else:
        file = open_gguf(model)
        config, plan = check_model(file)
        shapes = plan.shapes
        formats = {name: layout.FORMAT_NAMES[file.tensors[name].ggml_type] for name in shapes}
    return Contents(config=config, tensors={name: _abstract(shapes[name], formats[name]) for name in shapes})


def of_places(
    contents: Contents, placement: Placement, *, ctx_size: int, run: RunConfig, ubatch: int
) -> dict[str, PlaceSizes]:
    """Returns what each place of a placement is to hold.

    Args:
      contents: the model.
      placement: where its units lie.
      ctx_size: tokens that the cache holds.
      run: type and mode of the cache.
      ubatch: prompt tokens computed at a time.
    """
    sizes = placement_lib.unit_bytes(contents.tensors, run)
    rows = placement_lib.row_bytes(contents.config, run, ctx_size=ctx_size)
    workspace = placement_lib.workspace_bytes(contents.config, run, ubatch=ubatch)
    found = {}
    for place in placement.places:
        units = [unit for unit, where in placement.of_unit.items() if where == place]
        num_layers = sum(unit.startswith("attn.") for unit in units)
        weights = sum(sizes(unit, place) for unit in units)
        found[place] = PlaceSizes(weights=weights, rows=rows * num_layers, workspace=workspace)
    return found


def describe(contents: Contents, placement: Placement, **sizes: Any) -> str:
    """Describes a placement and the memory it takes; further arguments as of `of_places`."""
    table = [("place", "weights, MiB", "cache", "workspace, about", "in all")]
    for place, size in of_places(contents, placement, **sizes).items():
        parts = size.weights, size.rows, size.workspace
        table.append((place, *(f"{part / 2**20:,.1f}" for part in (*parts, sum(parts)))))
    return f"placement: {placement.describe()}\n\n{columns(table)}"


def _preset_format(name, shape, type):
    if len(shape) == 1 or name.endswith(_KEPT_IN_F32):
        return "f32"
    if type not in _PLAIN and shape[-1] % quant.FORMATS[type].block_size:
        return "f16"
    return type


def _abstract(shape, format_name):
    """Returns a weight of a shape without its numbers."""
    if format_name in _PLAIN:
        return jax.ShapeDtypeStruct(shape, _PLAIN[format_name])
    form, (*lead, width) = quant.FORMATS[format_name], shape
    of = lambda *shape: jax.ShapeDtypeStruct(shape, np.uint8)
    blocks = of(*lead, width // form.block_size, form.block_bytes)
    header = of(*lead, form.header_bytes) if form.header_bytes else None
    return quant.QuantizedTensor(blocks=blocks, header=header, format=format_name)
