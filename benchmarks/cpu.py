"""Measures prefill and decode on the CPU, this project beside ik_llama.cpp on the same file.

    python benchmarks/cpu.py                          # the packaged model, one core
    python benchmarks/cpu.py --model x.gguf --cores 0,1 --out benchmarks/results/x.json

Each engine lives in its own process, pinned to the same cores, with a thread per core; they run in turn
(ours, peer, ours, peer, ...) and only one works at a time. Both use mla 3, flash attention and a float16
cache.

prefill  tokens of the prompt / seconds from the prompt to the first greedy token
decode   greedy tokens after the first / their seconds, each read by the host before the next

Loading and one whole warm-up run, which compiles, are not counted; how long the warm-up took is told. The
prompt is of random tokens. Prints a table of medians, and as its last line one JSON object. Without the extra
`peers` it measures this project alone and says so.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "peer"))

import ik  # noqa: E402

_PACKAGED = ROOT / "mla_jax" / "models" / "python-stdlib-15m-q8_0.gguf"
_MODEL = flags.DEFINE_string("model", str(_PACKAGED), "GGUF file; the packaged model by default.")
_CORES = flags.DEFINE_list("cores", ["0"], "cores to run on, such as 0 or 0,1.")
_PROMPT = flags.DEFINE_integer("prompt", 512, "tokens of the prompt.", lower_bound=2)
_PREDICT = flags.DEFINE_integer("predict", 32, "tokens decoded after the first.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "runs of each engine.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "file to write the JSON object to as well.")

_PEER_PACKAGE = "ik-llama-cpp-python"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit():
    def git(*words):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")


def _measure(processes):
    """Returns by engine the seconds of the warm-up, and of each run (to the first token, of the rest)."""
    vocab_size = processes["ours"].ask("vocab_size")
    prompt = np.random.default_rng(0).integers(3, vocab_size, _PROMPT.value).tolist()
    request = dict(tokens=prompt, predict=_PREDICT.value + 1)
    warm_up, runs = {}, {name: [] for name in processes}
    for name, process in processes.items():
        began = time.perf_counter()
        process.ask("generate", **request)
        warm_up[name] = time.perf_counter() - began
    for _ in range(_REPEATS.value):
        for name, process in processes.items():
            answer = process.ask("generate", **request)
            runs[name].append((answer["prompt_seconds"], answer["decode_seconds"]))
    return warm_up, runs


def _summarise(warm_up, runs):
    prefill = [_PROMPT.value / prompt_seconds for prompt_seconds, _ in runs]
    decode = [_PREDICT.value / decode_seconds for _, decode_seconds in runs]
    rounded = lambda values: [round(value, 1) for value in values]
    return dict(
        prefill_tokens_per_second=round(statistics.median(prefill), 1),
        decode_tokens_per_second=round(statistics.median(decode), 1),
        prefill_runs=rounded(prefill),
        decode_runs=rounded(decode),
        warm_up_seconds=round(warm_up, 2),
    )


def _print_table(engines):
    print(f"{'tokens/s':10}" + "".join(f"{name:>14}" for name in engines))
    for part in ("prefill", "decode"):
        values = [engine[f"{part}_tokens_per_second"] for engine in engines.values()]
        ratio = f"   ours / peer {values[0] / values[1]:.3f}" if len(values) == 2 else ""
        print(f"{part:10}" + "".join(f"{value:14.1f}" for value in values) + ratio)


def _without_folder(argument):
    """Keeps where files lie on this machine out of the results."""
    return pathlib.Path(argument).name if os.path.isabs(argument) else argument


def _machine(cores):
    return dict(
        cpu=_cpu_name(),
        cores=cores,
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        jax=_version("jax"),
        jaxlib=_version("jaxlib"),
        ik_llama_cpp_python=_version(_PEER_PACKAGE),
        commit=_commit(),
        command=shlex.join(["python", "benchmarks/cpu.py", *map(_without_folder, sys.argv[1:])]),
    )


def main(argv):
    """Runs both engines and prints what they did."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    if not pathlib.Path(_MODEL.value).is_file():
        raise app.UsageError(f"--model must be a file, got {_MODEL.value}.")
    cores = sorted(int(core) for core in _CORES.value)
    machine = _machine(cores)
    os.sched_setaffinity(0, cores)  # the processes inherit it
    scripts = {"ours": pathlib.Path(__file__).with_name("ours.py"), "ik_llama.cpp": pathlib.Path(ik.__file__)}
    if machine["ik_llama_cpp_python"] is None:
        del scripts["ik_llama.cpp"]
        print(f"{_PEER_PACKAGE} is not installed (extra `peers`): this project is measured alone.")
    settings = dict(ctx_size=_PROMPT.value + _PREDICT.value + 1, threads=len(cores))
    processes = {name: ik.Process(_MODEL.value, script=path, **settings) for name, path in scripts.items()}
    try:
        warm_up, runs = _measure(processes)
    finally:
        for process in processes.values():
            process.close()
    engines = {name: _summarise(warm_up[name], runs[name]) for name in processes}
    _print_table(engines)
    print("Loading and the warm-up, which compiles, are left out.")
    result = dict(model=pathlib.Path(_MODEL.value).name, prompt=_PROMPT.value, predict=_PREDICT.value)
    result |= dict(repeats=_REPEATS.value, engines=engines, **machine)
    if len(engines) == 2:
        # the wheels are built for any x86-64 with AVX2; a native build of the peer is faster
        result["peer_uses_avx512_vnni"] = "HAVE_FANCY_SIMD is NOT" not in processes["ik_llama.cpp"].log
        ours, peer = engines.values()
        for part in ("prefill", "decode"):
            key = f"{part}_tokens_per_second"
            result[f"{part}_ratio"] = round(ours[key] / peer[key], 4)
    line = json.dumps(result)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    app.run(main)
