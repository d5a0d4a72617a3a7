"""The three ways to attend against a loop over heads in float64, and what must not reach the result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_jax import quant
from mla_jax.cache import HeadRows, LatentRows
from mla_jax.config import MLAConfig, ModelConfig, RunConfig
from mla_jax.nn import mla

B, T, S, N, H, P, R, V = 3, 4, 512, 2, 6, 4, 8, 5
SCALE = 0.7
# The first position of each row: the start, across the end of a chunk, and deep in a later chunk.
STARTS = np.array([0, 254, 387], np.int32)
POSITIONS = STARTS[:, None] + np.arange(T, dtype=np.int32)
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def draw_case(dtype=np.float32, seed=0, positions=POSITIONS):
    """Draws queries, weights and a cache of `dtype`, whose slots past a row's last position hold NaN."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    dead = np.arange(S) > positions[:, -1:]
    case = dict(q=draw(B, T, N, H), q_rope=draw(B, T, N, P), k_up=draw(N, H, R), v_up=draw(N, V, R))
    for name, width in (("latent", R), ("rope", P)):
        case[name] = np.where(dead[..., None], np.float32(np.nan), draw(B, S, width)).astype(dtype)
    return case | dict(positions=positions)


def expand_by_definition(case):
    """Returns keys and values per head in float64."""
    latent, rope, k_up, v_up = (case[n].astype(np.float64) for n in ("latent", "rope", "k_up", "v_up"))
    keys, values = np.zeros((B, S, N, H + P)), np.zeros((B, S, N, V))
    for n in range(N):
        keys[:, :, n] = np.concatenate([latent @ k_up[n].T, rope], axis=-1)
        values[:, :, n] = latent @ v_up[n].T
    return keys, values


def attend_by_definition(case, keys, values, scale=SCALE):
    """Softmax attention, one head of one query at a time, in float64."""
    query = np.concatenate([case["q"], case["q_rope"]], axis=-1).astype(np.float64)
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    out = np.zeros((B, T, N, V))
    for b, t, n in np.ndindex(B, T, N):
        num_seen = case["positions"][b, t] + 1
        score = scale * keys[b, :num_seen, n] @ query[b, t, n]
        weight = np.exp(score - score.max())
        out[b, t, n] = weight / weight.sum() @ values[b, :num_seen, n]
    return out


@functools.partial(jax.jit, static_argnames=("way", "scale", "chunk"))
def _attend(way, case, scale, chunk):
    q, kwargs = (case["q"], case["q_rope"]), dict(sm_scale=scale, chunk=chunk)
    if way == "heads":
        rows = HeadRows(key=case["key"], value=case["value"])
        return mla.attend_heads(*q, rows, case["positions"], **kwargs)
    attend = {"expanded": mla.attend_expanded, "absorbed": mla.attend_absorbed}[way]
    rows = LatentRows(latent=case["latent"], rope=case["rope"])
    return attend(*q, rows, case["k_up"], case["v_up"], case["positions"], **kwargs)


def attend_and_define(way, case, chunk, scale=SCALE):
    """Returns attention by the code and by the definition, both on the numbers as the cache holds them."""
    keys, values = expand_by_definition(case)
    if way == "heads":
        dtype = case["latent"].dtype
        keys, values = keys.astype(dtype), values.astype(dtype)
        case = case | dict(key=keys, value=values)
    return _attend(way, case, scale, chunk), attend_by_definition(case, keys, values, scale)


each_way = pytest.mark.parametrize("way", ["heads", "expanded", "absorbed"])


@each_way
@pytest.mark.parametrize(
    ("cache_type", "chunk"), [("f32", S), ("f32", mla.FLASH_CHUNK), ("f32", 64), ("f16", 256), ("bf16", 256)]
)
def test_matches_the_definition(way, cache_type, chunk):
    out, expected = attend_and_define(way, draw_case(DTYPES[cache_type]), chunk)
    assert out.shape == (B, T, N, V) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@each_way
@pytest.mark.parametrize("chunk", [S, mla.FLASH_CHUNK])
def test_scores_in_the_hundreds_do_not_overflow(way, chunk):
    out, expected = attend_and_define(way, draw_case(seed=3), chunk, scale=40.0)
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=2e-3)


@each_way
def test_expanded_and_absorbed_are_twins(way):
    case = draw_case(seed=4)
    out, _ = attend_and_define(way, case, mla.FLASH_CHUNK)
    whole, _ = attend_and_define("absorbed", case, S)
    np.testing.assert_allclose(out, whole, rtol=1e-4, atol=1e-5)


@each_way
@pytest.mark.parametrize("chunk", [S, mla.FLASH_CHUNK])
def test_one_visible_token_returns_its_value(way, chunk):
    case = draw_case(positions=np.zeros((B, T), np.int32))
    out, _ = attend_and_define(way, case, chunk)
    value = np.einsum("BR,NVR->BNV", case["latent"][:, 0], case["v_up"])
    np.testing.assert_allclose(out, np.broadcast_to(value[:, None], out.shape), rtol=1e-5, atol=1e-5)


