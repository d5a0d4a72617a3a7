"""Compares rotations of the latents before they are quantised: none, Hadamard's, and learned ones.

    python benchmarks/learned_rotation.py

Learns a rotation per layer of the packaged model on a part of its training texts, folds them into its
weights, and measures the KL to a float32 cache on held-out texts, in float32 products. Prints a table, and as
its last line one JSON object.
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mla_jax  # noqa: E402
from benchmarks import machine  # noqa: E402
from mla_jax import corpus, divergence, perplexity, rotation  # noqa: E402

_TYPE = flags.DEFINE_string("cache_type", "q4_0", "of the latents.")
_ROPE_TYPES = flags.DEFINE_list("rope_types", ["f16", "q8_0", "q4_0"], "of the rotary parts.")
_STEPS = flags.DEFINE_integer("steps", 200, "of learning.", lower_bound=1)
_LEARNED = flags.DEFINE_integer("learned_windows", 12, "windows of 512 tokens to learn from.", lower_bound=1)
_WINDOWS = flags.DEFINE_integer("windows", 16, "windows of 512 tokens to measure on.", lower_bound=1)


def _windows(model, documents, count):
    return perplexity.windows_of(model, "\n".join(documents), limit=count)


def main(argv):
    """Learns, measures and prints the table."""
    model, texts = mla_jax.load(progress=lambda *_: None), corpus.standard_library()
    windows = _windows(model, texts.held_out, _WINDOWS.value)
    began = time.perf_counter()
    rotations = rotation.learn(
        model.params,
        _windows(model, texts.train[:40], _LEARNED.value),
        config=model.config,
        cache_type=_TYPE.value,
        plan=rotation.Plan(steps=_STEPS.value),
        report=lambda line: print(line, file=sys.stderr),
    )
    seconds = time.perf_counter() - began
    folded = rotation.fold(model.params, model.config, rotations)
    kinds = {
        "none": ({}, model.params),
        "Hadamard": (dict(hadamard_size=512), model.params),
        "learned": ({}, folded),
    }
    exact, rows = perplexity.Network.of(model, cache_type="f32"), []
    print(f"{_TYPE.value} latents; mean KL in nats, share of the same likeliest token")
    with jax.default_matmul_precision("highest"):
        for rope_type in _ROPE_TYPES.value:
            for kind, (settings, params) in kinds.items():
                run = dict(cache_type=_TYPE.value, cache_type_rope=rope_type) | settings
                network = perplexity.Network.of(model, **run)
                network = perplexity.Network(params=params, config=model.config, run=network.run)
                found = divergence.measure(exact, network, windows)
                kl, top1 = found.mean_kl.value, found.top1.value
                rows.append(dict(rope_type=rope_type, rotation=kind, kl=kl, top1=top1))
                print(f"rotary part {rope_type:5} {kind:9} {kl:.2e}  {100 * top1:.2f} %", flush=True)
    about = machine.about("benchmarks/learned_rotation.py", sys.argv[1:], ["jax", "numpy"])
    print(json.dumps(about | dict(learning_seconds=round(seconds), tokens=int(np.size(windows)), rows=rows)))


if __name__ == "__main__":
    app.run(main)
