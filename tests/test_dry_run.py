"""DeepSeek-V3 without its weights: its sizes are those that are published, and its steps lower."""

import dataclasses

import jax
import numpy as np
import pytest
from absl import flags

from benchmarks import dry_run, dry_run_cost
from mla_jax import sharding_plan
from mla_jax.config import RunConfig
from mla_jax.presets import PRESETS

RUN = RunConfig(cache_type="q8_0", hadamard_size=64, gpu_kernels=False)
H200 = dry_run_cost.MACHINES[0]


@pytest.fixture(scope="module", autouse=True)
def flags_are_parsed():
    flags.FLAGS(["dry_run"])


@pytest.mark.parametrize(("type", "published_gb"), [("q8_0", 713), ("q4_K", 378)])
def test_the_whole_has_its_published_size(type, published_gb):
    """671 billion weights of 34 / 32 bytes each, and of 4.5 bits."""
    model = dry_run.abstract("deepseek-v3", type, dict(expert=8), RUN)
    whole = sum(weight.num_bytes for weight in model.weights)
    assert whole == pytest.approx(published_gb * 1e9, rel=0.005)
    held = lambda leaf: int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    of_device = sum(held(leaf) for leaf in jax.tree.leaves(model.params))
    assert sharding_plan.weight_bytes(model.weights, model.config, model.run.shard) == of_device


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_steps_of_a_machine_lower(platform):
    model = dry_run.abstract("deepseek-v3", "q8_0", H200.axes, RUN, layers=4)
    model = dry_run.with_planes(model) if platform == "cuda" else model
    args = dry_run.arguments(model, batch=8, num_tokens=1024)
    for name in ("prefill", "decode"):
        with jax.default_matmul_precision("default"):  # else XLA computes
            found = dry_run.try_step(name, model, args[name], platform)
        assert (found["kernels"] > 0) == (platform == "cuda")
    if platform == "cpu":
        weights = sharding_plan.weight_bytes(model.weights, model.config, model.run.shard)
        rows = sharding_plan.cache_bytes(model.config, model.run, 1024)
        assert found["argument_gb"] == pytest.approx((weights + rows) / 1e9, rel=0.01)


def test_a_step_takes_what_its_bytes_take():
    """On one device nothing is told; twice the tokens read the same weights, and twice the rows."""
    spec = dataclasses.replace(H200, axes=dict(model=1))
    model = dry_run.abstract("deepseek-v2-lite", "q8_0", spec.axes, RUN)
    one, two = (dry_run_cost.decode_seconds(spec, model.weights, model.config, model.run, n) for n in (1, 2))
    assert one["exchanges"] == 0 and two["rows"] == 2 * one["rows"]
    moe = model.config.moe
    expert_bytes = sum(w.num_bytes for w in model.weights if "/experts/" in w.path)
    other_bytes = sum(
        w.num_bytes for w in model.weights if "/experts/" not in w.path and "embed" not in w.path
    )
    share = moe.num_experts_per_token / moe.num_experts
    rate = spec.bandwidth * 0.8
    assert one["weights"] == pytest.approx((other_bytes + share * expert_bytes) / rate)
    both = 1 - (1 - share) ** 2  # experts that one of two tokens takes
    assert two["weights"] == pytest.approx((other_bytes + both * expert_bytes) / rate, rel=0.01)


def test_devices_that_share_a_model_tell_each_other_more_and_read_less():
    parts = []
    for size in (1, 8):
        spec = dataclasses.replace(H200, axes=dict(expert=size))
        model = dry_run.abstract("deepseek-v3", "q8_0", spec.axes, RUN)
        parts.append(dry_run_cost.decode_seconds(spec, model.weights, model.config, model.run, 8))
    assert parts[1]["exchanges"] > 61 * 2 * spec.latency and parts[0]["exchanges"] == 0
    assert parts[0]["weights"] / 8 < parts[1]["weights"] < parts[0]["weights"] / 4


def test_the_busiest_device_counts():
    """One token's 8 experts of 256: on one device 8, on 256 devices one each, on 8 more than one each."""
    config = PRESETS["deepseek-v3"]
    assert dry_run_cost.share_of_experts(config, 1, 1) == 8 / 256
    assert dry_run_cost.share_of_experts(config, 256, 1) == 1.0
    assert 2 / 32 < dry_run_cost.share_of_experts(config, 8, 1) < 3.5 / 32
