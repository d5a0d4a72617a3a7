"""`--mmap`, `--no-mmap` and `--mlock`, and files that are written so that they can be mapped."""

import logging

import pytest
from synthetic import write_deepseek2

from checkpoints_tools import memory
from checkpoints_tools.gguf_file import open_gguf
from mla_jax import steps


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "COMPILATION_CACHE", tmp_path / "xla")
    path = tmp_path / "nano.gguf"
    write_deepseek2(path, layers=1)
    return path


@pytest.mark.parametrize(
    ("flags", "at_hand", "is_mapped"),
    [([], 1 << 40, False), (["--mmap"], 1 << 40, True), ([], 1000, True), (["--no-mmap"], 1000, False)],
    ids=["small", "small, asked for", "large", "large, refused"],
)
def test_a_mapped_model_says_the_same(run, path, monkeypatch, caplog, flags, at_hand, is_mapped):
    args = ("generate", "-m", path, "-p", "the", "-n", "4", "-c", "64", "--temp", "0")
    _, expected, _ = run(*args, "--no-mmap")
    monkeypatch.setattr(memory, "available_memory", lambda: at_hand)
    with caplog.at_level(logging.INFO, "absl"):
        code, said, _ = run(*args, *flags)
    assert (code, said) == (0, expected)
    assert any("stay in the file" in text for text in caplog.messages) == is_mapped


@pytest.mark.parametrize("is_allowed", [True, False])
def test_locked_weights_are_told(run, path, monkeypatch, is_allowed):
    def lock(arrays):
        if not is_allowed:
            raise OSError("Cannot allocate memory after 0.0 GiB")
        return sum(array.nbytes for array in arrays)

    monkeypatch.setattr(memory, "lock", lock)
    code, _, told = run("generate", "-m", path, "-p", "the", "-n", "1", "-c", "64", "--mlock")
    sentence = "not all weights are locked in memory: Cannot allocate memory after 0.0 GiB"
    sentence = "weights of 0.00 GiB are locked in memory" if is_allowed else sentence
    assert code == 0 and f"--mlock: {sentence}\n" in told


def test_huge_pages_are_no_choice(run):
    code, _, told = run("generate", "-p", "x", "--thp")
    assert code == 2 and told.startswith("mla-jax: --thp cannot be used: weights lie in huge pages already")


def test_merging_can_move_tensors(run, path, tmp_path):
    out = tmp_path / "out.gguf"
    assert run("merge", path, out, "--alignment", "4096")[0] == 0
    assert all(info.offset % 4096 == 0 for info in open_gguf(out).tensors.values())
    code, _, told = run("merge", path, out, "--alignment", "48")
    assert code == 2 and told == "mla-jax: --alignment must be one of 32, 64, 4096, got '48'.\n"


def test_repacked_weights_are_not_mapped(run, path):
    code, _, told = run("generate", "-m", path, "-p", "the", "-n", "1", "-c", "64", "-rtr", "--mmap")
    sentence = "--run-time-repack must come without --mmap: what it lays out is read, not mapped."
    assert (code, told.splitlines()[-1]) == (2, f"mla-jax: {sentence}")


def test_a_repack_that_has_no_effect_is_told(run, path, caplog):
    args = ("generate", "-m", path, "-p", "the", "-n", "1", "-c", "64", "-rtr")
    with caplog.at_level(logging.INFO, "absl"):
        assert run(*args)[0] == 0
    assert any("no weights lie in panels" in text for text in caplog.messages)
    code, _, told = run(*args, "--mesh", "expert=1")
    assert code == 0 and "--run-time-repack has no effect with --mesh or -ngl" in told
