"""Messages between two processes of a run, and notice of one that is gone or stands still."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from flax import serialization

BEAT_SECONDS = 1.0  # between two signs of life
SILENT_SECONDS = 10.0  # without one, after which a process counts as lost
_LENGTH = struct.Struct("!Q")
_BEAT = _LENGTH.pack(0)
_PIECE = 1 << 20  # bytes handed to the system at a time: each of them may take `SILENT_SECONDS`
_MAX_BYTES = 1 << 40  # of a message; rows of a whole pool are the largest
_MAX_TOLD = 500  # characters of what another process says


def send(connection: socket.socket, payload: bytes) -> None:
    """Writes a message of at least one byte, after its length.

    Raises:
      OSError: the peer is gone, or has not read for as long as the socket waits.
    """
    head = _LENGTH.pack(len(payload))
    rest = memoryview(head + payload if len(payload) < _PIECE else payload)
    if len(payload) >= _PIECE:
        connection.sendall(head)
    while rest:
        rest = rest[connection.send(rest[:_PIECE]) :]


def receive(connection: socket.socket, most: int) -> bytes:
    """Reads a message; one without bytes is a sign of life.

    Raises:
      ValueError: it has more than `most` bytes, of which none was read.
      OSError: the peer is gone, or nothing came for as long as the socket waits.
    """
    (size,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if size > most:
        raise ValueError(f"a message must have at most {most} bytes, got {size}.")
    return _read(connection, size)


def _read(connection, size):
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), _PIECE))
        if not part:
            raise ConnectionError("the connection has ended.")
        parts += part
    return bytes(parts)


class Line:
    """A connection to another process of the run, of which both ends send signs of life.

    Attributes:
      process_id: of the process at the other end.
    """

    def __init__(self, connection: socket.socket, process_id: int):
        """Takes a socket over; nothing is sent or read before `start`."""
        connection.settimeout(SILENT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.process_id = process_id
        self._connection, self._sending = connection, threading.Lock()

    def start(self, heard: Callable[[dict[str, Any]], None], lost: Callable[[str], None]) -> None:
        """Listens from now on.

        Args:
          heard: called with each message, in a thread of its own.
          lost: called there at last, with a clause that says how the peer was lost.
        """
        threading.Thread(target=self._listen, args=(heard, lost), name="line", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Sends nested dicts and lists of numbers, texts and NumPy arrays. Raises OSError as `send` does."""
        self.send_packed(pack(message))

    def send_packed(self, payload: bytes) -> None:
        """Sends what `pack` made, which may go to several."""
        with self._sending:
            send(self._connection, payload)

    def close(self) -> None:
        """Ends the connection, which both ends hear as lost."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _listen(self, heard, lost):
        try:
            while True:
                payload = receive(self._connection, _MAX_BYTES)
                if payload:
                    heard(_unpack(payload))
        except TimeoutError:
            lost(f"nothing was heard from it for {SILENT_SECONDS:g} seconds")
        except OSError:
            lost("its connection has ended")
        except Exception:  # whatever it is: nobody else would miss the peer
            lost("it sent what is no message")

    def _beat(self):
        try:
            while True:
                with self._sending:
                    self._connection.sendall(_BEAT)
                time.sleep(BEAT_SECONDS)
        except OSError:
            return  # whoever listens tells


def pack(message: dict[str, Any]) -> bytes:
    """Returns the bytes of a message."""
    return serialization.msgpack_serialize(message)


def printable(said: Any) -> str:
    """Returns a sentence of another process without control characters, and not too long."""
    return "".join(char for char in str(said)[:_MAX_TOLD] if char.isprintable())


def _unpack(payload):
    message = serialization.msgpack_restore(payload)
    if not isinstance(message, dict) or not all(isinstance(name, str) for name in message):
        raise ValueError("a message must be a dict by names.")
    return message
