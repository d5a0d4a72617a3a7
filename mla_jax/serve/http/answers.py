"""From the engine's thread to the event loop: what the texts of one HTTP request give, as one stream."""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from mla_jax.completion import Piece
from mla_jax.serve.http.api_error import ApiError, busy
from mla_jax.serve.http.metrics import Metrics
from mla_jax.serve.request import Draining, Failure, GrammarFailed, QueueFull, Request

_RETRY_AFTER_DRAIN = 5.0  # seconds; who comes back then finds the next process


class Answers:
    """The texts of one HTTP request while they are drawn. It lives on one event loop.

    Attributes:
      tickets: of the engine, one for each text.
    """

    def __init__(self, engine: Any, metrics: Metrics, *, seconds: float, is_draining: Callable[[], bool]):
        """Takes on nothing yet.

        Args:
          engine: draws.
          metrics: are told how long tokens take.
          seconds: that all texts together may take.
          is_draining: whether a failure means that the server is about to stop.
        """
        self._engine, self._metrics, self._is_draining = engine, metrics, is_draining
        self._heard: collections.deque[tuple[int, Piece | Failure]] = collections.deque()
        self._has_heard, self._is_called = asyncio.Event(), False
        self._parts: collections.deque[tuple[int, list[Piece] | Failure]] = collections.deque()
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self._deadline = self._loop.time() + seconds
        self._seconds, self._open, self._lost = seconds, set(), None
        self.tickets: list[Any] = []

    @property
    def is_ahead(self) -> bool:
        """Whether more has been drawn than `pieces` has yielded."""
        return bool(self._parts or self._heard)

    def submit(self, requests: Sequence[Request]) -> None:
        """Hands all requests to the engine, or none.

        Raises:
          ApiError: 400 if one can never run, 429 if there is no room for it now, 503 if there never will be.
        """
        try:
            if self._lost is not None:
                raise Draining(self._lost)
            for index, request in enumerate(requests):
                ticket = self._engine.submit(request, self._listener(index))
                self.tickets.append(ticket)
                self._open.add(index)
        except ValueError as error:
            self.close()
            raise ApiError(str(error)) from None
        except QueueFull as error:
            self.close()
            raise busy(error) from None
        except Draining as error:
            self.close()
            message = str(error) or "the server is about to stop."
            raise ApiError(message, status=503, code="draining", retry_after=_RETRY_AFTER_DRAIN) from None

    async def pieces(self) -> AsyncIterator[tuple[int, list[Piece]]]:
        """Yields (number of the text, pieces that have come since) until every text has ended.

        Raises:
          ApiError: 400 if a grammar does not let a text go on, 500 if the engine fails one, 503 if it takes
            too long or the server stops.
        """
        newest: dict[int, float] = {}
        while self._open:
            index, part = await self._next()
            if isinstance(part, Failure):
                self._open.discard(index)
                if isinstance(part.error, GrammarFailed):
                    raise ApiError(str(part.error), code="grammar_failed")
                raise ApiError(part.message, status=503 if self._is_draining() else 500)
            now = time.perf_counter()
            self._measure(now, newest.get(index), len(part))
            newest[index] = now
            if part[-1].finish_reason is not None:
                self._metrics.request.observe(now - self._began)
                self._open.discard(index)
            yield index, part

    def end(self, index: int) -> None:
        """Cancels one text, whose pieces are awaited no more."""
        if index in self._open:
            self._open.discard(index)
            self.tickets[index].cancel()

    def close(self) -> None:
        """Cancels every text that has not ended. Whoever submits must see to it that this is called."""
        for index in sorted(self._open):
            self.end(index)

    def lose(self, reason: str) -> None:
        """Ends every text by a failure, where the engine may say nothing more; none is begun after it."""
        self._lost = reason
        for index in sorted(self._open):
            self._heard.append((index, Failure(message=reason, error=RuntimeError(reason))))
        self._has_heard.set()

    def leave(self) -> None:
        """Does as `close`, and counts a client that left if there was something to cancel."""
        if self._open:
            self._metrics.disconnects.inc()
        self.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Cancels every text if the block ends by an exception; if it is cancelled, the client has left."""
        try:
            yield
        except asyncio.CancelledError:
            self.leave()
            raise
        except BaseException:
            self.close()
            raise

    def _measure(self, now, previous, num_tokens):
        """Tells the metrics that tokens have come together, after `previous`; None: the first among them."""
        if previous is None:
            self._metrics.first_token.observe(now - self._began)
            previous, num_tokens = now, num_tokens - 1
        for _ in range(num_tokens):
            self._metrics.between_tokens.observe((now - previous) / num_tokens)

    def _listener(self, index):
        def listen(event):
            self._heard.append((index, event))
            if self._is_called:  # and has not looked yet: it will find this too
                return
            self._is_called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is no one to tell
                self._loop.call_soon_threadsafe(self._look)

        return listen

    def _look(self):
        self._is_called = False
        self._has_heard.set()

    async def _next(self):
        try:
            while True:
                while self._parts:
                    index, part = self._parts.popleft()
                    if index in self._open:
                        return index, part
                while not self._heard:
                    self._has_heard.clear()
                    async with asyncio.timeout_at(self._deadline):
                        await self._has_heard.wait()
                self._gather()
        except TimeoutError:
            raise ApiError(
                f"the answer took longer than the {self._seconds:g} seconds that it may.",
                status=503,
                code="timeout",
            ) from None

    def _gather(self):
        """Puts pieces of one text together: tokens that were drawn in one call come at once."""
        pieces = collections.defaultdict(list)
        while self._heard:
            index, event = self._heard.popleft()
            if isinstance(event, Failure):
                self._parts.append((index, event))
                continue
            if not pieces[index]:
                self._parts.append((index, pieces[index]))
            pieces[index].append(event)
