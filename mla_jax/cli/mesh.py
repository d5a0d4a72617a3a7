"""From the flags of a mesh to the devices that share a model out."""

import dataclasses
import math

import jax
from absl import flags as absl_flags

from checkpoints_tools import names, place_sizes
from mla_jax import generate as generate_lib
from mla_jax import sharding, sharding_plan
from mla_jax.cli import placement_flags
from mla_jax.cli.argv import UsageError, spelled
from mla_jax.config import RunConfig
from mla_jax.sharding import MeshChoice

_MOST_OF_A_CPU = 64  # devices; each takes threads and memory of its own


def choice(values: absl_flags.FlagValues) -> MeshChoice | None:
    """Returns the mesh of a command line, None without one; not every command has the flags.

    Raises:
      UsageError: for what is no mesh, or flags that do not go with one.
    """
    if "mesh" not in values:
        return None
    if values.mesh is None:
        if values.split_cache:
            raise UsageError("--split-cache must come with --mesh.")
        return None
    for name in placement_flags.NAMES:
        if name != "n_gpu_layers" and values[name].present:
            flag = spelled(name)
            raise UsageError(f"{flag} must not come with --mesh, whose devices have equal parts of all.")
    try:
        return MeshChoice(axes=sharding.parse_mesh(values.mesh), splits_cache=values.split_cache)
    except ValueError as error:
        raise UsageError(f"--mesh: {error}") from None


def prepare(values: absl_flags.FlagValues) -> None:
    """Has JAX make devices of the CPU for the mesh; it must not have looked for devices yet."""
    chosen = choice(values)
    if chosen is None or chosen.axes is None:
        return
    num_processes = values.num_processes if "num_processes" in values and values.num_processes else 1
    num_devices = math.prod(chosen.axes.values())
    if num_devices % num_processes:
        raise UsageError(
            f"--mesh must have a multiple of {num_processes} devices for {num_processes} processes, "
            f"got {num_devices}."
        )
    num_own = num_devices // num_processes
    if num_own > _MOST_OF_A_CPU:
        raise UsageError(f"--mesh must have at most {_MOST_OF_A_CPU} devices in a process, got {num_own}.")
    if num_processes > 1 or jax.config.jax_num_cpu_devices < num_devices:
        jax.config.update("jax_num_cpu_devices", num_own)


def describe_parts(model: generate_lib.Model) -> str:
    """Returns a line about what the devices of a loaded model have."""
    shard = model.run.shard
    if shard.num_devices == 1:
        return "--mesh has no effect: there is one device, and it has the whole model"
    num_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.params))
    per_device = sharding_plan.cache_bytes(model.config, model.run, model.ctx_size)
    weights, rows = f"{num_bytes / 2**20:,.1f} MiB of weights", f"{per_device / 2**20:,.1f} MiB of cache"
    return f"mesh {shard.mesh}: {weights} and {rows} on each of {shard.num_devices} devices"


def plan(values: absl_flags.FlagValues, run: RunConfig) -> str:
    """Describes what a mesh comes to by the flags of `plan`, for devices that need not be there.

    Raises:
      UsageError: as of `choice`, or for `auto`, which asks how many devices there are.
    """
    chosen = choice(values)
    if chosen.axes is None:
        raise UsageError("--mesh must name its axes for a plan, as expert=8, got auto.")
    contents = place_sizes.read_contents(values.model, values.type)
    weights, config = sharding.describe(names.unflatten(contents.tensors)), contents.config
    shard = sharding.make_shard(config, weights, **chosen.axes, splits_cache=chosen.splits_cache)
    run = dataclasses.replace(run, shard=shard)
    return sharding_plan.describe(weights, config, run, values.ctx_size or config.context_length)
