"""The server process: uvicorn around the application, and how it begins and ends."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable

import uvicorn
from anyio import to_thread

from mla_jax.serve.http.access import HEAD_BYTES
from mla_jax.serve.http.application import application
from mla_jax.serve.http.connections import Connection, room_for
from mla_jax.serve.http.service import Service

_IDLE_SECONDS = 75  # that a connection may be without a request
_FLUSH_SECONDS = 1  # for answers to be sent, once nothing is drawn any more
_NOTICE_SECONDS = 2  # for whoever asks to hear that nothing can be drawn any more
_MAX_CONNECTIONS = 1024
_BACKLOG = 512


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound and does not listen yet, so that a port in use is known at once.

    Args:
      host: name or address of this machine.
      port: 0 for any that is free.

    Raises:
      OSError: the address cannot be used.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def url(bound: socket.socket, *, is_secure: bool = False) -> str:
    """Returns the address of a bound socket as a browser takes it."""
    host, port, *_ = bound.getsockname()
    return f"http{'s' * is_secure}://{f'[{host}]' if ':' in host else host}:{port}"


def run(
    service: Service,
    bound: socket.socket,
    *,
    drain_seconds: float,
    started: Callable[[], None],
    stopping: Callable[[], None],
    ssl_certificate: str | None = None,
    ssl_key: str | None = None,
    watch: Callable[[Callable[[str], None]], None] | None = None,
) -> bool:
    """Serves until a signal asks for the end, and returns when every request has been answered or cut off.

    At the first SIGTERM or SIGINT new requests get 503 and the others may go on for a while; at the second
    the process ends.

    Args:
      service: its engine runs in a thread of its own.
      bound: from `bind`.
      drain_seconds: that requests may go on for.
      started: is called when the server listens.
      stopping: is called at the first signal.
      ssl_certificate: file of the certificate in PEM, None for plain HTTP.
      ssl_key: file of its key.
      watch: is called when the server listens, with a function for any thread to end it by: with the sentence
        that all are answered, by 503, who run, wait and come until it ends.

    Returns:
      Whether the engine has ended as well; if not, it stands still, and its thread with it.
    """
    protocol = type("_Connection", (Connection,), {"send_seconds": service.settings.send_seconds})
    config = uvicorn.Config(
        application(service),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=room_for(_MAX_CONNECTIONS),
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        h11_max_incomplete_event_size=HEAD_BYTES,
        ssl_certfile=ssl_certificate,
        ssl_keyfile=ssl_key,
    )
    service.engine.start()
    try:
        _Server(config, service, drain_seconds, started, stopping, watch).run(sockets=[bound])
    finally:
        stopper = threading.Thread(target=service.engine.stop, daemon=True)
        stopper.start()
        stopper.join(_FLUSH_SECONDS)
    return not stopper.is_alive()


class _Server(uvicorn.Server):
    """Drains before it shuts down, where uvicorn would turn clients away at once."""

    def __init__(self, config, service, drain_seconds, started, stopping, watch):
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._started, self._stopping, self._watch = started, stopping, watch
        self._loop = self._draining = None

    async def startup(self, sockets=None) -> None:
        """Listens, and says so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._started()
        if self._watch is not None:
            self._watch(lambda reason: self._loop.call_soon_threadsafe(self._lose, reason))

    def handle_exit(self, sig: int, frame) -> None:
        """Begins to end at the first signal, and ends at the second."""
        if self._service.is_draining:
            os._exit(128 + sig)
        self._service.is_draining = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self):
        self._stopping()
        self._draining = asyncio.ensure_future(self._drain())

    def _lose(self, reason):
        if self._service.lost is None:
            self._service.lose(reason)
            self._loop.call_later(_NOTICE_SECONDS, setattr, self, "should_exit", True)

    async def _drain(self):
        drained = asyncio.ensure_future(to_thread.run_sync(self._service.engine.drain, self._drain_seconds))
        await asyncio.wait({drained}, timeout=self._drain_seconds + _FLUSH_SECONDS)
        self.should_exit = True
