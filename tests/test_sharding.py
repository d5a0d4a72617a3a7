"""One model on meshes of eight devices: the logits are those of one device, whatever is shared out how."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import layout, names, shard_parts
from mla_jax import expert_reduction as reduction_lib
from mla_jax import quant, sampler, sharding, sharding_plan, steps
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import apply, lay_out
from mla_jax.presets import PRESETS

NUM_PAGES, PAGE = 12, 64
LAYOUTS = {
    "expert": dict(expert=4),
    "data, expert": dict(data=2, expert=2),
    "mixed": dict(data=2, expert=2, model=2),
    "tensor, heads that do not divide": dict(model=8),
    "sequence": dict(expert=2, model=2, splits_cache=True),
    "sequence, data": dict(data=2, model=2, splits_cache=True),
}
MODELS = {  # in small, what divides nothing included
    "odd": dict(sizes=dict(heads=5, ff=96, ff_exp=64), experts=7, vocab=323),
    "V2-Lite": dict(sizes=dict(heads=16), q_lora=False, gating="softmax", normalize=False),
    "GLM-4.7-Flash": dict(sizes=dict(heads=20), kv="k_b_v_b", merged=True, experts=8, sizes_of="v"),
    "V3": dict(sizes=dict(heads=128, nope=32, v=32), groups=4, groups_used=2, yarn=True),
}
FAST = {"xla_backend_optimization_level": 0}  # compiled in half the time


def _load(folder, **options):
    options.pop("sizes_of", None)
    path = folder / "model.gguf"
    write_deepseek2(path, layers=2, weight_type="Q8_0", **options)
    return checkpoints_tools.load_gguf(path, progress=lambda *_: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns a model of which nothing divides by eight: 5 heads, 7 experts, 3 blocks of a hidden size."""
    return _load(tmp_path_factory.mktemp("models"), **MODELS["odd"])


def _on_mesh(checkpoint, run, **axes):
    """Returns the weights on a mesh, and the run."""
    weights = sharding.describe(checkpoint.params)
    shard = sharding.make_shard(checkpoint.config, weights, **axes)
    return shard_parts.place(checkpoint.params, checkpoint.config, shard), dataclasses.replace(
        run, shard=shard
    )


def _pool(run, config):
    """Returns a pool of which every place that no token has is NaN, or as near to it as its type has."""
    cache = steps.init_pool(config, run, batch=4, num_pages=NUM_PAGES, page_size=PAGE)

    def spoil(leaf):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.full_like(leaf, jnp.nan if is_float else 77)

    return dataclasses.replace(cache, layers=jax.tree.map(spoil, cache.layers))


def _tables(run):
    """Returns pages i32[4, 3] of four sequences, shuffled, of the pool of their group."""
    pages = np.asarray([[2, 0, -1], [1, 4, 5], [3, 2, 0], [5, 1, 4]], np.int32)
    has_groups = run.shard is not None and run.shard.data > 1
    pages[2:] += 0 if has_groups else NUM_PAGES // 2
    return pages


