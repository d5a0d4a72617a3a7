"""The name table reads the same in both directions."""

import jax
import pytest
from synthetic import write_deepseek2

from checkpoints_tools import gguf_file, names

KNOWN = {
    "token_embd.weight": "embed/weight",
    "output.weight": "output/weight",
    "blk.0.attn_norm.weight": "layers_0/attn_norm/weight",
    "blk.60.attn_kv_a_mqa.weight": "layers_60/attn/kv_a/weight",
    "blk.7.attn_output.weight": "layers_7/attn/out/weight",
    "blk.12.exp_probs_b.bias": "layers_12/ffn/router/bias",
    "blk.3.ffn_gate_up_exps.weight": "layers_3/ffn/experts/gate_up/weight",
    "blk.3.ffn_down_shexp.weight": "layers_3/ffn/shared/down/weight",
}


@pytest.mark.parametrize("name, path", KNOWN.items())
def test_known_names(name, path):
    assert names.to_path(name) == tuple(path.split("/"))
    assert names.to_name(tuple(path.split("/"))) == name


@pytest.mark.parametrize("options", [{}, {"q_lora": False, "merged": True, "kv": "both"}])
def test_every_tensor_of_a_model_goes_there_and_back(tmp_path, options):
    write_deepseek2(tmp_path / "a.gguf", **options)
    tensors = dict.fromkeys(gguf_file.open_gguf(tmp_path / "a.gguf").tensors, 1)
    params = names.unflatten(tensors)
    assert len(jax.tree.leaves(params)) == len(tensors)
    assert names.flatten(params) == tensors


@pytest.mark.parametrize(
    "name",
    ["rope_freqs.weight", "blk.01.attn_q.weight", "blk.x.attn_q.weight", "blk.1.nextn.eh_proj.weight", ""],
)
def test_unknown_names(name):
    assert names.to_path(name) is None


def test_unknown_paths():
    with pytest.raises(ValueError, match="got 'layers_0/attn/q/bias'"):
        names.flatten({"layers_0": {"attn": {"q": {"bias": 1}}}})
