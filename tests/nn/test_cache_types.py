"""Attention over every cache type: the ways to attend, the modes, and how the calls are cut.

What is cached is quantised once and compared as it is read back, so the bounds are those of float32. Every
byte that no token owns is garbage: codes of any value and scales of NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.cache import HeadRows, LatentRows, codec, init_cache, rotate
from mla_jax.config import QUANTISED_CACHE_TYPES, MLAConfig, ModelConfig, RunConfig
from mla_jax.nn import mla
from mla_jax.nn.transformer import Transformer, init_params

B, T, S, N, H, P, R, V = 2, 3, 512, 2, 64, 64, 128, 32
POSITIONS = np.array([[0, 1, 2], [300, 301, 302]], np.int32)
SCALE, CHUNK = 0.1, 256


def _draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def _garbage(part, is_dead, rng):
    """Fills what no token owns, [B, S] `is_dead`: with NaN, or with any codes where those are kept."""
    part = np.array(part)
    noise = rng.integers(0, 255, part.shape, np.uint8).astype(part.dtype)
    part[is_dead] = noise[is_dead] if jnp.issubdtype(part.dtype, jnp.integer) else np.nan
    return jnp.asarray(part)


@functools.partial(jax.jit, static_argnames=("name", "rotation"))
def _encoded(values, name, rotation):
    """Returns `values` as the cache keeps them, and as they are read back."""
    stored = codec.encode(rotate(values, rotation), name)
    return stored, rotate(codec.decode(stored), rotation)


def _stored(values, name, rotation):
    """Returns `values` [B, S, ...] as the cache keeps them, and in float64 as they are read back."""
    stored, live = _encoded(values, name, rotation)
    is_dead, rng = np.arange(S)[None] > POSITIONS[:, -1:], np.random.default_rng(0)
    return jax.tree.map(lambda part: _garbage(part, is_dead, rng), stored), np.asarray(live, np.float64)


def _by_definition(query, keys, values):
    out = np.zeros((B, T, N, values.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        seen = POSITIONS[b, t] + 1
        score = SCALE * keys[b, :seen, n] @ query[b, t, n].astype(np.float64)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight / weight.sum() @ values[b, :seen, n]
    return out


@pytest.mark.parametrize("rotation", [None, 64])
@pytest.mark.parametrize("name", QUANTISED_CACHE_TYPES)
@pytest.mark.parametrize("way", ["heads", "expanded", "absorbed"])
def test_attention_is_that_over_the_numbers_as_they_are_read_back(way, name, rotation):
    q, q_rope, k_up, v_up = _draw(B, T, N, H), _draw(B, T, N, P), _draw(N, H, R) / 8, _draw(N, V, R) / 8
    kwargs = dict(sm_scale=SCALE, chunk=CHUNK, rotation=rotation)
    query = np.concatenate([q, q_rope], axis=-1)
    if way == "heads":
        key, keys = _stored(_draw(B, S, N, H + P), name, rotation)
        value, values = _stored(_draw(B, S, N, V), name, None)
        found = jax.jit(functools.partial(mla.attend_heads, **kwargs))(
            q, q_rope, HeadRows(key=key, value=value), POSITIONS
        )
    else:
        latent, latents = _stored(_draw(B, S, R), name, rotation)
        rope, ropes = _stored(_draw(B, S, P), name, rotation)
        keys = np.einsum("BSR,NHR->BSNH", latents, k_up.astype(np.float64))
        keys = np.concatenate([keys, np.broadcast_to(ropes[:, :, None], (B, S, N, P))], axis=-1)
        values = np.einsum("BSR,NVR->BSNV", latents, v_up.astype(np.float64))
        attend = {"expanded": mla.attend_expanded, "absorbed": mla.attend_absorbed}[way]
        found = jax.jit(functools.partial(attend, **kwargs))(
            q,
            jax.jit(rotate, static_argnums=1)(q_rope, rotation),
            LatentRows(latent=latent, rope=rope),
            k_up,
            v_up,
            POSITIONS,
        )
    expected = _by_definition(query, keys, values)
    assert np.abs(np.asarray(found) - expected).max() < 1e-5 * np.abs(expected).max()


# One layer: what it caches is a function of the tokens alone, so that no rounding of an earlier layer can tip
# a code. Rows are 64 wide, for the rotation.
CONFIG = ModelConfig(
    vocab_size=96,
    context_length=1024,
    embed_dim=32,
    num_layers=1,
    num_dense_layers=1,
    dense_hidden_dim=48,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=2,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
    ),
    moe=None,
)
PLANS = {"whole": [300], "with history": [149, 1, 149, 1], "cuts": [63, 64, 1, 65, 2, 3, 102]}
LONG_PLANS = {"whole": [700], "turns": [512, 1, 1, 63, 1, 1, 65, 1, 55]}


# Without LLVM's optimisations a compilation takes half the time.
@functools.partial(jax.jit, static_argnames="run", compiler_options={"xla_backend_optimization_level": 0})
def _step(params, tokens, cache, run):
    return Transformer(CONFIG, run).apply({"params": params}, tokens, cache)


@functools.cache
def _params():
    return init_params(jax.random.key(0), CONFIG)


def _logits(run, plan):
    tokens = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(1, sum(plan)), dtype=np.int32)
    cache = init_cache(CONFIG, run, batch=1, ctx_size=sum(plan))
    is_dead = np.ones((1, cache.layers[0].num_slots), bool)
    rng = np.random.default_rng(1)
    layers = jax.tree.map(lambda part: _garbage(part, is_dead, rng), cache.layers)
    cache, start, parts = dataclasses.replace(cache, layers=layers), 0, []
    for count in plan:
        logits, cache = _step(_params(), tokens[:, start : start + count], cache, run)
        parts.append(np.asarray(logits[0]))
        start += count
    return np.concatenate(parts)


# Every type in the default mode, and every mode for one type with each of the parts that there are.
PATHS = [(name, 3, True, "with history") for name in QUANTISED_CACHE_TYPES]
PATHS += [("q8_0", 3, True, "cuts")]
PATHS += [
    (name, mode, flash, "with history")
    for name in ("q8_0", "q5_1", "iq4_nl")
    for mode, flash in [(1, True), (2, True), (2, False), (3, False)]
]


@pytest.mark.parametrize(("name", "mode", "flash", "plan"), PATHS)
def test_modes_and_calls_give_the_same_logits(name, mode, flash, plan):
    _check_calls(name, mode, flash, PLANS["whole"], PLANS[plan])


@pytest.mark.parametrize("mode", [0, 3])
def test_long_calls_and_several_turns_give_the_same_logits(mode):
    _check_calls("q8_0", mode, True, LONG_PLANS["whole"], LONG_PLANS["turns"])


def _check_calls(name, mode, flash, whole, plan):
    expected = _logits(RunConfig(mla=1 if mode else 0, flash=False, cache_type=name), whole)
    found = _logits(RunConfig(mla=mode, flash=flash, cache_type=name), plan)
    error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    # a projection may round otherwise in another call, and tip a code that lay on its edge
    assert np.median(error) < 1e-5 and error.max() < 2e-2


EXACT = {"q8_0": 0.01, "q8_KV": 0.01, "q6_0": 0.03, "fp8_e4m3": 0.06}


@pytest.mark.parametrize("hadamard_size", [None, 64])
@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("name", EXACT)
def test_many_bits_are_close_to_a_float32_cache(name, mode, hadamard_size):
    expected = _logits(RunConfig(mla=mode, cache_type="f32"), PLANS["with history"])
    run = RunConfig(mla=mode, cache_type=name, hadamard_size=hadamard_size)
    error = _logits(run, PLANS["with history"]) - expected
    assert 0 < np.sqrt(np.mean(error**2)) < EXACT[name] * np.std(expected)


def test_a_rotary_part_of_its_own_type_is_kept_exactly():
    expected = _logits(RunConfig(cache_type="f32"), PLANS["whole"])
    error = lambda run: np.sqrt(np.mean((_logits(run, PLANS["whole"]) - expected) ** 2))
    mixed = RunConfig(cache_type="q4_0", cache_type_rope="bf16", hadamard_size=64)
    rows = init_cache(CONFIG, mixed, batch=1, ctx_size=1).layers[0]
    assert rows.rope.dtype == jnp.bfloat16 and codec.type_of(rows.latent) == "q4_0"
    assert (mixed.latent_rotation, mixed.rope_rotation) == (64, None)
    assert error(mixed) < error(RunConfig(cache_type="q4_0", hadamard_size=64))


def test_a_cache_that_is_not_quantised_is_not_rotated():
    run = RunConfig(cache_type="f16", hadamard_size=64)
    assert run.latent_rotation is None and run.rope_rotation is None
    np.testing.assert_array_equal(
        _logits(run, PLANS["whole"]), _logits(RunConfig(cache_type="f16"), PLANS["whole"])
    )


def test_groups_of_heads_give_the_same_logits(monkeypatch):
    """With a MiB taken for a byte every call is cut into single heads."""
    whole = [_logits(RunConfig(mla=mode, cache_type="f32"), PLANS["with history"]) for mode in (1, 3)]
    _step.clear_cache()
    sizes = []
    monkeypatch.setattr(mla, "head_groups", lambda *args: sizes.append(args) or 2)
    for mode, expected in zip((1, 3), whole, strict=True):
        found = _logits(RunConfig(mla=mode, cache_type="f32"), PLANS["with history"])
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    _step.clear_cache()
    assert {heads for heads, *_ in sizes} == {2} and {limit for *_, limit in sizes} == {256}
    # the scores of a call of 149 tokens over 256 slots, and the 128 + 64 numbers of a key and value of each
    assert {4 * 256 * 149, 4 * 256 * (149 + 192)} <= {num_bytes for _, num_bytes, _ in sizes}


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [
        ((128, 1 << 20, 0), 1),
        ((128, 1 << 20, 128), 1),
        ((128, 1 << 20, 127), 2),
        ((20, 1 << 20, 9), 4),
        ((20, 1 << 20, 3), 10),
        ((20, 2 << 20, 1), 20),
        ((7, 1 << 20, 6), 7),
    ],
)
def test_heads_are_cut_into_as_few_groups_as_fit(arguments, groups):
    assert mla.head_groups(*arguments) == groups


def test_a_row_must_be_whole_rotations():
    with pytest.raises(ValueError, match="must be a multiple of hadamard_size 128 wide, got 64"):
        init_cache(CONFIG, RunConfig(cache_type="q8_0", hadamard_size=128), batch=1, ctx_size=1)
