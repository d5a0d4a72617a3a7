"""The whole network against a forward pass in numpy float64, and its contract: cache, padding, grad, vmap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import perplexity, quant
from mla_jax.cache import Cache, init_cache
from mla_jax.config import MLAConfig, MLAMode, ModelConfig, MoEConfig, RopeConfig, RunConfig
from mla_jax.nn import transformer

B, T = 2, 8
RUN = RunConfig(cache_type="f32")
V3 = ModelConfig(
    vocab_size=32,
    context_length=64,
    embed_dim=16,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden_dim=24,
    norm_epsilon=1e-5,
    mla=MLAConfig(
        num_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    ),
    moe=MoEConfig(
        num_experts=6,
        num_experts_per_token=2,
        expert_hidden_dim=8,
        num_shared_experts=2,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
        weights_scale=2.5,
        num_groups=3,
        num_groups_used=2,
    ),
    rope=RopeConfig(scaling="yarn", factor=40.0, original_context_length=16, yarn_log_multiplier=0.1),
)
V2_LITE = dataclasses.replace(
    V3,
    mla=dataclasses.replace(V3.mla, q_lora_rank=None),
    moe=MoEConfig(
        num_experts=6, num_experts_per_token=2, expert_hidden_dim=8, num_shared_experts=0, gating="softmax"
    ),
    rope=RopeConfig(),
)
TOKENS = np.random.default_rng(0).integers(0, V3.vocab_size, (B, T)).astype(np.int32)


@functools.cache
def _shapes(config):
    return jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), config))


def draw_params(config, seed=0):
    """Draws every weight, so that nothing is at a special value: norms are not ones, biases not zeros."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, dtype=np.float32)
        return values / np.float32(leaf.shape[-1] ** 0.5) if len(leaf.shape) > 1 else 1 + values / 4

    return jax.tree.map(draw, _shapes(config))


