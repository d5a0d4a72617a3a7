"""Requantising: which tensor gets which type, what is refused, and that the model stays what it was."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import interleave, row_chunks
from checkpoints_tools import recipe as recipe_lib
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_file import GGUFError, open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.quantize import plan, quantize
from checkpoints_tools.recipe import Recipe, fitting
from checkpoints_tools.split import split
from mla_jax import RunConfig, apply, quant

WIDE = dict(embed=256, q_lora=256, kv_lora=256, nope=128, v=128, ff=256, ff_exp=256)  # most rows of 256
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "f32.gguf"
    write_deepseek2(path, sizes=WIDE, layers=2, experts=4, used=2, kv="k_b_v_b")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file with rows of 32, 64 and 96."""
    path = tmp_path_factory.mktemp("small") / "f32.gguf"
    write_deepseek2(path, layers=2)
    return path


def _types(chosen):
    return {row.name: row.new for row in chosen.rows}


def _bytes(path):
    file = open_gguf(path)
    return {name: file.read(name).tobytes() for name in file.tensors}


def test_matrices_get_the_type_and_all_else_stays(small):
    types = _types(plan(small, type="q8_0"))
    kept = {name for name, type_name in types.items() if type_name == "f32"}
    assert kept == {name for name in types if re.search(r"_norm\.|ffn_gate_inp|\.bias$", name)}
    assert {type_name for name, type_name in types.items() if name not in kept} == {"q8_0"}


@pytest.mark.parametrize("spelling", ["Q8_0", "q8_0", "q8_0 "[:-1].upper()])
def test_types_in_any_case(small, spelling):
    assert _types(plan(small, type=spelling))["output.weight"] == "q8_0"


def test_every_type_has_its_own_spelling():
    assert len({name.lower() for name in quant.ENCODABLE}) == len(quant.ENCODABLE)
    assert [Recipe.of(name.upper()).type_name for name in quant.ENCODABLE] == list(quant.ENCODABLE)


