"""The commands that measure: what they print in whose form, what they keep, and what they refuse."""

import csv
import io
import json
import re
import struct

import jax
import numpy as np
import pytest
from synthetic import write_deepseek2

import mla_jax
from benchmarks import sweep_bench
from mla_jax import corpus, divergence, generate, perplexity, steps
from mla_jax.cli import app, measure_tables
from mla_jax.perplexity import Network

TEXT = "The latent of a token is small, and the cache with it. " * 12
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2, experts=4, used=2)
    return path


@pytest.fixture(scope="module")
def model(path):
    return mla_jax.load(path, compilation_cache=None)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    return tmp_path / "text"


@pytest.fixture(autouse=True)
def no_files_elsewhere(monkeypatch):
    monkeypatch.setattr(steps, "use_compilation_cache", lambda folder: None)


@pytest.fixture
def folder(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib (extra `notebooks`) is not installed")
    matplotlib.use("agg")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_perplexity_prints_as_llama_cpp_does(run, path, model, text):
    code, out, err = run("perplexity", path, "-f", text, "-c", "40", "-b", "80", "--chunks", "5")
    found = perplexity.measure(model, perplexity.windows_of(model, TEXT, 40, limit=5), batch=2)
    running, last = out.splitlines()
    assert code == 0 and running == "".join(f"[{i + 1}]{value:.4f}," for i, value in enumerate(found.running))
    assert last == "Final estimate: PPL = {:.4f} +/- {:.5f}".format(*found.estimate)
    assert "5 windows of 40 tokens, 2 at a time\n" in err and re.search(r"s a window, \d+ s to go", err)


def test_perplexity_reads_held_out_sources_unless_told(run, path, model, monkeypatch):
    documents = corpus.Corpus(train=(), held_out=("import os\n", "import sys\n" * 30))
    monkeypatch.setattr(corpus, "standard_library", lambda: documents)
    code, out, _ = run("perplexity", path, "-c", "40", "-b", "80")
    windows = perplexity.windows_of(model, "import os\n" + "import sys\n" * 30, 40)
    found = perplexity.measure(model, windows, batch=2)
    value = float(out.splitlines()[-1].split()[4])
    assert code == 0 and value == pytest.approx(found.estimate.value, rel=1e-4)


def test_perplexity_keeps_what_it_found(run, path, text, folder):
    options = ["-f", text, "-c", "40", "-b", "80", "-ser", "1,1"]
    code, out, _ = run("perplexity", path, *options, "--out", folder)
    record = json.loads((folder / "perplexity.json").read_text())
    assert code == 0 and f"PPL = {record['perplexity']:.4f} +/- {record['error']:.5f}" in out
    assert (record["window"], record["tokens"]) == (40, 19 * record["windows"])
    assert record["expert_reduction"] == "off 1,1" and record["type_k"] == "f16"
    rows = list(csv.DictReader(io.StringIO((folder / "perplexity.csv").read_text())))
    assert len(rows) == record["windows"] and float(rows[-1]["running"]) == pytest.approx(
        record["perplexity"]
    )
    assert sorted(file.name for file in folder.iterdir()) == [
        f"perplexity.{e}" for e in ("csv", "json", "png")
    ]
    assert (folder / "perplexity.png").read_bytes()[:4] == PNG


def _figures(out):
    """Returns the numbers of each line of the statistics, by the words before the colon."""
    lines = [line.partition(":") for line in out.splitlines() if ":" in line]
    return {name.strip(): [float(x) for x in re.findall(r"-?\d+\.\d+", rest)] for name, _, rest in lines}


def test_a_distance_to_a_base_in_a_file_or_beside_it(run, path, model, text, tmp_path, folder):
    """Both say what the library says, in the table that llama.cpp prints."""
    base = tmp_path / "base.kld"
    options = ["perplexity", path, "-f", text, "-c", "40", "-b", "80"]
    code, out, _ = run(*options, "-ctk", "f32", "--kl-divergence-base", base)
    assert code == 0 and out.splitlines()[-1].startswith("Final estimate: PPL = ")
    options += ["-ctk", "fp8_e4m3"]
    saved = run(
        "perplexity", path, "-b", "80", "-ctk", "fp8_e4m3", "--kl-divergence", "--kl-divergence-base", base
    )
    live = run(*options, "--kl-divergence", "--against", "-ctk f32", "--out", folder)
    assert saved[0] == live[0] == 0
    windows = perplexity.windows_of(model, TEXT, 40)
    networks = (Network.of(model, cache_type=kind) for kind in ("f32", "fp8_e4m3"))
    found = divergence.measure(*networks, windows, batch=2)
    for _, out, _ in (saved, live):
        lines, figures = out.splitlines(), _figures(out)
        assert lines[0].split()[:2] == ["chunk", "PPL"]
        assert [line.split()[0] for line in lines[1 : len(windows) + 1]] == [
            str(i + 1) for i in range(len(windows))
        ]
        assert figures["Mean    KLD"] == pytest.approx(list(found.mean_kl), abs=2e-6)
        assert figures["Mean PPL(Q)"][0] == pytest.approx(found.perplexity.estimate.value, rel=1e-4)
        assert figures["Mean PPL(Q)/PPL(base)"] == pytest.approx(list(found.ratio), abs=1e-4)
        assert figures["Same top p"][0] == pytest.approx(100 * found.top1.value, abs=1e-3)
        assert figures["RMS Δp"][0] == pytest.approx(100 * found.rms_delta_p.value, abs=2e-3)
        assert figures["99.0%   KLD"][0] <= figures["99.9%   KLD"][0] <= figures["Maximum KLD"][0]
        assert figures["1.0%   Δp"][0] <= figures["Median  Δp"][0] <= figures["99.0%   Δp"][0]
        row = re.findall(r"-?\d+\.\d+", lines[len(windows)])
        assert float(row[4]) == pytest.approx(found.mean_kl.value, abs=1e-5)
    record = json.loads((folder / "perplexity.json").read_text())
    assert record["kl"] == pytest.approx(found.mean_kl.value, abs=1e-6)
    assert record["base"] == "nano.gguf -ctk f32"
    assert (
        record["kl_percentiles"]["50"] < record["kl_percentiles"]["99.9"] <= record["kl_percentiles"]["max"]
    )
    rows = list(csv.DictReader(io.StringIO((folder / "perplexity.csv").read_text())))
    assert float(rows[3]["kl"]) == pytest.approx(found.kl[3].mean(), abs=1e-5)
    assert (folder / "perplexity.png").read_bytes()[:4] == PNG


def test_a_base_has_the_flags_of_the_command_but_for_its_own(run, path, text, tmp_path, folder):
    """Of another file, whose weights are other ones; and of this one with nothing changed."""
    write_deepseek2(tmp_path / "other.gguf", layers=2, experts=4, used=2, seed=1)
    options = ["perplexity", path, "-f", text, "-c", "40", "-b", "80", "--chunks", "2"]
    options += ["-ctk", "fp8_e4m3", "-ser", "1,1"]
    code, out, _ = run(*options, "--against", "", "--out", folder)
    assert json.loads((folder / "perplexity.json").read_text())["base"] == "nano.gguf"
    assert code == 0 and _figures(out)["Mean    KLD"] == pytest.approx([0, 0], abs=1e-6)
    code, out, err = run(*options, "--against", f"-m {tmp_path / 'other.gguf'}")
    assert code == 0 and _figures(out)["Mean    KLD"][0] > 0.01
    assert err.count("cache: 96 bytes a token") == 2  # in 8 bits both
    code, out, _ = run(*options, "--against", "-ser 1,0")
    assert code == 0 and _figures(out)["Mean    KLD"][0] > 1e-5


def test_a_single_token_has_no_correlation(run, path, text, folder):
    """Nor is there a number for it in JSON."""
    options = ["-f", text, "-c", "3", "--chunks", "1", "--kl-divergence", "--against", "-ctk fp8_e4m3"]
    code, out, _ = run("perplexity", path, *options, "--out", folder)
    assert code == 0 and "Cor(ln(PPL(Q)), ln(PPL(base))): undefined\n" in out
    refused = lambda name: pytest.fail(f"{name} is no JSON")
    record = json.loads((folder / "perplexity.json").read_text(), parse_constant=refused)
    assert record["correlation"] is None and record["tokens"] == 1


def test_what_is_infinite_is_null_in_a_record():
    found = perplexity.Perplexity(window=5, nats=np.array([[800.0, 900.0]], np.float32))
    record = measure_tables.perplexity_record(found)
    assert (record["perplexity"], record["error"]) == (None, None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        measure_tables.json_lines([dict(perplexity=found.estimate.value)])


def test_line_ends_are_part_of_a_text(run, path, model, tmp_path):
    (tmp_path / "text").write_bytes(TEXT.replace(". ", ".\r\n").encode())
    code, out, _ = run("perplexity", path, "-f", tmp_path / "text", "-c", "40", "-b", "80", "--chunks", "2")
    windows = perplexity.windows_of(model, TEXT.replace(". ", ".\r\n"), 40, limit=2)
    wanted = perplexity.measure(model, windows, batch=2).estimate
    assert code == 0 and out.endswith(f"PPL = {wanted.value:.4f} +/- {wanted.error:.5f}\n")


def test_sweep_bench_prints_the_table_that_is_read(run, path, folder):
    options = ["sweep-bench", path, "-c", "100", "-ub", "32", "-n", "3"]
    code, out, err = run(*options, "--out", folder)
    lines = out.splitlines()
    assert code == 0 and lines[0] == (
        "|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |"
    )
    assert lines[1] == "|-------|--------|--------|----------|----------|----------|----------|"
    assert {len(line) for line in lines[2:]} == {len(lines[0])}
    assert list(sweep_bench.parse(out + err, 3)) == [0, 32, 64]
    records = [json.loads(line) for line in (folder / "sweep-bench.jsonl").read_text().splitlines()]
    assert [record["n_kv"] for record in records] == [0, 32, 64]
    assert sweep_bench.parse(out, 3)[32][0] == pytest.approx(records[1]["speed_pp"], abs=0.01)
    assert len(list(csv.DictReader(io.StringIO((folder / "sweep-bench.csv").read_text())))) == 3
    assert (folder / "sweep-bench.png").read_bytes()[:4] == PNG


def test_sweep_bench_prints_lines_of_json(run, path):
    code, out, _ = run("sweep-bench", path, "-c", "100", "-ub", "32", "--output-format", "jsonl")
    keys = "n_kv_max n_batch n_ubatch flash_attn n_gpu_layers n_threads n_threads_batch "
    keys += "pp tg n_kv t_pp speed_pp t_tg speed_tg"
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [list(record) for record in records] == [keys.split()] * 3
    assert (records[0]["pp"], records[0]["tg"], records[0]["n_kv_max"]) == (32, 8, 100)


def test_bench_prints_in_four_forms(run, path, tmp_path):
    options = ["bench", path, "-ub", "32", "-p", "80,8", "-n", "4", "-d", "0,20", "-r", "2", "-o"]
    names = ["pp80", "pp8", "tg4", "pp80 @ d20", "pp8 @ d20", "tg4 @ d20"]
    (tmp_path / "out").mkdir()
    code, table, err = run(*options, "md", "--out", tmp_path / "out")
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert code == 0 and head == "model,size,params,backend,threads,type_k,mla,test,t/s".split(",")
    assert all(re.fullmatch(r"-+:?", cell) for cell in rule)
    assert [row[-2] for row in rows] == names and all(
        re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[-1]) for row in rows
    )
    assert rows[0][0] == "nano" and rows[0][1].endswith(" MiB") and rows[0][2].endswith(" M")
    assert "context 100 tokens" in err and "tg4 @ d20: " in err
    assert (tmp_path / "out" / "bench.md").read_text() == table
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    printed = json.loads(run(*options, "json")[1])
    lines = [json.loads(line) for line in run(*options, "jsonl")[1].splitlines()]
    sheet = list(csv.DictReader(io.StringIO(run(*options, "csv")[1])))
    for records in (kept, printed, lines, sheet):
        assert [record["test"] for record in records] == names
    assert all(len(record["samples_ts"]) == 2 for record in kept)
    first = kept[0]
    assert first["avg_ts"] == pytest.approx(sum(first["samples_ts"]) / 2)
    assert [first[key] for key in ("n_prompt", "n_gen", "n_depth")] == [80, 0, 0]
    assert f"{first['avg_ts']:.2f} ± {first['stddev_ts']:.2f}" == rows[0][-1]


def test_version_tells_what_runs(run):
    code, out, err = run("--version")
    lines = out.splitlines()
    assert (code, err) == (0, "") and re.fullmatch(r"mla-jax \d+\.\d+\.\d+", lines[0])
    assert lines[2] == f"jax {jax.__version__} on cpu (cpu)" and "CPU kernels" in lines[3]
    assert "`mla-jax --version`" in run("--help")[1]


def test_version_tells_that_there_are_no_kernels(run, monkeypatch):
    monkeypatch.setattr(app.cpu_kernels, "available", lambda: False)
    monkeypatch.setattr(app.cpu_kernels, "unavailable_because", lambda: "there is no library")
    assert run("--version")[1].splitlines()[3] == "no CPU kernels: there is no library"


BOTH = "--against must not come with --kl-divergence-base: there is one base."
NEITHER = "--kl-divergence must come with --kl-divergence-base, the file of a base, or with --against."


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("perplexity --kl-divergence", NEITHER),
        ("perplexity --against x --kl-divergence-base y", BOTH),
        (
            "perplexity --kl-divergence --kl-divergence-base y --chunks 2",
            "--chunks must not come with a base",
        ),
        ("perplexity --kl-divergence-base absent/y", "--kl-divergence-base must be a file in a folder that"),
        ("perplexity --kl-divergence --kl-divergence-base absent", "absent cannot be used: No such file or"),
        ("perplexity -f absent", "absent cannot be used: No such file or directory."),
        ("perplexity --out absent", "--out must be a folder that exists, got 'absent'."),
        ("perplexity --ppl-stride 4", "--ppl-stride cannot be used: windows follow each other"),
        ("perplexity --chunks 0", "--chunks must be a positive integer, got '0'."),
        (
            "perplexity --against -t=1",
            "--against must be flags of the model, its attention, cache and experts, ",
        ),
        ("perplexity --against -ctk=q9", "--against must be flags of a base: -ctk must be one of f32,"),
        ("perplexity --against -mlo=1", "--against must be flags of a base: there is no flag -mlo."),
        ("perplexity --against '", "--against must be flags of a base: No closing quotation"),
        ("perplexity --against -ser=1", "-ser must be Kmin,t with whole Kmin"),
        ("perplexity --against --hadamard-size=64", "--hadamard-size must come with --k-cache-hadamard"),
        ("perplexity -mla 0 --against --cache-type-rope=f32", "cache_type_rope must not be given with mla 0"),
        ("bench -p 1,x", "--n-prompt must be whole numbers with commas between them, got '1,x'."),
        ("bench -p 0 -n 0", "--n-prompt and --n-gen must not both be 0: there would be nothing to measure."),
        ("bench --out absent", "--out must be a folder that exists, got 'absent'."),
        ("sweep-bench --out absent", "--out must be a folder that exists, got 'absent'."),
        ("sweep-bench --output-format csv", "--output-format must be one of table, jsonl, got 'csv'."),
        ("bench -o table", "-o must be one of md, csv, json, jsonl, got 'table'."),
        ("sweep-bench -wb", "-wb cannot be used: each kind of request is made once before it is measured."),
    ],
)
def test_a_bad_command_line_is_refused_before_a_model_is_read(run, monkeypatch, tmp_path, args, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    code, out, err = run(*args.split())
    assert (code, out) == (2, "") and err.startswith(f"mla-jax: {sentence}") and err.count("\n") == 1


def test_a_plot_that_cannot_be_drawn_is_told_first(run, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("perplexity", "sweep-bench"):
        assert run(command, "--out", tmp_path)[2].startswith("mla-jax: --out needs matplotlib for its plot")


def test_what_shows_late_is_one_sentence_and_leaves_nothing(run, path, text, tmp_path):
    (tmp_path / "short").write_text("a")
    (tmp_path / "bad").write_bytes(b"ab\xff")
    (tmp_path / "base").write_bytes(b"_logits_" + struct.pack("<3i", 40, 320, 1) + bytes(160))
    write_deepseek2(tmp_path / "wide.gguf", layers=1, vocab=330)
    before = sorted(tmp_path.iterdir())
    for args, sentence in [
        (["-f", tmp_path / "short"], "the text must have at least the 512 tokens of a window, got 2."),
        (["-f", tmp_path / "bad"], f"{tmp_path}/bad must be text in UTF-8, but byte 2 is none."),
        (
            ["--kl-divergence", "--kl-divergence-base", tmp_path / "base"],
            f"{tmp_path}/base must have the 12492 bytes that its sizes need, got 180.",
        ),
        (
            ["-f", text, "-c", "40", "--against", f"-m {tmp_path / 'wide.gguf'}"],
            f"--against must name a model of the same vocabulary, got {tmp_path}/wide.gguf.",
        ),
        (["-f", text, "-c", "2"], "a window must have at least 3 tokens, got 2."),
    ]:
        code, out, err = run("perplexity", path, *args)
        assert (code, out, err.splitlines()[-1]) == (2, "", f"mla-jax: {sentence}")
    assert sorted(tmp_path.iterdir()) == before
    code, out, err = run("sweep-bench", path, "-c", "64", "-n", "100")
    assert (code, out) == (2, "") and "must have room for 100 tokens, got one of 64.\n" in err
    code, _, err = run("bench", path, "-c", "10", "-r", "1")
    assert code == 2 and err.endswith("mla-jax: the context must have room for 512 tokens, got one of 10.\n")


def test_a_base_is_of_its_own_text(run, path, text, tmp_path):
    base = ["-b", "80", "--kl-divergence-base", tmp_path / "base"]
    assert run("perplexity", path, "-f", text, "-c", "40", "--chunks", "2", *base)[0] == 0
    (tmp_path / "other").write_text(TEXT[::-1])
    code, _, err = run("perplexity", path, "--kl-divergence", *base, "-f", tmp_path / "other")
    assert code == 2 and "must be of the same text, cut into the same windows; it has 2 windows of 40" in err
    assert run("perplexity", path, "--kl-divergence", *base, "-c", "40")[0] == 0
    code, _, err = run("perplexity", path, "--kl-divergence", *base, "-c", "41")
    assert code == 2 and err.endswith("--ctx-size must be the 40 tokens of the base's windows, got 41.\n")
