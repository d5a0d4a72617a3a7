"""Holds an answer to a grammar from where its reasoning ends; the reasoning itself is free."""

import functools

import numpy as np

from mla_jax import tokenizer as tokenizer_lib
from mla_jax.serve.request import Grammar, Matcher

_HIDDEN = (tokenizer_lib.UNKNOWN, tokenizer_lib.CONTROL, tokenizer_lib.UNUSED)


class AfterReasoning:
    """A grammar for answers whose prompt has opened their reasoning; a `request.Grammar`."""

    def __init__(self, grammar: Grammar, tokenizer: tokenizer_lib.Tokenizer, end: str):
        """Lets `grammar` begin after `end`, the text that closes the reasoning; no answer ends before it."""
        self._grammar, self._tokenizer, self._end = grammar, tokenizer, end

    def start(self) -> "ReasoningMatcher":
        """Returns a matcher at the beginning of a text."""
        return ReasoningMatcher(self._grammar.start(), self._tokenizer, self._end)


class ReasoningMatcher:
    """How far one text has come; a `request.Matcher`."""

    def __init__(self, inner: Matcher, tokenizer: tokenizer_lib.Tokenizer, end: str):
        self._inner, self._tokenizer, self._end = inner, tokenizer, end.encode()
        self._mask = _free_text(tokenizer, end)
        self._window: bytes | None = b""  # the last bytes of the reasoning, None once it has ended

    def mask(self) -> np.ndarray:
        """Returns which tokens may come next: u32[ceil(W / 32)], token i in bit i % 32 of word i // 32."""
        return self._inner.mask() if self._window is None else self._mask

    def accept(self, token: int) -> None:
        """Goes on by a token that the mask allowed. Raises ValueError otherwise."""
        if self._window is None:
            self._inner.accept(token)
            return
        word, bit = divmod(token, 32)
        if not (0 <= word < len(self._mask) and int(self._mask[word]) >> bit & 1):
            raise ValueError(f"token must be one that reasoning may hold, got {token}.")
        window = self._window + self._tokenizer.token_bytes(token)
        self._window = None if self._end in window else window[-len(self._end) :]


@functools.lru_cache(maxsize=2)
def _free_text(tokenizer, end):
    tokens, kinds = tokenizer.vocabulary.tokens, tokenizer.token_types
    is_allowed = np.zeros(-(-len(tokens) // 32) * 32, np.uint8)
    is_allowed[: len(tokens)] = [
        token == end or (kind not in _HIDDEN and index not in tokenizer.eog_ids)
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    ]
    mask = np.packbits(is_allowed, bitorder="little").view(np.uint32)
    mask.flags.writeable = False
    return mask
