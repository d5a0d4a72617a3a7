"""A model that reads its cache from a file goes on as if it had never stopped, and reads nothing twice."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file
from synthetic import write_deepseek2

import mla_jax
from mla_jax import steps
from mla_jax.cli import main

WILD = dict(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=4)
PROMPT = [0, *np.random.default_rng(7).integers(3, 320, 39).tolist()]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return str(path)


@pytest.fixture
def load(path):
    return lambda ctx_size=128, **settings: mla_jax.load(
        path, ctx_size=ctx_size, compilation_cache=None, **settings
    )


@pytest.mark.parametrize(
    "settings",
    [dict(cache_type="q8_KV"), dict(cache_type="q4_0", cache_type_rope="bf16"), dict(mla=0), dict(mla=1)],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_restored_cache_goes_on_bit_for_bit(load, settings, tmp_path):
    first, second = load(**settings), load(**settings)
    text = first.generate(PROMPT, max_tokens=9, **WILD).tokens
    first.save_cache(tmp_path / "a")
    assert second.load_cache(tmp_path / "a") == [*PROMPT, *text[:-1]]  # the last was drawn, and not read yet
    longer = [*PROMPT, *text, 5]
    expected = first.generate(longer, max_tokens=20, reuse_prefix=True, **WILD).tokens
    assert second.generate(longer, max_tokens=20, reuse_prefix=True, **WILD).tokens == expected
    assert second.timings.cached_tokens == first.timings.cached_tokens == len(PROMPT) + 8
    for model, name in ((first, "b"), (second, "c")):
        model.save_cache(tmp_path / name)
    one, other = load_file(tmp_path / "b"), load_file(tmp_path / "c")
    assert one.keys() == other.keys() and one["tokens"].size == len(longer) + 19
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_cache_is_that_of_the_newest_request_wherever_it_ran(load, tmp_path):
    model = load(parallel=2)
    for length in (9, 20, 30):
        model.generate(PROMPT[:length], max_tokens=1, reuse_prefix=True)
        model.save_cache(tmp_path / "a")
        assert load().load_cache(tmp_path / "a") == PROMPT[:length]


def test_a_cache_must_exist_and_fit(load, tmp_path):
    model = load()
    with pytest.raises(ValueError, match="there must be a cache to save: generate something first"):
        model.save_cache(tmp_path / "a")
    model.generate(PROMPT, max_tokens=1)
    model.save_cache(tmp_path / "a")
    with pytest.raises(ValueError, match="must have at most the 39 tokens of the context, got 40"):
        load(ctx_size=39).load_cache(tmp_path / "a")
    assert load(ctx_size=40).load_cache(tmp_path / "a") == PROMPT
    with pytest.raises(ValueError, match=r"cache_type must be 'f32' as in this run, got 'f16'"):
        load(cache_type="f32").load_cache(tmp_path / "a")


def test_loading_ends_a_stream(load, tmp_path):
    model = load()
    stream = model.stream_generate(PROMPT, max_tokens=5)
    next(stream)
    model.save_cache(tmp_path / "a", num_tokens=10)
    for count in (-1, 41):
        with pytest.raises(ValueError, match=rf"num_tokens must be in \[0, 40\], got {count}"):
            model.save_cache(tmp_path / "b", num_tokens=count)
    with pytest.raises(FileNotFoundError):
        model.load_cache(tmp_path / "b")
    next(stream)  # goes on after what failed
    assert model.load_cache(tmp_path / "a") == PROMPT[:10]
    with pytest.raises(ValueError, match="a stream must be read before the next request"):
        next(stream)


@pytest.fixture
def run(path, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "use_compilation_cache", lambda folder: None)

    def run(*args):
        code = main(["generate", "-m", path, "-c", "128", "--temp", "0", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def _written(file):
    return os.stat(file).st_ino, os.stat(file).st_mtime_ns  # not when it was read


def test_the_second_run_reads_the_prompt_from_the_file(run, tmp_path):
    file = str(tmp_path / "prompt.cache")
    args = ("-p", "the latent of a token is small", "-n", "6", "--prompt-cache", file)
    code, text, err = run(*args)
    assert code == 0 and "of them cached" not in err
    before, size = _written(file), os.stat(file).st_size
    code, again, err = run(*args)
    assert (code, again) == (0, text)
    num_tokens = int(err.split(" prompt tokens")[0].split()[-1])
    assert f"{num_tokens} prompt tokens ({num_tokens - 1} of them cached)" in err
    assert _written(file) == before  # it has the prompt already
    assert run(*args, "--prompt-cache-all")[1] == text
    assert os.stat(file).st_size > size
    longer = ("-p", text.rstrip("\n") + "!", *args[2:])
    before = _written(file)
    code, _, err = run(*longer, "--prompt-cache-ro")
    assert code == 0 and "of them cached" in err and _written(file) == before
    run(*longer)
    assert _written(file) != before
    assert os.listdir(tmp_path) == ["prompt.cache"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--prompt-cache-all"], "--prompt-cache-all must come with --prompt-cache, which names the file."),
        (["--prompt-cache-ro"], "--prompt-cache-ro must come with --prompt-cache, which names the file."),
        (
            ["--prompt-cache", "a", "--prompt-cache-ro"],
            "--prompt-cache must exist with --prompt-cache-ro, got 'a'.",
        ),
        (
            ["--prompt-cache", "/nowhere/a"],
            "--prompt-cache must be a file in a folder that exists, got '/nowhere/a'.",
        ),
        (
            ["--prompt-cache", "a", "--prompt-cache-all", "--prompt-cache-ro"],
            "--prompt-cache-all writes the file, so it must not come with --prompt-cache-ro.",
        ),
    ],
)
def test_flags_that_do_not_go_together(run, args, sentence):
    assert run("-p", "x", "-n", "1", *args) == (2, "", f"mla-jax: {sentence}\n")


def test_a_file_of_another_kind_is_refused_and_left_alone(run, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("not a cache")
    code, out, err = run("-p", "x", "-n", "1", "--prompt-cache", str(file))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"mla-jax: {file} must be a whole safetensors file, got one with ")
    assert file.read_text() == "not a cache"
