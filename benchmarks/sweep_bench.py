"""Runs the sweep benchmark of a native build of ik_llama.cpp and reads its table.

The package on PyPI is built for any x86-64 with AVX2; a build for the machine at hand uses all it has. One
run of `llama-sweep-bench` measures every multiple of the prompt's length as a depth, each once: decoding
after so many tokens, then a prompt after as many.
"""

import pathlib
import re
import subprocess
import tempfile

PROGRAM = "llama-sweep-bench"


def run(folder, model, *, threads, cache_type, depth, prompt, predict) -> dict[int, tuple[float, float]]:
    """Measures a model once.

    Args:
      folder: has the program, of November 2025 or later: `-fa` takes a value.
      model: GGUF file.
      threads: of the CPU; the process inherits the cores of this one.
      cache_type: as ik_llama.cpp spells it.
      depth: the largest one to measure, a multiple of `prompt`.
      prompt: tokens of a prompt.
      predict: tokens to decode.

    Returns:
      depth -> tokens per second of the prompt and of decoding.

    Raises:
      RuntimeError: if the program fails, with what it wrote as the message, or runs without flash attention.
    """
    sizes = dict(c=depth + prompt, b=prompt, ub=prompt, n=predict, t=threads)
    settings = dict(m=pathlib.Path(model).resolve(), mla=3, fa="on", ctk=cache_type) | sizes
    flags = [str(part) for name, value in settings.items() for part in (f"-{name}", value)]
    command = [str(pathlib.Path(folder).resolve() / PROGRAM), *flags]
    with tempfile.TemporaryDirectory() as scratch:  # it may leave a log where it runs
        done = subprocess.run(
            command,
            cwd=scratch,
            text=True,
            errors="replace",  # it also prints pieces of tokens
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(done.stdout)
    speeds = parse(done.stdout, predict)
    if depth not in speeds:
        raise RuntimeError(f"{PROGRAM} must measure a depth of {depth} tokens, got {sorted(speeds)}.")
    return speeds


def parse(text: str, predict: int) -> dict[int, tuple[float, float]]:
    """Returns depth -> tokens per second of the prompt and of decoding, from what the program wrote.

    Args:
      text: its output; lines that are no rows of the table are passed over.
      predict: tokens that it must have decoded at each depth.

    Raises:
      RuntimeError: if there is no table, or one of other settings.
    """
    if "flash_attn = 0" in text:
        raise RuntimeError(f"{PROGRAM} must use flash attention.")
    header, *rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if re.match(r"\|[^-]+\|$", line.strip())
    ] or [[]]
    if not rows:
        raise RuntimeError(f"{PROGRAM} must print a table, got none.")
    speeds = {}
    for row in rows:
        cells = dict(zip(header, map(float, row), strict=True))
        if cells["TG"] != predict:
            raise RuntimeError(f"{PROGRAM} must decode {predict} tokens, got {cells['TG']:.0f}.")
        speeds[int(cells["N_KV"])] = cells["S_PP t/s"], cells["S_TG t/s"]
    return speeds
