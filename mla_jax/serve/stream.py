"""The text of a request, read token by token in the thread that asked for it."""

import queue
from collections.abc import Callable, Iterator

from mla_jax.completion import Piece
from mla_jax.serve.request import Failure
from mla_jax.serve.ticket import Ticket

_PATIENCE = 0.5  # seconds until it is looked again who takes the steps


class Stream(Iterator[Piece]):
    """Pieces of one text. Whoever stops reading before the end must close it, which cancels the request."""

    def __init__(self, ticket: Ticket, pieces: queue.SimpleQueue, step: Callable[[], bool]):
        """Reads what comes into `pieces`; `step` takes a step, or returns False if a thread does."""
        self._ticket, self._pieces, self._step, self._has_ended = ticket, pieces, step, False

    def __next__(self) -> Piece:
        """Returns the next piece; raises what the request failed of."""
        if self._has_ended:
            raise StopIteration
        try:
            piece = self._wait()
        except BaseException:  # an interrupt too
            self.close()
            raise
        self._has_ended = isinstance(piece, Failure) or piece.finish_reason is not None
        if isinstance(piece, Failure):
            raise piece.error
        return piece

    def close(self) -> None:
        """Gives the request up if it has not ended."""
        if not self._has_ended:
            self._has_ended = True
            self._ticket.cancel()

    def _wait(self):
        while True:
            while self._pieces.empty() and self._step():
                pass
            try:
                return self._pieces.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
