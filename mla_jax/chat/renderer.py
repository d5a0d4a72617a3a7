"""A process kept for rendering templates that somebody else wrote, see `sandbox`."""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading

from mla_jax.chat import sandbox

_SECONDS_UPPER = 60  # of wall time: only reached when the machine has no time for the process
_SECONDS_TO_END = 1

_TOLD = ("HOME", "LANG", "PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "TZ", "VIRTUAL_ENV")
_TOLD_BEGINNINGS = ("DYLD_", "LC_", "LD_", "PYTHON")


def environment() -> dict[str, str]:
    """Returns the variables of this process that Python itself needs: of keys others need not know."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper() in _TOLD or name.upper().startswith(_TOLD_BEGINNINGS)
    }


class Renderer:
    """Renders one template at a time in a process that is started at the first, and again when it ended.

    May be called from any thread. A template that exceeds its limits ends the process, and nothing else.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def render(self, request: str) -> str:
        """Returns the prompt.

        Args:
          request: JSON of {"template": jinja2, "variables": {...}}.

        Raises:
          ValueError: the template fails, or exceeds its limits of time and memory.
        """
        with self._lock:
            answer = self._ask(request.encode() + b"\n")
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["prompt"]

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        with self._lock:
            self._end()

    def _ask(self, request):
        if self._process is not None and self._process.poll() is not None:
            self._end()  # it was killed while it waited
        if self._process is None:
            self._start()
        process, line = self._process, b""
        timer = threading.Timer(_SECONDS_UPPER, process.kill)
        timer.start()
        try:
            with contextlib.suppress(OSError):
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
            return json.loads(line)
        except ValueError:
            status = self._end()
        except BaseException:  # as Ctrl-C: what the process writes later must not answer another request
            self._end()
            raise
        finally:
            timer.cancel()
        return {
            "error": f"the chat template must finish within {sandbox.CPU_SECONDS_UPPER} s and "
            f"{sandbox.MEMORY_BYTES_UPPER >> 20} MiB; its process ended with status {status}."
        }

    def _start(self):
        self._process = subprocess.Popen(
            [sys.executable, "-P", sandbox.__file__],  # -P: the package's folder must not come into sys.path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,  # Ctrl-C at a terminal is for this process alone
        )

    def _end(self):
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(OSError):  # what is left in the buffer has no reader
            process.stdin.close()  # which ends it, if it waits
        try:
            status = process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        process.stdout.close()
        return status


SHARED = Renderer()
atexit.register(SHARED.close)
