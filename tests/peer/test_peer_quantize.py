"""Files that `quantize` wrote, in ik_llama.cpp."""

import dataclasses

import jax
import numpy as np
import pytest
from closeness import Closeness, network_logits

import checkpoints_tools
from checkpoints_tools.quantize import quantize
from mla_jax import RunConfig, quant

pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
import ik
from speaking import write_speaking

pytestmark = pytest.mark.peer

NUM_TOKENS = 128
VOCAB = 320
MAX_KL = 1e-3  # the peer rounds activations to 8 bits


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("peer") / "f32.gguf"
    write_speaking(path, vocab=VOCAB, gating="sigmoid", scale=2.5, experts=8, used=3)
    return path


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, VOCAB, NUM_TOKENS)


def _logits(path, tokens):
    """Decodes the weights first, so that all types share one compilation."""
    checkpoint = checkpoints_tools.load_gguf(path)
    is_weight = lambda leaf: isinstance(leaf, quant.QuantizedTensor)
    params = jax.tree.map(jax.jit(quant.decode), checkpoint.params, is_leaf=is_weight)
    checkpoint = dataclasses.replace(checkpoint, params=params)
    return network_logits(checkpoint, tokens, RunConfig(group_routing=False))


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "Q4_K_M", "iq4_ks"])
def test_peer_reads_what_was_quantised(source, tokens, tmp_path, type_name):
    quantize(source, tmp_path / "out.gguf", type=type_name)
    found = Closeness.of(ik.logits(tmp_path / "out.gguf", tokens), _logits(tmp_path / "out.gguf", tokens))
    print(f"{type_name}: {found}")
    assert found.kl < MAX_KL and found.top1 > 0.95
