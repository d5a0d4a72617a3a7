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
        self._grammar, self._tokenizer, self._end = grammar, tokenizer, end.encode()
        self._free = _free_text(tokenizer, end)

    def start(self) -> "ReasoningMatcher":
        """Returns a matcher at the beginning of a text."""
        return ReasoningMatcher(self._grammar.start(), self._tokenizer, self._end, self._free)


class ReasoningMatcher:
    """How far one text has come; a `request.Matcher`.

    Where the end is a token, that token alone closes the reasoning, and no others may spell it. Elsewhere it
    is spelt, by tokens that hold nothing but white space after it: what they held would be lost to the
    grammar.
    """

    def __init__(self, inner: Matcher, tokenizer: tokenizer_lib.Tokenizer, end: bytes, free: "_FreeText"):
        self._inner, self._tokenizer, self._end, self._free = inner, tokenizer, end, free
        self._window: bytes | None = b""  # the last bytes of the reasoning, None once it has ended

    def mask(self) -> np.ndarray:
        """Returns which tokens may come next; as `request.Matcher`."""
        if self._window is None:
            return self._inner.mask()
        mask = self._free.masks[0]
        for size in range(1, min(len(self._end), len(self._window) + 1)):
            if self._window.endswith(self._end[:size]):
                mask = mask & self._free.masks[size]
                mask.flags.writeable = False
        return mask

    def accept(self, token: int) -> None:
        """Goes on by a token that the mask allowed; as `request.Matcher`."""
        if self._window is None:
            self._inner.accept(token)
            return
        (word, bit), mask = divmod(token, 32), self.mask()
        if not (0 <= word < len(mask) and int(mask[word]) >> bit & 1):
            raise ValueError(f"token must be one that reasoning may hold, got {token}.")
        window = self._window + self._tokenizer.token_bytes(token)
        has_ended = token == self._free.end if self._free.end is not None else self._end in window
        self._window = None if has_ended else window[-len(self._end) :]


class _FreeText:
    """What reasoning may hold.

    Attributes:
      masks: of the tokens that may come after a text that ends in the first 0, 1, ... bytes of the end, each
        u32[ceil(W / 32)]; where a text ends in several of them, a token must be in all.
      end: id of the token that closes the reasoning, None where there is none.
    """

    def __init__(self, tokenizer, end):
        tokens, kinds = tokenizer.vocabulary.tokens, tokenizer.token_types
        self.end = tokens.index(end) if end in tokens else None
        is_free = np.zeros(-(-len(tokens) // 32) * 32, bool)
        is_free[: len(tokens)] = [
            index == self.end or (kind not in _HIDDEN and index not in tokenizer.eog_ids)
            for index, kind in enumerate(kinds)
        ]
        texts = [tokenizer.token_bytes(index) for index in range(len(tokens))]
        self.masks = [self._mask(is_free, texts, end.encode(), size) for size in range(len(end.encode()))]

    def _mask(self, is_free, texts, end, size):
        is_allowed, rest = is_free.copy(), end[size:]
        for index, text in enumerate(texts):
            place = text.find(rest) if size == 0 or text.startswith(rest) else -1
            if place < 0 or index == self.end:
                continue
            if self.end is not None or text[place + len(rest) :].strip():
                is_allowed[index] = False
        mask = np.packbits(is_allowed, bitorder="little").view(np.uint32)
        mask.flags.writeable = False
        return mask


_free_text = functools.lru_cache(maxsize=2)(_FreeText)
