"""What the engine is asked for, and what it answers: plain values, no arrays."""

import dataclasses
from typing import Protocol

import numpy as np

from mla_jax.expert_reduction import Setting
from mla_jax.logits import MAX_BIASED, MAX_LOGPROBS
from mla_jax.sampler import SamplingParams

__all__ = [
    "MAX_BIASED",
    "MAX_LOGPROBS",
    "Draining",
    "Failure",
    "Grammar",
    "GrammarFailed",
    "Lost",
    "Matcher",
    "QueueFull",
    "Request",
    "check",
]

_MAX_BIAS = 1e30  # finite in float32, and so is its sum with a logit


class Matcher(Protocol):
    """How far a text has come in its grammar. The engine asks before each token, from its own thread."""

    def mask(self) -> np.ndarray:
        """Returns which tokens may come next: u32[ceil(W / 32)], token i in bit i % 32 of word i // 32.

        Raises:
          GrammarFailed: nothing may.
        """

    def accept(self, token: int) -> None:
        """Goes on by a token that the mask allowed. Raises ValueError otherwise, GrammarFailed as `mask`."""


class Grammar(Protocol):
    """A compiled grammar; it belongs to one vocabulary and serves any number of requests."""

    def start(self) -> Matcher:
        """Returns a matcher at the beginning of a text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be drawn.

    Attributes:
      prompt: token ids, each in [0, W), at least one.
      max_tokens: tokens to draw at most, at least 1; None for as many as the context holds.
      sampling: how to draw; its seed must be chosen.
      expert_reduction: (Kmin, t) of each layer; None for the engine's.
      stop: texts that end the answer; none of them is a part of it.
      logit_bias: (token id, number added to its logit), at most `MAX_BIASED` pairs.
      num_logprobs: how many of the most likely tokens to tell with each token, at most `MAX_LOGPROBS`; 0 for
        the logprob of the drawn one alone, None for none at all.
      grammar: what the text has to follow, None for nothing.
      ignore_eos: draw on past tokens that end a text.
      shown_tokens: control tokens that are a part of the text; others are not seen in it.
      reuse_prefix: take rows of earlier requests that begin alike, and keep this one's for later ones.
      salt: only requests of the same salt share rows.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: SamplingParams
    expert_reduction: tuple[Setting, ...] | None = None
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    grammar: Grammar | None = None
    ignore_eos: bool = False
    shown_tokens: frozenset[int] = frozenset()
    reuse_prefix: bool = True
    salt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """The last that is heard of a request that failed while it ran, and why."""

    message: str
    error: BaseException


def check(request: Request, *, ctx_size: int, vocab_size: int) -> None:
    """Refuses what could never run, or could hurt others.

    Raises:
      ValueError: if a field is out of range.
    """
    if not request.prompt:
        raise ValueError("the prompt must hold at least one token, got none.")
    if len(request.prompt) > ctx_size:
        raise ValueError(
            f"the prompt must fit the context of {ctx_size} tokens, got {len(request.prompt)} tokens."
        )
    for position, token in enumerate(request.prompt):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token ids must be in [0, {vocab_size}), got {token} at position {position}.")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {request.max_tokens}.")
    if request.num_logprobs is not None and not 0 <= request.num_logprobs <= MAX_LOGPROBS:
        raise ValueError(f"num_logprobs must be in [0, {MAX_LOGPROBS}], got {request.num_logprobs}.")
    if len(request.logit_bias) > MAX_BIASED:
        raise ValueError(f"logit_bias must be of at most {MAX_BIASED} tokens, got {len(request.logit_bias)}.")
    for token, bias in request.logit_bias:
        if not 0 <= token < vocab_size or not abs(bias) <= _MAX_BIAS:
            raise ValueError(
                f"logit_bias must be of token ids in [0, {vocab_size}) by at most {_MAX_BIAS:g}, "
                f"got {token} by {bias}."
            )
    if "" in request.stop:
        raise ValueError("stop must be of texts that are not empty, got an empty one.")
    if request.sampling.seed is None:
        raise ValueError("seed must be chosen before a request is submitted, got None.")


class QueueFull(Exception):
    """There are as many requests waiting as there may be; `retry_after` seconds is a fair guess when not."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class GrammarFailed(RuntimeError):
    """A text cannot go on by its grammar: the fault of who wrote the grammar, and of nobody else."""


class Lost(RuntimeError):
    """What the steps need is gone, for good: whoever keeps watch over it says so, and ends the engine."""


class Draining(Exception):
    """The engine takes no more requests: it is about to stop."""
