"""Answers the requests of `tests/peer/ik.py` with this project; `benchmarks/cpu.py` runs it as a process."""

import dataclasses
import pathlib
import sys
import time

import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "peer")]

import ik  # noqa: E402

import checkpoints_tools  # noqa: E402
from mla_jax import RunConfig, init_cache, sampler, steps  # noqa: E402
from mla_jax.generate import DEFAULT_UBATCH  # noqa: E402

_CHUNK = 256  # as the peer rounds its context up


class _Engine:
    """The loop of `mla_jax.generate.Model`, but going on at tokens that end a text."""

    def open(self, path, mla, flash, cache_type, ctx_size, threads):
        """Loads; XLA takes as many threads as the process has cores, so `threads` is not read."""
        checkpoint = checkpoints_tools.load_gguf(path)
        self.params, self.config = checkpoint.params, checkpoint.config
        self.run = RunConfig(mla=mla, flash=flash, cache_type=cache_type)
        size = -(-ctx_size // _CHUNK) * _CHUNK
        self.cache = init_cache(self.config, self.run, batch=1, ctx_size=size)
        self.sampling = sampler.batch([sampler.SamplingParams(temperature=0.0, seed=0)])

    def generate(self, tokens, predict):
        """Returns greedy tokens, seconds to the first and seconds of the rest."""
        times = [time.perf_counter()]
        self._prefill(tokens[:-1])
        recent = np.full((1, sampler.NUM_RECENT), -1, np.int32)
        drawn, newest = [], tokens[-1]
        while len(drawn) < predict:
            next_tokens, recent, self.cache = steps.decode(
                self.params,
                np.asarray([newest], np.int32),
                recent,
                self.cache,
                self.sampling,
                config=self.config,
                run=self.run,
            )
            newest = int(next_tokens[0])
            drawn.append(newest)
            times.append(time.perf_counter())
        return dict(tokens=drawn, prompt_seconds=times[1] - times[0], decode_seconds=times[-1] - times[1])

    def vocab_size(self):
        return self.config.vocab_size

    def _prefill(self, tokens):
        cache, start = dataclasses.replace(self.cache, length=jnp.zeros((1,), jnp.int32)), 0
        for count, width in steps.split_prompt(len(tokens), DEFAULT_UBATCH):
            padded = np.zeros((1, width), np.int32)
            padded[0, :count] = tokens[start : start + count]
            num_tokens = np.asarray([count], np.int32)
            cache = steps.prefill(self.params, padded, num_tokens, cache, config=self.config, run=self.run)
            start += count
        self.cache = cache


if __name__ == "__main__":
    steps.use_compilation_cache(steps.COMPILATION_CACHE)
    ik.serve(_Engine())
