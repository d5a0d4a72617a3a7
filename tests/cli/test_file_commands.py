"""The commands on files: what they print, what they refuse, and that a file is there whole or not at all."""

import contextlib
import json
import math
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
from hf_folder import write_folder
from synthetic import write_deepseek2

import mla_jax
from checkpoints_tools import convert as convert_lib
from checkpoints_tools import diff as diff_lib
from checkpoints_tools import quantize as quantize_lib
from checkpoints_tools import safetensors_file
from checkpoints_tools import split as split_lib
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return path


def _types(path):
    return {name: info.type_name for name, info in open_gguf(path).tensors.items()}


def _data(path):
    file = open_gguf(path)
    return {name: file.read(name).tobytes() for name in file.tensors}


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
        (
            "quantize {path} {folder}/out.gguf f16 --imatrix {path}",
            "{path}: key 'general.type' must be 'imatrix'",
        ),
        ("split {path} {folder}/absent/part", "PREFIX must be a file in a folder that exists, got"),
        (
            "split {path} {folder}/part --max-size 0",
            "--max-size must be a positive whole number with K, M or G",
        ),
        (
            "split {path} {folder}/part --max-size 4X",
            "--max-size must be a positive whole number with K, M or",
        ),
        ("split {path} {folder}/part --max-tensors 0", "--max-tensors must be a positive integer, got '0'."),
        ("merge {path} {folder}", "OUT must be a file in a folder that exists, got"),
        (
            "merge {folder}/absent.gguf {folder}/out.gguf",
            "{folder}/absent.gguf: cannot be read: No such file",
        ),
        (
            "convert {path} {folder}/out.gguf",
            "OUT must be a folder if INPUT is a GGUF file; to change the types",
        ),
        (
            "convert {folder} {folder}/out.gguf --to orbax",
            "INPUT must be a GGUF file to be converted to orbax",
        ),
        ("convert {path} {folder}/out --to gguf", "INPUT must be a folder to be converted to gguf, got"),
        ("convert {path} {folder}/out --to orbax --type f16", "--type has no effect on this conversion."),
        (
            "convert {path} {folder}/out --to orbax --dtype float16",
            "--dtype has no effect on this conversion.",
        ),
        ("convert {path} {folder}/absent/out", "OUT must be a new or an empty folder, no link or mounted"),
        ("convert {folder}/absent x.gguf", "INPUT must be a folder or a GGUF file that exists, got"),
        ("convert {path} .", "OUT must be a new or an empty folder, no link or mounted disk and not the"),
        ("convert {path} {path}", "OUT must be a folder if INPUT is a GGUF file"),
        (
            "convert {folder} {folder}/out.gguf",
            "INPUT must be a folder with a config.json, of Hugging Face,",
        ),
        ("diff {path}", "SECOND must be given: mla-jax diff FIRST SECOND [FLAGS]."),
        ("diff {path} {folder}/absent.gguf", "{folder}/absent.gguf: cannot be read: No such file"),
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


@pytest.mark.parametrize(
    "limits, num_parts",
    [
        ("--max-tensors 10", 4),
        ("--split-max-tensors=10", 4),
        ("--max-size 300K", 3),
        ("--split-max-size 300kb", 3),
        ("--max-size 1G", 1),
        ("--max-size 300000 --max-tensors 10", 4),
        ("", 1),
    ],
)
def test_split_and_merge(run, path, tmp_path, limits, num_parts):
    prefix, out = tmp_path / "part", tmp_path / "merged.gguf"
    code, stdout, _ = run("split", path, prefix, *limits.split(), "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert [line.split()[0] for line in stdout.splitlines()[1:]] == [
        f"{prefix}-{number:05}-of-{num_parts:05}.gguf" for number in range(1, num_parts + 1)
    ]
    code, stdout, err = run("split", path, prefix, *limits.split())
    parts = sorted(tmp_path.iterdir())
    assert (code, stdout) == (0, "") and len(parts) == num_parts
    assert all(f"wrote {part}\n" in err for part in parts)
    code, stdout, _ = run("merge", parts[0], out, "--dry-run")
    assert code == 0 and f" bytes would be written to {out}\n" in stdout and not out.exists()
    assert run("merge", parts[0], out)[0] == 0
    assert out.read_bytes() == path.read_bytes()


def test_a_prefix_with_a_slash_at_its_end(run, path, tmp_path):
    """Its parts lie where those of the prefix without it would: there is no such folder."""
    assert run("split", path, f"{tmp_path}/part/")[0] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["part-00001-of-00001.gguf"]


@pytest.mark.parametrize(
    "written, num_bytes", [("7", 7), ("300k", 300_000), ("500MB", 500_000_000), ("4G", 4_000_000_000)]
)
def test_sizes_of_parts(run, path, tmp_path, monkeypatch, written, num_bytes):
    asked = []
    monkeypatch.setattr(split_lib, "split", lambda *args, **limits: asked.append(limits) or ["part"])
    assert run("split", path, tmp_path / "part", "--max-size", written)[0] == 0
    assert asked == [dict(max_bytes=num_bytes, max_tensors=None)]


