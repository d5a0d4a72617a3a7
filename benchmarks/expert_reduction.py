"""Measures what fewer experts save in decoding, beside what their bytes predict.

    python benchmarks/expert_reduction.py MODEL.gguf --out benchmarks/results/expert-reduction-bench.json

A decoded token reads every weight once, but of each layer's experts only those that it takes. If time goes
with bytes, leaving out some of them gains (bytes before / bytes after - 1). Settings are fixed counts,
`-ser N,1`; each round times every one, and medians over the rounds are compared. Prints a table, and as its
last line one JSON object.
"""

import json
import pathlib
import statistics
import sys

import jax
import machine
from absl import app, flags

import mla_jax

_TOKENS = flags.DEFINE_integer("tokens", 16, "tokens to decode a round.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds, after one that warms up.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "file to write the JSON object to as well.")


def _bytes_read(model, kept):
    """Returns the bytes of weights that a decoded token reads with `kept` experts in each layer."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = jax.tree_util.keystr(path)
        if "['experts']" in name:
            total += leaf.nbytes * kept // model.config.moe.num_experts
        elif "['embed']" not in name:
            total += leaf.nbytes
    return total


def _speeds(model, counts):
    """Returns the median tokens/s of each count of experts."""
    speeds = {count: [] for count in counts}
    for _ in range(_ROUNDS.value + 1):
        for count in counts:
            setting = (count, 1.0)
            model.generate("The", max_tokens=_TOKENS.value, temperature=0.0, expert_reduction=setting)
            speeds[count].append(model.timings.decoded_tokens / model.timings.decode_seconds)
    return {count: statistics.median(found[1:]) for count, found in speeds.items()}


def main(argv):
    """Measures every count and prints the table."""
    if len(argv) != 2:
        raise app.UsageError("there must be one GGUF file.")
    model = mla_jax.load(argv[1], cache_type="q8_0", ctx_size=256)
    most = model.config.moe.num_experts_per_token
    counts = range(most, 0, -1)
    speeds, rows = _speeds(model, counts), []
    print(f"{'experts':>7} {'MB read':>8} {'tokens/s':>9} {'gain':>6} {'predicted':>9} {'share':>6}")
    for count in counts:
        predicted = _bytes_read(model, most) / _bytes_read(model, count) - 1
        gain = speeds[count] / speeds[most] - 1
        row = dict(experts=count, megabytes=_bytes_read(model, count) / 1e6, speed=speeds[count])
        rows.append(row | dict(gain=gain, predicted=predicted))
        share = f"{gain / predicted:6.0%}" if predicted else "     -"
        print(f"{count:7} {row['megabytes']:8.1f} {row['speed']:9.2f} {gain:6.1%} {predicted:9.1%} {share}")
    about = machine.about("benchmarks/expert_reduction.py", sys.argv[1:], ["jax", "jaxlib"])
    line = json.dumps(dict(model=pathlib.Path(argv[1]).name, **about, tokens=_TOKENS.value, rows=rows))
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    app.run(main)
