"""Answers the requests of `tests/peer/ik.py` with this project; `benchmarks/cpu.py` runs it as a process."""

import dataclasses
import os
import pathlib
import resource
import sys
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "peer")]

import closeness  # noqa: E402
import ik  # noqa: E402

import checkpoints_tools  # noqa: E402
import mla_jax  # noqa: E402
from checkpoints_tools import layout  # noqa: E402
from mla_jax import corpus  # noqa: E402
from mla_jax.cache import bytes_per_token  # noqa: E402

_MOST_CHARACTERS = 16  # of a token, on average
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of what getrusage tells


class _Engine:
    """`mla_jax.Model` as users call it, except that it goes on at tokens that end a text."""

    def open(self, path, mla, flash, cache_type, ctx_size, threads):
        """Loads; XLA takes as many threads as the process has cores, so `threads` is not read."""
        settings = dict(mla=mla, flash=flash, cache_type=cache_type, ctx_size=ctx_size, cache_ram=0)
        quiet = lambda *_: None
        # the peer ignores groups of experts
        self.model = mla_jax.load(path, group_routing=False, progress=quiet, **settings)
        self.model.tokenizer.eog_ids = frozenset()
        self.tensors = checkpoints_tools.open_gguf(path).tensors
        self.tokens = []

    def describe(self):
        """Returns what the model reads: vocab_size, and bytes of the file, of a step and of a cached token.

        A step reads all weights but the token embedding, and of the experts those that are used.
        """
        config = self.model.config
        weights = 0
        for name in layout.expected_shapes(config, self.tensors):
            share = config.moe.num_experts_per_token / config.moe.num_experts if "_exps." in name else 1
            weights += share * self.tensors[name].num_bytes if name != "token_embd.weight" else 0
        paths = {info.path for info in self.tensors.values()}
        return dict(
            vocab_size=config.vocab_size,
            file_bytes=sum(map(os.path.getsize, paths)),
            weight_bytes=round(weights),
            cache_bytes_per_token=bytes_per_token(config, self.model.run),
        )

    def text(self, count):
        """Returns `count` tokens of Python's library that the packaged model was not trained on."""
        texts = "\n".join(corpus.standard_library().held_out)
        return self.model.tokenizer.encode(texts[: _MOST_CHARACTERS * count], add_special=False)[:count]

    def prefill(self, tokens, start):
        """Puts tokens after the first `start` in the cache; returns the seconds to the greedy next one."""
        seconds = self._request(tokens, start, 1)
        self.tokens = self.tokens[:start] + tokens
        return seconds

    def decode(self, token, start, predict):
        """Goes on greedily from `token` after the first `start` in the cache; returns the seconds."""
        return self._request([token], start, predict)

    def logits(self, tokens, step, out, exact=False):
        """Saves f32[T, W], the logits after each token; with `exact` they are of float32 products."""
        model, size = self.model, 1 if step else len(tokens)
        apply = jax.jit(mla_jax.apply, static_argnums=(3, 4))
        cache = mla_jax.init_cache(model.config, model.run, batch=1, ctx_size=len(tokens))
        rows = []
        with jax.default_matmul_precision("highest" if exact else None):
            for start in range(0, len(tokens), size):
                piece = np.asarray([tokens[start : start + size]], np.int32)
                found, cache = apply(model.params, piece, cache, model.config, model.run)
                rows.append(np.asarray(found[0]))
        np.save(out, np.concatenate(rows))

    def closeness(self, reference, found):
        """Compares two files of logits."""
        return dataclasses.asdict(closeness.Closeness.of(np.load(reference), np.load(found)))

    def peak_rss(self):
        """Returns the most bytes of memory that the process has held."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT

    def _request(self, tokens, start, predict):
        """Returns the seconds of a whole request that finds its first `start` tokens in the cache."""
        prompt = self.tokens[:start] + tokens
        stream = self.model.stream_generate(
            prompt, max_tokens=predict, reuse_prefix=start > 0, temperature=0.0, seed=0
        )
        began = time.perf_counter()
        drawn = sum(1 for _ in stream)
        seconds = time.perf_counter() - began
        cached = self.model.timings.cached_tokens
        if (drawn, cached) != (predict, start):
            sys.exit(
                f"{predict} tokens must be drawn after {start} in the cache, got {drawn} after {cached}."
            )
        return seconds


if __name__ == "__main__":
    ik.serve(_Engine())
