"""Generation on a small random model: against a loop without cache, at its limits, and after failures."""

import ast
import collections
import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file
from synthetic import write_deepseek2

import checkpoints_tools
import mla_jax
from mla_jax import generate, steps, tokenizer
from mla_jax.config import RunConfig
from mla_jax.sampler import SamplingParams
from mla_jax.serve import loop

CTX = 64
GREEDY = dict(temperature=0.0)
WILD = dict(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0)
PROMPT = [0, *np.random.default_rng(7).integers(3, 320, 19).tolist()]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return path


@pytest.fixture(scope="module")
def checkpoint(path):
    return checkpoints_tools.load_gguf(path)


@pytest.fixture(scope="module")
def new_model(checkpoint):
    """Returns a function that makes models of one checkpoint: equal settings share compiled code."""

    def make(*, ctx_size=CTX, ubatch=32, vocabulary=None, **run):
        vocabulary = vocabulary or tokenizer.Vocabulary.from_metadata(checkpoint.metadata)
        run = RunConfig(**{"cache_type": "f32", **run})
        sizes = dict(ctx_size=ctx_size, ubatch=ubatch)
        return generate.Model(checkpoint.params, checkpoint.config, vocabulary, run=run, **sizes)

    return make


@pytest.fixture(scope="module")
def model(new_model):
    return new_model()


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The 24 likeliest tokens after PROMPT, each from the whole sequence anew and without a cache."""
    run = RunConfig(mla=0, flash=False, cache_type="f32")
    forward = jax.jit(functools.partial(mla_jax.apply, config=checkpoint.config, run=run))
    tokens = np.zeros((1, len(PROMPT) + 24), np.int32)
    tokens[0, : len(PROMPT)] = PROMPT
    for end in range(len(PROMPT), tokens.shape[1]):  # tokens to the right change no logits on the left
        logits, _ = forward(checkpoint.params, tokens, None)
        tokens[0, end] = np.argmax(logits[0, end - 1])
    return tuple(tokens[0, len(PROMPT) :].tolist())


@pytest.fixture
def calls(monkeypatch):
    """Records every step as (name, tokens that count, length of the cache before)."""
    recorded = []

    def spy(name, count):
        original = getattr(steps, name)

        def step(params, *args, **kwargs):
            cache = next(arg for arg in args if isinstance(arg, mla_jax.cache.Cache))
            recorded.append((name, count(args), int(cache.length[0])))
            return original(params, *args, **kwargs)

        monkeypatch.setattr(steps, name, step)

    spy("prefill", lambda args: int(args[1][0]))
    spy("decode", lambda args: int(args[4]))
    return recorded


@pytest.fixture(params=[1, 2, 7, 32])
def chunk(request, monkeypatch):
    """Steps that are taken at a time, after the first."""
    monkeypatch.setattr(steps, "within", lambda limit, seconds: request.param)
    return request.param


def test_greedy_equals_a_loop_without_cache(model, expected):
    completion = model.generate(PROMPT, max_tokens=24, **GREEDY)
    assert completion.tokens == expected
    assert completion.finish_reason == "length"
    assert len(set(expected)) > 6  # a text that repeats one token would prove little


@pytest.mark.parametrize("ubatch", [1, 7, 500])
def test_chunks_of_the_prompt_change_nothing(new_model, expected, ubatch):
    assert new_model(ubatch=ubatch).generate(PROMPT, max_tokens=24, **GREEDY).tokens == expected


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "whole"])
@pytest.mark.parametrize("mla", [0, 1, 2, 3])
def test_modes_agree(new_model, expected, mla, flash):
    assert new_model(mla=mla, flash=flash).generate(PROMPT, max_tokens=24, **GREEDY).tokens == expected


def test_steps_at_a_time_change_nothing(model, expected, calls, chunk):
    assert model.generate(PROMPT, max_tokens=24, **GREEDY).tokens == expected
    counts = [count for name, count, _ in calls if name == "decode"]
    assert counts[:2] == [1, min(chunk, 23)] and sum(counts) == 24 and max(counts) <= chunk


def test_steps_at_a_time_draw_alike(model, monkeypatch):
    draws = []
    for count in (1, 2, 7, 32):
        monkeypatch.setattr(steps, "within", lambda limit, seconds, count=count: count)
        settings = dict(repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, seed=5)
        draws.append(model.generate(PROMPT, max_tokens=40, **settings, **WILD).tokens)
    assert draws == [draws[0]] * 4 and len(set(draws[0])) > 20


def _cached(model, folder):
    """Returns the tokens of the newest request in the cache, and their rows."""
    model.save_cache(folder / "rows")
    rows = {name: part.tobytes() for name, part in load_file(folder / "rows").items()}
    return np.frombuffer(rows["tokens"], np.int32).tolist(), rows


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 16])
def test_max_tokens_at_the_border_of_steps(new_model, expected, calls, tmp_path, chunk, count):
    model = new_model()
    assert model.generate(PROMPT, max_tokens=count, **GREEDY).tokens == expected[:count]
    assert sum(steps for name, steps, _ in calls if name == "decode") == count
    assert _cached(model, tmp_path)[0] == [*PROMPT, *expected[: count - 1]]


def test_an_end_amid_steps_leaves_the_cache_as_step_by_step(
    checkpoint, new_model, expected, monkeypatch, tmp_path
):
    vocabulary = tokenizer.Vocabulary.from_metadata(checkpoint.metadata)
    place = next(i for i in range(4, 24) if expected[i] not in expected[:i])
    states = []
    for count in (1, 32):
        monkeypatch.setattr(steps, "within", lambda limit, seconds, count=count: count)
        model = new_model(vocabulary=dataclasses.replace(vocabulary, eos_id=expected[place]))
        assert model.generate(PROMPT, max_tokens=24, **GREEDY).finish_reason == "stop"
        states.append(_cached(model, tmp_path))
    assert states[0] == states[1] and states[0][0] == [*PROMPT, *expected[:place]]


@pytest.mark.parametrize("read", [1, 2, 4, 9])
def test_a_reader_amid_steps_finds_the_cache_of_what_it_read(new_model, expected, tmp_path, chunk, read):
    model, stepped = new_model(), new_model()
    stream = model.stream_generate(PROMPT, **GREEDY)
    assert [piece.token for piece in itertools.islice(stream, read)] == list(expected[:read])
    stepped.generate(PROMPT, max_tokens=read, **GREEDY)
    assert _cached(model, tmp_path) == _cached(stepped, tmp_path)
    assert [piece.token for piece in itertools.islice(stream, 24 - read)] == list(expected[read:])


@pytest.mark.parametrize("read", [1, 3, 8])
def test_a_prefix_is_reused_after_a_reader_that_stopped_amid_steps(new_model, expected, chunk, read):
    model = new_model()
    pieces = list(itertools.islice(model.stream_generate(PROMPT, seed=0, **WILD), read))
    prompt = [*PROMPT, *(piece.token for piece in pieces[:-1]), 5, 6]
    again = model.generate(prompt, max_tokens=12, reuse_prefix=True, **GREEDY).tokens
    assert model.timings.cached_tokens == len(PROMPT) + read - 1
    assert again == model.generate(prompt, max_tokens=12, **GREEDY).tokens


@pytest.mark.parametrize(("seconds", "counts"), [(0.0105, [1, 4, 4, 4, 2]), (1.0, [1] * 15)])
def test_steps_fit_a_twentieth_of_a_second(model, monkeypatch, calls, seconds, counts):
    clock, decode = [0.0], steps.decode

    def pass_time(*args, **kwargs):
        clock[0] += seconds * int(args[5])
        return decode(*args, **kwargs)

    monkeypatch.setattr(steps, "decode", pass_time)
    times = dict(perf_counter=lambda: clock[0], monotonic=lambda: clock[0])
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(**times))
    model.generate(PROMPT, max_tokens=15, **GREEDY)
    assert model.timings.prompt_seconds == pytest.approx(seconds)
    assert model.timings.decode_seconds == pytest.approx(14 * seconds)
    assert model.timings.decoded_tokens == 14
    assert [count for name, count, _ in calls if name == "decode"] == counts


def test_seed_decides_the_text(model):
    draw = lambda seed: model.generate(PROMPT, max_tokens=12, seed=seed, **WILD).tokens
    assert draw(5) == draw(5)
    assert len({draw(5), draw(6), draw(7)}) == 3
    assert draw(None) != draw(None)


def test_a_draw_depends_on_seed_and_position_alone(new_model, model):
    whole = model.generate(PROMPT, max_tokens=16, seed=3, **WILD).tokens
    continued = model.generate([*PROMPT, *whole[:5]], max_tokens=11, seed=3, **WILD).tokens
    assert continued == whole[5:]
    assert new_model(ubatch=7).generate(PROMPT, max_tokens=16, seed=3, **WILD).tokens == whole


def test_penalties_see_the_prompt_and_what_was_drawn(model, expected):
    penalised = model.generate(PROMPT, max_tokens=24, presence_penalty=1e6, **GREEDY).tokens
    assert len({*penalised, *PROMPT}) == 24 + len(set(PROMPT))
    last_of_prompt = model.generate([*PROMPT, expected[0]], max_tokens=1, presence_penalty=1e6, **GREEDY)
    assert last_of_prompt.tokens[0] not in {*PROMPT, expected[0]}


def test_text_is_decoded_when_its_characters_are_whole(model):
    pieces = list(model.stream_generate(PROMPT, max_tokens=-1, seed=0, **WILD))
    tokens = [piece.token for piece in pieces]
    text = "".join(piece.text for piece in pieces)
    assert text == model.tokenizer.decode(tokens)
    assert any(piece.text == "" for piece in pieces)  # a byte in the middle of a character was held back
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_text_prompt_is_encoded_with_its_special_tokens(model):
    ids = model.tokenizer.encode("the<eos>rest")
    assert ids[0] == 0 and 1 in ids
    from_text = model.generate("the<eos>rest", max_tokens=6, **GREEDY)
    assert from_text.tokens == model.generate(ids, max_tokens=6, **GREEDY).tokens
    assert from_text.text == model.tokenizer.decode(from_text.tokens)


@pytest.mark.parametrize("length", [1, 2, CTX - 8, CTX - 7, CTX - 6, CTX - 1, CTX])
def test_stops_where_the_context_is_full(model, calls, chunk, length):
    prompt = (PROMPT * 4)[:length]
    completion = model.generate(prompt, max_tokens=-1, seed=1, **WILD)
    assert completion.finish_reason == "length"
    assert len(completion.tokens) == CTX + 1 - length  # the last one is drawn, and needs no slot
    assert max(before + count for _, count, before in calls) == CTX
    assert sum(count for _, count, _ in calls) == CTX


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stops_at_max_tokens(model, expected, count):
    completion = model.generate(PROMPT, max_tokens=count, **GREEDY)
    assert completion.tokens == expected[:count] and completion.finish_reason == "length"


def test_stops_at_an_end_of_generation_token(checkpoint, new_model, expected):
    vocabulary = tokenizer.Vocabulary.from_metadata(checkpoint.metadata)
    place = next(i for i in range(4, 24) if expected[i] not in expected[:i])
    model = new_model(vocabulary=dataclasses.replace(vocabulary, eos_id=expected[place]))
    pieces = list(model.stream_generate(PROMPT, max_tokens=24, **GREEDY))
    assert [piece.token for piece in pieces] == list(expected[: place + 1])
    assert pieces[-1].finish_reason == "stop"
    completion = model.generate(PROMPT, max_tokens=24, **GREEDY)
    assert completion.tokens == expected[:place] and completion.finish_reason == "stop"
    assert completion.text == "".join(p.text for p in pieces) == model.tokenizer.decode(expected[:place])


def test_timings_count_tokens(model):
    timings = model.generate(PROMPT, max_tokens=5, **GREEDY).timings
    assert (timings.prompt_tokens, timings.decoded_tokens) == (len(PROMPT), 4)
    assert timings.prompt_seconds > 0 and timings.decode_seconds > 0


@pytest.mark.parametrize(
    ("prompt", "arguments", "words"),
    [
        ("", {}, "the prompt must not be empty"),
        ([], {}, "the prompt must hold at least one token, got none"),
        ([3] * (CTX + 1), {}, f"must fit the context of {CTX} tokens, got {CTX + 1}"),
        ([3, 320], {}, r"token ids must be in \[0, 320\), got 320 at position 1"),
        ([-1], {}, r"token ids must be in \[0, 320\), got -1 at position 0"),
        ([3], {"max_tokens": 0}, "max_tokens must be positive, or negative for no limit, got 0"),
        ([3], {"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ([3], {"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ([3], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ([3], {"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ("\ud800", {}, "lone surrogate U\\+D800"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(model, calls, prompt, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.stream_generate(prompt, **arguments)
    assert calls == []


@pytest.mark.parametrize("token", [3.0, "3", None])
def test_token_ids_are_integers(model, token):
    with pytest.raises(TypeError):
        model.stream_generate([token])


@pytest.mark.parametrize(
    "arguments", [{"max_tokens": 2.5}, {"max_tokens": "3"}, {"top_k": 1.5}, {"seed": 1.0}]
)
def test_counts_are_integers(model, arguments):
    with pytest.raises(TypeError):
        model.stream_generate([3], **arguments)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ctx_size": 0}, "ctx_size must be in .*, got 0"),
        ({"ctx_size": 2**31}, "ctx_size must be in .*, got 2147483648"),
        ({"ubatch": 0}, "ubatch must be at least 1, got 0"),
        ({"cache_type": "q9"}, "cache_type must be one of f32, f16, bf16, q8_0, .*, got 'q9'"),
        ({"mla": 4}, "mla must be 0, 1, 2 or 3, got 4"),
    ],
)
def test_bad_settings(new_model, settings, words):
    with pytest.raises(ValueError, match=words):
        new_model(**settings)


def test_the_vocabulary_must_be_that_of_the_embedding(checkpoint, new_model):
    vocabulary = tokenizer.Vocabulary.from_metadata(checkpoint.metadata)
    shorter = dataclasses.replace(
        vocabulary, tokens=vocabulary.tokens[:-1], token_types=vocabulary.token_types[:-1], merges=()
    )
    with pytest.raises(ValueError, match="must have the 320 tokens of the embedding, got 319"):
        new_model(vocabulary=shorter)


@pytest.mark.parametrize(
    ("prompt", "computed"),
    [
        (lambda first: [*PROMPT, *first, 9, 8], 2),  # a longer talk: its last token is for `decode`
        (lambda first: [*PROMPT[:11], 5, *PROMPT[12:]], 8),  # another branch
        (lambda first: PROMPT[:6], 0),  # an earlier point
        (lambda first: PROMPT, 0),  # the same again
        (lambda first: [5, *PROMPT[1:]], 19),  # nothing in common
    ],
    ids=["longer", "branch", "shorter", "same", "other"],
)
def test_reused_prefix_changes_nothing(new_model, calls, prompt, computed):
    model = new_model()
    first = model.generate(PROMPT, max_tokens=8, **GREEDY).tokens
    second = prompt(first)
    fresh = new_model().generate(second, max_tokens=8, **GREEDY).tokens
    calls.clear()
    assert model.generate(second, max_tokens=8, reuse_prefix=True, **GREEDY).tokens == fresh
    assert sum(count for name, count, _ in calls if name == "prefill") == computed


def test_nothing_is_reused_unless_asked_for(model, calls):
    for _ in range(2):
        model.generate(PROMPT, max_tokens=1, **GREEDY)
    assert [call for call in calls if call[0] == "prefill"] == [("prefill", 19, 0)] * 2


@pytest.mark.parametrize("reuse_prefix", [False, True])
def test_a_request_after_an_abandoned_stream(new_model, expected, reuse_prefix):
    model = new_model()
    stream = model.stream_generate(PROMPT, **WILD, seed=0)
    list(itertools.islice(stream, 5))
    stream.close()
    assert model.generate(PROMPT, max_tokens=24, reuse_prefix=reuse_prefix, **GREEDY).tokens == expected


def test_two_streams_cannot_share_the_cache(new_model, expected, chunk):
    model = new_model()
    first = model.stream_generate(PROMPT, **GREEDY)
    second = model.stream_generate(PROMPT, max_tokens=24, **GREEDY)
    assert [next(first).token for _ in range(3)] == list(expected[:3])
    assert next(second).token == expected[0]
    with pytest.raises(ValueError, match="before the next request of its model"):
        next(first)
    assert [piece.token for piece in second] == list(expected[1:])


@pytest.mark.parametrize("reuse_prefix", [False, True])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_step_that_fails_leaves_the_model_usable(new_model, expected, monkeypatch, name, reuse_prefix):
    model = new_model(ubatch=7)
    countdown = iter([False, True])

    def fail_at_the_second(params, *args, **kwargs):
        if next(countdown):
            cache = next(arg for arg in args if isinstance(arg, mla_jax.cache.Cache))
            jax.tree.map(lambda leaf: leaf.delete(), cache.layers)  # donated: gone, and nothing in its place
            raise RuntimeError("the device is lost")
        return original(params, *args, **kwargs)

    original = getattr(steps, name)
    with monkeypatch.context() as patch:
        patch.setattr(steps, name, fail_at_the_second)
        with pytest.raises(RuntimeError, match="the device is lost"):
            model.generate(PROMPT, max_tokens=24, **GREEDY)
    assert model.generate(PROMPT, max_tokens=24, reuse_prefix=reuse_prefix, **GREEDY).tokens == expected


def test_prompts_of_any_length_compile_once_per_bucket(new_model):
    model = new_model(ctx_size=300, ubatch=100)  # 512 slots: no other test here has compiled for them
    compiled = collections.Counter()

    def count(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[details.get("fun_name", "").removeprefix("jit(").rstrip(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for length in np.random.default_rng(0).integers(1, 299, 30):
            model.generate([5] * int(length), max_tokens=2, seed=0)
            model.generate([5] * int(length), max_tokens=2, seed=1, top_k=3, top_p=0.5, repeat_penalty=1.5)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert steps.buckets(100) == (32, 64, 100)
    assert compiled["decode"] == 1
    assert compiled["prefill"] == 3


@pytest.mark.parametrize(
    ("template", "bos_tokens"),
    [(None, 1), ("{{ bos_token }}{{ messages[0].content }}", 1), ("{{ messages[0].content }}", 1)],
    ids=["built-in", "with bos", "without"],
)
def test_a_chat_begins_with_one_bos(checkpoint, new_model, template, bos_tokens):
    vocabulary = tokenizer.Vocabulary.from_metadata(checkpoint.metadata)
    model = new_model(vocabulary=dataclasses.replace(vocabulary, chat_template=template))
    ids = model.encode_chat([{"role": "user", "content": "hello"}])
    assert ids[0] == 0 and ids.count(0) == bos_tokens
    assert "hello" in model.tokenizer.decode(ids)


@pytest.fixture
def jax_settings():
    """Puts the settings of the compilation cache back."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_load_takes_the_keywords_of_the_readme(path):
    model = mla_jax.load(str(path), mla=3, cache_type="bf16", ctx_size=8192, compilation_cache=None)
    assert isinstance(model, mla_jax.Model)
    assert model.run == RunConfig(mla=mla_jax.MLAMode.FLASH_MIXED, cache_type="bf16")
    assert model.ctx_size == 8192


