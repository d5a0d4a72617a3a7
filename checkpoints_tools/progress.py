"""One line on stderr that tells how far work on the tensors of a file is."""

import os
import sys
import time
from collections.abc import Callable

Progress = Callable[[int, int, int, int], None]  # tensors done, tensors, bytes done, bytes

_SLOW_SECONDS = 1.0
_SHOWN_SECONDS = 0.1  # between two states of the line


class ProgressLine:
    """Tells on stderr how far work is: on a terminal all along, elsewhere once, if it was slow."""

    def __init__(self, path: str | os.PathLike):
        self.name, self.start, self.shown = os.path.basename(os.fspath(path)), time.monotonic(), 0.0
        self.is_terminal = sys.stderr.isatty()

    def __call__(self, done: int, num_tensors: int, bytes_done: int, num_bytes: int) -> None:
        """Shows a state; the one with everything done is the last, and is to be shown once."""
        now = time.monotonic()
        seconds, is_last = now - self.start, done == num_tensors
        line = (
            f"{self.name}: {done}/{num_tensors} tensors, {bytes_done / 1e9:.2f} of "
            f"{num_bytes / 1e9:.2f} GB, {bytes_done / 1e9 / max(seconds, 1e-9):.2f} GB/s"
        )
        if self.is_terminal and (is_last or now - self.shown > _SHOWN_SECONDS):
            self.shown = now
            print(f"\r{line}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        elif is_last and not self.is_terminal and seconds > _SLOW_SECONDS:
            print(line, file=sys.stderr, flush=True)
