"""The jitted steps against `apply`, and the cutting of prompts against what it must add up to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import sampler, steps
from mla_jax.cache import PageTable, init_cache, init_pool
from mla_jax.config import MLAConfig, ModelConfig, RunConfig
from mla_jax.nn.transformer import apply, init_params

CONFIG = ModelConfig(
    vocab_size=32,
    context_length=64,
    embed_dim=16,
    num_layers=1,
    num_dense_layers=1,
    dense_hidden_dim=24,
    norm_epsilon=1e-5,
    mla=MLAConfig(
        num_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    ),
    moe=None,
)
RUN = RunConfig(cache_type="f32")
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9)).astype(np.int32)
LENGTHS = np.asarray([9, 4], np.int32)


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


@pytest.mark.parametrize(
    ("ubatch", "sizes"),
    [(1, (1,)), (32, (32,)), (33, (32, 33)), (512, (32, 128, 512)), (600, (32, 128, 512, 600))],
)
def test_buckets(ubatch, sizes):
    assert steps.buckets(ubatch) == sizes


@pytest.mark.parametrize("ubatch", [1, 7, 32, 100, 512])
@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 100, 1000])
def test_pieces_of_a_prompt_add_up(num_tokens, ubatch):
    pieces = steps.split_prompt(num_tokens, ubatch)
    assert sum(count for count, _ in pieces) == num_tokens
    for count, width in pieces:
        assert 0 < count <= width and width in steps.buckets(ubatch)
    smaller = [width for width in steps.buckets(ubatch) if pieces and width < pieces[-1][1]]
    assert all(pieces[-1][0] > width for width in smaller)
    assert len(pieces) == -(-num_tokens // ubatch)


def _prefilled(params, pad=0):
    tokens = np.pad(TOKENS, ((0, 0), (0, pad)), constant_values=31)
    cache = init_cache(CONFIG, RUN, batch=2, ctx_size=16)
    return steps.prefill(params, tokens, LENGTHS, cache, config=CONFIG, run=RUN)


def test_prefill_fills_the_cache_as_apply_does(params):
    cache = _prefilled(params)
    for row, length in enumerate(LENGTHS):
        alone = init_cache(CONFIG, RUN, batch=1, ctx_size=16)
        _, alone = apply(params, TOKENS[row : row + 1, :length], alone, CONFIG, RUN)
        assert int(cache.length[row]) == length
        for name in ("latent", "rope"):
            got, wanted = getattr(cache.layers[0], name)[row], getattr(alone.layers[0], name)[0]
            np.testing.assert_allclose(got[:length], wanted[:length], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(got[length:], 0)  # padding is written nowhere


def test_padding_of_a_bucket_changes_nothing(params):
    plain, padded = _prefilled(params), _prefilled(params, pad=7)
    for name in ("latent", "rope"):
        got, wanted = getattr(padded.layers[0], name), getattr(plain.layers[0], name)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def _decode(params, temperatures, recent=None, **penalties):
    recent = np.full((2, sampler.NUM_RECENT), -1, np.int32) if recent is None else recent
    rows = [sampler.SamplingParams(temperature=t, seed=3, **penalties) for t in temperatures]
    newest = np.asarray([5, 6], np.int32)
    return steps.decode(
        params, newest, recent, _prefilled(params), sampler.batch(rows), config=CONFIG, run=RUN
    )


def test_decode_draws_from_the_logits_after_the_newest_token(params):
    drawn, recent, cache = _decode(params, [0.0, 0.0])
    np.testing.assert_array_equal(cache.length, LENGTHS + 1)
    np.testing.assert_array_equal(recent[:, -1], [5, 6])
    np.testing.assert_array_equal(recent[:, :-1], -1)
    for row, length in enumerate(LENGTHS):
        whole = np.append(TOKENS[row, :length], [5, 6][row])[None]
        logits, _ = apply(params, jnp.asarray(whole), None, CONFIG, RUN)
        assert int(drawn[row]) == int(np.argmax(logits[0, -1]))


def test_the_newest_token_is_recent_to_penalties(params):
    greedy = np.asarray(_decode(params, [0.0, 0.0])[0])
    recent = np.full((2, sampler.NUM_RECENT), -1, np.int32)
    recent[:, -1] = greedy
    penalised, recent, _ = _decode(params, [0.0, 0.0], recent=recent, presence_penalty=1e6)
    assert np.all(penalised != greedy)
    np.testing.assert_array_equal(recent[:, -2], greedy)


def test_rows_are_drawn_each_in_their_own_way(params):
    greedy, mixed = _decode(params, [0.0, 0.0])[0], _decode(params, [0.0, 5.0])[0]
    both = _decode(params, [5.0, 5.0])[0]
    assert int(mixed[0]) == int(greedy[0]) and int(mixed[1]) == int(both[1])


def test_4096_tokens_are_decoded_without_compiling_again(params):
    compilations = []
    listen = lambda event, seconds, **_: compilations.append(event) if "backend_compile" in event else None
    table, width = PageTable(200, 64), 68
    sequences = [table.open(), table.open()]
    cache = init_pool(CONFIG, RUN, batch=2, num_pages=200)
    tokens, recent = np.asarray([5, 6], np.int32), np.full((2, sampler.NUM_RECENT), -1, np.int32)
    sampling = sampler.batch(
        [sampler.SamplingParams(seed=3), sampler.SamplingParams(temperature=0.0, seed=3)]
    )
    seen = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for step in range(4096):
            for sequence in sequences:
                table.append(sequence, 1)
            pages = np.asarray([table.row(sequence, width) for sequence in sequences], np.int32)
            tokens, recent, cache = steps.decode(
                params, tokens, recent, cache, sampling, pages, config=CONFIG, run=RUN
            )
            seen.append(np.asarray(tokens))
            if step == 1:  # the first call takes arrays of the host, the second those of the device
                assert compilations
                compilations.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []
    np.testing.assert_array_equal(cache.length, [4096, 4096])
    assert len({int(row[0]) for row in seen}) > 8