@pytest.mark.parametrize(
    ("trained", "asked", "got"),
    [(4096, None, 4096), (16384, None, 8192), (16384, 0, 16384), (4096, 100, 100)],
)
def test_context_of_a_loaded_model(tmp_path, trained, asked, got):
    write_deepseek2(tmp_path / "m.gguf", layers=1, context=trained)
    model = mla_jax.load(tmp_path / "m.gguf", ctx_size=asked, compilation_cache=None)
    assert model.ctx_size == got


def test_load_keeps_compiled_code_in_a_private_folder(path, tmp_path, jax_settings):
    for name in ("one", "two"):  # JAX by itself would stay with the first folder
        folder = tmp_path / "new" / name
        mla_jax.load(path, compilation_cache=folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        jax.jit(lambda x, name=name: x + jnp.float32(len(name)))(jnp.float32(1)).block_until_ready()
        assert any(folder.iterdir())


def test_where_no_folder_can_be_made_nothing_is_kept(path, tmp_path, jax_settings):
    (tmp_path / "file").write_text("no folder can lie in here")
    model = mla_jax.load(path, compilation_cache=tmp_path / "file" / "xla")
    assert model.generate("the", max_tokens=1).tokens


def test_compiled_code_of_another_user_is_not_run(path, tmp_path, jax_settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(steps.os, "getuid", lambda: tmp_path.stat().st_uid + 1)
        with pytest.raises(ValueError, match="must belong to this user"):
            mla_jax.load(path, compilation_cache=tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match="others must not write to it"):
        mla_jax.load(path, compilation_cache=tmp_path)
    assert jax.config.jax_compilation_cache_dir != str(tmp_path)


def test_defaults_are_those_of_the_command_line_and_of_ik_llama():
    assert (SamplingParams().temperature, SamplingParams().top_k) == (0.8, 40)
    assert RunConfig() == RunConfig(mla=3, flash=True, cache_type="f16")


@pytest.mark.skipif(not generate.PACKAGED_MODEL.exists(), reason="the packaged model is not in this checkout")
def test_the_packaged_model_has_read_python():
    model = mla_jax.load(compilation_cache=None)
    text = "import os\n\n\ndef read_lines(path):\n    with open(path) as f:\n        return f.readlines()\n"
    ids = np.asarray([model.tokenizer.encode(text)], np.int32)
    forward = jax.jit(mla_jax.apply, static_argnums=(3, 4))
    logits, _ = forward(model.params, ids[:, :-1], None, model.config, model.run)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1).sum()
    assert float(nats) / np.log(2) / len(text.encode()) < 1.5
    prompt = "def read_lines(path):"
    lines = (prompt + model.generate(prompt, max_tokens=48, **GREEDY).text).splitlines()
    assert any(_is_python(lines[:count]) for count in range(2, len(lines) + 1))


def _is_python(lines):
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True
