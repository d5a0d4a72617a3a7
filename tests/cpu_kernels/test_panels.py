import dataclasses
import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
from synthetic import write_deepseek2

import checkpoints_tools
import cpu_kernels
from checkpoints_tools import names, shard_parts
from checkpoints_tools import panels as lay_out_lib
from cpu_kernels import panels
from mla_jax import cache as cache_lib
from mla_jax import generate, presets, quant, sharding
from mla_jax.nn import layers

FORMATS = ("q8_0", "q4_0", "q6_0", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs", "iq4_ks")


@pytest.fixture
def any_panels():
    if not cpu_kernels.panel_formats():
        pytest.skip("this machine has no AVX-512 VNNI, whose kernels read panels")


@functools.cache
def _weight(name, *shape):
    if len(shape) == 2:
        return jax.tree.map(np.asarray, random_weights.random_weight(name, *shape))
    rows = np.prod(shape[:-1])
    return jax.tree.map(
        lambda leaf: leaf.reshape(*shape[:-1], *leaf.shape[1:]), _weight(name, rows, shape[-1])
    )


def _size(name):
    """Rows that end within a chunk of 256 where the format allows it."""
    return 32 * 21 if quant.FORMATS[name].block_size == 32 else 768


def _lay_out(name, weight):
    return lay_out_lib.lay_out(name, weight, presets.PACKAGED)


def _in_panels(name, *shape):
    return _lay_out("blk.0.ffn_up_exps.weight", jax.tree.map(np.copy, _weight(name, *shape)))


@pytest.mark.parametrize("kind", ["rows", "pieces", "constant"])
def test_blocks_that_cannot_be_packed_are_refused(kind):
    blocks = np.zeros((24 if kind == "rows" else 32, 4, 34), np.uint8)
    blocks = blocks[:, ::2] if kind == "pieces" else blocks
    blocks.flags.writeable = kind != "constant"
    with pytest.raises(ValueError, match="16 rows at a time, in one piece and writeable"):
        panels.pack(blocks, format="q8_0")


def test_formats_are_those_of_this_list(panel_set):
    assert cpu_kernels.panel_formats() == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_panel_holds_the_words_of_16_rows_beside_each_other(name, any_panels):
    fmt = quant.FORMATS[name]
    shape = (32, 3, fmt.block_bytes)
    blocks = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    out = panels.pack(blocks.copy(), format=name)
    chex.assert_shape(out, (2, 3, 16 * fmt.block_bytes))
    scale = {"q6_K": 208}.get(name, 0 if fmt.block_size == 32 else None)
    cuts = [byte for byte in range(0, fmt.block_bytes) if scale is None or byte // 2 != scale // 2]
    words = [cuts[i : i + 4] for i in range(0, len(cuts), 4)]
    pieces = sorted(words + ([] if scale is None else [[scale, scale + 1]]))
    expected = [[[rows[row, b, piece] for piece in pieces for row in range(16)] for b in range(3)]
                for rows in (blocks[:16], blocks[16:])]  # fmt: skip
    flat = [np.concatenate([np.concatenate(block) for block in panel]) for panel in expected]
    np.testing.assert_array_equal(out.reshape(2, -1), flat)
    np.testing.assert_array_equal(panels.unpack(jnp.asarray(out), format=name), blocks)
    indices = np.arange(blocks.size)
    np.testing.assert_array_equal(
        out.reshape(-1)[panels.places(indices, shape, format=name)], blocks.reshape(-1)
    )


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 8, 9, 12, 16, 17, 45])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_blocks_to_the_last_bit(name, rows, panel_set):
    size = _size(name)
    x = np.random.default_rng(rows).standard_normal((rows, size)).astype(np.float32)
    of = lambda weight: np.asarray(jax.jit(quant.matmul)(x, weight))
    found = of(_in_panels(name, 48, size))
    np.testing.assert_array_equal(found, of(_weight(name, 48, size)))
    assert rows == 0 or np.ptp(found) > 0


