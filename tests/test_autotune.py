"""The search for tile sizes with a clock of our own, its cases against the operations, and the command."""

import dataclasses
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from gpu_target import lowered_for_gpu, needs_gpu

from mla_jax import autotune, autotune_cases, generate, presets
from mla_jax.cli import main
from mla_jax.config import RunConfig
from pallas_kernels import dispatch, tuning

KIND = "NVIDIA Test"
OPS = ("flash_mla_decode", "flash_mla_prefill", "latent_append", "grouped_matmul")


@dataclasses.dataclass(frozen=True)
class _Config:
    rows: int = 16
    warps: int = 4
    is_early: bool = False


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch):
    monkeypatch.setattr(autotune_cases, "_COLD_BYTES", 0)


@pytest.fixture
def run(capsys):
    """Returns a function that runs the command: (exit code, stdout, stderr)."""

    def run(*args):
        code = main(["autotune", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def _cases(implementation="interpret", cache_type="q8_0", moe=presets.PACKAGED.moe):
    """Cases of the packaged model, but of another type and less wide."""
    mla = dataclasses.replace(
        presets.PACKAGED.mla, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
    )
    config = dataclasses.replace(presets.PACKAGED, embed_dim=64, dense_hidden_dim=128, mla=mla, moe=moe)
    weights = {name: (shape, "q8_0") for name, shape in autotune_cases.expected_shapes(config, ()).items()}
    run = RunConfig(cache_type=cache_type)
    return autotune_cases.cases(config, weights, run, ctx_size=256, ubatch=32, implementation=implementation)


def _case(seconds_of, choices):
    """A case that takes as long as `seconds_of` says of the Config; `_clock` reads it."""

    def step(config, carried, kept):
        return (carried[0] + seconds_of(config),)

    operands = lambda: ((jnp.float32(0),), ())
    return autotune_cases.Case("op", dict(tokens=3, rows=5), _Config(), choices, operands, step)


def _clock(function):
    return float(function()[0])


def _tune(case, **settings):
    lines = []
    results = autotune.tune([case], report=lines.append, timer=_clock, rounds=2, **settings)
    assert len(lines) == 1
    return results, lines[0]


def test_the_fastest_value_of_each_field_is_found():
    cost = lambda c: abs(c.rows - 64) + (8 if c.warps == 4 else 1) + (0 if c.is_early else 2) + 1.0
    choices = dict(rows=(16, 32, 64, 128), warps=(2, 4, 8), is_early=(False, True))
    (result,), line = _tune(_case(cost, choices))
    assert result.config == _Config(rows=64, warps=2, is_early=True)
    assert (result.seconds, result.heuristic_seconds, result.gain) == (2, 59, 29.5)
    assert line == "[1/1] op rows=5 tokens=4: 2000000.0 us, 29.50 times as fast as the heuristic"


def test_a_gain_within_the_noise_is_none():
    (result,), _ = _tune(_case(lambda c: 0.99 if c.rows == 32 else 1.0, dict(rows=(16, 32))))
    assert result.config == result.case.heuristic and result.gain == 1


def test_each_config_is_measured_once():
    seen = []

    def cost(config):
        seen.append(config)
        return 1.0

    _tune(_case(cost, dict(rows=(16, 32, 16), warps=(4, 8))))
    assert len(seen) == len(set(seen)) == 3


@pytest.mark.parametrize("error", [ValueError, NotImplementedError, jax.errors.JaxRuntimeError])
def test_a_config_that_does_not_run_is_passed_over(error):
    def cost(config):
        if config.rows != 32:
            raise error("too many rows")
        return 3.0

    (result,), line = _tune(_case(cost, dict(rows=(16, 32, 64))))
    assert result.config.rows == 32 and line.endswith("which does run, unlike the heuristic")
    results, line = _tune(_case(cost, dict(rows=(16, 64))))
    assert results == [] and line.endswith("no configuration runs on this device")


def test_the_clock_compiles_first_and_takes_the_median(monkeypatch):
    times = itertools.chain.from_iterable((10.0 * i, 10.0 * i + t) for i, t in enumerate((5, 1, 9, 2, 3)))
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: next(times))
    calls = []
    assert autotune._seconds(lambda: calls.append(None)) == 3
    assert len(calls) == 6


@functools.cache
def _names():
    return [(case.op, case.key) for case in _cases()]


def test_cases_are_those_of_the_model():
    assert {op for op, _ in _names()} == set(OPS)
    assert len(_names()) == len(set(_names()))
    keys = [key for op, key in _names() if op == "grouped_matmul"]
    assert "columns=64 format=q8_0 rows=128 tokens=32 weights=2" in keys  # the dense layer, of a prompt
    assert "columns=96 format=q8_0 rows=64 tokens=1 weights=1" in keys  # an expert, of one token
    assert "columns=64 format=q8_0 rows=4096 tokens=1 weights=1" in keys  # the vocabulary
    assert "columns=64 format=q8_0 rows=4096 tokens=32 weights=1" not in keys
    assert not any("rows=16 " in key for key in keys)  # the router


@pytest.mark.parametrize("index", range(len(_names())), ids=lambda index: " ".join(_names()[index]))
def test_an_operation_finds_what_its_case_was_measured_as(index, tmp_path, monkeypatch):
    """The keys of cases are those that operations look up, and the Config without them is the heuristic."""
    found = []

    def measured(cls, op, **sizes):
        found.append((op, tuning.key(**sizes)))

    monkeypatch.setattr(tuning, "measured", measured)
    launch, configs = dispatch.launch, []

    def launching(*args, config, **kwargs):
        configs.append(config)
        return launch(*args, config=config, **kwargs)

    monkeypatch.setattr(dispatch, "launch", launching)
    jax.clear_caches()
    case = _cases()[index]
    carried, kept = jax.eval_shape(case.operands)
    after = jax.eval_shape(functools.partial(case.step, None), carried, kept)
    assert found == [(case.op, case.key)] and len(configs) == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), carried
    )
    given = dataclasses.replace(case.heuristic, num_warps=16)
    jax.eval_shape(functools.partial(case.step, given), carried, kept)
    assert configs[0].num_warps == case.heuristic.num_warps and configs[1].num_warps == 16
    assert len(found) == 1


