"""A merged file is the model with its adapters, and all else of the file as it was."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from adapters import logits, random_lora, update
from interleaved import write_twins
from lora_pieces import write_file
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import GGUFError, lora_files, lora_merge, names, row_chunks
from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.load import read_weight
from mla_jax import lora as lora_lib
from mla_jax import quant
from mla_jax.lora import Adapter

TOKENS = np.arange(24) * 7 % 320


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "q8_0.gguf"
    write_deepseek2(path, layers=2, experts=4, used=2, weight_type="Q8_0", kv="both")
    return checkpoints_tools.load_gguf(path)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "a.gguf"
    lora = random_lora(model.params)
    lora_files.save_lora(path, lora, model.config)
    return path, lora


def decoded(file, name):
    return np.asarray(quant.decode(read_weight(file, name)), np.float64)


def test_a_merged_model_has_the_logits_of_the_adapted_one(model, adapter, tmp_path):
    path, lora = adapter
    lora_merge.merge(model.path, tmp_path / "out.gguf", [(path, 1.0)], type="f32")
    merged = checkpoints_tools.load_gguf(tmp_path / "out.gguf")
    expected = logits(lora_lib.attach(model.params, lora), model.config, TOKENS)
    assert np.abs(expected - logits(model.params, model.config, TOKENS)).max() > 0.3
    np.testing.assert_allclose(logits(merged.params, merged.config, TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("type_name", [None, "q4_K", "f16"])
def test_changed_weights_get_a_type_and_all_else_stays(model, adapter, type_name, tmp_path):
    lora = random_lora(model.params, targets=["attn_output", "ffn_up_exps", "ffn_gate_inp"])
    lora_files.save_lora(tmp_path / "a.gguf", lora, model.config)
    lora_merge.merge(model.path, tmp_path / "out.gguf", [(tmp_path / "a.gguf", 1.0)], type=type_name)
    before, after = open_gguf(model.path), open_gguf(tmp_path / "out.gguf")
    assert list(before.tensors) == list(after.tensors)
    added = {"general.quantization_version"} if type_name == "q4_K" else set()
    assert after.metadata.fields.keys() - before.metadata.fields.keys() == added
    assert {key: after.metadata.fields[key] for key in before.metadata.fields} == before.metadata.fields
    fitting = {None: "q8_0", "q4_K": "iq4_nl", "f16": "f16"}[type_name]  # rows of 64 are no blocks of q4_K
    for name, info in after.tensors.items():
        if name not in lora.adapters:
            assert after.read(name).tobytes() == before.read(name).tobytes()
        elif "ffn_gate_inp" in name:
            assert info.type_name == "f32"
        else:
            assert info.type_name == fitting and info.shape == before.tensors[name].shape


def test_both_forms_of_a_weight_are_changed(model, adapter, tmp_path):
    path, lora = adapter
    losses = lora_merge.merge(model.path, tmp_path / "out.gguf", [(path, 1.0)], type="f32")
    before, after, mla = open_gguf(model.path), open_gguf(tmp_path / "out.gguf"), model.config.mla
    assert {loss.name for loss in losses} > {f"blk.1.attn_{kind}.weight" for kind in ("kv_b", "k_b", "v_b")}
    change = {
        kind: decoded(after, f"blk.1.attn_{kind}.weight") - decoded(before, f"blk.1.attn_{kind}.weight")
        for kind in ("kv_b", "k_b", "v_b")
    }
    N, H, R = mla.num_heads, mla.qk_nope_head_dim, mla.kv_lora_rank
    whole = update(lora, "blk.1.attn_kv_b.weight").reshape(N, -1, R)
    np.testing.assert_allclose(change["kv_b"], whole.reshape(-1, R), atol=1e-5)
    np.testing.assert_allclose(change["k_b"], whole[:, :H].swapaxes(1, 2).reshape(-1, H), atol=1e-5)
    np.testing.assert_allclose(change["v_b"], whole[:, H:].reshape(-1, R), atol=1e-5)


def test_adapters_add_up_by_their_scales(model, adapter, tmp_path):
    other = random_lora(model.params, targets=["attn_output"], rank=3, seed=5)
    lora_files.save_lora(tmp_path / "folder", other, model.config)
    sources = [(adapter[0], 0.5), (tmp_path / "folder", -2.0)]
    lora_merge.merge(model.path, tmp_path / "out.gguf", sources, type="f32")
    before, after = open_gguf(model.path), open_gguf(tmp_path / "out.gguf")
    for name in other.adapters:
        expected = decoded(before, name) + 0.5 * update(adapter[1], name) - 2 * update(other, name)
        np.testing.assert_allclose(decoded(after, name), expected, atol=1e-5)


def test_losses_are_what_encoding_costs(model, adapter, tmp_path):
    path, lora = adapter
    losses = {loss.name: loss for loss in lora_merge.merge(model.path, tmp_path / "out.gguf", [(path, 1.0)])}
    before, after = open_gguf(model.path), open_gguf(tmp_path / "out.gguf")
    for name in lora.adapters:
        added = update(lora, name).reshape(-1, after.tensors[name].shape[-1])
        wanted = decoded(before, name) + added
        error = np.linalg.norm(decoded(after, name) - wanted)
        assert math.isclose(losses[name].error, error / np.linalg.norm(wanted), rel_tol=1e-3)
        assert math.isclose(losses[name].share, error / np.linalg.norm(added), rel_tol=1e-3)
        assert losses[name].type_name == "q8_0" and 0.001 < losses[name].error < 0.01
    assert lora_merge.table(list(losses.values())).count("\n") == len(losses)


def test_rows_are_merged_chunk_by_chunk(model, adapter, tmp_path, monkeypatch):
    lora_merge.merge(model.path, tmp_path / "one.gguf", [(adapter[0], 1.0)])
    monkeypatch.setattr(row_chunks, "CHUNK_WEIGHTS", 48 * 64)  # rows of an expert and a half
    lora_merge.merge(model.path, tmp_path / "many.gguf", [(adapter[0], 1.0)])
    assert (tmp_path / "many.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_interleaved_rows_stay_interleaved(tmp_path):
    chosen = write_twins(tmp_path)
    kinds = ("q8_0_r8", "bf16_r16", "iq4_ks_r4")  # blocks, plain numbers, and rows with a header
    encodable = [next(name for name, kind in chosen.items() if kind == wanted) for wanted in kinds]
    packed = checkpoints_tools.load_gguf(tmp_path / "packed.gguf")
    targets = [f"^{re.escape(name)}$" for name in encodable]
    lora = random_lora(packed.params, targets=targets, rank=8)
    lora_files.save_lora(tmp_path / "a.gguf", lora, packed.config)
    found = {}
    for kind in ("packed", "single"):
        out = tmp_path / f"merged-{kind}.gguf"
        lora_merge.merge(tmp_path / f"{kind}.gguf", out, [(tmp_path / "a.gguf", 1.0)])
        found[kind] = open_gguf(out)
    for name in lora.adapters:
        assert (
            found["packed"].tensors[name].type_name == chosen[name] != found["single"].tensors[name].type_name
        )
        np.testing.assert_array_equal(decoded(found["packed"], name), decoded(found["single"], name))


def test_a_type_that_nothing_encodes_is_asked_for(tmp_path):
    chosen = write_twins(tmp_path)
    packed = checkpoints_tools.load_gguf(tmp_path / "packed.gguf")
    file = open_gguf(tmp_path / "packed.gguf")
    name = next(
        name for name, kind in chosen.items() if kind.startswith("iq2") and name in packed.file_tensors
    )
    lora = random_lora(packed.params, targets=[f"^{re.escape(name)}$"])
    lora_files.save_lora(tmp_path / "a.gguf", lora, packed.config)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*has type iq2.*\(--type\)"):
        lora_merge.merge(file.path, tmp_path / "out.gguf", [(tmp_path / "a.gguf", 1.0)])
    assert not (tmp_path / "out.gguf").exists()
    lora_merge.merge(file.path, tmp_path / "out.gguf", [(tmp_path / "a.gguf", 1.0)], type="q8_0")
    assert open_gguf(tmp_path / "out.gguf").tensors[name].type_name == "q8_0"


def test_what_is_beyond_a_type_is_refused_and_nothing_is_left(model, tmp_path):
    shape = names.flatten(model.params)["output.weight"].shape
    big = Adapter(a=np.full((4, shape[1]), 1e10, np.float32), b=np.full((shape[0], 4), 1e10, np.float32))
    write_file(tmp_path / "a.gguf", {"output.weight": big})
    with pytest.raises(
        GGUFError, match=r"tensor 'output\.weight', rows 0 to 319: every value must be finite"
    ):
        lora_merge.merge(model.path, tmp_path / "out.gguf", [(tmp_path / "a.gguf", 1.0)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_a_file_may_be_merged_into_itself(adapter, tmp_path):
    write_deepseek2(tmp_path / "a.gguf", layers=2, experts=4, used=2, weight_type="Q8_0", kv="both")
    lora_merge.merge(tmp_path / "a.gguf", tmp_path / "out.gguf", [(adapter[0], 1.0)])
    lora_merge.merge(tmp_path / "a.gguf", tmp_path / "a.gguf", [(adapter[0], 1.0)])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize("scale", [math.inf, 1e300, -1e39])
def test_a_scale_beyond_float32_is_refused(model, adapter, scale):
    with pytest.raises(ValueError, match=r"the scale of an adapter must .*finite, got "):
        lora_merge.plan(model.path, [(adapter[0], scale)])


def test_without_adapters_there_is_nothing_to_merge(model):
    with pytest.raises(ValueError, match="adapters must be at least one, got none"):
        lora_merge.plan(model.path, [])


def test_the_core_merges_to_the_same_weights(model, adapter, tmp_path):
    path, lora = adapter
    lora_merge.merge(model.path, tmp_path / "out.gguf", [(path, 1.0)])
    found = names.flatten(checkpoints_tools.load_gguf(tmp_path / "out.gguf").params)
    expected = names.flatten(lora_lib.merge(model.params, lora))
    for name in lora.adapters:
        close = np.abs(quant.decode(found[name]) - quant.decode(expected[name])) < 1e-6
        assert jnp.mean(close) > 0.99  # sums that round to either side of a code
