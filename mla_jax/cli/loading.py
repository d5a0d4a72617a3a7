"""From the flags that commands share to a loaded model."""

import logging
import math
import os
import sys
import time
from typing import Any

import jax
from absl import flags as absl_flags
from absl import logging as absl_logging

from checkpoints_tools import memory
from mla_jax import expert_reduction as reduction_lib
from mla_jax import generate as generate_lib
from mla_jax import sampler, steps
from mla_jax.cache import bytes_per_token
from mla_jax.cli import mesh as mesh_lib
from mla_jax.cli import placing
from mla_jax.cli.argv import UsageError
from mla_jax.config import MLAMode, RunConfig


def load(values: absl_flags.FlagValues, *, on_one_device: bool = False, **more: Any) -> generate_lib.Model:
    """Loads the model of a command line, and tells what that came to.

    Args:
      values: flags of `flags.define_model` and `flags.define_run`.
      on_one_device: whether the command reads weights other than by the steps of the engine.
      **more: further arguments of `generate.load`.

    Raises:
      UsageError: for flags that cannot be, or that place a model on more devices than the command can use.
    """
    show_log()
    choose_device(values)
    setting, layers = expert_reduction(values)
    settings, ubatch = run_settings(values), min(values.batch_size, values.ubatch_size)
    mesh = mesh_lib.choice(values)
    segments = None if mesh else _segments(values, RunConfig(**settings), ubatch)
    if on_one_device and (segments or mesh):
        raise UsageError(
            "this command runs a model on one device, so -ngl must be 0 or 999, and alone, without --mesh."
        )
    if segments and more.get("programs", steps) is not steps:
        raise UsageError(f"-ngl must be 0 or 999 with --coordinator, got {values.n_gpu_layers}.")
    _check_repack(values, on_one_device=not (segments or mesh))
    started = time.perf_counter()
    cache, told = _compilation_cache()
    model = generate_lib.load(
        values.model,
        **settings,
        ctx_size=values.ctx_size,
        ubatch=ubatch,
        lora=adapters(values),
        compilation_cache=cache,
        segments=segments,
        mesh=mesh,
        mmap=values.mmap,
        run_time_repack=values.run_time_repack,
        **more,
    )
    model.expert_reduction = reduction_lib.per_layer(model.config, setting, layers)
    seconds = time.perf_counter() - started
    tell(f"loaded {values.model} in {seconds:.1f} s; context {model.ctx_size} tokens; {told}")
    per_token = bytes_per_token(model.config, model.run)
    where = "for each group of the mesh" if mesh else "in all"
    tell(f"cache: {per_token:,} bytes a token, {per_token * model.ctx_size / 2**20:.1f} MiB {where}")
    if mesh is not None:
        _tell_of_mesh(values, model)
    if values.mlock:
        _lock(model.params)
    if (setting or layers) and reduction_lib.describe(model.expert_reduction) == "off":
        used = model.config.moe.num_experts_per_token if model.config.moe else 0
        tell(f"Smart Expert Reduction has no effect: the model takes {used} experts a token")
    _tell_of_cache(values, model.run)
    if model.ctx_size > model.config.context_length:
        tell(
            f"the context is longer than the {model.config.context_length} tokens that the model was made for"
        )
    return model


def _check_repack(values, *, on_one_device):
    if values.run_time_repack and values.mmap:
        raise UsageError("--run-time-repack must come without --mmap: what it lays out is read, not mapped.")
    if values.run_time_repack and not on_one_device:
        tell("--run-time-repack has no effect with --mesh or -ngl: weights stay in blocks")


def _tell_of_cache(values, run):
    if values["attention_max_batch"].present and run.mla == MLAMode.EXPANDED:
        tell("--attention-max-batch has no effect with -mla 0")
    if values.k_cache_hadamard and not (run.latent_rotation or run.rope_rotation):
        tell(f"--k-cache-hadamard is off: a cache of type {values.cache_type_k} is not quantised")


def _tell_of_mesh(values, model):
    tell(mesh_lib.describe_parts(model))
    if 0 < values.n_gpu_layers <= model.config.num_layers:
        tell(f"-ngl {values.n_gpu_layers} is 999 with --mesh, whose devices have parts of all layers")
    if values.mmap:
        tell("--mmap has no effect with --mesh: parts of weights are read")


def _segments(values, run, ubatch):
    ctx_size = lambda config: generate_lib.context_size(config, values.ctx_size)
    return placing.segments(values, tell, ctx_size=ctx_size, run=run, ubatch=ubatch)


