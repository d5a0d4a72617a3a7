"""Servers in processes of their own: this project's, another that takes the same requests, and a stub."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from benchmarks import serve_stub

_START_SECONDS = 900  # compiling included
_LOG_TAIL = 4000
_TICKS = os.sysconf("SC_CLK_TCK")
_ROOT = pathlib.Path(__file__).resolve().parent.parent


class Server:
    """A server at a port of this machine that is up.

    Attributes:
      name: of the engine.
      host: where it listens.
      port: where it listens.
      start_seconds: from the start of the process until it was healthy, None if it ran before.
    """

    def __init__(
        self, name: str, host: str, port: int, command: Sequence[str] | None = None, folder: str | None = None
    ):
        """Waits until the server is up.

        Args:
          name: of the engine.
          host: where it listens.
          port: where it listens.
          command: starts it; None if it runs already.
          folder: that it is started in, which some write logs to.

        Raises:
          RuntimeError: if it ends, or is not healthy in time; its log is in the message.
        """
        self.name, self.host, self.port, self.start_seconds = name, host, port, None
        self._log = tempfile.TemporaryFile()
        self._child, began = None, time.monotonic()
        if command is not None:
            self._child = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            self._wait(began + _START_SECONDS)
        except BaseException:
            self.close()
            raise
        if command is not None:
            self.start_seconds = time.monotonic() - began

    def get(self, path: str) -> bytes:
        """Returns the body of a `GET`. Raises OSError if there is none."""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def check(self) -> None:
        """Raises RuntimeError with the end of its log if its process has ended."""
        if self._child is not None and self._child.poll() is not None:
            raise RuntimeError(f"{self.name} ends with {self._child.returncode}:\n{self._tail()}")

    def cpu_seconds(self) -> float | None:
        """Returns what its process has taken of all cores so far, None if it is not known."""
        if self._child is None:
            return None
        fields = pathlib.Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def num_compiled(self) -> int | None:
        """Returns how many programs it has compiled so far, None if it does not say."""
        try:
            lines = self.get("/metrics").decode().splitlines()
        except OSError:
            return None
        found = [line for line in lines if line.startswith("mla_jax_compiles_total")]
        return round(float(found[0].split()[1])) if found else None

    def close(self) -> None:
        """Ends the process, if it is ours."""
        if self._child is not None:
            self._child.terminate()
            try:
                self._child.wait(60)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _wait(self, deadline):
        while True:
            try:
                self.get("/health")
                return
            except (urllib.error.URLError, ConnectionError) as error:
                reason = error
            self.check()
            if self._child is None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} must be healthy, got {reason}.\n{self._tail()}")
            time.sleep(0.2)

    def _tail(self):
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-_LOG_TAIL:]


def ours(name: str, model: str, *, slots: int, ctx_size: int, more: Sequence[str]) -> Server:
    """Starts `mla-jax serve` on a file, with further flags `more`."""
    port = _free_port()
    command = [sys.executable, "-m", "mla_jax", "serve", *_common(model, slots, ctx_size, port), *more]
    return Server(name, "127.0.0.1", port, command, str(_ROOT))


def peer(name: str, program: str, model: str, *, slots: int, ctx_size: int, more: Sequence[str]) -> Server:
    """Starts a `llama-server` on a file, a thread per core of this process, with further flags `more`."""
    port, threads = _free_port(), str(len(os.sched_getaffinity(0)))
    command = [
        os.path.abspath(shutil.which(program)),
        *_common(model, slots, ctx_size, port),
        "-t",
        threads,
        *more,
    ]
    return Server(name, "127.0.0.1", port, command, tempfile.gettempdir())


def stub() -> tuple[subprocess.Popen, int]:
    """Starts `serve_stub` and returns its process and port."""
    child = subprocess.Popen([sys.executable, serve_stub.__file__], stdout=subprocess.PIPE, text=True)
    return child, int(child.stdout.readline())


def _common(model, slots, ctx_size, port):
    sizes = ["-np", str(slots), "-c", str(ctx_size)]
    return ["-m", str(pathlib.Path(model).resolve()), *sizes, "--host", "127.0.0.1", "--port", str(port)]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
