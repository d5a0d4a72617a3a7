"""Compiles the kernels, and whole steps, for GPUs that are not here: by XLA and Triton, to machine code.

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt   # of the version of jax; no driver is needed
    python benchmarks/gpu_compile.py --out benchmarks/results/gpu-compile.json

For each GPU, model and type of cache: every operation that `mla-jax autotune` would measure there, at the
tile sizes that a run takes without measurements; the gradient of the prefill; and the prefill and decode
steps of the dense layers and one with experts, donated and with Smart Expert Reduction. XLA refuses what does
not fit the shared memory or the registers of the GPU. Of each kernel is told the shared memory it takes and,
with a `ptxas` (`--ptxas`), its registers and the bytes that it spills. Nothing runs, so nothing is told of
speed or of results.

Prints a line for each case, and as its last line one JSON object; `--out` is written after each case. Ends
with code 1 if anything did not compile.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

_DUMP = tempfile.TemporaryDirectory()
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={_DUMP.name}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from benchmarks import abstract_gpu, gpu_model_cases, machine  # noqa: E402
from mla_jax import autotune_cases, presets, steps  # noqa: E402
from mla_jax import expert_reduction as reduction_lib  # noqa: E402
from mla_jax.config import CACHE_TYPES, RunConfig  # noqa: E402
from pallas_kernels import dispatch, flash_mla_prefill  # noqa: E402

_KERNELS = ("flash_mla", "latent_append", "grouped_")  # how the names of ours begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU:
    """What a compiler asks of a GPU. Source: NVIDIA's data sheets and CUDA programming guide."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    threads: int  # of a multiprocessor
    float_units: int  # of a multiprocessor
    shared_memory: int  # of a program at most
    shared_memory_of_all: int  # of a multiprocessor
    memory: int
    l2: int
    bandwidth: int
    gigahertz: float

    @property
    def arch(self) -> str:
        """Its name for `ptxas`."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major == 9 else ''}"

    def description(self) -> str:
        """Returns the text of XLA's `GpuTargetConfigProto`."""
        major, minor = self.capability
        extension = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory_of_all}
              shared_memory_per_block_optin: {self.shared_memory}
              core_count: {self.multiprocessors} fpus_per_core: {self.float_units}
              clock_rate_ghz: {self.gigahertz} memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2} device_memory_size: {self.memory}
              device_vendor: "NVIDIA Corporation" name: "{self.name}"
              driver_version: "13.0.0" runtime_version: "12.8.0" dnn_version: "9.10.0"
            }}
            platform_name: "CUDA" device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}
        """


GPUS = {
    "h200": GPU(
        name="NVIDIA H200",
        capability=(9, 0),
        multiprocessors=132,
        threads=2048,
        float_units=128,
        shared_memory=227 << 10,
        shared_memory_of_all=228 << 10,
        memory=141 * 10**9,
        l2=50 << 20,
        bandwidth=4800 * 10**9,
        gigahertz=1.98,
    ),
    "a100": GPU(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        threads=2048,
        float_units=64,
        shared_memory=163 << 10,
        shared_memory_of_all=164 << 10,
        memory=80 * 10**9,
        l2=40 << 20,
        bandwidth=2039 * 10**9,
        gigahertz=1.41,
    ),
    "rtx4090": GPU(
        name="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        multiprocessors=128,
        threads=1536,
        float_units=128,
        shared_memory=99 << 10,
        shared_memory_of_all=100 << 10,
        memory=24 * 10**9,
        l2=72 << 20,
        bandwidth=1008 * 10**9,
        gigahertz=2.52,
    ),
}

_GPUS = flags.DEFINE_list("gpus", list(GPUS), "GPUs to compile for.")
_MODELS = flags.DEFINE_list("models", ["deepseek-v2-lite", "deepseek-v3", "glm-4.7-flash"], "presets.")
_CACHE_TYPES = flags.DEFINE_list("cache_types", list(CACHE_TYPES), "types of the cache.")
_FORMATS = flags.DEFINE_list("formats", ["q8_0", "q4_0", "q4_K", "q6_K", "iq4_xs", "iq4_ks"], "of weights.")
_STEPS = flags.DEFINE_bool("steps", True, "compile whole steps too, with a q8_0 cache.")
_CTX_SIZE = flags.DEFINE_integer("ctx_size", 32768, "tokens of the cache.", lower_bound=1024)
_UBATCH = flags.DEFINE_integer("ubatch", 512, "prompt tokens at a time.", lower_bound=1)
_PTXAS = flags.DEFINE_string("ptxas", shutil.which("ptxas"), "assembler that tells of registers.")
_OUT = flags.DEFINE_string("out", None, "file to write the JSON object to as well.")

Case = tuple[dict, Callable, tuple, dict[str, Any]]  # what it is, a function, its arguments


def _kernel_cases() -> Iterator[Case]:
    """Yields each operation of the models, with each format and type of cache; what is alike once."""
    kinds = [(_FORMATS.value[0], name) for name in _CACHE_TYPES.value]
    kinds += [(format, _CACHE_TYPES.value[0]) for format in _FORMATS.value[1:]]
    sizes, seen = dict(ctx_size=_CTX_SIZE.value, ubatch=_UBATCH.value), set()
    for model, (format, name) in itertools.product(_MODELS.value, kinds):
        config, weights = autotune_cases.weights_of(model, format)
        for case in autotune_cases.cases(config, weights, RunConfig(cache_type=name), **sizes):
            told = {key: size for key, size in case.sizes.items() if key not in ("batch", "slots")}
            if (case.op, *told.values()) not in seen:
                seen.add((case.op, *told.values()))
                call = functools.partial(case.step, case.heuristic)
                yield dict(op=case.op, **told), call, jax.eval_shape(case.operands), {}
    yield from map(_gradient_case, _MODELS.value)


def _gradient_case(model) -> Case:
    config, T = presets.PRESETS[model].mla, _UBATCH.value
    N, H, P, V = config.num_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    shaped = lambda *shape: jax.ShapeDtypeStruct((1, T, *shape), jnp.bfloat16)

    def loss(*parts):
        start, length = jnp.zeros((1,), jnp.int32), jnp.full((1,), T, jnp.int32)
        out, _ = flash_mla_prefill.flash_mla_prefill(*parts, start, length, sm_scale=0.1)
        return out.astype(jnp.float32).sum()

    parts = shaped(N, H), shaped(N, P), shaped(N, H), shaped(P), shaped(N, V)
    told = dict(op="gradient of flash_mla_prefill", queries=T, heads=N, widths=f"{H}/{P}/{V}")
    return told, jax.grad(loss, argnums=(0, 1, 2, 3, 4)), parts, {}


def _step_cases() -> Iterator[Case]:
    """Yields prefill and decode of each model, of its dense layers and one with experts."""
    for model in _MODELS.value:
        run = RunConfig(cache_type="q8_0", hadamard_size=64, gpu_kernels=True)
        count = presets.PRESETS[model].num_dense_layers + 1
        shapes = gpu_model_cases.shapes_of(model, "q8_0", run, count)
        decode = jax.eval_shape(
            lambda shapes=shapes: gpu_model_cases.decode_operands(shapes, _CTX_SIZE.value)
        )
        params, one, _, cache, *_, pages = decode
        settings = reduction_lib.arrays(reduction_lib.per_layer(shapes.config, (1, 0.5)))
        prompt = jax.ShapeDtypeStruct((1, _UBATCH.value), jnp.int32)
        prefill = params, prompt, one, cache, pages, settings
        told, how = dict(model=model, layers=count, cache="q8_0"), dict(config=shapes.config, run=run)
        yield dict(op="prefill step", **told), steps.prefill, prefill, how
        yield dict(op="decode step", **told), steps.decode, (*decode, settings), how


def _compile(gpu: GPU, device, function, args, how) -> list[dict]:
    """Returns what is told of the kernels of a function, compiled."""
    placed = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with abstract_gpu.target(gpu.name):
        traced = jitted.trace(*jax.tree.map(placed, args), **how)
    folder = pathlib.Path(_DUMP.name)
    shutil.rmtree(folder)
    folder.mkdir()
    with abstract_gpu.target(gpu.name):
        traced.lower(lowering_platforms=("cuda",)).compile()
    calls = "".join(path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    texts = {path: path.read_text() for path in folder.glob("*.ptx")}  # XLA of JAX 0.11 writes none
    paths = {name: path for path, text in texts.items() for name in re.findall(r"\.entry (\S+?)\(", text)}
    found = []
    for name, size in sorted(set(re.findall(r"(\S+) grid: .*shared_memory: (\d+)", calls))):
        if name.startswith(_KERNELS):
            one = dict(name=re.sub(r"__\d+$", "", name), shared_memory=int(size))
            found.append(one | _registers(gpu, paths.get(name)))
    return [kernel for i, kernel in enumerate(found) if kernel not in found[:i]]


def _registers(gpu, path) -> dict:
    if not _PTXAS.value or not path:
        return {}
    command = [_PTXAS.value, f"-arch={gpu.arch}", "-v", path, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))
    return dict(registers=int(re.search(r"Used (\d+) registers", told)[1]), spilled_bytes=spilled)


def _row(name: str, case: Case) -> dict:
    """Compiles a case and returns its row, with the reason if it does not compile."""
    told, *call = case
    device = topologies.get_topology_desc(
        "1x1x1", "cuda", topology="1x1x1", target_config=GPUS[name].description()
    )
    row, began = dict(gpu=name, **told), time.monotonic()
    try:
        row["kernels"] = _compile(GPUS[name], device.devices[0], *call)
    except jax.errors.JaxRuntimeError as error:
        row["error"] = str(error).splitlines()[0]
    return row | dict(seconds=round(time.monotonic() - began, 1))


def _line(row):
    sizes = " ".join(str(row[key]) for key in row if key not in ("gpu", "kernels", "seconds", "error"))
    found = row.get("error") or "; ".join(
        " ".join([kernel["name"], *(f"{key} {kernel[key]:,}" for key in kernel if key != "name")])
        for kernel in row["kernels"]
    )
    return f"{row['gpu']:8} {sizes}: {found} ({row['seconds']} s)"


def main(argv):
    """Compiles every case for every GPU."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    known = dict(
        gpus=(_GPUS, GPUS), models=(_MODELS, presets.PRESETS), cache_types=(_CACHE_TYPES, CACHE_TYPES)
    )
    for flag, (values, choices) in known.items():
        for value in values.value:
            if value not in choices:
                raise app.UsageError(f"--{flag} must be of {', '.join(choices)}, got {value!r}.")
    if not abstract_gpu.has_compiler():
        print("jax-cuda12-plugin and jax-cuda12-pjrt must both be installed.", file=sys.stderr)
        sys.exit(2)
    versions = machine.about("benchmarks/gpu_compile.py", sys.argv[1:], ["jax", "jaxlib", "jax-cuda12-pjrt"])
    result = versions | dict(rows=[])
    for name in _GPUS.value:
        jax.clear_caches()  # else what was traced with tiles of another GPU is found again
        with mock.patch.object(dispatch, "shared_memory", lambda name=name: GPUS[name].shared_memory):
            for case in (*_kernel_cases(), *(_step_cases() if _STEPS.value else ())):
                result["rows"].append(_row(name, case))
                print(_line(result["rows"][-1]), flush=True)
                if _OUT.value:
                    pathlib.Path(_OUT.value).write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    sys.exit(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    app.run(main)
