"""The jitted steps against `apply`, and the cutting of prompts against what it must add up to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import quant, sampler, steps
from mla_jax.cache import PageTable, init_cache, init_pool
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RunConfig
from mla_jax.nn import transformer
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
    [
        (1, (1,)),
        (32, (32,)),
        (33, (32, 33)),
        (512, (32, 64, 128, 256, 512)),
        (600, (32, 64, 128, 256, 512, 600)),
    ],
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


NONE = np.asarray([-1], np.int32)


def _decode(params, temperatures, recent=None, num_steps=1, eog_ids=NONE, **penalties):
    recent = np.full((2, sampler.NUM_RECENT), -1, np.int32) if recent is None else recent
    rows = [sampler.SamplingParams(temperature=t, seed=3, **penalties) for t in temperatures]
    newest, cache = np.asarray([5, 6], np.int32), _prefilled(params)
    inputs = newest, recent, cache, sampler.batch(rows), np.int32(num_steps), eog_ids
    drawn, taken, recent, cache = steps.decode(params, *inputs, config=CONFIG, run=RUN)
    np.testing.assert_array_equal(drawn[:, int(taken) :], -1)
    return np.asarray(drawn)[:, : int(taken)], recent, cache


def test_decode_draws_from_the_logits_after_the_newest_token(params):
    drawn, recent, cache = _decode(params, [0.0, 0.0])
    np.testing.assert_array_equal(cache.length, LENGTHS + 1)
    np.testing.assert_array_equal(recent[:, -1], [5, 6])
    np.testing.assert_array_equal(recent[:, :-1], -1)
    for row, length in enumerate(LENGTHS):
        whole = np.append(TOKENS[row, :length], [5, 6][row])[None]
        logits, _ = apply(params, jnp.asarray(whole), None, CONFIG, RUN)
        assert int(drawn[row, 0]) == int(np.argmax(logits[0, -1]))


def test_the_newest_token_is_recent_to_penalties(params):
    greedy = np.asarray(_decode(params, [0.0, 0.0])[0])
    recent = np.full((2, sampler.NUM_RECENT), -1, np.int32)
    recent[:, -1] = greedy[:, 0]
    penalised, recent, _ = _decode(params, [0.0, 0.0], recent=recent, presence_penalty=1e6)
    assert np.all(penalised != greedy)
    np.testing.assert_array_equal(recent[:, -2], greedy[:, 0])


def test_rows_are_drawn_each_in_their_own_way(params):
    greedy, mixed = _decode(params, [0.0, 0.0])[0], _decode(params, [0.0, 5.0])[0]
    both = _decode(params, [5.0, 5.0])[0]
    assert mixed[0, 0] == greedy[0, 0] and mixed[1, 0] == both[1, 0]


def _same_rows(cache, other, lengths):
    for row, length in enumerate(lengths):
        for name in ("latent", "rope"):
            got, wanted = getattr(cache.layers[0], name)[row], getattr(other.layers[0], name)[row]
            np.testing.assert_array_equal(got[:length], wanted[:length])


PENALISED = dict(repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5)


@pytest.mark.parametrize("settings", [{}, PENALISED], ids=["plain", "penalised"])
@pytest.mark.parametrize(
    "temperatures", [(0.0, 0.0), (1.5, 1.5), (0.0, 1.5)], ids=["greedy", "drawn", "mixed"]
)
def test_many_steps_at_once_equal_one_after_the_other(params, temperatures, settings):
    whole, recent, cache = _decode(params, temperatures, num_steps=6, **settings)
    assert whole.shape == (2, 6) and len(set(whole.ravel().tolist())) > 3
    rows = [sampler.SamplingParams(temperature=t, seed=3, **settings) for t in temperatures]
    single, newest = _prefilled(params), np.asarray([5, 6], np.int32)
    window = np.full((2, sampler.NUM_RECENT), -1, np.int32)
    for step in range(6):
        inputs = newest, window, single, sampler.batch(rows), np.int32(1), NONE
        drawn, taken, window, single = steps.decode(params, *inputs, config=CONFIG, run=RUN)
        newest = np.asarray(drawn)[:, 0]
        assert int(taken) == 1
        np.testing.assert_array_equal(newest, whole[:, step])
    np.testing.assert_array_equal(recent, window)
    np.testing.assert_array_equal(cache.length, single.length)
    _same_rows(cache, single, LENGTHS + 6)


def test_steps_end_when_every_sequence_has_ended(params):
    whole = _decode(params, [1.5, 1.5], num_steps=9)[0]
    eog_ids = np.asarray([whole[0, 1], whole[1, 4], -1], np.int32)
    ends = np.argmax(np.isin(whole, eog_ids), axis=1)
    wanted = max(ends) + 1
    assert wanted < 9 and ends[0] != ends[1]  # one goes on after its end
    drawn, recent, cache = _decode(params, [1.5, 1.5], num_steps=9, eog_ids=eog_ids)
    np.testing.assert_array_equal(drawn, whole[:, :wanted])
    _, window, stepped = _decode(params, [1.5, 1.5], num_steps=wanted)
    np.testing.assert_array_equal(recent, window)
    np.testing.assert_array_equal(cache.length, LENGTHS + wanted)
    _same_rows(cache, stepped, LENGTHS + wanted)


def test_no_step_and_too_many(params):
    drawn, recent, cache = _decode(params, [0.0, 0.0], num_steps=0)
    assert drawn.shape == (2, 0)
    np.testing.assert_array_equal(recent, -1)
    np.testing.assert_array_equal(cache.length, LENGTHS)
    drawn, _, cache = _decode(params, [0.0, 0.0], num_steps=steps.MAX_STEPS + 5)
    assert drawn.shape == (2, steps.MAX_STEPS)
    np.testing.assert_array_equal(cache.length, LENGTHS + steps.MAX_STEPS)


@pytest.mark.parametrize(
    ("seconds", "fit"), [(0.2, 1), (0.05, 1), (0.026, 1), (0.024, 2), (0.003, 16), (1e-9, steps.MAX_STEPS)]
)
def test_steps_that_fit_a_time(seconds, fit):
    assert steps.within(0.05, seconds) == fit


def test_weights_are_not_held_decoded_while_steps_are_taken():
    wide = dataclasses.replace(CONFIG, embed_dim=64, num_layers=4, num_dense_layers=4, dense_hidden_dim=2048)
    params, num_bytes = init_params(jax.random.key(0), wide), 0
    for layer in range(4):
        for weight in params[f"layers_{layer}"]["ffn"].values():
            num_bytes += weight["weight"].nbytes
            weight["weight"] = quant.encode(np.asarray(weight["weight"]), "q8_0")
    cache = init_cache(wide, RUN, batch=1, ctx_size=16)
    recent = np.full((1, sampler.NUM_RECENT), -1, np.int32)
    sampling = sampler.batch([sampler.SamplingParams(seed=3)])
    inputs = np.asarray([5], np.int32), recent, cache, sampling, np.int32(4), NONE
    compiled = steps.decode.lower(params, *inputs, config=wide, run=RUN).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < num_bytes / 2


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
        while len(seen) < 4096:
            count = min(len(seen) % steps.MAX_STEPS + 1, 4096 - len(seen))  # many counts, in turn
            for sequence in sequences:
                table.append(sequence, count)
            pages = np.asarray([table.row(sequence, width) for sequence in sequences], np.int32)
            inputs = tokens, recent, cache, sampling, np.int32(count), NONE, pages
            drawn, _, recent, cache = steps.decode(params, *inputs, config=CONFIG, run=RUN)
            seen.extend(np.asarray(drawn)[:, :count].T)
            tokens = seen[-1]
            if len(seen) == 3:  # the first call takes arrays of the host, the second those of the device
                assert compilations
                compilations.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []
    np.testing.assert_array_equal(cache.length, [4096, 4096])
    assert len({int(row[0]) for row in seen}) > 8


def test_layers_that_are_alike_are_traced_once(monkeypatch):
    traced, of_layer = [], transformer.Layer.attend

    def attend(layer, *args):
        traced.append(layer.is_dense)
        return of_layer(layer, *args)

    monkeypatch.setattr(transformer.Layer, "attend", attend)
    moe = MoEConfig(
        num_experts=4, num_experts_per_token=2, expert_hidden_dim=8, num_shared_experts=1, gating="softmax"
    )
    config = dataclasses.replace(CONFIG, num_layers=6, num_dense_layers=2, moe=moe)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    assert sorted(traced) == [False] * 4 + [True] * 2  # each draws its own
    traced.clear()
    jax.eval_shape(lambda params: apply(params, TOKENS, None, config, RUN), shapes)
    assert sorted(traced) == [False, True]
