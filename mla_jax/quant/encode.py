"""Writes weights in the types of a GGUF file, on the host, when a model is exported."""

import ml_dtypes
import numpy as np

_Q8_0_BLOCK = 32


def encode(array: np.ndarray, name: str) -> np.ndarray:
    """Converts a weight to a GGUF type.

    Args:
      array: float32[..., size], finite; size is a multiple of 32 for "q8_0".
      name: "f32", "f16", "bf16" or "q8_0".

    Returns:
      float32, float16 or bfloat16[..., size]; for "q8_0" uint8[..., size / 32, 34], the blocks of each row.

    Raises:
      ValueError: if the type has no encoder, if rows are no whole number of blocks, or if a value is not
        finite in the type.
    """
    if array.dtype != np.float32:
        raise ValueError(f"array must be float32, got {array.dtype}.")
    if name == "q8_0":
        return _encode_q8_0(array)
    if name not in _PLAIN:
        raise ValueError(f"name must be one of {', '.join((*_PLAIN, 'q8_0'))}, got {name!r}.")
    with np.errstate(over="ignore"):
        values = array.astype(_PLAIN[name])
    _check_finite(values, name)
    return values


_PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def _encode_q8_0(array: np.ndarray) -> np.ndarray:
    """Encodes rows as Q8_0: a float16 scale, largest magnitude / 127, and 32 signed bytes.

    The codes come from the scale before its rounding to float16, and ties go to the even code.

    Source: the vector forms of `quantize_row_q8_0` in ggml; its portable form rounds ties away from zero.
    """
    if array.ndim == 0 or array.shape[-1] % _Q8_0_BLOCK:
        raise ValueError(f"rows of q8_0 must be a multiple of {_Q8_0_BLOCK} long, got {array.shape}.")
    blocks = array.reshape(*array.shape[:-1], -1, _Q8_0_BLOCK)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        scale = (largest / np.float32(127)).astype("<f2")
    _check_finite(scale, "q8_0")
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / largest
    inverse = np.where(
        np.isfinite(inverse), inverse, np.float32(0)
    )  # rows of zeros, or too small for a scale
    codes = np.rint(blocks * inverse).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=-1)


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"every value must be finite in {name}, got one that is not.")
