"""A model on several devices against the same on one: equal logits and texts, whatever lies where."""

import dataclasses
import re

import gpu_target
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_lora
from synthetic import write_deepseek2

import checkpoints_tools
import mla_jax
from checkpoints_tools import names, place_sizes
from mla_jax import expert_reduction as reduction_lib
from mla_jax import logits as logits_lib
from mla_jax import placement, sampler, segment_calls, steps
from mla_jax.config import RunConfig
from mla_jax.nn import taps
from mla_jax.placement import Rules
from mla_jax.segments import Segments
from mla_jax.serve.device import Part

RUN = RunConfig(cache_type="q8_0")
PAGES = np.asarray([[3, 0, 5], [4, 2, 1]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 32), dtype=np.int32)
COUNTS = np.asarray([32, 20], np.int32)
RULES = {
    "experts on the CPU": Rules(gpu_layers=99, cpu_experts=99),
    "experts on the GPU": Rules(overrides=(("exps", "gpu:0"),)),
    "two GPUs": Rules(gpu_layers=99, overrides=((r"blk\.1\.", "gpu:1"), (r"blk\.2\..*exps", "cpu"))),
    **{f"{count} layers": Rules(gpu_layers=count) for count in (0, 1, 2, 4, 5)},
}  # fmt: skip
each_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def _quick_sample(logits, recent, positions, sampling):
    """Stands for the sampler, which takes seconds to compile: other arguments, other tokens."""
    told = recent.sum(axis=1) + 7 * positions + 13 * sampling.seed.astype(jnp.int32)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)
    noise = jnp.sin((told[:, None] * ids[None]).astype(jnp.float32))
    return jnp.argmax(logits + noise, axis=1).astype(jnp.int32)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Has the CPU kernels compute, and a small sampler draw: less time to compile."""
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("default"):
        patch.setattr(sampler, "sample", _quick_sample)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("segments") / "nano.gguf"
    write_deepseek2(path, weight_type="Q8_0", sizes=dict(rope=64, kv_lora=64), layers=4)
    return path


@pytest.fixture(scope="module")
def model(path):
    """Weights and config of a model with a dense layer and three with experts."""
    checkpoint = checkpoints_tools.load_gguf(path, progress=lambda *_: None)
    return checkpoint.params, checkpoint.config


@pytest.fixture(scope="module")
def devices():
    return dict(zip(("cpu", "gpu:0", "gpu:1"), jax.devices()[1:4], strict=True))


def _segments(model, rules, devices):
    params, config = model
    return Segments(placement.arrange(config, list(names.flatten(params)), rules), devices)


def _garbage(part):
    """Returns what memory may hold that no token has: NaN, or the largest codes."""
    worst = np.nan if jnp.issubdtype(part.dtype, jnp.floating) else np.iinfo(part.dtype).max
    return jax.device_put(np.full(part.shape, worst, part.dtype), part.sharding)


def _pool(programs, config, run):
    pool = programs.init_pool(config, run, batch=2, num_pages=6, page_size=64)
    return dataclasses.replace(pool, layers=jax.tree.map(_garbage, pool.layers))


def _drawn(programs, params, config, run):
    """Prefills two sequences, draws 5 tokens, and one under constraints; returns all that comes of it."""
    how = dict(config=config, run=run)
    by_layer = reduction_lib.OFF, reduction_lib.OFF, (1, 1.0), (2, 1.0)
    reduction = reduction_lib.arrays(by_layer, reduction_lib.per_layer(config, None))
    sampling = sampler.batch([sampler.SamplingParams(temperature=t, seed=3) for t in (0.0, 1.0)])
    state = _pool(programs, config, run)
    with jax.transfer_guard("allow" if programs is steps else "disallow"):
        cache = programs.prefill(params, TOKENS, COUNTS, state, PAGES, reduction, **how)
        recent = np.full((2, sampler.NUM_RECENT), -1, np.int32)
        newest, eog = np.asarray([7, 9], np.int32), np.asarray([-1], np.int32)
        args = newest, recent, cache, sampling, np.int32(5), eog, PAGES, reduction
        drawn, taken, recent, cache = programs.decode(params, *args, **how)
    drawn, recent = np.asarray(drawn), np.asarray(recent)
    constraints = logits_lib.no_constraints(2, config.vocab_size)
    constraints.bias_ids[0, 0], constraints.bias[0, 0] = 11, 1e6
    args = drawn[:, 4], recent, cache, sampling, constraints, PAGES, reduction
    with jax.transfer_guard("allow" if programs is steps else "disallow"):
        last, told, cache = programs.draw(params, *args, **how)
    assert last[0] == 11
    layers = programs.take_pages(cache, PAGES.reshape(-1))
    return jax.device_get((drawn, taken, recent, last, told, layers, cache.length))


@pytest.fixture(scope="module")
def of_one_device(model):
    return _drawn(steps, *model, RUN)


@each_rule
def test_steps_are_those_of_one_device(model, devices, of_one_device, rules):
    programs = _segments(model, rules, devices)
    got = _drawn(programs, programs.put_all(model[0], RUN), model[1], RUN)
    jax.tree.map(np.testing.assert_array_equal, got, of_one_device)


@pytest.mark.parametrize(
    "run",
    [
        taps.tapped(RunConfig(mla=0), edits={"ffn_out.1": lambda value, positions: value * 1.5}),
        RunConfig(mla=1, cache_type="q4_0", hadamard_size=64),
    ],
    ids=["mla 0 with edits", "rotated q4_0"],
)
def test_modes_and_caches_are_those_of_one_device(model, devices, run):
    """What a layer writes depends on all that those before it gave."""
    params, config = model
    placed = _segments(model, RULES["experts on the CPU"], devices)
    found = []
    for programs in (steps, placed):
        cache, held = (
            _pool(programs, config, run),
            params if programs is steps else placed.put_all(params, run),
        )
        for tokens, counts in ((TOKENS, COUNTS), (TOKENS[:, :1], np.ones(2, np.int32))):
            cache = programs.prefill(held, tokens, counts, cache, PAGES, None, config=config, run=run)
        found.append(jax.device_get(cache.layers))
    jax.tree.map(np.testing.assert_array_equal, *found)


def _fitted(model, path):
    """Returns the rules by which a GPU holds all but the experts of one layer."""
    contents = place_sizes.read_contents(path)
    size = placement.unit_bytes(contents.tensors, RUN)
    all_there = placement.arrange(contents.config, contents.tensors, Rules(gpu_layers=99)).of_unit
    room = sum(size(unit, "gpu:0") for unit in all_there) - 1
    return placement.fit(contents.config, contents.tensors, size, room=room)


@pytest.fixture(scope="module")
def models(path, model, devices):
    """The same model on one device, and on two as the memory of one wants it."""
    how = dict(cache_type="q8_0", ctx_size=256, compilation_cache=None)
    rules = _fitted(model, path)
    assert rules == Rules(gpu_layers=5, cpu_experts=2)
    how |= dict(lora=[random_lora(model[0], targets=[r"attn_q_b", r"blk\.1\.ffn_down_exps"])])
    return mla_jax.load(path, **how), mla_jax.load(path, segments=_segments(model, rules, devices), **how)


def test_a_model_that_does_not_fit_draws_the_same_texts(models):
    """Adapters lie beside weights of both devices."""
    texts = []
    for model in models:
        ask = dict(max_tokens=6, seed=1)
        first = model.generate("the cat sat on the mat", **ask).tokens
        texts.append((first, model.generate("the cat sat on the hat", reuse_prefix=True, **ask).tokens))
    assert texts[0] == texts[1]


def test_choices_of_experts_are_told_of_a_placed_model(models):
    ids = models[0].tokenizer.encode("the cat sat")
    for whole, placed in zip(*(model.routing(ids) for model in models), strict=True):
        np.testing.assert_array_equal(whole, placed)


def test_rows_are_saved_and_go_on_where_they_belong(models, tmp_path):
    texts = []
    for model in models:
        model.generate("the cat", max_tokens=2, seed=1)
        model.save_cache(tmp_path / "cache")
        assert len(model.load_cache(tmp_path / "cache")) == len(model.tokenizer.encode("the cat")) + 1
        texts.append(model.generate("the cat sat", max_tokens=3, seed=1, reuse_prefix=True).tokens)
    assert texts[0] == texts[1]


@each_rule
def test_weights_and_rows_lie_where_they_should(model, devices, rules):
    programs, (params, config) = _segments(model, rules, devices), model
    placed = programs.placement
    for name, weight in names.flatten(programs.put_all(params, RUN)).items():
        for leaf in jax.tree.leaves(weight):
            assert leaf.devices() == {devices[placed.of_tensor(name)]}
    pool = programs.init_pool(config, RUN, batch=1, num_pages=2, page_size=64)
    for i, rows in enumerate(pool.layers):
        for part in jax.tree.leaves(rows):
            assert part.devices() == {devices[placed.of_unit[f"attn.{i}"]]}


def test_weights_are_put_on_their_devices_straight_from_the_file(path, model, devices, monkeypatch):
    programs = _segments(model, RULES["two GPUs"], devices)
    seen, put = [], jax.device_put
    monkeypatch.setattr(
        jax, "device_put", lambda tree, *where: seen.append((tree, where)) or put(tree, *where)
    )
    checkpoints_tools.load_gguf(
        path, progress=lambda *_: None, put=lambda name, weight: programs.put(name, weight, RUN)
    )
    assert len(seen) == len(names.flatten(model[0]))
    assert all(where in [(device,) for device in devices.values()] for _, where in seen)
    assert all(isinstance(leaf, np.ndarray) for tree, _ in seen for leaf in jax.tree.leaves(tree))


def test_hidden_states_and_choices_alone_cross(model, devices, monkeypatch):
    params, config = model
    programs = _segments(model, RULES["experts on the CPU"], devices)
    params, cache = programs.put_all(params, RUN), _pool(programs, config, RUN)
    crossed, put = [], programs._put

    def put_and_note(tree, place):
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, jax.Array) and leaf.devices() != {devices[place]}:
                crossed.append((place, leaf.shape))
        return put(tree, place)

    monkeypatch.setattr(programs, "_put", put_and_note)
    programs.prefill(params, TOKENS, COUNTS, cache, PAGES, None, config=config, run=RUN)
    (B, T), D, K = TOKENS.shape, config.embed_dim, config.moe.num_experts_per_token
    there, back = [("cpu", (B, T, D)), ("cpu", (B * T, K)), ("cpu", (B * T, K))], [("gpu:0", (B, T, D))]
    assert crossed == 2 * (there + back)  # nothing reads what the last layer's experts would give


def test_a_step_that_failed_is_known_to_have_taken_rows_along(models, monkeypatch):
    """Rows of segments that were called are gone; the engine then begins with none."""
    model = models[1]
    call, count = segment_calls.call, []

    def stumble(*args, **kwargs):
        count.append(None)
        if len(count) == 3:
            raise RuntimeError("the device stumbled")
        return call(*args, **kwargs)

    device, part = (
        model.engine._device,
        Part(tokens=[5], start=0, pages=[0], reduction=model.expert_reduction),
    )
    model.generate("the cat", max_tokens=1, seed=1)
    assert device.is_sound
    monkeypatch.setattr(segment_calls, "call", stumble)
    with pytest.raises(RuntimeError, match="stumbled"):
        device.prefill([part], 32)
    assert not device.is_sound
    device.reset()
    assert device.is_sound


def test_layers_that_are_alike_are_one_program(model):
    config, tensors = model[1], list(names.flatten(model[0]))
    deep = dataclasses.replace(config, num_layers=9, num_dense_layers=2)
    of_unit = {unit: "cpu" if "experts" in unit else "gpu:0" for unit in placement.units(deep)}
    segments = segment_calls.cut(deep, placement.Placement(of_unit=of_unit))
    programs = [segment.moved(segment.offset(deep)) for segment in segments]
    assert len(segments) == 3 * 7 + 1 and len(set(programs)) == 5
    assert [part.kind for part in segments[1].parts] == ["shared"]  # queued before the host waits
    assert segments[2].place == "cpu" and segments[2].drops == segments[2].reads
    one = segment_calls.cut(config, placement.arrange(config, tensors, Rules(gpu_layers=99)))
    assert len(one) == 1 and one[0].keeps == (segment_calls.Value("logits"),)


def test_segments_lower_each_with_the_kernels_of_its_device(model, devices):
    params, config = model
    run = dataclasses.replace(RUN, gpu_kernels=True)
    programs = _segments(model, RULES["experts on the CPU"], devices)
    held = programs.put_all(params, run)
    pool = programs.init_pool(config, run, batch=2, num_pages=6, page_size=64)
    inputs = segment_calls.Inputs(length=COUNTS, num_tokens=COUNTS, pages=PAGES, reduction=None)
    first, _, experts, *_ = segment_calls.cut(config, programs.placement)
    (B, T), D, K = TOKENS.shape, config.embed_dim, config.moe.num_experts_per_token
    shapes = {"tokens": ((B, T), "int32"), "normed": ((B, T, D), "float32")}
    shapes |= {"ids": ((B * T, K), "int32"), "weights": ((B * T, K), "float32")}

    def lower(segment, run, inputs, platform):
        values = {value: jax.ShapeDtypeStruct(*shapes[value.name]) for value in segment.reads}
        weights, rows = segment.weights(held, 0), tuple(pool.layers[i] for i in segment.layers)
        args = jax.eval_shape(
            lambda: (weights, values, rows, inputs, None if inputs is None else jnp.int32(0))
        )
        static = dict(parts=segment.parts, keeps=segment.keeps, config=config, run=run)
        if platform == "cpu":
            return segment_calls.call.lower(*args, **static).as_text()
        return gpu_target.lowered_for_gpu(segment_calls.call, *args, **static)

    text = lower(first, run, inputs, "cuda")
    assert {"flash_mla_prefill", "latent_append", "grouped_matmul"} <= set(
        re.findall(r'name = \\?"(\w+)', text)
    )
    num_parts = len(jax.tree.leaves([pool.layers[i] for i in first.layers]))
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") >= num_parts
    assert "callback" not in text
    assert "expert_ffn" in lower(experts, dataclasses.replace(run, gpu_kernels=False), None, "cpu")
