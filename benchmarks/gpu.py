"""Measures the kernels on a GPU: time, bytes and FLOPs against ceilings and peers of the same run.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --parts decode --batches 16 --contexts 8192,65536 --cache_types bf16,q8_0

First come the ceilings: the bandwidth of a large copy, bytes read and written, and the speed of a large
product in bfloat16. Then prefill is measured over prompt x heads, the experts of a layer (gate, up and down)
over model x tokens x format, the decoding of 32 tokens by a whole model with random weights over context x
type of the cache, and decode attention over batch x context x heads x type of the cache. Bytes and FLOPs are
what must be read and computed at least, by the `cost` of each op; the peers are told by the same:

XLA reference  the reference that defines the op, as XLA compiles it
expand to f16  decode: the whole cache is written to memory as float16, then attended to, as ik_llama.cpp does
cuDNN          prefill: `jax.nn.dot_product_attention` of joined queries and keys (joined before the clock
               runs), and values filled up with zeros to their width
torch, flash_mla, flashinfer, vllm
               those of `--libraries` that are installed, a cache of bfloat16: PyTorch's own attention (decode
               over rows in order, without pages), FlashMLA (out of vLLM too), FlashInfer, vLLM's Triton
               kernel; `benchmarks/gpu_peers.py` tells how they are run

A figure is the median of `--repeats` runs after one that warms up. A run is many calls in one jit, each of
which waits for the one before, and calls of decode in a row read other pages and other experts, so that the
L2 cache does not help. `share` is the time that the binding ceiling allows / the time taken. What does not
fit memory, fails, or would begin when `--minutes` are over is recorded with its reason: to compile the whole
grid takes longer than ten minutes, so give one of the `--parts` at a time, `--nopeers`, or more minutes.
`--out` is written after each case.

Bars are checked where they apply: decode of at least 256k cached tokens with 16 heads >= 75% (float16 and
bfloat16), 55% (q8_0), 40% (q4_0) of the copy, with 128 heads >= 300 TFLOP/s, quantised 230; decode ahead of
"expand to f16" and of vLLM's Triton kernel; prefill >= 350 TFLOP/s; experts of one token and a whole model
>= 60% of the copy.

Prints a table, and as its last line one JSON object. Without a GPU it ends with code 2, unless an
`--implementation` says how to compute anyway, which is for trying the command out at small sizes; a whole
model runs by the kernels or by XLA.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_cases, gpu_measure, gpu_model_cases, gpu_peers, machine  # noqa: E402
from checkpoints_tools.plan import is_preset  # noqa: E402
from mla_jax import presets, quant  # noqa: E402
from pallas_kernels import cache_tiles, dispatch, weight_tiles  # noqa: E402

PARTS = ("decode", "prefill", "experts", "model")
FORMATS = sorted(
    name for name in weight_tiles.LAYOUTS if name in quant.FORMATS and not quant.FORMATS[name].header_bytes
)

_PARTS = flags.DEFINE_list("parts", list(PARTS), "parts to measure.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "128"], "decode: sequences.")
_CONTEXTS = flags.DEFINE_list("contexts", ["1024", "8192", "65536"], "decode and model: cached tokens.")
_HEADS = flags.DEFINE_list("heads", ["16", "128"], "decode and prefill: query heads.")
_CACHE_TYPES = flags.DEFINE_list("cache_types", ["bf16", "q8_0", "q4_0"], "decode and model: of the cache.")
_QUERIES = flags.DEFINE_list("queries", ["2048", "8192", "32768"], "prefill: tokens of a prompt.")
_MODELS = flags.DEFINE_list("models", list(gpu_cases.EXPERTS), "experts: models with their shapes.")
_SHAPE = flags.DEFINE_list("expert_shape", None, "experts: D,F,E,K in place of those of --models.")
_TOKENS = flags.DEFINE_list("tokens", ["1", "512"], "experts: tokens at once; 1 decodes.")
_FORMATS = flags.DEFINE_list("formats", ["q8_0", "q4_K"], "experts: of the weights; model: the first.")
_WHOLE_MODELS = flags.DEFINE_list(
    "whole_models", ["deepseek-v2-lite"], "model: GGUF files, or presets in the first format."
)
_PEERS = flags.DEFINE_bool("peers", True, "measure the peers too.")
_LIBRARIES = flags.DEFINE_list("libraries", list(gpu_peers.LIBRARIES), "of PyTorch, as far as installed.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", None, f"of the kernels, one of {dispatch.NAMES}.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "runs, after one that warms up.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 0, "calls in a run; 0: about 10 ms of them.", lower_bound=0)
_MAX_GIB = flags.DEFINE_float("max_gib", None, "memory to use; what the device has by default.")
_COLD_MIB = flags.DEFINE_integer("cold_mib", 256, "decode: read before a page is read again.", lower_bound=0)
_COPY_MIB = flags.DEFINE_float("copy_mib", 1024.0, "size of the array that is copied.", lower_bound=0.001)
_PRODUCT = flags.DEFINE_integer("product", 8192, "rows and columns of the large product.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 10.0, "after which no more cases begin.", lower_bound=0.0)
_OUT = flags.DEFINE_string("out", None, "file to write the JSON object to as well.")

_BEGAN = time.monotonic()


def _cases(implementation) -> Iterator[gpu_cases.Case]:
    """Yields what the flags ask for."""
    heads = _numbers("heads", _HEADS.value)
    if "prefill" in _PARTS.value:
        queries = _numbers("queries", _QUERIES.value)
        yield from gpu_cases.prefill_cases(queries, heads, implementation=implementation)
    if "experts" in _PARTS.value:
        shapes = {name: gpu_cases.EXPERTS[name] for name in _MODELS.value}
        if _SHAPE.value:
            shapes = {"x".join(_SHAPE.value): tuple(_numbers("expert_shape", _SHAPE.value))}
        tokens = _numbers("tokens", _TOKENS.value)
        yield from gpu_cases.expert_cases(shapes, tokens, _FORMATS.value, implementation=implementation)
    if "model" in _PARTS.value:
        contexts = _numbers("contexts", _CONTEXTS.value)
        sizes = _WHOLE_MODELS.value, _FORMATS.value[:1], contexts, _CACHE_TYPES.value
        yield from gpu_model_cases.model_cases(*sizes, kernels=implementation == "triton")
    if "decode" in _PARTS.value:
        sizes = _numbers("batches", _BATCHES.value), _numbers("contexts", _CONTEXTS.value), heads
        settings = dict(implementation=implementation, cold_bytes=_COLD_MIB.value << 20)
        yield from gpu_cases.decode_cases(*sizes, _CACHE_TYPES.value, **settings)


def _numbers(flag, texts):
    for text in texts:
        if not text.isdecimal() or not int(text):
            raise app.UsageError(f"--{flag} must be whole numbers from 1 on, got {text!r}.")
    return [int(text) for text in texts]


def _check_flags():
    choices = dict(parts=(_PARTS, PARTS), cache_types=(_CACHE_TYPES, tuple(cache_tiles.TYPES)))
    choices |= dict(models=(_MODELS, tuple(gpu_cases.EXPERTS)), formats=(_FORMATS, FORMATS))
    choices |= dict(libraries=(_LIBRARIES, gpu_peers.LIBRARIES))
    for name, (flag, known) in choices.items():
        for value in flag.value:
            if value not in known:
                raise app.UsageError(f"--{name} must be of {', '.join(known)}, got {value!r}.")
    for model in _WHOLE_MODELS.value:
        if not is_preset(model) and not os.path.isfile(model):
            known = ", ".join(presets.PRESETS)
            raise app.UsageError(f"--whole_models must be GGUF files or of {known}, got {model!r}.")
    if _IMPLEMENTATION.value not in (None, *dispatch.NAMES):
        raise app.UsageError(f"--implementation must be of {dispatch.NAMES}, got {_IMPLEMENTATION.value!r}.")
    if _SHAPE.value and len(_SHAPE.value) != 4:
        raise app.UsageError(f"--expert_shape must be D,F,E,K, got {','.join(_SHAPE.value)}.")


def _machine():
    device = jax.devices()[0]
    return dict(
        device=device.device_kind,
        platform=getattr(device.client, "platform_version", device.platform),
        jax=jax.__version__,
        commit=machine.commit(),
        command=machine.command("benchmarks/gpu.py", sys.argv[1:]),
        libraries=gpu_peers.versions() if _PEERS.value else {},
    )


def _memory():
    """Returns the bytes that may be used, None if nobody says."""
    if _MAX_GIB.value is not None:
        return _MAX_GIB.value * 2**30
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def main(argv):
    """Measures the ceilings, then every case, and prints a line for each way."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    _check_flags()
    if jax.default_backend() != "gpu" and _IMPLEMENTATION.value is None:
        print(f"JAX must have a GPU, got {jax.default_backend()} alone.", file=sys.stderr)
        sys.exit(2)
    implementation = _IMPLEMENTATION.value or "triton"
    cases, memory = list(_cases(implementation)), _memory()
    counts = dict(calls=_CALLS.value, repeats=_REPEATS.value)
    large = dict(copied=int(_COPY_MIB.value * 2**20), product=_PRODUCT.value)
    ceilings = gpu_measure.measure_ceilings(**large, calls=_CALLS.value or 10, repeats=_REPEATS.value)
    result = _machine() | counts | large | dict(implementation=implementation, memory=memory)
    result |= dict(copy_gb_per_second=ceilings.copy / 1e9, product_tflops=ceilings.product / 1e12, rows=[])
    speeds = f"copy {ceilings.copy / 1e9:.1f} GB/s, product {ceilings.product / 1e12:.2f} TFLOP/s"
    print(f"{result['device']}: {speeds}\n{gpu_measure.head()}")
    for case in cases:
        if time.monotonic() - _BEGAN > _MINUTES.value * 60:
            row = gpu_measure.left_out(case, f"{_MINUTES.value:g} minutes are over")
        else:
            settings = dict(memory=memory, has_peers=_PEERS.value, libraries=_LIBRARIES.value)
            row = gpu_measure.measure(case, ceilings, **settings, **counts)
        result["rows"].append(row)
        print("\n".join(gpu_measure.lines(row)), flush=True)
        if _OUT.value:
            pathlib.Path(_OUT.value).write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
