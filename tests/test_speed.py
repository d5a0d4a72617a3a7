"""Speeds are tokens over seconds, at the depths that are told; a clock of our own counts here."""

import math

import pytest
from synthetic import write_deepseek2

import mla_jax
from mla_jax import speed


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=1)
    return path


@pytest.fixture(scope="module")
def model(path):
    return mla_jax.load(path, ctx_size=100, cache_ram=0, compilation_cache=None)


@pytest.fixture
def requests(model, monkeypatch):
    """What the engine is asked for: (tokens of the prompt, tokens to draw, those found in the cache)."""
    asked, original = [], model.engine.stream

    def stream(request):
        assert request.ignore_eos and request.sampling.temperature == 0
        ticket, pieces = original(request)

        def told():
            yield from pieces
            asked.append((len(request.prompt), request.max_tokens, ticket.timings.cached_tokens))

        return ticket, told()

    monkeypatch.setattr(model.engine, "stream", stream)
    return asked


def test_a_sweep_goes_deeper_until_the_context_is_full(model, requests):
    rows = list(speed.sweep(model, prompt=30, predict=5))
    assert [(row.depth, row.prompt, row.predict) for row in rows] == [(0, 30, 5), (30, 30, 5), (60, 30, 5)]
    warm_up = [(30, 1, 0), (1, 5, 0)]
    by_depth = [kind for depth in (0, 30, 60) for kind in [(depth + 1, 5, depth), (depth + 30, 1, depth)]]
    assert requests == warm_up + by_depth
    for row in rows:
        assert row.prompt_speed == 30 / row.prompt_seconds and row.predict_speed == 5 / row.predict_seconds


def test_a_sweep_times_from_the_request_to_the_last_token(model, monkeypatch):
    ticks = iter([0, 1, 0, 1, 10, 12, 20, 25])  # the engine has its own clock
    clock = type("Clock", (), {"perf_counter": staticmethod(lambda: next(ticks))})
    monkeypatch.setattr(speed, "time", clock)
    [row] = speed.sweep(model, prompt=50, predict=80)
    assert (row.predict_seconds, row.prompt_seconds, row.prompt_speed) == (2, 5, 10)


def test_a_bench_repeats_each_kind_after_one_that_does_not_count(model, requests):
    told = []
    sizes = dict(prompts=[8, 40], predicts=[3], depths=[0, 50], repetitions=2)
    results = speed.bench(model, **sizes, report=told.append)
    assert told == results
    assert [r.name for r in results] == ["pp8", "pp40", "tg3", "pp8 @ d50", "pp40 @ d50", "tg3 @ d50"]
    assert all(len(r.seconds) == 2 for r in results)
    assert requests[:9] == [(8, 1, 0)] * 3 + [(40, 1, 0)] * 3 + [(1, 3, 0)] * 3
    assert requests[9::4] == [(50, 1, 0)] * 3  # fills the cache
    assert [requests[9 + 4 * i + j] for i in range(3) for j in (1, 2, 3)] == [
        kind for kind in [(58, 1, 50), (90, 1, 50), (51, 3, 50)] for _ in range(3)
    ]


def test_mean_and_deviation_are_of_the_speeds():
    result = speed.Speed(prompt=0, predict=6, depth=0, seconds=(1.0, 2.0, 3.0))
    assert result.samples == (6, 3, 2) and result.mean == pytest.approx(11 / 3)
    wanted = math.sqrt(sum((sample - 11 / 3) ** 2 for sample in (6, 3, 2)) / 2)
    assert result.deviation == pytest.approx(wanted)
    assert speed.Speed(prompt=5, predict=0, depth=0, seconds=(1.0,)).deviation == 0


def test_bad_input_is_refused(model, path):
    cases = [
        (dict(prompts=[101], predicts=[]), "room for 101 tokens, got one of 100"),
        (dict(prompts=[20], depths=[90]), "room for 218 tokens"),
        (dict(prompts=[0]), "must be at least 1, got 0"),
        (dict(prompts=[], predicts=[]), "something to measure"),
        (dict(depths=[-1]), "depths must be at least 0, got -1"),
        (dict(repetitions=0), "repetitions must be at least 1, got 0"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            speed.bench(model, **arguments)
    with pytest.raises(ValueError, match="room for 128 tokens, got one of 100"):
        next(speed.sweep(model, prompt=30))
    forgetful = mla_jax.load(path, ctx_size=100, keep_drawn=False, compilation_cache=None)
    with pytest.raises(ValueError, match="got 1 after 29: it must keep drawn rows"):
        speed.bench(forgetful, prompts=[5], predicts=[], depths=[30])
