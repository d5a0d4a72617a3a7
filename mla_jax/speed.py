"""How fast a model reads prompts and draws tokens, by the requests that its users would make.

A prompt takes from its request to the first token that is drawn after it; drawing takes from a request whose
prompt is new by one token to the last of the tokens, the ends of texts passed over. Tokens before them, as
many as the `depth`, are in the cache already. Compiling is not counted: each kind of request is made once
before.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mla_jax.generate import Model
from mla_jax.sampler import SamplingParams
from mla_jax.serve.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRow:
    """What was measured at one depth of a sweep.

    Attributes:
      prompt: tokens of the prompt.
      predict: tokens drawn.
      depth: tokens in the cache before either.
      prompt_seconds: of the prompt.
      predict_seconds: of drawing.
    """

    prompt: int
    predict: int
    depth: int
    prompt_seconds: float
    predict_seconds: float

    @property
    def prompt_speed(self) -> float:
        """Tokens/s of the prompt."""
        return self.prompt / self.prompt_seconds

    @property
    def predict_speed(self) -> float:
        """Tokens/s of drawing."""
        return self.predict / self.predict_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What some runs of one kind of request took.

    Attributes:
      prompt: tokens of the prompt; 0 where tokens were drawn.
      predict: tokens drawn; 0 where a prompt was read.
      depth: tokens in the cache before them.
      seconds: of each run.
    """

    prompt: int
    predict: int
    depth: int
    seconds: tuple[float, ...]

    @property
    def name(self) -> str:
        """As llama-bench calls it: "pp512", "tg128", "tg128 @ d1024"."""
        kind = f"pp{self.prompt}" if self.prompt else f"tg{self.predict}"
        return f"{kind} @ d{self.depth}" if self.depth else kind

    @property
    def samples(self) -> tuple[float, ...]:
        """Tokens/s of each run."""
        return tuple((self.prompt or self.predict) / seconds for seconds in self.seconds)

    @property
    def mean(self) -> float:
        """The mean of `samples`."""
        return float(np.mean(self.samples))

    @property
    def deviation(self) -> float:
        """The standard deviation of `samples`, 0 of a single one."""
        return float(np.std(self.samples, ddof=1)) if len(self.samples) > 1 else 0.0


def sweep(model: Model, *, prompt: int = 512, predict: int = 128) -> Iterator[SweepRow]:
    """Measures at growing depths, a prompt apart, until the context is full.

    Args:
      model: best loaded with `cache_ram=0`, so that nothing but the newest request is kept.
      prompt: tokens of a prompt.
      predict: tokens to draw.

    Yields:
      A row as soon as it is measured.

    Raises:
      ValueError: if a number is below 1 or the context has no room for them.
    """
    _check(model, 0, [prompt, predict])
    clock, tokens = _Clock(model), []
    clock.read([], prompt)
    clock.draw([], predict)
    while len(tokens) + max(prompt, predict) <= model.ctx_size:
        predict_seconds = clock.draw(tokens, predict)
        prompt_seconds, read = clock.read(tokens, prompt)
        yield SweepRow(
            prompt=prompt,
            predict=predict,
            depth=len(tokens),
            prompt_seconds=prompt_seconds,
            predict_seconds=predict_seconds,
        )
        tokens = read


def bench(
    model: Model,
    *,
    prompts: Sequence[int] = (512,),
    predicts: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    report: Callable[[Speed], None] | None = None,
) -> list[Speed]:
    """Measures kinds of requests one by one, each some times.

    Args:
      model: best loaded with `cache_ram=0`, so that nothing but the newest request is kept.
      prompts: tokens of prompts.
      predicts: tokens to draw.
      depths: tokens in the cache before.
      repetitions: runs of each, after one that does not count.
      report: called with each result as soon as it is there.

    Raises:
      ValueError: if a number is out of range or the context has no room for them.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}.")
    kinds = [(size, 0) for size in prompts] + [(0, size) for size in predicts]
    if not kinds or not depths:
        raise ValueError("there must be something to measure, got no prompts and no tokens to draw.")
    if min(depths) < 0:
        raise ValueError(f"depths must be at least 0, got {min(depths)}.")
    _check(model, max(depths), [prompt or predict for prompt, predict in kinds])
    clock, results = _Clock(model), []
    for depth, (prompt, predict) in itertools.product(depths, kinds):
        tokens = clock.read([], depth)[1] if depth else []
        runs = range(repetitions + 1)
        if prompt:
            seconds = [clock.read(tokens, prompt)[0] for _ in runs][1:]
        else:
            seconds = [clock.draw(tokens, predict) for _ in runs][1:]
        results.append(Speed(prompt=prompt, predict=predict, depth=depth, seconds=tuple(seconds)))
        if report is not None:
            report(results[-1])
    return results


class _Clock:
    """Times requests of random tokens. Each begins otherwise than those before, so that no row is found."""

    def __init__(self, model):
        self._model, self._rng, self._vocab_size = model, np.random.default_rng(0), model.config.vocab_size
        self._first = 0

    def read(self, tokens, count):
        """Returns the seconds of a prompt of `count` new tokens after `tokens`, and all of them."""
        tokens = tokens + self._new(count)
        return self._seconds(tokens, len(tokens) - count, 1), tokens

    def draw(self, tokens, count):
        """Returns the seconds to draw `count` tokens after `tokens` and a new one."""
        return self._seconds(tokens + self._new(1), len(tokens), count)

    def _new(self, count):
        self._first = (self._first + 1) % self._vocab_size
        return [self._first, *self._rng.integers(self._vocab_size, size=count - 1).tolist()]

    def _seconds(self, prompt, num_cached, count):
        engine = self._model.engine
        if not num_cached:
            engine.forget()
        sampling = SamplingParams(temperature=0.0, seed=0)
        began = time.perf_counter()
        ticket, pieces = engine.stream(
            Request(prompt=tuple(prompt), max_tokens=count, sampling=sampling, ignore_eos=True)
        )
        num_drawn = sum(1 for _ in pieces)
        seconds = time.perf_counter() - began
        if (num_drawn, ticket.timings.cached_tokens) != (count, num_cached):
            raise ValueError(
                f"the model must draw {count} tokens after {num_cached} in its cache, "
                f"got {num_drawn} after {ticket.timings.cached_tokens}: it must keep drawn rows."
            )
        return seconds


def _check(model, depth, sizes):
    if min(sizes) < 1:
        raise ValueError(f"tokens to read or to draw must be at least 1, got {min(sizes)}.")
    if depth + max(sizes) > model.ctx_size:
        raise ValueError(
            f"the context must have room for {depth + max(sizes)} tokens, got one of {model.ctx_size}."
        )
