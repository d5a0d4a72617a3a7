"""Keeps the special tokens that users wrote as text.

A template joins its own markers and what users wrote to one text, in which the tokenizer then finds special
tokens. So that it finds the template's alone, the first character of each one in what a user wrote is
replaced by a stand-in, a character of Unicode's private use, before the template sees it. `Tokenizer.encode`
puts the character back once special tokens have been found. Text without special tokens is left as it is.
"""

import itertools
import json
import re
import weakref
from collections.abc import Mapping
from typing import Any

from mla_jax.tokenizer import CONTROL, UNKNOWN, USER_DEFINED, Tokenizer

_PRIVATE_USE = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
_THINK = ("<think>", "</think>")


class _Tokens:
    """The special tokens of a vocabulary that have to stay text: control tokens, and tags of its own.

    Other tokens that a vocabulary defines beside its merges are letters, spaces and the like, and thinking
    is looked for by templates in what the model said before; the tokenizer finds both in any text.
    """

    def __init__(self, tokenizer: Tokenizer):
        texts = zip(tokenizer.vocabulary.tokens, tokenizer.token_types, strict=True)
        special = {
            text
            for text, kind in texts
            if kind in (CONTROL, UNKNOWN)
            or (kind == USER_DEFINED and text[0] == "<" and text[-1] == ">" and text not in _THINK)
        }
        self.texts = frozenset(special)
        self.heads = {text[:end] for text in special for end in range(1, len(text))}
        self.tails = {text[start:] for text in special for start in range(1, len(text))}
        self.longest = max(map(len, special), default=0)
        self.characters = sorted(set("".join(special)))
        self._first = (
            re.compile(f"[{re.escape(''.join({text[0] for text in special}))}]") if special else None
        )

    def places(self, text: str) -> list[int]:
        """Returns where in `text` special tokens begin. It takes time by the length of the text alone."""
        found = self._first.finditer(text) if self._first else ()
        return [match.start() for match in found if self._begins(text, match.start())]

    def _begins(self, text, start):
        for end in range(start + 1, min(start + self.longest, len(text)) + 1):
            part = text[start:end]
            if part in self.texts:
                return True
            if part not in self.heads:
                return False
        return False


_KNOWN: weakref.WeakKeyDictionary[Tokenizer, _Tokens] = weakref.WeakKeyDictionary()


class StandIns:
    """Stand-ins for one prompt."""

    def __init__(self, tokenizer: Tokenizer, written: str):
        """Chooses stand-ins that do not occur in `written`: all that the prompt will be made of.

        Raises:
          ValueError: `written` uses up the characters of private use.
        """
        if tokenizer not in _KNOWN:
            _KNOWN[tokenizer] = _Tokens(tokenizer)
        self._tokens = _KNOWN[tokenizer]
        used = set(written)
        is_free = lambda char: char not in used and ("\\u" not in written or _escaped(char) not in written)
        free = filter(is_free, map(chr, itertools.chain(*itertools.starmap(range, _PRIVATE_USE))))
        self._stand_in = dict(zip(self._tokens.characters, free, strict=False))
        if len(self._stand_in) < len(self._tokens.characters):
            raise ValueError("messages must not use all characters of Unicode's private use.")

    def hide(self, value: Any) -> Any:
        """Returns a JSON value in whose texts, keys too, no special token is found any more."""
        if isinstance(value, str):
            return self._hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(entry) for key, entry in value.items()}
        return [self.hide(entry) for entry in value] if isinstance(value, list | tuple) else value

    def hide_json(self, text: str) -> str:
        """Returns the text of a JSON value, without special tokens in it or in what it stands for."""
        hidden = self._hide(text)
        try:
            value = self.hide(json.loads(text))
            return hidden if json.loads(hidden) == value else json.dumps(value, ensure_ascii=False)
        except (ValueError, RecursionError):
            return hidden

    def unescape(self, prompt: str) -> str:
        """Returns a prompt in which stand-ins that were written as JSON escapes are characters again."""
        if "\\u" in prompt:
            for stand_in in self._stand_in.values():
                prompt = prompt.replace(_escaped(stand_in), stand_in)
        return prompt

    def of(self, prompt: str) -> dict[str, str]:
        """Returns stand-in -> character for those in a prompt, as `Tokenizer.encode` takes it."""
        found = set(prompt)
        return {stand_in: char for char, stand_in in self._stand_in.items() if stand_in in found}

    def _hide(self, text):
        tokens = self._tokens
        places = tokens.places(text)
        if places:
            characters = list(text)
            for place in places:
                characters[place] = self._stand_in[text[place]]
            text = "".join(characters)
        ends = range(1, min(len(text), tokens.longest) + 1)
        # What begins a token here could end with what the template writes next, and the other way round.
        for head in (end for end in reversed(ends) if text[-end:] in tokens.heads):
            cut = len(text) - head
            text = text[:cut] + self._stand_in[text[cut]] + text[cut + 1 :]
        if any(text[:end] in tokens.tails for end in ends):
            text = self._stand_in[text[0]] + text[1:]
        return text


def _escaped(char):
    return json.dumps(char)[1:-1]
