"""The processes of a run find each other, and see that they were started alike.

Process 0 listens at the address that all were given. Each other one says there which it is and what it runs,
and waits until all have come. It learns a token, by which its further connections are known. With a key, that
all were given as well, greetings are sealed; without, whoever reaches the address can join or end the run.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from mla_jax.serve.hosts import line as line_lib
from mla_jax.serve.hosts import relay
from mla_jax.serve.hosts.line import Line

_GREETING = "mla-jax hosts 1"
_GREETING_BYTES = 1 << 16
_SEAL_BYTES = 32  # before a greeting, if there is a key
_GREETING_SECONDS = 10.0  # that a stranger may take to say who it is
_MAX_STRANGERS = 64  # at a time
_GRACE_SECONDS = 3.0  # for process 0 to say who did not come
_PAUSE = 0.2  # seconds between two tries to connect
_HAS_BEGUN = "the run has begun without this process."


class NotGathered(ValueError):
    """The processes of a run did not come together; the message is one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Which process this is, of how many, and where process 0 listens.

    Attributes:
      host: name or address of the machine of process 0.
      port: that it listens at.
      num_processes: of the run.
      process_id: of this one, from 0 on.
    """

    host: str
    port: int
    num_processes: int
    process_id: int

    @property
    def address(self) -> str:
        """Host and port as they are written."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def name(self, process_id: int | None = None) -> str:
        """Returns "process 1 of 4"; without an id, that of this process."""
        return f"process {self.process_id if process_id is None else process_id} of {self.num_processes}"


@dataclasses.dataclass(frozen=True)
class Gathered:
    """All have come.

    Attributes:
      lines: to each other process in process 0, in order, and to process 0 in the others; not started yet.
      coordinator: address in this machine at which JAX's service is, or is led to.
    """

    lines: tuple[Line, ...]
    coordinator: str


def gather(place: Place, about: Mapping[str, str], seconds: float, *, key: bytes = b"") -> Gathered:
    """Waits in process 0 for all others; who comes later is sent away.

    Args:
      place: of this process.
      about: what must be the same in all, by its name in a sentence.
      seconds: that the others may take.
      key: a secret of all processes, which seals their greetings (HMAC-SHA256); empty for none. It is not
        sent, but who can read the connections can repeat what was sealed.

    Raises:
      NotGathered: for an address that cannot be listened at, processes that do not come, or one that was
        started differently, to all that came.
    """
    _check_host(place)
    service_port = relay.free_port()
    door = _Door(_listen(place), service_port, key)
    try:
        came = _await(door.arrivals, place, about, seconds, key)
    except NotGathered as error:
        door.close()
        door.refuse_more(str(error))
        raise
    door.refuse_more(_HAS_BEGUN)
    for connection in came.values():
        with contextlib.suppress(OSError):  # whoever is gone by now is missed on its line
            _say(connection, key, token=door.token)
    lines = tuple(Line(connection, process_id) for process_id, connection in sorted(came.items()))
    return Gathered(lines, f"127.0.0.1:{service_port}")


def come(place: Place, about: Mapping[str, str], seconds: float, *, key: bytes = b"") -> Gathered:
    """Goes to process 0 and waits until all have come; arguments as for `gather`.

    Raises:
      NotGathered: if process 0 is not there in time, or refuses this process or another.
    """
    _check_host(place)
    connection, answer = _ask(place, about, seconds, key)
    if "token" not in answer:
        connection.close()
        raise NotGathered(line_lib.printable(answer.get("refused")))

    def connect():
        further = socket.create_connection((place.host, place.port))
        _say(further, key, token=answer["token"])
        return further

    return Gathered((Line(connection, 0),), f"127.0.0.1:{relay.listen(connect)}")


def join_jax(place: Place, coordinator: str, seconds: int) -> None:
    """Joins JAX's own run, before anything else is asked of JAX.

    Args:
      place: of this process.
      coordinator: of `Gathered`.
      seconds: that it may take. JAX then ends the process with a report of its own.
    """
    jax.config.update("jax_enable_preemption_service", False)  # which would take SIGTERM away from Python
    jax.distributed.initialize(
        coordinator,
        place.num_processes,
        place.process_id,
        cluster_detection_method="deactivate",
        coordinator_bind_address=coordinator,
        initialization_timeout=seconds,
    )


def _check_host(place):
    try:
        place.host.encode("idna")
    except UnicodeError:
        raise NotGathered(
            f"--coordinator must have a host whose parts between dots have 1 to 63 characters, got "
            f"{place.address!r:.80}."
        ) from None


def _listen(place):
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        family, _, _, _, (host, *_) = found[0]
        if ipaddress.ip_address(host).is_loopback and not _is_loopback(place.host):
            host, family = "", socket.AF_INET  # systems that know their own name by such an address alone
        return socket.create_server((host, place.port), family=family, backlog=_MAX_STRANGERS)
    except OSError as error:
        raise NotGathered(
            f"--coordinator must be an address of the machine of process 0, and free, got {place.address}: "
            f"{error.strerror}."
        ) from None