def test_nothing_is_left_of_the_weight_before(panel_set):
    x = np.random.default_rng(0).standard_normal((35, 256)).astype(np.float32)
    multiply = functools.partial(cpu_kernels.matmul, header=np.zeros((640, 0), np.uint8), format="q8_0")
    short = panels.pack(np.zeros((640, 3, 34), np.uint8), format="q8_0")  # not a whole chunk of 256
    spoiled = np.full((40, 8, 16 * 34), 0xFF, np.uint8)  # every scale is NaN
    for rows in (1, 2, 5, 35):
        assert np.isnan(multiply(x[:rows], spoiled)).all()
        np.testing.assert_array_equal(multiply(x[:rows, :96], short), 0)


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("X", [1, 5, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_those_of_blocks_to_the_last_bit(name, X, merged, panel_set):
    E, K, D, F = 5, 3, 256, 256
    names = {"gate_up": (E, 2 * F, D)} if merged else {"gate": (E, F, D), "up": (E, F, D)}
    shapes = names | {"down": (E, D, F)}
    rng = np.random.default_rng(X)
    x, ids = rng.standard_normal((X, D)).astype(np.float32), rng.integers(0, E + 1, (X, K)).astype(np.int32)
    weights = rng.random((X, K)).astype(np.float32)
    of = lambda make: np.asarray(
        jax.jit(layers.experts_on_cpu)(x, ids, weights, {n: make(name, *s) for n, s in shapes.items()})
    )
    np.testing.assert_array_equal(of(_in_panels), of(_weight))


@pytest.mark.parametrize("name", ["avx2", "generic"])
def test_other_instruction_sets_refuse_panels(name, any_panels):
    weight = _in_panels("q8_0", 32, 64)
    cpu_kernels.use_instruction_set(name)
    try:
        assert not cpu_kernels.panel_formats()
        assert _lay_out("output.weight", _weight("q8_0", 32, 64)) is _weight("q8_0", 32, 64)
        with pytest.raises(Exception, match="panels are read with AVX-512 alone"):
            jax.block_until_ready(jax.jit(quant.matmul)(jnp.ones((1, 64)), weight))
    finally:
        cpu_kernels.use_instruction_set(cpu_kernels.instruction_sets()[0])


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"gate": (4, 32, 64), "up": (4, 32, 64), "down": (4, 64, 24)}, "gate and up must have whole panels"),
        ({"gate_up": (4, 48, 64), "down": (4, 64, 24)}, "gate and up must have whole panels"),
        ({"gate": (4, 32, 64), "up": (5, 32, 64), "down": (4, 64, 32)}, "do not fit each other"),
        ({"gate": (2, 32, 64), "up": (4, 32, 64), "down": (4, 64, 32)}, "do not fit each other"),
    ],
    ids=["part of a panel", "shared panel", "more ups", "fewer gates"],
)
def test_experts_that_do_not_fit_are_refused(shapes, sentence, any_panels):
    experts = {}
    for name, shape in shapes.items():
        of_blocks = shape[-1] % 32 == 0
        experts[name] = _in_panels("q8_0", *shape) if of_blocks else np.zeros(shape, np.float32)
    x, ids, weights = np.ones((3, 64), np.float32), np.zeros((3, 2), np.int32), np.ones((3, 2), np.float32)
    with pytest.raises(Exception, match=sentence):
        jax.block_until_ready(jax.jit(layers.experts_on_cpu)(x, ids, weights, experts))


@pytest.mark.parametrize("name", ["q8_0", "q6_K", "iq4_ks"])
def test_a_tensor_in_panels_is_the_weight(name, any_panels):
    weight, packed = _weight(name, 4, 32, 768), _in_panels(name, 4, 32, 768)
    assert (packed.shape, packed.ndim, packed.dtype) == (weight.shape, weight.ndim, weight.dtype)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, quant.in_blocks(packed)), weight)
    np.testing.assert_array_equal(quant.decode(packed), quant.decode(weight))
    np.testing.assert_array_equal(quant.decode(packed[2]), quant.decode(weight[2]))
    np.testing.assert_array_equal(
        quant.take_rows(packed[1], jnp.array([3, 30])), quant.decode(weight)[1, [3, 30]]
    )
    with pytest.raises(ValueError, match="at most 1 indices"):
        packed[0, 0]


