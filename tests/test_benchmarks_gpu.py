"""The GPU benchmark at sizes of a CPU: what it times, what its peers compute, how it judges and ends."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from jax.experimental import pallas as pl

from benchmarks import abstract_gpu, gpu_cases, gpu_measure, gpu_peers
from benchmarks.gpu_cases import CUDNN, EXPANDED, OURS, REFERENCE, Bar, Case, Way
from checkpoints_tools.gguf_file import open_gguf

SCRIPT = pathlib.Path(gpu_cases.__file__).with_name("gpu.py")
CEILINGS = gpu_measure.Ceilings(copy=1e9, product=1e12)
NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


def _run(*arguments):
    environment = os.environ | dict(JAX_PLATFORMS="cpu")
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_without_a_gpu_it_ends_with_a_sentence():
    done = _run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "JAX must have a GPU, got cpu alone."


def test_command(tmp_path):
    out = tmp_path / "gpu.json"
    sizes = "--batches 2 --contexts 80 --heads 16 --cache_types q4_0 --queries 40 --tokens 1 --formats q4_K"
    model = tmp_path / "model.gguf"
    synthetic.write_deepseek2(model, weight_type="Q8_0", sizes=dict(kv_lora=64, rope=32))
    sizes += f" --whole_models {model}"
    counts = "--expert_shape 256,64,4,2 --calls 2 --repeats 3 --copy_mib 0.1 --product 64 --cold_mib 1"
    counts += " --libraries torch"
    done = _run("--implementation", "reference", *sizes.split(), *counts.split(), f"--out={out}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert (result["device"], result["jax"]) == ("cpu", jax.__version__)
    assert result["command"].endswith("--libraries torch --out=gpu.json") and result["commit"]
    assert result["copy_gb_per_second"] > 0 and result["product_tflops"] > 0
    rows = {row["part"]: row for row in result["rows"]}
    assert {part: list(row["ways"]) for part, row in rows.items()} == dict(
        prefill=[OURS, REFERENCE, CUDNN, "torch"],
        experts=[OURS, REFERENCE],
        model=[OURS],
        decode=[OURS, REFERENCE, EXPANDED],
    )
    assert "cuDNN" in rows["prefill"]["ways"][CUDNN].pop("skipped")
    by_torch = rows["prefill"]["ways"].pop("torch")
    assert len(by_torch.get("runs", ())) == 3 or "No module named 'torch'" in by_torch["skipped"]
    assert rows["experts"]["sizes"] == dict(model="256x64x4x2", tokens=1, format="q4_K", down="q8_0")
    assert rows["model"]["sizes"] == dict(model=model.name, format="file", context=80, cache="q4_0")
    assert rows["model"]["bytes"] == 32 * (_bytes_of_a_token(model) + 80 * 3 * (64 + 32) * 18 / 32)
    for row in rows.values():
        for way in filter(None, row["ways"].values()):
            assert len(way["runs"]) == 3 and way["seconds"] == sorted(way["runs"])[1]
    assert len(done.stdout.splitlines()) == 2 + 10 + 1


def _bytes_of_a_token(path):
    """Returns those of the weights that one token is multiplied with: its experts, and no embedding."""
    file = open_gguf(path)
    sizes = {name: info.num_bytes for name, info in file.tensors.items()}
    used, count = (file.metadata[f"deepseek2.expert_{word}count"] for word in ("used_", ""))
    share = lambda name: used / count if "_exps." in name else name != "token_embd.weight"
    return sum(size * share(name) for name, size in sizes.items())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--parts", "decode,train"], "--parts must be of decode, prefill, experts, model, got 'train'."),
        (["--libraries", "numpy"], "--libraries must be of torch, flash_mla, flashinfer, vllm, got 'numpy'."),
        (["--heads", "16,x"], "--heads must be whole numbers from 1 on, got 'x'."),
    ],
    ids=["parts", "libraries", "heads"],
)
def test_flags_that_cannot_be_are_refused(arguments, sentence):
    done = _run("--implementation", "reference", *arguments)
    assert done.returncode == 1 and sentence in done.stdout + done.stderr


# --- what is timed -----------------------------------------------------------------------------


def test_every_call_takes_the_result_of_the_one_before():
    seen = []

    def run(index, previous, operands):
        jax.debug.callback(
            lambda *numbers: seen.append(tuple(map(int, numbers))), index, previous, ordered=True
        )
        return previous + operands[0]

    way = Way(run=run, result=NUMBER)
    seconds = gpu_measure.seconds_per_call(way, (jnp.float32(3),), calls=4, repeats=2)
    jax.effects_barrier()
    assert len(seconds) == 2 and min(seconds) > 0
    assert seen == [(i, 3 * (i % 4)) for i in range(12)]


def _case(ways, bars=(), **cost):
    cost = pl.CostEstimate(**dict(flops=0, bytes_accessed=0, transcendentals=0) | cost)
    operands = lambda: (jnp.zeros((256,), jnp.float32),)
    return Case(part="decode", sizes=dict(size=1), cost=cost, operands=operands, ways=ways, bars=bars)


def _measure(case, **options):
    return gpu_measure.measure(case, CEILINGS, **dict(memory=None, calls=1, repeats=1) | options)


def _refuse(index, previous, operands):
    raise NotImplementedError("no\nsuch shape")


PLAIN = Way(run=lambda index, previous, operands: previous + operands[0][0], result=NUMBER)


@pytest.mark.parametrize(
    ("way", "memory", "reason"),
    [
        (Way(run=_refuse, result=NUMBER), None, "NotImplementedError: no"),
        (Way(run=PLAIN.run, result=NUMBER, workspace=2**30), 2**29, "needs 1 GiB of 0.5"),
    ],
    ids=["refuses", "memory"],
)
def test_a_way_that_cannot_run_is_recorded_and_the_others_run(way, memory, reason):
    bars = Bar(of="peer", least=1.0), Bar(of="TFLOP/s", least=0.0)
    row = _measure(_case({OURS: PLAIN, "peer": way}, bars, flops=10), memory=memory)
    assert row["ways"]["peer"] == dict(skipped=reason)
    assert [bar["met"] for bar in row["bars"]] == [None, True]
    first, second = gpu_measure.lines(row)
    assert first.endswith("ahead of peer: not known; TFLOP/s >= 0: met") and second.endswith(reason)


def test_operands_count_as_memory():
    row = _measure(_case({OURS: PLAIN}), memory=1024 + 2 * 4 - 1)
    assert "skipped" in row["ways"][OURS]
    assert "seconds" in _measure(_case({OURS: PLAIN}), memory=1024 + 2 * 4)["ways"][OURS]


def test_peers_can_be_left_out():
    assert list(_measure(_case({OURS: PLAIN, "peer": PLAIN}), has_peers=False)["ways"]) == [OURS]


def test_figures_are_those_of_the_cost_and_of_the_binding_ceiling(monkeypatch):
    times = iter([[0.003, 0.002, 0.009], [0.004] * 3])
    monkeypatch.setattr(gpu_measure, "seconds_per_call", lambda *args, **settings: next(times))
    bars = [("copy", 1 / 3 + 0.01), ("copy", 1 / 3 - 0.01), ("TFLOP/s", 1.0), ("peer", 1.3), ("peer", 1.4)]
    case = _case(
        {OURS: PLAIN, "peer": PLAIN}, [Bar(of=of, least=least) for of, least in bars], bytes_accessed=10**6
    )
    row = _measure(case)
    figures = row["ways"][OURS]
    assert (row["binding"], row["bound_seconds"]) == ("copy", 0.001)
    assert figures["seconds"] == 0.003 and figures["share"] == pytest.approx(1 / 3)
    assert figures["gb_per_second"] == pytest.approx(1 / 3) and figures["tflops"] == 0
    assert [bar["met"] for bar in row["bars"]] == [False, True, False, True, False]
    assert [bar["got"] for bar in row["bars"]] == pytest.approx([1 / 3, 1 / 3, 0, 4 / 3, 4 / 3])
    assert next(gpu_measure.lines(row)).endswith("met; ahead of peer: not met")
    assert "1.33 times" in list(gpu_measure.lines(row))[1]


def test_bound_is_that_of_the_slower_ceiling():
    cost = lambda flops, size: pl.CostEstimate(flops=flops, bytes_accessed=size, transcendentals=0)
    assert CEILINGS.bound(cost(10**12, 10**6)) == (1.0, "product")
    assert CEILINGS.bound(cost(10**6, 10**9)) == (1.0, "copy")


# --- cases -------------------------------------------------------------------------------------


def _results(case, index=0):
    """Returns what each way computes in a call after one that returned numbers."""
    operands = jax.jit(case.operands)()
    found = {}
    for name, way in case.ways.items():
        own = way.prepare(operands)
        previous = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), way.result)
        previous = way.first(own) if way.first else previous
        found[name] = jax.jit(way.run)(jnp.int32(index), previous, own)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (found[name], way.result))
        assert shapes[0] == shapes[1], name
    return found


@pytest.mark.parametrize("name", ["bf16", "q4_0"])
def test_ways_of_decode_agree(name):
    (case,) = gpu_cases.decode_cases([2], [70], [16], [name], implementation="interpret", cold_bytes=10**6)
    first, second = (_results(case, index) for index in (0, 1))
    for found in first, second:
        wanted = np.asarray(found[REFERENCE], np.float32)
        for way in OURS, EXPANDED:
            assert np.abs(np.asarray(found[way], np.float32) - wanted).max() < 0.02 * np.abs(wanted).max()
    assert (first[OURS] != second[OURS]).any()  # other pages


def test_ways_of_prefill_agree(monkeypatch):
    attend = jax.nn.dot_product_attention
    by_xla = lambda *args, implementation, **settings: attend(*args, **settings, implementation="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    (case,) = gpu_cases.prefill_cases([24], [2], implementation="reference")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = _results(case)
    wanted = np.asarray(found[OURS][0], np.float32)
    by_peer = np.asarray(found[CUDNN], np.float32)
    assert np.abs(by_peer[..., : gpu_cases.VALUE] - wanted).max() < 0.02 * np.abs(wanted).max()
    assert (by_peer[..., gpu_cases.VALUE :] == 0).all()


@pytest.mark.parametrize("tokens", [1, 6])
def test_ways_of_experts_agree(tokens):
    shape = dict(tiny=(128, 64, 5, 2))
    (case,) = gpu_cases.expert_cases(shape, [tokens], ["q8_0"], implementation="interpret")
    found = _results(case)
    wanted = np.asarray(found[REFERENCE])
    assert np.isfinite(wanted).all() and wanted.any()
    assert np.abs(np.asarray(found[OURS]) - wanted).max() < 0.01 * np.abs(wanted).max()


def test_calls_of_decode_read_other_pages_and_other_experts():
    (case,) = gpu_cases.decode_cases([2], [70], [16], ["q4_0"], implementation="reference", cold_bytes=10**6)
    *_, tables, _ = jax.jit(case.operands)()
    assert len(np.unique(tables)) == tables.size and tables.shape[0] * case.cost.bytes_accessed >= 10**6
    experts, rows, num_used = gpu_cases._tiles(1, 64, 6)
    assert experts.shape == (10, 6) and len(np.unique(experts)) == 60 and (rows, num_used) == (1, 6)


def test_tiles_of_a_prompt_hold_all_its_pairs():
    experts, rows, num_used = gpu_cases._tiles(40, 8, 2)
    assert experts.shape[1] * rows >= 80 and num_used == len(np.unique(experts)) == 8
    assert rows == 8 and ((experts >= 0) & (experts < 8)).all()


def test_bars_are_those_of_large_caches():
    sizes = [1, 128], [2048], [16, 128], ["bf16", "q8_0", "q4_0", "q6_0"]
    bars = {
        (case.sizes["batch"], case.sizes["heads"], case.sizes["cache"]): [
            (bar.of, bar.least) for bar in case.bars if bar.of not in (EXPANDED, gpu_peers.VLLM)
        ]
        for case in gpu_cases.decode_cases(*sizes, implementation="reference")
    }
    assert {sizes: found for sizes, found in bars.items() if found} == {
        (128, 16, "bf16"): [("copy", 0.75)],
        (128, 16, "q8_0"): [("copy", 0.55)],
        (128, 16, "q4_0"): [("copy", 0.40)],
        (128, 128, "bf16"): [("TFLOP/s", 300.0)],
        (128, 128, "q8_0"): [("TFLOP/s", 230.0)],
        (128, 128, "q4_0"): [("TFLOP/s", 230.0)],
        (128, 128, "q6_0"): [("TFLOP/s", 230.0)],
    }


def test_the_kernel_must_be_ahead_of_other_servers_where_they_take_the_cache():
    cases = list(gpu_cases.decode_cases([1], [2048], [16], ["bf16", "q8_0"], implementation="reference"))
    of = [[bar.of for bar in case.bars if bar.of in case.peers] for case in cases]
    assert of == [[gpu_peers.VLLM], []] and all(EXPANDED == case.bars[0].of for case in cases)


def test_a_pool_of_codes_has_a_size_that_the_kernel_can_address():
    (case,) = gpu_cases.decode_cases([128], [65536], [16], ["q8_0"], implementation="triton")
    latent = jax.eval_shape(case.operands)[2]
    assert latent[0].size > 2**32


def _compile(*arguments):
    script = SCRIPT.with_name("gpu_compile.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


@pytest.mark.skipif(abstract_gpu.has_compiler(), reason="the CUDA plugin of JAX is here")
def test_without_a_compiler_for_gpus_it_ends_with_a_sentence():
    done = _compile()
    assert (done.returncode, done.stdout) == (2, "")
    assert "jax-cuda12-plugin and jax-cuda12-pjrt must both be installed." in done.stderr


@pytest.mark.skipif(not abstract_gpu.has_compiler(), reason="needs jax-cuda12-plugin and jax-cuda12-pjrt")
def test_kernels_compile_for_gpus_that_are_not_here():
    few = "--models deepseek-v3 --cache_types q8_0,q4_0 --formats q4_K --nosteps"
    done = _compile(*few.split())
    assert done.returncode == 0, done.stdout[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["gpu"] for row in rows} == {"h200", "a100", "rtx4090"}
    limits = dict(h200=227, a100=163, rtx4090=99)
    for row in rows:
        assert row["kernels"] and "error" not in row
        assert all(0 < kernel["shared_memory"] <= limits[row["gpu"]] << 10 for kernel in row["kernels"])