class Definition:
    """The forward pass in float64, one token and one expert at a time. `w` is the tree of weights."""

    def __init__(self, config, params):
        self.config = config
        self.w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def logits(self, tokens):
        w = self.w
        x = w["embed"]["weight"][tokens]
        for i in range(self.config.num_layers):
            layer = w[f"layers_{i}"]
            x = x + np.stack(
                [self._attention(row, layer["attn"]) for row in self._norm(x, layer["attn_norm"])]
            )
            ffn = self._swiglu if i < self.config.num_dense_layers else self._mixture
            normed = self._norm(x, layer["ffn_norm"])
            x = x + np.stack([[ffn(token, layer["ffn"]) for token in row] for row in normed])
        return self._norm(x, w["output_norm"]) @ w["output"]["weight"].T

    def _norm(self, x, leaf):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_epsilon) * leaf["weight"]

    def _rotate(self, x):
        """Rotates [T, ..., P] by position; with factor 40 and 16 positions, YaRN keeps pair 0 alone."""
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        frequency = self.config.rope.base ** (-np.arange(pairs.shape[-1]) / pairs.shape[-1])
        if self.config.rope.scaling == "yarn":
            frequency[1:] /= 40
        angle = np.arange(len(x))[:, None] * frequency
        turned = pairs * np.exp(1j * angle.reshape(len(x), *[1] * (x.ndim - 2), -1))
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def _attention(self, x, w):
        sizes = self.config.mla
        nope, rank = sizes.qk_nope_head_dim, sizes.kv_lora_rank
        if sizes.q_lora_rank is None:
            q = x @ w["q"]["weight"].T
        else:
            q = self._norm(x @ w["q_a"]["weight"].T, w["q_a_norm"]) @ w["q_b"]["weight"].T
        q = q.reshape(len(x), sizes.num_heads, nope + sizes.qk_rope_head_dim)
        kv_a = x @ w["kv_a"]["weight"].T
        kv = self._norm(kv_a[:, :rank], w["kv_a_norm"]) @ w["kv_b"]["weight"].T
        kv = kv.reshape(len(x), sizes.num_heads, nope + sizes.v_head_dim)
        q_rope, k_rope = self._rotate(q[..., nope:]), self._rotate(kv_a[:, rank:])
        temperature = 1 + 0.1 * np.log(40) if self.config.rope.scaling == "yarn" else 1
        out = np.zeros((len(x), sizes.num_heads, sizes.v_head_dim))
        for t, n in np.ndindex(out.shape[:2]):
            score = kv[: t + 1, n, :nope] @ q[t, n, :nope] + k_rope[: t + 1] @ q_rope[t, n]
            weight = np.exp(score * temperature**2 / np.sqrt(sizes.qk_head_dim))
            out[t, n] = weight / weight.sum() @ kv[: t + 1, n, nope:]
        return out.reshape(len(x), -1) @ w["out"]["weight"].T

    def _swiglu(self, x, w):
        gate, up = w["gate"]["weight"] @ x, w["up"]["weight"] @ x
        return w["down"]["weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def _mixture(self, x, w):
        moe, logits = self.config.moe, w["router"]["weight"] @ x
        probs = (
            np.exp(logits) / np.exp(logits).sum() if moe.gating == "softmax" else 1 / (1 + np.exp(-logits))
        )
        score = probs + w["router"]["bias"] if moe.has_selection_bias else probs
        groups = score.reshape(moe.num_groups, -1)
        kept = np.argsort(-np.sort(groups)[:, -2:].sum(-1))[: moe.num_groups_used]
        for group in set(range(moe.num_groups)) - set(kept):
            groups[group] = -np.inf
        ids = np.argsort(-groups.ravel())[: moe.num_experts_per_token]
        weights = probs[ids] / (probs[ids].sum() if moe.normalize_weights else 1) * moe.weights_scale
        out = self._swiglu(x, w["shared"]) if moe.num_shared_experts else 0
        for e, weight in zip(ids, weights, strict=True):
            expert = {name: {"weight": leaf["weight"][e]} for name, leaf in w["experts"].items()}
            out = out + weight * self._swiglu(x, expert)
        return out


_apply = jax.jit(transformer.apply, static_argnames=("config", "run"))


@functools.partial(jax.jit, static_argnames="config")
def _step(params, tokens, cache, num_tokens, config):
    return transformer.Transformer(config, RUN).apply({"params": params}, tokens, cache, num_tokens)


@pytest.mark.parametrize("config", [V3, V2_LITE], ids=["V3", "V2-Lite"])
def test_logits_are_those_of_the_definition(config):
    params = draw_params(config)
    logits, cache = _apply(params, TOKENS, None, config=config, run=RUN)
    assert cache is None
    np.testing.assert_allclose(logits, Definition(config, params).logits(TOKENS), rtol=1e-4, atol=1e-5)


def _garbage_cache(length):
    """Makes a cache whose every slot holds NaN until it is written."""
    cache = init_cache(V3, RUN, batch=B, ctx_size=256)
    layers = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), cache.layers)
    return Cache(layers=layers, length=jnp.asarray(length, jnp.int32))


def _changed(before, after):
    """Returns which slots [B, S] changed in any layer, compared by bytes."""
    slots = np.zeros((B, before.layers[0].num_slots), bool)
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True):
        old, new = np.asarray(old).view(np.uint32), np.asarray(new).view(np.uint32)
        slots |= (old != new).any(-1)
    return slots