def test_convert_of_a_checkpoint(run, tmp_path):
    folder, out = tmp_path / "hf", tmp_path / "out.gguf"
    write_folder(folder, layers=2)
    code, stdout, err = run("convert", folder, out, "--type", "q8_0", "--dry-run")
    chosen = convert_lib.plan(folder, type="q8_0")
    assert (code, stdout, err) == (0, f"{chosen.table()}\n\n{chosen.summary()}\n", "") and not out.exists()
    code, stdout, err = run("convert", folder, out, "--type", "Q8_0")
    assert (code, stdout) == (0, "") and f"{chosen.summary()}\nwrote {out}\n" in err
    assert _types(out) == {row.name: row.type_name for row in chosen.rows}
    assert run("convert", folder, out, "--to", "gguf")[0] == 0
    assert _types(out)["output.weight"] == "bf16"


def test_a_dry_run_refuses_what_has_no_published_form(run, tmp_path):
    write_deepseek2(tmp_path / "a.gguf", gating="softmax", normalize=True)
    code, stdout, err = run("convert", tmp_path / "a.gguf", tmp_path / "hf", "--dry-run")
    assert (code, stdout) == (2, "") and "normalize_weights must be false" in err


def test_convert_to_orbax_and_back(run, path, tmp_path):
    folder, out = tmp_path / "orbax", tmp_path / "out.gguf"
    code, stdout, _ = run("convert", path, folder, "--to", "orbax", "--dry-run")
    assert code == 0 and f"bytes would be written to {folder}\n" in stdout and not folder.exists()
    assert run("convert", path, folder, "--to", "orbax")[0] == 0
    code, stdout, _ = run("convert", folder, out, "--dry-run")
    assert code == 0 and f"bytes would be written to {out}\n" in stdout and not out.exists()
    inside = folder / "x.gguf"
    code, _, err = run("convert", folder, inside)
    assert (code, inside.exists()) == (2, False) and "OUT must not lie in the folder" in err
    assert run("convert", folder, out)[0] == 0
    assert out.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("flags, dtype", [("", "BF16"), ("--to safetensors --dtype float32", "F32")])
def test_convert_to_safetensors_and_back(run, path, tmp_path, flags, dtype):
    folder, out = tmp_path / "hf", tmp_path / "out.gguf"
    code, told, _ = run("convert", path, folder, *flags.split(), "--dry-run")
    assert code == 0 and not folder.exists()
    code, stdout, err = run("convert", path, folder, *flags.split())
    assert (code, stdout) == (0, "") and f"wrote {folder}\n" in err
    tensors = safetensors_file.open_folder(folder).tensors
    sizes = {"F32": 4, "BF16": 2}
    num_bytes = sum(math.prod(info.shape) * sizes[info.dtype] for info in tensors.values())
    assert told == f"{len(tensors)} tensors of {num_bytes:,} bytes would be written to {folder}\n"
    assert tensors["lm_head.weight"].dtype == dtype
    assert run("convert", folder, out, "--type", "f32")[0] == 0
    assert (_data(out) == _data(path)) == (dtype == "F32")


def test_diff_of_two_files(run, path, tmp_path):
    run("quantize", path, tmp_path / "q8_0.gguf", "q8_0")
    code, stdout, _ = run("diff", path, tmp_path / "q8_0.gguf")
    assert code == 0 and stdout == diff_lib.table(diff_lib.diff(path, tmp_path / "q8_0.gguf")) + "\n"
    assert "blk.1.ffn_down_exps.weight" in stdout and "q8_0" in stdout
    code, stdout, _ = run("diff", "--first", path, "--second", path)
    assert code == 0 and stdout.count("\n") == 1


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


_PEAK = """
import re, sys
from mla_jax.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1])
sys.exit(code)
"""


def _peak_bytes(*args):
    """Returns the largest resident memory of `mla-jax ARGS` in a process of its own."""
    root = str(pathlib.Path(mla_jax.__file__).parent.parent)
    command = [sys.executable, "-c", _PEAK, *map(str, args)]
    variables = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=300)
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_is_that_of_a_tensor_and_not_of_the_file(path, tmp_path):
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    sizes = dict(embed=1024, ff=1024, ff_exp=1024)
    write_deepseek2(source, size="full", sizes=sizes, layers=2, experts=24, weight_type="F16")
    largest = max(info.num_bytes for info in open_gguf(source).tensors.values())
    grown = _peak_bytes("quantize", source, out, "q8_0") - _peak_bytes("quantize", path, out, "q8_0")
    print(f"{source.stat().st_size:,} bytes, largest tensor {largest:,}: {grown:,} bytes of memory")
    assert grown < largest + 50e6 < source.stat().st_size - 70e6


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_removes_what_it_had_begun(large, start, tmp_path, number, code):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    child, wait = start("quantize", large[0], out, "q8_0")
    _wait_for(tmp_path, 2_000_000)
    os.kill(child, number)
    assert wait() == code
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]
