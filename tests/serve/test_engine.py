"""Texts of the engine are those that each request has alone, whatever happens beside it."""

import dataclasses

import jax
import numpy as np
import pytest
from synthetic import write_deepseek2

import cpu_kernels
import mla_jax
from mla_jax import config as config_lib
from mla_jax import expert_reduction, steps
from mla_jax.sampler import SamplingParams
from mla_jax.serve.request import Draining, Failure, QueueFull, Request

needs_kernels = pytest.mark.skipif(
    not cpu_kernels.available(), reason="without CPU kernels texts are alike up to rounding"
)
SHARED = (0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193)  # up to three pages, and a token on either side
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return path


@pytest.fixture
def load(path):
    def load(file=path, **settings):
        settings = dict(ctx_size=512, ubatch=128, parallel=4, keep_drawn=False) | settings
        return mla_jax.load(file, compilation_cache=None, **settings)

    return load


def _prompt(length, size=320):
    return tuple(RNG.integers(3, size, length).tolist())


def _request(prompt, max_tokens=12, seed=0, temperature=0.0, **more):
    sampling = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    return Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling, **more)


def _submit(engine, requests):
    """Returns what each request has heard so far; it grows as steps are taken."""
    heard = [[] for _ in requests]
    tickets = [engine.submit(request, pieces.append) for request, pieces in zip(requests, heard, strict=True)]
    return tickets, heard


def _run(engine, requests):
    """Draws the texts of all requests together; returns their tokens."""
    tickets, heard = _submit(engine, requests)
    while engine.step():
        pass
    assert all(ticket.has_ended for ticket in tickets)
    return [[piece.token for piece in pieces] for pieces in heard]


def _alone(model, request):
    model.engine.forget()
    return _run(model.engine, [request])[0]


def _pieces(engine, request):
    """Returns what a request hears, logprobs and all."""
    _, heard = _submit(engine, [request])
    while engine.step():
        pass
    return heard[0]


def _rope_type(cache_type):
    return "f16" if cache_type in config_lib.QUANTISED_CACHE_TYPES else None  # its rows are of 16 numbers


def _that_parts(base, shared):
    """Returns a prompt that begins as `base` does, and parts from it after `shared` tokens."""
    return (*base[:shared], 3 + (base[shared] - 2) % 317, *_prompt(9))


def _mixed(config, size=320):
    settings = expert_reduction.per_layer(config, (1, 0.5))
    requests = []
    for i, length in enumerate((1, 2, 31, 33, 64, 65, 100, 129, 40, 7, 20, 90)):
        more = dict(expert_reduction=settings) if i % 3 == 0 else {}
        more |= dict(num_logprobs=2) if i % 5 == 1 else {}
        requests.append(_request(_prompt(length, size), 6 + i, seed=i, temperature=float(i % 2), **more))
    return requests


@needs_kernels
@pytest.mark.parametrize("parallel", [3, 12])
def test_texts_together_are_those_alone(load, parallel):
    model = load(parallel=parallel, ctx_size=2048)
    requests = _mixed(model.config)
    expected = [_alone(model, request) for request in requests]
    model.engine.forget()
    assert _run(model.engine, requests) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


@needs_kernels
def test_texts_of_the_packaged_model_together_are_those_alone(load):
    model = load(mla_jax.generate.PACKAGED_MODEL, parallel=16, ctx_size=4096, ubatch=512)
    requests = _mixed(model.config, model.config.vocab_size)
    expected = [_alone(model, request) for request in requests]
    model.engine.forget()
    assert _run(model.engine, requests) == expected


@needs_kernels
def test_being_swapped_out_changes_no_text(load):
    model = load(ctx_size=320)  # five pages
    requests = [_request(_prompt(length), 100, ignore_eos=True) for length in (60, 50, 40)]
    expected = [_alone(model, request) for request in requests]
    model.engine.forget()
    assert _run(model.engine, requests) == expected
    stats = model.engine.stats()
    assert stats.preemptions > 0
    model.engine.forget()
    assert model.engine.stats().pages_free == stats.pages_total


