"""PEFT reads adapters that are written here, and its own are read here: the same logits on both sides.

The tolerance is that of test_oracle_transformers.py, whose mutants show that it tells.
"""

import numpy as np
import pytest
from adapters import logits, random_lora
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import lora_files, names
from checkpoints_tools.export import to_safetensors
from mla_jax import lora as lora_lib

_REASON = "needs the extra `oracle`: python -m pip install '.[oracle]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
peft = pytest.importorskip("peft", reason=_REASON)

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # what libraries warn each other of

TOLERANCE = 1e-5  # of the largest logit; both sum in float32, in another order
TOKENS = np.arange(48) * 7 % 320
ATTENTION = (r"attn_(q|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b|output)\.", r"^output\.")
EXPERTS = (r"ffn_(gate|up|gate_up|down)_exps",)
V2 = dict(gating="softmax", scale=1.0, shared=2, q_lora=False)
CASES = {  # dense FFNs and shared experts are left out by PEFT itself, with transformers 5
    "v3-attention": (dict(groups=4, groups_used=2, yarn=True), ATTENTION),
    "v3-experts": (dict(groups=4, groups_used=2), EXPERTS),
    "v3-one-layer": (dict(layers=3), (r"blk\.1\.attn_output", r"blk\.2\.attn_q_a\.")),
    "v3-heads-apart": (dict(kv="k_b_v_b", merged=True), (*ATTENTION, *EXPERTS)),
    "v2": (V2, (*ATTENTION, *EXPERTS)),
}


def write_model(folder, **options):
    """Writes a model in both formats; returns ours, and what makes that of transformers."""
    write_deepseek2(folder / "a.gguf", **dict(layers=2) | options)
    to_safetensors(folder / "a.gguf", folder / "hf", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    return checkpoints_tools.load_gguf(folder / "a.gguf"), theirs


def logits_of(theirs):
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS[None]).long(), use_cache=False).logits[0].numpy()


def assert_close(found, expected):
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_was_saved(case, tmp_path):
    options, targets = CASES[case]
    model, theirs = write_model(tmp_path, **options)
    lora = random_lora(model.params, targets=targets)
    lora_files.save_lora(tmp_path / "adapter", lora, model.config)
    ours = logits(lora_lib.attach(model.params, lora), model.config, TOKENS)
    assert np.abs(ours - logits_of(theirs)).max() > 0.1
    assert_close(logits_of(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")), ours)


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["q_b_proj", "kv_b_proj", "o_proj", "lm_head"]),
        dict(target_modules=["q_a_proj", "o_proj"], use_rslora=True, alpha_pattern={"o_proj": 12}),
        dict(target_modules=["kv_a_proj_with_mqa", "kv_b_proj"], rank_pattern={"kv_b_proj": 2}),
        dict(
            target_modules=["q_a_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        dict(target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"]),
    ],
    ids=["attention", "scales", "ranks", "experts", "experts down"],
)
def test_what_peft_saved_is_loaded(settings, tmp_path):
    model, theirs = write_model(tmp_path)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if "lora_B" in name:
                values.copy_(0.06 * torch.randn(values.shape, generator=generator))
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    lora = lora_files.load_lora(tmp_path / "adapter", model.config, names.flatten(model.params))
    assert np.abs(expected - logits(model.params, model.config, TOKENS)).max() > 0.1
    assert_close(logits(lora_lib.attach(model.params, lora), model.config, TOKENS), expected)