@each_way
def test_rows_do_not_see_each_other(way):
    """A row of NaN spoils no other row, and permuting rows permutes the result, bit by bit."""
    case = draw_case()
    out = np.asarray(attend_and_define(way, case, mla.FLASH_CHUNK)[0])
    per_row = ("q", "q_rope", "latent", "rope", "positions")
    order = [2, 0, 1]
    permuted = case | {name: case[name][order] for name in per_row}
    np.testing.assert_array_equal(attend_and_define(way, permuted, mla.FLASH_CHUNK)[0], out[order])
    for name in per_row[:-1]:
        case[name][1] = np.nan
    alone = np.asarray(attend_and_define(way, case, mla.FLASH_CHUNK)[0])
    np.testing.assert_array_equal(alone[[0, 2]], out[[0, 2]])
    assert np.isnan(alone[1]).all()


@pytest.mark.parametrize("way", ["expanded", "absorbed"])
def test_gradients_are_those_of_the_definition(way):
    """Dead slots of NaN must not reach a gradient either: 0 * NaN in a masked product would."""
    names = ("q", "q_rope", "k_up", "v_up")
    case, direction = draw_case(seed=5), draw_case(seed=6)
    weigh = np.random.default_rng(7).standard_normal((B, T, N, V))

    def loss(leaves):
        return jnp.sum(_attend(way, case | leaves, SCALE, S) * weigh.astype(np.float32))

    def loss_at(step):
        moved = case | {name: case[name] + step * direction[name].astype(np.float64) for name in names}
        return (attend_by_definition(moved, *expand_by_definition(moved)) * weigh).sum()

    gradients = jax.grad(loss)({name: case[name] for name in names})
    slope = sum(np.vdot(gradients[name], direction[name]) for name in names)
    assert slope == pytest.approx((loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-4)


D = 32
CONFIG = ModelConfig(
    vocab_size=8,
    context_length=64,
    embed_dim=D,
    num_layers=1,
    num_dense_layers=1,
    dense_hidden_dim=8,
    norm_epsilon=1e-6,
    mla=MLAConfig(
        num_heads=2,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=4,
        v_head_dim=16,
    ),
    moe=None,
)


def draw_layer(layout, seed=0):
    """Draws one layer's weights with the up-projections in the `layout` of a file."""
    sizes, rng = CONFIG.mla, np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
    heads, nope, rank = sizes.num_heads, sizes.qk_nope_head_dim, sizes.kv_lora_rank
    leaves = dict(q=draw(heads * sizes.qk_head_dim, D), kv_a=draw(rank + sizes.qk_rope_head_dim, D))
    leaves |= dict(kv_a_norm=draw(rank), out=draw(D, heads * sizes.v_head_dim))
    kv_b = draw(heads, nope + sizes.v_head_dim, rank)
    if layout == "kv_b":
        leaves["kv_b"] = kv_b.reshape(-1, rank)
    else:
        leaves |= dict(k_b=kv_b[:, :nope].swapaxes(1, 2), v_b=kv_b[:, nope:])
    return leaves


@functools.partial(jax.jit, static_argnames="config")
def _apply_layer(leaves, x, positions, config=CONFIG):
    params = {name: {"weight": leaf} for name, leaf in leaves.items()}
    return mla.MLAttention(config, RunConfig()).apply({"params": params}, x, None, positions, None)[0]


@pytest.fixture
def layer_input():
    x = np.random.default_rng(8).standard_normal((2, 5, D), dtype=np.float32)
    return x, np.tile(np.arange(5, dtype=np.int32), (2, 1))


def test_both_layouts_of_the_up_projection_are_equal(layer_input):
    out = _apply_layer(draw_layer("kv_b"), *layer_input)
    apart = _apply_layer(draw_layer("k_b and v_b"), *layer_input)
    assert np.abs(out).max() > 0.1
    np.testing.assert_allclose(apart, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["kv_b", "k_b and v_b"])
def test_quantised_weights_equal_their_decoded_selves(layout, layer_input):
    leaves = draw_layer(layout)
    encode = lambda leaf: jax.tree.map(jnp.asarray, quant.encode(leaf, "q8_0"))
    blocks = {name: leaf if leaf.ndim == 1 else encode(leaf) for name, leaf in leaves.items()}
    decoded = {name: quant.decode(leaf) for name, leaf in blocks.items()}
    out = _apply_layer(blocks, *layer_input)
    np.testing.assert_allclose(out, _apply_layer(decoded, *layer_input), rtol=1e-5, atol=1e-6)
    assert np.abs(out - _apply_layer(leaves, *layer_input)).max() > 1e-4


def test_weight_of_another_shape_is_refused(layer_input):
    config = dataclasses.replace(CONFIG, mla=dataclasses.replace(CONFIG.mla, v_head_dim=15))
    sentence = r"kv_b/weight: weight must be \(94, 32\) for this config, got \(96, 32\)\."
    with pytest.raises(ValueError, match=sentence):
        _apply_layer(draw_layer("kv_b"), *layer_input, config=config)
