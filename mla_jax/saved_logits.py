"""Probabilities of every token at every place of a text, in the file that llama-perplexity keeps them in.

Another model, or the same one run in another way, is compared with such a base (`divergence.measure_saved`);
files written by llama.cpp are read, and what is written here it reads. Numbers are little-endian:

    "_logits_"  T i32  W i32  N i32                       tokens of a window, of the vocabulary; windows
    tokens i32[N, T]
    N * (T - 1 - T // 2) rows, one for each predicted token:
        scale f32  lowest f32  codes u16[W]  nothing u16[W % 2]

The logarithm of a probability is `scale * code + lowest`. Codes end 24 below the likeliest token: what is
less likely has code 0.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import folders

_MAGIC = b"_logits_"
_HEADER = np.dtype([("magic", "S8"), ("window", "<i4"), ("vocab_size", "<i4"), ("num_windows", "<i4")])
_DEPTH = 24.0  # nats below the likeliest token that codes reach
_MOST = 65535.0
_SLACK = 1e-3  # of float32 in a depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedLogits:
    """A file of saved logits, its header read.

    Attributes:
      path: the file.
      vocab_size: W.
      windows: i32[N, T].
    """

    path: pathlib.Path
    vocab_size: int
    windows: np.ndarray

    @classmethod
    def open(cls, path: str | os.PathLike) -> "SavedLogits":
        """Reads what a file begins with.

        Raises:
          ValueError: if it is no such file, or not a whole one.
          OSError: if it cannot be read.
        """
        path = pathlib.Path(path)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block
            raise ValueError(f"{path} must be a regular file.")
        with path.open("rb") as file:
            header = np.fromfile(file, _HEADER, 1)
            if not header.size or header["magic"][0] != _MAGIC:
                raise ValueError(f"{path} must be a file of saved logits, which begins with {_MAGIC!r}.")
            window, vocab_size, count = (int(header[name][0]) for name in _HEADER.names[1:])
            if min(window - 2, vocab_size, count) < 1:
                sizes = f"{count} windows of {window} tokens and {vocab_size} tokens of a vocabulary"
                raise ValueError(f"{path} must tell sizes that there can be, got {sizes}.")
            wanted = _HEADER.itemsize + count * (4 * window + _rows(window) * _row_bytes(vocab_size))
            if status.st_size != wanted:
                raise ValueError(
                    f"{path} must have the {wanted} bytes that its sizes need, got {status.st_size}."
                )
            windows = np.fromfile(file, "<i4", count * window).reshape(count, window).astype(np.int32)
        if windows.min() < 0 or windows.max() >= vocab_size:
            raise ValueError(f"{path}: token ids must be in [0, {vocab_size}), got others; it is damaged.")
        return cls(path=path, vocab_size=vocab_size, windows=windows)

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields of each window scale f32[n], lowest f32[n] and codes u16[n, W] of its n predicted tokens.

        Raises:
          ValueError: if the file was cut off meanwhile.
        """
        size, width = _rows(self.windows.shape[1]), _row_bytes(self.vocab_size) // 2
        with self.path.open("rb") as file:
            file.seek(_HEADER.itemsize + 4 * self.windows.size)
            for _ in self.windows:
                words = np.fromfile(file, "<u2", size * width)
                if words.size != size * width:
                    raise ValueError(f"{self.path} must stay whole while it is read.")
                words = words.reshape(size, width)
                scale, lowest = np.ascontiguousarray(words[:, :4]).view("<f4").T
                yield scale, lowest, words[:, 4 : 4 + self.vocab_size]


@contextlib.contextmanager
def writing(
    path: str | os.PathLike, windows: np.ndarray, vocab_size: int
) -> Iterator[Callable[[np.ndarray, np.ndarray, np.ndarray], None]]:
    """Writes a file of saved logits; it is there, whole, once all has gone well.

    Args:
      path: the file, replaced if it exists.
      windows: i32[N, T].
      vocab_size: W.

    Yields:
      A function to be called for each window in order, with what `encode` returned.

    Raises:
      OSError: if the file cannot be written.
    """
    count, size = windows.shape
    header = np.array([(_MAGIC, size, vocab_size, count)], _HEADER)
    with folders.beside(path) as temporary:
        unfinished = os.path.join(temporary, "unfinished")
        with open(unfinished, "wb") as file:
            file.write(header.tobytes() + windows.astype("<i4").tobytes())

            def write(scale, lowest, codes):
                words = np.zeros((_rows(size), _row_bytes(vocab_size) // 2), "<u2")
                words[:, :4] = np.stack([scale, lowest], axis=1).astype("<f4").view("<u2")
                words[:, 4 : 4 + vocab_size] = codes
                file.write(words)

            yield write
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def encode(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns scale f32[n], lowest f32[n] and codes u16[n, W] of logits f32[n, W]."""
    top_n1 = logits.max(axis=-1, keepdims=True)
    bottom_n1 = jnp.maximum(logits.min(axis=-1, keepdims=True), top_n1 - _DEPTH)
    scale_n1 = (top_n1 - bottom_n1) / _MOST
    steps = jnp.round((logits - bottom_n1) / jnp.where(scale_n1 > 0, scale_n1, 1.0))
    codes = jnp.clip(steps, 0.0, _MOST).astype(jnp.uint16)
    lowest_n1 = bottom_n1 - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return scale_n1[:, 0], lowest_n1[:, 0], codes


def decode(scale: jax.Array, lowest: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `encode` made of logits, in log-probabilities that sum to 1 again.

    Else what rounding did to their sum would count as a distance, and be larger than that to a good cache.

    Returns:
      f32[n, W] log-probabilities; bool[n, W] false for code 0 of a row as deep as codes reach, which says no
      more than that the token is unlikely, and does not count to the sum; f32[n] the sums that were found,
      near 1 in a sound file.
    """
    is_told = (codes > 0) | (scale * _MOST < _DEPTH - _SLACK)[:, None]
    values = scale[:, None] * codes.astype(jnp.float32) + lowest[:, None]
    total = jax.nn.logsumexp(values, axis=-1, where=is_told)
    return values - total[:, None], is_told, jnp.exp(total)


def _rows(window):
    return window - 1 - window // 2


def _row_bytes(vocab_size):
    return 8 + 2 * (vocab_size + vocab_size % 2)
