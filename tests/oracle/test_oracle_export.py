"""`transformers` loads an exported folder: the same logits from the same text.

The tolerance is that of test_oracle_transformers.py, whose mutants show that it tells.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools.export import to_safetensors
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import apply
from mla_jax.tokenizer import Tokenizer, Vocabulary

_REASON = "needs the extra `oracle`: python -m pip install '.[oracle]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-5  # of the largest logit; both sum in float32, in another order
NUM_TOKENS = 160  # more than YaRN's trained context of 128

V2 = dict(gating="softmax", scale=1.0, shared=2)
CASES = {
    "v2": ("DeepseekV2ForCausalLM", V2 | dict(q_lora=False)),
    "v2-groups-yarn": ("DeepseekV2ForCausalLM", V2 | dict(groups=4, groups_used=2, yarn=True, merged=True)),
    "v3-groups-yarn": ("DeepseekV3ForCausalLM", dict(groups=4, groups_used=2, yarn=True, kv="k_b_v_b")),
    "v3-q8_0": ("DeepseekV3ForCausalLM", dict(weight_type="Q8_0", kv="both", dense=2)),
    "glm": (
        "Glm4MoeLiteForCausalLM",
        dict(metadata={"general.name": "GLM-4.7-Flash"}, kv="k_b_v_b", dense=2),
    ),
}
TEXTS = ["the  tents' 1234\n\n of it<eos>x<pad>", "中文 é\t<bos", ""]


@pytest.mark.parametrize("name", CASES)
def test_transformers_has_the_same_logits(tmp_path, name):
    family, options = CASES[name]
    write_deepseek2(tmp_path / "a.gguf", **options)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf", dtype="float32", max_shard_bytes=300_000)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert type(model).__name__ == family and model.dtype == torch.float32
    assert not any(loading.values()), loading
    tokens = np.random.default_rng(0).integers(0, 320, (1, NUM_TOKENS)).astype(np.int32)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(tokens).long(), use_cache=False).logits.numpy()
    checkpoint = checkpoints_tools.load_gguf(tmp_path / "a.gguf")
    found, _ = _apply()(checkpoint.params, jnp.asarray(tokens), None, checkpoint.config, RunConfig())
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@functools.cache
def _apply():
    return jax.jit(apply, static_argnums=(3, 4), compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("add_bos", [True, False])
def test_transformers_has_the_same_tokenizer(tmp_path, add_bos):
    keys = {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.chat_template": "{{ messages[0].content }}!"}
    write_deepseek2(tmp_path / "a.gguf", metadata=keys)
    to_safetensors(tmp_path / "a.gguf", tmp_path / "hf")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer(Vocabulary.from_metadata(checkpoints_tools.load_gguf(tmp_path / "a.gguf").metadata))
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert ids == ours.encode(text)
        assert reference.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    chat = [{"role": "user", "content": "hi"}]
    assert reference.apply_chat_template(chat, tokenize=False) == "hi!"
    assert (reference.bos_token, reference.eos_token, reference.pad_token) == ("<bos>", "<eos>", "<pad>")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)