def run_settings(values: absl_flags.FlagValues) -> dict[str, Any]:
    """Returns the fields of `RunConfig` by the flags of `flags.define_run`; arguments of `generate.load`."""
    return dict(
        mla=int(values.mla),
        flash=values.flash_attn != "off",
        cache_type=values.cache_type_k,
        cache_type_rope=values.cache_type_rope,
        hadamard_size=_hadamard_size(values),
        attention_max_batch=values.attention_max_batch,
        group_routing=values.grouped_expert_routing,
        gpu_kernels=None if values.gpu_kernels else False,
    )


def adapters(values: absl_flags.FlagValues) -> list[tuple[str, float]]:
    """Returns the files or folders of adapters and their scales, by the flags `--lora` and `--lora-scaled`.

    Raises:
      UsageError: for a scale that is no finite number.
    """
    found = [(path, 1.0) for path in values.lora]
    for path, text in zip(values.lora_scaled[::2], values.lora_scaled[1::2], strict=True):
        try:
            scale = float(text)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UsageError(f"--lora-scaled must be a file and a finite number, got {path!r} {text!r}.")
        found.append((path, scale))
    return found


def expert_reduction(values: absl_flags.FlagValues):
    """Returns the (Kmin, t) of all layers, or None, and those of single layers."""
    text, path = values.smart_expert_reduction, values.ser_layers
    setting = None if text is None else reduction_lib.parse(text)
    return setting, {} if path is None else reduction_lib.read_layers(path)


def _lock(params):
    try:
        num_bytes = memory.lock(jax.tree.leaves(params))
        tell(f"--mlock: weights of {num_bytes / 2**30:.2f} GiB are locked in memory")
    except OSError as error:
        tell(f"--mlock: not all weights are locked in memory: {error}")


def _hadamard_size(values):
    if values.hadamard_size is not None and not values.k_cache_hadamard:
        raise UsageError("--hadamard-size must come with --k-cache-hadamard, which turns the rotation on.")
    return int(values.hadamard_size or 64) if values.k_cache_hadamard else None


def show_log() -> None:
    """Shows what loading has to say on stderr, as plain sentences."""
    logging.basicConfig(format="%(message)s")
    absl_logging.get_absl_logger().setLevel(logging.INFO)


def _compilation_cache():
    """Returns the folder for compiled code, None where there can be none, and a clause that says so."""
    folder = steps.COMPILATION_CACHE
    try:
        steps.use_compilation_cache(folder)
    except OSError as error:
        return None, f"compiled code is not kept: {folder}: {error.strerror}"
    return folder, f"compiled code is kept in {folder}"


def choose_device(values: absl_flags.FlagValues) -> None:
    """Chooses cores and device by the flags `--threads`, `-ngl` and `--gpu-kernels`.

    Raises:
      UsageError: for more cores than there are.
    """
    if values.threads is not None:
        if not hasattr(os, "sched_setaffinity"):
            raise UsageError(
                "--threads cannot be used on this system: it has no way to restrict a process to cores."
            )
        allowed = sorted(os.sched_getaffinity(0))
        if values.threads > len(allowed):
            raise UsageError(
                f"--threads must be at most the {len(allowed)} cores of this machine, got {values.threads}."
            )
        os.sched_setaffinity(0, allowed[: values.threads])
    mesh_lib.prepare(values)
    if not placing.wants_gpu(values):
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        asked = f"-ngl {values.n_gpu_layers}" if values.n_gpu_layers else "--fit or --override-tensor"
        tell(f"{asked}: there is no GPU that JAX can use, so everything runs on the CPU")
    if not values.gpu_kernels and jax.default_backend() != "gpu":
        tell("--nogpu_kernels has no effect: the model runs on the CPU")


def sampling_params(values: absl_flags.FlagValues) -> sampler.SamplingParams:
    """Returns how to draw by the flags of `flags.define_sampling`; its seed is None if there is none.

    Raises:
      ValueError: for a number out of range.
    """
    return sampler.SamplingParams(
        temperature=values.temp,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        typical_p=values.typical,
        repeat_penalty=values.repeat_penalty,
        penalty_last_n=values.repeat_last_n,
        presence_penalty=values.presence_penalty,
        frequency_penalty=values.frequency_penalty,
        seed=None if values.seed < 0 else values.seed,
    )


def tell(text: str) -> None:
    """Writes a line to stderr, where what is no result goes."""
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Writes to stdout, where results go, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