def _is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Door:
    """What process 0 does with those who connect.

    Whoever does not greet as a process of a run does, sealed with the key if there is one, hears no word.

    Attributes:
      arrivals: connections of other processes, and what they said.
      token: by which their further connections are known, which are led to JAX's service.
    """

    def __init__(self, server, service_port, key):
        self.arrivals: queue.SimpleQueue[tuple[socket.socket, dict]] = queue.SimpleQueue()
        self.token = secrets.token_hex()
        self._server, self._service_port, self._key = server, service_port, key
        self._arriving, self._refusal = threading.Lock(), None
        self._strangers = threading.Semaphore(_MAX_STRANGERS)
        threading.Thread(target=self._open, name="door", daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def refuse_more(self, reason):
        """Sends away whoever has arrived and is not waited for any more, and all who come later."""
        with self._arriving:
            self._refusal = reason
        with contextlib.suppress(queue.Empty):
            while True:
                _refuse([self.arrivals.get_nowait()[0]], reason, self._key)

    def _arrive(self, connection, greeting):
        with self._arriving:
            if self._refusal is None:
                self.arrivals.put((connection, greeting))
                return
        _refuse([connection], self._refusal, self._key)

    def _open(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                if self._strangers.acquire(blocking=False):
                    threading.Thread(target=self._let_in, args=(connection,), daemon=True).start()
                else:
                    connection.close()

    def _let_in(self, connection):
        try:
            connection.settimeout(_GREETING_SECONDS)
            greeting = _heard(connection, self._key)
            connection.settimeout(None)
        except (OSError, ValueError):
            connection.close()
            return
        finally:
            self._strangers.release()
        if _is_of_process(greeting):
            self._arrive(connection, greeting)
        elif hmac.compare_digest(str(greeting.get("token")).encode(), self.token.encode()):
            with connection, contextlib.suppress(OSError):
                relay.join(connection, relay.reach(self._service_port))
        else:
            connection.close()


def _is_of_process(greeting):
    process_id, about = greeting.get("process"), greeting.get("about")
    is_plain = isinstance(about, dict) and all(isinstance(value, str) for value in about.values())
    return type(process_id) is int and is_plain


def _await(arrivals, place, about, seconds, key):
    """Returns the connection of each other process by its id; all are closed if they do not come together."""
    deadline, came = time.monotonic() + seconds, {}
    while missing := set(range(1, place.num_processes)) - set(came):
        try:
            connection, greeting = arrivals.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            names = ", ".join(map(str, sorted(missing)))
            reason = (
                f"all {place.num_processes} processes must come to {place.address} within {seconds:g} "
                f"seconds, but these did not: {names}."
            )
            _refuse(came.values(), reason, key)
            raise NotGathered(reason) from None
        process_id, difference = greeting["process"], _difference(greeting, about)
        if not 0 < process_id < place.num_processes:  # none of the run, which goes on without it
            reason = f"--process-id must be in [1, {place.num_processes}) beside process 0, got another."
            _refuse([connection], difference or reason, key)
            continue
        if reason := difference or _taken(process_id, came):
            _refuse([connection, *came.values()], reason, key)
            raise NotGathered(reason)
        came[process_id] = connection
    return came


def _ask(place, about, seconds, key):
    """Returns a connection to process 0, and its answer once all have come."""
    deadline = time.monotonic() + seconds
    while True:
        connection = None
        try:
            connection = socket.create_connection((place.host, place.port), timeout=_GREETING_SECONDS)
            connection.settimeout(max(deadline - time.monotonic(), 0) + _GRACE_SECONDS)
            _say(connection, key, process=place.process_id, about=dict(about))
            return connection, _heard(connection, key)
        except (OSError, ValueError) as error:
            if connection is not None:
                connection.close()
            if time.monotonic() > deadline:
                reason = str(error).rstrip(".")
                if connection is not None:
                    reason = "what is there gave no answer, as it does to who has another MLA_JOIN_KEY"
                raise NotGathered(
                    f"process 0 must be at {place.address} within {seconds:g} seconds, and was not: {reason}."
                ) from None
        time.sleep(_PAUSE)


def _difference(greeting, about):
    for name, own in about.items():
        if (theirs := greeting["about"].get(name)) != own:
            return (
                f"{name} must be the same in all processes, but process {greeting['process']} has "
                f"{theirs!r:.80} and process 0 has {own!r:.80}."
            )
    return None


def _taken(process_id, came):
    """Returns why a process cannot be that one of the run, None if it can."""
    if process_id in came and not _has_left(came[process_id]):
        return f"--process-id must be another one in each process, but two came with {process_id}."
    if process_id in came:  # and comes anew
        came[process_id].close()
    return None


def _has_left(connection):
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


def _refuse(connections, reason, key):
    for connection in connections:
        with connection, contextlib.suppress(OSError):
            _say(connection, key, refused=reason)


def _say(connection, key, **words: Any):
    text = json.dumps({"greeting": _GREETING} | words).encode()
    line_lib.send(connection, _seal(text, key) + text)


def _seal(text, key):
    return hmac.digest(key, text, hashlib.sha256) if key else b""


def _heard(connection, key) -> dict[str, Any]:
    payload = line_lib.receive(connection, _GREETING_BYTES)
    size = _SEAL_BYTES if key else 0
    if not hmac.compare_digest(payload[:size], _seal(payload[size:], key)):
        raise ValueError("what answers there has another key")
    try:
        words = json.loads(payload[size:])
    except RecursionError:
        words = None
    if not isinstance(words, dict) or words.get("greeting") != _GREETING:
        raise ValueError("what answers there is no process of this program")
    return words
