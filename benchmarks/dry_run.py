"""Runs DeepSeek-V3 dry: shapes alone, on machines that are not here.

    python benchmarks/dry_run.py --out benchmarks/results/dry-run

For each machine: the bytes of a device by the sharding table, and those that XLA counts as arguments of the
compiled step; the whole prefill and decode of all 61 layers, lowered and compiled for as many virtual devices
of the CPU, and lowered for CUDA with the kernels of `pallas_kernels` where the machine has GPUs; and by the
model of `dry_run_cost` what a step takes. No weight is made: 24 GiB of memory are enough. Writes OUT.json and
OUT.png; prints a table, and as its last line one JSON object.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import dry_run_cost, machine
from benchmarks.dry_run_cost import MACHINES
from checkpoints_tools import names, place_sizes
from mla_jax import expert_reduction as reduction_lib
from mla_jax import sampler, sharding, sharding_plan, steps
from mla_jax.cache import PAGE_SIZE, Cache, init_pool
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.transformer import lay_out

_MODEL = flags.DEFINE_string("model", "deepseek-v3", "preset, or GGUF file.")
_LAYERS = flags.DEFINE_integer(
    "layers", None, "of the model, the first ones, to be quick. [all]", lower_bound=1
)
_TOKENS = flags.DEFINE_integer("tokens", 32768, "tokens that the cache holds.", lower_bound=64)
_BATCH = flags.DEFINE_integer("batch", 8, "sequences of a step.", lower_bound=1)
_UBATCH = flags.DEFINE_integer("ubatch", 512, "prompt tokens of a prefill.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "path of the results, without .json and .png.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model without its numbers, shared out.

    Attributes:
      config: the model.
      weights: of the whole.
      run: with its shard.
      params: `ShapeDtypeStruct`s of global arrays.
    """

    config: ModelConfig
    weights: list[sharding.WeightInfo]
    run: RunConfig
    params: dict


def abstract(name: str, type: str, axes: dict[str, int], run: RunConfig, layers: int | None = None) -> Model:
    """Returns a model on a mesh.

    Args:
      name: a preset, or a GGUF file.
      type: of the weights of a preset.
      axes: of the mesh.
      run: how it is run.
      layers: how many of them; None for all.
    """
    contents = place_sizes.read_contents(name, type).first_layers(layers)
    config, params = contents.config, names.unflatten(contents.tensors)
    weights = sharding.describe(params)
    shard = sharding.make_shard(config, weights, **axes)
    run = dataclasses.replace(run, shard=shard)
    params = sharding.abstract_params(params, config, shard)
    return Model(config=config, weights=weights, run=run, params=params)


def arguments(model: Model, batch: int, num_tokens: int) -> dict[str, tuple]:
    """Returns the arguments of `steps.prefill` and `steps.decode`, large ones without their numbers.

    Args:
      model: of `abstract`.
      batch: sequences of a decode step; a prefill has one of each group.
      num_tokens: that the cache of a group holds.
    """
    config, run, num_groups = model.config, model.run, model.run.shard.data
    num_pages = -(-num_tokens // PAGE_SIZE)
    pool = jax.eval_shape(lambda: init_pool(config, run, batch=1, num_pages=num_pages * num_groups))
    placement = sharding.shardings(sharding.cache_specs(run), run.shard).layers
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)
    layers = jax.tree.map(place, pool.layers)

    def common(count):
        settings = reduction_lib.arrays(*[reduction_lib.per_layer(config, (6, 1.0))] * count)
        cache = Cache(layers=layers, length=np.zeros((count,), np.int32))
        return cache, np.zeros((count, num_pages), np.int32), settings

    one = lambda count: np.zeros((count,), np.int32)
    cache, pages, settings = common(num_groups)
    prompt = np.zeros((num_groups, _UBATCH.value), np.int32)
    prefill = (model.params, prompt, one(num_groups), cache, pages, settings)
    cache, pages, settings = common(batch)
    recent = np.zeros((batch, sampler.NUM_RECENT), np.int32)
    sampling = sampler.batch([sampler.SamplingParams(seed=0)] * batch)
    decode = (model.params, one(batch), recent, cache, sampling, np.int32(1), one(1), pages, settings)
    return dict(prefill=prefill, decode=decode)


def with_planes(model: Model) -> Model:
    """Returns the model as the kernels of a GPU read it."""
    run = dataclasses.replace(model.run, gpu_kernels=True)
    laid = jax.eval_shape(functools.partial(lay_out, run=run), model.params)
    placed = sharding.shardings(sharding.param_specs(laid), run.shard)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), laid, placed
    )
    return dataclasses.replace(model, run=run, params=params)


def try_step(name: str, model: Model, args: tuple, platform: str) -> dict:
    """Lowers a step for a platform, and compiles it for the CPU; returns what that came to."""
    began = time.perf_counter()
    traced = getattr(steps, name).trace(*args, config=model.config, run=model.run)
    lowered = traced.lower(lowering_platforms=(platform,))
    kernels = lowered.as_text().count("__gpu$xla")
    found = dict(lowered_seconds=round(time.perf_counter() - began, 1), kernels=kernels)
    if platform == "cpu":
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
        found["compiled_seconds"] = round(time.perf_counter() - began, 1)
        found["argument_gb"] = round(compiled.memory_analysis().argument_size_in_bytes / 1e9, 2)
    return found


def dry_run(spec: dry_run_cost.Machine) -> dict:
    """Returns all that is told of a machine."""
    run = RunConfig(cache_type="q8_0", hadamard_size=64, gpu_kernels=False)
    model = abstract(_MODEL.value, spec.type, spec.axes, run, _LAYERS.value)
    weights = sharding_plan.weight_bytes(model.weights, model.config, model.run.shard)
    rows = sharding_plan.cache_bytes(model.config, model.run, _TOKENS.value)
    found = dict(
        machine=spec.name,
        weights=spec.type,
        mesh=",".join(f"{axis}={size}" for axis, size in spec.axes.items()),
        whole_gb=round(sum(weight.num_bytes for weight in model.weights) / 1e9, 1),
        weights_gb=round(weights / 1e9, 2),
        cache_gb=round(rows / 1e9, 2),
        device_gb=spec.memory / 1e9,
        fits=weights + rows + spec.reserve <= spec.memory,
    )
    args = arguments(model, _BATCH.value, _TOKENS.value)
    for name in ("prefill", "decode"):
        found[name] = try_step(name, model, args[name], "cpu")
    if spec.has_gpus:
        planar = with_planes(model)
        args = arguments(planar, _BATCH.value, _TOKENS.value)
        for name in ("prefill", "decode"):
            found[name]["cuda"] = try_step(name, planar, args[name], "cuda")
    return found | dict(cost=dry_run_cost.table(spec, model.weights, model.config, model.run))


def main(argv):
    """Runs every machine dry."""
    del argv
    jax.config.update("jax_num_cpu_devices", max(spec.num_devices for spec in MACHINES))
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for spec in MACHINES:
        print(f"{spec.name}: lowering {_MODEL.value}", file=sys.stderr, flush=True)
        rows.append(dry_run(spec))
        told = {key: value for key, value in rows[-1].items() if key != "cost"}
        print(json.dumps(told), file=sys.stderr, flush=True)
    about = machine.about("benchmarks/dry_run.py", sys.argv[1:], ["jax", "jaxlib"])
    result = dict(assumptions=dry_run_cost.ASSUMPTIONS, rows=rows, **about)
    print(dry_run_cost.describe(rows))
    if _OUT.value:
        with open(f"{_OUT.value}.json", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
        dry_run_cost.plot(rows, f"{_OUT.value}.png")
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
