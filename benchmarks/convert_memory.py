"""Measures the memory that converting a checkpoint takes beside the program itself.

    python benchmarks/convert_memory.py

Makes a folder of about 3 GB with the shapes of DeepSeek-V2-Lite, three layers of it, in bfloat16, and
converts it in a process of its own for each type. Peaks are of resident memory (VmHWM, so Linux alone);
"beyond" is what is added after everything is imported. Nothing is mapped: tensors are read in parts. Needs
twice the size on the disk. Prints a table, and as its last line one JSON object.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints_tools import convert, hf_config, hf_names, layout  # noqa: E402
from mla_jax import presets  # noqa: E402

_TYPES = flags.DEFINE_list("types", ["bf16", "q8_0"], "types to convert to.")
_LAYERS = flags.DEFINE_integer("layers", 3, "layers, the first of them dense.", lower_bound=1)
_FOLDER = flags.DEFINE_string(
    "folder", None, "where the files are made, and deleted; None: as tempfile does."
)

_NOISE = 1 << 22  # random weights, repeated as often as is needed


def _write_folder(folder):
    """Writes config.json and one safetensors file; returns its size and that of its largest tensor."""
    config = dataclasses.replace(presets.PRESETS["deepseek-v2-lite"], num_layers=_LAYERS.value)
    (folder / "config.json").write_text(json.dumps(hf_config.to_json(config)))
    shapes = {}
    for name, shape in layout.expected_shapes(config, ()).items():
        if hf_names.is_stack(name):
            shapes |= {hf_names.to_hf(name, expert): shape[1:] for expert in range(shape[0])}
        else:
            shapes[hf_names.to_hf(name)] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        offsets = [end, end + 2 * math.prod(shape)]
        header[name] = dict(dtype="BF16", shape=shape, data_offsets=offsets)
        end = offsets[1]
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(_NOISE, dtype=np.float32) * np.float32(0.02)
    noise = noise.astype(ml_dtypes.bfloat16).view(np.uint8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, noise.size):
            file.write(memoryview(noise[: end - start]))
    return end, 2 * max(map(math.prod, shapes.values()))


def _memory(key):
    """Returns bytes of resident memory: VmRSS, or VmHWM for the peak."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(key + ":"))


def _convert(folder, out, type_name):
    """The child: converts, and prints what it took."""
    before, start = _memory("VmRSS"), time.perf_counter()
    convert.to_gguf(folder, out, type=type_name)
    seconds = time.perf_counter() - start
    print(json.dumps(dict(type=type_name, before=before, peak=_memory("VmHWM"), seconds=seconds)))


def _measure(folder, type_name):
    out = folder / "converted.gguf"
    command = [sys.executable, __file__, "child", str(folder), str(out), type_name]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    found |= dict(beyond=found["peak"] - found["before"], written=out.stat().st_size)
    out.unlink()
    return found


def main(argv):
    """Makes the folder, measures every type and prints the table."""
    if argv[1:2] == ["child"]:
        _convert(*argv[2:])
        return
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        read, largest = _write_folder(pathlib.Path(folder))
        rows = [_measure(pathlib.Path(folder), type_name) for type_name in _TYPES.value]
    print(f"{read / 1e9:.2f} GB in bfloat16, the largest tensor {largest / 1e6:.0f} MB")
    print("type     GB written  seconds MB at start MB at peak MB beyond")
    for row in rows:
        numbers = [row[key] / 1e6 for key in ("before", "peak", "beyond")]
        print(
            f"{row['type']:8} {row['written'] / 1e9:10.2f} {row['seconds']:8.1f} {numbers[0]:11.0f} "
            f"{numbers[1]:10.0f} {numbers[2]:9.0f}"
        )
    cores = len(os.sched_getaffinity(0))
    print(json.dumps(dict(bytes_read=read, largest_tensor=largest, cores=cores, rows=rows)))


if __name__ == "__main__":
    app.run(main)
