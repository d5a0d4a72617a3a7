"""Writes weights in the types of a GGUF file, when a model is exported or requantised."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np

from mla_jax.quant import encode_legacy
from mla_jax.quant.formats import FORMATS
from mla_jax.quant.tensor import QuantizedTensor

_CHUNK = 1 << 18  # weights at a time: 1 MiB of float32, so that a search over scales stays in the cache

_PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

# Each takes float32[n, block_size] and importance of that shape or None, and returns uint8[n, block_bytes].
_ENCODERS: dict[str, Callable] = {"q8_0": encode_legacy.encode_q8_0}

ENCODABLE = (*_PLAIN, *_ENCODERS)  # names of the types that `encode` writes

_HALVES = {"q8_0": (0,)}  # where a block has float16 scales, which may overflow


def encode(
    array: np.ndarray | jax.Array, name: str, importance: np.ndarray | jax.Array | None = None
) -> np.ndarray | QuantizedTensor:
    """Converts a weight to a GGUF type.

    Args:
      array: float32[..., size], finite; size is a multiple of the type's block. Numbers below 2**-126 may
        count as zeros.
      name: "f32", "f16", "bf16", or the name of a block format that has an encoder.
      importance: float32, broadcastable to `array`, not negative: the weight of each squared error. Plain
        types and q8_0 need none and ignore it; None, or zeros alone, count all errors alike.

    Returns:
      float32, float16 or bfloat16[..., size] for plain types, otherwise a `QuantizedTensor` of NumPy arrays.

    Raises:
      ValueError: if the type has no encoder, if rows are no whole number of blocks, if a value is not finite
        in the type, or if the importance does not fit.
    """
    if array.dtype != np.float32:
        raise ValueError(f"array must be float32, got {array.dtype}.")
    if name not in ENCODABLE:
        raise ValueError(f"name must be one of {', '.join(ENCODABLE)}, got {name!r}.")
    values = np.asarray(array)
    if name in _PLAIN:
        with np.errstate(over="ignore"):
            values = values.astype(_PLAIN[name])
        _check_finite(values, name)
        return values
    size = FORMATS[name].block_size
    if values.ndim == 0 or values.shape[-1] % size:
        raise ValueError(f"rows of {name} must be a multiple of {size} long, got {values.shape}.")
    weights = None if importance is None else _broadcast(importance, values.shape)
    blocks = np.empty((*values.shape[:-1], values.shape[-1] // size, FORMATS[name].block_bytes), np.uint8)
    done = blocks.reshape(-1, blocks.shape[-1])
    for part, x, w in _chunks(values, weights, size):
        _check_finite(x, name)
        encoded = np.asarray(_encode_chunk(x, w, name))[: part.stop - part.start]
        for start in _HALVES[name]:
            _check_finite(encoded[:, start : start + 2].copy().view("<f2"), name)
        done[part] = encoded
    return QuantizedTensor(blocks=blocks, format=name)


@functools.partial(jax.jit, static_argnames="name")
def _encode_chunk(x: jax.Array, weights: jax.Array | None, name: str) -> jax.Array:
    return _ENCODERS[name](x, weights)


def _broadcast(importance: np.ndarray | jax.Array, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a view of the importance of each weight; None if none has any."""
    importance = np.asarray(importance)
    if importance.dtype != np.float32:
        raise ValueError(f"importance must be float32, got {importance.dtype}.")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError("importance must be finite and not negative, got a value that is not.")
    try:
        view = np.broadcast_to(importance, shape)
    except ValueError:
        raise ValueError(f"importance must broadcast to {shape}, got {importance.shape}.") from None
    return view if importance.any() else None


def _chunks(
    values: np.ndarray, weights: np.ndarray | None, size: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    """Yields which blocks of how many there are, and float32[chunk, size] of each array, always as many.

    The last chunk ends in copies of its last block, so that one compiled function serves all tensors.
    """
    arrays = [a if a is None else a.reshape(*a.shape[:-1], -1, size) for a in (values, weights)]
    lead = arrays[0].shape[:-1]
    count, step = math.prod(lead), _CHUNK // size
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        index = np.unravel_index(np.minimum(np.arange(start, start + step), count - 1), lead)
        x, w = (a if a is None else a[index] for a in arrays)
        yield part, x, w


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"every value must be finite in {name}, got one that is not.")
