"""Perplexity is exp of the mean cross-entropy of what follows the middles of windows, through a cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import mla_jax
from mla_jax import perplexity, taps
from mla_jax.perplexity import Network

TEXT = "The latent of a token is small, and the cache with it. " * 12
SIZE = 33


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return mla_jax.load(path, ctx_size=64, cache_type="f32", compilation_cache=None)


@pytest.fixture(scope="module")
def windows(model):
    return perplexity.windows_of(model, TEXT, SIZE, limit=5)


def by_definition(model, window, reduction=None):
    """Returns the cross-entropy of each token after the middle, summed up in float64."""
    settings = dict(config=model.config, run=model.run, reduction=reduction)
    apply = jax.jit(mla_jax.apply, static_argnames=("config", "run"))
    logits = np.asarray(apply(model.params, jnp.asarray(window[None]), None, **settings)[0][0], float)
    nats = []
    for place in range(SIZE // 2, SIZE - 1):
        row = logits[place]
        nats.append(math.log(sum(math.exp(x) for x in row)) - row[window[place + 1]])
    return nats


def test_it_is_the_definition(model, windows):
    found = perplexity.measure(model, windows)
    wanted = np.array([by_definition(model, window) for window in windows])
    assert found.nats.shape == wanted.shape == (5, 16) and found.window == SIZE
    np.testing.assert_allclose(found.nats, wanted, rtol=2e-5)
    value, error = found.estimate
    assert value == pytest.approx(math.exp(wanted.mean()), rel=1e-5)
    variance = (wanted**2).mean() - wanted.mean() ** 2
    assert error == pytest.approx(value * math.sqrt(variance / (wanted.size - 1)), rel=1e-4)
    assert found.running[-1] == pytest.approx(value) and len(found.running) == 5
    assert found.running[1] == pytest.approx(math.exp(wanted[:2].mean()), rel=1e-5)
    assert found.by_window[3] == pytest.approx(math.exp(wanted[3].mean()), rel=1e-5)


def test_windows_begin_with_bos_and_follow_each_other(model):
    tokens = model.tokenizer.encode(TEXT)
    windows = perplexity.windows_of(model, TEXT, 40)
    assert len(windows) == len(tokens) // 40 and windows.dtype == np.int32
    assert (windows[:, 0] == model.tokenizer.vocabulary.bos_id).all()
    np.testing.assert_array_equal(windows[:, 1:], np.reshape(tokens[: windows.size], windows.shape)[:, 1:])
    assert perplexity.cut(range(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert perplexity.cut(range(8), 4, bos_id=9, limit=1).tolist() == [[9, 1, 2, 3]]
    assert perplexity.following(perplexity.cut(range(10), 5)).tolist() == [[3, 4], [8, 9]]
    assert perplexity.following(perplexity.cut(range(4), 4)).tolist() == [[3]]


@pytest.mark.parametrize(
    "how",
    [dict(batch=2), dict(batch=1, ubatch=12)],
    ids=lambda how: " ".join(f"{name} {value}" for name, value in how.items()),
)
def test_how_windows_are_run_changes_nothing(model, windows, how):
    expected, told = perplexity.measure(model, windows), []
    found = perplexity.measure(model, windows, **how, report=told.append)
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5)
    np.testing.assert_array_equal([len(part.nats) for part in told], range(1, 6))
    assert told[2].estimate == dataclasses.replace(found, nats=found.nats[:3]).estimate


def test_logits_are_held_in_pieces(monkeypatch):
    """Of 16 rows at most 7 at a time: 3 pieces of 6, the last of them filled up."""
    monkeypatch.setattr(perplexity, "_LOGITS_BYTES", 7 * 4 * 100)
    x, ids, shapes = jnp.arange(32.0).reshape(16, 2), jnp.arange(16), []

    def score(x, ids):
        shapes.append((x.shape, ids.shape))
        return x.sum(axis=-1) * ids.astype(jnp.float32), {"ids": ids}

    product, told = perplexity.in_pieces(score, x, ids, vocab_size=100)
    assert set(shapes) == {((6, 2), (6,))}
    np.testing.assert_array_equal(product, np.asarray(x).sum(axis=-1) * np.arange(16))
    np.testing.assert_array_equal(told["ids"], ids)
    assert perplexity.in_pieces(score, x[:1], ids[:1], vocab_size=10**9)[0].shape == (1,)


def test_the_cache_and_fewer_experts_count(model, windows):
    exact = perplexity.measure(model, windows).nats
    rounded = perplexity.measure(Network.of(model, cache_type="q4_0", cache_type_rope="f16"), windows).nats
    assert 0.01 < np.abs(rounded - exact).mean() < 1
    reduced = perplexity.measure(Network.of(model, expert_reduction=(1, 1.0)), windows).nats
    reduction = mla_jax.nn.moe.ExpertReduction(minimum=jnp.ones(1, jnp.int32), threshold=jnp.ones(1))
    np.testing.assert_allclose(reduced[4], by_definition(model, windows[4], reduction), rtol=2e-5)
    assert np.abs(reduced - exact).mean() > 0.01


def test_a_network_is_a_model_run_otherwise(model):
    model.expert_reduction = mla_jax.expert_reduction.per_layer(model.config, (2, 0.5))
    network = Network.of(model, cache_type="q8_0", hadamard_size=64)
    assert network.params is model.params and network.expert_reduction == model.expert_reduction
    assert network.run == dataclasses.replace(model.run, cache_type="q8_0", hadamard_size=64)
    assert Network.of(model, expert_reduction=(1, 0.0)).expert_reduction == ((1, 0.0),) * 2
    model.expert_reduction = ((1, 0.0),) * 2


def test_one_token_alone_has_no_error():
    found = perplexity.Perplexity(window=4, nats=np.full((1, 1), math.log(3), np.float32))
    assert found.estimate == (pytest.approx(3.0), 0.0)


def test_beyond_the_largest_number_is_infinity():
    found = perplexity.Perplexity(window=5, nats=np.array([[800.0, 900.0]], np.float32))
    assert found.estimate == (math.inf, math.inf)
    assert found.running.tolist() == found.by_window.tolist() == [math.inf]


def test_bad_input_is_refused(model, windows):
    cases = [
        (lambda: perplexity.cut(range(9), 10), "at least the 10 tokens of a window, got 9"),
        (lambda: perplexity.cut(range(9), 2), "a window must have at least 3 tokens, got 2"),
        (lambda: perplexity.cut(range(9), 4, limit=0), "at least 1 window, got 0"),
        (lambda: perplexity.measure(model, windows + 300), r"token ids must be in \[0, 320\)"),
        (lambda: perplexity.measure(model, windows[:, :2]), r"at least 3 tokens each, got shape \(5, 2\)"),
        (lambda: perplexity.measure(model, windows[:0]), r"at least 1 of .* got shape \(0, 33\)"),
        (lambda: perplexity.measure(model, windows[0]), r"at least 1 of .* got shape \(33,\)"),
        (lambda: perplexity.measure(model, windows, batch=0), "batch must be at least 1, got 0"),
        (lambda: perplexity.measure(model, windows, ubatch=0), "ubatch must be at least 1, got 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    recording = dataclasses.replace(Network.of(model), run=taps.tapped(model.run, record=("resid.1",)))
    with pytest.raises(ValueError, match="taps of what is measured must edit"):
        perplexity.measure(recording, windows)
    weights = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.ndim == 1 else leaf, model.params)
    with pytest.raises(ValueError, match="logits must be finite, but those of window 1 are not"):
        perplexity.measure(dataclasses.replace(Network.of(model), params=weights), windows)