@pytest.mark.parametrize("op", OPS)
def test_the_loop_that_is_timed_lowers_for_a_gpu(op):
    case = next(case for case in _cases("triton") if case.op == op)

    def calls(carried, kept):
        return jax.lax.fori_loop(0, 2, lambda _, carried: case.step(case.heuristic, carried, kept), carried)

    assert "__gpu$xla.gpu.triton" in lowered_for_gpu(calls, *jax.eval_shape(case.operands))


def test_a_case_is_measured_in_interpret_mode():
    case = next(case for case in _cases() if case.op == "latent_append")
    ticks = itertools.count(5, -1)

    def timer(function):
        jax.block_until_ready(function())
        return float(next(ticks))

    (result,) = autotune.tune([case], report=lambda line: None, timer=timer, rounds=1)
    assert (result.seconds, result.heuristic_seconds) == (2, 5)
    assert result.config.num_warps == 8


def test_a_file_and_a_preset_give_their_weights():
    config, weights = autotune_cases.weights_of("deepseek-v2-lite", "q4_K")
    assert config is presets.PRESETS["deepseek-v2-lite"]
    assert weights["blk.1.ffn_gate_exps.weight"] == ((64, 1408, 2048), "q4_K")
    config, weights = autotune_cases.weights_of(generate.PACKAGED_MODEL, "q4_K")
    assert config.mla == presets.PACKAGED.mla
    assert weights["blk.1.ffn_gate_exps.weight"] == ((16, 96, 256), "q8_0")


def test_rows_that_are_no_whole_blocks_have_no_case():
    config, weights = autotune_cases.weights_of("deepseek-v2-lite", "q4_K")
    cases = autotune_cases.cases(config, weights, RunConfig(), ctx_size=1024, ubatch=32)
    columns = {case.sizes["columns"] for case in cases if case.op == "grouped_matmul"}
    assert columns == {2048, 2816}  # 1408 and 10944 are no multiples of 256


def test_gate_and_up_of_two_formats_are_products_of_their_own():
    shape = (128, 256)
    weights = {"blk.0.ffn_gate.weight": (shape, "q8_0"), "blk.0.ffn_up.weight": (shape, "q4_0")}
    assert [weight[1:] for weight in autotune_cases._products(weights)] == [
        (128, 256, "q8_0", 1),
        (128, 256, "q4_0", 1),
    ]
    weights = {"blk.1.ffn_gate_up_exps.weight": ((4, 256, 256), "q8_0")}
    assert list(autotune_cases._products(weights)) == [("ffn_gate_up_exps", 128, 256, "q8_0", 2)]


def test_the_command_needs_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "device_kind", lambda: None)
    code, out, err = run("deepseek-v2-lite", "--out", tmp_path / "tuned")
    assert (code, out) == (2, "")
    assert err == "mla-jax: autotune must run on an NVIDIA GPU that JAX can use, got cpu.\n"
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--type", "q3"], "--type must be one of q8_0, q4_0, "),
        (["--out", __file__], "--out must be a folder, got "),
        (["absent.gguf"], "absent.gguf"),
    ],
)
def test_what_the_command_cannot_use_is_told(run, monkeypatch, args, sentence):
    monkeypatch.setattr(tuning, "device_kind", lambda: KIND)
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith(f"mla-jax: {sentence}") and err.count("\n") == 1


def test_the_command_writes_what_it_prints(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "device_kind", lambda: KIND)
    monkeypatch.setattr(autotune, "_seconds", lambda function: 2.0)
    asked = []

    def cases(*args, **settings):
        asked.append(settings)
        return [_case(lambda config: 1.0, {})]

    monkeypatch.setattr(autotune_cases, "cases", cases)
    folder = tmp_path / "new" / "tuned"
    code, out, err = run("deepseek-v2-lite", "-c", "4096", "-ub", "128", "--out", folder)
    assert code == 0
    assert asked == [dict(ctx_size=4096, ubatch=128)]
    path = folder / "nvidia-test.json"
    assert json.loads(path.read_text()) == {"op": {"rows=5 tokens=4": vars(_Config())}}
    assert re.search(r"op +rows=5 tokens=4 +100000\.0 +100000\.0 +1\.00 +as it was\n", out)
    assert err.startswith("[1/1] op rows=5 tokens=4: ") and err.endswith(f"wrote {path}\n")


def test_the_command_says_if_nothing_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "device_kind", lambda: KIND)
    monkeypatch.setattr(autotune, "tune", lambda cases, report: [])
    code, _, err = run("deepseek-v2-lite", "--out", tmp_path)
    assert (code, err) == (
        2,
        f"mla-jax: no kernel runs on this GPU, {KIND}: the kernels need Ampere or newer.\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@needs_gpu
def test_all_operations_are_measured_on_a_gpu(tmp_path):
    results = autotune.tune(_cases("triton"), report=print, rounds=2)
    assert {result.case.op for result in results} == set(OPS)
    assert autotune.write(tmp_path, tuning.device_kind(), results).exists()
