"""ik_llama.cpp with adapters that are written here, and with models that they are merged into.

It adds adapters of `attn_output`, of FFNs and of experts, without flash attention and fused products alone;
those of other weights it reads and leaves out, so a model has them there when they are merged.
"""

import dataclasses

import numpy as np
import pytest
from adapters import EVERY, random_lora
from closeness import Closeness, network_logits

import checkpoints_tools
from checkpoints_tools import lora_files, lora_merge
from mla_jax import RunConfig
from mla_jax import lora as lora_lib

pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
import ik
from speaking import write_speaking

pytestmark = pytest.mark.peer

VOCAB = 320
MODEL = dict(vocab=VOCAB, gating="sigmoid", scale=2.5, experts=16, used=6)
ADDED = (r"attn_output\.", r"ffn_(gate|up|down)(_exps|_shexp)?\.")
MAX_KL = {"F32": 1e-7, "Q8_0": 1e-3}  # as in test_peer_logits.py
RUN = RunConfig(mla=3)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, VOCAB, 64)


def write(folder, **options):
    write_speaking(folder / "model.gguf", **MODEL | options)
    return checkpoints_tools.load_gguf(folder / "model.gguf")


def adapted(model, lora, tokens):
    params = lora_lib.attach(model.params, lora)
    return network_logits(dataclasses.replace(model, params=params), tokens, RUN)


@pytest.mark.parametrize(("weight_type", "rank"), [("F32", 3), ("F32", 16), ("Q8_0", 16)])
def test_peer_adds_an_adapter_to_the_same_logits(weight_type, rank, tokens, tmp_path):
    model = write(tmp_path, weight_type=weight_type)
    lora = random_lora(model.params, targets=ADDED, rank=rank)
    lora_files.save_lora(tmp_path / "lora.gguf", lora, model.config)
    ours, plain = adapted(model, lora, tokens), network_logits(model, tokens, RUN)
    assert Closeness.of(plain, ours).kl > 0.01
    for mla in (1, 3):
        found = Closeness.of(ik.logits(model.path, tokens, mla=mla, lora=tmp_path / "lora.gguf"), ours)
        print(f"{weight_type} rank {rank} mla {mla}: {found}")
        assert found.kl < MAX_KL[weight_type] and found.top1 >= 0.98


def test_peer_reads_adapters_of_every_weight(tokens, tmp_path):
    model = write(tmp_path)
    lora = random_lora(model.params, targets=EVERY)
    lora_files.save_lora(tmp_path / "lora.gguf", lora, model.config)
    ours, plain = adapted(model, lora, tokens), network_logits(model, tokens, RUN)
    theirs = ik.logits(model.path, tokens, lora=tmp_path / "lora.gguf")
    assert Closeness.of(theirs, ours).kl < 0.8 * Closeness.of(plain, ours).kl


@pytest.mark.parametrize("kv", ["kv_b", "k_b_v_b", "both_2d"])
def test_peer_has_the_logits_of_a_merged_model(kv, tokens, tmp_path):
    model = write(tmp_path, kv=kv)
    lora = random_lora(model.params, targets=EVERY)
    lora_files.save_lora(tmp_path / "lora.gguf", lora, model.config)
    lora_merge.merge(model.path, tmp_path / "merged.gguf", [(tmp_path / "lora.gguf", 1.0)])
    ours = adapted(model, lora, tokens)
    for mla in (1, 3):
        found = Closeness.of(ik.logits(tmp_path / "merged.gguf", tokens, mla=mla), ours)
        print(f"{kv} mla {mla}: {found}")
        # of k_b and v_b in float32 the peer makes a kv_b in Q8_0 for mla 3
        assert found.kl < MAX_KL["Q8_0" if (kv, mla) == ("k_b_v_b", 3) else "F32"]


def test_peer_loads_a_merged_model_in_the_types_of_the_file(tokens, tmp_path):
    model = write(tmp_path, weight_type="Q8_0")
    lora = random_lora(model.params, targets=EVERY)
    lora_files.save_lora(tmp_path / "folder", lora, model.config)
    lora_merge.merge(model.path, tmp_path / "merged.gguf", [(tmp_path / "folder", 1.0)])
    ours = network_logits(checkpoints_tools.load_gguf(tmp_path / "merged.gguf"), tokens, RUN)
    assert Closeness.of(ik.logits(tmp_path / "merged.gguf", tokens), ours).kl < MAX_KL["Q8_0"]
    assert Closeness.of(adapted(model, lora, tokens), ours).kl < MAX_KL["Q8_0"]
