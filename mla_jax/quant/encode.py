"""Writes weights in the types of a GGUF file, when a model is exported or requantised."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import ml_dtypes
import numpy as np

from mla_jax.quant import encode_iq4, encode_k, encode_legacy
from mla_jax.quant.formats import FORMATS
from mla_jax.quant.tensor import QuantizedTensor

_CHUNK = 1 << 18  # weights at a time: 1 MiB of float32, so that a search over scales stays in the cache
_LARGEST = 2.0**32  # no float16 scale reaches further, and its square times itself is finite in float32

_PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Encodes blocks: float32[n, block_size], and importance of that shape or None, to uint8[n, bytes]."""

    function: Callable
    halves: tuple[int, ...]  # where a block has float16 scales, which may overflow


_ENCODERS: dict[str, _Encoder] = {
    name: _Encoder(jax.jit(function), halves)
    for name, function, halves in (
        ("q8_0", encode_legacy.encode_q8_0, (0,)),
        ("q4_0", encode_legacy.encode_q4_0, (0,)),
        ("q4_1", encode_legacy.encode_q4_1, (0, 2)),
        ("q5_0", encode_legacy.encode_q5_0, (0,)),
        ("q5_1", encode_legacy.encode_q5_1, (0, 2)),
        ("q6_0", encode_legacy.encode_q6_0, (0,)),
        ("iq4_nl", encode_legacy.encode_iq4_nl, (0,)),
        ("q2_K", encode_k.encode_q2_k, (80, 82)),
        ("q3_K", encode_k.encode_q3_k, (108,)),
        ("q4_K", encode_k.encode_q4_k, (0, 2)),
        ("q5_K", encode_k.encode_q5_k, (0, 2)),
        ("q6_K", encode_k.encode_q6_k, (208,)),
        ("iq4_xs", encode_iq4.encode_iq4_xs, (0,)),
    )
}
_fit_iq4_ks, _encode_iq4_ks = jax.jit(encode_iq4.fit_iq4_ks), jax.jit(encode_iq4.encode_iq4_ks)

ENCODABLE = (*_PLAIN, *_ENCODERS, "iq4_ks")  # names of the types that `encode` writes


def encode(
    array: np.ndarray | jax.Array, name: str, importance: np.ndarray | jax.Array | None = None
) -> np.ndarray | QuantizedTensor:
    """Converts a weight to a GGUF type.

    Args:
      array: float32[..., size], finite; size is a multiple of the type's block. Numbers below 2**-126 may
        count as zeros.
      name: one of `ENCODABLE`.
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
    split = lambda rows: rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size)
    weights = None if importance is None else _broadcast(importance, values.shape)
    arrays = split(values), None if weights is None else split(weights)
    if name == "iq4_ks":
        return _encode_iq4_ks_rows(*arrays)
    encoder = _ENCODERS[name]
    blocks = _in_chunks(encoder.function, arrays, name, _LARGEST)
    for start in encoder.halves:
        _check_finite(blocks[..., start : start + 2].copy().view("<f2"), name)
    return QuantizedTensor(blocks=blocks, format=name)


def _encode_iq4_ks_rows(values: np.ndarray, weights: np.ndarray | None) -> QuantizedTensor:
    scale = _in_chunks(_fit_iq4_ks, (values, weights), "iq4_ks")
    row_scale = np.abs(scale).max(axis=(-2, -1), initial=0.0) / np.float32(encode_iq4.HIGHEST_SCALE)
    shape = (*values.shape[:-1], 1)
    each = np.broadcast_to(row_scale[..., None, None], shape)
    blocks = _in_chunks(_encode_iq4_ks, (values, weights, scale, each), "iq4_ks")
    return QuantizedTensor(
        blocks=blocks, header=row_scale[..., None].astype("<f4").view(np.uint8), format="iq4_ks"
    )


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


def _in_chunks(
    function: Callable, arrays: Sequence[np.ndarray | None], name: str, largest: float = np.inf
) -> np.ndarray:
    """Applies a compiled function to blocks, always as many at once, so that it is compiled once.

    Args:
      function: from [n, ...] of each array to [n, k].
      arrays: [..., size], [..., m] or None: weights, which are checked, and what belongs to each block.
      name: type, for the message.
      largest: what no weight may be beyond.

    Returns:
      [..., k]
    """
    lead, size = arrays[0].shape[:-1], arrays[0].shape[-1]
    count, step = math.prod(lead), _CHUNK // size
    shape = jax.eval_shape(
        function, *(None if a is None else jax.ShapeDtypeStruct((1, a.shape[-1]), a.dtype) for a in arrays)
    )
    done = np.empty((count, shape.shape[-1]), shape.dtype)
    for start in range(0, count, step):
        # The last chunk ends in copies of its last block.
        index = np.unravel_index(np.minimum(np.arange(start, start + step), count - 1), lead)
        parts = [None if array is None else array[index] for array in arrays]
        _check_finite(parts[0], name, largest)
        done[start : start + step] = np.asarray(function(*parts))[: count - start]
    return done.reshape(*lead, done.shape[-1])


def _check_finite(values: np.ndarray, name: str, largest: float = np.inf) -> None:
    if not (np.isfinite(values).all() and (np.abs(values) <= largest).all()):
        raise ValueError(f"every value must be finite in {name}, got one that is not.")
