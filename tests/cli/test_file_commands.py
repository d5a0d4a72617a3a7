"""The commands on files: what they print, what they refuse, and that a file is there whole or not at all."""

import contextlib
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from synthetic import write_deepseek2

import mla_jax
from checkpoints_tools import quantize as quantize_lib
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return path


def _types(path):
    return {name: info.type_name for name, info in open_gguf(path).tensors.items()}


def test_quantize_writes_a_file_and_tells_what_it_did(run, path, tmp_path):
    out = tmp_path / "out.gguf"
    code, stdout, err = run("quantize", path, out, "--type", "Q8_0")
    assert (code, stdout) == (0, "")
    chosen = quantize_lib.plan(path, type="q8_0")
    assert f"{chosen.summary()}\nwrote {out}\n" in err
    assert _types(out) == {row.name: row.new for row in chosen.rows}


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, path, tmp_path):
    settings = ["--type", "q8_0", "--custom", "ffn_up=f16", "--dry-run"]
    code, stdout, err = run("quantize", path, tmp_path / "out.gguf", *settings)
    chosen = quantize_lib.plan(path, type="q8_0", custom=["ffn_up=f16"])
    assert (code, err) == (0, "")
    assert stdout == f"{chosen.table()}\n\n{chosen.summary()}\n"
    assert "blk.0.ffn_up.weight" in stdout and "bits per weight" in stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spelling",
    [
        "{} {} q8_0 --custom ffn_down=f16,ffn_up=bf16",
        "{} {} Q8_0 --custom-q ffn_down=f16 --custom_q=ffn_up=bf16",
        "--type Q8_0 --custom=ffn_down=F16 --custom ffn_up=BF16 {} {}",
        "--input {} --out {} -type q8_0 -custom ffn_down=f16,ffn_up=bf16",
    ],
)
def test_spellings_of_one_request(run, path, tmp_path, spelling):
    out = tmp_path / "out.gguf"
    assert run("quantize", *spelling.format(path, out).split())[0] == 0
    expected = quantize_lib.plan(path, type="q8_0", custom=["ffn_down=f16,ffn_up=bf16"])
    assert _types(out) == {row.name: row.new for row in expected.rows}


def test_types_of_output_and_embedding(run, path, tmp_path):
    out = tmp_path / "out.gguf"
    flags = "--output-tensor-type f16 --token-embedding-type bf16 --custom blk.1=f32"
    assert run("quantize", path, out, "q8_0", *flags.split())[0] == 0
    types = _types(out)
    assert types["output.weight"] == "f16" and types["token_embd.weight"] == "bf16"
    assert types["blk.0.attn_output.weight"] == "q8_0" and types["blk.1.attn_output.weight"] == "f32"
    assert run("quantize", path, out, "q8_0", *flags.split(), "--custom", "output=f32")[0] == 0
    assert _types(out)["output.weight"] == "f32"


def test_quantised_weights_are_encoded_anew_only_with_leave(run, path, tmp_path):
    quantised, out = tmp_path / "q8_0.gguf", tmp_path / "out.gguf"
    run("quantize", path, quantised, "q8_0")
    code, stdout, err = run("quantize", quantised, out, "f16")
    assert (code, stdout) == (2, "") and err.startswith("mla-jax: ") and err.count("\n") == 1
    assert "is quantised already, as q8_0" in err and not out.exists()
    assert run("quantize", quantised, out, "f16", "--allow-requantize")[0] == 0


@pytest.mark.parametrize(
    "args, sentence",
    [
        ("quantize", "INPUT must be given: mla-jax quantize INPUT OUT TYPE [FLAGS]."),
        ("quantize {path}", "OUT must be given: "),
        ("quantize {path} {folder}/out.gguf", "TYPE must be given: "),
        ("quantize {path} {folder}/out.gguf q9", "type must be one of f32, f16, bf16"),
        ("quantize {path} {folder}/out.gguf f16 --custom a", "a custom rule must be REGEX=TYPE, got 'a'."),
        ("quantize {path} {folder}/out.gguf f16 8", "every argument must belong to a flag, got '8'."),
        ("quantize {path} {folder}/absent/out.gguf f16", "OUT must be a file in a folder that exists, got"),
        ("quantize {path} {folder} f16", "OUT must be a file in a folder that exists, got"),
        ("quantize {path} /dev/null f16", "OUT must be a file in a folder that exists, got '/dev/null'."),
        (
            "quantize {folder}/absent.gguf {folder}/out.gguf f16",
            "{folder}/absent.gguf: cannot be read: No such",
        ),
        ("quantize {folder} {folder}/out.gguf f16", "{folder}: cannot be read: Is a directory."),
        ("check {folder}/absent.gguf", "{folder}/absent.gguf: cannot be read: No such file"),
    ],
)
def test_what_is_refused(run, path, tmp_path, args, sentence):
    places = dict(path=path, folder=tmp_path)
    code, stdout, err = run(*args.format(**places).split())
    assert (code, stdout) == (2, "")
    assert err.startswith(f"mla-jax: {sentence.format(**places)}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(run, path, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code, stdout, err = run("quantize", path, out, "q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, stdout, err) == (2, "", f"mla-jax: {out} cannot be used: File too large.\n")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_check_of_a_sound_file(run, path):
    code, out, _ = run("check", path)
    assert code == 0 and out.count("\n") == 1 and "all values finite" in out


