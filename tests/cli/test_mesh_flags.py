"""`--mesh` and `--split-cache`: the same text on more devices, the plan, and what cannot be."""

import pytest
from synthetic import write_deepseek2

from mla_jax import steps


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2, sizes=dict(rope=32), weight_type="Q8_0")
    return path


def test_a_mesh_says_the_same(run, path, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "COMPILATION_CACHE", tmp_path / "xla")
    args = ("generate", "-m", path, "-p", "the of and", "-n", "4", "-c", "64", "--temp", "0", "-ctk", "q8_0")
    code, said, _ = run(*args)
    assert code == 0
    code, said_on_mesh, told = run(*args, "--mesh", "expert=2", "--split-cache")
    assert (code, said_on_mesh) == (0, said)
    assert "mesh data=1,expert=2,model=1: " in told and " on each of 2 devices\n" in told


def test_the_plan_of_a_mesh(run):
    code, said, _ = run(
        "plan", "-m", "deepseek-v3", "--type", "q8_0", "--mesh", "data=2,expert=8", "-c", "4096"
    )
    assert code == 0
    rows = [line.split("  ") for line in said.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["mesh", "data=2,expert=8,model=1: 16 devices"] in cells
    assert ["all-reduce", "attention", "group", "61", "7,168"] in cells
    assert ["reduce-scatter", "experts", "data", "58", "7,168"] in cells
    weights = next(row[1] for row in cells if row and row[0] == "weights" and "a device" in row[1])
    assert 42_000 < float(weights.split()[0].replace(",", "")) < 46_000  # a sixteenth of 679,000, and norms


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--mesh", "rows=2"), "--mesh: a mesh must be auto, or some of data, expert, model"),
        (("--split-cache",), "--split-cache must come with --mesh."),
        (("--mesh", "model=2", "--cpu-moe"), "--cpu-moe must not come with --mesh"),
        (("--mesh", "model=2", "-mla", "0", "--split-cache"), "a cache that devices split must hold latents"),
        (("--mesh", "model=2", "--expert-stats"), "--expert-stats counts experts on one device alone"),
        (("--mesh", "model=65"), "--mesh must have at most 64 devices in a process, got 65."),
        (("--mesh", "expert=3", "--split-cache"), "a number of devices that divides the 64 tokens of a page"),
        (("--mesh", "model=64"), "the mesh data=1,expert=1,model=64 must have at most the 8 devices"),
    ],
    ids=lambda flags: " ".join(flags) if isinstance(flags, tuple) else "",
)
def test_what_cannot_be_is_told(run, path, monkeypatch, flags, sentence):
    monkeypatch.setattr("jax.config.update", lambda *args: None)  # the devices of this process are there
    code, _, told = run("generate", "-m", path, "-p", "x", "-n", "1", *flags)
    assert code == 2 and sentence in told, told


def test_a_plan_must_name_its_devices(run):
    code, _, told = run("plan", "-m", "deepseek-v2-lite", "--mesh", "auto")
    assert code == 2 and told == "mla-jax: --mesh must name its axes for a plan, as expert=8, got auto.\n"


def test_commands_of_one_device_say_so(run, path):
    code, _, told = run("perplexity", "-m", path, "--mesh", "model=2")
    assert code == 2 and "this command runs a model on one device" in told
