"""Smart Expert Reduction from its spelling to the text: settings, requests, layers, statistics."""

import dataclasses
import json

import numpy as np
import pytest
from synthetic import write_deepseek2

import mla_jax
from mla_jax import expert_reduction, presets, steps
from mla_jax.cli import expert_stats, main

V3 = presets.PRESETS["deepseek-v3"]  # 8 experts a token, layers 0 to 2 dense
PROMPT = [0, *np.random.default_rng(7).integers(3, 320, 19).tolist()]
GREEDY = dict(temperature=0.0)


@pytest.mark.parametrize(("text", "setting"), [("6,1", (6, 1.0)), ("4,0.2", (4, 0.2)), ("1,0", (1, 0.0))])
def test_parse(text, setting):
    assert expert_reduction.parse(text) == setting


@pytest.mark.parametrize(
    "text", ["", "6", "6,1,1", "0,1", "-1,1", "6,-0.1", "6,nan", "6,inf", "6.5,1", "a,1", "6,b", "6,"]
)
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(
        ValueError, match="-ser must be Kmin,t with whole Kmin from 1 and finite t from 0 on, got"
    ):
        expert_reduction.parse(text)


def test_settings_without_effect_are_off():
    per_layer = lambda *args: expert_reduction.per_layer(V3, *args)
    off = (expert_reduction.OFF,) * 61
    assert per_layer(None) == per_layer((8, 1.0)) == per_layer((3, 0.0)) == off
    assert per_layer((6, 1.0)) == off[:3] + ((6, 1.0),) * 58
    assert per_layer((6, 1.0), {5: (2, 0.5), 0: (1, 1.0)})[4:7] == ((6, 1.0), (2, 0.5), (6, 1.0))
    assert per_layer((6, 1.0), {0: (1, 1.0)})[0] == expert_reduction.OFF  # a dense layer
    for layer in (-1, 61):
        with pytest.raises(ValueError, match=rf"must be in \[0, 61\), got {layer}"):
            per_layer(None, {layer: (2, 0.5)})
    for setting, words in [((0, 1.0), "Kmin"), ((2.0, 1.0), "Kmin"), ((2, float("nan")), "t of the")]:
        with pytest.raises(ValueError, match=words):
            per_layer(setting)
    dense = dataclasses.replace(V3, moe=None, num_dense_layers=61)
    assert expert_reduction.per_layer(dense, (6, 1.0)) == off


def test_how_many_experts_a_setting_gives_a_token():
    config = presets.PRESETS["deepseek-v2-lite"]  # 6 experts a token, in 26 of 27 layers
    of = lambda setting, layers=None: expert_reduction.experts_per_token(
        config, expert_reduction.per_layer(config, setting, layers)
    )
    assert of(None) == of((4, 0.0)) == of((9, 1.0)) == (6, 6)
    assert of((4, 1.0)) == (4, 4) and of((4, 0.4)) == (4, 6) and of((4, 1.5)) == (4, 6)
    assert of(None, {0: (1, 1.0), 5: (2, 0.5)}) == (pytest.approx(6 - 4 / 26), 6)
    dense = dataclasses.replace(config, num_dense_layers=27)
    assert expert_reduction.experts_per_token(dense, (expert_reduction.OFF,) * 27) is None


def test_words_are_equal_if_settings_are():
    describe = lambda *args: expert_reduction.describe(expert_reduction.per_layer(V3, *args))
    assert describe(None) == describe((9, 1.0)) == "off"
    texts = [describe((6, 1.0)), describe((6, 0.9)), describe((5, 1.0)), describe(None, {5: (6, 1.0)})]
    assert len({*texts, "off"}) == 5
    assert describe((6, 1.0)) == describe(None, {layer: (6, 1.0) for layer in range(61)})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"3": 4}',
        '{"3": [4]}',
        '{"x": [4, 0.2]}',
        '{"3": [0, 0.2]}',
        '{"3": [4, NaN]}',
        '{"3": [true, 1]}',
        '{"3": [4, "1"]}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_a_file_of_other_json_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json must be a JSON object of settings by layer"):
        expert_reduction.read_layers(tmp_path / "a.json")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=3)
    return str(path)


@pytest.fixture(scope="module")
def model(path):
    return mla_jax.load(path, ctx_size=64, ubatch=32, compilation_cache=None)


