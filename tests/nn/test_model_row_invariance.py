"""The whole model with the CPU kernels: bit for bit the same, whatever else is computed beside a token.

A sequence that decodes gives the same in any batch; a prompt leaves the same rows
however it is cut into the buckets of `steps`. Not so in mode 0 and without the kernels, where XLA chooses
the order of sums by the number of rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

import cpu_kernels
from checkpoints_tools import load
from mla_jax import quant, steps
from mla_jax.cache import init_pool
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import apply

SIZES = dict(embed=128, heads=3, q_lora=64, kv_lora=128, nope=32, rope=64, v=32, ff=128, ff_exp=64)
MODELS = {
    "f32": dict(weight_type="F32", groups=4, groups_used=2),
    "f16 k_b_v_b": dict(weight_type="F16", kv="k_b_v_b", q_lora=False, gating="softmax"),
    "q8_0": dict(weight_type="Q8_0", merged=True, yarn=True),
    "mixed": dict(weight_type="F32", groups=4, groups_used=2, q_lora=False, kv="k_b_v_b"),
}
MIXED = ("q4_0", "q8_0", "q5_1", "bf16", "iq4_nl")
RUNS = {
    "f16": RunConfig(),
    "q8_0": RunConfig(cache_type="q8_0"),
    "q4_0 rotated": RunConfig(cache_type="q4_0", hadamard_size=64),
    "iq4_nl rotated": RunConfig(cache_type="iq4_nl", hadamard_size=128),
    "mode 1": RunConfig(mla=1),
    "mode 2": RunConfig(mla=2, cache_type="q8_0"),
}
CASES = [
    *(pytest.param(model, "f16", id=model) for model in MODELS),
    *(pytest.param("mixed", run, id=f"mixed, {run}") for run in RUNS if run != "f16"),
    pytest.param("f32", "mode 1", id="f32, mode 1"),
]
NUM_SEQUENCES, TABLE = 16, 10
LENGTHS = np.random.default_rng(4).integers(1, 380, NUM_SEQUENCES)


@pytest.fixture(scope="module", autouse=True)
def kernels_compute():
    if not cpu_kernels.available():
        pytest.skip(f"XLA sums in an order of its own: {cpu_kernels.unavailable_because()}")
    with jax.default_matmul_precision("default"):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives a model by name, as (params, config)."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def get(name):
        path = folder / f"{name}.gguf"
        synthetic.write_deepseek2(path, sizes=SIZES, **MODELS[name])
        checkpoint = load.load_gguf(path, progress=lambda *_: None)
        params = _mix(checkpoint.params) if name == "mixed" else checkpoint.params
        return params, checkpoint.config

    return get


def _mix(params):
    """Gives each matrix another format than the one before it; the router keeps its own."""
    formats = iter(MIXED * 20)

    def of_path(path, weight):
        if weight.ndim < 2 or "router" in {entry.key for entry in path}:
            return weight
        return jax.tree.map(jnp.asarray, quant.encode(np.asarray(weight), next(formats)))

    return jax.tree_util.tree_map_with_path(of_path, params)


def _tokens(config):
    return np.random.default_rng(0).integers(config.vocab_size, size=(NUM_SEQUENCES, 640), dtype=np.int32)


def _pages():
    order = np.random.default_rng(1).permutation(NUM_SEQUENCES * TABLE)
    return order.reshape(NUM_SEQUENCES, TABLE).astype(np.int32)


def _pool(config, run):
    return init_pool(config, run, batch=1, num_pages=NUM_SEQUENCES * TABLE)


def _prefill(model, run, cache, tokens, start, width, pages):
    """Appends `tokens` at `start`, padded to `width` with tokens of any kind."""
    params, config = model
    padded = np.resize(tokens[::-1], width)
    padded[: len(tokens)] = tokens
    cache = dataclasses.replace(cache, length=np.asarray([start], np.int32))
    count = np.asarray([len(tokens)], np.int32)
    return steps.prefill(params, padded[None], count, cache, pages[None], config=config, run=run)


def _rows_of(cache, pages, length):
    """Returns what a sequence has cached, in order, as bytes [length, ...] of each part of each layer."""
    take = lambda part: np.asarray(part)[pages].reshape(-1, part.shape[-1])[:length].view(np.uint8)
    return [take(leaf) for leaf in jax.tree.leaves(cache.layers)]


def _compare_rows(found, expected, message):
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(part, other, err_msg=message)


# As (tokens, width): the cuts of `steps.split_prompt`, and others, that end and begin anywhere.
CUTS = {
    "32": [(32, 32)] * 20,
    "128": [(128, 128)] * 5,
    "odd": [(1, 32), (17, 32), (100, 128), (33, 128), (5, 512), (31, 32), (128, 128), (200, 512), (125, 128)],
    "ones": [(1, 32), (1, 32), (1, 128), (509, 512), (128, 512)],
}


@pytest.mark.parametrize(("model", "run"), CASES)
def test_prompts_leave_the_same_rows_however_they_are_cut(model, run, models):
    model, run = models(model), RUNS[run]
    tokens, pages = _tokens(model[1])[0], _pages()[0]

    def fill(pieces):
        cache, start = _pool(model[1], run), 0
        for count, width in pieces:
            cache = _prefill(model, run, cache, tokens[start : start + count], start, width, pages)
            start += count
        assert start == len(tokens)
        return _rows_of(cache, pages, start)

    whole = fill([(512, 512), (128, 128)])
    assert all(np.ptp(part) > 0 for part in whole)
    for name, pieces in CUTS.items():
        _compare_rows(fill(pieces), whole, name)


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _decode(params, tokens, cache, pages, config, run):
    return apply(params, tokens[:, None], cache, config, run, pages)


def _filled(model, run):
    cache = _pool(model[1], run)
    for tokens, length, pages in zip(_tokens(model[1]), LENGTHS, _pages(), strict=True):
        cache = _prefill(model, run, cache, tokens[:length], 0, 512, pages)
    return cache


@pytest.mark.parametrize(("model", "run"), CASES)
def test_sequences_decode_in_a_batch_as_alone(model, run, models):
    (params, config), run = models(model), RUNS[run]
    cache, tokens, pages = _filled((params, config), run), _tokens(config), _pages()

    def decode(sequences):
        """Takes two steps, and returns the logits of the last and the rows of each sequence."""
        after, lengths = cache, LENGTHS[sequences].astype(np.int32)
        for step in range(2):
            after = dataclasses.replace(after, length=lengths + step)
            newest = tokens[sequences, lengths + step]
            logits, after = _decode(params, newest, after, pages[sequences], config, run)
        rows = [_rows_of(after, pages[i], LENGTHS[i] + 2) for i in sequences]
        return np.asarray(logits[:, 0]), rows

    alone = [decode(np.asarray([i])) for i in range(NUM_SEQUENCES)]
    for size in (2, 3, 4, 8, NUM_SEQUENCES):
        order = np.random.default_rng(size).permutation(NUM_SEQUENCES)
        for first in range(0, NUM_SEQUENCES - size + 1, size):
            sequences = order[first : first + size]
            logits, rows = decode(sequences)
            for place, i in enumerate(sequences):
                message = f"sequence {i} of {sequences}"
                _compare_rows(rows[place], alone[i][1][0], message)
                np.testing.assert_array_equal(logits[place], alone[i][0][0], err_msg=message)
