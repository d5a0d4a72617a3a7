"""The quantisers and decoders in the library of ik_llama.cpp (package ik-llama-cpp-python)."""

import ctypes
import functools
import importlib.util
import pathlib

import numpy as np
import pytest

from checkpoints_tools import ggml_types
from mla_jax.quant import FORMATS


class _Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def load() -> ctypes.CDLL:
    """Returns the library, with its table of float16 numbers made; skips the test without the package."""
    spec = importlib.util.find_spec("ik_llama_cpp")
    if spec is None:
        pytest.skip("needs ik_llama.cpp: pip install '.[peers]'")
    library = ctypes.CDLL(str(next((pathlib.Path(spec.origin).parent / "lib").glob("libggml*"))))
    library.ggml_init.argtypes, library.ggml_init.restype = [_Parameters], ctypes.c_void_p
    library.ggml_free.argtypes, library.ggml_free.restype = [ctypes.c_void_p], None
    library.ggml_free(library.ggml_init(_Parameters(1 << 16, None, True)))
    return library


def quantise(name, values):
    """Returns what the library makes of float32[rows, size], all weights being of equal importance.

    Returns:
      blocks uint8[rows, n, block_bytes] and headers uint8[rows, header_bytes].
    """
    rows, size = values.shape
    fmt, kind = FORMATS[name], ggml_types.TYPES[FORMATS[name].ggml_type]
    load().ggml_quantize_init(fmt.ggml_type)
    stored = np.zeros((rows, kind.row_bytes(size)), np.uint8)
    importance = np.ones(size, np.float32)
    function = getattr(load(), f"quantize_{name}")
    function.restype = ctypes.c_size_t
    counts = ctypes.c_int64(rows), ctypes.c_int64(size)
    assert function(_pointer(values), _pointer(stored), *counts, _pointer(importance), None) == stored.size
    header, blocks = np.split(stored, [fmt.header_bytes], axis=1)
    return blocks.reshape(rows, -1, fmt.block_bytes), header


def dequantise_row(name, stored, size):
    """Returns what the library makes of the bytes of a row, uint8[bytes] -> float32[size]."""
    function = getattr(load(), f"dequantize_row_{name}")
    function.restype = None
    values = np.zeros(size, np.float32)
    function(_pointer(np.ascontiguousarray(stored)), _pointer(values), ctypes.c_int64(size))
    return values


def _pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)
