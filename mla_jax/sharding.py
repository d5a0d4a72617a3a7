"""What goes where on a mesh of devices: one table, from weight to logical axes, from these to mesh axes.

A step runs on every device of the mesh at once (`run_on_mesh`), each with its part of weights and cache, and
the collectives of `nn.collectives` are all that passes between them: no weight ever does. Parts are equal in
size: what does not divide is padded with zeros, at the end of an axis. Rows of blocks are cut between blocks
alone, so heads and hidden sizes are shared out by as many as fill whole blocks.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mla_jax import quant
from mla_jax.cache import PAGE_SIZE, Cache
from mla_jax.config import MLAMode, ModelConfig, RunConfig, Shard, Sizes
from mla_jax.nn.collectives import AXES, DATA, EXPERT, GROUP, MODEL
from mla_jax.nn.moe import ExpertReduction
from mla_jax.quant.tensor import Weight

MAX_DEVICES = 4096
MESH_AXES = {
    "vocabulary": GROUP,
    "heads": GROUP,
    "dense_hidden": GROUP,
    "shared_hidden": GROUP,
    "experts": (DATA, EXPERT),
    "expert_hidden": (MODEL,),
    None: (),
}
"""Logical axis -> axes of the mesh that share it out."""

_LAYER = r"layers_\d+/"
RULES = [
    (r"(embed|output)/weight", ("vocabulary", None)),
    (r"output_norm/weight", (None,)),
    (_LAYER + r"(attn_norm|ffn_norm|attn/q_a_norm|attn/kv_a_norm)/weight", (None,)),
    (_LAYER + r"attn/(q_a|kv_a)/weight", (None, None)),
    (_LAYER + r"attn/(q|q_b|kv_b)/weight", ("heads", None)),
    (_LAYER + r"attn/(k_b|v_b)/weight", ("heads", None, None)),
    (_LAYER + r"attn/out/weight", (None, "heads")),
    (_LAYER + r"ffn/(gate|up)/weight", ("dense_hidden", None)),
    (_LAYER + r"ffn/down/weight", (None, "dense_hidden")),
    (_LAYER + r"ffn/router/weight", (None, None)),
    (_LAYER + r"ffn/router/bias", (None,)),
    (_LAYER + r"ffn/shared/(gate|up)/weight", ("shared_hidden", None)),
    (_LAYER + r"ffn/shared/down/weight", (None, "shared_hidden")),
    (_LAYER + r"ffn/experts/(gate|up|gate_up)/weight", ("experts", "expert_hidden", None)),
    (_LAYER + r"ffn/experts/down/weight", ("experts", None, "expert_hidden")),
]
"""Path of a weight -> logical axis of each of its axes. Of gate_up each half is shared out."""

SHARED = {
    "vocabulary": "vocab_size",
    "heads": "num_heads",
    "dense_hidden": "dense_hidden_dim",
    "shared_hidden": "shared_hidden_dim",
    "experts": "num_experts",
    "expert_hidden": "expert_hidden_dim",
}
"""Logical axes that devices share out -> their field of `Sizes`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightInfo:
    """What is known of a whole weight before it is read.

    Attributes:
      path: in the tree of parameters.
      shape: in the parameters.
      block_size: weights in a block, 1 for an array.
      num_bytes: of the whole.
    """

    path: str
    shape: tuple[int, ...]
    block_size: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshChoice:
    """A mesh as users choose it.

    Attributes:
      axes: devices along each axis, 1 for one that is not named; None for `auto_axes`.
      splits_cache: see `Shard`.
    """

    axes: Mapping[str, int] | None = None
    splits_cache: bool = False

    def __post_init__(self):
        for name, size in (self.axes or {}).items():
            if name not in AXES or not isinstance(size, int) or size < 1:
                names = ", ".join(AXES)
                raise ValueError(f"axes must be of {names}, with devices each, got {name!r}: {size!r}.")


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Returns the logical axis of each axis of the weight at `path`, None for one that is not shared out.

    Raises:
      ValueError: if no rule or more than one is about the path.
    """
    found = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(f"one sharding rule must be about each weight, got {len(found)} for {path!r}.")
    return found[0]


def size_of(sizes: Sizes, axis: str | None, default: int) -> int:
    """Returns the size of a logical axis, `default` of None."""
    return default if axis is None else getattr(sizes, SHARED[axis])


def num_parts(shard: Shard, axis: str | None) -> int:
    """Returns among how many devices a logical axis is shared out."""
    return math.prod(getattr(shard, name) for name in MESH_AXES[axis])


def index_of(shard: Shard, axis: str | None, place: Mapping[str, int]) -> int:
    """Returns which part of a logical axis the device at `place` of the mesh has."""
    index = 0
    for name in MESH_AXES[axis]:
        index = index * getattr(shard, name) + place[name]
    return index


def make_shard(
    config: ModelConfig,
    weights: Iterable[WeightInfo],
    *,
    data: int = 1,
    expert: int = 1,
    model: int = 1,
    splits_cache: bool = False,
) -> Shard:
    """Returns what one device of a mesh has.

    Args:
      config: the model.
      weights: all of its weights.
      data: devices along this axis, and so on.
      expert: the same.
      model: the same.
      splits_cache: see `Shard`.

    Raises:
      ValueError: if an axis has no device or the mesh too many, a page cannot be split among a group, or a
        weight has no rule.
    """
    for name, size in zip(AXES, (data, expert, model), strict=True):
        if size < 1:
            raise ValueError(f"the axis {name} of a mesh must have at least one device, got {size}.")
    if data * expert * model > MAX_DEVICES:
        raise ValueError(f"a mesh must have at most {MAX_DEVICES} devices, got {data * expert * model}.")
    if splits_cache and PAGE_SIZE % (expert * model):
        raise ValueError(
            f"a cache is split among a number of devices that divides the {PAGE_SIZE} tokens of a page, "
            f"got {expert * model} along expert and model."
        )
    whole, units = config.sizes, dict.fromkeys(SHARED, 1)
    for weight in weights:
        axis = logical_axes(weight.path)[-1]
        if axis is not None and (size := size_of(whole, axis, 0)):
            width = weight.shape[-1] // size  # columns of one head, or 1
            units[axis] = math.lcm(units[axis], weight.block_size // math.gcd(weight.block_size, width))
    shard = Shard(data=data, expert=expert, model=model, splits_cache=splits_cache, sizes=whole)

    def part(axis):
        count, unit = size_of(whole, axis, 0), units[axis]
        return -(-count // (num_parts(shard, axis) * unit)) * unit

    sizes = Sizes(**{field: part(axis) for axis, field in SHARED.items()})
    return dataclasses.replace(shard, sizes=sizes)


def parse_mesh(text: str) -> dict[str, int] | None:
    """Returns the devices along each axis of "data=2,model=4"; None of "auto".

    Raises:
      ValueError: for anything else.
    """
    if text == "auto":
        return None
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in axes or not re.fullmatch(r"[1-9]\d{0,5}", size):
            raise ValueError(
                f"a mesh must be auto, or some of {', '.join(AXES)} with their devices, as data=2,model=4, "
                f"got {text!r}."
            )
        axes[name] = int(size)
    return axes


def auto_axes(config: ModelConfig, num_devices: int) -> dict[str, int]:
    """Returns the axes of a mesh of all devices: they share out whole experts as far as that divides."""
    expert = math.gcd(config.moe.num_experts, num_devices) if config.moe else 1
    return dict(expert=expert, model=num_devices // expert)


def map_weights(function: Callable, params):
    """Returns the tree of `function(path, weight)` of every weight; a path is as "layers_0/attn/q/weight"."""
    is_weight = lambda node: not isinstance(node, Mapping)
    of = lambda keys, weight: function("/".join(entry.key for entry in keys), weight)
    return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_weight)


def describe(params) -> list[WeightInfo]:
    """Returns what is known of each weight; `ShapeDtypeStruct`s in place of arrays do."""
    found = []

    def note(path, weight):
        is_quantised = isinstance(weight, quant.QuantizedTensor)
        info = WeightInfo(
            path=path,
            shape=tuple(weight.shape),
            block_size=quant.FORMATS[weight.format].block_size if is_quantised else 1,
            num_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight)),
        )
        found.append(info)

    map_weights(note, params)
    return found


@functools.lru_cache
def device_mesh(shard: Shard) -> Mesh:
    """Returns the mesh: the first devices that JAX has, of all processes.

    Raises:
      ValueError: if there are too few, or a process has none of them.
    """
    sizes, devices = (shard.data, shard.expert, shard.model), jax.devices()
    if shard.num_devices > len(devices):
        raise ValueError(
            f"the mesh {shard.mesh} must have at most the {len(devices)} devices that there are, "
            f"got {shard.num_devices}."
        )
    devices = devices[: shard.num_devices]
    if len({device.process_index for device in devices}) < jax.process_count():
        raise ValueError(
            f"each of the {jax.process_count()} processes must have devices of the mesh, but the first "
            f"{shard.num_devices} of {jax.device_count()} devices are of fewer: name a mesh of all."
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def weight_spec(path: str, weight: Weight):
    """Returns the partition of the weight at `path`: a tree of `PartitionSpec`s like its leaves."""
    *lead, last = (MESH_AXES[axis] or None for axis in logical_axes(path))
    if isinstance(weight, quant.QuantizedTensor):
        header = None if weight.header is None else PartitionSpec(*lead)
        return dataclasses.replace(weight, blocks=PartitionSpec(*lead, last), header=header)
    if isinstance(weight, quant.PlanarTensor):
        return dataclasses.replace(weight, planes=(PartitionSpec(*lead, last),) * len(weight.planes))
    if isinstance(weight, quant.PanelTensor):
        raise NotImplementedError(
            "panels on a mesh of devices are not supported: undo them (quant.in_blocks)."
        )
    if isinstance(weight, quant.LoraTensor):
        raise NotImplementedError("adapters on a mesh of devices are not supported: merge them first.")
    return PartitionSpec(*lead, last)


def part_shape(path: str, shape: tuple[int, ...], config: ModelConfig, shard: Shard) -> tuple[int, ...]:
    """Returns the shape of one device's part of the weight at `path`.

    Raises:
      ValueError: if the weight has another number of axes than its rule.
    """
    axes = logical_axes(path)
    if len(axes) != len(shape):
        raise ValueError(f"{path} must have {len(axes)} axes, got the shape {shape}.")
    of = lambda axis, size: size // size_of(config.sizes, axis, size) * size_of(shard.sizes, axis, size)
    return tuple(of(axis, size) for axis, size in zip(axes, shape, strict=True))


def abstract_params(params, config: ModelConfig, shard: Shard):
    """Returns weights on the mesh without their numbers, to lower steps with.

    Args:
      params: nested dict of whole weights, of `ShapeDtypeStruct`s.
      config: the model.
      shard: of `make_shard`.
    """

    def one(path, weight):
        *lead, last = part_shape(path, tuple(weight.shape), config, shard)
        count = [num_parts(shard, axis) for axis in logical_axes(path)]

        def leaf_of(spec, leaf):
            sizes = lead
            if len(spec) > len(lead):  # else a header, which has no columns
                sizes = [*lead, last * leaf.shape[len(lead)] // weight.shape[-1]]
            whole = [size * parts for size, parts in zip(sizes, count, strict=False)]
            shape = (*whole, *leaf.shape[len(whole) :])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=shardings(spec, shard))

        return jax.tree.map(leaf_of, weight_spec(path, weight), weight)

    return map_weights(one, params)


def param_specs(params):
    """Returns the partition of every weight, see `weight_spec`."""
    return map_weights(weight_spec, params)


def cache_specs(run: RunConfig) -> Cache:
    """Returns the partition of a cache: pages over `data`; of a page the heads or, if split, the slots."""
    if run.mla == MLAMode.EXPANDED:
        rows = PartitionSpec(DATA, None, GROUP)
    else:
        is_split = run.shard is not None and run.shard.splits_cache
        rows = PartitionSpec(DATA, GROUP if is_split else None)
    return Cache(layers=rows, length=PartitionSpec(DATA))


def reduction_specs(reduction: ExpertReduction) -> ExpertReduction:
    """Returns the partition of a setting of Smart Expert Reduction, of each sequence."""
    of = lambda values: PartitionSpec(*(None,) * (values.ndim - 1), DATA)
    return dataclasses.replace(
        reduction,
        minimum=of(reduction.minimum),
        threshold=of(reduction.threshold),
        temperature=None if reduction.temperature is None else PartitionSpec(),
    )


PER_SEQUENCE, SAME = PartitionSpec(DATA), PartitionSpec()


def run_on_mesh(function: Callable, run: RunConfig, args: tuple, out_specs, same: tuple = ()):
    """Calls `function(*args, *same)` on every device of the mesh, each with its parts; without one as it is.

    Args:
      function: of the arrays of one device.
      run: its `shard` says which mesh.
      args: weights (a dict), caches, `ExpertReduction`s, None, and trees of arrays [B, ...] of the sequences.
      out_specs: partition of the results, a prefix of their tree.
      same: arrays that every device is given whole.
    """
    if run.shard is None:
        return function(*args, *same)
    in_specs = (*(_specs(arg, run) for arg in args), *(SAME for _ in same))
    mapped = jax.shard_map(
        function, mesh=device_mesh(run.shard), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped(*args, *same)


def of_parts(form: Callable[[Weight], Weight], path: str, weight: Weight, run: RunConfig) -> Weight:
    """Returns the weight at `path` in the form that `form` gives it: of each device's part, on a mesh."""
    if run.shard is None:
        return form(weight)
    after = jax.eval_shape(form, weight)
    if jax.tree.structure(after) == jax.tree.structure(weight):
        return weight
    specs = dict(in_specs=(weight_spec(path, weight),), out_specs=weight_spec(path, after))
    return jax.jit(jax.shard_map(form, mesh=device_mesh(run.shard), check_vma=False, **specs))(weight)


def shardings(specs, shard: Shard):
    """Returns the tree of `NamedSharding`s of a tree of `PartitionSpec`s."""
    mesh = device_mesh(shard)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _specs(arg, run):
    if isinstance(arg, Mapping):
        return param_specs(arg)
    if isinstance(arg, Cache):
        return cache_specs(run)
    if isinstance(arg, ExpertReduction):
        return reduction_specs(arg)
    return PER_SEQUENCE