def test_derivatives_are_those_of_blocks(any_panels):
    x = np.random.default_rng(0).standard_normal((3, 768)).astype(np.float32)
    slope = lambda weight: jax.jit(jax.grad(lambda x: jnp.sum(quant.matmul(x, weight) ** 2)))(x)
    np.testing.assert_array_equal(slope(_in_panels("q4_K", 32, 768)), slope(_weight("q4_K", 32, 768)))


def test_panels_are_kept_for_the_way_back_as_they_are(any_panels):
    weight = jax.tree.map(jnp.asarray, _in_panels("q8_0", 32, 64))
    _, back = jax.vjp(lambda x: quant.matmul(x, weight), jnp.ones((3, 64)))
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.dtype == jnp.uint8 and leaf.size]
    assert kept and all(leaf.shape == weight.panels.shape for leaf in kept)


def test_planes_and_rows_of_an_adapted_weight_are_those_of_blocks(any_panels):
    weight, packed = _weight("q8_0", 32, 64), _in_panels("q8_0", 32, 64)
    planes = [quant.to_planes(jax.tree.map(jnp.asarray, w)) for w in (weight, packed)]
    chex.assert_trees_all_equal(*planes)
    assert isinstance(planes[1], quant.PlanarTensor)
    low_rank = dict(a=jnp.ones((2, 64)), b=jnp.ones((32, 2)))
    rows = [quant.take_rows(quant.LoraTensor(base=w, **low_rank), jnp.array([5])) for w in (weight, packed)]
    np.testing.assert_array_equal(*rows)
    products = [
        quant.matmul(jnp.ones((1, 64)), quant.LoraTensor(base=w, **low_rank)) for w in (weight, packed)
    ]
    np.testing.assert_array_equal(*products)


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_float32_products_read_panels_too(precision, any_panels):
    x = np.random.default_rng(0).standard_normal((1, 768)).astype(np.float32)
    packed = _in_panels("q5_K", 32, 768)
    with jax.default_matmul_precision(precision):
        of = lambda weight: np.asarray(jax.jit(quant.matmul)(x, weight))
        np.testing.assert_array_equal(of(packed), of(_weight("q5_K", 32, 768)))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.3.attn_k_b.weight", "blk.3.attn_v_b.weight"])
def test_what_is_not_only_multiplied_stays_in_blocks(name, any_panels):
    assert isinstance(_lay_out(name, _weight("q8_0", 32, 64)), quant.QuantizedTensor)


@pytest.mark.parametrize(
    "shape, name",
    [((24, 64), "output.weight"), ((2, 16, 64), "blk.1.ffn_gate_up_exps.weight"), ((0, 64), "output.weight")],
)
def test_panels_of_two_matrices_are_not_made(shape, name, any_panels):
    assert isinstance(_lay_out(name, _weight("q8_0", *shape)), quant.QuantizedTensor)


def test_a_fingerprint_is_of_the_weights_however_they_lie(any_panels):
    params = {"a": {"weight": _weight("q6_K", 4, 32, 768)}, "b": _weight("iq4_ks", 32, 768), "c": np.ones(3)}
    packed = {"a": {"weight": _in_panels("q6_K", 4, 32, 768)}, "b": _in_panels("iq4_ks", 32, 768)}
    of = functools.partial(cache_lib.fingerprint, "config")
    assert of(packed | {"c": np.ones(3)}) == of(params)
    other = dataclasses.replace(packed["b"], header=packed["b"].header + np.uint8(1))
    assert of(packed | {"b": other, "c": np.ones(3)}) != of(params)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.gguf"
    write_deepseek2(path, weight_type="Q8_0", alignment=64, sizes=dict(embed=96))
    return path


