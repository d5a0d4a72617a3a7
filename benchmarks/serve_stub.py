"""A server that draws nothing: it sends as many events as tokens are asked for, at once or at a pace.

Run as a script it prints its port. What a client takes from it is what that client can take at all.
"""

import http.server
import json
import threading
import time


class Stub(http.server.ThreadingHTTPServer):
    """Listens at a free port of this machine.

    Attributes:
      first_seconds: before the first event of each answer.
      seconds: between two events of an answer.
      most: answers that were under way at a time.
      total: answers that have begun.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, first_seconds: float = 0.0, seconds: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.first_seconds, self.seconds, self.most = first_seconds, seconds, 0
        self.lock, self.now, self.total = threading.Lock(), 0, 0

    def count(self, change: int) -> None:
        """Counts an answer that begins or ends."""
        with self.lock:
            self.now, self.total = self.now + change, self.total + max(change, 0)
            self.most = max(self.most, self.now)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """Streams an answer, or refuses an empty prompt."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.close_connection = True
        if not body["prompt"]:
            self.send_error(400, "prompt must hold at least one token")
            return
        self.server.count(1)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        time.sleep(self.server.first_seconds)
        num_tokens = body["max_tokens"]
        for index in range(num_tokens):
            if index:
                time.sleep(self.server.seconds)
            reason = "length" if index == num_tokens - 1 else None
            self._send(dict(choices=[dict(index=0, text=f" {index}", finish_reason=reason)]))
        self._send(dict(choices=[], usage=dict(completion_tokens=num_tokens)))
        self.server.count(-1)
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, value):
        data = f"data: {json.dumps(value)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *_):
        """Keeps quiet."""


if __name__ == "__main__":
    with Stub() as stub:
        print(stub.server_address[1], flush=True)
        stub.serve_forever()
