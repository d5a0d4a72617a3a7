"""Adapters are in files what they are in memory, whatever form the model has its weights in."""

import json
import re

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapters import logits, random_lora, update
from lora_pieces import O_PROJ, factors, load, o_proj, write_file, write_folder
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import lora_files, lora_forms, lora_peft, names
from mla_jax import lora as lora_lib
from mla_jax.lora import Adapter, Lora

FORMS = {
    "kv_b": dict(),
    "k_b and v_b": dict(kv="k_b_v_b"),
    "both": dict(kv="both"),
    "gate_up": dict(merged=True, kv="k_b_v_b_2d"),
    "without q_lora": dict(q_lora=False, gating="softmax"),
}
TOKENS = np.arange(24) * 7 % 320


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights in every form."""
    found = {}
    for index, (name, options) in enumerate(FORMS.items()):
        path = tmp_path_factory.mktemp("models") / f"{index}.gguf"
        write_deepseek2(path, layers=2, experts=4, used=2, **options)
        found[name] = checkpoints_tools.load_gguf(path)
    return found


@pytest.fixture(scope="module")
def model(models):
    return models["kv_b"]


def back(path, lora, model):
    lora_files.save_lora(path, lora, model.config)
    return load(path, model)


def assert_same_updates(found, expected):
    assert found.adapters.keys() == expected.adapters.keys()
    for name in expected.adapters:
        np.testing.assert_allclose(update(found, name), update(expected, name), rtol=1e-5, atol=1e-6)


each_format = pytest.mark.parametrize("path", ["a.gguf", "folder"])


@each_format
@pytest.mark.parametrize("form", FORMS)
def test_a_file_gives_back_what_was_saved(models, form, path, tmp_path):
    lora = random_lora(models[form].params)
    found = back(tmp_path / path, lora, models[form])
    assert found.alpha == lora.alpha
    assert_same_updates(found, lora)


@each_format
def test_ranks_may_be_odd_and_of_many_kinds(model, path, tmp_path):
    parts = random_lora(model.params, targets=["attn_q_a.weight"], rank=3).adapters
    parts |= random_lora(model.params, targets=["ffn_down"], rank=5).adapters
    lora = Lora(adapters=parts, alpha=2.5)
    assert_same_updates(back(tmp_path / path, lora, model), lora)


@each_format
@pytest.mark.parametrize("target", ["k_b and v_b", "both", "gate_up"])
def test_an_adapter_fits_the_same_model_in_another_form(models, target, path, tmp_path):
    """All models have the same weights, so an adapter makes the same model of each."""
    source, other = models["kv_b"], models[target]
    lora = random_lora(source.params)
    expected = logits(lora_lib.attach(source.params, lora), source.config, TOKENS)
    plain = logits(source.params, source.config, TOKENS)
    assert np.abs(expected - plain).max() > 0.3
    lora_files.save_lora(tmp_path / path, lora, source.config)
    params = lora_lib.attach(other.params, load(tmp_path / path, other))
    np.testing.assert_allclose(logits(params, other.config, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["k_b and v_b", "gate_up"])
def test_an_adapter_goes_back_to_the_published_form(models, form, tmp_path):
    lora = random_lora(models[form].params)
    expected = logits(lora_lib.attach(models[form].params, lora), models[form].config, TOKENS)
    lora_files.save_lora(tmp_path / "folder", lora, models[form].config)
    found = load(tmp_path / "folder", models["kv_b"])
    params = lora_lib.attach(models["kv_b"].params, found)
    np.testing.assert_allclose(logits(params, models["kv_b"].config, TOKENS), expected, atol=1e-5)


def host(lora):
    return {name: Adapter(a=np.asarray(part.a), b=np.asarray(part.b)) for name, part in lora.adapters.items()}


def kv_b_of(key, value, mla):
    """Returns the update of kv_b of those of k_b [N, R, H] and v_b [N, V, R], by the definition."""
    N, H, V, R = mla.num_heads, mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
    whole = np.zeros((N, H + V, R))
    for head in range(N):
        whole[head, :H] = 0 if key is None else key[head].T
        whole[head, H:] = 0 if value is None else value[head]
    return whole.reshape(-1, R)


@pytest.mark.parametrize(
    "ranks", [(2, 3), (None, 3), (2, None), (9, 9)], ids=["two", "values", "keys", "more than R"]
)
def test_heads_with_factors_of_their_own_are_joined(models, ranks):
    model, mla = models["k_b and v_b"], models["k_b and v_b"].config.mla
    adapters, parts = {}, []
    for kind, rank in zip(("k_b", "v_b"), ranks, strict=True):
        lora = random_lora(model.params, targets=[rf"blk\.1\.attn_{kind}"], rank=rank or 1)
        parts.append(None if rank is None else update(lora, f"blk.1.attn_{kind}.weight"))
        adapters |= host(lora) if rank is not None else {}
    fitted = lora_forms.fit(adapters, model.config, ["blk.1.attn_kv_b.weight"])
    found = Lora(adapters=fitted, alpha=6.0)
    (name,) = fitted
    assert fitted[name].rank == min(mla.kv_lora_rank, mla.num_heads * sum(rank or 0 for rank in ranks))
    np.testing.assert_allclose(update(found, name), kv_b_of(*parts, mla), atol=1e-6)


def test_heads_that_share_factors_are_joined_to_the_adapter_that_they_came_from(model):
    lora = random_lora(model.params, targets=[r"blk\.0\.attn_kv_b"], rank=3)
    split = lora_forms.fit(host(lora), model.config, ["blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"])
    assert [part.a.shape for part in split.values()] == [(2, 3, 32), (2, 3, 32)]
    (name,) = joined = lora_forms.fit(split, model.config, ["blk.0.attn_kv_b.weight"])
    np.testing.assert_array_equal(joined[name].a, lora.adapters[name].a)
    np.testing.assert_array_equal(joined[name].b, lora.adapters[name].b)


@pytest.mark.parametrize("part", ["gate", "up"])
def test_gate_or_up_alone(models, part):
    model, other = models["kv_b"], models["gate_up"]
    lora = random_lora(model.params, targets=[f"ffn_{part}_exps"])
    fitted = lora_forms.fit(host(lora), model.config, names.flatten(other.params))
    found = update(Lora(adapters=fitted, alpha=lora.alpha), "blk.1.ffn_gate_up_exps.weight")
    expected, width = update(lora, f"blk.1.ffn_{part}_exps.weight"), found.shape[1] // 2
    own, rest = (slice(width), slice(width, None)) if part == "gate" else (slice(width, None), slice(width))
    np.testing.assert_allclose(found[:, own], expected, atol=1e-7)
    assert not found[:, rest].any()


def test_a_weight_in_two_forms_gets_its_update_in_both(models):
    lora = random_lora(models["both"].params, targets=["attn_kv_b"])
    fitted = lora_forms.fit(host(lora), models["both"].config, models["both"].file_tensors)
    found = Lora(adapters=fitted, alpha=lora.alpha)
    assert len(fitted) == 6
    for block in ("blk.0.", "blk.1."):
        parts = (update(found, f"{block}attn_{kind}.weight") for kind in ("k_b", "v_b"))
        whole = kv_b_of(*parts, models["both"].config.mla)
        np.testing.assert_allclose(whole, update(lora, f"{block}attn_kv_b.weight"), atol=1e-6)


def test_an_adapter_of_no_tensor_at_hand_is_refused(model):
    lora = random_lora(model.params, targets=["attn_kv_b"])
    with pytest.raises(ValueError, match=r"the model must have a tensor 'blk\.1\.attn_kv_b\.weight'"):
        lora_forms.fit(host(lora), model.config, ["blk.0.attn_kv_b.weight", "blk.1.attn_output.weight"])


def test_a_gguf_file_is_one_for_other_readers(models, tmp_path):
    lora = random_lora(models["k_b and v_b"].params)
    lora_files.save_lora(tmp_path / "some.gguf", lora, models["k_b and v_b"].config)
    reader = gguf.GGUFReader(tmp_path / "some.gguf")
    about = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert about == {
        "general.architecture": "deepseek2",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": "some",
        "general.alignment": 64,
        "adapter.lora.alpha": 6.0,
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * len(lora.adapters)
    for name in lora.adapters:
        a, b = (np.asarray(tensors[name + part], np.float64) for part in (".lora_a", ".lora_b"))
        assert a.shape[-2] % 8 == 0
        np.testing.assert_allclose(6.0 / a.shape[-2] * b @ a, update(lora, name), atol=1e-6)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_gguf_file_may_have_fewer_bits(model, kind, tmp_path):
    lora = random_lora(model.params, targets=["attn_output"], rank=32)
    write_file(tmp_path / "a.gguf", lora.adapters, kind=kind)
    found = load(tmp_path / "a.gguf", model)
    for name in lora.adapters:
        np.testing.assert_allclose(update(found, name), update(lora, name), atol=1e-2)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_factors_are_scaled_already(model, alpha, tmp_path):
    lora = random_lora(model.params, targets=["attn_output"], rank=3)
    write_file(tmp_path / "a.gguf", lora.adapters, {"adapter.lora.alpha": alpha})
    found = load(tmp_path / "a.gguf", model)
    for name, adapter in lora.adapters.items():
        np.testing.assert_allclose(update(found, name), np.asarray(adapter.b @ adapter.a), atol=1e-6)


def test_a_folder_has_the_modules_of_transformers(model, tmp_path):
    lora = random_lora(model.params)
    lora_files.save_lora(tmp_path / "folder", lora, model.config)
    tensors = safetensors.numpy.load_file(tmp_path / "folder" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 6.0)
    words = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj lm_head"
    assert set(settings["target_modules"]) == set(words.split()) and settings["rank_pattern"] == {}
    prefix = "base_model.model."
    for module, name, index in [
        ("lm_head", "output.weight", ()),
        ("model.layers.0.self_attn.kv_b_proj", "blk.0.attn_kv_b.weight", ()),
        ("model.layers.0.mlp.gate_proj", "blk.0.ffn_gate.weight", ()),
        ("model.layers.1.mlp.shared_experts.up_proj", "blk.1.ffn_up_shexp.weight", ()),
        ("model.layers.1.mlp.experts.3.down_proj", "blk.1.ffn_down_exps.weight", 3),
    ]:
        a, b = (tensors.pop(f"{prefix}{module}.{part}.weight") for part in ("lora_A", "lora_B"))
        np.testing.assert_allclose(6.0 / 4 * b @ a, update(lora, name)[index], atol=1e-6)
    assert all(
        re.fullmatch(rf"{re.escape(prefix)}model\.layers\.[01]\..+\.lora_[AB]\.weight", n) for n in tensors
    )


def test_modules_are_listed_one_by_one_where_words_would_find_more(model, tmp_path):
    parts = random_lora(model.params, targets=[r"attn_q_a\.", r"blk\.1\.attn_output"]).adapters
    parts |= random_lora(model.params, targets=[r"blk\.1\.ffn_up_exps"], rank=2).adapters
    lora = Lora(adapters=parts, alpha=6.0)
    assert_same_updates(back(tmp_path / "folder", lora, model), lora)
    settings = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    experts = [f"model.layers.1.mlp.experts.{index}.up_proj" for index in range(4)]
    assert set(settings["target_modules"]) == {"q_a_proj", "model.layers.1.self_attn.o_proj", *experts}
    one, other = settings["r"], {2: 4, 4: 2}[settings["r"]]
    of_other = [name for name in settings["target_modules"] if ("expert" in name) == (other == 2)]
    assert one in (2, 4) and set(settings["rank_pattern"].values()) == {other}
    assert len(settings["rank_pattern"]) >= len(of_other)


@pytest.mark.parametrize(
    "settings, scale",
    [
        (dict(), 6 / 4),
        (dict(use_rslora=True), 6 / 2),
        (dict(alpha_pattern={"o_proj": 10}), 10 / 4),
        (dict(alpha_pattern={"layers.0.self_attn.o_proj": 10, "o_proj": 3}), 10 / 4),
        (dict(alpha_pattern={".*\\.o_proj": 10}), 10 / 4),
        (dict(alpha_pattern={"^" + O_PROJ + "$": 10}, use_rslora=True), 10 / 2),
        (dict(alpha_pattern={"proj": 10, "q_proj": 5}), 6 / 4),
        (dict(use_dora=False, bias="none", modules_to_save=None, alpha_pattern=None, lora_alpha=6.0), 6 / 4),
        (dict(r=64), 6 / 4),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=lambda dtype: dtype.__name__)
def test_scales_are_those_of_peft(model, settings, scale, dtype, tmp_path):
    a, b = o_proj(dtype=dtype)
    found = load(write_folder(tmp_path / "folder", factors(O_PROJ, a, b), **settings), model)
    assert list(found.adapters) == ["blk.0.attn_output.weight"]
    expected = scale * b.astype(np.float64) @ a.astype(np.float64)
    np.testing.assert_allclose(update(found, "blk.0.attn_output.weight"), expected, rtol=1e-5, atol=1e-5)


def test_experts_without_an_adapter_stay_as_they_are(model, tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 64)).astype(np.float32), rng.standard_normal((32, 2)).astype(np.float32)
    tensors = factors("model.layers.1.mlp.experts.2.gate_proj", a, b)
    found = update(load(write_folder(tmp_path / "folder", tensors), model), "blk.1.ffn_gate_exps.weight")
    np.testing.assert_allclose(found[2], 6 / 2 * b @ a, atol=1e-5)
    assert found.shape[0] == 4 and not found[[0, 1, 3]].any()


def test_stacks_of_experts_are_read_as_transformers_5_has_them(model, tmp_path):
    """PEFT adds einsum("ore,eri->eoi") of lora_B as [out, r, E] and lora_A as [E, r, in] to a stack."""
    rng, tensors = np.random.default_rng(0), {}
    module, expected = "model.layers.1.mlp.experts", {}
    shapes = {"gate_up": (f"{module}.base_layer", 4, 64, 64), "down": (module, 3, 64, 32)}
    for kind, (name, rank, out, width) in shapes.items():
        a = rng.standard_normal((4 * rank, width)).astype(np.float32)
        b = rng.standard_normal((out, rank * 4)).astype(np.float32)
        tensors |= factors(name, a, b)
        alpha = 20 if kind == "gate_up" else 6
        by_expert = np.einsum("ore,eri->eoi", b.reshape(out, rank, 4), a.reshape(4, rank, width))
        expected[kind] = alpha / rank * by_expert
    pattern = {".*\\.gate_up_proj": 20}
    found = load(write_folder(tmp_path / "folder", tensors, alpha_pattern=pattern), model)
    gate, up = np.split(expected["gate_up"], 2, axis=1)
    for kind, value in {"gate": gate, "up": up, "down": expected["down"]}.items():
        np.testing.assert_allclose(
            update(found, f"blk.1.ffn_{kind}_exps.weight"), value, rtol=1e-5, atol=1e-4
        )


def test_frozen_weights_beside_an_adapter_are_passed_by(model, tmp_path):
    tensors = factors(O_PROJ, *o_proj()) | {
        "base_model.model.lm_head.base_layer.weight": np.zeros((2, 2), np.float32)
    }
    assert len(load(write_folder(tmp_path / "folder", tensors), model).adapters) == 1


@each_format
def test_what_is_not_finite_is_not_saved(model, path, tmp_path):
    lora = Lora(
        adapters={"blk.0.attn_output.weight": Adapter(a=jnp.ones((4, 64)), b=jnp.full((64, 4), jnp.inf))},
        alpha=1.0,
    )
    with pytest.raises(ValueError, match=r"the adapter of 'blk\.0\.attn_output\.weight' must be finite"):
        lora_files.save_lora(tmp_path / path, lora, model.config)
    assert list(tmp_path.iterdir()) == []


NAME = "blk.0.attn_output.weight"  # [64, 64]
ONES = {NAME: Adapter(a=np.ones((4, 64), np.float32), b=np.ones((64, 4), np.float32))}
HUGE = {NAME: Adapter(a=np.ones((1, 64), np.float32), b=np.full((64, 1), 3e38, np.float32))}
GATE_UP = "blk.1.ffn_gate_up_exps.weight"  # [4, 64, 64], of gate and up [4, 32, 64]


@each_format
@pytest.mark.parametrize(
    "adapters, alpha, words",
    [
        ({}, 1.0, "an adapter must be of at least one weight, got none"),
        (ONES, -1.0, r"alpha must be a number from 2\^-64 to 2\^64, got -1"),
        (ONES, 0.0, r"alpha must be a number from .*, got 0\.0"),
        (ONES, 1e-30, r"alpha must be a number from .*, got 1e-30"),
        (ONES, float("nan"), r"alpha must be a number from .*, got nan"),
        ({NAME: Adapter(a=np.ones((129, 64)), b=np.ones((64, 129)))}, 1.0, r"in \[1, 128\], got 129"),
        ({NAME: Adapter(a=np.ones((0, 64)), b=np.ones((64, 0)))}, 1.0, r"in \[1, 128\], got 0"),
    ],
    ids=["no adapters", "negative", "zero", "tiny", "NaN", "large rank", "rank 0"],
)
def test_what_could_not_be_loaded_is_not_saved(model, path, adapters, alpha, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        lora_files.save_lora(tmp_path / path, Lora(adapters=adapters, alpha=alpha), model.config)
    assert list(tmp_path.iterdir()) == []


def test_a_change_of_form_that_nothing_could_load_is_not_saved(model, tmp_path):
    """Ranks filled up to eights are scaled by as much; gate and up apart have smaller ranks than together."""
    with pytest.raises(ValueError, match=f"the adapter of '{NAME}' must be finite"):
        lora_files.save_lora(tmp_path / "a.gguf", Lora(adapters=HUGE, alpha=1.0), model.config)
    both = Adapter(a=np.ones((4, 120, 64), np.float32), b=np.ones((4, 64, 120), np.float32))
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_gate_exps\.weight' must be in \[1, 96\], got 120"):
        lora_files.save_lora(tmp_path / "folder", Lora(adapters={GATE_UP: both}, alpha=1.0), model.config)
    assert list(tmp_path.iterdir()) == []


@each_format
def test_the_largest_ranks_come_back(model, path, tmp_path):
    """Of a matrix [60, 64], for which a file has rank 128 where 124 was saved."""
    write_deepseek2(tmp_path / "odd.gguf", layers=1, sizes={"ff": 60})
    odd = checkpoints_tools.load_gguf(tmp_path / "odd.gguf")
    shape = names.flatten(odd.params)["blk.0.ffn_up.weight"].shape
    assert shape == (60, 64)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s, np.float32) for s in ((sum(shape), shape[1]), (shape[0], sum(shape))))
    lora = Lora(adapters={"blk.0.ffn_up.weight": Adapter(a=a, b=b)}, alpha=2.0)
    found = update(back(tmp_path / path, lora, odd), "blk.0.ffn_up.weight")
    np.testing.assert_allclose(found, update(lora, "blk.0.ffn_up.weight"), atol=1e-4)


def test_a_folder_is_there_whole_or_not_at_all(model, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_peft, "_config", fail)
    with pytest.raises(OSError, match="No space left"):
        lora_files.save_lora(tmp_path / "folder", random_lora(model.params), model.config)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(model, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        lora_files.save_lora(tmp_path, random_lora(model.params), model.config)
    assert (tmp_path / "note").read_text() == "mine"


def test_an_adapter_changes_the_model_as_a_changed_weight_does(model, tmp_path):
    """A check of what all tests here rest on: `b @ a`, scaled, is added to the weight."""
    lora = back(tmp_path / "a.gguf", random_lora(model.params, targets=["attn_output"]), model)
    leaves = names.flatten(model.params)
    for name in lora.adapters:
        leaves[name] = leaves[name] + jnp.asarray(update(lora, name), jnp.float32)
    expected = logits(names.unflatten(leaves), model.config, TOKENS)
    found = logits(lora_lib.attach(model.params, lora), model.config, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
