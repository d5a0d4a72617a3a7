"""The paged cache against the contiguous one: the same logits, and not a byte written that is another's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import steps
from mla_jax.cache import PageTable, init_cache, init_pool
from mla_jax.config import MLAConfig, ModelConfig, RunConfig
from mla_jax.nn.transformer import Transformer, init_params

CONFIG = ModelConfig(
    vocab_size=96,
    context_length=1024,
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
        qk_rope_head_dim=32,
        v_head_dim=32,
    ),
    moe=None,
)
CTX = 320  # no whole number of the chunks that flash attention visits
RUNS = {
    "f32": RunConfig(cache_type="f32"),
    "f32-mla0": RunConfig(cache_type="f32", mla=0),
    "f32-whole": RunConfig(cache_type="f32", flash=False),
    "q8_0": RunConfig(cache_type="q8_0"),
    "q5_1": RunConfig(cache_type="q5_1"),
    "q4_0-rotated": RunConfig(cache_type="q4_0", cache_type_rope="bf16", hadamard_size=64),
}
# Calls as (padded length, tokens that count in each sequence).
PLAN = [
    (140, (140, 63, 0)),
    (70, (1, 2, 64)),
    (130, (130, 0, 3)),
    (1, (1, 1, 1)),
    (40, (40, 0, 17)),
    (1, (1, 1, 0)),
]


# Without LLVM's optimisations a compilation takes half the time.
@functools.partial(jax.jit, static_argnames="run", compiler_options={"xla_backend_optimization_level": 0})
def _step(params, tokens, cache, num_tokens, pages, run):
    return Transformer(CONFIG, run).apply({"params": params}, tokens, cache, num_tokens, pages)


@functools.cache
def _params():
    return init_params(jax.random.key(0), CONFIG)


def _tokens(batch):
    return np.random.default_rng(0).integers(CONFIG.vocab_size, size=(batch, CTX), dtype=np.int32)


def _owned(table, sequences):
    """Returns [Z, G]: whether a token lies there."""
    owned = np.zeros((table.num_pages, table.page_size), bool)
    for sequence in sequences:
        slots = np.arange(table.length(sequence))
        pages = np.asarray(table.row(sequence, CTX), np.int32)
        owned[pages[slots // table.page_size], slots % table.page_size] = True
    return owned


def _fill(part, is_dead, rng):
    """Fills places [Z, G] with NaN, or with codes of any value where those are kept."""
    noise = rng.integers(0, 255, part.shape, np.uint8).astype(part.dtype)
    noise = noise if jnp.issubdtype(part.dtype, jnp.integer) else jnp.full_like(part, jnp.nan)
    return jnp.where(jnp.asarray(is_dead).reshape(is_dead.shape + (1,) * (part.ndim - 2)), noise, part)


def _changed(before, after):
    """Returns [Z, G]: whether any byte there differs."""
    places = lambda part: np.asarray(part).reshape(*part.shape[:2], -1).view(np.uint8)
    pairs = zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True)
    return np.any([(places(old) != places(new)).any(-1) for old, new in pairs], axis=0)


def _shuffled(table):
    """Deals pages out of order, as a pool in use would."""
    sequences = [table.open() for _ in range(table.num_pages)]
    for sequence in sequences:
        table.append(sequence, 1)
    for place in np.random.default_rng(2).permutation(table.num_pages):
        table.free(sequences[place])
    return table


def _follow(run, page_size, poison):
    """Yields the logits of each call of the plan, checking around each what it writes."""
    params, tokens, rng = _params(), _tokens(3), np.random.default_rng(1)
    width = CTX // page_size
    table = _shuffled(PageTable(3 * width, page_size))
    sequences = [table.open() for _ in range(3)]
    cache = init_pool(CONFIG, run, batch=3, num_pages=table.num_pages, page_size=page_size)
    for length, counts in PLAN:
        owned = _owned(table, sequences)
        if poison:
            layers = jax.tree.map(lambda part, owned=owned: _fill(part, ~owned, rng), cache.layers)
            cache = dataclasses.replace(cache, layers=layers)
        padded = np.zeros((3, length), np.int32)
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            start = table.length(sequence)
            padded[row, :count] = tokens[row, start : start + count]
            assert table.append(sequence, count) == []
        pages = np.asarray([table.row(sequence, width) for sequence in sequences], np.int32)
        out, after = _step(params, padded, cache, np.asarray(counts, np.int32), pages, run)
        written = _owned(table, sequences) & ~owned
        assert not (_changed(cache, after) & ~written).any()
        if poison:
            assert (_changed(cache, after) == written).all()
        cache = after
        yield [np.asarray(out[row, :count]) for row, count in enumerate(counts)]


@functools.cache
def _expected(run):
    params, tokens, cache = _params(), _tokens(3), init_cache(CONFIG, run, batch=3, ctx_size=CTX)
    done, logits = np.zeros(3, np.int32), []
    for length, counts in PLAN:
        padded = np.zeros((3, length), np.int32)
        for row, count in enumerate(counts):
            padded[row, :count] = tokens[row, done[row] : done[row] + count]
        out, cache = _step(params, padded, cache, np.asarray(counts, np.int32), None, run)
        logits.append([np.asarray(out[row, :count]) for row, count in enumerate(counts)])
        done += np.asarray(counts, np.int32)
    return logits


@pytest.mark.parametrize(
    ("name", "page_size"), [*((name, 64) for name in RUNS), ("f32", 1), ("q8_0", 16), ("f32", 32)]
)
def test_pages_in_any_order_are_a_contiguous_cache(name, page_size):
    run = RUNS[name]
    clean = list(_follow(run, page_size, poison=False))
    poisoned = list(_follow(run, page_size, poison=True))
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    largest = max(np.abs(part).max(initial=0) for call in clean for part in call)
    for found, expected in zip(clean, _expected(run), strict=True):
        for row in range(3):
            assert np.abs(found[row] - expected[row]).max(initial=0) < 1e-5 * largest


def test_forks_share_pages_and_go_their_own_ways():
    """A trunk of 100 tokens, a branch that copies the page in common, and a trunk that is cut and goes on."""
    run, tokens, table = RUNS["q8_0"], _tokens(2), PageTable(8)
    cache = init_pool(CONFIG, run, batch=1, num_pages=8)

    def feed(sequence, new):
        nonlocal cache
        length = table.length(sequence)
        if copies := table.append(sequence, len(new)):
            cache = steps.copy_pages(cache, *np.asarray(copies, np.int32).T)
        cache = dataclasses.replace(cache, length=jnp.full((1,), length, jnp.int32))
        pages, counts = np.asarray([table.row(sequence, 4)], np.int32), np.full((1,), len(new), np.int32)
        out, cache = _step(_params(), new[None], cache, counts, pages, run)
        return np.asarray(out[0])

    def alone(*parts):
        cache = init_cache(CONFIG, run, batch=1, ctx_size=CTX)
        for part in parts:
            counts = np.full((1,), len(part), np.int32)
            out, cache = _step(_params(), part[None], cache, counts, None, run)
        return np.asarray(out[0])

    trunk, more, other = tokens[0, :100], tokens[0, 100:140], tokens[1, 100:140]
    first = table.open()
    feed(first, trunk)
    second = table.fork(first)
    assert table.num_free == 6
    branch = feed(second, other)
    assert table.num_free == 4  # its own copy of the half full page, and one more
    np.testing.assert_allclose(feed(first, more), alone(trunk, more), atol=1e-5)
    np.testing.assert_allclose(branch, alone(trunk, other), atol=1e-5)
    table.truncate(first, 100)
    np.testing.assert_allclose(feed(first, other), alone(trunk, other), atol=1e-5)
    np.testing.assert_allclose(feed(second, more), alone(trunk, other, more), atol=1e-5)


@pytest.mark.parametrize("page_size", [0, 48, 512])
def test_a_page_must_divide_a_chunk(page_size):
    with pytest.raises(ValueError, match=f"page_size must divide 256, got {page_size}"):
        init_pool(CONFIG, RUNS["f32"], batch=1, num_pages=1, page_size=page_size)


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (5,)])
def test_pages_have_a_row_for_each_sequence(shape):
    cache = init_pool(CONFIG, RUNS["f32"], batch=2, num_pages=10)
    with pytest.raises(ValueError, match=r"pages must be \[2, M\], a row for each sequence, got"):
        _step(_params(), _tokens(2)[:, :1], cache, None, np.zeros(shape, np.int32), RUNS["f32"])
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        init_pool(CONFIG, RUNS["f32"], batch=2, num_pages=0)
