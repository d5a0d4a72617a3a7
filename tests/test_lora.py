"""Adapters beside frozen weights: gradients beside a dense float32 copy, merging, every kind of weight."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import names
from mla_jax import lora, quant, taps, train
from mla_jax.cache import init_cache
from mla_jax.config import RunConfig
from mla_jax.nn import mla_alone
from mla_jax.nn.moe import ExpertReduction
from mla_jax.nn.transformer import apply

forward = jax.jit(apply, static_argnums=(3, 4))

TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 40)), jnp.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers, the second with experts, in Q8_0."""
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2, experts=4, used=2, weight_type="Q8_0")
    return checkpoints_tools.load_gguf(path, progress=lambda *_: None)


def _adapters(model, targets=lora.LINEAR):
    """Returns adapters that change something: their `b` is random as well."""
    made = lora.init(jax.random.key(0), model.params, rank=3, alpha=6.0, targets=targets)
    keys = jax.random.split(jax.random.key(1), len(made.adapters))
    filled = {
        name: dataclasses.replace(adapter, b=0.05 * jax.random.normal(key, adapter.b.shape))
        for key, (name, adapter) in zip(keys, made.adapters.items(), strict=True)
    }
    return dataclasses.replace(made, adapters=filled)


def _dense(params):
    """Returns a float32 copy of all weights."""
    decoded = {name: quant.decode(weight) for name, weight in names.flatten(params).items()}
    return names.unflatten(decoded)


def _mean_loss(params, model, **run):
    return train.token_losses(params, TOKENS, config=model.config, run=RunConfig(**run)).mean()


def test_new_adapters_change_nothing(model):
    made = lora.init(jax.random.key(0), model.params, rank=4, alpha=8.0)
    plain, _ = forward(model.params, TOKENS, None, model.config, RunConfig())
    with_them, _ = forward(lora.attach(model.params, made), TOKENS, None, model.config, RunConfig())
    np.testing.assert_array_equal(plain, with_them)
    assert all(float(jnp.abs(adapter.a).max()) > 0 for adapter in made.adapters.values())


def test_linear_targets_are_all_matrices_but_embedding_router_and_output(model):
    chosen = set(lora.init(jax.random.key(0), model.params, rank=1, alpha=1.0, targets=lora.LINEAR).adapters)
    matrices = {name for name, weight in names.flatten(model.params).items() if weight.ndim > 1}
    left = {re.sub(r"blk\.\d\.", "", name) for name in matrices - chosen}
    assert left == {"token_embd.weight", "output.weight", "ffn_gate_inp.weight"} and chosen < matrices


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_gradients_are_those_of_a_dense_copy(model, remat):
    adapters = _adapters(model)
    of = lambda params: jax.jit(
        jax.value_and_grad(lambda made: _mean_loss(lora.attach(params, made), model, remat=remat))
    )(adapters)
    (value, found), (expected_value, expected) = of(model.params), of(_dense(model.params))
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3
    for name in adapters.adapters:
        for part in ("a", "b"):
            pair = getattr(found.adapters[name], part), getattr(expected.adapters[name], part)
            np.testing.assert_allclose(*pair, rtol=2e-3, atol=2e-6, err_msg=f"{name} {part}")


def test_gradient_is_the_slope_of_the_loss(model):
    adapters = _adapters(model)
    loss = jax.jit(lambda made: _mean_loss(lora.attach(model.params, made), model))
    gradient = jax.jit(jax.grad(loss))(adapters)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    moved = lambda step: jax.tree.map(lambda x, g: x + step * g / norm, adapters, gradient)
    slope = (loss(moved(0.02)) - loss(moved(-0.02))) / 0.04
    np.testing.assert_allclose(slope, norm, rtol=0.01)


