"""Parts that answers of several routes have in common, as JSON values."""

import time
from collections.abc import Sequence
from typing import Any

from mla_jax.completion import Logprobs, Piece, Timings
from mla_jax.sampler import SamplingParams
from mla_jax.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Returns OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def timings(of: Timings, num_drawn: int) -> dict[str, Any]:
    """Returns llama-server's timings.

    Args:
      of: a text; the time of its first token counts to the prompt.
      num_drawn: tokens of it.
    """
    num_prompt = of.prompt_tokens - of.cached_tokens
    num_decoded = max(num_drawn - 1, 0)
    return {
        "cache_n": of.cached_tokens,
        "prompt_n": num_prompt,
        **_speed("prompt", num_prompt, of.prompt_seconds),
        "predicted_n": num_drawn,
        **_speed("predicted", num_decoded, of.decode_seconds),
    }


def _speed(name, num_tokens, seconds):
    return {
        f"{name}_ms": round(1000 * seconds, 3),
        f"{name}_per_token_ms": round(1000 * seconds / num_tokens, 3) if num_tokens else 0.0,
        f"{name}_per_second": round(num_tokens / seconds, 3) if seconds > 0 else 0.0,
    }


def generation_settings(sampling: SamplingParams, max_tokens: int | None) -> dict[str, Any]:
    """Returns how texts are drawn in llama-server's words.

    Args:
      sampling: how they are drawn.
      max_tokens: None for no limit.
    """
    return {
        "n_predict": -1 if max_tokens is None else max_tokens,
        "seed": -1 if sampling.seed is None else sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": sampling.penalty_last_n,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }


class Tally:
    """Counts the tokens of a text and the time they take, as it is drawn."""

    def __init__(self, ticket: Any):
        self.num_drawn, self.finish_reason = 0, None
        self._ticket, self._began, self._first = ticket, time.perf_counter(), None
        self._newest = self._began

    def add(self, pieces: Sequence[Piece]) -> None:
        """Counts pieces that came together."""
        self.num_drawn += len(pieces)
        self._newest = time.perf_counter()
        self._first = self._first or self._newest
        self.finish_reason = pieces[-1].finish_reason

    @property
    def ticket_timings(self) -> Timings:
        """What the engine says of the text."""
        return self._ticket.timings

    def timings(self) -> dict[str, Any]:
        """Returns llama-server's timings up to now: the engine's at the end, those seen here before."""
        of = self._ticket.timings
        if self.finish_reason is None:
            of = Timings(
                prompt_tokens=of.prompt_tokens,
                cached_tokens=of.cached_tokens,
                prompt_seconds=(self._first or self._newest) - self._began,
                decode_seconds=self._newest - (self._first or self._newest),
            )
        return timings(of, self.num_drawn)


def token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Returns a token as chat completions tell it: text, bytes and logprob."""
    raw = tokenizer.token_bytes(token)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": finite(logprob),
        "bytes": list(raw),
    }


def chat_logprobs(tokenizer: Tokenizer, token: int, logprobs: Logprobs) -> dict[str, Any]:
    """Returns the logprobs of a drawn token as chat completions tell them."""
    top = [token_logprob(tokenizer, other, logprob) for other, logprob in logprobs.top]
    return token_logprob(tokenizer, token, logprobs.chosen) | {"top_logprobs": top}


def text_logprobs(tokenizer: Tokenizer, pieces: Sequence[tuple[Piece, int]]) -> dict[str, Any]:
    """Returns the logprobs of some pieces, each with the place of its text, as completions tell them."""
    text = lambda token: tokenizer.token_bytes(token).decode("utf-8", "replace")
    told = [(piece, offset) for piece, offset in pieces if piece.logprobs is not None]
    return {
        "tokens": [text(piece.token) for piece, _ in told],
        "token_logprobs": [finite(piece.logprobs.chosen) for piece, _ in told],
        "top_logprobs": [
            {text(token): finite(logprob) for token, logprob in piece.logprobs.top} for piece, _ in told
        ],
        "text_offset": [offset for _, offset in told],
    }


def finite(logprob: float) -> float:
    """Returns `logprob`, or the lowest that is told."""
    return max(_LOWEST_LOGPROB, float(logprob))  # in this order NaN is told as the lowest
