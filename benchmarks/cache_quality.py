"""Measures what each type of cache costs in quality: perplexity, and distance to a float32 cache.

    python benchmarks/cache_quality.py --tokens 8192
    python benchmarks/cache_quality.py --out benchmarks/results/cache-quality.json   # and a plot beside it

The packaged model reads text it was not trained on (held-out sources of Python's standard library, then
those of absl-py) in windows, each with a cache of its own that is filled in one call; every token attends to
rows as the cache gives them back. For each type, plain and rotated (Hadamard, blocks of 64), with the rotary
part in the same type and in bfloat16:

ppl    exp of the mean cross-entropy of the next token
KL     mean over tokens of KL(float32 cache || this cache), in nats
top-1  share of tokens whose likeliest next token is that of the float32 cache

A second table tells what rotation does to vectors: the model's latents and rotary parts, Gaussian ones, and
Gaussian ones with one channel in 64 sixteen times as large. `peak` is the largest number of a block of 32
over its root mean square; then the root mean square of what each type loses, over that of the vectors.

Prints both tables, and as its last line one JSON object. The plot needs matplotlib (extra `notebooks`).
"""

import functools
import itertools
import json
import pathlib
import sys
import time

import absl
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import mla_jax
from mla_jax import corpus
from mla_jax.cache import bytes_per_token, codec, rotate
from mla_jax.config import CACHE_TYPES, QUANTISED_CACHE_TYPES

_TOKENS = flags.DEFINE_integer("tokens", 102_400, "tokens to read.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 1024, "tokens in a window.", lower_bound=2)
_OUT = flags.DEFINE_string("out", None, "JSON file to write as well; its plot gets the suffix .png.")


_EXACT = mla_jax.RunConfig(cache_type="f32")
_ROTATION = 64
_VECTOR_TYPES = ("q8_0", "q6_0", "q5_0", "q4_0", "iq4_nl")


def _windows(model):
    """Returns i32[windows, 1, window + 1] of the documents, one after the other."""
    sources = (path.read_text() for path in sorted(pathlib.Path(absl.__file__).parent.rglob("*.py")))
    documents = itertools.chain(corpus.standard_library().held_out, sources)
    ids = list(itertools.chain.from_iterable(map(model.tokenizer.encode, documents)))
    count = min(len(ids) - 1, _TOKENS.value) // _WINDOW.value
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
    for name, rope, size in itertools.product(QUANTISED_CACHE_TYPES, (None, "bf16"), (None, _ROTATION)):
        if (rope, size) != (None, None):
            yield mla_jax.RunConfig(cache_type=name, cache_type_rope=rope, hadamard_size=size)


def _print_table(rows):
    print(f"{'type':9} {'rope':9} {'rotated':8} {'bytes':>6} {'ppl':>8} {'KL':>10} {'top-1':>7}")
    for row in rows:
        rotated = "yes" if row["hadamard"] else "no"
        place = f"{row['type']:9} {row['rope']:9} {rotated:8} {row['bytes']:6}"
        print(f"{place} {row['ppl']:8.4f} {row['kl']:10.2e} {row['top1']:7.2%}")


def _vectors(model, window):
    """Returns float32[n, width] by name: what the cache of a window holds, and drawn ones."""
    cache = mla_jax.init_cache(model.config, _EXACT, batch=1, ctx_size=window.shape[1])
    _, cache = jax.jit(mla_jax.apply, static_argnums=(3, 4))(
        model.params, window, cache, model.config, _EXACT
    )
    live = slice(0, window.shape[1])
    gaussian = np.random.default_rng(0).standard_normal((4096, 512), dtype=np.float32)
    outliers = np.where(np.arange(512) % 64 == 20, 16 * gaussian, gaussian)
    return {
        "latents": jnp.concatenate([rows.latent[0, live] for rows in cache.layers]),
        "rotary parts": jnp.concatenate([rows.rope[0, live] for rows in cache.layers]),
        "Gaussian": jnp.asarray(gaussian),
        "with outliers": jnp.asarray(outliers),
    }


def _vector_rows(vectors):
    for (name, x), size in itertools.product(vectors.items(), (None, _ROTATION)):
        rotated = rotate(x, size)
        blocks = rotated.reshape(-1, 32)
        peak = jnp.mean(jnp.abs(blocks).max(-1) / jnp.sqrt(jnp.mean(blocks**2, -1)))
        row = dict(vectors=name, hadamard=size is not None, peak=float(peak))
        for kind in _VECTOR_TYPES:
            difference = codec.decode(codec.encode(rotated, kind)) - rotated
            row[kind] = float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(x**2)))
        yield row


