"""What a request gives back: pieces as they are drawn, or the whole text; and how long it took."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One step of a stream.

    Attributes:
      token: id just drawn.
      text: characters that became complete with it; may be empty.
      finish_reason: None while it goes on; "stop" at an end-of-generation token, "length" at `max_tokens` or
        where the context is full.
    """

    token: int
    text: str
    finish_reason: str | None = None


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
