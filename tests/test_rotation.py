"""Learned rotations: folded into the weights they change nothing, and they make the error smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, draw_params, draw_tokens, run

from mla_jax import quant, rotation
from mla_jax.cache import codec, init_cache, rotate
from mla_jax.config import RunConfig

R = CONFIG.mla.kv_lora_rank
TOKENS = draw_tokens(2, 40)


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def _orthogonal(seed, size=R):
    return jnp.asarray(
        np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0], jnp.float32
    )


def _apart(params):
    """Returns the weights in the other layout of files, k_b and v_b."""
    params, sizes = dict(params), CONFIG.mla
    for i in range(CONFIG.num_layers):
        attn = dict(params[f"layers_{i}"]["attn"])
        up = attn.pop("kv_b")["weight"].reshape(sizes.num_heads, -1, R)
        k, v = np.split(up, [sizes.qk_nope_head_dim], axis=1)
        attn |= {"k_b": {"weight": k.swapaxes(1, 2)}, "v_b": {"weight": v}}
        params[f"layers_{i}"] = params[f"layers_{i}"] | {"attn": attn}
    return params


@pytest.mark.parametrize("layout", [lambda params: params, _apart], ids=["kv_b", "k_b-v_b"])
def test_a_folded_model_is_the_same_and_caches_rotated_latents(layout):
    params = layout(draw_params())
    params["layers_1"]["attn"]["kv_a"] = {
        "weight": quant.encode(params["layers_1"]["attn"]["kv_a"]["weight"], "q8_0")
    }
    logits, _, seen = run(params, TOKENS, record=("latent.*",))
    turn = _orthogonal(0)
    folded = rotation.fold(params, CONFIG, {0: turn})
    assert folded["layers_1"]["attn"]["kv_a"] is params["layers_1"]["attn"]["kv_a"]
    cache = init_cache(CONFIG, RunConfig(cache_type="f32"), batch=2, ctx_size=64)
    found, _, rotated = run(folded, TOKENS, cache, record=("latent.*",))
    np.testing.assert_allclose(found, logits, atol=2e-4)
    for i in range(CONFIG.num_layers):
        unit = np.asarray(seen[f"latent.{i}"]) / params[f"layers_{i}"]["attn"]["kv_a_norm"]["weight"]
        expected = unit if i else unit @ turn.T
        np.testing.assert_allclose(rotated[f"latent.{i}"], expected, atol=2e-5)


def test_weights_that_change_can_be_kept_in_blocks():
    params = draw_params()
    folded = rotation.fold(params, CONFIG, {0: _orthogonal(0)}, weight_type="q8_0")
    kept = folded["layers_0"]["attn"]
    assert {kept[name]["weight"].format for name in ("kv_a", "kv_b")} == {"q8_0"}
    assert kept["q_a"] is params["layers_0"]["attn"]["q_a"]
    logits, (found, _, _) = run(params, TOKENS)[0], run(folded, TOKENS)
    assert 0 < np.median(np.abs(found - logits)) < 0.02 * np.abs(logits).max()


@pytest.mark.parametrize("name", ["q8_0", "q8_KV", "q5_1", "q4_0", "iq4_nl"])
def test_straight_through_is_the_codec_and_follows_the_scale(name):
    """What is scaled as a whole is kept the same but scaled; what leaves the scale alone counts in full."""
    values = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    through = jax.jit(lambda values: rotation.straight_through(values, name))
    kept = codec.decode(codec.encode(values, name))
    np.testing.assert_allclose(through(values), kept, atol=1e-6)
    np.testing.assert_allclose(jax.jvp(through, (values,), (values,))[1], kept, atol=1e-5)
    ranks = jnp.argsort(jnp.argsort(values.reshape(3, -1, codec.BLOCK_TYPES[name].block or 64)))
    is_inner = (ranks > 0) & (ranks < ranks.shape[-1] - 1)
    inner = is_inner.astype(jnp.float32).reshape(values.shape)
    np.testing.assert_allclose(jax.jvp(through, (values,), (inner,))[1], inner, atol=1e-5)
    assert not through(jnp.zeros((1, 64))).any()


def test_error_is_that_of_the_definition():
    rng, turn = np.random.default_rng(0), _orthogonal(1)
    latents, up = (
        rng.standard_normal((50, R), dtype=np.float32),
        rng.standard_normal((7, R), dtype=np.float32),
    )
    kept = codec.decode(codec.encode(jnp.asarray(latents) @ turn.T, "q4_0")) @ turn
    exact = latents.astype(np.float64) @ up.T
    expected = (((np.asarray(kept, np.float64) - latents) @ up.T) ** 2).sum() / (exact**2).sum()
    assert rotation.error(turn, latents, jnp.asarray(up.T @ up), "q4_0") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "start"), [("q5_1", np.eye(64, dtype=np.float32)), ("iq4_nl", None)])
def test_what_is_planted_is_found(name, start):
    """Latents in which half of the directions are large, and the small ones are all that is looked at."""
    rng = np.random.default_rng(0)
    mix = np.asarray(_orthogonal(2, 64))
    scales = np.where(np.arange(64) % 2, 1.0, 0.02)
    latents = jnp.asarray(rng.standard_normal((2000, 64)) * scales @ mix, jnp.float32)
    gram = jnp.asarray(mix.T @ np.diag(1.0 * (scales < 1)) @ mix, jnp.float32)
    plan = rotation.Plan(steps=100, learning_rate=1e-2, batch=256)
    before = rotation.error(rotation.hadamard(64), latents, gram, name)
    learned = rotation.learn_one(latents, gram, cache_type=name, start=start, plan=plan)
    np.testing.assert_allclose(learned @ learned.T, np.eye(64), atol=1e-5)
    assert rotation.error(learned, latents, gram, name) < 0.1 * before


def test_a_model_with_learned_rotations_is_nearer_to_the_exact_one():
    params, lines = draw_params(), []
    for i in range(CONFIG.num_layers):  # what is cached has a few large numbers that matter less
        params[f"layers_{i}"]["attn"]["kv_a"]["weight"][:3] *= 20
        params[f"layers_{i}"]["attn"]["kv_b"]["weight"][:, :3] *= 0.1
    record = ("attn_heads.0",)
    exact = run(params, TOKENS, record=record)[2]["attn_heads.0"]
    coarse = RunConfig(cache_type="q4_0", cache_type_rope="f32")
    plan = rotation.Plan(steps=60, learning_rate=1e-2, batch=64)
    learned = rotation.learn(params, TOKENS, config=CONFIG, cache_type="q4_0", plan=plan, report=lines.append)
    assert sorted(learned) == [0, 1] and lines[1].startswith("layer 1: error ")

    def off(params):
        cache = init_cache(CONFIG, coarse, batch=2, ctx_size=64)
        _, _, seen = run(params, TOKENS, cache, run=coarse, record=record)
        return float(jnp.mean((seen["attn_heads.0"] - exact) ** 2))

    rotated = rotation.fold(params, CONFIG, {i: rotation.hadamard(R) for i in (0, 1)})
    found = [off(weights) for weights in (params, rotated, rotation.fold(params, CONFIG, learned))]
    assert found[2] < 0.85 * found[1] and found[1] < 0.5 * found[0], found


def test_hadamard_takes_the_largest_blocks_that_fit():
    np.testing.assert_array_equal(rotation.hadamard(64), rotate(jnp.eye(64), 64))
    np.testing.assert_array_equal(rotation.hadamard(24), rotate(jnp.eye(24), 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rotation.fold({}, CONFIG, {2: np.eye(R)}),
            r"layers of rotations must be in \[0, 2\), got 2",
        ),
        (lambda: rotation.fold({}, CONFIG, {0: np.eye(8)}), r"must be \(64, 64\), .* got \(8, 8\)"),
        (
            lambda: rotation.fold({}, CONFIG, {1: 2 * np.eye(R)}),
            "orthogonal, but its rows are off by 3 in layer 1",
        ),
        (lambda: rotation.fold({}, CONFIG, {1: np.nan * np.eye(R)}), "must be orthogonal"),
        (
            lambda: rotation.learn({}, TOKENS, config=CONFIG, cache_type="f16"),
            "cache_type must be one of q8_0, .* got 'f16'",
        ),
        (lambda: rotation.straight_through(jnp.zeros(32), "fp8_e4m3"), "got 'fp8_e4m3'"),
        (lambda: rotation.Plan(steps=0), "steps must be at least 1, got 0"),
    ],
    ids=["layer", "size", "scaled", "nan", "plain", "float8", "steps"],
)
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
