"""Has a server draw texts over HTTP and tells when each part of them came.

Run as a script it reads one JSON request from stdin and writes one JSON answer to stdout, so that it can be a
process of its own. While texts are drawn it does nothing but read sockets and the clock; what was read is
made sense of afterwards.
"""

import dataclasses
import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import h11

_PATIENCE = 600  # seconds without a byte from anyone after which the server is given up
_READ_BYTES = 1 << 16


@dataclasses.dataclass(kw_only=True)
class _Stream:
    """A text while it is drawn: what was read, and when."""

    index: int
    socket: socket.socket
    began: float
    parts: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)


def draw(host: str, port: int, bodies: Sequence[dict], num_streams: int) -> dict:
    """Draws the texts of all `bodies`, `num_streams` at a time; the next begins when one ends.

    Args:
      host: of the server.
      port: of the server.
      bodies: JSON values for `POST /v1/completions`, with `stream` and `stream_options.include_usage`.
      num_streams: connections at a time.

    Returns:
      seconds: from the first connection to the last byte.
      cpu_seconds: of this process meanwhile.
      texts: as the bodies; of each `began` and `times`, when each event with text came, in seconds since the
        first connection; `text`, `finish_reason`, `num_tokens` and `num_cached`, None where it was not said.

    Raises:
      RuntimeError: if the server refuses or breaks off an answer.
      TimeoutError: if nothing comes for ten minutes.
    """
    waiting = iter([(index, _request(host, port, body)) for index, body in enumerate(bodies)])
    done: list[_Stream] = []
    with selectors.DefaultSelector() as selector:
        cpu_began, began = time.process_time(), time.perf_counter()
        for _, (index, request) in zip(range(num_streams), waiting):  # noqa: B905
            _begin(selector, index, (host, port), request)
        while selector.get_map():
            ready = selector.select(_PATIENCE)
            if not ready:
                raise TimeoutError(f"the server must send something within {_PATIENCE} s, got nothing.")
            for key, _ in ready:
                stream = key.data
                data = stream.socket.recv(_READ_BYTES)
                stream.parts.append((time.perf_counter(), data))
                if data:
                    continue
                selector.unregister(stream.socket)
                stream.socket.close()
                done.append(stream)
                if (following := next(waiting, None)) is not None:
                    _begin(selector, following[0], (host, port), following[1])
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    done.sort(key=lambda stream: stream.index)
    texts = [_text(stream.parts, began) | dict(began=stream.began - began) for stream in done]
    return dict(seconds=seconds, cpu_seconds=cpu_seconds, texts=texts)


def _request(host, port, body):
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + data


def _begin(selector, index, address, request):
    began = time.perf_counter()
    connected = socket.create_connection(address, timeout=_PATIENCE)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.sendall(request)
    selector.register(connected, selectors.EVENT_READ, _Stream(index=index, socket=connected, began=began))


def _text(parts, began):
    times, pieces, finish_reason, usage = [], [], None, {}
    for when, event in events(parts):
        if "error" in event:
            raise RuntimeError(f"the server breaks off: {event['error']}")
        for choice in event.get("choices", ()):
            if choice.get("text"):
                times.append(when - began)
                pieces.append(choice["text"])
            finish_reason = choice.get("finish_reason") or finish_reason
        usage = event.get("usage") or usage
    details = usage.get("prompt_tokens_details") or {}
    return dict(
        times=times,
        text="".join(pieces),
        finish_reason=finish_reason,
        num_tokens=usage.get("completion_tokens"),
        num_cached=details.get("cached_tokens"),
    )


def events(parts: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, dict]]:
    """Yields (time, JSON value) of each server-sent event of an answer.

    Args:
      parts: (time, bytes) of each read of a connection; the last has none.

    Raises:
      RuntimeError: if the answer has another status than 200 or is cut short.
    """
    status, text, has_ended = None, b"", False
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "any")]))
    connection.send(h11.EndOfMessage())
    for when, data in parts:
        try:
            connection.receive_data(data)
            while not has_ended and (event := connection.next_event()) is not h11.NEED_DATA:
                status = event.status_code if isinstance(event, h11.Response) else status
                text += event.data if isinstance(event, h11.Data) else b""
                has_ended = isinstance(event, h11.EndOfMessage)
        except h11.RemoteProtocolError as error:
            raise RuntimeError(f"the answer must be whole, got {text[-200:]!r}: {error}.") from None
        while status == 200 and b"\n\n" in text:
            line, _, text = text.partition(b"\n\n")
            payload = line.removeprefix(b"data: ")
            if payload != b"[DONE]":
                yield when, json.loads(payload)
        if has_ended:
            break
    if status != 200:
        raise RuntimeError(f"the server must answer with 200, got {status}: {text[:500]!r}.")


if __name__ == "__main__":
    print(json.dumps(draw(**json.load(sys.stdin))))
