"""Taps from outside: recording changes nothing, edits reach what follows, unused they leave no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, RUN, draw_params, draw_tokens, run
from synthetic import write_deepseek2

import cpu_kernels
import mla_jax
from mla_jax import quant, sampler, taps
from mla_jax.cache import init_cache, init_pool
from mla_jax.config import RunConfig, Taps
from mla_jax.nn import mla, moe, transformer
from mla_jax.nn.moe import ExpertReduction

TOKENS = draw_tokens(2, 12)
EDITABLE = [name for name in taps.names(CONFIG) if not name.startswith("attn_lse")]
needs_kernels = pytest.mark.skipif(not cpu_kernels.available(), reason="the CPU kernels are not built")


@pytest.fixture(scope="module")
def params():
    return draw_params()


def _steered(vector):
    factor = lambda positions: (1 + positions[..., None] % 3).astype(jnp.float32)
    return {"resid.1": lambda value, positions: value + vector[None, None] * factor(positions)}


@needs_kernels
@pytest.mark.parametrize(
    ("cache_type", "for_gpu"), [(None, False), ("q8_0", False), ("f16", True)], ids=["none", "q8_0", "gpu"]
)
def test_to_record_or_to_edit_by_the_identity_changes_no_bit(params, cache_type, for_gpu):
    """With kernels, which compute what taps look into; with a cache also for each row of a batch.

    Those of a GPU are traced alone, which fails where a value that is wanted arises within.
    """
    encode = lambda path, leaf: (
        leaf if path[-2].key != "gate" else jax.tree.map(jnp.asarray, quant.encode(leaf, "q8_0"))
    )
    weights = jax.tree_util.tree_map_with_path(encode, params)
    settings = dict(config=CONFIG, run=RunConfig(cache_type=cache_type or "f16", gpu_kernels=for_gpu))
    empty = lambda batch: (
        None if cache_type is None else init_cache(*settings.values(), batch=batch, ctx_size=40)
    )
    identity = {name: lambda value, positions: value for name in EDITABLE}
    with jax.default_matmul_precision(None):
        tokens = draw_tokens(2, 40)
        plain = taps.run(weights, tokens, empty(2), **settings)
        record, edits = (("latent.*",), {}) if for_gpu else (("*",), identity)
        tapped = taps.run(weights, tokens, empty(2), record=record, edits=edits, **settings)
        rows = [
            taps.run(weights, row[None], empty(1), record=("*",), **settings)
            for row in tokens
            if cache_type == "q8_0"
        ]
    assert not plain[2] and (for_gpu or list(tapped[2]) == taps.names(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, plain[:2], tapped[:2])
    for i, (_, _, seen) in enumerate(rows):
        for name, value in seen.items():
            atol = 1e-5 if name.startswith("attn_lse") else 0  # XLA gives it
            np.testing.assert_allclose(value[0], tapped[2][name][i], rtol=0, atol=atol, err_msg=name)


def test_without_taps_the_lowered_code_is_as_if_there_were_none(params, monkeypatch):
    def lowered(run):
        forward = jax.jit(lambda *args: transformer.apply(*args, CONFIG, run))
        return forward.lower(params, TOKENS, init_cache(CONFIG, run, batch=2, ctx_size=16)).as_text()

    assert taps.tapped(RUN) == RUN
    found, other = lowered(RUN), lowered(taps.tapped(RUN, record=("latent.0",)))
    for module in (mla, moe, transformer):
        monkeypatch.setattr(module, "tap", lambda module, name, value, positions: value)
    monkeypatch.setattr(mla, "is_tapped", lambda module, *names: False)
    assert found == lowered(dataclasses.replace(RUN, attention_max_batch=255))  # another run: traced anew
    assert other != found


@pytest.mark.parametrize("mode", [0, 1, 3])
def test_an_edit_of_a_latent_reaches_the_cache(params, mode):
    settings = RunConfig(mla=mode, cache_type="f32")
    cache = init_cache(CONFIG, settings, batch=2, ctx_size=16)
    edits = {"latent.1": lambda value, positions: value * 0, "k_rope.1": lambda value, positions: value * 0}
    _, cache, _ = run(params, TOKENS, cache, run=settings, edits=edits)
    for leaf in jax.tree.leaves(cache.layers[1]):
        assert not leaf[:, :12].any()
    assert all(leaf[:, :12].any() for leaf in jax.tree.leaves(cache.layers[0]))


def test_edits_are_seen_by_all_that_follows_and_by_nothing_before(params):
    _, _, plain = run(params, TOKENS, record=("*",))
    _, _, seen = run(params, TOKENS, record=("*",), edits={"attn_out.1": lambda value, positions: value + 1})
    changed = {name for name in seen if not np.array_equal(seen[name], plain[name])}
    after = {"attn_out.1", "router.1", "expert_weights.1", "ffn_out.1", "resid.2", "logits"}
    assert changed - {"expert_ids.1"} == after
    np.testing.assert_array_equal(seen["attn_out.1"], plain["attn_out.1"] + 1)


def test_an_edit_of_any_value_reaches_the_logits(params):
    def moved(share):
        """Edits the value whose share is 1."""
        edit = lambda share: lambda value, positions: jnp.where(share > 0, 5 - value, value)
        edits = {name: edit(share[i]) for i, name in enumerate(EDITABLE)}
        return run(params, TOKENS, edits=edits)[0]

    which = jnp.concatenate([jnp.zeros((1, len(EDITABLE))), jnp.eye(len(EDITABLE))])
    plain, *others = jax.vmap(moved)(which)
    for name, logits in zip(EDITABLE, others, strict=True):
        assert np.abs(logits - plain).max() > 1e-3, name


def test_edits_apply_in_the_order_given_and_those_of_the_run_first(params):
    double = Taps(edits=(("logits", lambda value, positions: 2 * value),))
    edits = {"*its": lambda value, positions: value + 1}
    plain, _, _ = run(params, TOKENS)
    edited, _, _ = run(params, TOKENS, run=dataclasses.replace(RUN, taps=double), edits=edits)
    np.testing.assert_allclose(edited, 2 * plain + 1, rtol=1e-6)


def test_an_edit_in_every_decode_step_is_that_of_one_prefill(params):
    """Also over pages, and with what depends on positions."""
    vector = np.random.default_rng(0).standard_normal(CONFIG.embed_dim, dtype=np.float32)
    settings = dict(record=("*",), edits=_steered(vector))
    whole, _, expected = run(params, TOKENS, **settings)
    cache = init_pool(CONFIG, RUN, batch=2, num_pages=2, page_size=32)
    pages = jnp.asarray([[1], [0]], jnp.int32)
    _, cache, seen = run(params, TOKENS[:, :9], cache, pages=pages, **settings)
    parts = [seen]
    for t in range(9, 12):
        _, cache, seen = run(params, TOKENS[:, t : t + 1], cache, pages=pages, **settings)
        parts.append(seen)
    for name, value in expected.items():
        found = np.concatenate([part[name] for part in parts], axis=1)
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert np.abs(whole - run(params, TOKENS)[0]).max() > 0.1


def test_generate_is_prefill_of_what_it_drew(params):
    vector = 3 * np.random.default_rng(1).standard_normal(CONFIG.embed_dim, dtype=np.float32)
    settings = dict(record=("logits", "latent.*"), edits=_steered(vector))
    drawn, seen = taps.generate(params, TOKENS, 8, config=CONFIG, run=RUN, **settings)
    assert drawn.shape == (2, 8)
    tokens = np.concatenate([TOKENS, drawn], axis=1)
    _, _, expected = run(params, tokens, **settings)
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(drawn, seen["logits"][:, 11:-1].argmax(-1))
    assert (drawn != run(params, tokens)[0][:, 11:-1].argmax(-1)).any()  # without the edits


def test_a_steering_vector_has_a_gradient(params):
    """Experts are held fixed, so that the loss is smooth."""
    experts = taps.replay(run(params, TOKENS, record=("expert_ids.*",))[2])
    way = jnp.asarray(np.random.default_rng(2).standard_normal(CONFIG.embed_dim), jnp.float32)

    def loss(vector):
        edits = {"resid.1": lambda value, positions: value + vector[None, None]}
        logits, _, _ = taps.run(params, TOKENS, config=CONFIG, run=RUN, edits=edits | experts)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 7])

    slope, step = jnp.vdot(jax.grad(loss)(jnp.zeros_like(way)), way), 1e-2
    loss = jax.jit(loss)
    assert slope == pytest.approx(float(loss(step * way) - loss(-step * way)) / (2 * step), rel=1e-2)


def test_vmap_over_edits_is_each_alone(params):
    vectors = np.random.default_rng(3).standard_normal((3, CONFIG.embed_dim), dtype=np.float32)

    def steer(vector):
        edits = {"resid.*": lambda value, positions: value + vector[None, None]}
        return run(params, TOKENS, edits=edits, record=("resid.2",))[::2]

    logits, seen = jax.vmap(steer)(vectors)
    for i, vector in enumerate(vectors):
        alone, seen_alone = steer(vector)
        np.testing.assert_allclose(logits[i], alone, atol=1e-4)
        np.testing.assert_allclose(seen["resid.2"][i], seen_alone["resid.2"], atol=1e-4)


def _reduction(minimum, threshold, temperature=None):
    temperature = None if temperature is None else jnp.float32(temperature)
    minimum, threshold = jnp.full((2,), minimum, jnp.int32), jnp.full((2,), threshold, jnp.float32)
    return ExpertReduction(minimum=minimum, threshold=threshold, temperature=temperature)


@pytest.mark.parametrize("reduction", [None, _reduction(1, 0.9)], ids=["plain", "reduced"])
def test_replayed_experts_are_those_of_the_other_run_weighted_by_this_one(params, reduction):
    """Into a run whose latents are coarse, in two calls, with experts left out and without."""
    _, _, first = run(params, TOKENS, record=("expert_ids.*",), reduction=reduction)
    coarse = RunConfig(cache_type="q4_1")
    record = ("expert_ids.1", "router.1", "expert_weights.1")
    settings = dict(run=coarse, record=record, reduction=reduction)
    cache = lambda: init_cache(CONFIG, coarse, batch=2, ctx_size=16)
    _, _, free = run(params, TOKENS, cache(), **settings)
    assert (free["expert_ids.1"] != first["expert_ids.1"]).any()
    assert (first["expert_ids.1"] == 6).any() == (reduction is not None)
    settings |= dict(edits=taps.replay(first))
    _, cache, seen = run(params, TOKENS[:, :6], cache(), **settings)
    _, _, last = run(params, TOKENS[:, 6:], cache, **settings)
    seen = {name: np.concatenate([value, last[name]], axis=1) for name, value in seen.items()}
    np.testing.assert_array_equal(seen["expert_ids.1"], first["expert_ids.1"])
    probs = np.pad(1 / (1 + np.exp(-seen["router.1"])), ((0, 0), (0, 0), (0, 1)))  # of E it is 0
    chosen = np.take_along_axis(probs, np.asarray(first["expert_ids.1"]), axis=-1)
    expected = chosen / chosen.sum(-1, keepdims=True) * CONFIG.moe.weights_scale
    np.testing.assert_allclose(seen["expert_weights.1"], expected, rtol=1e-5)


def test_replay_of_the_own_experts_changes_no_bit(params):
    for reduction in (_reduction(2, 0.8), _reduction(1, 0.8, temperature=0.1)):
        logits, _, seen = run(params, TOKENS, record=("expert_ids.*",), reduction=reduction)
        again, _, _ = run(params, TOKENS, edits=taps.replay(seen), reduction=reduction)
        np.testing.assert_array_equal(again, logits)


def test_tokens_beyond_what_is_replayed_choose_for_themselves(params):
    _, _, seen = run(params, TOKENS, record=("expert_ids.*",))
    others = {"expert_ids.1": (seen["expert_ids.1"][:, :5] + 1) % 6}
    _, _, forced = run(params, TOKENS, edits=taps.replay(others), record=("expert_ids.*", "resid.1"))
    np.testing.assert_array_equal(forced["expert_ids.1"][:, :5], others["expert_ids.1"])
    np.testing.assert_array_equal(forced["expert_ids.1"][:, 5:], seen["expert_ids.1"][:, 5:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(record=("latent.2",)),
            r"a tap must be one of resid.0 to resid.2, .*router.1, .*got 'latent.2'",
        ),
        (dict(record=("router.0",)), "got 'router.0'"),
        (dict(record=("x*",)), r"or a pattern such as 'resid.\*', got 'x\*'"),
        (dict(edits={"resid": lambda value, positions: value}), "got 'resid'"),
        (
            dict(edits={"attn_lse.1": lambda value, positions: value}),
            "edits must be of values that something is computed from, got attn_lse.1",
        ),
        (
            dict(edits={"latent.1": lambda value, positions: value[:, :3]}),
            r"the edit of latent.1 must return float32\[2, 12, 64\], got float32\[2, 3, 64\]",
        ),
        (
            dict(edits={"latent.1": lambda value, positions: value.astype(jnp.bfloat16)}),
            r"must return float32\[2, 12, 64\], got bfloat16",
        ),
        (dict(edits={"latent.1": lambda value, positions: None}), "must return .* got None"),
        (dict(edits={"latent.1": 3}), "edits must be names and functions, got 'latent.1' and 3"),
        (
            dict(edits=taps.replay({"expert_ids.1": jnp.zeros((1, 12, 3), jnp.int32)})),
            r"experts to replay must be \(2, 3\), \(B, K\), got \(1, 3\)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_bad_taps_are_told(params, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(params, TOKENS, **arguments)


def test_bad_arguments_are_told(params):
    with pytest.raises(ValueError, match=r"record must be a tuple of names, got 'resid.1'"):
        Taps(record="resid.1")
    for call in (taps.run, functools.partial(taps.generate, num_tokens=1)):
        with pytest.raises(ValueError, match=r"record must be a tuple or list of names, got 'resid.\*'"):
            call(params, TOKENS, config=CONFIG, run=RUN, record="resid.*")
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        taps.generate(params, TOKENS, 0, config=CONFIG, run=RUN)
    with pytest.raises(ValueError, match=r"seen must have expert_ids of some layer, got latent.1"):
        taps.replay({"latent.1": jnp.zeros((1, 2, 3))})


@pytest.fixture(scope="module")
def steered_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "nano.gguf"
    write_deepseek2(path, layers=2)
    edits = _steered(np.random.default_rng(5).standard_normal(64, dtype=np.float32))
    return mla_jax.load(path, ctx_size=64, ubatch=32, edits=edits, compilation_cache=None), edits


def test_texts_of_a_model_with_edits(steered_model, tmp_path):
    """The engine draws what `taps.generate` draws, greedily and by a seed; caches do not leave it."""
    model, edits = steered_model
    prompt = model.tokenizer.encode("the letters")
    plain = dataclasses.replace(model.run, taps=None)
    for options in (dict(temperature=0.0), dict(temperature=1.0, repeat_penalty=2.0, seed=7)):
        expected, _ = taps.generate(
            model.params,
            np.asarray([prompt], np.int32),
            8,
            config=model.config,
            run=plain,
            edits=edits,
            sampling=sampler.batch([sampler.SamplingParams(**dict(seed=0) | options)]),
        )
        assert model.generate(prompt, max_tokens=8, **options).tokens == tuple(expected[0].tolist())
    with pytest.raises(ValueError, match=r"of a model without edits, got edits of resid.1"):
        model.save_cache(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_model_for_texts_takes_no_record_and_no_unknown_name(steered_model):
    model, _ = steered_model
    build = lambda taps: mla_jax.Model(
        model.params, model.config, None, run=RunConfig(taps=taps), ctx_size=64
    )
    with pytest.raises(ValueError, match=r"record must be empty for texts, .* got resid.1"):
        build(Taps(record=("resid.1",)))
    with pytest.raises(ValueError, match=r"got 'latent.9'"):
        build(Taps(edits=(("latent.9", lambda value, positions: value),)))
