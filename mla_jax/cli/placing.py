"""From the flags of where a model lies to its `Placement`."""

import re

import jax
from absl import flags as absl_flags

from checkpoints_tools import place_sizes
from checkpoints_tools.place_sizes import Contents
from mla_jax import placement as placement_lib
from mla_jax import segments as segments_lib
from mla_jax.cli import placement_flags
from mla_jax.cli.argv import UsageError, spelled
from mla_jax.config import RunConfig
from mla_jax.placement import CPU, Placement, Rules
from mla_jax.segments import Segments

_OF_GPU_ALONE = [name for name in placement_flags.NAMES if name != "n_gpu_layers"]


def is_asked(values: absl_flags.FlagValues) -> bool:
    """Whether any flag says where the model lies."""
    return any(values[name].present for name in placement_flags.NAMES)


def wants_gpu(values: absl_flags.FlagValues) -> bool:
    """Whether anything may lie on a GPU; not every command has all of the flags."""
    overrides = placement_lib.parse_overrides(values.override_tensor) if "override_tensor" in values else ()
    fits = "fit" in values and _fit_margin(values) is not None
    return values.n_gpu_layers > 0 or fits or any(place != CPU for _, place in overrides)


def useless(values: absl_flags.FlagValues) -> list[str]:
    """Returns the flags that are given and mean nothing where there is no GPU, as they are spelled."""
    given = [name for name in _OF_GPU_ALONE if name in values and values[name].present]
    return [spelled(name) for name in given]


def choose(
    values: absl_flags.FlagValues,
    contents: Contents,
    *,
    ctx_size: int,
    run: RunConfig,
    ubatch: int,
    free=None,
) -> Placement:
    """Returns where the model lies.

    Args:
      values: flags of `placement_flags`.
      contents: the model.
      ctx_size: tokens that the cache holds.
      run: how it is run.
      ubatch: prompt tokens computed at a time.
      free: a function that returns the bytes that the GPU has free, for `--fit`.

    Raises:
      UsageError: for flags that contradict each other.
      ValueError: for an override that is none of this model, see `placement.arrange`.
    """
    margin = _fit_margin(values)
    if margin is None:
        rules = Rules(
            gpu_layers=values.n_gpu_layers,
            overrides=placement_lib.parse_overrides(values.override_tensor),
            cpu_experts=placement_lib.ALL_LAYERS if values.cpu_moe else values.n_cpu_moe,
            main_gpu=values.main_gpu,
        )
        return placement_lib.arrange(contents.config, contents.tensors, rules)
    for name in ("override_tensor", "cpu_moe", "n_cpu_moe"):
        if values[name].present:
            flag = spelled(name)
            raise UsageError(f"--fit chooses what lies where, so it must not come with {flag}.")
    if values["n_gpu_layers"].present and values.n_gpu_layers == 0:
        raise UsageError("--fit must not come with -ngl 0, with which everything lies on the CPU.")
    weights = placement_lib.unit_bytes(contents.tensors, run)
    rows = placement_lib.row_bytes(contents.config, run, ctx_size=ctx_size)
    reserve = placement_lib.workspace_bytes(contents.config, run, ubatch=ubatch)
    rules = placement_lib.fit(
        contents.config,
        contents.tensors,
        lambda unit, place: weights(unit, place) + rows * unit.startswith("attn."),
        room=free() - (margin << 20) - reserve,
        gpu_layers=values.n_gpu_layers or placement_lib.ALL_LAYERS,
        main_gpu=values.main_gpu,
    )
    return placement_lib.arrange(contents.config, contents.tensors, rules)


def free_bytes(device: jax.Device) -> int:
    """Returns how much JAX may still take of a device's memory.

    Raises:
      UsageError: if the device does not tell.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise UsageError(
            f"--fit must be told by the GPU how much memory is free, and {device} does not say: "
            "give -ngl and --n-cpu-moe."
        )
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def plan(values: absl_flags.FlagValues, run: RunConfig) -> str:
    """Describes what lies where by the flags of `plan`, for a machine that need not be this one.

    Raises:
      UsageError: as of `choose`, or if there is no GPU and no flag says what one has.
    """
    contents = place_sizes.read_contents(values.model, values.type)
    sizes = dict(ctx_size=values.ctx_size or contents.config.context_length, run=run)
    sizes["ubatch"] = values.ubatch_size

    def free():
        if values.device_memory is not None:
            return values.device_memory << 20
        devices = segments_lib.devices_at_hand()
        if placement_lib.gpu(values.main_gpu) not in devices:
            raise UsageError("--fit must come with --device-memory where there is no such GPU.")
        return free_bytes(devices[placement_lib.gpu(values.main_gpu)])

    return place_sizes.describe(contents, choose(values, contents, **sizes, free=free), **sizes)


def segments(
    values: absl_flags.FlagValues, tell, *, ctx_size, run: RunConfig, ubatch: int
) -> Segments | None:
    """Returns how a model runs on more than one device, None for on JAX's; tells what lies where.

    Args:
      values: flags of `placement_flags`, and the model.
      tell: called with a line.
      ctx_size: from the config to tokens of context.
      run: how the model is run.
      ubatch: prompt tokens computed at a time.
    """
    devices = segments_lib.devices_at_hand()
    if len(devices) == 1:
        for flag in useless(values):
            tell(f"{flag} has no effect: everything runs on the CPU")
        return None
    main = placement_lib.gpu(values.main_gpu)
    if main not in devices:
        raise UsageError(f"--main-gpu must be below {len(devices) - 1}, the number of GPUs, got {main[4:]}.")
    contents = place_sizes.read_contents(values.model)
    sizes = dict(ctx_size=ctx_size(contents.config), run=run, ubatch=ubatch)
    placement = choose(values, contents, **sizes, free=lambda: free_bytes(devices[main]))
    if contents.config.moe is None and (values.cpu_moe or values.n_cpu_moe):
        tell("--cpu-moe and --n-cpu-moe have no effect: the model has no experts")
    if placement.places == (main,):
        if values.main_gpu:
            jax.config.update("jax_default_device", devices[main])
        return None
    found = Segments(placement, devices)
    tell(f"placement: {placement.describe()}")
    sizes = place_sizes.of_places(contents, placement, **sizes)
    tell(", ".join(f"{place}: {size.weights / 2**20:,.1f} MiB of weights" for place, size in sizes.items()))
    return found


def _fit_margin(values):
    """Returns the MiB to leave free, or None without `--fit`."""
    if not re.fullmatch(placement_flags.FIT, values.fit):
        raise UsageError(f"--fit must be on, off or MiB to leave free, got {values.fit!r}.")
    if values.fit in ("on", "off"):
        return placement_lib.FIT_MARGIN if values.fit == "on" else None
    return int(values.fit)