def _two_calls(params, config, run):
    """Returns the logits of a prompt of 40 tokens, and of 3 more, in four sequences."""
    tokens, pages = np.random.default_rng(0).integers(320, size=(4, 43), dtype=np.int32), _tables(run)
    call = jax.jit(functools.partial(apply, config=config, run=run), compiler_options=FAST)
    first, cache = call(params, tokens[:, :40], _pool(run, config), pages=pages)
    second, _ = call(params, tokens[:, 40:], cache, pages=pages)
    return first, second


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Returns the logits of one device."""
    return _two_calls(checkpoint.params, checkpoint.config, RunConfig(cache_type="f32"))


@pytest.mark.parametrize("axes", LAYOUTS.values(), ids=LAYOUTS)
def test_logits_are_those_of_one_device(checkpoint, expected, axes):
    params, run = _on_mesh(checkpoint, RunConfig(cache_type="f32"), **axes)
    chex.assert_trees_all_close(_two_calls(params, checkpoint.config, run), expected, atol=2e-5, rtol=1e-5)


def test_kernels_of_the_cpu_run_on_every_device(checkpoint):
    """They round activations to 8 bits, after sums in another order: a token may take another expert."""
    params, run = _on_mesh(checkpoint, RunConfig(cache_type="f32"), data=2, expert=2, model=2)
    with jax.default_matmul_precision("default"):
        found = _two_calls(params, checkpoint.config, run)
        alone = _two_calls(checkpoint.params, checkpoint.config, RunConfig(cache_type="f32"))
    for one, other in zip(found, alone, strict=True):
        is_near = np.isclose(one, other, atol=1e-2, rtol=1e-2).all(axis=-1)
        assert is_near.mean() > 0.9, is_near


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("V2-Lite", dict(expert=8)),
        ("GLM-4.7-Flash", dict(expert=2, model=4)),
        ("V3", dict(data=2, expert=4, splits_cache=True)),
    ],
)
def test_published_shapes_in_small(tmp_path, name, axes):
    checkpoint, run = _load(tmp_path, **MODELS[name]), RunConfig(cache_type="bf16")
    expected = _two_calls(checkpoint.params, checkpoint.config, run)
    params, run = _on_mesh(checkpoint, run, **axes)
    chex.assert_trees_all_close(_two_calls(params, checkpoint.config, run), expected, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "axes"),
    [
        (dict(cache_type="q8_0", hadamard_size=64), dict(model=2, splits_cache=True)),
        (dict(mla=0, cache_type="q8_0"), dict(data=2, model=2)),
    ],
    ids=["q8_0, split", "mode 0"],
)
def test_every_kind_of_cache(tmp_path, settings, axes):
    checkpoint = _load(tmp_path, sizes=dict(heads=2, kv_lora=64, rope=64, nope=64))
    run = RunConfig(**settings)
    expected = _two_calls(checkpoint.params, checkpoint.config, run)
    params, run = _on_mesh(checkpoint, run, **axes)
    chex.assert_trees_all_close(_two_calls(params, checkpoint.config, run), expected, atol=2e-2, rtol=2e-2)


def test_steps_draw_what_one_device_draws(checkpoint):
    """With SER in two of the sequences, and penalties that look back."""

    def draw(params, run):
        config, pages = checkpoint.config, _tables(run)
        prompt = np.random.default_rng(1).integers(320, size=(4, 32), dtype=np.int32)
        settings = [reduction_lib.per_layer(config, setting) for setting in (None, (1, 0.8), None, (2, 1.0))]
        reduction, count = reduction_lib.arrays(*settings), np.asarray([32, 7, 20, 1], np.int32)
        keywords = dict(config=config, run=run)
        cache = steps.prefill(params, prompt, count, _pool(run, config), pages, reduction, **keywords)
        params_of_row = sampler.SamplingParams(temperature=0.9, seed=3, repeat_penalty=1.3)
        sampling = sampler.batch([params_of_row] * 4)
        recent = np.full((4, sampler.NUM_RECENT), -1, np.int32)
        inputs = np.asarray([5, 6, 7, 8], np.int32), recent, cache, sampling
        more = np.int32(6), np.asarray([-1], np.int32), pages, reduction
        drawn, taken, _, cache = steps.decode(params, *inputs, *more, **keywords)
        assert taken == 6
        return np.asarray(drawn), np.asarray(cache.length)

    expected = draw(checkpoint.params, RunConfig(cache_type="f32"))
    assert len(np.unique(expected[0][:, :6])) > 8
    axes = dict(data=2, expert=2, splits_cache=True)
    chex.assert_trees_all_equal(draw(*_on_mesh(checkpoint, RunConfig(cache_type="f32"), **axes)), expected)


def _lowered(checkpoint, axes):
    """Returns the run, and a decode step of it."""
    params, run = _on_mesh(checkpoint, RunConfig(), **axes)
    inputs = np.zeros((4, 1), np.int32), _pool(run, checkpoint.config)
    call = jax.jit(functools.partial(apply, config=checkpoint.config, run=run))
    return run, call.lower(params, *inputs, pages=_tables(run))


@pytest.mark.parametrize("axes", LAYOUTS.values(), ids=LAYOUTS)
def test_the_lowered_step_has_the_planned_collectives(checkpoint, axes):
    run, lowered = _lowered(checkpoint, axes)
    text = lowered.as_text()
    planned = sharding_plan.collectives(checkpoint.config, run)
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
        found = len(re.findall(rf"stablehlo\.{kind.replace('-', '_')}\b", text))
        assert found == sum(step.count for step in planned if step.kind == kind), kind


def test_no_weight_is_gathered(checkpoint):
    """Blocks are u8."""
    _, lowered = _lowered(checkpoint, LAYOUTS["mixed"])
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", lowered.compile(FAST).as_text())
    assert gathered and set(gathered) <= {"f32", "s32"}


@pytest.mark.parametrize("model", ["deepseek-v3", "deepseek-v2-lite"])
@pytest.mark.parametrize("is_merged", [False, True], ids=["apart", "merged"])
def test_every_weight_has_one_rule(model, is_merged):
    config = PRESETS[model]
    at_hand = ["blk.3.ffn_gate_up_exps.weight", "blk.3.attn_k_b.weight"] if is_merged else []
    for name, shape in layout.expected_shapes(config, at_hand).items():
        assert len(sharding.logical_axes("/".join(names.to_path(name)))) == len(shape)


def test_a_weight_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="got 0 for 'layers_0/attn/bias'"):
        sharding.logical_axes("layers_0/attn/bias")


@pytest.mark.parametrize("name", quant.FORMATS)
def test_padding_decodes_to_zeros(name):
    entry = quant.FORMATS[name]
    header = np.zeros((2, entry.header_bytes), np.uint8) if entry.header_bytes else None
    blocks = np.zeros((2, 3, entry.block_bytes), np.uint8)
    weight = quant.QuantizedTensor(blocks=blocks, header=header, format=name)
    chex.assert_trees_all_equal(
        np.asarray(quant.decode(weight)), np.zeros((2, 3 * entry.block_size), np.float32)
    )


@pytest.mark.parametrize(
    ("block_size", "axes", "num_heads"),
    [(32, dict(model=8), 3), (256, dict(model=8), 4), (256, dict(expert=2, model=2), 6), (1, {}, 20)],
)
def test_heads_fill_whole_blocks(block_size, axes, num_heads):
    config = dataclasses.replace(PRESETS["deepseek-v2-lite"])
    mla = dataclasses.replace(config.mla, num_heads=20)
    about = dict(path="layers_0/attn/out/weight", shape=(2048, 20 * 128), num_bytes=0)
    weights = [sharding.WeightInfo(block_size=block_size, **about)]
    shard = sharding.make_shard(dataclasses.replace(config, mla=mla), weights, **axes)
    assert shard.sizes.num_heads == num_heads


@pytest.mark.parametrize("axes", LAYOUTS.values(), ids=LAYOUTS)
def test_each_device_has_its_part(checkpoint, axes):
    """Put together again, the parts are the whole and zeros; bytes are those of the plan."""
    params, run = _on_mesh(checkpoint, RunConfig(), **axes)
    one = jax.devices()[0]
    num_bytes = sum(
        part.data.nbytes
        for leaf in jax.tree.leaves(params)
        for part in leaf.addressable_shards
        if part.device == one
    )
    weights = sharding.describe(checkpoint.params)
    assert num_bytes == sharding_plan.weight_bytes(weights, checkpoint.config, run.shard)
    pool = steps.init_pool(checkpoint.config, run, batch=2, num_pages=2 * NUM_PAGES)
    shards = itertools.chain.from_iterable(leaf.addressable_shards for leaf in jax.tree.leaves(pool.layers))
    held = sum(part.data.nbytes for part in shards if part.device == one)
    num_tokens = 2 * NUM_PAGES * PAGE // run.shard.data
    assert held == sharding_plan.cache_bytes(checkpoint.config, run, num_tokens)


def test_too_few_devices_are_told(checkpoint):
    weights = sharding.describe(checkpoint.params)
    with pytest.raises(ValueError, match="the mesh data=3,expert=1,model=4 must have at most the 8 devices"):
        sharding.device_mesh(sharding.make_shard(checkpoint.config, weights, data=3, model=4))


def test_parts_of_a_gpu_are_in_planes(checkpoint, expected):
    """The kernels themselves are for a GPU; here XLA reads the same planes."""
    config, run = checkpoint.config, RunConfig(cache_type="f32", gpu_kernels=True)
    params, run = _on_mesh(checkpoint, run, expert=2, model=2)
    params = lay_out(params, run)
    assert isinstance(params["layers_1"]["ffn"]["experts"]["down"]["weight"], quant.PlanarTensor)
    chex.assert_trees_all_close(_two_calls(params, config, run), expected, atol=2e-5, rtol=1e-5)


def test_each_part_is_read_from_the_file(checkpoint):
    params, run = _on_mesh(checkpoint, RunConfig(), expert=2, model=2)
    loaded, shard = checkpoints_tools.load_on_mesh(
        checkpoint.path, dict(expert=2, model=2), progress=lambda *_: None
    )
    assert shard == run.shard
    chex.assert_trees_all_equal(loaded.params, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded.params) == jax.tree.map(
        lambda leaf: leaf.sharding, params
    )


@pytest.mark.parametrize(
    ("text", "axes"),
    [("auto", None), ("model=4", dict(model=4)), ("data=2,expert=8", dict(data=2, expert=8))],
)
def test_meshes_are_parsed(text, axes):
    assert sharding.parse_mesh(text) == axes


@pytest.mark.parametrize("text", ["", "model", "model=0", "rows=2", "model=2,model=2", "model=2;data=2"])
def test_what_is_no_mesh_is_told(text):
    with pytest.raises(ValueError, match="a mesh must be auto, or some of data, expert, model"):
        sharding.parse_mesh(text)


@pytest.mark.parametrize(
    ("name", "num_devices", "axes"),
    [
        ("deepseek-v3", 8, dict(expert=8, model=1)),
        ("deepseek-v2-lite", 6, dict(expert=2, model=3)),
        ("deepseek-v3", 1, dict(expert=1, model=1)),
    ],
)
def test_a_mesh_of_all_devices(name, num_devices, axes):
    assert sharding.auto_axes(PRESETS[name], num_devices) == axes