def _formats(params):
    leaves = names.flatten(params)
    return {name for name, leaf in leaves.items() if isinstance(leaf, quant.PanelTensor)}


@pytest.mark.parametrize(
    ("mmap", "in_panels", "are_there"),
    [
        (None, None, True),
        (None, True, True),
        (None, False, False),
        (True, None, False),
        (True, False, False),
        (False, True, True),
    ],
)
def test_weights_that_are_read_are_laid_out(path, caplog, any_panels, mmap, in_panels, are_there):
    with caplog.at_level(logging.INFO, "absl"):
        found = checkpoints_tools.load_gguf(path, mmap=mmap, in_panels=in_panels)
    plain = checkpoints_tools.load_gguf(path, mmap=False)
    laid_out = _formats(found.params)
    assert bool(laid_out) == are_there == any("lie in panels of 16 rows" in text for text in caplog.messages)
    if are_there:
        assert {"blk.0.attn_output.weight", "output.weight"} <= laid_out
        assert not {name for name in laid_out if "token_embd" in name}
    is_leaf = lambda leaf: isinstance(leaf, quant.PanelTensor)
    blocks = jax.tree.map(quant.in_blocks, found.params, is_leaf=is_leaf)
    jax.tree.map(np.testing.assert_array_equal, blocks, plain.params)
    assert cache_lib.fingerprint("", found.params) == cache_lib.fingerprint("", plain.params)


def test_a_file_that_is_saved_has_blocks_again(path, tmp_path, any_panels):
    checkpoint = checkpoints_tools.load_gguf(path, in_panels=True)
    checkpoints_tools.save_gguf(tmp_path / "b.gguf", checkpoint)
    saved, plain = (checkpoints_tools.load_gguf(p).params for p in (tmp_path / "b.gguf", path))
    jax.tree.map(np.testing.assert_array_equal, saved, plain)


def test_what_is_mapped_is_not_laid_out(path):
    with pytest.raises(ValueError, match="mmap must come without in_panels"):
        checkpoints_tools.load_gguf(path, mmap=True, in_panels=True)


def test_who_asks_for_panels_that_nothing_reads_is_told(path, caplog, any_panels):
    with jax.default_matmul_precision("highest"), caplog.at_level(logging.INFO, "absl"):
        found = checkpoints_tools.load_gguf(path, in_panels=True)
    assert not _formats(found.params)
    assert any(
        "no weights lie in panels: these are for kernels with AVX-512 VNNI" in text
        for text in caplog.messages
    )


def test_panels_that_a_mesh_is_given_become_blocks(path, any_panels):
    checkpoint, plain = (checkpoints_tools.load_gguf(path, in_panels=part) for part in (True, False))
    shard = sharding.make_shard(plain.config, sharding.describe(plain.params), expert=2)
    placed = [shard_parts.place(part.params, part.config, shard) for part in (checkpoint, plain)]
    jax.tree.map(np.testing.assert_array_equal, *placed)
    panels = next(
        leaf for leaf in names.flatten(checkpoint.params).values() if isinstance(leaf, quant.PanelTensor)
    )
    with pytest.raises(NotImplementedError, match="panels on a mesh of devices"):
        sharding.weight_spec("output/weight", panels)


def test_a_model_in_panels_says_the_same_to_the_last_bit(tmp_path, any_panels):
    """As long as its up-projections stay in blocks: a head begins within a panel here."""
    path = tmp_path / "a.gguf"
    write_deepseek2(path, weight_type="Q8_0", alignment=64, sizes=dict(embed=96, nope=40))
    load = lambda repack: generate.load(path, ctx_size=128, run_time_repack=repack, compilation_cache=None)
    models = [load(repack) for repack in (None, True, False)]
    assert [bool(_formats(model.params)) for model in models] == [True, True, False]
    texts = [model.generate([5, 9, 3] * 12, max_tokens=24, temperature=0.0).tokens for model in models]
    assert texts[0] == texts[1] == texts[2]
