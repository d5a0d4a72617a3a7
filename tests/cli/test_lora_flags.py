"""Adapters on the command line: put beside weights by every command that runs a model, and merged."""

import pathlib

import numpy as np
import pytest
from adapters import random_lora
from synthetic import write_deepseek2

import checkpoints_tools
import mla_jax
from checkpoints_tools import lora_files, names
from checkpoints_tools.gguf_file import open_gguf
from mla_jax import lora as lora_lib
from mla_jax import steps
from mla_jax.cli import argv, flags, loading, serve_flags


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(steps, "COMPILATION_CACHE", tmp_path_factory.getbasetemp() / "xla")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a model, and one adapter of it in both formats."""
    folder = tmp_path_factory.mktemp("models")
    write_deepseek2(folder / "model.gguf", layers=2, weight_type="Q8_0")
    model = checkpoints_tools.load_gguf(folder / "model.gguf")
    lora = random_lora(model.params, rank=8)  # as GGUF files have it, so that what is compiled is the same
    for name in ("lora.gguf", "lora"):
        lora_files.save_lora(folder / name, lora, model.config)
    return folder


GENERATE = "generate -m {0}/model.gguf -p the -n 8 --temp 0 --no-display-prompt "


@pytest.fixture(scope="module")
def texts(folder):
    """What the model says without and with the adapter, by the library."""
    settings = dict(max_tokens=8, temperature=0.0)
    load = lambda **more: mla_jax.load(folder / "model.gguf", compilation_cache=None, **more)
    model = checkpoints_tools.load_gguf(folder / "model.gguf")
    lora = lora_files.load_lora(folder / "lora.gguf", model.config, names.flatten(model.params))
    return [load(lora=adapters).generate("the", **settings).text for adapters in ([], [lora])]


@pytest.mark.parametrize(
    "spelling",
    [
        "--lora {0}/lora.gguf",
        "--lora={0}/lora",
        "-lora {0}/lora",
        "--lora-scaled {0}/lora 1",
        "--lora_scaled={0}/lora.gguf 1.0",
    ],
)
def test_spellings_of_one_adapter(run, folder, texts, spelling):
    code, out, err = run(*(GENERATE + spelling).format(folder).split())
    assert (code, out) == (0, texts[1] + "\n"), err
    assert texts[0] != texts[1]


def test_an_adapter_times_nothing_changes_nothing(run, folder, texts):
    code, out, _ = run(*(GENERATE + "--lora-scaled {0}/lora 0").format(folder).split())
    assert (code, out) == (0, texts[0] + "\n")


@pytest.mark.parametrize(
    "spelling, message",
    [
        ("--lora {0}/none", "{0}/none: cannot be read: No such file or directory."),
        ("--lora {0}", "{0}/adapter_config.json: cannot be read: No such file or directory."),
        ("--lora {0}/model.gguf", "key 'general.type' of an adapter must be 'adapter', got None."),
        ("--lora-scaled {0}/lora x", "--lora-scaled must be a file and a finite number, got '{0}/lora' 'x'."),
        (
            "--lora-scaled {0}/lora nan",
            "--lora-scaled must be a file and a finite number, got '{0}/lora' 'nan'.",
        ),
        (
            "--lora-scaled {0}/lora 1e300",
            "the scale of an adapter must leave its factors finite, got 1e+300 for "
            "'blk.0.attn_kv_a_mqa.weight'.",
        ),
        ("--lora-scaled {0}/lora", "--lora-scaled must be followed by two values."),
        ("--lora", "--lora must be followed by a value."),
    ],
)
def test_bad_adapters_are_refused_in_a_sentence(run, folder, spelling, message):
    code, out, err = run(*(GENERATE + spelling).format(folder).split())
    assert (code, out) == (2, "")
    assert err.endswith(message.format(folder) + "\n") and err.count("mla-jax: ") == 1
    assert err.startswith("mla-jax: ")


def test_a_cache_of_one_adapter_is_none_of_another(run, folder, tmp_path):
    cache = f" --prompt-cache {tmp_path}/cache"
    adapted = GENERATE + "--lora {0}/lora"
    assert run(*(adapted + cache).format(folder).split())[0] == 0
    cache += " --prompt-cache-ro"
    assert run(*(adapted + cache).format(folder).split())[0] == 0
    for other in ("", "--lora-scaled {0}/lora 0.5"):
        code, _, err = run(*(GENERATE + other + cache).format(folder).split())
        assert code == 2 and "must be of this model, but was saved from another" in err


def test_export_writes_the_model_that_says_the_same(run, folder, texts, tmp_path):
    args = f"export-lora -m {folder}/model.gguf --lora {folder}/lora -o {tmp_path}/out.gguf --type f32"
    code, _, err = run(*args.split())
    assert code == 0 and err.endswith(f"wrote {tmp_path}/out.gguf\n")
    model = mla_jax.load(tmp_path / "out.gguf", compilation_cache=None)
    assert model.generate("the", max_tokens=8, temperature=0.0).text == texts[1]


def test_export_tells_what_encoding_costs(run, folder, tmp_path):
    args = f"export-lora -m {folder}/model.gguf --lora {folder}/lora -o {tmp_path}/out.gguf"
    code, out, err = run(*args.split())
    head, *lines = out.splitlines()
    assert (code, head.split()[:2]) == (0, ["tensor", "type"])
    assert len(lines) == 20 and all(line.split()[1] == "q8_0" for line in lines)
    assert "encoding costs" in err and "% of the update of blk." in err
    assert open_gguf(tmp_path / "out.gguf").tensors["blk.0.attn_output.weight"].type_name == "q8_0"


def test_export_can_print_its_plan(run, folder, tmp_path):
    args = f"export-lora -m {folder}/model.gguf --lora {folder}/lora -o {tmp_path}/out.gguf --type q4_0"
    code, out, _ = run(*args.split(), "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    rows = [line.split() for line in out.splitlines()]
    assert ["blk.1.ffn_down_exps.weight", "8", "q8_0", "q4_0"] in rows


@pytest.mark.parametrize(
    "args, message",
    [
        ("-m {0}/model.gguf -o {1}/x.gguf", "--lora must be given, or --lora-scaled: there would be nothing"),
        ("--lora {0}/lora -o {1}/x.gguf", "--model must be given."),
        ("-m {0}/model.gguf --lora {0}/lora", "--out must be given."),
        ("-m {0}/model.gguf --lora {0}/lora -o {1}/a/b.gguf", "--out must be a file in a folder that exists"),
        ("-m {0}/model.gguf --lora {0}/lora -o {1}/x.gguf --type q9", "type must be one of f32, "),
        ("-m {0}/lora.gguf --lora {0}/lora -o {1}/x.gguf", "key 'deepseek2."),
    ],
)
def test_bad_exports_are_refused_in_a_sentence(run, folder, args, message, tmp_path):
    code, out, err = run("export-lora", *args.format(folder, tmp_path).split())
    assert (code, out) == (2, "") and err.startswith("mla-jax: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["generate", "chat", "ser-sweep"])
def test_commands_that_run_models_take_adapters(command):
    values = flags.command_flags(command)
    args = ["--lora", "a", "--lora-scaled", "b", "2", "--lora", "c"]
    argv.parse(args, values, aliases=flags.ALIASES, refused=flags.REFUSED)
    assert loading.adapters(values) == [("a", 1.0), ("c", 1.0), ("b", 2.0)]


def test_the_server_takes_adapters():
    values = serve_flags.command_flags()
    argv.parse(["--lora-scaled", "b", "2"], values, aliases=serve_flags.ALIASES, refused=serve_flags.REFUSED)
    assert loading.adapters(values) == [("b", 2.0)]
    with pytest.raises(argv.UsageError, match="--lora-init-without-apply cannot be used"):
        argv.parse(
            ["--lora-init-without-apply"], values, aliases=serve_flags.ALIASES, refused=serve_flags.REFUSED
        )


def test_a_model_takes_adapters_as_values_and_scales(folder):
    model = checkpoints_tools.load_gguf(folder / "model.gguf")
    lora = random_lora(model.params, targets=["attn_output"], rank=4)
    loaded = mla_jax.load(folder / "model.gguf", compilation_cache=None, lora=[(lora, 0.5), folder / "lora"])
    found = names.flatten(loaded.params)["blk.0.attn_output.weight"]
    once = names.flatten(lora_lib.attach(model.params, lora, 0.5))["blk.0.attn_output.weight"]
    assert found.a.shape[0] == 12
    np.testing.assert_array_equal(found.a[:4], once.a)
    np.testing.assert_array_equal(found.b[:, :4], once.b)
    in_list = mla_jax.load(folder / "model.gguf", compilation_cache=None, lora=[[lora, 0.5]])
    pair = names.flatten(in_list.params)["blk.0.attn_output.weight"]
    np.testing.assert_array_equal(pair.b, once.b)
    with pytest.raises(ValueError, match="the scale of an adapter must be finite, got inf"):
        mla_jax.load(folder / "model.gguf", compilation_cache=None, lora=[(lora, float("inf"))])


@pytest.mark.parametrize(
    "adapters, message",
    [
        ("abc.gguf", "adapters must be in a list, got 'abc.gguf' alone"),
        (pathlib.Path("abc.gguf"), r"adapters must be in a list, got .*Path\('abc.gguf'\) alone"),
        (("abc.gguf", 0.5), "must be files, folders or `Lora`s, or pairs, got 0.5"),
        ([("abc.gguf", 0.5, 1)], r"or pairs, got \('abc.gguf', 0.5, 1\)"),
        ([(0.5, "abc.gguf")], r"or pairs, got \(0.5, 'abc.gguf'\)"),
    ],
    ids=["text", "path", "pair alone", "three", "turned round"],
)
def test_adapters_in_another_form_are_refused(folder, adapters, message):
    with pytest.raises(ValueError, match=message):
        lora_files.adapted(checkpoints_tools.load_gguf(folder / "model.gguf"), adapters)
