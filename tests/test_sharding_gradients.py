"""Gradients on a mesh are those of one device, part by part."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from small_model import CONFIG

from checkpoints_tools import shard_parts
from mla_jax import sharding
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import apply

RUN = RunConfig(cache_type="f32")


@functools.partial(jax.jit, static_argnames="run", compiler_options={"xla_backend_optimization_level": 0})
def _slopes(params, *, run):
    def loss(params):
        logits, _ = apply(params, small_model.draw_tokens(4, 9), None, CONFIG, run)
        return -jax.nn.log_softmax(logits)[..., 3].mean()

    return jax.grad(loss)(params)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, small_model.draw_params())


@pytest.fixture(scope="module")
def expected(params):
    return jax.tree.map(np.asarray, _slopes(params, run=RUN))


def test_gradients_are_those_of_one_device(params, expected):
    shard = sharding.make_shard(CONFIG, sharding.describe(params), data=2, expert=2, model=2)
    found = _slopes(shard_parts.place(params, CONFIG, shard), run=dataclasses.replace(RUN, shard=shard))
    parts = shard_parts.place(expected, CONFIG, shard)
    chex.assert_trees_all_close(found, parts, atol=1e-6, rtol=1e-4)
    lies_alike = lambda one, two: one.sharding.is_equivalent_to(two.sharding, one.ndim)
    assert all(jax.tree.leaves(jax.tree.map(lies_alike, found, parts)))
