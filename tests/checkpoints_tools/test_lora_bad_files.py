"""Files that are no sound adapters of a model are refused, each by one sentence that names file and fault."""

import re

import numpy as np
import pytest
from adapters import random_lora
from lora_pieces import ABOUT, O_PROJ, factors, load, o_proj, write_file, write_folder
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import GGUFError, TensorData, lora_files, write_gguf
from checkpoints_tools.ggml_types import IDS
from mla_jax.lora import Adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "a.gguf"
    write_deepseek2(path, layers=2, experts=4, used=2)
    return checkpoints_tools.load_gguf(path)


A, B = o_proj()
BIG = np.zeros((200, 64), np.float32), np.zeros((64, 200), np.float32)
HUGE = Adapter(a=np.ones((4, 64), np.float32), b=np.full((320, 4), 1e38, np.float32))
EXPERT = "model.layers.1.mlp.experts.{}.gate_proj"


def expert(index, rank=2):
    return factors(EXPERT.format(index), np.zeros((rank, 64), np.float32), np.zeros((32, rank), np.float32))


BAD_TENSORS = {
    "none": ({}, "must hold the tensors of an adapter"),
    "one factor": ({"base_model.model.lm_head.lora_A.weight": A}, r"lm_head\.lora_B\.weight' is missing"),
    "no prefix": ({f"{O_PROJ}.lora_A.weight": A}, "must be named base_model.model.MODULE.lora_A.weight"),
    "DoRA": ({f"base_model.model.{O_PROJ}.lora_magnitude_vector": A[0]}, "must be named"),
    "embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": A}, "must be named"),
    "another module": (factors("model.layers.0.self_attn.k_proj", A, B), "must be of a linear module"),
    "a norm": (factors("model.layers.0.input_layernorm", A, B), "must be of a linear module"),
    "a layer too many": (factors("model.layers.2.self_attn.o_proj", A, B), "must be of a linear module"),
    "another number": (factors("model.layers.00.self_attn.o_proj", A, B), "must be of a linear module"),
    "transposed": (
        factors(O_PROJ, A.T, B.T),
        r"factors a \[r, 64\] and b \[64, r\] of a rank r in \[1, 128\]",
    ),
    "ranks differ": (factors(O_PROJ, A, B[:, :3]), r"got \[4, 64\] and \[64, 3\]"),
    "too wide": (factors(O_PROJ, np.zeros((4, 65), np.float32), B), r"got \[4, 65\]"),
    "rank 0": (factors(O_PROJ, A[:0], B[:, :0]), r"of a rank r in \[1, 128\], got \[0, 64\]"),
    "rank beyond use": (factors(O_PROJ, *BIG), r"of a rank r in \[1, 128\], got \[200, 64\]"),
    "vector": (factors(O_PROJ, A[0], B), r"got \[64\] and \[64, 4\]"),
    "number": (factors(O_PROJ, A[0, :1], B), r"got \[1\] and \[64, 4\]"),
    "integers": (factors(O_PROJ, A.astype(np.int32), B), "must be one of F32, F16, BF16, got I32"),
    "not a number": (factors(O_PROJ, A * np.float32(np.nan), B), r"lora_A.weight' must be finite"),
    "infinite": (factors(O_PROJ, A, B + np.float32(np.inf)), r"lora_B.weight' must be finite"),
    "no such expert": (expert(4), "must be of one of 4 experts"),
    "ranks of experts": (expert(0) | expert(1, 3), "must have one rank, they have several"),
    "experts twice": (
        factors("model.layers.1.mlp.experts.0.down_proj", A[:, :32], B)
        | factors("model.layers.1.mlp.experts", np.zeros((8, 32), np.float32), np.zeros((64, 8), np.float32)),
        "must be adapted as a whole or by experts, it is both",
    ),
    "stack of no kind": (factors("model.layers.1.mlp.experts", A, B[:5]), "of gate_up_proj or down_proj"),
    "stack in a dense layer": (factors("model.layers.0.mlp.experts", A, B), "of gate_up_proj or down_proj"),
    "stack of odd rows": (
        factors("model.layers.1.mlp.experts", np.zeros((6, 64), np.float32), np.zeros((64, 6), np.float32)),
        "must have as many rows for each of 4 experts",
    ),
    "both forms of gate and up": (
        expert(0) | factors("model.layers.1.mlp.experts", np.zeros((4, 64), np.float32), B),
        "are the same weight, adapted twice",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(model, case, tmp_path):
    tensors, words = BAD_TENSORS[case]
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    folder = write_folder(tmp_path / "folder", tensors)
    with pytest.raises(GGUFError, match=words) as caught:
        load(folder, model)
    check_sentence(caught.value, folder / "adapter_model.safetensors")


def check_sentence(error, path):
    assert re.fullmatch(rf"{re.escape(str(path))}: .+\.", str(error)) and "\n" not in str(error)


BAD_SETTINGS = {
    "another method": (dict(peft_type="LOHA"), "'peft_type' must be 'LORA', got 'LOHA'"),
    "no method": (dict(peft_type=None), "'peft_type' must be 'LORA', got None"),
    "DoRA": (dict(use_dora=True), "'use_dora' must not be set"),
    "modules saved": (dict(modules_to_save=["lm_head"]), "'modules_to_save' must not be set"),
    "biases": (dict(bias="lora_only"), "'bias' must be 'none', got 'lora_only'"),
    "activated": (dict(alora_invocation_tokens=[1]), "'alora_invocation_tokens' must not be set"),
    "no alpha": (dict(lora_alpha=None), "'lora_alpha' must be a number from .*, got None"),
    "alpha a text": (dict(lora_alpha="16"), "'lora_alpha' must be a number from .*, got '16'"),
    "alpha true": (dict(lora_alpha=True), "'lora_alpha' must be a number from .*, got True"),
    "alpha 0": (dict(lora_alpha=0), "'lora_alpha' must be a number from .*, got 0"),
    "alpha NaN": (dict(lora_alpha=float("nan")), "'lora_alpha' must be a number from .*, got nan"),
    "alpha huge": (dict(lora_alpha=10**400), "'lora_alpha' must be a number from .*, got 1000"),
    "alpha tiny": (dict(lora_alpha=1e-300), r"must be a number from 2\^-64 to 2\^64, got 1e-300"),
    "root a number": (dict(use_rslora=1), "'use_rslora' must be true or false, got 1"),
    "pattern a list": (dict(alpha_pattern=[1]), "'alpha_pattern' must be an object"),
    "pattern slow": (dict(alpha_pattern={"(a+)+$": 1}), r"must have names of modules, got '\(a\+\)\+\$'"),
    "pattern of texts": (
        dict(alpha_pattern={"q_proj": 1, "o_proj": "1"}),
        "pattern 'o_proj' of key 'alpha_pattern' must be a number from .*, got '1'",
    ),
    "PiSSA": (
        dict(init_lora_weights="pissa_niter_4"),
        "must be true, .* or null, .* got 'pissa_niter_4'",
    ),
    "OLoRA": (dict(init_lora_weights="olora"), "as all else changes the model's own weights, got 'olora'"),
    "LoftQ": (dict(init_lora_weights="loftq"), "as all else changes the model's own weights, got 'loftq'"),
    "CorDA": (dict(init_lora_weights="corda"), "as all else changes the model's own weights, got 'corda'"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused(model, case, tmp_path):
    settings, words = BAD_SETTINGS[case]
    folder = write_folder(tmp_path / "folder", factors(O_PROJ, A, B), **settings)
    with pytest.raises(GGUFError, match=words) as caught:
        load(folder, model)
    check_sentence(caught.value, folder / "adapter_config.json")


@pytest.mark.parametrize("initial", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_adapters_of_unchanged_models_are_read_however_they_began(model, initial, tmp_path):
    folder = write_folder(tmp_path / "folder", factors(O_PROJ, A, B), init_lora_weights=initial)
    assert len(load(folder, model).adapters) == 1


def test_factors_that_their_scale_makes_infinite_are_refused(model, tmp_path):
    settings = dict(lora_alpha=2.0**-60, alpha_pattern={"o_proj": 2.0**60})
    folder = write_folder(tmp_path / "folder", factors(O_PROJ, A, 1e10 * B), **settings)
    write_file(tmp_path / "a.gguf", {"output.weight": HUGE}, {"adapter.lora.alpha": 0.0})
    for path, name in ((folder, "blk.0.attn_output.weight"), (tmp_path / "a.gguf", "output.weight")):
        with pytest.raises(GGUFError, match=rf"the adapter of '{re.escape(name)}' must be finite"):
            load(path, model)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_must_have_both_files(model, missing, tmp_path):
    folder = write_folder(tmp_path / "folder", factors(O_PROJ, A, B))
    (folder / missing).unlink()
    with pytest.raises(GGUFError, match="cannot be read: No such file") as caught:
        load(folder, model)
    check_sentence(caught.value, folder / missing)


GOOD = {"blk.0.attn_output.weight": Adapter(a=A, b=B)}
STACK = Adapter(a=np.zeros((4, 2, 64), np.float32), b=np.zeros((4, 32, 2), np.float32))
FLAT = Adapter(a=np.zeros((2, 64), np.float32), b=np.zeros((32, 2), np.float32))
BAD_FILES = {
    "a model": (
        GOOD,
        {"general.type": "model"},
        "'general.type' of an adapter must be 'adapter', got 'model'",
    ),
    "no kind": (GOOD, {"general.type": None}, "'general.type' of an adapter must be 'adapter', got None"),
    "a control vector": (GOOD, {"adapter.type": "cvec"}, "'adapter.type' .* must be 'lora', got 'cvec'"),
    "another architecture": (GOOD, {"general.architecture": "llama"}, "must be 'deepseek2', got 'llama'"),
    "activated": (GOOD, {"adapter.alora.invocation_tokens": [1, 2]}, "adapters act on all tokens here"),
    "alpha a text": (GOOD, {"adapter.lora.alpha": "6"}, "must be 0 or a float from 2.-64 to 2.64, got"),
    "alpha NaN": (GOOD, {"adapter.lora.alpha": float("nan")}, "must be 0 or a float .*, got nan"),
    "alpha negative": (GOOD, {"adapter.lora.alpha": -1.0}, "must be 0 or a float .*, got -1"),
    "alpha huge": (GOOD, {"adapter.lora.alpha": 3e38}, "must be 0 or a float .*, got 3"),
    "no tensors": ({}, {}, "must hold the tensors of an adapter"),
    "no such tensor": ({"blk.9.attn_output.weight": Adapter(a=A, b=B)}, {}, "must be a matrix that"),
    "an embedding": (
        {"token_embd.weight": Adapter(a=A, b=B)},
        {},
        "'token_embd.weight' must be a matrix that",
    ),
    "a norm": (
        {"blk.0.attn_norm.weight": Adapter(a=A, b=B)},
        {},
        "must be a matrix that this model multiplies by",
    ),
    "transposed": ({"blk.0.attn_output.weight": Adapter(a=A.T, b=B.T)}, {}, r"got \[64, 4\] and \[4, 64\]"),
    "experts in one": ({"blk.1.ffn_up_exps.weight": FLAT}, {}, r"a \[4, r, 64\] and b \[4, 32, r\]"),
    "no experts": ({"blk.0.ffn_up.weight": STACK}, {}, r"a \[r, 64\] and b \[96, r\]"),
    "not a number": (
        {"blk.0.attn_output.weight": Adapter(a=A, b=B * np.float32(np.nan))},
        {},
        r"'blk.0.attn_output.weight.lora_b' must be finite",
    ),
    "adapted twice": (
        {"blk.1.ffn_up_exps.weight": STACK}
        | {
            "blk.1.ffn_gate_up_exps.weight": Adapter(
                a=np.zeros((4, 2, 64), np.float32), b=np.zeros((4, 64, 2), np.float32)
            )
        },
        {},
        "are the same weight, adapted twice",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(model, case, tmp_path):
    adapters, keys, words = BAD_FILES[case]
    write_file(tmp_path / "a.gguf", adapters, keys)
    with pytest.raises(GGUFError, match=words) as caught:
        load(tmp_path / "a.gguf", model)
    check_sentence(caught.value, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "name, words",
    [
        ("blk.0.attn_output.weight", "must end in .lora_a or .lora_b"),
        ("blk.0.attn_output.weight.lora_a", "'blk.0.attn_output.weight.lora_b' is missing"),
        ("blk.0.attn_output.weight.lora_b", "'blk.0.attn_output.weight.lora_a' is missing"),
        ("blk.0.attn_norm.weight", "must end in .lora_a or .lora_b"),
    ],
)
def test_tensors_must_come_in_pairs(model, name, words, tmp_path):
    write_gguf(tmp_path / "a.gguf", ABOUT, [TensorData(name, A.shape, IDS["f32"], A)])
    with pytest.raises(GGUFError, match=words):
        load(tmp_path / "a.gguf", model)


def test_a_model_is_no_adapter(model):
    with pytest.raises(GGUFError, match=r"'general\.type' of an adapter must be 'adapter', got None"):
        load(model.path, model)


def test_a_cut_or_altered_file_is_read_or_refused(model, tmp_path):
    """Never anything else, for single bytes all over the file and for all that is before some byte."""
    write_file(tmp_path / "a.gguf", GOOD)
    whole, rng = (tmp_path / "a.gguf").read_bytes(), np.random.default_rng(0)
    changed = [whole[:size] for size in range(0, len(whole), 41)]
    for place in rng.integers(0, min(len(whole), 700), 150):
        changed.append(whole[:place] + bytes([rng.integers(256)]) + whole[place + 1 :])
    num_refused = 0
    for data in changed:
        (tmp_path / "b.gguf").write_bytes(data)
        try:
            load(tmp_path / "b.gguf", model)
        except GGUFError:
            num_refused += 1
    assert num_refused > len(changed) // 2


def test_an_adapter_of_what_the_model_lacks_is_refused(model, tmp_path):
    write_deepseek2(tmp_path / "other.gguf", layers=2, q_lora=False)
    other = checkpoints_tools.load_gguf(tmp_path / "other.gguf")
    lora = random_lora(model.params, targets=[r"attn_q_a\."])
    lora_files.save_lora(tmp_path / "a.gguf", lora, model.config)
    with pytest.raises(
        GGUFError, match=r"'blk\.0\.attn_q_a\.weight' must be a matrix that this model multiplies by"
    ):
        load(tmp_path / "a.gguf", other)
