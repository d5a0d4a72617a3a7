"""Measures how long the header of a GGUF file takes that has a vocabulary as large as DeepSeek-V3's.

    python benchmarks/parse.py --out benchmarks/results/parse.json

The file is made here: 129,280 tokens, 127,000 merges, and no tensors. Each round times, from the file to
Python values: opening it; opening it and decoding all tokens, types and merges; and all that up to a checked
vocabulary, and to a tokenizer. Prints medians over the rounds, and as its last line one JSON object.
"""

import itertools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

from absl import app, flags

from checkpoints_tools import open_gguf, write_gguf
from mla_jax.tokenizer import BYTE_CHARACTERS, Tokenizer, Vocabulary

_ROUNDS = flags.DEFINE_integer("rounds", 9, "rounds, after one that warms up.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "file to write the JSON object to as well.")

_NUM_TOKENS, _NUM_MERGES = 129_280, 127_000


def _vocabulary():
    """Returns key-values of a vocabulary: bytes, pairs of them, pairs with a third, and control tokens."""
    pairs = [(left, right) for left, right in itertools.product(BYTE_CHARACTERS, repeat=2)]
    triples = ((left + right, third) for left, right in pairs for third in BYTE_CHARACTERS)
    merges = list(itertools.islice(itertools.chain(pairs, triples), _NUM_MERGES))
    tokens = [*BYTE_CHARACTERS, *map("".join, merges)]
    num_control = _NUM_TOKENS - len(tokens)
    return {
        "general.architecture": "deepseek2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": [*tokens, *(f"<|control{index}|>" for index in range(num_control))],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * num_control,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }


def _seconds(path):
    """Returns the seconds from the start to the end of each stage."""
    start = time.perf_counter()
    metadata = open_gguf(path).metadata
    ends = {"open": time.perf_counter()}
    for key in ("tokens", "token_type", "merges"):
        metadata[f"tokenizer.ggml.{key}"]
    ends["values"] = time.perf_counter()
    vocabulary = Vocabulary.from_metadata(metadata)
    ends["vocabulary"] = time.perf_counter()
    Tokenizer(vocabulary)
    ends["tokenizer"] = time.perf_counter()
    return {stage: end - start for stage, end in ends.items()}


def main(_):
    """Writes the file, measures and prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "vocabulary.gguf"
        write_gguf(path, _vocabulary(), [])
        num_bytes = path.stat().st_size
        rounds = [_seconds(path) for _ in range(_ROUNDS.value + 1)][1:]
    print(f"{num_bytes / 1e6:.1f} MB, {_NUM_TOKENS:,} tokens, {_NUM_MERGES:,} merges")
    print(f"{'until':<12} {'median s':>9} {'least s':>9} {'most s':>9}")
    medians = {}
    for stage in rounds[0]:
        found = [seconds[stage] for seconds in rounds]
        medians[stage] = statistics.median(found)
        print(f"{stage:<12} {medians[stage]:9.3f} {min(found):9.3f} {max(found):9.3f}")
    about = dict(python=platform.python_version(), cores=len(os.sched_getaffinity(0)), rounds=len(rounds))
    line = json.dumps(about | dict(bytes=num_bytes, tokens=_NUM_TOKENS, merges=_NUM_MERGES, seconds=medians))
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    app.run(main)
