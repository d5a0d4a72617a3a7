"""The soak of `benchmarks/soak.py`, in small, and what it finds fault with."""

import dataclasses

import jax
import numpy as np
import pytest
from synthetic import write_deepseek2

import cpu_kernels
import mla_jax
from benchmarks import soak_run
from benchmarks.soak_run import Text, Work

WORK = Work(
    requests=60, distinct=30, longest=120, usual_text=150, longest_text=250, outstanding=16, growth=64.0
)
GOOD = dict(
    ended={"cancel": 12, "length": 48},
    preemptions=1,
    pages_lost=0,
    compiled_meanwhile=0,
    rss_mib=[100.0, 101.0, 99.0, 107.9],
    texts_that_differ=[],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a model for lone runs, and one whose six pages are too few for what its four slots ask for."""
    jax.clear_caches()  # after many other tests what is compiled may be forgotten, and compiled again
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    sizes = dict(ctx_size=384, ubatch=128, keep_drawn=False, compilation_cache=None)
    return [mla_jax.load(path, parallel=parallel, progress=lambda *_: None, **sizes) for parallel in (1, 4)]


def _soak(models, spoilt=()):
    lone, model = models
    tokens = np.random.default_rng(0).integers(3, 320, 1000).tolist()
    requests = soak_run.make_requests(model.config, tokens, WORK)
    expected = soak_run.lone_texts(lone.engine, requests, lambda done: None)
    for index in spoilt:
        tokens = (*expected[index].tokens[:-1], -7)
        expected[index] = dataclasses.replace(expected[index], tokens=tokens)
    model.engine.warm_up(lambda *_: None)
    model.engine.start()
    try:
        return soak_run.soak(model.engine, requests, expected, WORK, lambda done: None)
    finally:
        model.engine.stop()


def test_a_small_soak_finds_nothing_wrong(models):
    found = _soak(models)
    if not cpu_kernels.available():
        found["texts_that_differ"] = []  # they are alike up to rounding
    assert soak_run.faults(found, WORK) == []
    assert set(found["ended"]) >= {"cancel", "length"} and found["fewest_pages_free"] < 2
    assert 2 <= found["ended"]["cancel"] <= 20 and found["tokens_cached"] > 0


def test_texts_that_differ_are_found(models):
    found = _soak(models, spoilt=range(WORK.distinct))
    assert len(found["texts_that_differ"]) > WORK.distinct / 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(ended={"length": 59}), "60 requests must end"),
        (dict(ended={"length": 59, "failed": 1}), "no request must fail, got 1"),
        (dict(texts_that_differ=[3, 5]), "requests [3, 5] differ"),
        (dict(preemptions=0), "must be swapped out"),
        (dict(pages_lost=2), "got 2 lost"),
        (dict(compiled_meanwhile=1), "nothing must be compiled, got 1"),
        (dict(rss_mib=[100.0, 108.1, 108.1, 108.1]), "at most 8 MiB"),
    ],
    ids=["ended", "failed", "texts", "preemptions", "pages", "compiles", "memory"],
)
def test_what_is_wrong_is_told(change, words):
    work = dataclasses.replace(WORK, growth=8.0)
    assert soak_run.faults(GOOD, work) == []
    (sentence,) = soak_run.faults(GOOD | change, work)
    assert words in sentence


@pytest.mark.parametrize(
    ("text", "is_beginning"),
    [
        (Text((), "", "cancel"), True),
        (Text((5, 6), "ab", "cancel"), True),
        (Text((5, 6, 7), "abc", "cancel"), True),
        (Text((5, 6), "ab\N{REPLACEMENT CHARACTER}", "cancel"), True),
        (Text((5, 7), "ab", "cancel"), False),
        (Text((5, 6), "ac", "cancel"), False),
        (Text((5, 6, 7, 8), "abc", "cancel"), False),
    ],
    ids=["nothing", "some", "all", "half a character", "another token", "another text", "too much"],
)
def test_what_was_cancelled_is_a_beginning(text, is_beginning):
    assert text.begins(Text((5, 6, 7), "abc", "length")) == is_beginning
