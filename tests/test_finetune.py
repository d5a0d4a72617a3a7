"""Fine-tuning of a tiny quantised model: it learns, resumes bit for bit, and leaves the weights alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
import mla_jax
from checkpoints_tools import lora_files, names
from mla_jax import finetune, finetune_data, lora, tokenizer, train
from mla_jax.cache import fingerprint
from mla_jax.cli import app
from mla_jax.config import RunConfig

PLAN = finetune.FinetuneConfig(
    steps=6,
    batch=2,
    window=16,
    rank=2,
    alpha=4.0,
    learning_rate=3e-2,
    warmup_steps=1,
    checkpoint_every=3,
    targets=(r"attn_(q_a|kv_b|output)\.", r"ffn_down_exps"),
)
STREAM = finetune.Stream(tokens=np.tile(np.arange(7, 27, dtype=np.int32), 20), counts=np.ones(400, bool))


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Lets optax and orbax mix types as they do outside of these tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2, experts=4, used=2, weight_type="Q8_0")
    return checkpoints_tools.load_gguf(path, progress=lambda *_: None)


def _fit(model, folder, plan=PLAN, report=lambda line: None):
    return finetune.fit(model.params, STREAM, model.config, plan, folder, report=report)


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory):
    lines = []
    return _fit(model, tmp_path_factory.mktemp("unbroken"), report=lines.append), lines


def test_loss_falls_and_weights_stay(model, unbroken):
    trained, lines = unbroken
    loss = lambda adapters: finetune.held_out_loss(model.params, adapters, STREAM, model.config, window=16)
    before, after = loss(None), loss(trained)
    assert after < 0.9 * before
    assert lines[-1].startswith("step 6/6  loss ") and "tokens/s" in lines[-1]
    assert len(trained.adapters) == 7  # three of each layer, and the experts of the second


def test_resumed_run_is_the_unbroken_one(model, unbroken, tmp_path, monkeypatch):
    draw = finetune.draw_batch

    def draw_until_stopped(stream, plan, index):
        if index == 4:
            raise KeyboardInterrupt
        return draw(stream, plan, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "draw_batch", draw_until_stopped)
        _fit(model, tmp_path)
    lines = []
    resumed = _fit(model, tmp_path, report=lines.append)
    assert lines[0].startswith("resuming from step 3 in ")
    for found, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(unbroken[0]), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(alpha=5.0), r"alpha was 4\.0 and is 5\.0"),
        (dict(rank=3), r"rank was 2 and is 3"),
        (dict(targets=(r"attn_q_a\.",)), r"targets\.0 was .* targets\.1 was"),
    ],
    ids=["alpha", "rank", "targets"],
)
def test_checkpoints_of_another_run_are_refused(model, unbroken, tmp_path, change, message):
    about = dict(plan=dataclasses.asdict(PLAN), model=fingerprint(model.config, model.params))
    about["text"] = train.digest(STREAM.tokens, STREAM.counts)
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        _fit(model, tmp_path, dataclasses.replace(PLAN, **change))
    other = finetune.Stream(tokens=STREAM.tokens[::-1], counts=STREAM.counts)
    with pytest.raises(ValueError, match="text was"):
        finetune.fit(model.params, other, model.config, PLAN, tmp_path)


def test_a_batch_is_differentiated_as_its_windows_together(model):
    made = lora.init(jax.random.key(3), model.params, rank=2, alpha=4.0, targets=PLAN.targets)
    tokens, counts = finetune.draw_batch(STREAM, PLAN, 0)
    counts[0, 5:9] = False
    run = RunConfig()
    state = finetune.first_state(made, PLAN)
    _, value = finetune.step(
        jax.tree.map(jnp.copy, state), model.params, tokens, counts, config=model.config, run=run, plan=PLAN
    )
    whole = finetune.loss(made, model.params, tokens, counts, config=model.config, run=run)
    np.testing.assert_allclose(value, whole / counts[:, 1:].sum(), rtol=1e-5)


def test_tokens_that_do_not_count_teach_nothing(model):
    made = lora.init(jax.random.key(3), model.params, rank=2, alpha=4.0, targets=(r"attn_output",))
    tokens, counts = finetune.draw_batch(STREAM, PLAN, 0)
    of = lambda tokens, counts: jax.grad(finetune.loss)(
        made, model.params, tokens, counts, config=model.config, run=RunConfig()
    )
    counts[:, 10:] = False
    changed = tokens.copy()
    changed[:, 10:] = 5
    for found, expected in zip(
        jax.tree.leaves(of(tokens, counts)), jax.tree.leaves(of(changed, counts)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of(tokens, np.zeros_like(counts))))


def test_held_out_loss_is_that_of_each_window(model):
    apply = jax.jit(mla_jax.apply, static_argnums=(3, 4))
    rng = np.random.default_rng(0)
    stream = finetune.Stream(tokens=rng.integers(3, 300, 60).astype(np.int32), counts=rng.random(60) < 0.5)
    total, share = 0.0, 0
    for start in (0, 16, 32):
        window = stream.tokens[start : start + 17]
        logits, _ = apply(model.params, window[None, :-1], None, model.config, RunConfig())
        each = -np.take_along_axis(jax.nn.log_softmax(logits[0]), window[1:, None], axis=1)[:, 0]
        counted = stream.counts[start + 1 : start + 17]
        total, share = total + each[counted].sum(), share + counted.sum()
    found = finetune.held_out_loss(model.params, None, stream, model.config, window=16, batch=2)
    np.testing.assert_allclose(found, total / share, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(warmup_steps=6), r"warmup_steps must be in \[0, 6\), got 6"),
        (dict(learning_rate=0.0), "learning_rate must be positive and finite, got 0.0"),
        (dict(alpha=float("nan")), "alpha must be positive and finite, got nan"),
    ],
    ids=["rank", "warm-up", "rate", "alpha"],
)
def test_bad_plans_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **settings)


def test_streams_that_cannot_be_learned_are_refused(model, tmp_path):
    cut = lambda stop, counts: finetune.Stream(tokens=STREAM.tokens[:stop], counts=counts[:stop])
    for stream, message in (
        (cut(16, STREAM.counts), "longer than a window of 16 tokens, got 16"),
        (cut(90, np.zeros(400, bool)), "tokens that are to be learned, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune.fit(model.params, stream, model.config, PLAN, tmp_path)


@pytest.fixture(scope="module")
def words():
    packaged = checkpoints_tools.load_gguf(mla_jax.generate.PACKAGED_MODEL, progress=lambda *_: None)
    return tokenizer.Tokenizer(tokenizer.Vocabulary.from_metadata(packaged.metadata))


def test_lines_of_examples_count_their_answers(words, tmp_path):
    path = tmp_path / "examples.jsonl"
    messages = [dict(role="user", content="one"), dict(role="assistant", content="two")]
    text = "import os\r\n# \u2028"
    lines = [dict(text=text), dict(prompt="def f", completion="(x): pass"), dict(messages=messages)]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), newline="")
    stream = finetune_data.read_stream(path, words)
    eos = words.vocabulary.eos_id
    answers = [words.encode(text), words.encode("(x): pass", add_special=False)]
    answers.append(words.encode("two", add_special=False))
    learned = [token for answer in answers for token in (*answer, eos)]
    assert stream.tokens[stream.counts].tolist() == learned
    assert "def f" in words.decode(stream.tokens[~stream.counts].tolist())


def test_a_long_text_is_read_whole(words, tmp_path):
    text = "x = 1\n" * 400_000  # more than the tokenizer takes at once
    (tmp_path / "long.txt").write_text(text)
    stream = finetune_data.read_stream(tmp_path / "long.txt", words)
    assert words.decode(stream.tokens[:-1].tolist()) == text and stream.counts.all()
    (tmp_path / "long.txt").write_bytes(b"a = 1\r\n")
    stream = finetune_data.read_stream(tmp_path / "long.txt", words)
    assert stream.tokens[:-1].tolist() == words.encode("a = 1\r\n")


@pytest.mark.parametrize(
    "line",
    ['{"text": 3}', "[1]", "{", '{"messages": [{"role": "user", "content": "a"}]}', '{"prompt": "a"}'],
    ids=["number", "list", "cut off", "no answer", "no completion"],
)
def test_bad_lines_are_named(words, tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2[:,] "):
        finetune_data.read_stream(path, words)


def test_an_empty_file_is_refused(words, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt must hold something to learn, got an empty file"):
        finetune_data.read_stream(tmp_path / "empty.txt", words)


def test_command_writes_an_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("class Path:\n    pass\n" * 40)
    before = (tmp_path / "text.txt").read_bytes()
    assert app.main(["finetune", "--text", "text.txt", "--out", "text.txt.gguf", "--target", "("]) == 2
    (tmp_path / "text.gguf").write_bytes(before)
    assert app.main(["finetune", "--text", "text.gguf", "--out", "text.gguf"]) == 2
    assert "--out must not be a file that is read" in capsys.readouterr().err
    small = "--steps 1 --batch 1 --window 16 --rank 1 --target blk.0.attn_output".split()
    given = ["--text", "text.txt", "--held-out", "text.txt", "--out", "adapter.gguf", *small]
    assert app.main(["finetune", *given]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    packaged = checkpoints_tools.load_gguf(mla_jax.generate.PACKAGED_MODEL, progress=lambda *_: None)
    found = lora_files.load_lora("adapter.gguf", packaged.config, names.flatten(packaged.params))
    assert list(found.adapters) == ["blk.0.attn_output.weight"] and found.alpha == 16.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--out", "a.gguf"], "--text must be given."),
        (["--text", "a.txt"], "--out must be given."),
        (["--text", "a.txt", "--out", "nowhere/a.gguf"], "--out must be a file in a folder that exists"),
        (["--text", "a.txt", "--out", "a.gguf"], "a.txt cannot be used: No such file or directory."),
        (["--text", "a.txt", "--out", "a.gguf", "--alpha", "0"], "alpha must be positive and finite"),
    ],
    ids=["no text", "no out", "no folder", "no file", "alpha"],
)
def test_bad_commands_end_with_a_sentence(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    assert app.main(["finetune", *given]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