def test_ragged_steps_through_a_cache_are_one_pass():
    """Two calls with padding: real tokens get the logits of one pass, and only their slots are written."""
    params = draw_params(V3)
    expected = Definition(V3, params).logits(TOKENS)
    cache, done = _garbage_cache([0, 0]), np.array([0, 0])
    for num_tokens in ([5, 2], [3, 6]):
        tokens = np.full((B, T), 31, np.int32)
        for b in range(B):
            tokens[b, : num_tokens[b]] = TOKENS[b, done[b] : done[b] + num_tokens[b]]
        before = cache
        logits, cache = _step(params, tokens, cache, jnp.asarray(num_tokens, jnp.int32), V3)
        owned = np.zeros((B, 256), bool)
        for b in range(B):
            new = slice(done[b], done[b] + num_tokens[b])
            owned[b, new] = True
            np.testing.assert_allclose(logits[b, : num_tokens[b]], expected[b, new], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(_changed(before, cache), owned)
        done += num_tokens
        np.testing.assert_array_equal(cache.length, done)


def test_padding_changes_nothing():
    """Other ids in the padding: the same cache and the same logits of real tokens, bit by bit."""
    params, num_tokens = draw_params(V3), np.array([5, 0], np.int32)
    is_real = np.arange(T) < num_tokens[:, None]
    run = lambda fill: _step(params, np.where(is_real, TOKENS, fill), _garbage_cache([0, 0]), num_tokens, V3)
    (logits, cache), (other_logits, other_cache) = run(np.int32(3)), run(np.int32(29))
    assert np.isfinite(logits[is_real]).all()
    np.testing.assert_array_equal(other_logits[is_real], logits[is_real])
    np.testing.assert_array_equal(_changed(other_cache, cache), np.zeros((B, 256), bool))
    np.testing.assert_array_equal(cache.length, num_tokens)


def test_tokens_past_the_capacity_are_not_stored():
    cache = _garbage_cache([253, 10])
    full = np.full(B, T, np.int32)
    _, after = _step(draw_params(V3), TOKENS, cache, full, V3)
    owned = np.zeros((B, 256), bool)
    owned[0, 253:] = owned[1, 10:18] = True
    np.testing.assert_array_equal(_changed(cache, after), owned)


def test_gradient_is_that_of_the_definition():
    params, way = draw_params(V3), draw_params(V3, seed=1)
    loss = lambda params: jnp.sum(transformer.apply(params, TOKENS, None, V3, RUN)[0] ** 2)
    gradients = jax.jit(jax.grad(loss))(params)

    def loss_at(step):
        moved = jax.tree.map(lambda a, b: a.astype(np.float64) + step * b, params, way)
        return (Definition(V3, moved).logits(TOKENS) ** 2).sum()

    slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(way), strict=True))
    assert slope == pytest.approx((loss_at(1e-6) - loss_at(-1e-6)) / 2e-6, rel=1e-4)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        only_selects = path[-1].key == "bias"
        assert gradient.any() != only_selects, jax.tree_util.keystr(path)


def test_vmap_over_params_and_tokens():
    """Two models at once, each with its own tokens and its own cache."""
    models = [draw_params(V3, seed) for seed in (0, 1)]
    tokens = np.stack([TOKENS, TOKENS[::-1]])
    caches = [_garbage_cache([0, 0]) for _ in models]
    stack = lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves])
    apply = lambda params, tokens, cache: transformer.apply(params, tokens, cache, V3, RUN)
    logits, cache = jax.jit(jax.vmap(apply))(
        jax.tree.map(stack, *models), tokens, jax.tree.map(stack, *caches)
    )
    for i, params in enumerate(models):
        expected = Definition(V3, params).logits(tokens[i])
        np.testing.assert_allclose(logits[i], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.length, np.full((2, B), T))


def _attention_shapes(sizes, D):
    q_width = sizes.num_heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
    shapes = {
        "kv_a": (sizes.kv_lora_rank + sizes.qk_rope_head_dim, D),
        "kv_a_norm": (sizes.kv_lora_rank,),
        "kv_b": (sizes.num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), sizes.kv_lora_rank),
        "out": (D, sizes.num_heads * sizes.v_head_dim),
    }
    if sizes.q_lora_rank is None:
        return shapes | {"q": (q_width, D)}
    Q = sizes.q_lora_rank
    return shapes | {"q_a": (Q, D), "q_a_norm": (Q,), "q_b": (q_width, Q)}


