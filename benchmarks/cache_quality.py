"""Measures what each type of cache costs in quality: perplexity, and distance to a float32 cache.

    python benchmarks/cache_quality.py                                  # all held-out text
    python benchmarks/cache_quality.py --tokens 16384 --out benchmarks/results/cache-quality.json

The packaged model reads held-out sources of Python's standard library in windows, each with a cache of its
own that is filled in one call; every token attends to rows as the cache gives them back. For each type, plain
and rotated (Hadamard, blocks of 64), with the rotary part in the same type and in bfloat16:

ppl    exp of the mean cross-entropy of the next token
KL     mean over tokens of KL(float32 cache || this cache), in nats
top-1  share of tokens whose likeliest next token is that of the float32 cache

Prints a table, and as its last line one JSON object.
"""

import functools
import itertools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import mla_jax
from mla_jax import corpus
from mla_jax.cache import bytes_per_token
from mla_jax.config import CACHE_TYPES, QUANTISED_CACHE_TYPES

_TOKENS = flags.DEFINE_integer("tokens", None, "held-out tokens to read; all by default.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 1024, "tokens in a window.", lower_bound=2)
_OUT = flags.DEFINE_string("out", None, "file to write the JSON object to as well.")


def _windows(model):
    """Returns i32[windows, 1, window + 1] of the held-out documents, one after the other."""
    ids = list(itertools.chain.from_iterable(map(model.tokenizer.encode, corpus.standard_library().held_out)))
    count = min(len(ids) - 1, _TOKENS.value or len(ids)) // _WINDOW.value
    rows = [ids[i * _WINDOW.value : (i + 1) * _WINDOW.value + 1] for i in range(count)]
    return np.asarray(rows, np.int32)[:, None]


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _log_probs(params, tokens, config, run):
    cache = mla_jax.init_cache(config, run, batch=1, ctx_size=tokens.shape[1])
    return jax.nn.log_softmax(mla_jax.apply(params, tokens, cache, config, run)[0][0])


@jax.jit
def _compare(found, expected, following):
    """Returns the sums over a window of cross-entropy, KL(expected || found) and agreement."""
    nats = -jnp.take_along_axis(found, following[:, None], axis=-1).sum()
    kl = (jnp.exp(expected) * (expected - found)).sum()
    return jnp.stack([nats, kl, (found.argmax(-1) == expected.argmax(-1)).sum().astype(jnp.float32)])


def _runs():
    yield from (mla_jax.RunConfig(cache_type=name) for name in CACHE_TYPES)
    for name, rope, size in itertools.product(QUANTISED_CACHE_TYPES, (None, "bf16"), (None, 64)):
        if (rope, size) != (None, None):
            yield mla_jax.RunConfig(cache_type=name, cache_type_rope=rope, hadamard_size=size)


def _print_table(rows):
    print(f"{'type':9} {'rope':9} {'rotated':8} {'bytes':>6} {'ppl':>8} {'KL':>10} {'top-1':>7}")
    for row in rows:
        rotated = "yes" if row["hadamard"] else "no"
        place = f"{row['type']:9} {row['rope']:9} {rotated:8} {row['bytes']:6}"
        print(f"{place} {row['ppl']:8.4f} {row['kl']:10.2e} {row['top1']:7.2%}")


def main(argv):
    """Measures every type and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    model = mla_jax.load()
    windows, rows, began = _windows(model), [], time.perf_counter()
    runs, expected = list(_runs()), []
    for run in runs:
        sums = np.zeros(3)
        for i, window in enumerate(windows):
            found = _log_probs(model.params, window[:, :-1], model.config, run)
            if len(expected) == i:
                expected.append(np.asarray(found))
            sums += np.asarray(_compare(found, expected[i], window[0, 1:]))
        nats, kl, top1 = sums / (len(windows) * _WINDOW.value)
        row = dict(type=run.cache_type, rope=run.rope_type, hadamard=bool(run.hadamard_size))
        row |= dict(
            bytes=bytes_per_token(model.config, run), ppl=float(np.exp(nats)), kl=float(kl), top1=float(top1)
        )
        rows.append(row)
        print(f"{len(rows)} of {len(runs)}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    _print_table(rows)
    result = dict(model="packaged", tokens=len(windows) * _WINDOW.value, window=_WINDOW.value, rows=rows)
    line = json.dumps(result | dict(jax=jax.__version__))
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    app.run(main)
