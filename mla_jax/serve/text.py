"""Tokens to the text that a client may see: whole characters, and nothing that may yet become a stop text."""

from collections.abc import Sequence

from mla_jax.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """The text of one answer, as far as it is certain.

    Attributes:
      stop: the stop text that was met, None while there was none.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], shown: frozenset[int]):
        self.stop: str | None = None
        self._decoder = StreamDecoder(tokenizer, shown=shown)
        self._stops, self._held = tuple(stops), ""

    def feed(self, token: int) -> str:
        """Returns the text that is certain once `token` has come, up to a stop text."""
        return self._certain(self._decoder.feed(token))

    def flush(self) -> str:
        """Returns what was held back: the answer ends here. It may still meet a stop text."""
        text = self._certain(self._decoder.flush())
        held, self._held = self._held, ""
        return text if self.stop else text + held

    def _certain(self, text):
        if not self._stops:
            return text
        text = self._held + text
        met = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if met:
            place, self.stop = min(met)
            self._held = ""
            return text[:place]
        longest = max(map(len, self._stops)) - 1
        starts = range(max(0, len(text) - longest), len(text))
        begun = (start for start in starts if any(stop.startswith(text[start:]) for stop in self._stops))
        cut = next(begun, len(text))
        self._held = text[cut:]
        return text[:cut]
