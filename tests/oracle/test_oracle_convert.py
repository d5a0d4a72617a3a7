"""Models saved by `transformers`, converted to GGUF, give the logits that `transformers` gives.

The models and the tolerance are those of test_oracle_transformers.py, whose mutants show that it tells.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import checkpoints_tools
from checkpoints_tools import convert
from checkpoints_tools.hf_tokenizer import tokenizer_metadata
from mla_jax import pretokenize
from mla_jax.config import RunConfig
from mla_jax.nn.transformer import apply
from mla_jax.tokenizer import Tokenizer, Vocabulary

_REASON = "needs the extra `oracle`: python -m pip install '.[oracle]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)

import hf_folder  # noqa: E402
import test_oracle_transformers as models  # noqa: E402

pytestmark = pytest.mark.oracle

NUM_TOKENS = 96  # more than YaRN's trained context of 64
GLM_FLASH = dict(
    q_lora_rank=48,
    norm_topk_prob=True,
    routed_scaling_factor=1.8,
    n_shared_experts=1,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)
CASES = {
    name: (models.CASES[name].family, models.CASES[name].changes)
    for name in ("v2-lite-yarn", "v2-groups-yarn", "v3-groups-yarn")
}
CASES |= {
    "kimi-k2": ("DeepseekV3", models.CASES["v3-plain"].changes | dict(rope_parameters=models._yarn(1.0))),
    "glm-4.7-flash": ("Glm4MoeLite", GLM_FLASH),
    "glm-two-dense": ("Glm4MoeLite", GLM_FLASH | dict(mlp_layer_types=["dense", "dense", "sparse"])),
}


@functools.cache
def _model(name):
    """Returns a random model, and the logits f32[1, T, W] that it gives for tokens."""
    family, changes = CASES[name]
    config = getattr(transformers, f"{family}Config")(**models.SIZES, **changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(models.SIZES["vocab_size"], (1, NUM_TOKENS), generator=generator)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            models._randomize(key, tensor, generator)
    return model, tokens, _reference(model, tokens)


def _reference(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.numpy()


def _logits(path, tokens):
    checkpoint = checkpoints_tools.load_gguf(path)
    return _apply()(
        checkpoint.params, jnp.asarray(tokens.numpy().astype(np.int32)), None, checkpoint.config, RunConfig()
    )[0]


@functools.cache
def _apply():
    return jax.jit(apply, static_argnums=(3, 4), compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_has_the_same_logits(tmp_path, name):
    model, tokens, expected = _model(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    if name == "kimi-k2":
        hf_folder.change_config(tmp_path / "hf", model_type="kimi_k2")
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")
    found = _logits(tmp_path / "a.gguf", tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=models.TOLERANCE * np.abs(expected).max())


def test_fp8_is_the_model_of_its_dequantised_weights(tmp_path):
    """The twin in FP8 is written as DeepSeek publishes it; transformers has the weights it stands for."""
    model, tokens, expected = _model("v3-groups-yarn")
    model.save_pretrained(tmp_path / "hf")
    weights = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    stored = {}
    for name, array in weights.items():
        stored[name] = array
        if array.ndim == 2 and not name.endswith(
            ("mlp.gate.weight", "embed_tokens.weight", "lm_head.weight")
        ):
            stored[name], scale = hf_folder.to_fp8(array)
            stored[name + "_scale_inv"] = scale
            weights[name] = hf_folder.from_fp8(stored[name], scale)
    hf_folder.save(tmp_path / "hf", stored, 2)
    quantization = dict(quant_method="fp8", fmt="e4m3", weight_block_size=list(hf_folder.FP8_BLOCK))
    hf_folder.change_config(tmp_path / "hf", quantization_config=quantization)
    convert.to_gguf(tmp_path / "hf", tmp_path / "a.gguf", type="f32")

    model.config.save_pretrained(tmp_path / "twin")
    hf_folder.save(tmp_path / "twin", weights)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twin").float().eval()
    reference = _reference(twin, tokens)
    assert np.abs(reference - expected).max() > 1e-2 * np.abs(expected).max()
    found = _logits(tmp_path / "a.gguf", tokens)
    np.testing.assert_allclose(found, reference, atol=models.TOLERANCE * np.abs(reference).max())


def test_a_tokenizer_saved_by_transformers(tmp_path):
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pretokenize.pre_tokenizer("glm4")
    trained.decoder = tokenizers.decoders.ByteLevel()
    texts = ["Hello there, it's the 123rd thing\n\n", "中文字符 and 12345"] * 5
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[gMASK]", "<|endoftext|>", "<|user|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="[gMASK]",
        eos_token="<|endoftext|>",
        chat_template="{{ messages }}",
    )
    reference.add_tokens(["<think>"])
    reference.save_pretrained(tmp_path)
    values = tokenizer_metadata(tmp_path, len(reference) + 4)
    found = Tokenizer(Vocabulary.from_metadata(values))
    text = texts[0] + "<|user|> the <think>" + texts[1]
    assert found.encode(text) == reference(text)["input_ids"]
    assert found.vocabulary.bos_id == reference.bos_token_id
    assert found.vocabulary.eos_id == reference.eos_token_id
    assert found.vocabulary.chat_template == "{{ messages }}"
