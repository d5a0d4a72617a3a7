"""An engine on meshes of CPU devices: groups of them draw the texts that one device draws."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import hparams
from mla_jax import expert_reduction, steps
from mla_jax.config import RunConfig
from mla_jax.generate import Model
from mla_jax.nn import moe
from mla_jax.sampler import SamplingParams
from mla_jax.serve.request import Failure, Request

SIZES = dict(ctx_size=256, ubatch=32, keep_drawn=False)  # four pages for each group


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return path


def _compiled_fast(name):
    """Returns a step of which XLA optimises little, for a third of the time."""
    function = getattr(steps, name).__wrapped__
    donated = ("recent", "cache") if name == "decode" else ("cache",)
    static = dict(static_argnames=("config", "run"), donate_argnames=donated)
    return jax.jit(function, **static, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def load(path):
    """Returns a function that loads the model on a mesh, or on one device."""
    names = ("prefill", "decode", "draw")
    programs = types.SimpleNamespace(**vars(steps) | {name: _compiled_fast(name) for name in names})

    def load(axes, **sizes):
        settings = SIZES | dict(programs=programs) | sizes
        run = RunConfig(cache_type="f32")
        if axes:
            checkpoint, shard = checkpoints_tools.load_on_mesh(path, axes, progress=lambda *_: None)
            run = dataclasses.replace(run, shard=shard)
        else:
            checkpoint = checkpoints_tools.load_gguf(path, progress=lambda *_: None)
        vocabulary = hparams.vocabulary(checkpoint.metadata, checkpoint.config, checkpoint.path)
        return Model(checkpoint.params, checkpoint.config, vocabulary, run=run, **settings)

    return load


@pytest.fixture(scope="module")
def alone(load):
    """Returns a model on one device."""
    return load({}, parallel=1, ctx_size=256)


@pytest.fixture(scope="module")
def warm(load):
    """Returns a model on a mesh of two groups of two devices, whose programs are all compiled."""
    model = load(dict(data=2, expert=2), parallel=3)
    model.engine.warm_up(lambda *_: None)
    return model


def _request(length, max_tokens=12, seed=0, temperature=0.0, prompt=None, **more):
    rng = np.random.default_rng(1000 * seed + length)
    prompt = tuple(rng.integers(3, 320, length).tolist()) if prompt is None else prompt
    sampling = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    return Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling, ignore_eos=True, **more)


def _texts(engine, requests):
    heard = [[] for _ in requests]
    for request, pieces in zip(requests, heard, strict=True):
        engine.submit(request, pieces.append)
    while engine.step():
        pass
    return [[piece.token for piece in pieces] for pieces in heard]


def _texts_alone(model, requests):
    texts = []
    for request in requests:
        model.engine.forget()
        texts += _texts(model.engine, [request])
    return texts


def _mixed(config):
    reduced = expert_reduction.per_layer(config, (1, 0.5))
    kinds = [{}, dict(expert_reduction=reduced), dict(num_logprobs=2, logit_bias=((7, 2.0),))]
    lengths = enumerate((1, 40, 2, 65, 33, 100, 7, 90))
    return [_request(length, 5 + i, i, float(i % 2), **kinds[i % 3]) for i, length in lengths]


def test_texts_on_a_mesh_are_those_of_one_device(load, alone):
    requests = [it for it in _mixed(alone.config) if it.num_logprobs is None]
    model = load(dict(data=2), parallel=1)
    assert model.engine.stats().num_slots == 2
    assert _texts(model.engine, requests) == _texts_alone(alone, requests)


def test_texts_of_groups_that_share_out_experts_are_those_of_one_device(warm, alone):
    requests, before = _mixed(alone.config), warm.engine.stats()
    assert before.num_slots == 4 and before.pages_total == 8
    assert _texts(warm.engine, requests) == _texts_alone(alone, requests)
    after = warm.engine.stats()
    assert after.compiles - before.compiles <= 6, "those of the model on one device"
    warm.engine.forget()
    assert warm.engine.stats().pages_free == 8


def test_a_group_without_a_request_asks_no_expert(alone):
    nothing = expert_reduction.arrays(alone.engine._device._no_row.reduction).of_layer(1).of_tokens(5)
    scores, settings = np.random.default_rng(0).random((5, 8), np.float32), alone.config.moe
    ids, _ = moe.select_experts(scores, np.zeros(8, np.float32), settings, reduction=nothing)
    np.testing.assert_array_equal(ids, settings.num_experts)


def test_nothing_is_compiled_after_the_warm_up(warm, tmp_path):
    engine, before = warm.engine, warm.engine.stats()
    engine.forget()
    swapped = [_request(length, 100, length) for length in (60, 50, 40, 30)]
    _texts(engine, swapped)
    again = [_request(9, 3, i, prompt=(*swapped[i % 4].prompt[:-1], i), num_logprobs=1) for i in range(8)]
    _texts(engine, again)
    slot = next(slot.id for slot in engine.slots() if slot.num_kept)
    engine.save_slot(slot, tmp_path / "rows")
    engine.restore_slot(3 - slot, tmp_path / "rows")
    after = engine.stats()
    assert after.preemptions > before.preemptions and after.cached_tokens > before.cached_tokens
    assert after.compiles == before.compiles


def test_rows_that_are_swapped_out_shared_and_restored_change_no_text(warm, alone, tmp_path):
    engine = warm.engine
    engine.forget()
    swapped = [_request(length, 100, length) for length in (60, 50, 40, 30)]
    expected = _texts_alone(alone, swapped)
    before = engine.stats()
    assert _texts(engine, swapped) == expected
    assert engine.stats().preemptions > before.preemptions
    warm_ones = [dataclasses.replace(it, prompt=(*it.prompt[:-2], 5)) for it in swapped]
    assert _texts(engine, warm_ones) == _texts_alone(alone, warm_ones)
    assert engine.stats().cached_tokens - before.cached_tokens > 100
    kept = next(slot for slot in engine.slots() if slot.num_kept)
    engine.save_slot(kept.id, tmp_path / "rows")
    engine.forget()
    tokens = engine.restore_slot(3 - kept.id, tmp_path / "rows")
    request, before = _request(0, 9, prompt=(*tokens, 8)), engine.stats()
    assert _texts(engine, [request]) == _texts_alone(alone, [request])
    assert engine.stats().cached_tokens - before.cached_tokens == kept.num_kept


@pytest.mark.parametrize("is_lost", [False, True], ids=["rows stay", "rows are lost"])
def test_a_step_that_fails_on_a_mesh_ends_those_at_work(warm, alone, monkeypatch, is_lost):
    engine, requests = warm.engine, [_request(20 + i, 6, i) for i in range(6)]
    expected, programs = _texts_alone(alone, requests), engine._device._steps
    original = programs.decode

    def fail(*args, **settings):
        if is_lost:
            jax.tree.map(lambda leaf: leaf.delete(), engine._device._layers)
        monkeypatch.setattr(programs, "decode", original)
        raise RuntimeError("the device stumbled")

    monkeypatch.setattr(programs, "decode", fail)
    heard = [[] for _ in requests]
    for request, pieces in zip(requests, heard, strict=True):
        engine.submit(request, pieces.append)
    while engine.step():
        pass
    is_failed = [isinstance(pieces[-1], Failure) for pieces in heard]
    assert sum(is_failed) == (4 if is_lost else 2)  # all that run, or the first of each group
    assert [piece.token for piece in heard[5]] == expected[5]
    assert _texts(engine, requests) == expected
    engine.forget()
    assert engine.stats().pages_free == 8
