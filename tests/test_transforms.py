"""What JAX makes of the model as a function: a program in bytes, and many settings at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, RUN, draw_params, draw_tokens, run

from mla_jax import quant, sampler, steps, taps
from mla_jax.cache import init_cache
from mla_jax.config import RunConfig
from mla_jax.nn.moe import ExpertReduction

# Without LLVM's optimisations a compilation takes half the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_decode_goes_through_bytes():
    """Weights in blocks and a quantised cache; without kernels, a program is all that is needed to run it."""
    pytest.importorskip("flatbuffers")  # JAX serialises by it
    encode = lambda leaf: quant.encode(leaf, "q8_0") if leaf.ndim == 2 and leaf.shape[1] == 32 else leaf
    settings = dict(config=CONFIG, run=RunConfig(cache_type="q8_0"))
    cache = init_cache(*settings.values(), batch=2, ctx_size=64)
    sampling = sampler.batch([sampler.SamplingParams(temperature=0.9, seed=seed) for seed in (1, 2)])
    recent, none = np.full((2, sampler.NUM_RECENT), -1, np.int32), np.asarray([-1], np.int32)
    params = jax.tree.map(encode, draw_params())
    args = params, np.asarray([3, 5], np.int32), recent, cache, sampling, np.int32(6), none
    leaves, tree = jax.tree.flatten(args)
    decode = lambda *leaves: jax.tree.leaves(steps.decode(*jax.tree.unflatten(tree, leaves), **settings))
    data = jax.export.export(jax.jit(decode), platforms=("cpu", "cuda"))(*leaves).serialize()
    found = jax.export.deserialize(data).call(*leaves)
    expected = steps.decode(*jax.tree.map(jnp.copy, args), **settings)
    assert (expected[0][:, :6] >= 0).all() and expected[1] == 6
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.leaves(expected))


def test_vmap_over_thresholds_of_expert_reduction():
    params, tokens = draw_params(), draw_tokens(2, 24)

    def experts_kept(threshold):
        minimum, threshold = jnp.ones((2,), jnp.int32), jnp.full((2,), threshold)
        reduction = ExpertReduction(minimum=minimum, threshold=threshold)
        settings = dict(config=CONFIG, run=RUN, record=("expert_ids.*",), reduction=reduction)
        logits, _, seen = taps.run(params, tokens, **settings)
        return logits, (seen["expert_ids.1"] < CONFIG.moe.num_experts).sum(-1)

    thresholds = jnp.asarray([0.0, 0.7, 0.9, 1.0])
    logits, kept = quick(jax.vmap(experts_kept))(thresholds)
    means = np.asarray(kept, np.float64).mean((1, 2))
    assert means[0] == 3 and means[3] == 1 and (np.diff(means) < 0).all()
    np.testing.assert_allclose(logits[0], run(params, tokens)[0], atol=1e-4)
    alone = quick(experts_kept)(thresholds[1])
    np.testing.assert_allclose(logits[1], alone[0], atol=1e-4)
    np.testing.assert_array_equal(kept[1], alone[1])


def test_vmap_over_seeds_draws_a_text_for_each():
    params, prompt = draw_params(), draw_tokens(1, 5)
    base = sampler.batch([sampler.SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=0)])

    @quick
    def draw(seeds):
        of = lambda seed: dataclasses.replace(base, seed=seed[None])
        generate = functools.partial(taps.generate, params, prompt, 6, config=CONFIG, run=RUN)
        return jax.vmap(lambda seed: generate(sampling=of(seed))[0][0])(seeds)

    seeds = jnp.arange(4, dtype=jnp.uint32)
    drawn = draw(seeds)
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    np.testing.assert_array_equal(draw(seeds[::-1]), drawn[::-1])
    assert (drawn != draw(seeds + 4)).any(axis=1).all()
