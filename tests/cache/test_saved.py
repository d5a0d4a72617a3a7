"""A cache that went through a file is the cache, bit for bit; a file that is not sound is refused."""

import dataclasses
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import cache as cache_lib
from mla_jax.cache import init_cache, init_pool, saved
from mla_jax.config import CACHE_TYPES, MLAConfig, ModelConfig, RunConfig

CONFIG = ModelConfig(
    vocab_size=96,
    context_length=512,
    embed_dim=32,
    num_layers=2,
    num_dense_layers=2,
    dense_hidden_dim=48,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=2,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
    ),
    moe=None,
)
TOKENS = list(range(3, 73))  # a page and a bit


def _noise(cache, seed=0):
    """Any bits everywhere that are not those of a NaN."""
    rng = np.random.default_rng(seed)

    def draw(part):
        raw = rng.integers(0, 256, (*part.shape, part.dtype.itemsize), np.uint8)
        values = jnp.asarray(raw.view(part.dtype)[..., 0])
        return jnp.where(values == values, values, jnp.zeros_like(values))

    return dataclasses.replace(cache, layers=jax.tree.map(draw, cache.layers))


def _bytes(part, places):
    return np.asarray(part)[places].tobytes()


def _save(path, run=None, cache=None, tokens=TOKENS, **where):
    run = run or RunConfig(cache_type="q5_1")
    if cache is None:
        cache = _noise(init_cache(CONFIG, run, batch=1, ctx_size=256))
        cache = dataclasses.replace(cache, length=jnp.full((1,), 100, jnp.int32))
    cache_lib.save(path, cache, tokens, model="m", run=run, **where)
    return cache


def _load(path, run=None, model="m", ctx_size=256):
    run = run or RunConfig(cache_type="q5_1")
    empty = init_cache(CONFIG, run, batch=1, ctx_size=ctx_size)
    return cache_lib.load(path, empty, model=model, run=run)


@pytest.mark.parametrize(
    "run",
    [RunConfig(cache_type=name, mla=mode) for mode in (3, 0) for name in CACHE_TYPES],
    ids=lambda run: f"{run.cache_type}-{run.mla}",
)
def test_rows_come_back_bit_for_bit(run, tmp_path):
    kept = _save(tmp_path / "a", run)
    loaded, tokens = _load(tmp_path / "a", run, ctx_size=300)
    assert tokens == TOKENS and int(loaded.length[0]) == len(TOKENS)
    live = (0, slice(0, len(TOKENS)))
    for before, after in zip(jax.tree.leaves(kept.layers), jax.tree.leaves(loaded.layers), strict=True):
        assert _bytes(before, live) == _bytes(after, live)
        assert not np.asarray(after)[0, len(TOKENS) :].any()


