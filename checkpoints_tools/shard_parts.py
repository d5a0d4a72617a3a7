"""From whole weights to the parts that the devices of a mesh have, each put on its device.

A weight is seen as a matrix, as in its file, and read some rows at a time. Where devices share out rows, only
those of this process's devices are read; where they share out columns, all rows are, and the rest is left.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

from checkpoints_tools.buffers import aligned_empty
from mla_jax import quant, sharding
from mla_jax.config import ModelConfig, Shard
from mla_jax.nn.collectives import AXES
from mla_jax.quant.tensor import Weight

_PIECE_BYTES = 1 << 25  # of what is read at a time

Rows = Callable[[int, int], Weight]
"""From a first row and the one after the last to these rows of a matrix, in NumPy arrays."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """Rows of a matrix, one after the other.

    Attributes:
      start: the first.
      there: how many of them there are.
      count: how many the device has of them, the last of which are padding.
    """

    start: int
    there: int
    count: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a device has of a matrix: rows, and of each the columns of a range."""

    runs: tuple[_Run, ...]
    columns: _Run


def place(params, config: ModelConfig, shard: Shard):
    """Returns weights on the mesh, each device with its part.

    Args:
      params: nested dict of whole weights, in blocks, in panels or plain.
      config: the model.
      shard: of `sharding.make_shard`.
    """

    def one(path, weight):
        weight = quant.in_blocks(weight)
        num_lead = weight.ndim - 1
        as_rows = lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[num_lead:])
        matrix = jax.tree.map(as_rows, weight)
        rows = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], matrix)
        return place_weight(rows, path, tuple(weight.shape), config, shard)

    return sharding.map_weights(one, params)


def place_weight(rows: Rows, path: str, shape: tuple[int, ...], config: ModelConfig, shard: Shard) -> Weight:
    """Returns one weight on the mesh, in global arrays.

    Args:
      rows: reads the weight as a matrix [rows, shape[-1]]; a vector is one row.
      path: of the weight in the tree of parameters.
      shape: of the whole weight.
      config: the model.
      shard: of `sharding.make_shard`.
    """
    mesh = sharding.device_mesh(shard)
    local = sharding.part_shape(path, shape, config, shard)
    parts = {}
    for place, device in np.ndenumerate(mesh.devices):
        if device.process_index == jax.process_index():
            ranges = _ranges_of(path, shape, config, shard, dict(zip(AXES, place, strict=True)))
            parts[device] = _part(ranges, shape)
    weights = _read(rows, set(parts.values()), local)
    arrays = [
        jax.tree.map(lambda leaf, to=device: jax.device_put(leaf, to), weights[part])
        for device, part in parts.items()
    ]

    def join(spec, *leaves):
        counts = [sharding.num_parts(shard, axis) for axis in sharding.logical_axes(path)[: len(spec)]]
        counts += [1] * (leaves[0].ndim - len(counts))
        sizes = tuple(size * count for size, count in zip(leaves[0].shape, counts, strict=True))
        return jax.make_array_from_single_device_arrays(sizes, NamedSharding(mesh, spec), list(leaves))

    return jax.tree.map(join, sharding.weight_spec(path, arrays[0]), *arrays)


def _ranges_of(path, shape, config, shard, place: Mapping[str, int]) -> list[tuple[_Run, ...]]:
    """Returns what the device at `place` has of each axis of a weight."""

    def of(axis, size):
        if axis is None:
            return (_Run(0, size, size),)
        halves = 2 if path.endswith("gate_up/weight") and axis == "expert_hidden" else 1
        total = size // halves
        width = total // sharding.size_of(config.sizes, axis, total)  # rows of a head, or 1
        count = sharding.size_of(shard.sizes, axis, total) * width
        first = sharding.index_of(shard, axis, place) * count
        there = min(max(total - first, 0), count)
        return tuple(_Run(half * total + first, there, count) for half in range(halves))

    return [of(axis, size) for axis, size in zip(sharding.logical_axes(path), shape, strict=True)]


def _part(ranges, shape) -> _Part:
    """Returns the rows and columns of a matrix, by the ranges of the axes of its weight."""
    whole = (_Run(0, 1, 1),)
    outer, rows, (columns,) = [whole, whole, *ranges][-3:]
    num_rows = ([1, 1, *shape])[-2]
    found = []
    for i in range(outer[0].count):
        for run in rows:
            there = run.there if i < outer[0].there else 0
            found.append(_Run((outer[0].start + i) * num_rows + run.start, there, run.count))
    return _Part(tuple(_merged(found)), columns)


def _merged(runs) -> Iterator[_Run]:
    """Yields the same rows in as few runs as there can be."""
    last, *others = runs
    for run in others:
        if (last.there == last.count and run.start == last.start + last.count) or run.there == 0:
            last = _Run(last.start, last.there + run.there, last.count + run.count)
        else:
            yield last
            last = run
    yield last


def _read(rows: Rows, parts: set[_Part], local: tuple[int, ...]) -> dict[_Part, Weight]:
    """Returns parts in host memory, by part; rows that several have columns of are read once."""
    like, found = rows(0, 0), {}
    row_bytes = sum(leaf.dtype.itemsize * math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(like))
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    for runs in {part.runs for part in parts}:
        columns = {part: _Columns(part.columns, like) for part in parts if part.runs == runs}
        out = {part: cut.empty(sum(run.count for run in runs)) for part, cut in columns.items()}
        at = 0
        for run in runs:
            for begin in range(0, run.there, step):
                end = min(begin + step, run.there)
                piece = rows(run.start + begin, run.start + end)
                for part, cut in columns.items():
                    cut.fill(out[part], piece, at + begin)
            at += run.count
        for part, weight in out.items():
            found[part] = jax.tree.map(lambda leaf: leaf.reshape(*local[:-1], *leaf.shape[1:]), weight)
    return found


class _Columns:
    """A range of the columns of a matrix, in blocks."""

    def __init__(self, run: _Run, like: Weight):
        is_quantised = isinstance(like, quant.QuantizedTensor)
        block_size = quant.FORMATS[like.format].block_size if is_quantised else 1
        self._first, self._there, self._count = (n // block_size for n in dataclasses.astuple(run))
        self._like = like

    def empty(self, num_rows: int) -> Weight:
        """Returns zeros for so many rows."""

        def zeros(path, leaf):
            widths = leaf.shape[1:] if _is_header(path) else (self._count, *leaf.shape[2:])
            data = aligned_empty(num_rows * math.prod(widths) * leaf.dtype.itemsize)
            data[:] = 0
            return data.view(leaf.dtype).reshape(num_rows, *widths)

        return jax.tree_util.tree_map_with_path(zeros, self._like)

    def fill(self, out: Weight, piece: Weight, start: int) -> None:
        """Writes the columns of rows, of which `start` are before."""

        def write(path, target, rows):
            places = slice(start, start + len(rows))
            if _is_header(path):
                target[places] = rows
            else:
                target[places, : self._there] = rows[:, self._first : self._first + self._there]

        jax.tree_util.tree_map_with_path(write, out, piece)


def _is_header(path):
    return bool(path) and getattr(path[-1], "name", "") == "header"
