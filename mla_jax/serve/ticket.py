"""A request on its way through the engine, with the text that it has so far."""

import dataclasses
from collections.abc import Callable, Container

from mla_jax.completion import Logprobs, Piece, Timings
from mla_jax.serve.request import Failure, Matcher
from mla_jax.serve.scheduler import Job
from mla_jax.serve.text import TextStream

Listener = Callable[[Piece | Failure], None]


@dataclasses.dataclass(eq=False, kw_only=True)
class Ticket(Job):
    """A request that was taken. Who asked may look at `id`, `timings` and `slot`, and `cancel` it.

    Attributes:
      id: from 0 on.
      listener: hears of each token.
      text: the answer so far.
      matcher: where it is in its grammar; None without one.
      leave: has the engine give it up.
      timings: tokens and seconds, complete once it has ended; time in the queue does not count.
      began: when it was let in, by `time.perf_counter`; None while it waits.
      drew: when its newest token was drawn.
      has_ended: whether its listener has heard the last.
    """

    id: int
    listener: Listener
    text: TextStream
    matcher: Matcher | None
    leave: Callable[["Ticket"], None]
    timings: Timings = dataclasses.field(default_factory=Timings)
    began: float | None = None
    drew: float = 0.0
    has_ended: bool = False

    def cancel(self) -> None:
        """Has the engine give it up before its next step; any thread may call this, and again."""
        self.leave(self)

    @property
    def num_drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_constrained(self) -> bool:
        """Whether its tokens are drawn one at a time, under constraints or with logprobs."""
        request = self.request
        return bool(self.matcher or request.logit_bias) or request.num_logprobs is not None

    def take(self, token: int, logprobs: Logprobs | None, eog_ids: Container[int], now: float) -> Piece:
        """Goes on by a token that was drawn at `now`, and returns what the listener is to hear of it."""
        if self.num_drawn == 0:
            self.timings.prompt_seconds, self.timings.cached_tokens = now - self.began, self.num_cached
        else:
            self.timings.decoded_tokens += 1
            self.timings.decode_seconds += now - self.drew
        self.drew = now
        self.tokens.append(token)
        reason, text = None, ""
        if token in eog_ids and not self.request.ignore_eos:
            reason = "stop"
        else:
            text = self.text.feed(token)
            if self.matcher:
                self.matcher.accept(token)
        if reason is None and self.text.stop is None and len(self.tokens) == self.limit:
            reason = "length"
        if reason:
            text += self.text.flush()
        if self.text.stop is not None:
            reason = "stop"
        return Piece(token=token, text=text, finish_reason=reason, stop=self.text.stop, logprobs=logprobs)
