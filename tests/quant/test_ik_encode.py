"""Encoders against the quantisers that ik_llama.cpp's `llama-quantize` calls."""

import ctypes
import pathlib

import ik_library
import jax
import numpy as np
import pytest

import mla_jax
from checkpoints_tools import open_gguf
from mla_jax import quant

pytestmark = pytest.mark.peer

MODEL = pathlib.Path(mla_jax.__file__).parent / "models" / "python-stdlib-15m-q8_0.gguf"
SHAPE = (96, 512)
MAX_RATIO = 1.03  # of the root mean square error to the peer's
NAMES = [name for name in quant.ENCODABLE if name in quant.FORMATS]
WITH_A_RULE = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]


_decode = jax.jit(quant.decode)


def _peer(name, values, importance):
    """Returns what the library makes of float32[rows, size]; `importance` float32[size] may be None."""
    rows, size = values.shape
    fmt = quant.FORMATS[name]
    stored = np.zeros((rows, fmt.header_bytes + size // fmt.block_size * fmt.block_bytes), np.uint8)
    pointer = lambda array: None if array is None else array.ctypes.data_as(ctypes.c_void_p)
    ik_library.load().ggml_quantize_init(fmt.ggml_type)
    function = getattr(ik_library.load(), f"quantize_{name}")
    function.restype = ctypes.c_size_t
    counts = ctypes.c_int64(rows), ctypes.c_int64(size)
    assert function(pointer(values), pointer(stored), *counts, pointer(importance), None) == stored.size
    header, blocks = np.split(stored, [fmt.header_bytes], axis=1)
    blocks = blocks.reshape(rows, -1, fmt.block_bytes)
    return quant.QuantizedTensor(blocks=blocks, header=header if fmt.header_bytes else None, format=name)


def _error(weight, values, importance):
    squares = (np.asarray(_decode(weight), np.float64) - values) ** 2
    return np.sqrt((squares if importance is None else importance * squares).mean())


def _sample(kind):
    rng = np.random.default_rng(0)
    if kind == "normal":
        return rng.standard_normal(SHAPE, dtype=np.float32)
    if kind == "heavy tails":
        return (rng.standard_t(3, SHAPE) * rng.lognormal(0, 1, (SHAPE[0], 1))).astype(np.float32)
    blocks = open_gguf(MODEL).read("blk.3.attn_kv_b.weight").reshape(-1, SHAPE[1] // 32, 34)[: SHAPE[0]]
    values = np.asarray(quant.decode(quant.QuantizedTensor(blocks=blocks, format="q8_0")))
    return values * rng.uniform(0.9, 1.1, SHAPE).astype(np.float32)  # which q8_0 cannot represent


@pytest.mark.parametrize("importance", [False, True], ids=["alike", "importance"])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_no_more_is_lost_than_by_the_peer(name, kind, importance):
    values, given = _sample(kind), None
    if importance:
        rng = np.random.default_rng(1)
        given = (rng.chisquare(1, SHAPE[1]) * rng.lognormal(0, 1, SHAPE[1])).astype(np.float32)
    ours = _error(quant.encode(values, name, given), values, given)
    peers = _error(_peer(name, values, given), values, given)
    print(f"{name}, {kind}: {ours / peers:.3f} of the peer's error")
    assert ours <= MAX_RATIO * peers


@pytest.mark.parametrize("name", WITH_A_RULE)
def test_types_with_a_rule_have_the_bytes_of_the_peer(name):
    values = _sample("heavy tails")
    np.testing.assert_array_equal(quant.encode(values, name).blocks, _peer(name, values, None).blocks)


@pytest.mark.parametrize("name", NAMES)
def test_the_peer_decodes_what_is_decoded_here(name):
    weight = quant.encode(_sample("heavy tails"), name)
    parts = [weight.blocks.reshape(SHAPE[0], -1)]
    parts = parts if weight.header is None else [weight.header, *parts]
    rows = [ik_library.dequantise_row(name, row, SHAPE[1]) for row in np.concatenate(parts, axis=1)]
    np.testing.assert_allclose(np.stack(rows), _decode(weight), rtol=1e-6, atol=1e-6)
