"""Cache types code for code against ggml's own quantisers, and a quantised cache against ik_llama.cpp's."""

import ctypes
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
import ik
from closeness import Closeness, network_logits
from speaking import write_speaking

import checkpoints_tools
from mla_jax import RunConfig
from mla_jax.cache import codec

pytestmark = pytest.mark.peer

BLOCK_BYTES = dict(q8_0=34, q6_0=26, q5_1=24, q5_0=22, q4_1=20, q4_0=18, iq4_nl=18)
ROWS, WIDTH = 640, 576


@pytest.fixture(scope="module")
def ggml():
    folder = pathlib.Path(importlib.util.find_spec("ik_llama_cpp").origin).parent / "lib"
    return ctypes.CDLL(str(next(folder.glob("libggml*"))))


@pytest.fixture(scope="module")
def numbers():
    """Blocks of very different size and shape, as no cache holds them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, WIDTH)) * np.exp(rng.standard_normal((ROWS, WIDTH)))
    return x.astype(np.float32)


def _quantise(ggml, name, x, num_bytes):
    out = np.zeros(num_bytes, np.uint8)
    function = getattr(ggml, f"quantize_row_{name}")
    function.restype = None
    x = np.ascontiguousarray(x)
    function(x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.size))
    return out


def _take_apart(name, blocks):
    """Returns codes int[blocks, 32], and scale and offset (or None) float16[blocks], of ggml's blocks."""
    scale = blocks[:, :2].copy().view(np.float16)[:, 0]
    offset = blocks[:, 2:4].copy().view(np.float16)[:, 0] if name in ("q4_1", "q5_1") else None
    if name == "q8_0":
        return blocks[:, 2:].view(np.int8).astype(int), scale, offset
    nibbles = blocks[:, -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(int)
    place = np.arange(32)
    if name in ("q5_0", "q5_1"):
        high = blocks[:, -20:-16].copy().view("<u4")
        codes |= ((high >> place.astype(np.uint32)) & 1).astype(int) << 4
    if name == "q6_0":
        m, h = place % 16, place // 16
        codes |= ((blocks[:, 2:10][:, m % 8] >> (4 * (m // 8) + 2 * h)) & 3).astype(int) << 4
    return codes, scale, offset


def _ours(name, x):
    """Returns the same of this project, by way of what the codes decode to with a scale of 1."""
    stored = jax.jit(codec.encode, static_argnums=1)(jnp.asarray(x), name)
    kind = codec.BLOCK_TYPES[name]
    ones = codec.Codes(
        low=stored.low, high=stored.high, scale=jnp.ones_like(stored.scale), offset=None, type=name
    )
    levels = np.asarray(codec.decode(ones))
    if name == "iq4_nl":
        codes = np.searchsorted(kind.levels, levels)
    else:
        codes = levels.astype(int) + kind.levels
    return codes, stored


@pytest.mark.parametrize("name", BLOCK_BYTES)
def test_codes_and_scales_are_those_of_ggml(name, ggml, numbers):
    blocks = _quantise(ggml, name, numbers, numbers.size // 32 * BLOCK_BYTES[name])
    codes, scale, offset = _take_apart(name, blocks.reshape(-1, BLOCK_BYTES[name]))
    found, stored = _ours(name, numbers)
    np.testing.assert_array_equal(found.reshape(-1, 32), codes)
    # a refitted scale is a quotient of sums; summed in another order it may round to the next float16
    differ = np.asarray(stored.scale).reshape(-1) != scale
    assert differ.mean() < (5e-4 if name in ("q4_0", "q6_0", "iq4_nl") else 1e-9)
    np.testing.assert_allclose(
        np.asarray(stored.scale, np.float32).reshape(-1), scale.astype(np.float32), 1e-3
    )
    assert (offset is None) == (stored.offset is None)
    if offset is not None:
        np.testing.assert_array_equal(np.asarray(stored.offset).reshape(-1), offset)


def test_q8_kv_is_that_of_ggml(ggml, numbers):
    found, stored = _ours("q8_KV", numbers)
    rows = np.stack([_quantise(ggml, "q8_KV", row, WIDTH + 8) for row in numbers])
    np.testing.assert_array_equal(found, rows[:, 8:].view(np.int8))
    np.testing.assert_array_equal(np.asarray(stored.scale)[:, 0], rows[:, :4].copy().view(np.float32)[:, 0])


@pytest.mark.parametrize("mla", [1, 3])
@pytest.mark.parametrize("name", ["q8_0", "q6_0", "q4_0", "iq4_nl"])
def test_a_quantised_cache_is_as_close_as_the_peer_is_to_itself(name, mla, tmp_path):
    path, vocab = tmp_path / "model.gguf", 320
    write_speaking(path, vocab=vocab, gating="sigmoid", scale=2.5, experts=16, used=6)
    tokens = np.random.default_rng(0).integers(3, vocab, 512)
    ours = network_logits(checkpoints_tools.load_gguf(path), tokens, RunConfig(mla=mla, cache_type=name))
    try:
        theirs = ik.logits(path, tokens, mla=mla, cache_type=name)
    except RuntimeError:
        pytest.skip(f"the peer itself ends with a cache of {name} and mla {mla}")
    if np.isnan(theirs).any():
        pytest.skip(f"the peer itself gives NaN with a cache of {name} and mla {mla}")
    own = Closeness.of(ik.logits(path, tokens, mla=mla), theirs)
    found = Closeness.of(theirs, ours)
    print(f"{name} mla {mla}: {found}; the peer's {name} to its own f16 {own}")
    assert found.kl < max(1e-3, 2 * own.kl)
