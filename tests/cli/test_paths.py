"""What a command writes must not be what it reads, however the two are spelled."""

import pathlib

import pytest

from mla_jax.cli import app, paths
from mla_jax.cli.argv import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("read.txt").write_text("x = 1\n" * 99)
    pathlib.Path("link.txt").symlink_to("read.txt")
    pathlib.Path("adapter").mkdir()
    pathlib.Path("adapter", "inside").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "out", ["read.txt", "./read.txt", "link.txt", "adapter", "adapter/inside", "adapter/new"]
)
def test_what_is_read_is_not_written(folder, out):
    with pytest.raises(UsageError, match="--out must not be a file that is read, got "):
        paths.check_not_read("--out", out, [None, "read.txt", "adapter", "absent"])


@pytest.mark.parametrize("out", ["new.txt", "adapter.gguf", "absent"])
def test_anything_else_may_be_written(folder, out):
    paths.check_not_read("--out", out, [None, "read.txt", "adapter", "absent"])


@pytest.mark.parametrize(
    "args",
    [
        "perplexity -f read.txt --kl-divergence-base read.txt",
        "perplexity --model read.txt --kl-divergence-base link.txt",
        "export-lora -m absent --lora read.txt -o read.txt",
        "export-lora -m absent --lora adapter -o adapter/inside --dry-run",
    ],
    ids=["text", "model", "adapter", "folder"],
)
def test_commands_refuse_it(folder, capsys, args):
    before = pathlib.Path("read.txt").read_bytes()
    assert app.main(args.split()) == 2
    assert "must not be a file that is read" in capsys.readouterr().err
    assert pathlib.Path("read.txt").read_bytes() == before