def test_forward_over_reverse_through_a_quantised_model(model):
    """A Hessian-vector product of the loss in the adapters, beside the difference of gradients."""
    adapters = _adapters(model, (r"blk\.1\.attn_q_b", r"blk\.1\.ffn_down_exps"))
    gradient = jax.jit(jax.grad(lambda made: _mean_loss(lora.attach(model.params, made), model)))
    direction = jax.tree.map(jnp.sin, adapters)
    product = jax.jit(lambda: jax.jvp(gradient, (adapters,), (direction,))[1])()
    moved = lambda step: gradient(jax.tree.map(lambda x, d: x + step * d, adapters, direction))
    difference = jax.tree.map(lambda up, down: (up - down) / 0.02, moved(0.01), moved(-0.01))
    for found, expected in zip(jax.tree.leaves(product), jax.tree.leaves(difference), strict=True):
        assert jnp.linalg.norm(found - expected) < 0.05 * jnp.linalg.norm(expected) + 1e-6


def test_merged_weights_are_the_weights_with_their_adapters(model):
    adapters = _adapters(model)
    attached = lora.attach(model.params, adapters, strength=0.5)
    exact = lora.merge(model.params, adapters, strength=0.5, format="f32")
    merged = names.flatten(lora.merge(model.params, adapters, strength=0.5))
    for name, weight in names.flatten(attached).items():
        expected = quant.decode(weight)
        if name in adapters.adapters:
            step = float(jnp.abs(expected).max()) / 127
            assert merged[name].format == "q8_0"
            np.testing.assert_allclose(quant.decode(merged[name]), expected, atol=0.53 * step)
    logits = forward(attached, TOKENS, None, model.config, RunConfig())[0]
    assert (
        float(jnp.abs(logits - forward(model.params, TOKENS, None, model.config, RunConfig())[0]).max()) > 0.1
    )
    found = forward(exact, TOKENS, None, model.config, RunConfig())[0]
    np.testing.assert_allclose(found, logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=["f32", "f16", "bf16"])
def test_weights_without_blocks_are_merged_in_their_type(dtype):
    params = {"output": {"weight": jnp.ones((8, 4), dtype)}}
    made = lora.init(jax.random.key(0), params, rank=2, alpha=2.0, targets=("output",))
    merged = lora.merge(lora.attach(params, made), made)["output"]["weight"]
    assert merged.dtype == dtype and (merged == 1).all()


def test_rows_of_a_weight_with_an_adapter():
    a, b = jnp.ones((2, 4)), jnp.arange(12.0).reshape(6, 2)
    weight, ids = quant.LoraTensor(base=jnp.zeros((6, 4)), a=a, b=b), jnp.asarray([5, 0])
    np.testing.assert_array_equal(quant.take_rows(weight, ids), (b @ a)[ids])
    with pytest.raises(ValueError, match="takes at most 0 indices"):
        weight[0]


def test_two_adapters_add_up(model):
    first, second = _adapters(model, (r"attn_q_a\.",)), _adapters(model, lora.ATTENTION)
    both = lora.attach(lora.attach(model.params, first), second, strength=-1.0)
    expected = quant.decode(names.flatten(lora.attach(model.params, first))["blk.0.attn_kv_a_mqa.weight"])
    found = names.flatten(both)
    assert quant.decode(found["blk.0.attn_kv_a_mqa.weight"]).shape == expected.shape
    for name, adapter in first.adapters.items():
        other = second.adapters[name]
        update = 2.0 * (adapter.b @ adapter.a - other.b @ other.a)  # alpha / rank is 2
        base = quant.decode(names.flatten(model.params)[name])
        np.testing.assert_allclose(quant.decode(found[name]), base + update, atol=1e-5)


