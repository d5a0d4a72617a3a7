"""Where units of a model lie by flags, and by what fits a memory."""

import jax
import pytest
from small_model import CONFIG as SMALL
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import names, place_sizes
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.model_file import check_model
from mla_jax import placement, segments
from mla_jax.cache import init_pool
from mla_jax.cli import argv, flags, loading, placing
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import lay_out
from mla_jax.placement import Rules

RUN = RunConfig(cache_type="f32")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("placed") / "nano.gguf"
    write_deepseek2(path, weight_type="Q8_0", layers=4)
    return str(path)


@pytest.fixture(scope="module")
def model(path):
    """The config and the names of tensors of a model with a dense layer and three with experts."""
    config, layout = check_model(open_gguf(path))
    return config, list(layout.shapes)


@pytest.fixture
def gpus(monkeypatch):
    """Has the machine two devices that stand for GPUs."""
    found = dict(zip(("cpu", "gpu:0", "gpu:1"), jax.devices()[:3], strict=True))
    monkeypatch.setattr(segments, "devices_at_hand", lambda: found)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    return found


def _places(model, **rules):
    """Returns the places of layers' attention, of layers' FFN or experts, and of embedding and output."""
    of = placement.arrange(*model, Rules(**rules)).of_unit
    attention = [of[f"attn.{i}"] for i in range(4)]
    return attention, [of["ffn.0"], *(of[f"experts.{i}"] for i in (1, 2, 3))], [of["embed"], of["output"]]


def test_every_tensor_belongs_to_a_unit_of_the_model(model):
    config, tensors = model
    assert {placement.unit_of(name) for name in tensors} == set(placement.units(config))
    of_attention = [name for name in tensors if placement.unit_of(name) == "attn.2"]
    assert {"blk.2.ffn_norm.weight", "blk.2.ffn_gate_inp.weight", "blk.2.exp_probs_b.bias"} < {*of_attention}
    assert {"blk.2.ffn_up_shexp.weight", "blk.2.attn_kv_b.weight"} < {*of_attention}


@pytest.mark.parametrize("count", range(7))
def test_the_last_layers_go_to_the_gpu_and_the_output_before_them(model, count):
    attention, ffn, ends = _places(model, gpu_layers=count)
    wanted = ["gpu:0" if i >= 5 - count else "cpu" for i in range(5)]
    assert attention == ffn == wanted[:4]
    assert ends == ["gpu:0" if count >= 5 else "cpu", wanted[4]]


@pytest.mark.parametrize("count", [0, 1, 2, 4, placement.ALL_LAYERS])
def test_experts_of_the_first_layers_stay_on_the_cpu(model, count):
    attention, ffn, ends = _places(model, gpu_layers=999, cpu_experts=count, main_gpu=1)
    assert {*attention, *ends, ffn[0]} == {"gpu:1"}
    assert ffn[1:] == ["cpu" if i < count else "gpu:1" for i in (1, 2, 3)]


def test_the_first_override_that_matches_counts_and_goes_before_other_flags(model):
    overrides = placement.parse_overrides([r"blk\.2\..*_exps=CUDA1,exps=CPU", "exps=gpu,^output=gpu:0"])
    assert [place for _, place in overrides] == ["gpu:1", "cpu", "gpu:0", "gpu:0"]
    attention, ffn, ends = _places(model, overrides=overrides)
    assert attention == ["cpu"] * 4 and ffn == ["cpu", "cpu", "gpu:1", "cpu"] and ends == ["cpu", "gpu:0"]
    overrides = placement.parse_overrides([r"exps=gpu"])
    assert _places(model, overrides=overrides, cpu_experts=4)[1] == ["cpu"] + ["gpu:0"] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exps", r"must be REGEX=PLACE with a place of cpu, gpu, gpu:N or CUDAN, got 'exps'\."),
        ("exps=", "got 'exps='"),
        ("=cpu", "got '=cpu'"),
        ("exps=tpu", "got 'exps=tpu'"),
        ("exps=gpu:", "got 'exps=gpu:'"),
        ("exps=cpu,", "got ''"),
        ("ex(ps=cpu", r"must have regular expressions, got 'ex\(ps': "),
    ],
)
def test_what_is_no_override_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^--override-tensor .*{message}"):
        placement.parse_overrides([text])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("down_exps=cpu", "got blk.1.ffn_down_exps.weight on cpu and blk.1.ffn_gate_exps.weight on gpu:0"),
        ("attn_norm=cpu", "must not take apart what is computed in one piece"),
        ("shexp=cpu", "must not take apart what is computed in one piece"),
        ("blk.9=cpu", "must have patterns of tensors that the model has, got 'blk.9'"),
    ],
)
def test_a_unit_is_not_taken_apart(model, pattern, message):
    rules = Rules(gpu_layers=999, overrides=placement.parse_overrides([pattern]))
    with pytest.raises(ValueError, match=message):
        placement.arrange(*model, rules)