@pytest.mark.parametrize("config", [V3, V2_LITE], ids=["V3", "V2-Lite"])
def test_init_params_makes_the_tree_of_a_file(config):
    """The paths are those that loading gives; `kv_b` stands for the up-projections."""
    D, F, E, moe = config.embed_dim, 8, 6, config.moe
    expected = {"embed/weight": (32, D), "output/weight": (32, D), "output_norm/weight": (D,)}
    for i in range(2):
        expected |= {f"layers_{i}/attn_norm/weight": (D,), f"layers_{i}/ffn_norm/weight": (D,)}
        for name, shape in _attention_shapes(config.mla, D).items():
            expected[f"layers_{i}/attn/{name}/weight"] = shape
    for name in ("gate", "up", "down"):
        shape = lambda width, name=name: (D, width) if name == "down" else (width, D)
        expected[f"layers_0/ffn/{name}/weight"] = shape(24)
        expected[f"layers_1/ffn/experts/{name}/weight"] = (E, *shape(F))
        if moe.num_shared_experts:
            expected[f"layers_1/ffn/shared/{name}/weight"] = shape(2 * F)
    expected["layers_1/ffn/router/weight"] = (E, D)
    if moe.has_selection_bias:
        expected["layers_1/ffn/router/bias"] = (E,)
    leaves = jax.tree_util.tree_leaves_with_path(_shapes(config))
    found = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    assert found == expected
    assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_init_params_draws_by_fan_in():
    """Weights are drawn so that outputs keep their size, and the two that end a branch by the depth."""
    config = dataclasses.replace(
        V2_LITE, embed_dim=64, num_layers=1, dense_hidden_dim=128, vocab_size=256, moe=None
    )
    params = jax.tree.map(np.asarray, transformer.init_params(jax.random.key(1), config))
    layer = params["layers_0"]
    assert (layer["attn_norm"]["weight"] == 1).all() and (params["output_norm"]["weight"] == 1).all()
    spreads = [
        (params["output"], 64**-0.5),
        (layer["ffn"]["gate"], 64**-0.5),
        (layer["ffn"]["down"], (0.5 / 128) ** 0.5),
        (layer["attn"]["kv_a"], 64**-0.5),
    ]
    for leaf, spread in spreads:
        assert leaf["weight"].std() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(
    ("path", "shape", "sentence"),
    [
        ("layers_0/attn/out", (16, 9), r"layers_0/attn/out/weight: weight must be \(16, 10\) .* \(16, 9\)"),
        (
            "layers_1/ffn/experts/up",
            (6, 16, 8),
            r"experts/up/weight: weight must be \(6, 8, 16\) .* \(6, 16, 8\)",
        ),
        ("embed", (33, 16), r"embed/weight: weight must be \(32, 16\) for this config, got \(33, 16\)"),
    ],
)
def test_weight_of_another_shape_is_refused(path, shape, sentence):
    params = draw_params(V3)
    functools.reduce(lambda tree, key: tree[key], path.split("/"), params)["weight"] = np.zeros(
        shape, np.float32
    )
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda: transformer.apply(params, jnp.asarray(TOKENS), None, V3, RUN))


def test_mode_0_without_a_cache_is_the_same_model():
    params = draw_params(V3)
    logits, _ = _apply(params, TOKENS, None, config=V3, run=RunConfig(mla=MLAMode.EXPANDED))
    expected = Definition(V3, params).logits(TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_logits_come_from_all_that_the_hidden_states_hold():
    """The kernels of the CPU would round them to 8 bits."""
    config = dataclasses.replace(V3, embed_dim=256)
    rng = np.random.default_rng(0)
    hidden, weight = (rng.standard_normal((n, 256), dtype=np.float32) for n in (B, config.vocab_size))
    weight = quant.encode(weight, "q8_0")
    params = {"output_norm": {"weight": np.ones(256, np.float32)}, "output": {"weight": weight}}
    with jax.default_matmul_precision("default"):
        logits = perplexity.unembed(params, hidden, config, RUN)
    normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(logits, normed @ np.asarray(quant.decode(weight)).T, rtol=0, atol=2e-3)
