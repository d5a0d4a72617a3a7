"""The command as its users run it: what it prints where, and its exit code."""

import io
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
import mla_jax
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from mla_jax import cache, generate, steps
from mla_jax.cli import app

COMMANDS = ("generate", "chat", "serve", "llama-server", "inspect", "plan", "check", "quantize", "convert")
COMMANDS += ("split", "export-lora", "merge", "diff", "perplexity", "sweep-bench", "bench", "ser-sweep")
COMMANDS += ("autotune", "finetune", "train")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def private_cache(home, monkeypatch):
    monkeypatch.setattr(steps, "COMPILATION_CACHE", home / ".cache" / "mla_jax" / "xla")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return str(path)


@pytest.fixture(scope="module")
def expected(path):
    """What the model says after "the", in Python."""
    return mla_jax.load(path, compilation_cache=None).generate("the", max_tokens=8, temperature=0.0).text


def run_apart(home, *args, stdin="", **environment):
    """Runs the command in a process of its own."""
    root = pathlib.Path(mla_jax.__file__).parent.parent
    variables = {**os.environ, "HOME": str(home), "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "mla_jax", *map(str, args)]
    done = subprocess.run(
        command, input=stdin.encode(), env=variables, cwd=home, capture_output=True, timeout=300, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_process_streams_text_to_stdout_and_figures_to_stderr(home, path, expected):
    code, out, err = run_apart(home, "generate", "-m", path, "-p", "the", "-n", "8", "--temp", "0")
    assert (code, out) == (0, f"the{expected}\n")
    loaded, cache, figures = err.splitlines()[-3:]  # a slow machine is told how far loading is
    assert loaded.startswith(f"loaded {path} in ") and "context 4096 tokens" in loaded
    assert loaded.endswith(f"compiled code is kept in {home / '.cache' / 'mla_jax' / 'xla'}")
    assert cache == "cache: 192 bytes a token, 0.8 MiB in all"  # 2 layers of 32 + 16 numbers in 16 bits
    assert figures.startswith("3 prompt tokens, first token after ")
    assert figures.endswith("tokens/s; finished: length")


def test_a_process_says_what_is_wrong_in_one_line(home):
    code, out, err = run_apart(home, "generate", "-m", "absent.gguf", "-p", "x")
    assert (code, out) == (2, "")
    assert err == "mla-jax: absent.gguf: cannot be read: No such file or directory.\n"


def test_a_closed_pipe_is_no_error(home, path):
    command = f"'{sys.executable}' -m mla_jax inspect -m '{path}' | head -n 1"
    root = str(pathlib.Path(mla_jax.__file__).parent.parent)
    variables = {**os.environ, "HOME": str(home), "PYTHONPATH": root}
    done = subprocess.run(["sh", "-c", command], env=variables, capture_output=True, timeout=300, check=False)
    assert done.stdout.startswith(b"file ") and done.stderr == b""


def test_inspect_prints_sizes_keys_and_tensors(run, path):
    code, out, err = run("inspect", "-m", path)
    assert (code, err) == (0, "")
    assert out == checkpoints_tools.describe(path) + "\n"
    assert "deepseek2.attention.kv_lora_rank" in out and "blk.1.ffn_gate_exps.weight" in out


def test_plan_takes_a_file_or_a_preset_without_a_flag(run, path):
    code, out, err = run("plan", "deepseek-v3", "-c", "1024")
    assert (code, err) == (0, "") and "70,272" in out
    assert run("plan", path)[1] == run("plan", "--model", path)[1]
    code, out, err = run("plan", "absent.gguf")
    assert (code, out) == (
        2,
        "",
    ) and err == "mla-jax: absent.gguf: cannot be read: No such file or directory.\n"


def test_a_plan_of_what_is_neither_tells_the_presets(run):
    code, out, err = run("plan", "deepseek-v9")
    assert (code, out) == (2, "")
    assert err.startswith("mla-jax: --model must be a file or one of deepseek-v2-lite, deepseek-v2,")
    assert err.endswith("got 'deepseek-v9'.\n")


def test_a_rotation_of_what_is_not_quantised_is_said_to_be_off(run, path):
    code, _, err = run("generate", "-m", path, "-p", "the", "-n", "1", "-khad")
    assert code == 0 and "--k-cache-hadamard is off: a cache of type f16 is not quantised" in err


@pytest.mark.parametrize(
    "spelling",
    [
        "--model {} --prompt the --predict 8 --temp 0 --no-display-prompt",
        "-m={} -p=the -n=8 -temp=0 -no-display-prompt -fa",
        "-m {} -p the -n 8 --temperature 0 --no_display_prompt -fa on -mla 3 -ctk f16",
        "-m {} -p the -n 8 --temp 1 --top-k 1 --nodisplay-prompt --flash-attn=auto -ub 500 -b 7",
        "-m {} -p the -n 8 --temp 5 -s 3 --top-p 1e-9 --no-display-prompt --seed=-1",
        "-m {} -p the -n 8 --temp 5 --min-p 0.99999 --no-display-prompt -ger",
    ],
)
def test_spellings_of_one_request(run, path, expected, spelling):
    code, out, err = run("generate", *spelling.format(path).split())
    assert (code, out) == (0, f"{expected}\n"), err


@pytest.mark.parametrize("text", ["the", "the\n", "the\r\n"])
def test_a_prompt_from_a_file(run, path, expected, tmp_path, text):
    file = tmp_path / "prompt.txt"
    file.write_bytes(text.encode())
    code, out, err = run("generate", "-m", path, "-f", file, "-n", "8", "--temp", "0", "--no-display-prompt")
    assert (code, out) == (0, f"{expected}\n"), err
    assert run("generate", "-m", path, "-f", file, "-n", "8", "--temp", "0")[1] == f"the{expected}\n"


def test_a_prompt_of_a_file_that_holds_none_is_refused(run, path, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\n")
    (tmp_path / "bad").write_bytes(b"a\xff")
    sentences = {
        ("-f", empty): f"--file must hold the text to continue, but there is none in {empty}.",
        ("-f", tmp_path / "bad"): f"{tmp_path}/bad must be text in UTF-8, but byte 1 is none.",
        ("-f", tmp_path / "no"): f"{tmp_path}/no cannot be used: No such file or directory.",
        ("-f", path, "-p", "a"): "--file must not come with --prompt: each gives the text to continue.",
    }
    for words, sentence in sentences.items():
        assert run("generate", "-m", path, *words) == (2, "", f"mla-jax: {sentence}\n")
    assert run("chat", "-m", path, "-f", path)[2].startswith("mla-jax: there is no flag -f.")


def test_a_seed_decides_the_text(run, path):
    texts = [run("generate", "-m", path, "-p", "the", "-n", "8", "-s", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_limit_the_context_ends_the_text(run, path):
    code, _, err = run("generate", "-m", path, "-p", "the", "-c", "8", "--temp", "0", "-n", "-1")
    assert code == 0 and "finished: length" in err and "then 5 at" in err


def test_a_longer_context_than_the_model_knows_is_told(run, path):
    code, _, err = run("generate", "-m", path, "-p", "the", "-n", "1", "-c", "4097")
    assert code == 0 and "the context is longer than the 4096 tokens that the model was made for" in err


def test_layers_for_a_gpu_that_is_not_there(run, path, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    code, out, err = run("generate", "-m", path, "-p", "the", "-n", "8", "--temp", "0", "-ngl", "999")
    assert (code, out) == (0, f"the{expected}\n")
    assert "-ngl 999: there is no GPU that JAX can use, so everything runs on the CPU" in err


def test_threads_are_cores(run, path, monkeypatch):
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: chosen.append(cores), raising=False)
    assert run("generate", "-m", path, "-p", "the", "-n", "1", "-t", "1")[0] == 0
    assert chosen == [[3]]
    code, out, err = run("generate", "-m", path, "-p", "the", "-t", "3")
    assert (code, out) == (2, "")
    assert err == "mla-jax: --threads must be at most the 2 cores of this machine, got 3.\n"


def test_a_home_that_cannot_be_written_is_told(run, path, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(steps, "COMPILATION_CACHE", tmp_path / "file" / "xla")
    code, _, err = run("generate", "-m", path, "-p", "the", "-n", "1")
    assert code == 0 and f"compiled code is not kept: {tmp_path / 'file' / 'xla'}: Not a directory" in err


def test_a_chat_of_two_turns_keeps_what_it_computed(run, path, monkeypatch):
    prefilled = []
    original = steps.prefill

    def spy(params, tokens, num_tokens, cache, *more, **settings):
        prefilled.append((int(cache.length[0]), int(num_tokens[0])))
        return original(params, tokens, num_tokens, cache, *more, **settings)

    monkeypatch.setattr(steps, "prefill", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n  \nand then?\n/exit\nnot read\n"))
    code, out, err = run("chat", "-m", path, "-n", "6", "--temp", "0", "-sys", "Be brief.")
    assert code == 0
    messages = [{"role": "system", "content": "Be brief."}]
    model = mla_jax.load(path, compilation_cache=None)
    wanted = ""
    for turn in ("hello", "and then?"):
        messages.append({"role": "user", "content": turn})
        answer = model.generate(model.encode_chat(messages), max_tokens=6, temperature=0.0).text
        messages.append({"role": "assistant", "content": answer})
        wanted += answer + "\n"
    assert out == wanted
    assert err.count("finished: length") == 2
    assert prefilled[0][0] == 0 and prefilled[1][0] > 20  # the second turn goes on where they part


def test_a_chat_ends_with_its_input(run, path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, out, _ = run("chat", "-m", path)
    assert (code, out) == (0, "")


def test_a_chat_past_its_context_says_so(run, path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello " * 50 + "\n"))
    code, out, err = run("chat", "-m", path, "-c", "40")
    assert (code, out) == (2, "")
    assert "mla-jax: the prompt must fit the context of 40 tokens, got " in err


def test_help_names_every_command(run):
    for args in ([], ["--help"], ["-h"], ["help"]):
        code, out, err = run(*args)
        assert (code, err) == (0, "")
        assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("spelling", ["--help", "-h", "-help"])
def test_help_fits_a_screen(run, command, spelling):
    code, out, err = run(command, spelling)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"usage: mla-jax {command} ") and "[FLAGS]: " in lines[0]
    most = 80 if command in ("serve", "llama-server") else 52  # a server has many flags
    assert len(lines) <= most and max(map(len, lines)) <= 110


def test_help_tells_spellings_values_and_defaults(run):
    out = run("generate", "--help")[1]
    assert out.startswith("usage: mla-jax generate (-p PROMPT | -f FILE) [FLAGS]: continue a prompt\n")
    rows = {line[8:].split()[0]: line for line in out.splitlines()[2:]}
    assert rows["--model"].startswith("  -m,   --model TEXT ")
    assert "on|off|auto" in rows["--flash-attn"] and rows["--flash-attn"].endswith("[on]")
    assert rows["--cache-type-k"].startswith("  -ctk, --cache-type-k NAME ")
    assert "f32 f16 bf16 q8_0 q8_KV" in rows["--cache-type-k"] and "64|128|256|512" in rows["--hadamard-size"]
    assert rows["--top-k"].startswith("        --top-k N ") and rows["--top-k"].endswith("[40]")
    assert "--[no-]display-prompt" in rows


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["generat"],
            f"the command must be one of {', '.join(COMMANDS)}, got 'generat'. Did you mean generate?",
        ),
        (
            ["--prompt", "x"],
            f"the command must be one of {', '.join(COMMANDS)}, got '--prompt'.",
        ),
        (["generate"], "--prompt must be given and not be empty: it is the text to continue."),
        (["generate", "-p", ""], "--prompt must be given and not be empty: it is the text to continue."),
        (["generate", "-p", "x", "-n", "0"], "--predict must be positive, or -1 for no limit, got 0."),
        (["generate", "-p", "x", "--top-p", "2"], "top_p must be in (0, 1], got 2.0."),
        (["generate", "-p", "x", "--temp", "nan"], "temperature must be finite and at least 0, got nan."),
        (["generate", "-p", "x", "--promt", "x"], "there is no flag --promt. Did you mean --prompt?"),
        (["chat", "-ctk", "q9"], "-ctk must be one of f32, f16, bf16, q8_0"),
        (["chat", "--hadamard-size", "64"], "--hadamard-size must come with --k-cache-hadamard"),
        (["generate", "-ser", "6", "-p", "x"], "-ser must be Kmin,t with whole Kmin from 1"),
        (["generate", "-p", "x", "-ot", "exps"], "--override-tensor must be REGEX=PLACE with a place of cpu"),
        (["generate", "-p", "x", "--fit=much"], "--fit must be on, off or MiB to leave free, got 'much'."),
        (["train"], "--out must be given: the GGUF file to write."),
        (
            ["train", "--out", "absent/m.gguf"],
            "--out must be a file in a folder that exists, got 'absent/m.gguf'.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_refused_before_a_model_is_read(run, monkeypatch, args, sentence):
    monkeypatch.setattr(generate, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith(f"mla-jax: {sentence}") and err.count("\n") == 1


def _missing(path):
    return path.with_name("absent.gguf")


def _folder(path):
    return path.parent


def _text(path):
    path.write_text("#!/bin/sh\n")


def _truncated(path):
    write_deepseek2(path)
    path.write_bytes(path.read_bytes()[:-5000])


def _llama(path):
    write_deepseek2(path, metadata={"general.architecture": "llama"})


def _wrong_shape(path):
    write_deepseek2(path, metadata={"deepseek2.embedding_length": 32})


def _unsupported_type(path):
    write_deepseek2(path, sizes={"embed": 256})
    file = open_gguf(path)
    tensors = []
    for name, info in file.tensors.items():
        kind = IDS["q8_K"] if name == "blk.0.ffn_up.weight" else info.ggml_type
        num_bytes = TensorData(name, info.shape, kind, None).num_bytes
        tensors.append(TensorData(name, info.shape, kind, file.read(name)[:num_bytes]))
    write_gguf(path, file.metadata, tensors)


def _no_vocabulary(path):
    write_deepseek2(path, metadata={"tokenizer.ggml.tokens": None})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_missing, "absent.gguf: cannot be read: No such file or directory."),
        (_folder, ": cannot be read: Is a directory."),
        (_text, ": is not a GGUF file: it must begin with b'GGUF', got b'#!/b'."),
        (_truncated, "needs 8192 bytes, 3192 are left; the file is cut off or damaged."),
        (_llama, "'general.architecture' is 'llama', supported is 'deepseek2'"),
        (_wrong_shape, "tensor 'token_embd.weight' must have shape (320, 32), got (320, 64)"),
        (_unsupported_type, "has type q8_K (15), which cannot be decoded"),
        (_no_vocabulary, "tokenizer.ggml.tokens is missing, so the file has no vocabulary."),
    ],
    ids=lambda value: value.__name__.lstrip("_") if callable(value) else "",
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_bad_files(run, tmp_path, monkeypatch, command, make, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    path = tmp_path / "bad.gguf"
    path = make(path) or path
    code, out, err = run(command, "-m", path, *(["-p", "x"] if command == "generate" else []))
    assert (code, out) == (2, "")
    assert err.startswith("mla-jax: ") and words in err
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize("make", [_missing, _folder, _text], ids=lambda make: make.__name__.lstrip("_"))
def test_inspect_of_bad_files(run, tmp_path, make):
    path = tmp_path / "bad.gguf"
    code, out, err = run("inspect", "-m", make(path) or path)
    assert (code, out) == (2, "")
    assert err.startswith("mla-jax: ") and err.count("\n") == 1


def test_inspect_tells_why_a_model_cannot_be_run(run, tmp_path):
    _llama(tmp_path / "llama.gguf")
    code, out, err = run("inspect", "-m", tmp_path / "llama.gguf")
    assert (code, err) == (0, "")
    assert "cannot be run" in out and "supported is 'deepseek2'" in out


def test_a_cache_larger_than_memory_is_one_sentence(run, path, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2048 bytes.")

    monkeypatch.setattr(cache, "init_pool", fail)
    code, _, err = run("generate", "-m", path, "-p", "x")
    assert code == 2
    assert err.splitlines()[-1] == (
        "mla-jax: the model and its context must fit the memory of this machine; give a smaller --ctx-size."
    )


def test_other_failures_of_the_device_keep_their_traceback(run, path, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is lost")

    monkeypatch.setattr(cache, "init_pool", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is lost"):
        run("generate", "-m", path, "-p", "x")


def test_an_interrupt_ends_the_command_quietly(run, path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "decode", interrupt)
    code, _, err = run("generate", "-m", path, "-p", "x")
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize("code, ends_at_once", [(0, False), (2, False), (130, True), (143, True)])
def test_an_interrupted_process_ends_at_once(monkeypatch, code, ends_at_once):
    ended = []
    monkeypatch.setattr(app, "main", lambda: code)
    monkeypatch.setattr(os, "_exit", ended.append)
    assert app.run() == code and ended == [code] * ends_at_once


@pytest.mark.skipif(not generate.PACKAGED_MODEL.exists(), reason="the packaged model is not in this checkout")
def test_the_packaged_model_is_the_default(run):
    code, out, _ = run("inspect")
    assert code == 0 and out.splitlines()[0].endswith(generate.PACKAGED_MODEL.name)


def test_a_signal_that_a_callback_swallows_is_heard_all_the_same():
    """JAX has a callback of the garbage collector, and what comes up in one goes no further."""
    script = """
import gc, os, signal, time
from mla_jax.cli import app

def callback(phase, info):
    gc.callbacks.remove(callback)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)

with app._raising_on_sigterm():
    try:
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(60)
    except app._Terminated:
        print("heard")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("heard\n", "")