def _print_vectors(rows):
    print(f"\n{'vectors':14} {'rotated':8} {'peak':>5} " + " ".join(f"{kind:>8}" for kind in _VECTOR_TYPES))
    for row in rows:
        place = f"{row['vectors']:14} {'yes' if row['hadamard'] else 'no':8} {row['peak']:5.2f}"
        print(place, *(f"{row[kind]:8.2%}" for kind in _VECTOR_TYPES))


def _plot(rows, path):
    """Draws KL over bytes per token, a line for each treatment of the types."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    treatments = {
        "as it is": lambda row: not row["hadamard"] and row["rope"] == row["type"],
        "rotated": lambda row: row["hadamard"] and row["rope"] == row["type"],
        "rotary part in bf16": lambda row: not row["hadamard"] and row["rope"] != row["type"],
        "both": lambda row: row["hadamard"] and row["rope"] != row["type"],
    }
    for (label, belongs), marker in zip(treatments.items(), "osD^", strict=True):
        chosen = [row for row in rows if row["type"] != "f32" and belongs(row)]
        sizes, divergences = [row["bytes"] for row in chosen], [row["kl"] for row in chosen]
        axes.scatter(sizes, divergences, marker=marker, label=label, alpha=0.8)
        for row in chosen if label == "as it is" else ():
            place = (row["bytes"], row["kl"])
            axes.annotate(row["type"], place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(
        xscale="log", yscale="log", xlabel="cache bytes per token", ylabel="KL to a float32 cache (nats)"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _measure(model, windows):
    """Yields a row of results per type, with progress on stderr."""
    began, runs, expected = time.perf_counter(), list(_runs()), []
    for done, run in enumerate(runs, start=1):
        sums = np.zeros(3)
        for i, window in enumerate(windows):
            found = _log_probs(model.params, window[:, :-1], model.config, run)
            if len(expected) == i:
                expected.append(np.asarray(found))
            sums += np.asarray(_compare(found, expected[i], window[0, 1:]))
        nats, kl, top1 = sums / (len(windows) * _WINDOW.value)
        settings = dict(type=run.cache_type, rope=run.rope_type, hadamard=bool(run.hadamard_size))
        figures = dict(ppl=float(np.exp(nats)), kl=float(kl), top1=float(top1))
        print(f"{done} of {len(runs)}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
        yield settings | dict(bytes=bytes_per_token(model.config, run)) | figures


def main(argv):
    """Measures every type and prints the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"there must be flags alone, got {argv[1]!r}.")
    model = mla_jax.load()
    windows = _windows(model)
    rows = list(_measure(model, windows))
    _print_table(rows)
    vectors = list(_vector_rows(_vectors(model, windows[0][:, :-1])))
    _print_vectors(vectors)
    result = dict(model="packaged", tokens=len(windows) * _WINDOW.value, window=_WINDOW.value)
    line = json.dumps(result | dict(rows=rows, vectors=vectors, jax=jax.__version__))
    if _OUT.value:
        path = pathlib.Path(_OUT.value)
        path.write_text(line + "\n")
        _plot(rows, path.with_suffix(".png"))
    print(line)


if __name__ == "__main__":
    app.run(main)
