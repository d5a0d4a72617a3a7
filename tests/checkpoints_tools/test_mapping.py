"""Weights that stay in their file: the same bits as read ones, never written, chosen and told by size."""

import logging
import re

import jax
import numpy as np
import pytest
from interleaved import write_twins
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import mapping, memory, model_file, names
from checkpoints_tools.gguf_file import GGUFError, open_gguf
from checkpoints_tools.quantize import quantize
from checkpoints_tools.split import merge, split


def _views(file, mmap=True):
    config, plan = model_file.check_model(file)
    return mapping.views(file, config, arrays=plan.shapes, kept=plan.unread, mmap=mmap)


def _written(folder, kind):
    path = folder / "a.gguf"
    if kind == "interleaved":
        write_twins(folder)
        return folder / "packed.gguf"
    if kind == "headers":
        write_deepseek2(folder / "f32.gguf", sizes=dict(embed=256, ff=256))
        quantize(folder / "f32.gguf", path, type="iq4_ks")
        return path
    write_deepseek2(
        path, weight_type="Q8_0", kv="both", alignment=64 if kind == "64" else None, sizes=dict(embed=96)
    )
    if kind != "parts":
        return path
    return split(path, folder / "part", max_tensors=10)[0]


@pytest.mark.parametrize("kind", ["64", "32", "parts", "interleaved", "headers"])
def test_a_mapped_file_gives_the_same_bits(tmp_path, kind):
    path = _written(tmp_path, kind)
    read, mapped = (checkpoints_tools.load_gguf(path, mmap=mmap) for mmap in (False, True))
    file, found = open_gguf(path), _views(open_gguf(path))
    assert jax.tree.structure(read.params) == jax.tree.structure(mapped.params)
    jax.tree.map(np.testing.assert_array_equal, read.params, mapped.params)
    assert read.unread.keys() == mapped.unread.keys()
    for name, tensor in mapped.unread.items():
        assert tensor.data.tobytes() == read.unread[name].data.tobytes()
    in_place = set(mapped.unread)
    for name, leaf in names.flatten(mapped.params).items():
        (*_, data) = jax.tree.leaves(leaf)[:1]
        if data.unsafe_buffer_pointer() % 4096 == file.tensors[name].offset % 4096 and name in found:
            in_place.add(name)
    assert in_place == set(found)
    assert (len(found) == len(file.tensors)) == (kind == "64")
    assert found or kind == "32"


def test_what_is_mapped_is_never_written(tmp_path):
    path = _written(tmp_path, "64")
    before = path.read_bytes()
    view = _views(open_gguf(path))["token_embd.weight"]
    assert not view.flags.writeable
    embedding = checkpoints_tools.load_gguf(path, mmap=True).params["embed"]["weight"].blocks
    changed = jax.jit(lambda x: x.at[0].set(0), donate_argnums=0)(embedding)
    assert not np.asarray(changed)[0].any() and path.read_bytes() == before


def test_a_file_that_another_took_the_place_of_does_no_harm(tmp_path):
    path, other = _written(tmp_path, "64"), tmp_path / "b.gguf"
    view = _views(open_gguf(path))["output.weight"]
    before = view.tobytes()
    write_deepseek2(other, weight_type="Q8_0", seed=1)
    other.replace(path)
    assert view.tobytes() == before


def test_a_file_that_was_changed_is_not_mapped(tmp_path):
    path = _written(tmp_path, "64")
    file = open_gguf(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(GGUFError, match="must not change while it is read, but it did"):
        _views(file)


@pytest.mark.parametrize(
    ("mmap", "factor", "is_mapped"),
    [(None, 1.3, False), (None, 1.2, True), (False, 0.1, False), (True, 10, True), (None, None, False)],
    ids=["fits", "is too large", "never", "always", "unknown"],
)
def test_what_is_too_large_is_mapped(tmp_path, monkeypatch, mmap, factor, is_mapped):
    file = open_gguf(_written(tmp_path, "64"))
    num_bytes = sum(info.num_bytes for info in file.tensors.values())
    at_hand = None if factor is None else int(factor * num_bytes)
    monkeypatch.setattr(memory, "available_memory", lambda: at_hand)
    assert bool(_views(file, mmap)) == is_mapped


def test_the_choice_and_the_speed_are_told(tmp_path, monkeypatch, caplog):
    path = _written(tmp_path, "64")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with caplog.at_level(logging.INFO, "absl"):
        checkpoints_tools.load_gguf(path)
    count = len(open_gguf(path).tensors)
    first, second = [text for text in caplog.messages if "stay" in text or "/s" in text]
    assert f"more than 80% of the 0.0 MiB of memory at hand: {count} of {count} stay in the file" in first
    assert re.search(r"from a disk that gave [0-9.]+ GB/s just now: at most [0-9.e+]+ tokens/s$", second)


def test_misplaced_tensors_are_told_and_merging_places_them(tmp_path, caplog):
    path, out = _written(tmp_path, "32"), tmp_path / "64.gguf"
    with caplog.at_level(logging.INFO, "absl"):
        assert len(_views(open_gguf(path))) < len(open_gguf(path).tensors)
    assert f"`mla-jax merge {path} OUT --alignment 64` writes a copy in which they do" in caplog.text
    merge(path, out, alignment=64)
    assert len(_views(open_gguf(out))) == len(open_gguf(path).tensors)
    for name, info in open_gguf(out).tensors.items():
        assert info.offset % 64 == 0
        np.testing.assert_array_equal(open_gguf(out).read(name), open_gguf(path).read(name))
    changed = open_gguf(out).metadata.fields.items() - open_gguf(path).metadata.fields.items()
    assert [key for key, _ in changed] == ["general.alignment"]


def test_a_file_that_is_quantised_can_be_mapped(tmp_path):
    write_deepseek2(tmp_path / "a.gguf", alignment=None)
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="q8_0")
    assert len(_views(open_gguf(tmp_path / "b.gguf"))) == len(open_gguf(tmp_path / "b.gguf").tensors)


def test_no_weight_on_the_host_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "absl"):
        checkpoints_tools.load_gguf(_written(tmp_path, "64"), mmap=True, on_host=lambda name: False)
    assert "is not mapped, for none of its weights lies in host memory" in caplog.text


@pytest.mark.parametrize(
    ("room", "share"),
    [(0, None), (1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (9.0, 0.0)],
    ids=["nothing", "what is always used", "half of the experts", "everything", "more"],
)
def test_bytes_from_disk(tmp_path, room, share):
    write_deepseek2(tmp_path / "a.gguf", experts=8, used=3)
    file = open_gguf(tmp_path / "a.gguf")
    config, _ = model_file.check_model(file)
    infos = list(file.tensors.values())
    experts = sum(info.num_bytes for info in infos if "_exps." in info.name)
    always = sum(info.num_bytes for info in infos) - experts - file.tensors["token_embd.weight"].num_bytes
    room = int(min(room, 1) * always + max(room - 1, 0) * experts)
    used, from_disk = mapping.bytes_from_disk(config, infos, room)
    assert used == always + experts * 3 // 8
    assert from_disk == (used if share is None else int(share * experts * 3 / 8))
