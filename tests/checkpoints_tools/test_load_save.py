"""Loading and saving: byte-equal there and back, right values, one copy of the bytes."""

import dataclasses
import io
import logging
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import vocabulary, write_deepseek2

import checkpoints_tools
from checkpoints_tools import buffers, gguf_file, load, names, progress, save
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from mla_jax import lora, quant
from mla_jax.nn import transformer

VARIANTS = {
    "plain": {},
    "q8_0 both": dict(weight_type="Q8_0", kv="both"),
    "old both": dict(weight_type="Q8_0", kv="both_2d"),
    "mainline": dict(weight_type="F16", kv="k_b_v_b"),
    "old split": dict(weight_type="BF16", kv="k_b_v_b_2d", q_lora=False),
    "merged": dict(merged=True, gating="softmax", groups=2, groups_used=1),
    "alignment 32": dict(weight_type="Q8_0", alignment=None, sizes={"embed": 96}),
}


def _load(path, **options):
    stored = write_deepseek2(path, **options)
    return checkpoints_tools.load_gguf(path), stored


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_save_gives_the_same_file(tmp_path, options):
    checkpoint, _ = _load(tmp_path / "a.gguf", **options)
    checkpoints_tools.save_gguf(tmp_path / "b.gguf", checkpoint)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_weight_has_the_value_in_the_file(tmp_path, options):
    checkpoint, stored = _load(tmp_path / "a.gguf", **options)
    leaves = names.flatten(checkpoint.params)
    assert leaves.keys() | checkpoint.unread.keys() == stored.keys()
    for name, leaf in leaves.items():
        values = np.asarray(quant.decode(leaf))
        np.testing.assert_array_equal(values.reshape(stored[name].shape), stored[name], name)


@pytest.mark.parametrize("weight_type", ["F32", "BF16", "Q8_0"])
def test_rows_are_read_alone(tmp_path, weight_type):
    stored = write_deepseek2(tmp_path / "a.gguf", weight_type=weight_type)
    file = gguf_file.open_gguf(tmp_path / "a.gguf")
    for name in ("blk.1.ffn_up_exps.weight", "token_embd.weight", "output_norm.weight"):
        matrix = stored[name].reshape(-1, stored[name].shape[-1])
        for rows in (slice(0, None), slice(0, 1), slice(len(matrix) // 2, len(matrix)), slice(1, 1)):
            weight = load.read_weight(file, name, rows.start, rows.stop)
            assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weight))
            np.testing.assert_array_equal(quant.decode(weight), matrix[rows])


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2), (0, 321)])
def test_rows_that_are_not_there_are_refused(tmp_path, rows):
    write_deepseek2(tmp_path / "a.gguf")
    file = gguf_file.open_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"rows of 'token_embd.weight' must be a range in \[0, 320\]"):
        load.read_weight(file, "token_embd.weight", *rows)


