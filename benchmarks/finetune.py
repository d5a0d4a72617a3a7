"""Measures the memory and the time of a step that trains adapters of a GGUF file.

    python benchmarks/finetune.py --model MODEL.gguf

The weights stay in their blocks, and a layer and a window are differentiated at a time, so that memory beyond
the file grows with the window alone. Each setting runs in a process of its own; peaks are of resident memory
(VmHWM, so Linux alone). Prints a table, and as its last line one JSON object.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints_tools  # noqa: E402
import mla_jax  # noqa: E402
from benchmarks import machine  # noqa: E402
from mla_jax import finetune, lora  # noqa: E402
from mla_jax.config import RunConfig  # noqa: E402

_MODEL = flags.DEFINE_string("model", str(mla_jax.generate.PACKAGED_MODEL), "GGUF file, in one part.")
_WINDOWS = flags.DEFINE_list("windows", ["256", "512"], "tokens of a window.")
_BATCH = flags.DEFINE_integer("batch", 2, "windows of a step.", lower_bound=1)
_RANK = flags.DEFINE_integer("rank", 8, "of the adapters.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 3, "that are timed, after one that compiles.", lower_bound=1)
_TARGETS = {"attention": lora.ATTENTION, "linear": lora.LINEAR}


def _peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _train(path, targets, window, batch, rank, steps):
    """The child: takes steps on random tokens, and prints what they took."""
    model = checkpoints_tools.load_gguf(path, progress=lambda *_: None)
    loaded = _peak()
    plan = finetune.FinetuneConfig(
        window=int(window), batch=int(batch), rank=int(rank), targets=_TARGETS[targets]
    )
    adapters = lora.init(
        jax.random.key(0), model.params, rank=plan.rank, alpha=plan.alpha, targets=plan.targets
    )
    state = finetune.first_state(adapters, plan)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (plan.batch, plan.window + 1))
    batch = tokens.astype(np.int32), np.ones(tokens.shape, bool)
    settings, seconds = dict(config=model.config, run=RunConfig(remat=True), plan=plan), []
    for _ in range(int(steps) + 1):
        began = time.perf_counter()
        state, loss = finetune.step(state, model.params, *batch, **settings)
        float(loss)
        seconds.append(time.perf_counter() - began)
    row = dict(targets=targets, window=plan.window, loaded=loaded, peak=_peak(), first_seconds=seconds[0])
    print(json.dumps(row | dict(seconds=float(np.median(seconds[1:])))))


def _measure(targets, window):
    sizes = [str(flag.value) for flag in (_BATCH, _RANK, _STEPS)]
    command = [sys.executable, __file__, "child", _MODEL.value, targets, window, *sizes]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main(argv):
    """Measures every setting and prints the table."""
    if argv[1:2] == ["child"]:
        _train(*argv[2:])
        return
    size = os.path.getsize(_MODEL.value)
    print(f"{pathlib.Path(_MODEL.value).name}: {size / 1e9:.2f} GB")
    print("adapters    window  GB loaded  GB at peak  GB beyond the file  s/step  tokens/s")
    rows = []
    for targets in _TARGETS:
        for window in _WINDOWS.value:
            row = _measure(targets, window)
            rows.append(row)
            speed = _BATCH.value * row["window"] / row["seconds"]
            print(
                f"{targets:10} {row['window']:7} {row['loaded'] / 1e9:10.2f} {row['peak'] / 1e9:11.2f} "
                f"{(row['peak'] - size) / 1e9:19.2f} {row['seconds']:7.1f} {speed:9.1f}",
                flush=True,
            )
    about = machine.about("benchmarks/finetune.py", sys.argv[1:], ["jax", "numpy"])
    print(json.dumps(about | dict(file_bytes=size, batch=_BATCH.value, rank=_RANK.value, rows=rows)))


if __name__ == "__main__":
    app.run(main)