@pytest.mark.parametrize(
    "custom, expected",
    [
        (["ffn_down=f16", "blk=bf16"], dict(down="f16", up="bf16", output="q8_0")),
        (["blk=bf16", "ffn_down=f16"], dict(down="bf16", up="bf16", output="q8_0")),
        (["ffn_down=F16,blk=BF16"], dict(down="f16", up="bf16", output="q8_0")),
        ([r"blk\.\d{1,2}\.ffn_(up|down)=f16,output=f32"], dict(down="f16", up="f16", output="f32")),
        ([r" ^output\.weight$ = f16 , x=f32,"], dict(down="q8_0", up="q8_0", output="f16")),
        (["a=b=f16", r"ffn_up\.weight$=f16"], dict(down="q8_0", up="f16", output="q8_0")),
        (["ffn_gate_inp=f16,_norm=f16,bias=f16"], dict(down="q8_0", up="q8_0", output="q8_0")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_first_rule_that_fits_a_name_counts(small, custom, expected):
    types = _types(plan(small, type="q8_0", custom=custom))
    names = dict(down="blk.0.ffn_down.weight", up="blk.0.ffn_up.weight", output="output.weight")
    assert {part: types[name] for part, name in names.items()} == expected
    assert {types[name] for name in types if re.search(r"_norm\.|ffn_gate_inp|\.bias$", name)} == {"f32"}


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(type="q9"), "type must be one of f32, f16, bf16, .*, Q4_K_S, Q4_K_M, .*, got 'q9'."),
        (dict(type="q8_K"), "type must be one of .*, got 'q8_K'."),
        (dict(type=""), "type must be one of .*, got ''."),
        (dict(custom=["ffn=q9"]), "the type of custom rule 'ffn' must be one of .*, got 'q9'."),
        (dict(custom=["ffn"]), "a custom rule must be REGEX=TYPE, got 'ffn'."),
        (dict(custom=["a=f16,b"]), "a custom rule must be REGEX=TYPE, got 'b'."),
        (dict(custom=["=f16"]), "a custom rule must be REGEX=TYPE, got '=f16'."),
        (dict(custom=["(=f16"]), r"a custom rule must begin with a regular expression, got '\(': missing \)"),
    ],
    ids=str,
)
def test_types_and_rules_that_cannot_be_read(small, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(small, **dict(type="q8_0") | settings)


def test_a_rule_without_a_tensor_is_told(small):
    assert (
        "no weight has the pattern 'ffn_dwon' in its name"
        in plan(small, type="q8_0", custom=["ffn_dwon=f16,ffn_up=f16"]).summary()
    )


# Bits a weight of these types: q4_K 4.5, iq4_nl 4.5, q5_K 5.5, q5_0 5.5, q6_K 6.5625, q6_0 6.5, q8_0 8.5.
@pytest.mark.parametrize(
    "wanted, row_size, expected",
    [
        ("q4_K", 512, "q4_K"),
        ("q4_K", 128, "iq4_nl"),
        ("q2_K", 96, "iq4_nl"),
        ("q5_K", 96, "q5_0"),
        ("q6_K", 320, "q8_0"),
        ("q4_K", 48, "f16"),
        ("q8_0", 40, "f16"),
        ("f32", 3, "f32"),
    ],
)
def test_rows_that_do_not_fit_get_a_type_of_as_many_bits(monkeypatch, wanted, row_size, expected):
    monkeypatch.setattr(quant, "ENCODABLE", ("q4_0", "iq4_nl", "q5_0", "q6_0", "q8_0", "f16"))
    assert fitting(wanted, row_size) == expected


def test_a_fallback_without_an_encoder_is_passed_over(monkeypatch):
    monkeypatch.setattr(quant, "ENCODABLE", ("q4_K", "q8_0", "f16"))
    assert fitting("q4_K", 128) == "q8_0"


def test_fallbacks_are_told(small, monkeypatch):
    monkeypatch.setattr(quant, "ENCODABLE", ("q4_K", "q8_0", "f16"))
    chosen = plan(small, type="q4_K")
    odd = [row for row in chosen.rows if row.wanted == "q4_K"]
    assert all(row.is_misfit and row.new == "q8_0" for row in odd)
    assert "because their rows are no whole number of blocks of q4_K" in chosen.summary()
    assert chosen.table().count("rows do not fit q4_K") == len(odd) == 21


@pytest.mark.parametrize(
    "type_name, even", [("Q4_K_S", "q4_K"), ("q4_k_m", "q6_K"), ("Q5_K_S", "q5_K"), ("Q5_K_M", "q6_K")]
)
def test_mixtures(source, type_name, even):
    base = type_name[:3].lower() + "K"
    types = _types(plan(source, type=type_name, custom=["token_embd=f16"]))
    assert types["output.weight"] == "q6_K" and types["token_embd.weight"] == "f16"
    assert types["blk.0.ffn_down.weight"] == types["blk.0.attn_v_b.weight"] == even
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.1.attn_v_b.weight"] == base
    assert types["blk.0.ffn_up.weight"] == types["blk.0.attn_q_b.weight"] == base
    assert _types(plan(source, type=type_name, custom=["^output=f16"]))["output.weight"] == "f16"


def test_even_layers_of_two_digits_count():
    wanted = Recipe.of("Q4_K_M").wanted
    assert wanted("blk.10.ffn_down_exps.weight") == wanted("blk.8.attn_kv_b.weight") == "q6_K"
    assert wanted("blk.21.ffn_down_exps.weight") == wanted("blk.20.ffn_up.weight") == "q4_K"


def test_all_tensors_of_a_kept_type_give_the_same_file(small, tmp_path):
    chosen = quantize(small, tmp_path / "copy.gguf", type="f32")
    assert (tmp_path / "copy.gguf").read_bytes() == small.read_bytes()
    assert all(row.is_copied for row in chosen.rows)


def test_what_has_its_type_is_copied_and_what_is_quantised_is_refused(tmp_path):
    path, out = tmp_path / "q8_0.gguf", tmp_path / "out.gguf"
    write_deepseek2(path, weight_type="Q8_0")
    quantize(path, out, type="q8_0", custom=["^output=f32"])
    before, after = _bytes(path), _bytes(out)
    assert {name for name in before if before[name] != after[name]} == {"output.weight"}
    out.write_text("old")
    with pytest.raises(ValueError, match=r"'token_embd.weight' is quantised already, as q8_0: making it f16"):
        quantize(path, out, type="f16")
    assert out.read_text() == "old"
    chosen = quantize(path, out, type="f16", allow_requantize=True)
    assert open_gguf(out).tensors["output.weight"].type_name == _types(chosen)["output.weight"] == "f16"
    decoded = checkpoints_tools.load_gguf(path).params["output"]["weight"]
    np.testing.assert_array_equal(
        checkpoints_tools.load_gguf(out).params["output"]["weight"], quant.decode(decoded, jnp.float16)
    )


def test_interleaved_rows_are_taken_apart_without_loss(source, tmp_path, monkeypatch):
    monkeypatch.setattr(quant, "ENCODABLE", ("f32", "iq4_k"))  # there need be no encoder
    path, out, rng = tmp_path / "rows.gguf", tmp_path / "out.gguf", np.random.default_rng(0)
    file, tensors, single = open_gguf(source), [], {}
    for name, info in file.tensors.items():
        data, kind = file.read(name), "f32"
        if recipe_lib.is_weight_matrix(info) and info.shape[-1] % 256 == 0:
            num_rows, row_bytes = math.prod(info.shape[:-1]), TYPES[IDS["iq4_k"]].row_bytes(info.shape[-1])
            single[name] = rng.integers(0, 256, (num_rows, row_bytes), np.uint8)
            data, kind = interleave.interleave("iq4_k_r4", single[name], info.shape[-1]), "iq4_k_r4"
        tensors.append(TensorData(name, info.shape, IDS[kind], data))
    write_gguf(path, file.metadata, tensors)
    monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", 48 * 256)
    quantize(path, out, type="f32", custom=[f"^{re.escape(name)}$=iq4_k" for name in single])
    assert len(single) > 10
    for name, rows in single.items():
        assert open_gguf(out).tensors[name].type_name == "iq4_k"
        assert _bytes(out)[name] == rows.tobytes()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is quantised already, as iq4_k_r4: making it bf16"):
        plan(path, type="bf16")


def test_keys_say_what_was_done(small, tmp_path):
    path, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    stale = {"general.file_type": 0, "quantize.imatrix.file": "old", "general.quantization_version": 1}
    write_deepseek2(path, metadata=stale)
    quantize(path, out, type="q8_0")
    before, after = open_gguf(path).metadata, open_gguf(out).metadata
    assert after["general.file_type"] == 7 and after["general.quantization_version"] == 2
    assert list(after) == [key for key in before if key != "quantize.imatrix.file"]
    changed = {key for key in after if after.fields[key] != before.fields[key]}
    assert changed == {"general.file_type", "general.quantization_version"}
    quantize(small, out, type="bf16")
    assert open_gguf(out).metadata["general.file_type"] == 32
    assert "general.quantization_version" not in open_gguf(out).metadata


def test_every_type_has_a_number_for_the_key():
    assert [name for name in quant.ENCODABLE if Recipe.of(name).file_type is None] == []


def test_the_input_may_be_the_output(small, tmp_path):
    path, apart = tmp_path / "model.gguf", tmp_path / "apart.gguf"
    path.write_bytes(small.read_bytes())
    quantize(path, apart, type="q8_0")
    quantize(path, path, type="q8_0")
    assert path.read_bytes() == apart.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["apart.gguf", "model.gguf"]


def test_a_split_file_becomes_one(small, tmp_path):
    parts = split(small, tmp_path / "part", max_tensors=9)
    quantize(parts[0], tmp_path / "joined.gguf", type="q8_0")
    quantize(small, tmp_path / "whole.gguf", type="q8_0")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_chunks_do_not_show(source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "whole.gguf", type="q8_0")
    monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", 48 * 256)
    calls = []
    quantize(source, tmp_path / "chunks.gguf", type="q8_0", progress=lambda *call: calls.append(call))
    assert (tmp_path / "chunks.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    infos = open_gguf(source).tensors.values()
    total = sum(info.num_bytes for info in infos)
    assert calls[-1] == (len(infos), len(infos), total, total) and len(calls) > 4 * len(infos)
    assert [call[2] for call in calls] == sorted(call[2] for call in calls)
    assert sum(call[0] == len(infos) for call in calls) == 1


def test_a_value_that_is_not_finite_names_its_tensor(small, tmp_path):
    file = open_gguf(small)
    tensors = []
    for name, info in file.tensors.items():
        data = file.read(name).view(np.float32).copy()
        data[-1] = np.nan if name == "blk.1.attn_output.weight" else data[-1]
        tensors.append(TensorData(name, info.shape, info.ggml_type, data))
    write_gguf(tmp_path / "nan.gguf", file.metadata, tensors)
    with pytest.raises(GGUFError, match=r"nan.gguf: tensor 'blk.1.attn_output.weight', rows 0 to 63: every"):
        quantize(tmp_path / "nan.gguf", tmp_path / "out.gguf", type="q8_0")
    assert [entry.name for entry in tmp_path.iterdir()] == ["nan.gguf"]


def _write_imatrix(path, means):
    """Writes means over 4 tokens by name: [size], or [experts, size]."""
    tensors = []
    for name, mean in means.items():
        sums = np.float32(4 * mean)
        counts = np.full((*sums.shape[:-1], 1), 4, np.float32)
        for end, array in ((".in_sum2", sums), (".counts", counts)):
            tensors.append(TensorData(name + end, array.shape, IDS["f32"], array))
    write_gguf(path, {"general.type": "imatrix"}, tensors)


def test_importance_reaches_each_row(source, tmp_path, monkeypatch):
    """As if tensors were encoded whole: rows of chunks and experts get the numbers of their columns."""
    monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", 48 * 256)
    rng, out = np.random.default_rng(0), tmp_path / "out.gguf"
    matrix, experts = "blk.0.ffn_up.weight", "blk.1.ffn_up_exps.weight"
    means = {matrix: rng.exponential(size=256) ** 4, experts: rng.exponential(size=(4, 256)) ** 4}
    means["blk.9.ffn_up.weight"] = means[matrix]
    _write_imatrix(tmp_path / "imatrix.gguf", means)
    chosen = quantize(source, out, type="q4_K", imatrix=tmp_path / "imatrix.gguf")
    assert "2 of the 23 encoded tensors have an importance" in chosen.summary()
    assert open_gguf(out).metadata["quantize.imatrix.file"] == "imatrix.gguf"
    assert open_gguf(out).metadata["quantize.imatrix.entries_count"] == 3
    for name, importance in ((matrix, means[matrix]), (experts, means[experts][:, None])):
        info = open_gguf(source).tensors[name]
        values = open_gguf(source).read(name).view(np.float32).reshape(info.shape)
        expected = quant.encode(values, "q4_K", np.float32(importance)).blocks.tobytes()
        assert _bytes(out)[name] == expected != quant.encode(values, "q4_K").blocks.tobytes()


def test_importance_of_another_model_is_refused(source, tmp_path):
    _write_imatrix(tmp_path / "imatrix.gguf", {"output.weight": np.ones(128)})
    settings = dict(type="q4_K", imatrix=tmp_path / "imatrix.gguf")
    with pytest.raises(ValueError, match=r"of 'output.weight' must fit its shape \(320, 256\), got \(128,\)"):
        quantize(source, tmp_path / "out.gguf", **settings)
    assert "0 of the 22 encoded" in plan(source, custom=["^output=f32"], **settings).summary()


def test_totals(small, tmp_path):
    chosen = quantize(small, tmp_path / "out.gguf", type="q8_0")
    file = open_gguf(tmp_path / "out.gguf")
    num_bytes = sum(info.num_bytes for info in file.tensors.values())
    num_weights = sum(math.prod(info.shape) for info in file.tensors.values())
    assert sum(row.num_bytes(row.new) for row in chosen.rows) == num_bytes
    assert (
        f"become {num_bytes:,}, 32.00 bits per weight become {8 * num_bytes / num_weights:.2f}"
        in chosen.summary()
    )


def _logits(path):
    """Returns the logits of a model, its weights decoded first so that all types share one compilation."""
    checkpoint = checkpoints_tools.load_gguf(path)
    is_weight = lambda leaf: isinstance(leaf, quant.QuantizedTensor)
    params = jax.tree.map(_decode, checkpoint.params, is_leaf=is_weight)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 300, NUM_TOKENS)[None], jnp.int32)
    return np.asarray(_apply(params, tokens, None, checkpoint.config, RunConfig())[0][0])


_decode = jax.jit(quant.decode)
_apply = jax.jit(apply, static_argnums=(3, 4))


@pytest.fixture(scope="module")
def logits(source):
    return _logits(source)


@pytest.mark.parametrize("type_name", quant.ENCODABLE)
def test_a_model_in_another_type_says_about_the_same(source, logits, tmp_path, type_name):
    quantize(source, tmp_path / "out.gguf", type=type_name)
    error = np.linalg.norm(_logits(tmp_path / "out.gguf") - logits) / np.linalg.norm(logits)
    entry = TYPES[IDS[type_name]]
    bits = {"f32": np.inf, "f16": 11, "bf16": 8}.get(type_name, 8 * entry.block_bytes / entry.block_size)
    print(f"{type_name}: {bits} bits, {error:.2e}")
    assert error <= min(0.8, 10 * 2.0**-bits)  # of unrelated logits it is 1.4
