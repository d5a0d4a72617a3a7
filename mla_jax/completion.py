"""What a request gives back: pieces as they are drawn, or the whole text; and how long it took."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """How likely the token was to the model itself, before penalties, biases, filters and temperature.

    Attributes:
      chosen: natural logarithm of the probability of the token that was drawn.
      top: (token id, logprob) of the most likely tokens, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One step of a stream.

    Attributes:
      token: id just drawn; -1 where none was, after a cancellation.
      text: characters that became certain with it; may be empty.
      finish_reason: None while it goes on; "stop" at an end-of-generation token or a stop text, "length" at
        `max_tokens` or where the context is full, "cancel" after `Ticket.cancel`.
      stop: the stop text that was met, None if it was none.
      logprobs: of the token, where they were asked for.
    """

    token: int
    text: str
    finish_reason: str | None = None
    stop: str | None = None
    logprobs: Logprobs | None = None


@dataclasses.dataclass(kw_only=True)
class Timings:
    """Tokens and seconds of the newest request; the first token counts to the prompt.

    Of the prompt's tokens `cached_tokens` were in the cache already.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished text, its tokens (the end-of-generation token left out) and how long it took."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    timings: Timings
