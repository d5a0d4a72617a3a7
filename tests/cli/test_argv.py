"""Reading command lines: every spelling of the reference, and one sentence for each that cannot be read."""

import pytest

from mla_jax.cli import argv
from mla_jax.cli import flags as flags_lib
from mla_jax.config import CACHE_TYPES


def parse(*args, command="generate"):
    values = flags_lib.command_flags(command)
    argv.parse(args, values, aliases=flags_lib.ALIASES, refused=flags_lib.REFUSED)
    return values


def refusal(*args, command="generate"):
    with pytest.raises(argv.UsageError) as caught:
        parse(*args, command=command)
    return str(caught.value)


@pytest.mark.parametrize(
    ("args", "flag", "value"),
    [
        (["-m", "a.gguf"], "model", "a.gguf"),
        (["--model", "a.gguf"], "model", "a.gguf"),
        (["--model=a=b.gguf"], "model", "a=b.gguf"),
        (["-model", "a.gguf"], "model", "a.gguf"),
        (["-p", "def f(x):"], "prompt", "def f(x):"),
        (["-p=x = 1"], "prompt", "x = 1"),
        (["--prompt", "-n 5 --help"], "prompt", "-n 5 --help"),
        (["-p", "--flagfile=x"], "prompt", "--flagfile=x"),
        (["-p", ""], "prompt", ""),
        (["-p", "two\nlines\t🙂"], "prompt", "two\nlines\t🙂"),
        (["-n", "-1"], "predict", -1),
        (["-n=-1"], "predict", -1),
        (["--predict", "64"], "predict", 64),
        (["--n-predict", "64"], "predict", 64),
        (["--n_predict=64"], "predict", 64),
        (["-c", "512"], "ctx_size", 512),
        (["--ctx-size", "0"], "ctx_size", 0),
        (["-ctx_size", "512"], "ctx_size", 512),
        (["-mla", "1"], "mla", "1"),
        (["--mla=0"], "mla", "0"),
        (["--mla-use", "2"], "mla", "2"),
        (["-fa"], "flash_attn", "on"),
        (["-fa", "on"], "flash_attn", "on"),
        (["-fa", "off"], "flash_attn", "off"),
        (["-fa=off"], "flash_attn", "off"),
        (["--flash-attn", "off"], "flash_attn", "off"),
        (["--flash-attn=auto"], "flash_attn", "auto"),
        (["--flash_attn"], "flash_attn", "on"),
        (["-ctk", "bf16"], "cache_type_k", "bf16"),
        (["--cache-type-k", "f32"], "cache_type_k", "f32"),
        (["--kv-cache-dtype", "q8_0"], "cache_type_k", "q8_0"),
        (["--cache-type-rope", "f16"], "cache_type_rope", "f16"),
        (["-khad"], "k_cache_hadamard", True),
        (["--cache-type-k=q8_KV"], "cache_type_k", "q8_KV"),
        (["-amb", "512"], "attention_max_batch", 512),
        (["--hadamard-size", "128"], "hadamard_size", "128"),
        (["-ngl", "999"], "n_gpu_layers", 999),
        (["--n-gpu-layers", "0"], "n_gpu_layers", 0),
        (["--gpu-layers", "99"], "n_gpu_layers", 99),
        (["-ot", "exps=CPU", "-ot", "a=gpu,b=cpu"], "override_tensor", ["exps=CPU", "a=gpu,b=cpu"]),
        (["-cmoe"], "cpu_moe", True),
        (["-ncmoe", "3"], "n_cpu_moe", 3),
        (["-mg", "1"], "main_gpu", 1),
        (["--fit"], "fit", "on"),
        (["--fit", "off"], "fit", "off"),
        (["--fit", "2048", "-cmoe"], "fit", "2048"),
        (["--fit", "-cmoe"], "fit", "on"),
        (["-b", "64"], "batch_size", 64),
        (["--batch-size", "64"], "batch_size", 64),
        (["-ub", "64"], "ubatch_size", 64),
        (["--ubatch_size", "64"], "ubatch_size", 64),
        (["-t", "1"], "threads", 1),
        (["--threads", "2"], "threads", 2),
        (["-s", "42"], "seed", 42),
        (["--seed=-1"], "seed", -1),
        (["--temp", "0"], "temp", 0.0),
        (["--temperature", "0.7"], "temp", 0.7),
        (["-temp", "1e-1"], "temp", 0.1),
        (["--top-k", "5"], "top_k", 5),
        (["--top_p", "0.5"], "top_p", 0.5),
        (["--min-p=0"], "min_p", 0.0),
        (["--repeat-penalty", "1.1"], "repeat_penalty", 1.1),
        (["--no-display-prompt"], "display_prompt", False),
        (["--nodisplay_prompt"], "display_prompt", False),
        (["--display-prompt=false"], "display_prompt", False),
        (["-ger"], "grouped_expert_routing", True),
        (["-no-ger"], "grouped_expert_routing", False),
        (["-h"], "help", True),
        (["--temp", "1", "-temp", "2"], "temp", 2.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_spellings(args, flag, value):
    got = getattr(parse(*args), flag)
    assert got == value and type(got) is type(value)


def test_flags_follow_each_other():
    values = parse("-fa", "-p", "-fa", "-n", "3", "--flash-attn", "off", "-no-display-prompt", "-c", "9")
    assert (values.prompt, values.predict, values.flash_attn) == ("-fa", 3, "off")
    assert (values.display_prompt, values.ctx_size) == (False, 9)


def test_a_bare_flag_takes_no_word_that_is_not_its_own():
    assert refusal("-fa", "hello").startswith("every argument must belong to a flag, got 'hello'.")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["def f(x):"],
            "every argument must belong to a flag, got 'def f(x):'. A value with spaces in it needs quotes.",
        ),
        (["-p", "def", "f(x):"], "every argument must belong to a flag, got 'f(x):'. A value with spaces"),
        (["prompt", "x"], "every argument must belong to a flag, got 'prompt'. Did you mean --prompt?"),
        (["prompt=x"], "every argument must belong to a flag, got 'prompt=x'. Did you mean --prompt?"),
        (["-"], "every argument must belong to a flag, got '-'."),
        (["--"], "every argument must belong to a flag, got '--'."),
        (["--promt", "x"], "there is no flag --promt. Did you mean --prompt?"),
        (["--ctx_sise=5"], "there is no flag --ctx_sise. Did you mean --ctx-size?"),
        (["-tmep", "1"], "there is no flag -tmep. Did you mean --temp?"),
        (["--cache-type-q", "f16"], "there is no flag --cache-type-q. Did you mean --cache-type-k?"),
        (["--zzz"], "there is no flag --zzz."),
        (["-5"], "there is no flag -5."),
        (["--no-model"], "there is no flag --no-model. Did you mean --model?"),
        (["--no-display-prompt=1"], "--no-display-prompt takes no value."),
        (["-m"], "-m must be followed by a value."),
        (["-n", "3", "--prompt"], "--prompt must be followed by a value."),
        (["-mla", "4"], "-mla must be one of 0, 1, 2, 3, got '4'."),
        (["-mla", ""], "-mla must be one of 0, 1, 2, 3, got ''."),
        (["-fa=yes"], "-fa must be one of on, off, auto, got 'yes'."),
        (
            ["-ctk", "q9"],
            f"-ctk must be one of {', '.join(CACHE_TYPES)}, got 'q9'.",
        ),
        (["-n", "many"], "-n must be an integer >= -1, got 'many'."),
        (["-n", "-2"], "-n must be an integer >= -1, got '-2'."),
        (["-n", "1.5"], "-n must be an integer >= -1, got '1.5'."),
        (["-c", "-1"], "-c must be an integer in the range [0, 2147483647], got '-1'."),
        (["-c", "9" * 20], f"-c must be an integer in the range [0, 2147483647], got '{'9' * 20}'."),
        (["-ub", "0"], "-ub must be a positive integer, got '0'."),
        (["-t", "0"], "-t must be a positive integer, got '0'."),
        (["-ngl", "-1"], "-ngl must be a non-negative integer, got '-1'."),
        (["-ngl", "all"], "-ngl must be a non-negative integer, got 'all'."),
        (["-s", "-2"], "-s must be an integer in the range [-1, 4294967295], got '-2'."),
        (["--temp", "-1"], "--temp must be a non-negative number, got '-1'."),
        (["--temp", "hot"], "--temp must be a non-negative number, got 'hot'."),
        (["--top-p", "x"], "--top-p must be a number, got 'x'."),
        (["--repeat-last-n", "65"], "--repeat-last-n must be an integer in the range [0, 64], got '65'."),
        (["--display-prompt=maybe"], "--display-prompt must be a boolean: true or false, got 'maybe'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_read(args, sentence):
    said = refusal(*args)
    assert said.startswith(sentence)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-vhad"], "-vhad cannot be used: values are a part of the latent cache"),
        (["-ctv", "q8_0"], "-ctv cannot be used: values are a part of the latent cache"),
        (["-ctv=f16"], "-ctv cannot be used: values are a part of the latent cache"),
        (["-sm", "graph"], "-sm cannot be used: devices share out the model by --mesh"),
        (["-ts", "1,1"], "-ts cannot be used: devices have equal parts of the model, by --mesh."),
        (["-fmoe"], "-fmoe cannot be used: the expert product has one form"),
        (["-mqkv"], "-mqkv cannot be used"),
        (["-np", "4"], "-np cannot be used: one sequence is generated at a time"),
        (["-tb", "4"], "-tb cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_without_effect_are_refused(args, words):
    said = refusal(*args, "-p", "x")
    assert said.startswith(words) and said.endswith(".") and "\n" not in said


def test_a_refused_flag_is_never_suggested():
    for written in flags_lib.ALIASES:
        with pytest.raises(argv.UsageError) as caught:
            parse(f"--{written}x", "1")
        suggested = str(caught.value).partition("Did you mean --")[2].rstrip("?").replace("-", "_")
        assert flags_lib.ALIASES.get(suggested, suggested) not in flags_lib.REFUSED


def test_every_alias_leads_somewhere():
    commands = ("generate", "chat", "train", "quantize", "split")
    known = {flag for command in commands for flag in flags_lib.command_flags(command)}
    refused = {key.partition("=")[0] for key in flags_lib.REFUSED}
    assert set(flags_lib.ALIASES.values()) <= known | refused
    assert not {key for key in flags_lib.REFUSED if "=" not in key} & known


def test_the_other_commands_have_flags_of_their_own():
    assert refusal("-p", "x", command="inspect") == "there is no flag -p."
    assert refusal("-p", "x", command="chat").startswith("there is no flag -p.")
    assert parse("-sys", "You are brief.", command="chat").system_prompt == "You are brief."
    assert parse("--steps", "7", command="train").steps == 7


@pytest.mark.parametrize(
    "args",
    ["in out q8_0", "in --dry-run out q8_0", "--dry-run in out q8_0", "--type q8_0 in out --dry-run"],
)
def test_places_are_filled_in_their_order_wherever_they_stand(args):
    values = flags_lib.command_flags("quantize")
    places = ("input", "out", "type")
    argv.parse(args.split(), values, aliases=flags_lib.ALIASES, refused={}, positionals=places)
    assert (values.input, values.out, values.type) == ("in", "out", "q8_0")


def test_an_argument_too_many_is_refused():
    values = flags_lib.command_flags("inspect")
    with pytest.raises(argv.UsageError, match=r"every argument must belong to a flag, got 'b\.gguf'"):
        argv.parse(["a.gguf", "b.gguf"], values, aliases={}, refused={}, positionals=("model",))


def test_a_flag_that_may_be_repeated_collects_its_values():
    values = parse("--custom", "a=q8_0", "--custom-q", "b=q4_0,c=f16", command="quantize")
    assert values.custom == ["a=q8_0", "b=q4_0,c=f16"]
