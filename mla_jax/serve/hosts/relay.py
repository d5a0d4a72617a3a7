"""JAX's connections between processes, led through the port of the first one.

JAX's own client ends its process at once, with a report of the C++ library, when the connection to process 0
breaks. Here it is connected to its own process, which holds that connection when the other end is gone: so it
is this project that says what was lost. And JAX's service listens to no other machine.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

_PIECE = 1 << 16
_PATIENCE = 30.0  # seconds for a service that is about to start
_PAUSE = 0.05


def free_port() -> int:
    """Returns a port of the loopback address that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def listen(connect: Callable[[], socket.socket]) -> int:
    """Leads every connection of this process on to what `connect` returns; the far end may break unnoticed.

    Returns:
      the port of the loopback address to connect to.
    """
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(server, connect), name="relay", daemon=True).start()
    return server.getsockname()[1]


def reach(port: int) -> socket.socket:
    """Returns a connection to a port of this machine, where a service may be about to start.

    Raises:
      OSError: nobody listens there after half a minute.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)


def join(near: socket.socket, far: socket.socket) -> None:
    """Passes on what comes at either of two connections until both have ended."""
    back = threading.Thread(target=_pass_on, args=(far, near), daemon=True)
    back.start()
    _pass_on(near, far)
    back.join()
    near.close()
    far.close()


def _accept(server, connect):
    while True:
        near, _ = server.accept()
        threading.Thread(target=_lead, args=(near, connect), daemon=True).start()


def _lead(near, connect):
    """Leads one connection on; when `far` breaks, `near` stays as if `far` were silent."""
    with near, contextlib.suppress(OSError, ValueError):
        with connect() as far:
            back = threading.Thread(target=_pass_on, args=(far, near), kwargs={"ends": False}, daemon=True)
            back.start()
            _pass_on(near, far, endures=True)
            back.join()


def _pass_on(source, target, *, ends=True, endures=False):
    with contextlib.suppress(OSError):
        while part := source.recv(_PIECE):
            with contextlib.suppress(OSError) if endures else contextlib.nullcontext():
                target.sendall(part)
    if ends:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