def test_a_pattern_may_name_a_part_of_a_unit_that_is_there_anyway(model):
    assert _places(model, gpu_layers=999, overrides=(("shexp", "gpu:0"),))[0] == ["gpu:0"] * 4


def test_a_placement_in_words(model):
    rules = Rules(gpu_layers=999, cpu_experts=3, overrides=((r"blk\.0\.ffn_(gate|up|down)\.", "cpu"),))
    text = placement.arrange(*model, rules).describe()
    assert text == "cpu: ffn 0, experts 1-2; gpu:0: embed, attn 0-3, experts 3, output"


def test_a_smaller_memory_has_less_and_is_filled_as_far_as_units_go(model):
    config, tensors = model
    size = lambda unit, place: 100 if unit.startswith("experts") else 10
    chosen = []
    for room in range(0, 400, 5):
        rules = placement.fit(config, tensors, size, room=room)
        of_unit = placement.arrange(config, tensors, rules).of_unit
        taken = sum(size(unit, place) for unit, place in of_unit.items() if place == "gpu:0")
        assert taken <= room
        chosen.append((rules.gpu_layers, -rules.cpu_experts, taken))
    assert chosen == sorted(chosen) and chosen[0][2] == 0 and chosen[-1] == (5, 0, 370)
    assert {taken for *_, taken in chosen} == {0, 10, 20, 30, 40, 70, 170, 270, 370}


def test_fitting_never_takes_more_layers_than_it_may(model):
    size = lambda unit, place: 1
    assert placement.fit(*model, size, room=100, gpu_layers=2) == Rules(gpu_layers=2)
    assert placement.fit(SMALL, *model[1:], size, room=-1) == Rules()


def test_bytes_are_those_of_the_weights_when_they_are_loaded(path, model):
    config, tensors = model
    contents = place_sizes.read_contents(path)
    placed = placement.arrange(config, tensors, Rules(gpu_layers=2))
    sizes = place_sizes.of_places(contents, placed, ctx_size=100, run=RUN, ubatch=32)
    params = names.flatten(checkpoints_tools.load_gguf(path, progress=lambda *_: None).params)
    for_gpu = names.flatten(lay_out(names.unflatten(params), RunConfig(gpu_kernels=True)))
    pool = init_pool(config, RUN, batch=1, num_pages=2)
    rows = sum(part.nbytes for part in jax.tree.leaves(pool.layers[0]))
    for place, held, layers in (("cpu", params, 3), ("gpu:0", for_gpu, 1)):
        own = [leaf for name, leaf in held.items() if placed.of_tensor(name) == place]
        assert sizes[place].weights == sum(part.nbytes for part in jax.tree.leaves(own))
        assert sizes[place].rows == layers * rows
    assert 0 < sizes["cpu"].workspace < 1 << 30


def test_a_preset_is_placed_by_the_type_of_its_weights():
    contents = place_sizes.read_contents("deepseek-v2-lite", "q8_0")
    placed = placement.arrange(contents.config, contents.tensors, Rules(gpu_layers=999, cpu_experts=99))
    sizes = place_sizes.of_places(contents, placed, ctx_size=64, run=RUN, ubatch=32)
    moe, D = contents.config.moe, contents.config.embed_dim
    experts = 26 * 3 * moe.num_experts * moe.expert_hidden_dim * D
    assert sizes["cpu"].weights == pytest.approx(experts * 34 / 32, rel=0.01)
    assert sizes["gpu:0"].rows == 27 * 576 * 4 * 64
    with pytest.raises(ValueError, match=r"--type must be one of f32, .*, got 'q9'"):
        place_sizes.read_contents("deepseek-v2-lite", "q9")


def _values(path, *args):
    values = flags.command_flags("generate")
    argv.parse(args, values, aliases=flags.ALIASES, refused=flags.REFUSED)
    values["model"].value = path
    return values


