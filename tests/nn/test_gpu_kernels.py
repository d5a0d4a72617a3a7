"""The model by the kernels of a GPU: interpreted beside XLA, and lowered for one that is not there."""

import dataclasses
import re

import chex
import gpu_target
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

import checkpoints_tools
from checkpoints_tools import save
from mla_jax import presets, quant, sampler, steps
from mla_jax.cache import init_cache, init_pool
from mla_jax.config import RunConfig
from mla_jax.nn import moe, transformer
from mla_jax.nn.moe import ExpertReduction
from pallas_kernels import dispatch as kernels

SIZES = dict(embed=128, q_lora=64, kv_lora=64, nope=32, rope=64, v=32, ff=128, ff_exp=128)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Takes the way of a GPU on the CPU, every kernel interpreted."""
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *args, **kwargs: launch(*args, **{**kwargs, "interpret": True})
    )

    def choose(*args, default, cuda=None, **_):
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    with jax.default_matmul_precision("default"):
        yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "model.gguf"
    synthetic.write_deepseek2(path, sizes=SIZES, weight_type="Q8_0", groups=4, groups_used=2)
    checkpoint = checkpoints_tools.load_gguf(path, progress=lambda *_: None)
    return checkpoint.params, checkpoint.config


def _logits(model, run, tokens, counts):
    """Runs two sequences through a paged cache; returns the logits of all tokens that are no padding.

    Of each chunk of `tokens` i32[2, T] the first `counts` [2] are there.
    """
    params, config = model
    variables = {"params": transformer.lay_out(params, run)}
    apply = jax.jit(transformer.Transformer(config, run).apply)
    cache = init_pool(config, run, batch=2, num_pages=8, page_size=64)
    cache = dataclasses.replace(cache, layers=jax.tree.map(_garbage, cache.layers))
    pages, out = jnp.asarray([[5, 2, 7], [0, 3, 1]], jnp.int32), []
    for chunk, count in zip(tokens, counts, strict=True):
        logits, cache = apply(variables, chunk, cache, jnp.asarray(count, jnp.int32), pages)
        out += [np.asarray(logits[b, : count[b]]) for b in range(2)]
    return np.concatenate(out)


def _garbage(part):
    """Whatever memory may hold that no token has."""
    if jnp.issubdtype(part.dtype, jnp.floating):
        return jnp.full_like(part, jnp.nan)
    return jnp.full_like(part, 77)


@pytest.mark.parametrize(
    "settings", [dict(cache_type="bf16"), dict(cache_type="q8_0", hadamard_size=64)], ids=str
)
def test_logits_are_those_of_xla(model, settings, as_on_a_gpu):
    rng, counts = np.random.default_rng(0), [(130, 77), (1, 1), (3, 2)]  # expanded, then absorbed
    tokens = [rng.integers(0, 320, (2, max(count))).astype(np.int32) for count in counts]
    with_kernels = _logits(model, RunConfig(gpu_kernels=True, **settings), tokens, counts)
    with jax.default_matmul_precision("highest"):
        expected = _logits(model, RunConfig(gpu_kernels=False, **settings), tokens, counts)
    error = np.abs(with_kernels - expected).max(axis=-1) / np.abs(expected).max()
    # Keys and values of the prompt are in bfloat16; of two experts that are almost even a token may take
    # the other.
    assert np.quantile(error, 0.95) < 1e-2


def test_weights_that_are_laid_out_stay_so(model):
    run = RunConfig(gpu_kernels=True)
    once = transformer.lay_out(model[0], run)
    kinds = {type(leaf) for leaf in jax.tree.leaves(once, is_leaf=lambda leaf: not isinstance(leaf, dict))}
    assert {quant.PlanarTensor, quant.QuantizedTensor} <= kinds
    chex.assert_trees_all_equal(transformer.lay_out(once, run), once)


@pytest.mark.parametrize("num_tokens", [2, 40])
def test_experts_of_16_bits_have_kernels(num_tokens, as_on_a_gpu):
    E, K, D, F = 4, 2, 32, 48
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    experts = {"gate": draw(E, F, D), "up": draw(E, F, D), "down": draw(E, D, F)}
    experts = {name: weight.astype(jnp.bfloat16) for name, weight in experts.items()}
    planes = {name: quant.to_planes(weight) for name, weight in experts.items()}
    ids = jnp.asarray(rng.integers(0, E, (num_tokens, K)), jnp.int32)
    args = draw(num_tokens, D), ids, jnp.asarray(rng.random((num_tokens, K)), jnp.float32)
    found = moe.grouped_ffn(*args, planes, num_experts=E)
    with jax.default_matmul_precision("highest"):
        expected = moe.grouped_ffn(*args, experts, num_experts=E)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
    assert not np.array_equal(found, expected)  # another way was taken


def _v3(layers):
    """The shapes of DeepSeek-V3 in Q8_0, with fewer layers of each kind."""
    config = dataclasses.replace(presets.PRESETS["deepseek-v3"], num_layers=layers, num_dense_layers=1)
    run = RunConfig(cache_type="q8_0", hadamard_size=512, gpu_kernels=True)

    def build():
        params = transformer.init_params(jax.random.key(0), config)
        return transformer.lay_out(jax.tree.map(_in_blocks, params), run)

    return jax.eval_shape(build), config, run


def _in_blocks(weight):
    if weight.ndim < 2 or weight.shape[-1] % 32 or weight.shape[-2] == 256:  # not the router
        return weight
    blocks = jnp.zeros((*weight.shape[:-1], weight.shape[-1] // 32, 34), jnp.uint8)
    return quant.QuantizedTensor(blocks=blocks, format="q8_0")


def _lowered(step, *tokens):
    """Lowers a step of DeepSeek-V3 with `-ctk q8_0 -khad -ser 6,1` for a GPU."""
    params, config, run = _v3(layers=2)
    cache = jax.eval_shape(lambda: init_cache(config, run, batch=1, ctx_size=4096))
    reduction = ExpertReduction(minimum=jnp.full((1,), 6, jnp.int32), threshold=jnp.ones((1,)))
    args = [cache if token is ... else token for token in tokens]
    with jax.default_matmul_precision("default"):
        text = gpu_target.lowered_for_gpu(step, params, *args, reduction=reduction, config=config, run=run)
    num_parts = len(jax.tree.leaves(cache))
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") >= num_parts  # nothing is copied
    assert "callback" not in text  # and nothing goes by the host
    return text


def test_decode_of_v3_lowers_to_kernels():
    sampling = sampler.batch([sampler.SamplingParams(temperature=0.0, seed=0)])
    token, recent, no_end = (
        jnp.zeros((1,), jnp.int32),
        jnp.zeros((1, 64), jnp.int32),
        jnp.full((1,), -1, jnp.int32),
    )
    text = _lowered(steps.decode, token, recent, ..., sampling, jnp.int32(1), no_end)
    assert {"flash_mla_decode_q8_0", "latent_append", "grouped_matvec"} <= _kernels(text)


def test_prefill_of_v3_lowers_to_kernels():
    text = _lowered(steps.prefill, jnp.zeros((1, 512), jnp.int32), jnp.full((1,), 512, jnp.int32), ...)
    assert {"flash_mla_prefill", "latent_append", "grouped_matmul"} <= _kernels(text)


def _kernels(text):
    return {name for name in re.findall(r"name = \\?\"(\w+)", text)}


@pytest.mark.parametrize(
    "page_size, expected", [(64, {"latent_append", "flash_mla_decode_q8_0"}), (8, set())]
)
def test_pages_that_kernels_cannot_take_are_left_to_xla(model, page_size, expected):
    params, config = model
    run = RunConfig(cache_type="q8_0", gpu_kernels=True)
    cache = init_pool(config, run, batch=1, num_pages=4, page_size=page_size)
    step = jax.jit(transformer.apply, static_argnums=(3, 4))
    args = params, jnp.zeros((1, 1), jnp.int32), cache, config, run, jnp.asarray([[1, 2]], jnp.int32)
    with jax.default_matmul_precision("default"):
        assert _kernels(gpu_target.lowered_for_gpu(step, *args)) == expected


def test_planes_are_not_saved(model, tmp_path):
    planes = transformer.lay_out(model[0], RunConfig(gpu_kernels=True))["output"]["weight"]
    with pytest.raises(ValueError, match="must be in blocks, got planes"):
        save._tensor("output.weight", planes, None)
