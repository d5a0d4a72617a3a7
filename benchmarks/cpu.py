"""Measures prefill and decode on the CPU, this project beside ik_llama.cpp on the same file.

    python benchmarks/cpu.py                          # the packaged model, one core
    python benchmarks/cpu.py --models a.gguf,b.gguf --cores 0 --cores 0,1 --out benchmarks/results/x.json

The grid is models x cores x cache types x depths. Each engine lives in its own process, pinned to the same
cores, with a thread per core; they run in turn (ours, peer, ours, peer, ...) and only one works at a time.
Both use mla 3 and flash attention, no groups of experts, and contexts of one size. At each depth, with as
many random tokens in the cache already:

prefill  tokens of a prompt / seconds to the first greedy token after it
decode   greedy tokens / their seconds; the peer's host reads each before the next, ours some at a time
GB/s     what a decode step reads / its seconds, and its share of a plain read: all weights but the token
         embedding, experts by how many are used, and the cache. A model that fits the processor's own caches
         can exceed 100%.

Loading, filling the cache and a whole warm-up run at each depth, which compiles, are not counted. An engine
that ends or gives NaN in a cell is recorded with its reason; ours is then compared with that engine's float16
cache. Decode seconds over depth are fitted with lines, whose slopes stand beside the time to read the cache.
Quality is KL of logits to those of float32 products by this project, with a float16 cache, of a prompt at
once and step by step. Its text is of Python's library, and not what the packaged model was trained on.

With `--peer_bin` a native build of ik_llama.cpp is a third engine, by its own sweep benchmark (see
`sweep_bench.py`): a sweep measures all depths at once, so sweeps are spread evenly among the runs, and their
figures are complete when all depths are done.

Prints tables of medians, and as its last line one JSON object. `--out` is written after each cell, its plot
(by matplotlib, extra `notebooks`) at the end. Without the extra `peers` the package is left out.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import bandwidth
import cpu_grid
import cpu_report
import machine
import sweep_bench
from absl import app, flags
from cpu_report import OURS, PEER

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "peer"))

import ik  # noqa: E402

_PACKAGED = ROOT / "mla_jax" / "models" / "python-stdlib-15m-q8_0.gguf"
_MODELS = flags.DEFINE_list("models", [str(_PACKAGED)], "GGUF files; the packaged model by default.")
_CORES = flags.DEFINE_multi_string("cores", ["0"], "cores to run on, such as 0,1; may be repeated.")
_DEPTHS = flags.DEFINE_list("depths", ["0", "2048", "8192"], "tokens in the cache before a run.")
_CACHE_TYPES = flags.DEFINE_list("cache_types", ["f16", "q8_0"], "as ik_llama.cpp spells them.")
_PROMPT = flags.DEFINE_integer("prompt", 512, "tokens of a prompt.", lower_bound=2)
_PREDICT = flags.DEFINE_integer("predict", 64, "tokens to decode.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "runs of each engine in each cell.", lower_bound=1)
_QUALITY = flags.DEFINE_integer("quality_tokens", 256, "tokens of a text to compare; 0: none.", lower_bound=0)
_QUALITY_TEXTS = flags.DEFINE_integer("quality_texts", 1, "texts to compare.", lower_bound=1)
_PEER_BIN = flags.DEFINE_string("peer_bin", None, f"folder with {sweep_bench.PROGRAM} of a native build.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write as well; its plot gets the suffix .png.")

_PEER_PACKAGE = "ik-llama-cpp-python"
_KEPT_RSS, _SPARE_RSS = 1.1, 600e6  # of the file, and bytes beside it
_BEGAN = time.monotonic()


def _machine():
    return dict(
        cpu=machine.cpu_name(),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        jax=machine.version("jax"),
        jaxlib=machine.version("jaxlib"),
        ik_llama_cpp_python=machine.version(_PEER_PACKAGE),
        commit=machine.commit(),
        command=machine.command("benchmarks/cpu.py", sys.argv[1:]),
    )


def _read_speed(cores):
    """Measures a plain read in another process: what this one held would count to those it starts."""
    script = pathlib.Path(bandwidth.__file__)
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    print(f"plain read on cores {_name(cores)}: {float(done.stdout) / 1e9:.1f} GB/s", file=sys.stderr)
    return float(done.stdout)


def _save(result, cells):
    """Brings the result up to date with `cells`, and the file if one was asked for."""
    result["cells"] = cells
    cpu_report.add_ratios_to_f16(cells)
    result["slopes"] = cpu_report.slopes(cells, result["plain_read"])
    if _OUT.value:
        unfinished = pathlib.Path(_OUT.value + ".unfinished")
        unfinished.write_text(json.dumps(result) + "\n")
        unfinished.replace(_OUT.value)


def _measure(result, model, cores, cache_type, settings):
    """Adds the cells of a group to the result."""
    done, plain_read = result["cells"], result["plain_read"][_name(cores)]
    group = cpu_grid.Group(model, cores, cache_type, settings)
    try:
        for _ in group.measure():
            _save(result, done + group.cells(plain_read))
            _report_progress(result)
        if (peak := group.peak_rss()) is not None:
            bound = round(_KEPT_RSS * group.sizes["file_bytes"] + _SPARE_RSS)
            place = dict(model=pathlib.Path(model).name, cores=cores, cache_type=cache_type)
            result["memory"].append(place | dict(peak_rss_bytes=peak, bound_bytes=bound))
    finally:
        log = group.close()
    if "llama_init_from_model" in log:
        # the wheels are built for any x86-64 with AVX2; a native build of the peer is faster
        result["peer_uses_avx512_vnni"] = "HAVE_FANCY_SIMD is NOT" not in log


def _report_progress(result):
    cell = result["cells"][-1]
    speeds = lambda engine: [f"{engine[f'{part}_tokens_per_second']:.1f}" for part in cpu_report.PARTS]
    found = [
        f"{name} {engine['refuses'] if 'refuses' in engine else ' / '.join(speeds(engine))}"
        for name, engine in cell["engines"].items()
    ]
    place = f"{cell['model']}, cores {_name(cell['cores'])}, {cell['cache_type']}, depth {cell['depth']}"
    count = f"{len(result['cells'])} of {result['num_cells']}, {time.monotonic() - _BEGAN:.0f} s"
    print(f"{count}: {place}: {', '.join(found)}", file=sys.stderr)


def _compare(model, has_peer, folder):
    """Yields how far the engines are from float32 products on one file, with a float16 cache."""
    size = _QUALITY.value
    options = dict(ctx_size=size, threads=len(os.sched_getaffinity(0)))
    path = lambda name: str(pathlib.Path(folder) / f"{name}.npy")
    with ik.Process(model, script=cpu_grid.SCRIPTS[OURS], **options) as ours:
        tokens = ours.ask("text", count=size * _QUALITY_TEXTS.value)
        texts = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        for i, text in enumerate(texts):
            ours.ask("logits", tokens=text, step=False, exact=True, out=path(f"exact{i}"))

        def compare(process, way):
            found = []
            for i, text in enumerate(texts):
                process.ask("logits", tokens=text, step=way == "step by step", out=path("found"))
                found.append(ours.ask("closeness", reference=path(f"exact{i}"), found=path("found")))
            kls = [one["kl"] for one in found]
            return dict(kl=statistics.mean(kls), top1=statistics.mean(one["top1"] for one in found), kls=kls)

        def compare_peer(way):
            try:
                with ik.Process(model, **options) as peer:
                    return compare(peer, way)
            except RuntimeError as error:
                return dict(refuses=cpu_report.refusal(str(error)))

        for way in ("at once", "step by step"):
            place = dict(model=pathlib.Path(model).name, tokens=len(tokens), way=way)
            yield place | dict(engine=OURS) | compare(ours, way)
            if has_peer:
                yield place | dict(engine=PEER) | compare_peer(way)


def _check_flags():
    for model in _MODELS.value:
        if not pathlib.Path(model).is_file():
            raise app.UsageError(f"--models must be files, got {model}.")
    depths = sorted({_number("depths", depth) for depth in _DEPTHS.value})
    if _PEER_BIN.value and not (pathlib.Path(_PEER_BIN.value) / sweep_bench.PROGRAM).is_file():
        raise app.UsageError(f"--peer_bin must have {sweep_bench.PROGRAM}, got {_PEER_BIN.value}.")
    if _PEER_BIN.value and any(depth % _PROMPT.value for depth in depths):
        raise app.UsageError(f"--depths must be multiples of --prompt with --peer_bin, got {depths}.")
    choices = [sorted({_number("cores", core) for core in cores.split(",")}) for cores in _CORES.value]
    for core in {core for cores in choices for core in cores} - os.sched_getaffinity(0):
        raise app.UsageError(f"--cores must be cores of this process, got {core}.")
    return tuple(depths), choices


def _number(flag, text):
    if not text.isdecimal():
        raise app.UsageError(f"--{flag} must be whole numbers, got {text!r}.")
    return int(text)


def _name(cores):
    return ",".join(map(str, cores))


def _pin(cores):
    os.sched_setaffinity(0, cores)  # the processes inherit it


def main(argv):
    """Runs the grid and prints what the engines did."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    depths, choices = _check_flags()
    result = _machine()
    has_peer = result["ik_llama_cpp_python"] is not None
    if not has_peer:
        print(f"{_PEER_PACKAGE} is not installed (extra `peers`): this project is measured without it.")
    counts = dict(prompt=_PROMPT.value, predict=_PREDICT.value, repeats=_REPEATS.value)
    settings = cpu_grid.Settings(depths=depths, has_peer=has_peer, peer_bin=_PEER_BIN.value, **counts)
    grid = [
        (model, cores, kind) for cores in choices for model in _MODELS.value for kind in _CACHE_TYPES.value
    ]
    result |= counts | dict(num_cells=len(grid) * len(depths), plain_read={})
    result |= dict(cells=[], slopes=[], memory=[], quality=[])
    for model, cores, cache_type in grid:
        _pin(cores)
        if _name(cores) not in result["plain_read"]:
            result["plain_read"][_name(cores)] = _read_speed(cores)
        _measure(result, model, cores, cache_type, settings)
    _pin(max(choices, key=len))
    for model in _MODELS.value if _QUALITY.value else ():
        with tempfile.TemporaryDirectory() as folder:
            result["quality"] += _compare(model, has_peer, folder)
        print(f"quality of {pathlib.Path(model).name} is compared", file=sys.stderr)
    _save(result, result["cells"])
    cpu_report.print_tables(result)
    if _OUT.value:
        cpu_report.save_plot(result, pathlib.Path(_OUT.value).with_suffix(".png"))
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
