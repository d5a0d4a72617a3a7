"""Up-projections of the latent in panels: the rows of each head, read along and across."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
from synthetic import write_deepseek2

import checkpoints_tools
import cpu_kernels
from checkpoints_tools import names
from cpu_kernels import panels
from mla_jax import generate, quant
from mla_jax.cache import LatentRows, codec
from mla_jax.nn import mla_on_cpu
from mla_jax.nn.up_projections import UpProjections
from mla_jax.quant import dispatch
from mla_jax.sampler import SamplingParams
from mla_jax.serve.request import Request

TRANSPOSED = ("q8_0", "q4_0", "q6_0", "iq4_nl")
NOT_TRANSPOSED = ("q4_K", "q5_K", "q6_K", "iq4_xs", "iq4_ks")


@functools.cache
def _weight(name, rows, size):
    return jax.tree.map(np.asarray, random_weights.random_weight(name, rows, size))


def _packed(weight):
    laid_out = panels.pack(np.array(weight.blocks), format=weight.format)
    return quant.PanelTensor(panels=jnp.asarray(laid_out), header=weight.header, format=weight.format)


def _draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _arrays(weight):
    return dispatch.operands(weight)[0]


def _transposed(name, weight, x, *, size, stride):
    call = functools.partial(cpu_kernels.head_transposed, format=name, size=size, stride=stride)
    return np.asarray(jax.jit(call)(x, *_arrays(weight)))


def _by_hand(x, weight, stride):
    """The definition: of 256 rows and 32 columns, numbers times their scales are rounded to 16 bits."""
    block = quant.FORMATS[weight.format].block_size
    scale = np.asarray(weight.blocks[..., :2]).copy().view(np.float16)[..., 0].astype(np.float32)
    decoded = np.asarray(quant.decode(weight), np.float64).reshape(*scale.shape, block)
    codes = decoded / scale[..., None]  # less their zero
    (X, N, H), rows = x.shape, np.arange(x.shape[2])
    out = np.zeros((X, N, *codes.shape[1:]))
    for n in range(N):
        for first in range(0, H, 256):
            part = rows[first : first + 256]
            scaled = x[:, n, part, None] * scale[n * stride + part]
            step = np.abs(scaled).max(axis=1, keepdims=True) / (127 * 256)
            rounded = np.rint(scaled / np.where(step == 0, 1, step)) * step
            out[:, n] += np.einsum("xhb,hbc->xbc", rounded, codes[n * stride + part])
    return out.reshape(X, N, -1)


def test_formats_are_those_of_this_list(panel_set):
    assert cpu_kernels.panel_formats(transposed=True) == set(TRANSPOSED)
    assert cpu_kernels.panel_formats() == {*TRANSPOSED, *NOT_TRANSPOSED}


@pytest.mark.parametrize("tokens", [0, 1, 5, 17])
@pytest.mark.parametrize("H", [16, 48, 256, 304])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_product_is_the_definition(name, H, tokens, panel_set):
    N, stride, size = 3, H + 16, 32 * 11
    weight, x = _weight(name, N * stride, size), _draw(tokens, tokens, N, H)
    out = _transposed(name, _packed(weight), x, size=size, stride=stride)
    chex.assert_shape(out, (tokens, N, size))
    if tokens:
        expected = _by_hand(x, weight, stride)
        assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()  # a tie may be rounded otherwise
        by_head = np.asarray(quant.decode(weight), np.float64).reshape(N, stride, size)[:, :H]
        exact = np.einsum("xnh,nhr->xnr", x, by_head)
        assert np.linalg.norm(out - exact) < 1e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize("rows", [16, 304])  # of a head: more than 256 are added to what is there
@pytest.mark.parametrize("name", TRANSPOSED)
def test_tokens_do_not_see_each_other(name, rows, panel_set):
    stride = rows + 16
    weight = _packed(_weight(name, 3 * stride, 64))
    x = _draw(1, 6, 3, rows)
    x[1], x[2, 1, 3], x[3] = np.nan, np.inf, 0.0
    together = _transposed(name, weight, x, size=64, stride=stride)
    for i in range(6):
        alone = _transposed(name, weight, x[i : i + 1], size=64, stride=stride)
        np.testing.assert_array_equal(alone[0], together[i])
    assert np.isnan(together[1]).all() and np.isnan(together[2, 1]).all() and (together[3] == 0).all()
    assert np.isfinite(together[[0, 2, 4, 5]][:, [0, 2]]).all()


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("name", TRANSPOSED + NOT_TRANSPOSED)
def test_values_of_heads_are_those_of_blocks_to_the_last_bit(name, tokens, panel_set):
    N, H, V = 3, 32, 16
    size = 32 * 11 if name in TRANSPOSED else 512
    weight, x = _weight(name, N * (H + V), size), _draw(tokens, tokens, N, size)
    call = functools.partial(cpu_kernels.head_matmul, format=name, out=V, stride=H + V, first=H)
    of = lambda weight: jax.jit(call)(x, *_arrays(weight))
    np.testing.assert_array_equal(of(_packed(weight)), of(weight))


@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_prompts_are_attended_to_as_with_blocks_to_the_last_bit(tokens, panel_set):
    N, H, V, R, P = 2, 32, 16, 64, 32
    pool = [codec.encode(jnp.asarray(_draw(size, 4, 64, size)), "f16") for size in (R, P)]
    pages, positions = jnp.array([[3, 1, 0, 2]]), jnp.arange(200, 200 + tokens)[None]
    rows = LatentRows(latent=pool[0], rope=pool[1], pages=pages)
    q, q_rope = (jnp.asarray(_draw(seed, 1, tokens, N, size)) for seed, size in enumerate((H, P)))
    weight = _weight("q8_0", N * (H + V), R)
    attend = functools.partial(mla_on_cpu.attend_expanded, sm_scale=0.1, rotation=None)
    by = lambda kv: attend(q, q_rope, rows, UpProjections(kv=kv, num_heads=N, value_size=V), positions)
    np.testing.assert_array_equal(by(_packed(weight)), by(weight))


@pytest.mark.parametrize("change", [dict(stride=24), dict(first=8), dict(out=24), dict(first=64)], ids=str)
def test_heads_that_begin_no_panel_are_refused(change, panel_set):
    weight, x = _packed(_weight("q8_0", 96, 64)), jnp.ones((1, 2, 64))
    settings = dict(format="q8_0", out=16, stride=48, first=32)
    jax.block_until_ready(cpu_kernels.head_matmul(x, *_arrays(weight), **settings))
    with pytest.raises(Exception, match="heads do not fit each other"):
        jax.block_until_ready(cpu_kernels.head_matmul(x, *_arrays(weight), **settings | change))


def test_formats_with_minima_are_not_read_transposed(panel_set):
    with pytest.raises(Exception, match="panels of format q4_K are not read transposed"):
        _transposed("q4_K", _packed(_weight("q4_K", 64, 256)), jnp.ones((1, 2, 16)), size=256, stride=32)


@pytest.mark.parametrize(
    ("sizes", "are_there"),
    [({}, True), (dict(nope=40), False), (dict(v=40, heads=4), False)],
    ids=["whole", "keys cut", "values cut"],
)
def test_up_projections_lie_in_panels_where_each_head_has_whole_ones(tmp_path, sizes, are_there, panel_set):
    path = tmp_path / "a.gguf"
    write_deepseek2(path, weight_type="Q8_0", alignment=64, sizes=dict(embed=96) | sizes)
    checkpoint = checkpoints_tools.load_gguf(path, in_panels=True)
    found = {name for name, leaf in names.flatten(checkpoint.params).items() if "attn_kv_b" in name}
    assert found
    leaves = names.flatten(checkpoint.params)
    assert all(isinstance(leaves[name], quant.PanelTensor) == are_there for name in found)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_a_model_with_them_says_nearly_the_same(tmp_path, mode, panel_set):
    path = tmp_path / "a.gguf"
    # Without experts, of which others may be taken after another rounding.
    write_deepseek2(path, weight_type="Q8_0", alignment=64, layers=2, dense=2, sizes=dict(embed=96))
    models = [
        generate.load(path, mla=mode, ctx_size=128, run_time_repack=repack, compilation_cache=None)
        for repack in (True, False)
    ]
    about = dict(max_tokens=1, sampling=SamplingParams(temperature=0.0, seed=0), num_logprobs=20)
    for length in (1, 2, 40):
        prompt = tuple(int(token) for token in np.random.default_rng(0).integers(3, 60, length))
        drawn = [next(model.engine.stream(Request(prompt=prompt, **about))[1]) for model in models]
        ours, theirs = (dict(piece.logprobs.top) for piece in drawn)
        both = ours.keys() & theirs.keys()
        assert len(both) > 15
        np.testing.assert_allclose(*([of[token] for token in both] for of in (ours, theirs)), atol=0.05)
