"""Training of a tiny model: what a step does, a resumed run against an unbroken one, the way to a file."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints_tools
from mla_jax import corpus, train
from mla_jax.config import MLAConfig, ModelConfig, MoEConfig, RunConfig
from mla_jax.nn.transformer import apply, init_params

CONFIG = ModelConfig(
    vocab_size=300,
    context_length=64,
    embed_dim=32,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden_dim=64,
    norm_epsilon=2.0**-20,  # the file keeps it as float32
    mla=MLAConfig(
        num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    ),
    moe=MoEConfig(
        num_experts=4,
        num_experts_per_token=2,
        expert_hidden_dim=32,
        num_shared_experts=1,
        gating="sigmoid",
        has_selection_bias=True,
        normalize_weights=True,
    ),
)
PLAN = train.TrainConfig(
    steps=5,
    batch=2,
    window=8,
    long_steps=2,
    long_window=16,
    learning_rate=1e-2,
    warmup_steps=1,
    checkpoint_every=1,
)
STREAM = np.tile(np.arange(7, 27, dtype=np.uint16), 20)
ROUTER = ("layers_1", "ffn", "router")

cross_entropy = jax.jit(train.cross_entropy, static_argnums=2)
forward = jax.jit(apply, static_argnums=(3, 4))


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Lets optax and orbax mix types as they do outside of these tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(1), CONFIG)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    lines = []
    folder = tmp_path_factory.mktemp("unbroken")
    return train.fit(STREAM, CONFIG, PLAN, folder, report=lines.append), lines


def test_loss_falls(params, unbroken):
    trained, lines = unbroken
    tokens = STREAM[None, :33].astype(np.int32)
    loss = lambda params: float(cross_entropy(params, tokens, CONFIG)[0])
    assert loss(trained) < 0.95 * loss(init_params(jax.random.key(PLAN.seed), CONFIG))
    assert len(lines) == 1 and lines[0].startswith("step 5/5  loss ") and "tokens/s" in lines[0]


def test_a_resumed_run_is_an_unbroken_one(tmp_path, monkeypatch, unbroken):
    original, count = train.train_step, iter(range(9))

    def interrupted(state, tokens, **settings):
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(state, tokens, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.fit(STREAM, CONFIG, PLAN, tmp_path / "run", report=lambda line: None)
    lines = []
    resumed = train.fit(STREAM, CONFIG, PLAN, tmp_path / "run", report=lines.append)
    assert lines[0].startswith("resuming from step 3 in ")
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken[0])
    again = train.fit(STREAM, CONFIG, PLAN, tmp_path / "run", report=lines.append)  # it is done already
    jax.tree.map(np.testing.assert_array_equal, again, resumed)


def test_batches_depend_on_seed_and_step_alone():
    stream = np.arange(1000, dtype=np.uint16)
    other_seed = dataclasses.replace(PLAN, seed=1)
    first = train.draw_batch(stream, PLAN, 1)
    np.random.default_rng(0).random(10)
    np.testing.assert_array_equal(train.draw_batch(stream, PLAN, 1), first)
    assert first.shape == (2, 9) and first.dtype == np.int32
    np.testing.assert_array_equal(np.diff(first, axis=1), 1)
    assert not np.array_equal(train.draw_batch(stream, PLAN, 0), first)
    assert not np.array_equal(train.draw_batch(stream, other_seed, 1), first)


@pytest.mark.parametrize(("step", "shape"), [(0, (2, 9)), (2, (2, 9)), (3, (1, 17)), (4, (1, 17))])
def test_the_last_steps_see_long_windows(step, shape):
    assert train.draw_batch(STREAM, PLAN, step).shape == shape


def test_batches_stay_within_the_shortest_stream():
    stream = np.arange(18, dtype=np.uint16)
    for step in range(3, 5):
        assert train.draw_batch(stream, PLAN, step).shape == (1, 17)


def test_cross_entropy_is_the_mean_over_predicted_tokens(params):
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    loss, loads = cross_entropy(params, tokens, CONFIG)
    logits, _ = forward(params, tokens[:, :-1], None, CONFIG, RunConfig())
    logits = np.asarray(logits, np.float64)
    log_sum = np.log(np.exp(logits).sum(axis=-1))
    nats = log_sum - np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, nats.mean(), rtol=1e-5)
    assert list(loads) == ["layers_1"]
    assert loads["layers_1"].shape == (4,) and float(loads["layers_1"].sum()) == 2 * 8 * 2


def _state(params):
    params = jax.tree.map(jnp.copy, params)  # a step is given its state for good
    optimizer = train.make_optimizer(PLAN).init(params)
    return train.TrainState(params=params, optimizer=optimizer, step=jnp.int32(0))


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def test_router_bias_moves_by_its_rate_towards_even_load(params):
    tokens = train.draw_batch(STREAM, PLAN, 0)
    _, loads = cross_entropy(params, tokens, CONFIG)
    load = np.asarray(loads["layers_1"])
    assert len(set(load)) > 1
    state, _ = train.train_step(_state(params), tokens, config=CONFIG, train=PLAN)
    moved = _at(state.params, ROUTER)["bias"] - _at(params, ROUTER)["bias"]
    np.testing.assert_allclose(moved, PLAN.bias_rate * np.sign(load.mean() - load), atol=1e-8)
    assert int(state.step) == 1


def test_router_bias_evens_the_load(params):
    plan = dataclasses.replace(PLAN, learning_rate=0.0, bias_rate=5e-3)
    tokens = np.random.default_rng(0).integers(0, 300, (4, 65)).astype(np.int32)
    skewed = jax.tree.map(jnp.copy, params)
    _at(skewed, ROUTER)["bias"] += jnp.asarray([0.5, 0.0, 0.0, -0.5], jnp.float32)
    state = _state(skewed)
    spread = lambda params: float(jnp.ptp(cross_entropy(params, tokens, CONFIG)[1]["layers_1"]))
    before = spread(skewed)
    for _ in range(120):
        state, _ = train.train_step(state, tokens, config=CONFIG, train=plan)
    assert spread(state.params) < 0.3 * before


def test_matrices_alone_decay(params):
    optimizer = train.make_optimizer(PLAN)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    _, state = update(zeros, state, params)  # the first step of the warm-up has rate 0
    updates, _ = update(zeros, state, params)
    decay = lambda leaf: -PLAN.learning_rate * PLAN.weight_decay * leaf if leaf.ndim > 1 else 0 * leaf
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, jax.tree.map(decay, params)
    )


@pytest.mark.parametrize("moe", [None, dataclasses.replace(CONFIG.moe, has_selection_bias=False)])
def test_models_without_a_bias_to_move_are_trained_too(moe):
    config = dataclasses.replace(CONFIG, moe=moe, num_dense_layers=2 if moe is None else 1)
    params = init_params(jax.random.key(0), config)
    state, loss = train.train_step(
        _state(params), train.draw_batch(STREAM, PLAN, 0), config=config, train=PLAN
    )
    assert math.isfinite(float(loss)) and int(state.step) == 1


@pytest.mark.parametrize("size", [1, 9, 20])
def test_bits_per_byte_of_a_uniform_model(params, size):
    uniform = jax.tree.map(lambda leaf: leaf, params)
    uniform["output"] = {"weight": jnp.zeros_like(params["output"]["weight"])}
    stream = np.arange(size, dtype=np.uint16)
    bits = train.bits_per_byte(uniform, stream, 37, CONFIG, window=8)
    assert bits == pytest.approx(math.log2(300) * (size - 1) / 37, rel=1e-6)


def test_bits_per_byte_sums_over_windows(params):
    stream = np.random.default_rng(0).integers(0, 300, 20).astype(np.uint16)
    nats = 0.0
    for start, stop in [(0, 9), (8, 17), (16, 20)]:
        part = stream[None, start:stop].astype(np.int32)
        nats += (stop - start - 1) * float(cross_entropy(params, part, CONFIG)[0])
    got = train.bits_per_byte(params, stream, 50, CONFIG, window=8)
    assert got == pytest.approx(nats / math.log(2) / 50, rel=1e-5)


@pytest.mark.parametrize(("weight_type", "tolerance"), [("f32", 1e-6), ("q8_0", 0.02)])
def test_an_exported_model_loads_with_its_logits(tmp_path, unbroken, weight_type, tolerance):
    trained = unbroken[0]
    vocabulary = corpus.train_vocabulary(["for value in values:\n    print(value)\n"] * 3, 300)
    metadata = corpus.vocabulary_metadata(vocabulary)
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"<unused {i}>" for i in range(300 - size)]
    metadata["tokenizer.ggml.token_type"] += [5] * (300 - size)
    path = tmp_path / "trained.gguf"
    checkpoints_tools.export_gguf(path, trained, CONFIG, tokenizer_metadata=metadata, weight_type=weight_type)
    loaded = checkpoints_tools.load_gguf(path)
    assert loaded.config == CONFIG
    tokens = STREAM[None, :20].astype(np.int32)
    wanted, _ = forward(trained, tokens, None, CONFIG, RunConfig())
    got, _ = forward(loaded.params, tokens, None, loaded.config, RunConfig())
    error = np.linalg.norm(np.asarray(got - wanted)) / np.linalg.norm(np.asarray(wanted))
    assert error < tolerance


def test_a_stream_must_be_longer_than_a_window(tmp_path):
    with pytest.raises(ValueError, match="longer than a window of 16, got 17 tokens"):
        train.fit(STREAM[:17], CONFIG, PLAN, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    original = train.train_step
    broken = lambda state, tokens, **settings: (original(state, tokens, **settings)[0], jnp.float32(jnp.nan))
    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(ValueError, match="loss must be finite, got nan at step 0"):
        train.fit(STREAM, CONFIG, PLAN, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"warmup_steps": 5}, r"warmup_steps must be in \[0, 5\), got 5"),
        ({"long_steps": -1}, r"long_steps must be in \[0, 5\), got -1"),
    ],
)
def test_bad_plans(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAN, **change)