@needs_kernels
@pytest.mark.parametrize(
    "settings",
    [*(dict(cache_type=name) for name in ("f16", "bf16", "q8_0", "q4_0")), dict(cache_type="q8_0", mla=1)],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_warm_is_cold(load, settings):
    model = load(ubatch=32, cache_type_rope=_rope_type(settings["cache_type"]), **settings)
    base = _prompt(200)
    for shared in SHARED:
        request = _request(_that_parts(base, shared), 8)
        cold = _alone(model, request)
        model.engine.forget()
        _run(model.engine, [_request(base, 1)])
        before = model.engine.stats().cached_tokens
        assert _run(model.engine, [request]) == [cold]
        assert model.engine.stats().cached_tokens - before == shared


@needs_kernels
@pytest.mark.parametrize("cache_type", config_lib.CACHE_TYPES)
def test_warm_logits_are_cold(load, cache_type):
    model = load(ubatch=32, cache_type=cache_type, cache_type_rope=_rope_type(cache_type))
    engine, base = model.engine, _prompt(200)
    for shared in SHARED:
        request = _request(_that_parts(base, shared), 8, ignore_eos=True, num_logprobs=20)
        engine.forget()
        cold = _pieces(engine, request)
        engine.forget()
        _run(engine, [_request(base, 1, num_logprobs=0)])
        before = engine.stats().cached_tokens
        assert _pieces(engine, request) == cold and len(cold) == 8
        assert engine.stats().cached_tokens - before == shared


def test_two_salts_share_no_rows(load):
    engine = load().engine
    prompt = _prompt(150)
    for salt, cached in (("a", 0), ("b", 0), ("a", 149)):
        before = engine.stats().cached_tokens
        _run(engine, [_request(prompt, 2, salt=salt)])
        assert engine.stats().cached_tokens - before == cached


def test_a_cancelled_request_ends_before_the_next_step(load):
    model = load()
    tickets, heard = _submit(model.engine, [_request(_prompt(9), 200), _request(_prompt(9), 20)])
    for _ in range(3):
        model.engine.step()
    tickets[0].cancel()
    model.engine.step()
    assert heard[0][-1].finish_reason == "cancel" and heard[0][-1].token == -1
    count = len(heard[0])
    while model.engine.step():
        pass
    assert len(heard[0]) == count and heard[1][-1].finish_reason == "length"
    waiting = _submit(model.engine, [_request(_prompt(9), 5)])
    waiting[0][0].cancel()
    assert not model.engine.step() and waiting[1][0][-1].finish_reason == "cancel"


@pytest.mark.parametrize("is_lost", [False, True], ids=["rows stay", "rows are lost"])
@pytest.mark.parametrize("name", ["prefill", "decode", "draw"])
def test_a_step_that_fails_ends_those_at_work_and_no_one_later(load, monkeypatch, name, is_lost):
    model = load()
    logprobs = dict(num_logprobs=1) if name == "draw" else {}
    victim, later = _request(_prompt(40), 9, **logprobs), _request(_prompt(20), 9)
    expected = _alone(model, later)
    original = getattr(steps, name)

    def fail(params, *args, **kwargs):
        if is_lost:
            jax.tree.map(lambda leaf: leaf.delete(), model.engine._device._layers)
        raise RuntimeError("the device stumbled")

    with monkeypatch.context() as patch:
        patch.setattr(steps, name, fail)
        _, heard = _submit(model.engine, [victim])
        while model.engine.step():
            pass
    assert isinstance(heard[0][-1], Failure) and "the device stumbled" in heard[0][-1].message
    assert getattr(steps, name) is original
    assert _run(model.engine, [later]) == [expected]
    model.engine.forget()
    assert model.engine.stats().pages_free == model.engine.stats().pages_total


def test_a_listener_that_raises_ends_its_own_request_alone(load):
    model = load()
    request = _request(_prompt(20), 9)
    expected = _alone(model, request)

    def listen(piece):
        raise OSError("nobody is there")

    ticket = model.engine.submit(_request(_prompt(30), 9), listen)
    assert _run(model.engine, [request]) == [expected]
    assert ticket.has_ended and model.engine.stats().failed == 1


def test_logits_that_are_not_finite_fail_their_request_and_leave_no_rows(load, monkeypatch):
    model = load()
    decode = steps.decode

    def spoil(params, *args, **kwargs):
        drawn, *rest = decode(params, *args, **kwargs)
        return np.full_like(drawn, steps.NOT_FINITE), *rest

    with monkeypatch.context() as patch:
        patch.setattr(steps, "decode", spoil)
        _, heard = _submit(model.engine, [_request(_prompt(150), 9)])
        while model.engine.step():
            pass
    assert "finite" in heard[0][-1].message
    assert model.engine.stats().pages_free == model.engine.stats().pages_total


def test_nothing_is_compiled_after_the_warm_up(load):
    model = load(ctx_size=448, ubatch=100, parallel=3)
    told = []
    model.engine.warm_up(lambda done, count, what: told.append((done, count)))
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    before = model.engine.stats().compiles
    for i, length in enumerate(RNG.integers(1, 200, 12)):
        more = dict(num_logprobs=1, logit_bias=((5, 1.0),)) if i % 3 == 0 else {}
        _run(model.engine, [_request(_prompt(int(length)), 3, **more)] * (1 + i % 3))
    assert model.engine.stats().compiles == before


def test_stop_texts_are_no_part_of_the_answer(load):
    model = load()
    request = _request(_prompt(20), 30, temperature=3.0, seed=4)
    _, heard = _submit(model.engine, [request])
    while model.engine.step():
        pass
    text = "".join(piece.text for piece in heard[0])
    stop = text[5:8]
    _, heard = _submit(model.engine, [dataclasses.replace(request, stop=("never met", stop))])
    while model.engine.step():
        pass
    assert "".join(piece.text for piece in heard[0]) == text[: text.index(stop)]
    assert (heard[0][-1].finish_reason, heard[0][-1].stop) == ("stop", stop)


def test_a_bias_forbids_and_forces(load):
    model = load()
    request = _request(_prompt(20), 6)
    first = _alone(model, request)[0]
    assert first not in _alone(model, dataclasses.replace(request, logit_bias=((first, -1e9),)))
    assert _alone(model, dataclasses.replace(request, logit_bias=((77, 1e9),))) == [77] * 6


def test_a_queue_has_an_end_and_an_engine_that_stops_takes_no_more(load):
    model = load(max_waiting=2)
    _submit(model.engine, [_request(_prompt(5), 2)] * 2)
    with pytest.raises(QueueFull, match="2 requests with 10 tokens wait already"):
        model.engine.submit(_request(_prompt(5), 2), lambda piece: None)
    while model.engine.step():
        pass
    assert model.engine.stats().rejected == 1 and model.engine.drain(1.0)
    with pytest.raises(Draining):
        model.engine.submit(_request(_prompt(5), 2), lambda piece: None)


def test_a_slot_is_saved_restored_and_erased(load, tmp_path):
    model = load()
    prompt = _prompt(100)
    _run(model.engine, [_request(prompt, 4)])
    slot = next(slot.id for slot in model.engine.slots() if slot.num_kept)
    num_tokens, num_bytes = model.engine.save_slot(slot, tmp_path / "a")
    assert num_tokens == 99 and num_bytes == (tmp_path / "a").stat().st_size
    cold = _alone(model, _request((*prompt, 5), 8))
    model.engine.forget()
    assert model.engine.restore_slot(1, tmp_path / "a") == list(prompt[:99])
    before = model.engine.stats().cached_tokens
    texts = _run(model.engine, [_request((*prompt, 5), 8)])
    assert model.engine.stats().cached_tokens - before == 99
    if cpu_kernels.available():
        assert texts == [cold]
    assert sum(model.engine.erase_slot(slot.id) for slot in model.engine.slots()) == 100
    with pytest.raises(ValueError, match="slot must be in"):
        model.engine.erase_slot(4)
