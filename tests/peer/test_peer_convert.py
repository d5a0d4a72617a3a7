"""ik_llama.cpp runs converted checkpoints, in every mode, to the logits of this project."""

import numpy as np
import pytest
import synthetic
import tokenizers
from closeness import Closeness, network_logits
from hf_folder import write_folder, write_json
from tokenizers import models

import checkpoints_tools
from checkpoints_tools import convert
from mla_jax import RunConfig, pretokenize

pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
import ik

pytestmark = pytest.mark.peer

VOCAB = 320
NUM_TOKENS = 256
# As in test_peer_logits.py: with Q8_0 weights the peer rounds activations, which moves a model without
# training further than one with it.
MAX_KL = {"f32": 5e-7, "q8_0": 1e-2}


def _write_tokenizer(folder):
    keys = synthetic.vocabulary(VOCAB)
    tokens, merges = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pretokenize.pre_tokenizer("deepseek-v3")
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = tokens[:3]
    config = dict(bos_token=bos, eos_token=eos, pad_token=pad, add_bos_token=True)
    write_json(folder / "tokenizer_config.json", config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    write_folder(path, size="full", yarn=True, nextn=1, num_files=2)
    _write_tokenizer(path)
    return path


@pytest.mark.parametrize("type_name", MAX_KL)
def test_peer_has_the_same_logits(folder, tmp_path, type_name):
    path = tmp_path / "a.gguf"
    convert.to_gguf(folder, path, type=type_name, keep_nextn=False)
    tokens = np.random.default_rng(0).integers(3, VOCAB, NUM_TOKENS)
    ours = network_logits(checkpoints_tools.load_gguf(path), tokens, RunConfig())
    for mla in range(4) if type_name == "f32" else (3,):
        found = Closeness.of(ik.logits(path, tokens, mla=mla), ours)
        print(f"{type_name} mla {mla}: {found}")
        assert found.kl < MAX_KL[type_name]


def test_peer_takes_no_file_with_layers_for_a_second_token(folder, tmp_path):
    """It knows them for other architectures alone; `keep_nextn=False` is for it."""
    convert.to_gguf(folder, tmp_path / "a.gguf")
    with pytest.raises(RuntimeError, match="wrong number of tensors"):
        ik.logits(tmp_path / "a.gguf", [3, 4, 5])