@pytest.mark.parametrize("mla", [0, 3])
def test_adapters_serve_with_a_cache_as_without(model, mla):
    run = RunConfig(mla=mla, cache_type="f32")
    params = lora.attach(model.params, _adapters(model))
    expected, _ = forward(params, TOKENS, None, model.config, run)
    cache = init_cache(model.config, run, batch=2, ctx_size=64)
    prompt, cache = forward(params, TOKENS[:, :35], cache, model.config, run)
    rest, _ = forward(params, TOKENS[:, 35:], cache, model.config, run)
    found = jnp.concatenate([prompt, rest], axis=1)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_queries_in_blocks_attend_and_derive_as_in_one(model, monkeypatch):
    params = _dense(model.params)
    derive = lambda: jax.jit(jax.value_and_grad(lambda params: _mean_loss(params, model)))(params)
    whole = derive()
    monkeypatch.setattr(mla_alone, "BLOCK", 16)
    blocks = derive()
    for found, expected in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_training_through_the_flash_prefill(model):
    """The wiring of a GPU, whose op is computed by its reference here: operands are rounded to bfloat16."""
    params = _dense(model.params)
    of = lambda **run: jax.jit(jax.grad(lambda params: _mean_loss(params, model, **run)))(params)
    with jax.default_matmul_precision(None):
        short = of(gpu_kernels=True)
    for found, expected in zip(jax.tree.leaves(short), jax.tree.leaves(of()), strict=True):
        assert jnp.vdot(found, expected) >= 0.99 * jnp.linalg.norm(found) * jnp.linalg.norm(expected)


def test_a_threshold_of_expert_reduction_has_a_gradient(model):
    @jax.jit
    def loss(threshold):
        minimum, temperature = jnp.ones((2, 2), jnp.int32), jnp.float32(0.05)
        reduction = ExpertReduction(minimum=minimum, threshold=threshold, temperature=temperature)
        settings = dict(config=model.config, run=RunConfig(), reduction=reduction)
        return train.token_losses(model.params, TOKENS, **settings).mean()

    at = jnp.full((2, 2), 0.8)
    gradient = jax.jit(jax.grad(loss))(at)
    assert not gradient[0].any() and gradient[1].all()  # the first layer is dense
    step = jnp.zeros((2, 2)).at[1].set(1e-2)
    np.testing.assert_allclose(gradient[1].sum(), (loss(at + step) - loss(at - step)) / 2e-2, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(rank=65), "rank must be at most 64, a side of blk.0.attn_q_a.weight, got 65"),
        (dict(alpha=0.0), r"alpha must be a number from 2\^-64 to 2\^64, got 0\.0"),
        (dict(targets=("(",)), r"regular expressions, got '\('"),
        (dict(targets=("attn_qq",)), "got 'attn_qq'"),
        (dict(targets=("attn_norm",)), "must be of a matrix .* got 'blk.0.attn_norm.weight'"),
        (dict(targets=("token_embd",)), "must be of a matrix .* got 'token_embd.weight'"),
    ],
    ids=["rank", "large rank", "alpha", "expression", "no weight", "vector", "embedding"],
)
def test_bad_adapters_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), model.params, **dict(rank=2, alpha=1.0) | settings)


def test_adapters_of_another_model_are_refused(model):
    adapters = _adapters(model, (r"blk\.0\.attn_q_a\.",))
    (name, adapter), *_ = adapters.adapters.items()
    cut = dataclasses.replace(adapters, adapters={name: dataclasses.replace(adapter, a=adapter.a[:, 1:])})
    with pytest.raises(ValueError, match=f"the adapter of {name} must have a and b of shapes"):
        lora.attach(model.params, cut)
    renamed = dataclasses.replace(adapters, adapters={"blk.7.attn_q_a.weight": adapter})
    with pytest.raises(ValueError, match=r"a weight that the model has, got 'blk\.7\.attn_q_a\.weight'"):
        lora.merge(model.params, renamed)


def test_losses_of_nothing_and_useless_taps_are_refused(model):
    settings = dict(config=model.config, run=RunConfig())
    with pytest.raises(ValueError, match=r"tokens must be \[B, T \+ 1\] with T from 1 on, got \(2, 1\)"):
        train.token_losses(model.params, TOKENS[:, :1], **settings)
    edited = taps.tapped(RunConfig(), edits={"logits": lambda value, positions: value})
    with pytest.raises(ValueError, match="must edit what lies before the logits"):
        train.token_losses(model.params, TOKENS, config=model.config, run=edited)
