"""Interleaved types against ik_llama.cpp: its decoders, its repacking and its quantiser."""

import ctypes
import pathlib
import subprocess

import ik_library
import jax
import numpy as np
import pytest
from interleaved import GROUPS, SIZE, SUPPORTED, decoded, random_data, sane_data, write_twins
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import gguf_file, interleave, load
from checkpoints_tools.ggml_types import IDS
from mla_jax import quant

ik_llama_cpp = pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
FOLDER = pathlib.Path(ik_llama_cpp.__file__).parent

pytestmark = pytest.mark.peer

# The peer's decoder of mxfp4_r8 is not exported, its bf16_r16 is never decoded.
DECODED = [name for name in SUPPORTED if name not in ("mxfp4_r8", "bf16_r16")]
# It repacks bf16 on few processors and mxfp4 on none; its q8_KV_r8 has gaps between groups, which its own
# quantiser and kernels do not have; the others have no type to be repacked from.
REPACKED = set(DECODED) - {"q8_KV_r8", "q8_k_r8", "q8_k_r16", "iq1_s_r4", "iq1_m_r4"}


def _quantize(*arguments):
    command = [FOLDER / "bin" / "llama-quantize", *arguments, "1"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)


@pytest.mark.parametrize("name", DECODED)
def test_peer_decodes_the_same_values(name):
    data, rows = sane_data(name), interleave.BASES[name].rows
    groups = [ik_library.dequantise_row(name, group, rows * SIZE) for group in data.reshape(GROUPS, -1)]
    np.testing.assert_array_equal(decoded(name, data), np.concatenate(groups).reshape(-1, SIZE))


def test_peer_interleaves_bf16_the_same():
    data = random_data("bf16_r16", 1)
    rows, packed = interleave.deinterleave("bf16_r16", data, SIZE), np.zeros_like(data)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, packed))
    ik_library.load().repack_bf16_bf16_r16(*pointers, ctypes.c_int64(16), ctypes.c_int64(SIZE))
    np.testing.assert_array_equal(packed, data)


def test_peer_repacks_to_the_same_bytes(tmp_path):
    types = write_twins(tmp_path)
    _quantize("--repack", tmp_path / "single.gguf", tmp_path / "peer.gguf", "Q4_K_R4")
    ours, theirs = (gguf_file.open_gguf(tmp_path / name) for name in ("packed.gguf", "peer.gguf"))
    same = set()
    for name, kind in types.items():
        if kind in REPACKED and name != "token_embd.weight":  # which the peer leaves as it is
            assert theirs.tensors[name].ggml_type == IDS[kind], name
            np.testing.assert_array_equal(theirs.read(name), ours.read(name), kind)
            same.add(kind)
    assert same == REPACKED


def test_repacked_files_load_and_are_saved_as_they_are(tmp_path):
    write_deepseek2(tmp_path / "single.gguf", weight_type="Q8_0", alignment=None)
    _quantize("--repack", tmp_path / "single.gguf", tmp_path / "peer.gguf", "Q8_0_R8")
    single, peer = (checkpoints_tools.load_gguf(tmp_path / f"{name}.gguf") for name in ("single", "peer"))
    assert peer.file_tensors["output.weight"].type_name == "q8_0_r8"
    assert jax.tree.structure(peer.params) == jax.tree.structure(single.params)
    for ours, theirs in zip(jax.tree.leaves(peer.params), jax.tree.leaves(single.params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    checkpoints_tools.save_gguf(tmp_path / "again.gguf", peer)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "peer.gguf").read_bytes()


@pytest.mark.parametrize(
    "kind, tolerance", [("Q4_0_R8", 0.15), ("Q8_0_R8", 0.01), ("Q6_0_R4", 0.05), ("Q4_K_R4", 0.15)]
)
def test_peer_quantises_to_files_that_load(tmp_path, kind, tolerance):
    sizes = dict(embed=256, q_lora=256, kv_lora=256, v=128, ff=256, ff_exp=256)
    stored = write_deepseek2(tmp_path / "f32.gguf", sizes=sizes, layers=2, experts=3, alignment=None)
    _quantize(tmp_path / "f32.gguf", tmp_path / "peer.gguf", kind)
    file = gguf_file.open_gguf(tmp_path / "peer.gguf")
    assert file.tensors["blk.1.ffn_up_exps.weight"].type_name == kind.lower()
    for name in ("blk.1.ffn_up_exps.weight", "blk.0.attn_kv_b.weight"):
        weight = np.asarray(quant.decode(load.read_weight(file, name)))
        expected = stored[name].reshape(weight.shape)
        assert np.linalg.norm(weight - expected) < tolerance * np.linalg.norm(expected)