def test_old_matrices_become_heads(tmp_path):
    flat, _ = _load(tmp_path / "a.gguf", kv="k_b_v_b_2d")
    heads, _ = _load(tmp_path / "b.gguf", kv="k_b_v_b")
    attention = flat.params["layers_0"]["attn"]
    assert attention["k_b"]["weight"].shape == (2, 32, 32) and "kv_b" not in attention
    for ours, theirs in zip(jax.tree.leaves(flat.params), jax.tree.leaves(heads.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_kv_b_is_read_where_a_file_has_both(tmp_path, caplog):
    logging.getLogger("absl").propagate = True
    with caplog.at_level(logging.INFO, "absl"):
        checkpoint, _ = _load(tmp_path / "a.gguf", kv="both")
    attention = checkpoint.params["layers_0"]["attn"]
    assert "kv_b" in attention and not {"k_b", "v_b"} & attention.keys()
    assert len(checkpoint.unread) == 6
    assert (
        "attn_kv_b is read in 3 of 3 layers (their attn_k_b and attn_v_b are only kept for saving)"
        in caplog.text
    )


def test_unknown_tensors_are_kept(tmp_path, caplog):
    path = tmp_path / "a.gguf"
    write_deepseek2(path)
    file = gguf_file.open_gguf(path)
    tensors = [
        TensorData(name, info.shape, info.ggml_type, file.read(name)) for name, info in file.tensors.items()
    ]
    odd = TensorData("blk.3.nextn.eh_proj.weight", (2, 256), IDS["iq2_k"], np.arange(152, dtype=np.uint8))
    tensors.insert(2, odd)
    write_gguf(path, file.metadata, tensors)
    logging.getLogger("absl").propagate = True
    with caplog.at_level(logging.INFO, "absl"):
        checkpoint = checkpoints_tools.load_gguf(path)
    assert "not read, kept for saving: blk.3.nextn.eh_proj.weight" in caplog.text
    checkpoints_tools.save_gguf(tmp_path / "b.gguf", checkpoint)
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


def test_a_file_can_be_saved_over_itself(tmp_path):
    path = tmp_path / "a.gguf"
    checkpoint, _ = _load(path, weight_type="Q8_0")
    before = path.read_bytes()
    checkpoints_tools.save_gguf(path, checkpoint)
    assert path.read_bytes() == before


def test_changed_parameters_are_saved(tmp_path):
    checkpoint, _ = _load(tmp_path / "a.gguf")
    checkpoint.params["output_norm"]["weight"] = jnp.full(64, 2, jnp.bfloat16)
    checkpoints_tools.save_gguf(tmp_path / "b.gguf", checkpoint)
    again = checkpoints_tools.load_gguf(tmp_path / "b.gguf")
    assert again.params["output_norm"]["weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        again.params["output_norm"]["weight"], checkpoint.params["output_norm"]["weight"]
    )
    checkpoint.params["output"]["weight"] = checkpoint.params["output"]["weight"].T
    checkpoints_tools.save_gguf(tmp_path / "b.gguf", checkpoint)
    assert gguf_file.open_gguf(tmp_path / "b.gguf").tensors["output.weight"].shape == (64, 320)
    adapters = lora.init(jax.random.key(0), checkpoint.params, rank=2, alpha=2.0)
    adapted = dataclasses.replace(checkpoint, params=lora.attach(checkpoint.params, adapters))
    with pytest.raises(ValueError, match=r"'blk\.0\..*' must have no adapter beside it: merge it first"):
        checkpoints_tools.save_gguf(tmp_path / "c.gguf", adapted)
    del checkpoint.params["output_norm"]
    with pytest.raises(ValueError, match=r"'output_norm\.weight' of the loaded file must be there"):
        checkpoints_tools.save_gguf(tmp_path / "c.gguf", checkpoint)


def test_split_files_are_saved_as_one(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_deepseek2(whole)
    file = gguf_file.open_gguf(whole)
    tensors = [
        TensorData(name, info.shape, info.ggml_type, file.read(name)) for name, info in file.tensors.items()
    ]
    counts = {"split.count": 2, "split.tensors.count": len(tensors)}
    parts = [tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    write_gguf(parts[0], file.metadata.fields | {"split.no": 0} | counts, tensors[:20])
    write_gguf(parts[1], {"general.alignment": 64, "split.no": 1} | counts, tensors[20:])
    checkpoints_tools.save_gguf(tmp_path / "b.gguf", checkpoints_tools.load_gguf(parts[0]))
    assert (tmp_path / "b.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16])
def test_jax_adopts_the_buffers_that_are_read_into(dtype):
    data = buffers.aligned_empty(4096 + 4)[:4096]
    data[:] = 1
    adopted = jax.device_put(data.view(dtype))
    assert adopted.unsafe_buffer_pointer() == data.ctypes.data


_PEAK = """
import sys
import jax
import checkpoints_tools

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

jax.device_put(0).block_until_ready()
before = peak()
checkpoint = checkpoints_tools.load_gguf(sys.argv[1])
jax.block_until_ready(checkpoint.params)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_one_copy_of_the_file(tmp_path):
    path = tmp_path / "large.gguf"
    sizes = {"embed": 1024, "ff_exp": 2048}
    write_deepseek2(path, weight_type="F16", layers=2, experts=16, sizes=sizes, alignment=None)
    size = path.stat().st_size
    assert size > 190e6
    output = subprocess.run(
        [sys.executable, "-c", _PEAK, path], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert int(output) < 1.25 * size


def _peak_bytes(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_headers_are_taken_off_in_pieces(tmp_path, monkeypatch):
    path, rng = tmp_path / "a.gguf", np.random.default_rng(0)
    stored = rng.integers(0, 256, (512, 4 + 8 * 136), dtype=np.uint8)
    write_gguf(path, {}, [TensorData("a.weight", (512, 2048), IDS["iq4_ks"], stored)])
    file, read = gguf_file.open_gguf(path), []
    monkeypatch.setattr(load, "_PIECE_BYTES", 20_000)
    assert _peak_bytes(lambda: read.append(load.read_weight(file, "a.weight"))) < 1.1 * stored.size
    np.testing.assert_array_equal(read[0].header, stored[:, :4])
    np.testing.assert_array_equal(read[0].blocks.reshape(512, -1), stored[:, 4:])
    assert read[0].blocks.ctypes.data % buffers.BUFFER_ALIGNMENT == 0  # adopted, not copied
    some = load.read_weight(file, "a.weight", 100, 131)
    jax.tree.map(np.testing.assert_array_equal, some, read[0][100:131])


def test_pieces_take_no_memory_that_weights_keep(tmp_path, monkeypatch):
    """Small buffers share a mapping, which stays as long as one of them does: a header for example."""
    path, stored = tmp_path / "a.gguf", np.zeros((512, 4 + 8 * 136), np.uint8)
    write_gguf(path, {}, [TensorData("a.weight", (512, 2048), IDS["iq4_ks"], stored)])
    file, taken, aligned_empty = gguf_file.open_gguf(path), [], buffers.aligned_empty
    for module in (gguf_file, load):
        count = lambda num_bytes: taken.append(num_bytes) or aligned_empty(num_bytes)
        monkeypatch.setattr(module, "aligned_empty", count)
    load.read_weight(file, "a.weight")
    assert sum(taken) == stored.size


def test_headers_are_put_back_in_pieces(tmp_path, monkeypatch):
    checkpoint, _ = _load(tmp_path / "a.gguf", sizes={"embed": 512, "ff_exp": 256})
    rng = np.random.default_rng(0)
    random = lambda *shape: jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
    leaves = {
        name: quant.QuantizedTensor(
            blocks=random(*leaf.shape[:-1], leaf.shape[-1] // 256, 136),
            header=random(*leaf.shape[:-1], 4),
            format="iq4_ks",
        )
        for name, leaf in names.flatten(checkpoint.params).items()
        if "exps" in name
    }
    params = names.unflatten(names.flatten(checkpoint.params) | leaves)
    monkeypatch.setattr(save, "_PIECE_BYTES", 20_000)
    path, changed = tmp_path / "b.gguf", dataclasses.replace(checkpoint, params=params)
    size = sum(leaf.blocks.nbytes for leaf in leaves.values())
    assert _peak_bytes(lambda: checkpoints_tools.save_gguf(path, changed)) < 0.2 * size
    again = names.flatten(checkpoints_tools.load_gguf(path).params)
    for name, leaf in leaves.items():
        jax.tree.map(np.testing.assert_array_equal, again[name], leaf)


def test_progress_is_reported_after_each_tensor(tmp_path):
    calls = []
    write_deepseek2(tmp_path / "a.gguf")
    checkpoints_tools.load_gguf(tmp_path / "a.gguf", progress=lambda *call: calls.append(call))
    infos = gguf_file.open_gguf(tmp_path / "a.gguf").tensors.values()
    total = sum(info.num_bytes for info in infos)
    assert [done for done, *_ in calls] == list(range(1, len(infos) + 1))
    assert calls[-1] == (len(infos), len(infos), total, total)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, slow_seconds, num_lines",
    [(_Terminal(), 1.0, 1), (io.StringIO(), 1e6, 0), (io.StringIO(), 0.0, 1)],
    ids=["terminal", "fast", "slow"],
)
def test_progress_line(tmp_path, monkeypatch, stream, slow_seconds, num_lines):
    write_deepseek2(tmp_path / "a.gguf")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SLOW_SECONDS", slow_seconds)
    checkpoints_tools.load_gguf(tmp_path / "a.gguf")
    text = stream.getvalue()
    assert text.count("\n") == num_lines
    if num_lines:
        last = text.splitlines()[-1]
        assert "a.gguf: 49/49 tensors" in last and "GB/s" in last


def _trained(path):
    """Returns a config and random parameters in the tree that the network makes for it."""
    config = _load(path, layers=2, yarn=True, groups=2, groups_used=1)[0].config
    shapes = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize(
    "weight_type, tolerance", [("f32", 0.0), ("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 5e-3), ("q5_1", 0.04)]
)
def test_export_of_a_trained_model(tmp_path, weight_type, tolerance):
    config, params = _trained(tmp_path / "a.gguf")
    path = tmp_path / "trained.gguf"
    checkpoints_tools.export_gguf(
        path, params, config, tokenizer_metadata=vocabulary(320), weight_type=weight_type
    )
    loaded = checkpoints_tools.load_gguf(path)
    assert loaded.config == config
    assert loaded.metadata["tokenizer.ggml.pre"] == "deepseek-v3"
    infos = gguf_file.open_gguf(path).tensors
    assert all(info.offset % 64 == 0 for info in infos.values())
    assert {infos[name].type_name for name in infos if name.endswith("exps.weight")} == {weight_type}
    assert infos["blk.1.ffn_gate_inp.weight"].type_name == infos["output_norm.weight"].type_name == "f32"
    leaves = names.flatten(loaded.params)
    assert names.flatten(params).keys() == leaves.keys()
    for name, weight in names.flatten(params).items():
        bound = tolerance * np.abs(weight).max()
        assert np.abs(np.asarray(quant.decode(leaves[name])) - weight).max() <= bound, name


def test_export_refuses_what_does_not_fit(tmp_path):
    config, params = _trained(tmp_path / "a.gguf")

    def export(weight_type):
        checkpoints_tools.export_gguf(
            tmp_path / "b.gguf", params, config, tokenizer_metadata={}, weight_type=weight_type
        )

    with pytest.raises(ValueError, match=r"weight_type must be .* got 'q3'"):
        export("q3")
    params["output_norm"]["weight"] = np.ones(63, np.float32)
    with pytest.raises(ValueError, match=r"'output_norm\.weight' must have shape \(64,\), got \(63,\)"):
        export("f32")
    del params["output_norm"]
    with pytest.raises(ValueError, match=r"'output_norm\.weight' must have shape \(64,\), got None"):
        export("f32")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]