def _segments(path, *args):
    told = []
    sizes = dict(ctx_size=lambda config: 256, run=RUN, ubatch=32)
    return placing.segments(_values(path, *args), told.append, **sizes), told


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-ngl", "99", "--cpu-moe"], "cpu: experts 1-3; gpu:0: embed, attn 0-3, ffn 0, output"),
        (["-ngl", "5", "-ncmoe", "2"], "cpu: experts 1; gpu:0: embed, attn 0-3, ffn 0, experts 2-3, output"),
        (["-ot", "exps=gpu:1"], "cpu: embed, attn 0-3, ffn 0, output; gpu:1: experts 1-3"),
    ],
)  # fmt: skip
def test_flags_place_a_model_and_say_where(path, gpus, args, words):
    found, told = _segments(path, *args)
    assert found.placement.describe() == words and told[0] == f"placement: {words}"
    assert told[1].startswith("cpu: ") and "MiB of weights, gpu:" in told[1]


@pytest.mark.parametrize("args", [["-ngl", "5"], ["-ngl", "999", "-ot", "exps=gpu"]])
def test_a_model_on_one_gpu_runs_as_ever(path, gpus, args):
    assert _segments(path, *args) == (None, [])


def test_fitting_chooses_by_the_memory_that_is_free(path, gpus, monkeypatch):
    contents = place_sizes.read_contents(path)
    whole = placement.arrange(contents.config, contents.tensors, Rules(gpu_layers=99))
    sizes = place_sizes.of_places(contents, whole, ctx_size=256, run=RUN, ubatch=32)["gpu:0"]
    need = sizes.weights + sizes.rows + sizes.workspace + (100 << 20)
    free = [need]
    monkeypatch.setattr(placing, "free_bytes", lambda device: free[0])
    assert _segments(path, "--fit", "100") == (None, [])
    free[0] = need - 1
    found, _ = _segments(path, "--fit", "100")
    assert found.placement.describe().startswith("cpu: experts 1; ")
    free[0] = 0
    assert _segments(path, "--fit")[0].placement.places == ("cpu",)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-ngl", "9", "-mg", "2"], "--main-gpu must be below 2, the number of GPUs, got 2."),
        (["-ot", "exps=gpu:7"], "a place must be one of cpu, gpu:0, gpu:1, got gpu:7."),
        (["--fit", "-cmoe"], "--fit chooses what lies where, so it must not come with --cpu-moe."),
        (["--fit", "-ngl", "0"], "--fit must not come with -ngl 0"),
        (["--fit"], "--fit must be told by the GPU how much memory is free"),
    ],
)
def test_flags_that_cannot_be_are_refused(path, gpus, args, message):
    with pytest.raises(ValueError, match=message):
        _segments(path, *args)


def test_without_a_gpu_flags_of_one_are_told_to_have_no_effect(path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    found, told = _segments(path, "-ngl", "9", "-mg", "1", "-cmoe", "-ot", "exps=cpu", "--fit")
    flags_told = ("--override-tensor", "--cpu-moe", "--main-gpu", "--fit")
    assert found is None
    assert told == [f"{flag} has no effect: everything runs on the CPU" for flag in flags_told]


def test_a_command_that_reads_weights_itself_takes_one_device(path, gpus, monkeypatch):
    monkeypatch.setattr(loading, "choose_device", lambda values: None)
    with pytest.raises(ValueError, match="runs a model on one device, so -ngl must be 0 or 999"):
        loading.load(_values(path, "-ngl", "2"), on_one_device=True)


def test_layers_on_a_gpu_do_not_go_with_many_processes(path, gpus, monkeypatch):
    monkeypatch.setattr(loading, "choose_device", lambda values: None)
    with pytest.raises(ValueError, match="-ngl must be 0 or 999 with --coordinator, got 2"):
        loading.load(_values(path, "-ngl", "2"), programs=object())


def test_the_command_line_reaches_the_segments(path, gpus, monkeypatch):
    monkeypatch.setattr(loading, "choose_device", lambda values: None)
    monkeypatch.setattr(loading, "_compilation_cache", lambda: (None, ""))
    model = loading.load(_values(path, "-ngl", "99", "--cpu-moe"))
    assert isinstance(model._programs, segments.Segments)
    leaf = model.params["layers_1"]["ffn"]["experts"]["up"]["weight"].blocks
    assert leaf.devices() == {gpus["cpu"]}
    assert model.params["output"]["weight"].blocks.devices() == {gpus["gpu:0"]}