def test_check_of_a_bad_file_names_the_tensors(run, path, tmp_path):
    file = open_gguf(path)
    tensors = []
    for name, info in file.tensors.items():
        data = file.read(name).view(np.float32).copy()
        data[7] = np.nan if "ffn_gate.weight" in name or name == "output.weight" else data[7]
        tensors.append(TensorData(name, info.shape, info.ggml_type, data))
    write_gguf(tmp_path / "bad.gguf", file.metadata, tensors)
    code, out, err = run("check", tmp_path / "bad.gguf")
    problems = [line for line in err.splitlines() if line.startswith("mla-jax: ")]
    assert (code, out) == (2, "") and len(problems) == 2
    assert "tensor 'output.weight' of type f32" in problems[0] and "value 7, in row 0" in problems[0]
    assert "tensor 'blk.0.ffn_gate.weight'" in problems[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 40 MB, and what it becomes as Q8_0."""
    folder = tmp_path_factory.mktemp("large")
    source, expected = folder / "in.gguf", folder / "expected.gguf"
    write_deepseek2(source, size="full", sizes=dict(ff_exp=512), layers=4, experts=8)
    quantize_lib.quantize(source, expected, type="q8_0")
    return source, expected


@pytest.fixture(scope="module")
def start():
    """Returns a function that starts `mla-jax ARGS`: (process id, function that waits for the exit code)."""
    script = pathlib.Path(__file__).parent / "quantize_child.py"
    root = str(pathlib.Path(mla_jax.__file__).parent.parent)
    variables = os.environ | {"PYTHONPATH": root}
    server = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=variables,
        text=True,
    )

    def start(*args):
        server.stdin.write(json.dumps([str(arg) for arg in args]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), lambda: int(server.stdout.readline())

    yield start
    server.stdin.close()
    server.wait()
    server.stdout.close()


def _wait_for(folder, num_bytes):
    """Waits until an unfinished file has so many bytes, or there is none any more."""
    begun, deadline = False, time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            sizes = [entry.stat().st_size for entry in folder.iterdir() if entry.suffix == ".tmp"]
        except FileNotFoundError:  # it was moved meanwhile
            sizes = []
        if (begun and not sizes) or (sizes and sizes[0] >= num_bytes):
            return
        begun = begun or bool(sizes)
        time.sleep(2e-4)


def test_a_killed_run_leaves_the_old_file_or_the_new_one(large, start, tmp_path):
    """Killed at 20 random moments: while it writes, and about when it moves the file to its place."""
    source, expected = large
    out, old, new = tmp_path / "out.gguf", b"old" * 1000, expected.read_bytes()
    rng, outcomes, num_leftover = random.Random(0), [], 0
    for attempt in range(20):
        out.write_bytes(old)
        child, wait = start("quantize", source, out, "q8_0")
        _wait_for(tmp_path, len(new) if attempt % 2 else rng.uniform(0, len(new)))
        time.sleep(rng.uniform(0, 0.03) if attempt % 2 else 0)
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(child, signal.SIGKILL)
        code, found = wait(), out.read_bytes()
        assert found in ((new,) if code == 0 else (old, new))
        outcomes.append((code, found == new))
        others = [entry for entry in tmp_path.iterdir() if entry != out]
        assert all(entry.suffix == ".tmp" for entry in others)
        num_leftover += len(others)
        for entry in others:
            entry.unlink()
    print(outcomes)
    assert (-signal.SIGKILL, False) in outcomes and num_leftover > 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_removes_what_it_had_begun(large, start, tmp_path, number, code):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    child, wait = start("quantize", large[0], out, "q8_0")
    _wait_for(tmp_path, 2_000_000)
    os.kill(child, number)
    assert wait() == code
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]
