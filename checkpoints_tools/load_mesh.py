"""GGUF file -> weights on a mesh of devices: each process reads what its own devices have."""

import functools
import os
from collections.abc import Mapping

import jax

from checkpoints_tools import layout, names, shard_parts
from checkpoints_tools.gguf_file import GGUFFile, open_gguf
from checkpoints_tools.layout import Layout
from checkpoints_tools.load import Checkpoint, read_weight
from checkpoints_tools.model_file import check_model
from checkpoints_tools.progress import Progress, ProgressLine
from mla_jax import quant, sharding
from mla_jax.config import Shard
from mla_jax.sharding import WeightInfo


def load_on_mesh(
    path: str | os.PathLike,
    mesh: Mapping[str, int] | None,
    *,
    splits_cache: bool = False,
    progress: Progress | None = None,
) -> tuple[Checkpoint, Shard]:
    """Loads a deepseek2 GGUF file on a mesh; tensors that the network does not read are left out.

    Args:
      path: the file, or the first part of a split one, in every process. It must not change meanwhile.
      mesh: devices along `data`, `expert` and `model`, 1 for one that is not named; None for all devices that
        there are, as `sharding.auto_axes` has it.
      splits_cache: see `Shard`.
      progress: as for `load_gguf`; of a weight that is shared out, the bytes of the whole count.

    Returns:
      The checkpoint, its parameters in global arrays, and what one device has of it.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF of supported types.
      ValueError: for a mesh of more devices than there are.
    """
    file = open_gguf(path)
    config, plan = check_model(file)
    axes = sharding.auto_axes(config, jax.device_count()) if mesh is None else mesh
    shard = sharding.make_shard(config, weights_of(file, plan), **axes, splits_cache=splits_cache)
    report, leaves, bytes_done = progress or ProgressLine(file.path), {}, 0
    num_bytes = sum(file.tensors[name].num_bytes for name in plan.shapes)
    for done, (name, shape) in enumerate(plan.shapes.items(), start=1):
        rows = functools.partial(read_weight, file, name)
        leaves[name] = shard_parts.place_weight(rows, "/".join(names.to_path(name)), shape, config, shard)
        bytes_done += file.tensors[name].num_bytes
        report(done, len(plan.shapes), bytes_done, num_bytes)
    checkpoint = Checkpoint(
        config=config, params=names.unflatten(leaves), metadata=file.metadata, path=file.path
    )
    return checkpoint, shard


def weights_of(file: GGUFFile, plan: Layout) -> list[WeightInfo]:
    """Returns what the table of a file says of the weights that the network reads."""
    found = []
    for name, shape in plan.shapes.items():
        entry = quant.FORMATS.get(layout.FORMAT_NAMES[file.tensors[name].ggml_type])
        info = WeightInfo(
            path="/".join(names.to_path(name)),
            shape=shape,
            block_size=entry.block_size if entry else 1,
            num_bytes=file.tensors[name].num_bytes,
        )
        found.append(info)
    return found