def test_a_sequence_moves_between_contiguous_and_paged(tmp_path):
    run, pages = RunConfig(cache_type="q8_0"), np.asarray([5, 2, 7], np.int32)
    pool = _noise(init_pool(CONFIG, run, batch=3, num_pages=8))
    pool = dataclasses.replace(pool, length=jnp.full((3,), 100, jnp.int32))
    _save(tmp_path / "a", run, pool, sequence=1, pages=pages)
    slots = np.arange(len(TOKENS))
    contiguous, _ = _load(tmp_path / "a", run)
    other = _noise(init_pool(CONFIG, run, batch=3, num_pages=8), seed=1)
    moved, _ = cache_lib.load(
        tmp_path / "a", other, model="m", run=run, sequence=2, pages=np.asarray([0, 6, 8], np.int32)
    )
    np.testing.assert_array_equal(moved.length, [0, 0, len(TOKENS)])
    leaves = [jax.tree.leaves(cache.layers) for cache in (pool, contiguous, moved, other)]
    for before, plain, after, untouched in zip(*leaves, strict=True):
        wanted = _bytes(before, (pages[slots // 64], slots % 64))
        assert (
            wanted
            == _bytes(plain, (0, slots))
            == _bytes(after, (np.asarray([0, 6])[slots // 64], slots % 64))
        )
        rest = np.ones((8, 64), bool)
        rest[np.asarray([0, 6])[slots // 64], slots % 64] = False
        assert _bytes(after, rest) == _bytes(untouched, rest)


@pytest.mark.parametrize("pages", [[5], [5, 8], [5, -1]])
def test_pages_must_have_room(pages, tmp_path):
    run = RunConfig(cache_type="q8_0")
    pool = init_pool(CONFIG, run, batch=1, num_pages=8)
    pool = dataclasses.replace(pool, length=jnp.full((1,), 100, jnp.int32))
    words = r"pages must have room for 70 tokens, got \[.*\] of 8"
    with pytest.raises(ValueError, match=words):
        _save(tmp_path / "a", run, pool, pages=np.asarray(pages, np.int32))
    _save(tmp_path / "a", run, pool, pages=np.asarray([5, 2], np.int32))
    with pytest.raises(ValueError, match=words if len(pages) > 1 else "must have at most 64 tokens, got 70"):
        cache_lib.load(tmp_path / "a", pool, model="m", run=run, pages=np.asarray(pages, np.int32))


@pytest.mark.parametrize("sequence", [-1, 1])
def test_the_sequence_must_be_one_of_the_batch(sequence, tmp_path):
    words = rf"sequence must be in \[0, 1\), got {sequence}"
    with pytest.raises(ValueError, match=words):
        _save(tmp_path / "a", sequence=sequence)
    _save(tmp_path / "a")
    run = RunConfig(cache_type="q5_1")
    empty = init_cache(CONFIG, run, batch=1, ctx_size=256)
    with pytest.raises(ValueError, match=words):
        cache_lib.load(tmp_path / "a", empty, model="m", run=run, sequence=sequence)
    with pytest.raises(ValueError, match="tokens must have one axis, got 2"):
        _save(tmp_path / "a", tokens=[TOKENS])


def test_fewer_tokens_than_rows_are_kept_but_not_more(tmp_path):
    _save(tmp_path / "a", tokens=TOKENS[:5])
    assert _load(tmp_path / "a")[1] == TOKENS[:5]
    with pytest.raises(ValueError, match="tokens must be at most the 100 rows, got 101"):
        _save(tmp_path / "b", tokens=[1] * 101)
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    _save(tmp_path / "a")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path / "a", tokens=TOKENS[:3])
    assert os.listdir(tmp_path) == ["a"] and _load(tmp_path / "a")[1] == TOKENS


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dict(model="n"), "must be of this model, but was saved from another"),
        (dict(run=RunConfig(cache_type="q5_0")), "cache_type must be 'q5_0' as in this run, got 'q5_1'"),
        (
            dict(run=RunConfig(cache_type="q5_1", cache_type_rope="f16")),
            "cache_type_rope must be 'f16' as in this run, got 'q5_1'",
        ),
        (
            dict(run=RunConfig(cache_type="q5_1", hadamard_size=64)),
            "rotation must be '64, 64' as in this run, got 'None, None'",
        ),
        (
            dict(run=RunConfig(cache_type="q5_1", mla=0)),
            "rows must be 'keys and values per head' as in this run, got 'latents'",
        ),
        (
            dict(run=RunConfig(cache_type="q5_1", group_routing=False)),
            "group_routing must be 'False' as in this run, got 'True'",
        ),
    ],
)
def test_what_does_not_fit_is_named(other, words, tmp_path):
    _save(tmp_path / "a")
    with pytest.raises(ValueError, match=words):
        _load(tmp_path / "a", **other)


def test_the_other_modes_of_latents_read_the_same_rows(tmp_path):
    _save(tmp_path / "a", RunConfig(cache_type="q5_1", mla=1))
    assert _load(tmp_path / "a", RunConfig(cache_type="q5_1", mla=3, flash=False))[1] == TOKENS


def test_more_tokens_than_slots_are_refused(tmp_path):
    run = RunConfig(cache_type="q5_1")
    cache = init_cache(CONFIG, run, batch=1, ctx_size=512)
    cache = dataclasses.replace(cache, length=jnp.full((1,), 300, jnp.int32))
    _save(tmp_path / "a", run, cache, tokens=[1] * 300)
    with pytest.raises(ValueError, match="must have at most 256 tokens, got 300"):
        _load(tmp_path / "a")
    (tmp_path / "b").write_bytes(bytes(1 << 22))
    with pytest.raises(ValueError, match=r"must be at most \d+ bytes for this context, got more"):
        _load(tmp_path / "b")


def test_a_truncated_or_altered_file_is_refused(tmp_path):
    """Every length of the header and some of the rows; a flipped bit in every part of the file."""
    _save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in [*range(0, header + 8, 5), *range(header, len(data), 4099), len(data) - 1]:
        (tmp_path / "b").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"/b "):
            _load(tmp_path / "b")
    for place in [*range(0, header, 3), *range(header, len(data), 997)]:
        altered = bytearray(data)
        altered[place] ^= 1 << place % 8
        (tmp_path / "b").write_bytes(altered)
        with pytest.raises(ValueError, match=r"/b[: ]"):
            _load(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop("layers.1.rope.low"), "tensor layers.1.rope.low must be .*, got none"),
        (lambda parts: parts.update({"x": np.zeros(1)}), "there must be no tensor x for this cache"),
        (
            lambda parts: parts.update({"layers.0.latent.scale": np.zeros((70, 2), np.float32)}),
            r"layers.0.latent.scale must be float16\[70, 2\], got float32\[70, 2\]",
        ),
        (
            lambda parts: parts.update(tokens=np.zeros(70)),
            r"tokens must be int32 of one axis, got float64\[70\]",
        ),
        (lambda parts: parts.update(tokens=np.zeros(71, np.int32)), r"must be \w+\[71, 32\], got"),
    ],
)
def test_a_file_of_other_tensors_is_refused_even_with_a_right_digest(change, words, tmp_path):
    _save(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    parts = saved.safetensors.numpy.load(data)
    about = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    del about["sha256"]
    change(parts)
    about["sha256"] = saved._digest(parts, about)
    (tmp_path / "b").write_bytes(saved.safetensors.numpy.save(parts, about))
    with pytest.raises(ValueError, match=words):
        _load(tmp_path / "b")


def test_what_is_no_file_of_ours_is_refused(tmp_path):
    (tmp_path / "foreign").write_bytes(saved.safetensors.numpy.save({"tokens": np.zeros(3, np.int32)}))
    with pytest.raises(ValueError, match="must be a cache saved by this program"):
        _load(tmp_path / "foreign")
    header = b'{"__metadata__": null}'
    (tmp_path / "null").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="must be a cache saved by this program"):
        _load(tmp_path / "null")
    with pytest.raises(FileNotFoundError):
        _load(tmp_path / "none")
    with pytest.raises(ValueError, match="must be a regular file"):
        _load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a regular file"):
        _load(tmp_path / "pipe")


def test_a_fingerprint_tells_models_apart():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (512, 8, 34), np.uint8)
    params = {"a": {"weight": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.asarray(blocks)}
    base = cache_lib.fingerprint(CONFIG, params)
    assert base == cache_lib.fingerprint(CONFIG, jax.tree.map(jnp.copy, params))
    others = [
        (dataclasses.replace(CONFIG, norm_epsilon=1e-5), params),
        (CONFIG, params | {"b": params["b"].at[..., 2:].set(~blocks[..., 2:])}),
        (CONFIG, params | {"b": params["b"].at[:, 3].set(~blocks[:, 3])}),
        (CONFIG, params | {"a": {"weight": params["a"]["weight"].T}}),
        (CONFIG, {"a": params["a"], "c": params["b"]}),
        (CONFIG, params | {"b": params["b"].astype(jnp.int8)}),
    ]
    assert base not in {cache_lib.fingerprint(*other) for other in others}
