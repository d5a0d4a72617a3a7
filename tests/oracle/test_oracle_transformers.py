"""Logits against the reference models of `transformers`, small and random, in float32.

Both sides compute in float32 and differ by rounding alone, which stays below 2e-6 of the largest logit here.
`test_a_wrong_config_is_seen` shows what the tolerance catches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.cache import init_cache
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import Transformer, apply

_REASON = "needs the extra `oracle`: python -m pip install '.[oracle]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)

import hf_params  # noqa: E402

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-5  # of the largest logit; both sum in float32, in another order
NUM_TOKENS = 326  # more than a chunk of the flash attention, five times YaRN's trained context below
BATCH = 2

SIZES = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=24,
    n_routed_experts=8,
    num_experts_per_tok=3,
    max_position_embeddings=2560,
    rms_norm_eps=1e-6,
)
GROUPS = dict(n_group=4, topk_group=2)


def _yarn(mscale):
    return dict(
        rope_type="yarn",
        rope_theta=10000.0,
        factor=40.0,
        mscale=mscale,
        mscale_all_dim=mscale,
        original_max_position_embeddings=64,
        beta_fast=32,
        beta_slow=1,
    )


PLAIN = dict(rope_type="default", rope_theta=10000.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    changes: dict
    as_mainline: bool = False


CASES = {
    "v2-greedy-plain": Case(
        family="DeepseekV2",
        changes=dict(
            q_lora_rank=None,
            topk_method="greedy",
            n_shared_experts=1,
            first_k_dense_replace=2,
            rope_parameters=PLAIN,
        ),
    ),
    "v2-lite-yarn": Case(
        family="DeepseekV2",
        changes=dict(
            q_lora_rank=None,
            topk_method="greedy",
            n_shared_experts=2,
            first_k_dense_replace=1,
            rope_parameters=_yarn(0.707),
        ),
        as_mainline=True,
    ),
    "v2-groups-yarn": Case(
        family="DeepseekV2",
        changes=dict(
            q_lora_rank=48,
            topk_method="group_limited_greedy",
            routed_scaling_factor=4.0,
            n_shared_experts=2,
            first_k_dense_replace=1,
            rope_parameters=_yarn(0.707),
        )
        | GROUPS,
    ),
    "v3-groups-yarn": Case(
        family="DeepseekV3",
        changes=dict(
            q_lora_rank=48,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            n_shared_experts=1,
            first_k_dense_replace=1,
            rope_parameters=_yarn(1.0),
        )
        | GROUPS,
        as_mainline=True,
    ),
    "v3-plain": Case(
        family="DeepseekV3",
        changes=dict(
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.446,
            n_shared_experts=2,
            first_k_dense_replace=0,
            rope_parameters=PLAIN,
        ),
    ),
}
EVERY_RUN = {
    f"mla{mode}-{'flash' if flash else 'whole'}": RunConfig(mla=mode, flash=flash, cache_type="f32")
    for mode in range(4)
    for flash in (True, False)
}
# One model goes through every run, the others through runs that share as little as possible: a compilation
# takes a second, the runs differ in attention alone, and tests/nn/test_modes.py compares them all.
RUNS = {
    "v2-greedy-plain": ["mla1-flash"],
    "v2-lite-yarn": ["mla2-flash"],
    "v2-groups-yarn": ["mla0-whole", "mla3-flash"],
    "v3-groups-yarn": list(EVERY_RUN),
    "v3-plain": ["mla3-flash"],
}
# Calls as (padded length, tokens that count in each sequence). From length 128 on, modes 2 and 3 expand.
PLANS = {
    "prefill-40": [(64, (40, 33))],
    "prefill-150": [(150, (150, 150))],
    "chunks": [
        (64, (1, 5)),
        (1, (1, 1)),
        (64, (5, 64)),
        (64, (64, 6)),
        (150, (130, 150)),
        (150, (125, 100)),
    ],
    "decode": [
        *[(1, (1, 1))] * 20,
        (150, (150, 120)),
        (150, (80, 100)),
        *[(1, (1, 1))] * 20,  # across slot 256, where the second chunk of flash attention starts
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
    """A model in our terms, and the logits f32[B, T, W] that the reference gives for `tokens`."""

    config: object
    params: dict
    tokens: np.ndarray
    logits: np.ndarray


def _randomize(name, tensor, generator):
    """Draws weights that keep activations near 1, so that logits are not tiny and routing is not random."""
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        noise = 0.3 * noise - 0.8  # most biased scores are negative, below the zero of a careless mask
    elif tensor.ndim == 1:
        noise = 1 + 0.2 * noise
    elif "embed_tokens" not in name:
        noise *= tensor.shape[-1] ** -0.5
    tensor.copy_(noise)


@functools.cache
def oracle_of(name):
    case = CASES[name]
    hf_config = getattr(transformers, f"{case.family}Config")(**SIZES, **case.changes)
    model = getattr(transformers, f"{case.family}ForCausalLM")(hf_config).float().eval()
    generator = torch.Generator().manual_seed(sorted(CASES).index(name))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            _randomize(key, tensor, generator)
        tokens = torch.randint(SIZES["vocab_size"], (BATCH, NUM_TOKENS), generator=generator)
        logits = model(tokens, use_cache=False).logits
    config = hf_params.model_config(hf_config)
    params = hf_params.params_of(model.state_dict(), config, as_mainline=case.as_mainline)
    return Oracle(config=config, params=params, tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


# Without LLVM's optimisations a compilation takes half the time; `test_a_sequence_on_its_own` has them.
@functools.partial(
    jax.jit, static_argnames=("config", "run"), compiler_options={"xla_backend_optimization_level": 0}
)
def _step(params, tokens, cache, num_tokens, config, run):
    return Transformer(config, run).apply({"params": params}, tokens, cache, num_tokens)


def _follow(plan, oracle, run):
    """Runs the calls of `plan`; returns for each sequence the logits of its tokens, padding left out."""
    cache = init_cache(oracle.config, run, batch=BATCH, ctx_size=NUM_TOKENS)
    done, logits = [0] * BATCH, [[] for _ in range(BATCH)]
    for length, counts in plan:
        tokens = np.zeros((BATCH, length), np.int32)
        for row, count in enumerate(counts):
            tokens[row, :count] = oracle.tokens[row, done[row] : done[row] + count]
        num_tokens = jnp.asarray(counts, jnp.int32)
        out, cache = _step(oracle.params, jnp.asarray(tokens), cache, num_tokens, oracle.config, run)
        for row, count in enumerate(counts):
            logits[row].append(np.asarray(out[row, :count]))
            done[row] += count
    return [np.concatenate(pieces) for pieces in logits]


def _relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", ["v2-groups-yarn", "v3-groups-yarn"])
def test_a_sequence_on_its_own(name):
    oracle = oracle_of(name)
    logits, cache = jax.jit(apply, static_argnums=(3, 4))(
        oracle.params, jnp.asarray(oracle.tokens), None, oracle.config, RunConfig()
    )
    assert cache is None
    assert np.abs(oracle.logits).max() > 1
    assert _relative_error(logits, oracle.logits) < TOLERANCE


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("name", "run"), [(name, run) for name, runs in RUNS.items() for run in runs])
def test_through_a_cache(name, run, plan):
    oracle = oracle_of(name)
    for row, logits in enumerate(_follow(PLANS[plan], oracle, EVERY_RUN[run])):
        assert _relative_error(logits, oracle.logits[row, : len(logits)]) < TOLERANCE


def _change(config, part, **changes):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})


@pytest.mark.parametrize(
    ("name", "part", "changes"),
    [
        pytest.param("v3-groups-yarn", "rope", dict(yarn_log_multiplier=0.0), id="temperature"),
        pytest.param("v3-groups-yarn", "rope", dict(scaling="linear"), id="frequencies"),
        pytest.param("v3-groups-yarn", "moe", dict(num_groups=1, num_groups_used=1), id="v3-groups"),
        pytest.param("v3-groups-yarn", "moe", dict(has_selection_bias=False), id="bias"),
        pytest.param("v2-groups-yarn", "moe", dict(num_groups=1, num_groups_used=1), id="v2-groups"),
    ],
)
def test_a_wrong_config_is_seen(name, part, changes):
    """The random models are such that each rule of the published ones matters."""
    oracle = oracle_of(name)
    config = _change(oracle.config, part, **changes)
    num_tokens = jnp.full((BATCH,), NUM_TOKENS, jnp.int32)
    logits, _ = _step(oracle.params, jnp.asarray(oracle.tokens), None, num_tokens, config, RunConfig())
    assert _relative_error(logits, oracle.logits) > 0.01


def test_rescaled_rotations_are_refused():
    rope = _yarn(1.0) | dict(mscale=0.707)
    hf_config = transformers.DeepseekV3Config(**SIZES, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"mscale must equal mscale_all_dim, got 0\.707, 1\.0"):
        hf_params.model_config(hf_config)