def test_a_request_has_its_own_setting_and_nothing_is_compiled_for_it(path, model):
    plain = model.generate(PROMPT, max_tokens=12, **GREEDY).tokens
    compiled = steps.decode._cache_size(), steps.prefill._cache_size()
    reduced = model.generate(PROMPT, max_tokens=12, expert_reduction=(1, 1.0), **GREEDY).tokens
    assert (steps.decode._cache_size(), steps.prefill._cache_size()) == compiled
    assert reduced != plain
    assert model.generate(PROMPT, max_tokens=12, expert_reduction=(1, 0.0), **GREEDY).tokens == plain
    loaded = mla_jax.load(path, ctx_size=64, ubatch=32, expert_reduction=(1, 1.0), compilation_cache=None)
    assert loaded.generate(PROMPT, max_tokens=12, **GREEDY).tokens == reduced
    assert loaded.generate(PROMPT, max_tokens=12, expert_reduction=(1, 0.0), **GREEDY).tokens == plain


def test_a_cache_is_not_shared_between_settings(model, tmp_path):
    settings = [(1, 1.0), (1, 0.0), (1, 0.0)]
    cached = []
    for setting in settings:
        model.generate(PROMPT, max_tokens=1, reuse_prefix=True, expert_reduction=setting)
        cached.append(model.timings.cached_tokens)
    assert cached == [0, 0, len(PROMPT) - 1]
    model.generate(PROMPT, max_tokens=1, expert_reduction=(1, 1.0))
    model.save_cache(tmp_path / "a")
    with pytest.raises(ValueError, match="expert_reduction must be 'off' as in this run, got 'off 1,1 1,1'"):
        model.load_cache(tmp_path / "a")


def test_routing_is_that_of_the_pass(path, model):
    ids, weights = model.routing(PROMPT * 2)
    moe = model.config.moe
    assert ids.shape == weights.shape == (2, 40, moe.num_experts_per_token)
    assert ids.max() < moe.num_experts
    other = mla_jax.load(path, ctx_size=64, ubatch=7, compilation_cache=None)
    np.testing.assert_array_equal(other.routing(PROMPT * 2)[0], ids)
    model.expert_reduction = expert_reduction.per_layer(model.config, (1, 1.0), {1: (2, 1.0)})
    try:
        reduced, weights = model.routing(PROMPT)
    finally:
        model.expert_reduction = expert_reduction.per_layer(model.config, None)
    kept = (reduced < moe.num_experts).sum(-1)
    assert (kept[0] == 2).all() and (kept[1] == 1).all()
    assert (weights[1][:, 1:] == 0).all() and (weights[1][:, 0] > 0).all()


@pytest.fixture
def run(path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "use_compilation_cache", lambda folder: None)

    def run(*args):
        code = main(["generate", "-m", path, "-c", "64", "-p", "the latent", "-n", "4", "--temp", "0", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_statistics_are_told(run, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"2": [2, 1.0]}))
    code, _, err = run("-ser", "1,1", "--ser-layers", str(tmp_path / "a.json"), "--expert-stats")
    assert code == 0 and "experts a token: 1.50 of 3 kept" in err
    rows = [line.split() for line in err.splitlines() if line[:1] in "12" and "of 8" in line]
    assert [row[:5] for row in rows] == [["1", "1.00", "100%", "0%", "0%"], ["2", "2.00", "0%", "100%", "0%"]]


def test_a_setting_without_effect_is_told(run):
    assert "Smart Expert Reduction has no effect: the model takes 3 experts a token" in run("-ser", "3,1")[2]
    assert "no effect" not in run("-ser", "2,1")[2]
    code, out, err = run("-ser", "2")
    assert (code, out) == (2, "") and err.startswith("mla-jax: -ser must be Kmin,t")


def test_the_table_counts_what_it_was_given():
    config = dataclasses.replace(
        V3,
        moe=dataclasses.replace(
            V3.moe, num_experts=4, num_experts_per_token=2, num_groups=1, num_groups_used=1
        ),
    )
    ids = np.asarray([[[0, 1], [0, 4], [2, 4], [0, 3]]], np.int32)
    head, _, row = expert_stats.describe(ids, config).splitlines()
    assert head == "experts a token: 1.50 of 2 kept, over 4 tokens"
    assert row.split() == "3 1.50 50% 50% 4 of 4 0 50%, 1 17%, 2 17%, 3 17%".split()
