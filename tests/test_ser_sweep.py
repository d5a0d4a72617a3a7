"""The sweep measures what it says: perplexity and kept experts by definition, and writes what it prints."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import mla_jax
from mla_jax import expert_reduction, ser_sweep, steps
from mla_jax.cli import main

TEXT = "The latent of a token is small, and the cache with it. " * 20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=3)
    return str(path)


def test_grid():
    assert ser_sweep.grid(2) == [(1, 0.0), (1, 1.0), (1, 0.2), (1, 0.4), (1, 0.6), (1, 0.8)]
    settings = ser_sweep.grid(8)
    assert len(set(settings)) == len(settings) == 1 + 7 + 3 * 4
    assert {minimum for minimum, share in settings if 0 < share < 1} == {1, 4, 7}
    assert ser_sweep.grid(1)[0] == (1, 0.0)


def test_rows_are_the_definition(path):
    model = mla_jax.load(path, ctx_size=64, compilation_cache=None)
    tokens, told = model.tokenizer.encode(TEXT)[:101], []
    settings = [expert_reduction.OFF, (1, 1.0), (2, 1.0)]
    rows = ser_sweep.sweep(model, tokens, settings, window=50, decoded=3, rounds=1, report=told.append)
    assert [row.kept for row in rows] == [3, 1, 2]
    assert [(row.minimum, row.threshold) for row in rows] == settings
    assert all(row.speed > 0 for row in rows) and len(told) == 3 + 2
    windows = np.asarray([tokens[0:51], tokens[50:101]], np.int32)
    for setting, row in zip(settings, rows, strict=True):
        reduction = expert_reduction.arrays(expert_reduction.per_layer(model.config, setting))
        reduction = jax.tree.map(lambda part: jnp.repeat(part, 2, axis=1), reduction)
        logits, _ = mla_jax.apply(
            model.params, windows[:, :-1], None, model.config, model.run, reduction=reduction
        )
        chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), windows[:, 1:, None], axis=-1)
        assert row.perplexity == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
    assert len({row.perplexity for row in rows}) == 3
    with pytest.raises(ValueError, match="the text must have more than 101 tokens, got 101"):
        ser_sweep.sweep(model, tokens, settings, window=101)
    model.config = dataclasses.replace(model.config, moe=None, num_dense_layers=3)
    with pytest.raises(ValueError, match="must be given a model with experts"):
        ser_sweep.sweep(model, tokens, settings)


@pytest.fixture
def run(path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "use_compilation_cache", lambda folder: None)

    def run(*args):
        code = main(["ser-sweep", path, "-c", "64", "--window", "40", "--predict", "2", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_prints_and_writes(run, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib (extra `notebooks`) is not installed")
    matplotlib.use("agg")
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(ser_sweep, "grid", lambda num_used: [(1, 0.0), (1, 1.0), (1, 0.4)])
    code, out, err = run("--text", str(tmp_path / "text"), "--tokens", "80", "--out", str(tmp_path))
    assert code == 0 and "speed: round 3 of 3" in err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["Kmin,t", "off", "1,1", "1,0.4"]
    record = json.loads((tmp_path / "ser-sweep.json").read_text())
    assert record["tokens"] == 80 and [row["kept"] for row in record["rows"]][:2] == [3.0, 1.0]
    assert f"{record['rows'][2]['perplexity']:.4f}" == lines[3].split()[1]
    assert (tmp_path / "ser-sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input_is_one_sentence(run, tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"ab\xff")
    for args, sentence in [
        (["-ser", "2,1"], "-ser must not be given: ser-sweep tries settings of its own."),
        (["--out", "/nowhere"], "--out must be a folder that exists, got '/nowhere'."),
        (["--text", str(tmp_path / "text")], f"{tmp_path}/text must be text in UTF-8, but byte 2 is none."),
    ]:
        assert run(*args) == (2, "", f"mla-jax: {sentence}\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("--out", str(tmp_path))
    assert code == 2 and err.startswith("mla-jax: --out needs matplotlib for its plot")
