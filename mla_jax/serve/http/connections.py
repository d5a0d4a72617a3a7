"""Connections of uvicorn with limits on how long a client may be silent.

uvicorn closes idle connections, but waits for ever on a client that sends a request's head byte by byte, or
a body that nobody reads any more, or that does not read its answer.
"""

try:
    import resource
except ImportError:  # not on Windows, which has no such limit
    resource = None

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_OTHER_DESCRIPTORS = 128  # of the model, its devices, saved slots and child processes


def room_for(wanted: int) -> int:
    """Returns how many connections there may be, at most `wanted`, so that other files find room too.

    The process is given as many descriptors as they need, as far as it may have them.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = wanted + _OTHER_DESCRIPTORS
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - _OTHER_DESCRIPTORS))


class Connection(H11Protocol):
    """One connection.

    Attributes:
      head_seconds: that the head of a request may take to come, after what is left of the one before.
      send_seconds: that a client may leave its answer unread.
    """

    head_seconds: float = 30.0
    send_seconds: float = 600.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._head_timer = self._send_timer = None

    def connection_made(self, transport) -> None:
        """Waits for the head of a request."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Takes what came, and waits on only for a head that has begun and is not whole."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing more."""
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._send_timer = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Waits for the client to read."""
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Goes on: the client has read."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    def _watch_head(self):
        # IDLE: the head of the client's next request is not whole yet. DONE: the answer is, and whoever still
        # sends the body that belongs to it has as long until that head.
        ours, theirs = self.conn.our_state, self.conn.their_state
        is_awaited = theirs is h11.IDLE or (ours is h11.DONE and theirs is h11.SEND_BODY)
        is_awaited = is_awaited and not self.transport.is_closing()
        if is_awaited and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)
        elif not is_awaited and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
