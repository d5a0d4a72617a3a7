"""Measured tile sizes: where they are looked up, what is left aside, and that the operations take them."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, flash_mla_decode, grouped_matmul, tuning, weight_tiles

KIND = "NVIDIA Test 1.5"
OP, KEY = "flash_mla_decode", "batch=1 latent_type=f16 pairs=4 rank=64 slots=64"
CONFIG = flash_mla_decode.Config(pairs=32, slots=16, splits=3, prefetch=True, num_warps=8, num_stages=1)


class _Launched(Exception):
    """Ends a trace with the Config that the kernel would have had."""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Returns the user's folder and the one that is shipped, both empty, on a machine that has a GPU."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    monkeypatch.setattr(tuning, "USER_FOLDER", str(user))
    monkeypatch.setattr(tuning, "SHIPPED_FOLDER", str(shipped))
    monkeypatch.setattr(tuning, "device_kind", lambda: KIND)
    jax.clear_caches()
    return user, shipped


@pytest.fixture
def log(monkeypatch):
    """Returns the sentences that are logged."""
    sentences = []
    monkeypatch.setattr(tuning.logging, "warning", lambda text, *args: sentences.append(text % args))
    return sentences


@pytest.fixture
def launched(monkeypatch):
    """Returns a function that returns the Config with which an operation launches its kernel."""

    def launch(*args, config, **kwargs):
        raise _Launched(config)

    def config_of(function):
        with pytest.raises(_Launched) as caught:
            function()
        return caught.value.args[0]

    monkeypatch.setattr(dispatch, "launch", launch)
    return config_of


def _attend(**settings):
    rng, none = np.random.default_rng(0), jnp.zeros((0,), jnp.uint8)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    pool = lambda size: (draw(2, 32, size).astype(jnp.float16), none, none, none)
    pages, positions = jnp.asarray([[1, 0]], jnp.int32), jnp.asarray([[40]], jnp.int32)
    operands = draw(1, 1, 3, 64), draw(1, 1, 3, 32), pool(64), pool(32), pages, positions
    kinds = dict(latent_type="f16", rope_type="f16", sm_scale=0.1)
    return flash_mla_decode.flash_mla_decode(*operands, **kinds, **settings)


def _multiply(**settings):
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.standard_normal((2, 48, 64)), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.float32)
    experts = jnp.asarray([1, 0], jnp.int32)
    planes = weight_tiles.repack(weight, None, "bf16")
    return grouped_matmul.grouped_matmul(x, planes, experts, format="bf16", **settings)


def _write_text(folder, text):
    path = tuning.file_of(folder, KIND)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_keys_round_up_what_varies_and_nothing_else():
    assert tuning.key(tokens=5, rows=48, format="q4_K") == "format=q4_K rows=48 tokens=8"
    assert tuning.key(batch=1, slots=4096, pairs=20, rank=500) == "batch=1 pairs=32 rank=500 slots=4096"
    assert tuning.key(batch=3, heads=128) == tuning.key(heads=65, batch=4)


def test_a_file_is_named_after_the_kind_of_device(tmp_path):
    assert tuning.file_of(tmp_path, "NVIDIA H200") == tmp_path / "nvidia-h200.json"
    assert tuning.file_of(tmp_path, "../Tesla/V100 (32GB)") == tmp_path / "tesla-v100-32gb.json"
    assert tuning.file_of("~/x", "A").is_absolute()


def test_nothing_is_looked_up_without_a_gpu(monkeypatch):
    monkeypatch.setattr(tuning, "lookup", lambda *args, **kwargs: pytest.fail("a lookup"))
    assert tuning.measured(flash_mla_decode.Config, OP, batch=1) is None


def test_the_user_comes_first(folders):
    user, shipped = folders
    tuning.write(shipped, KIND, {OP: {"a": {"slots": 16}, "b": {"slots": 64}}})
    tuning.write(user, KIND, {OP: {"a": {"slots": 32}}})
    assert tuning.lookup(OP, "a", kind=KIND) == {"slots": 32}
    assert tuning.lookup(OP, "b", kind=KIND) == {"slots": 64}
    assert tuning.lookup(OP, "a", kind=KIND, folder=shipped) == {"slots": 16}
    assert tuning.lookup(OP, "c", kind=KIND) is None
    assert tuning.lookup("other", "a", kind=KIND) is None
    assert tuning.lookup(OP, "a", kind="NVIDIA Test 2") is None


def test_a_file_is_read_once(folders):
    assert tuning.lookup(OP, "a", kind=KIND) is None
    tuning.write(folders[0], KIND, {OP: {"a": {"slots": 16}}})
    assert tuning.lookup(OP, "a", kind=KIND) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"x": 1}', '{"x": {"y": [1]}}', "[" * 100000, '{"x": {"y": null}}', b"\xff\xfe"],
    ids=["empty", "cut", "list", "number", "no-fields", "deep", "null", "no-text"],
)
def test_a_file_that_is_none_is_left_aside(folders, log, text):
    path = tuning.file_of(folders[0], KIND)
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tuning.write(folders[1], KIND, {OP: {KEY: {"slots": 16}}})
    for _ in range(2):
        assert tuning.lookup(OP, KEY, kind=KIND) == {"slots": 16}
    assert len(log) == 1 and log[0].startswith(f"{path} is left aside: ") and log[0].count("\n") == 0


def test_a_folder_in_place_of_the_file_is_left_aside(folders, log):
    tuning.file_of(folders[0], KIND).mkdir(parents=True)
    assert tuning.lookup(OP, KEY, kind=KIND) is None
    assert len(log) == 1


@pytest.mark.parametrize(
    ("fields", "config", "sentence"),
    [
        ({"slots": 16, "cluster": 2}, flash_mla_decode.Config(slots=16), "ignored: cluster."),
        ({"slots": "16"}, None, "slots cannot be '16'."),
        ({"slots": 0}, None, "slots cannot be 0."),
        ({"slots": 24}, None, "slots cannot be 24."),
        ({"slots": True}, None, "slots cannot be True."),
        ({"slots": 1 << 17}, None, "slots cannot be 131072."),
        ({"prefetch": 1}, None, "prefetch cannot be 1."),
        ({"splits": 3, "num_stages": 3}, flash_mla_decode.Config(splits=3, num_stages=3), None),
        ({}, flash_mla_decode.Config(), None),
    ],
)
def test_fields_are_checked(folders, log, fields, config, sentence):
    tuning.write(folders[0], KIND, {OP: {"batch=1": fields}})
    for _ in range(2):
        assert tuning.measured(flash_mla_decode.Config, OP, batch=1) == config
    assert len(log) == (sentence is not None)
    assert sentence is None or log[0].endswith(sentence)


def test_writing_adds_to_what_is_there(folders):
    path = tuning.write(folders[0], KIND, {OP: {"a": {"slots": 16}, "b": {"slots": 16}}})
    assert path == tuning.write(folders[0], KIND, {OP: {"b": {"slots": 32}}, "other": {"c": {}}})
    assert json.loads(path.read_text()) == {
        OP: {"a": {"slots": 16}, "b": {"slots": 32}},
        "other": {"c": {}},
    }


def test_a_write_that_fails_leaves_the_file_as_it_was(folders, monkeypatch):
    path = tuning.write(folders[0], KIND, {OP: {"a": {"slots": 16}}})
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space"):
                tuning.write(folders[0], KIND, {OP: {"a": {"slots": 32}}})
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


def test_an_operation_takes_what_was_measured(folders, launched):
    tuning.write(folders[0], KIND, {OP: {KEY: vars(CONFIG)}})
    assert launched(functools.partial(_attend, implementation="interpret")) == CONFIG


def test_an_operation_takes_the_heuristic_if_nothing_was_measured(folders, launched):
    heuristic = flash_mla_decode.Config.for_shapes(
        batch=1, pairs=3, slots=64, latent_type="f16", shared_memory=dispatch.shared_memory()
    )
    assert heuristic != CONFIG
    assert launched(functools.partial(_attend, implementation="interpret")) == heuristic


def test_an_operation_takes_what_it_is_given_before_what_was_measured(folders, launched):
    tuning.write(folders[0], KIND, {OP: {KEY: vars(CONFIG)}})
    given = flash_mla_decode.Config(slots=16, num_stages=4)
    assert launched(functools.partial(_attend, implementation="interpret", config=given)) == given


def test_what_was_measured_changes_no_result(folders):
    key = "columns=64 format=bf16 rows=48 tokens=8 weights=1"
    fields = dict(tokens=16, rows=16, words=16, num_warps=8, num_stages=1)
    ops = (_attend, _multiply)
    before = [op(implementation="interpret") for op in ops]
    tuning._config.cache_clear()
    tuning._read.cache_clear()
    tuning.write(folders[0], KIND, {OP: {KEY: vars(CONFIG)}, "grouped_matmul": {key: fields}})
    jax.clear_caches()
    for op, expected in zip(ops, before, strict=True):
        np.testing.assert_allclose(op(implementation="interpret"), expected, rtol=2e-3, atol=2e-3)


def test_a_broken_file_does_not_end_a_trace(folders, log):
    _write_text(folders[0], "{")
    assert np.all(np.isfinite(_attend(implementation="interpret")))
    assert len(log) == 1


@pytest.mark.parametrize(
    ("home", "wanted"), [(None, "~/.cache"), ("", "~/.cache"), ("relative", "~/.cache"), ("/a/b", "/a/b")]
)
def test_caches_are_where_the_user_keeps_them(monkeypatch, home, wanted):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert tuning.cache_home() == wanted


def test_all_that_is_kept_is_there(tmp_path):
    script = "from mla_jax import steps; from pallas_kernels import tuning\n"
    script += "print(steps.COMPILATION_CACHE, tuning.USER_FOLDER)"
    environment = os.environ | dict(XDG_CACHE_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [f"{tmp_path}/mla_jax/xla", f"{tmp_path}/mla_jax/tuning"], done.stderr
