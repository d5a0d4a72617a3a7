"""Splitting and merging: the same keys and tensors there and back, and all the parts or none."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import gguf_file
from checkpoints_tools import split as split_lib
from checkpoints_tools.gguf_file import GGUFError, open_gguf
from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.split import merge, split

LIMITS = {
    "tensors": dict(max_tensors=20),
    "one each": dict(max_tensors=1),
    "bytes": dict(max_bytes=100_000),
    "both": dict(max_bytes=300_000, max_tensors=7),
    "neither": {},
}


@pytest.fixture(scope="module", params=[64, None], ids=["alignment 64", "alignment 32"])
def whole(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    # rows of 96 weights in Q8_0 and an odd vocabulary, so that the padding between tensors matters
    sizes = dict(embed=96) if request.param is None else {}
    write_deepseek2(path, alignment=request.param, vocab=301, weight_type="Q8_0", sizes=sizes)
    return path


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_merging_the_parts_gives_the_same_file(whole, limits, tmp_path):
    parts = split(whole, tmp_path / "m", **limits)
    merge(parts[0], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(["merged.gguf", *map(os.path.basename, parts)])


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_the_parts_are_the_file(whole, limits, tmp_path):
    original, parts = open_gguf(whole), split(whole, tmp_path / "m", **limits)
    joined = open_gguf(parts[0])
    keys = {key: field for key, field in joined.metadata.fields.items() if not key.startswith("split.")}
    assert keys == original.metadata.fields
    assert list(joined.tensors) == list(original.tensors)
    for name in original.tensors:
        np.testing.assert_array_equal(joined.read(name), original.read(name))


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_parts_are_as_full_as_the_limits_allow(whole, limits, tmp_path):
    infos = list(open_gguf(whole).tensors.values())
    parts = split(whole, tmp_path / "m", **limits)
    max_bytes = limits.get("max_bytes", 1 << 60)
    max_tensors = limits.get("max_tensors", 128 if not limits else 1 << 60)
    groups = [[info for info in open_gguf(parts[0]).tensors.values() if info.path == part] for part in parts]
    assert sum(map(len, groups)) == len(infos) and all(groups)
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        size = sum(info.num_bytes for info in group)
        assert len(group) <= max_tensors and (size <= max_bytes or len(group) == 1)
        if following is not None:
            assert len(group) == max_tensors or size + following[0].num_bytes > max_bytes


def test_keys_of_the_parts(whole, tmp_path):
    parts = split(whole, tmp_path / "m", max_tensors=20)
    assert [os.path.basename(part) for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for number, part in enumerate(parts):
        keys = gguf_file._open_part(part).metadata.fields
        assert keys["split.no"] == Field.of(number, "u16")
        assert keys["split.count"] == Field.of(3, "u16")
        assert keys["split.tensors.count"] == Field.of(len(open_gguf(whole).tensors), "i32")
        others = [key for key in keys if not key.startswith("split.")]
        whole_keys = open_gguf(whole).metadata
        assert others == [key for key in whole_keys if number == 0 or key == "general.alignment"]


def test_a_split_file_is_split_anew(whole, tmp_path):
    first = split(whole, tmp_path / "a", max_tensors=30)[0]
    parts = split(first, tmp_path / "b", max_tensors=9)
    merge(parts[0], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()


def test_a_split_model_is_loaded(whole, tmp_path):
    parts = split(whole, tmp_path / "m", max_tensors=20)
    assert checkpoints_tools.load_gguf(parts[0]).config == checkpoints_tools.load_gguf(whole).config


def test_tensors_are_copied_in_pieces(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(split_lib, "_COPIED_BYTES", 1000)
    sizes = []
    read = split_lib.GGUFFile.read
    monkeypatch.setattr(split_lib.GGUFFile, "read", lambda *args: [read(*args), sizes.append(args[3])][0])
    parts = split(whole, tmp_path / "m", max_tensors=20)
    merge(parts[0], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    assert len(sizes) > 100 and max(sizes) == 1000


def test_progress_is_reported_after_each_tensor(whole, tmp_path):
    infos = open_gguf(whole).tensors.values()
    total = sum(info.num_bytes for info in infos)
    splitting, merging = [], []
    parts = split(whole, tmp_path / "m", max_tensors=20, progress=lambda *call: splitting.append(call))
    merge(parts[0], tmp_path / "merged.gguf", progress=lambda *call: merging.append(call))
    assert splitting == merging
    assert [done for done, *_ in splitting] == list(range(1, len(infos) + 1))
    assert splitting[-1] == (len(infos), len(infos), total, total)


@pytest.mark.parametrize("limits", [dict(max_bytes=0), dict(max_tensors=-1)], ids=["bytes", "tensors"])
def test_limits_must_be_positive(whole, tmp_path, limits):
    with pytest.raises(ValueError, match=r"max_\w+ must be at least 1, got"):
        split(whole, tmp_path / "m", **limits)


def test_more_parts_than_the_key_can_count(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(split_lib, "_MAX_PARTS", 3)
    with pytest.raises(ValueError, match=r"whole\.gguf must be split in at most 3 parts, got \d+\."):
        split(whole, tmp_path / "m", max_tensors=1)


def test_a_part_that_is_there_is_not_replaced(whole, tmp_path):
    (tmp_path / "m-00003-of-00003.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"m-00003-of-00003\.gguf must not be there"):
        split(whole, tmp_path / "m", max_tensors=20)
    assert os.listdir(tmp_path) == ["m-00003-of-00003.gguf"]
    assert (tmp_path / "m-00003-of-00003.gguf").read_text() == "mine"


def test_parts_are_not_merged_into_one_of_them(whole, tmp_path):
    parts = split(whole, tmp_path / "m", max_tensors=20)
    before = [pathlib.Path(part).read_bytes() for part in parts]
    for part in parts:
        with pytest.raises(ValueError, match="must not be one of the parts"):
            merge(parts[0], part)
    assert [pathlib.Path(part).read_bytes() for part in parts] == before


def test_a_missing_part_is_named(whole, tmp_path):
    parts = split(whole, tmp_path / "m", max_tensors=20)
    os.unlink(parts[1])
    with pytest.raises(GGUFError, match=r"m-00002-of-00003\.gguf: cannot be read"):
        merge(parts[0], tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()


def test_nothing_is_left_when_reading_fails(whole, tmp_path):
    calls = []

    def stop(done, *_):
        calls.append(done)
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(whole, tmp_path / "m", max_tensors=20, progress=stop)
    assert calls[-1] == 30 and os.listdir(tmp_path) == []
    parts = split(whole, tmp_path / "m", max_tensors=20)
    (tmp_path / "merged.gguf").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        merge(parts[0], tmp_path / "merged.gguf", progress=stop)
    assert (tmp_path / "merged.gguf").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 4


def test_no_part_is_left_when_one_cannot_be_moved(whole, tmp_path, monkeypatch):
    rename, moved = os.rename, []

    def fail_at_last(source, target):
        moved.append(os.path.basename(target))
        if len(moved) == 3:
            raise OSError(28, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_last)
    with pytest.raises(OSError, match="No space left"):
        split(whole, tmp_path / "m", max_tensors=20)
    assert moved == [f"m-0000{i}-of-00003.gguf" for i in (3, 2, 1)]  # the first one is seen last
    assert os.listdir(tmp_path) == []


_FULL = """
import resource, sys
from checkpoints_tools.split import merge, split
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
whole, first, folder = sys.argv[1:]
for write in (lambda: split(whole, f"{folder}/n", max_tensors=20), lambda: merge(first, f"{folder}/n.gguf")):
    try:
        write()
    except OSError as error:
        print(error.strerror, error.filename)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit on the size of files")
def test_a_full_disk_leaves_nothing(whole, tmp_path):
    first = split(whole, tmp_path / "m", max_tensors=20)[0]
    before = sorted(os.listdir(tmp_path))
    command = [sys.executable, "-c", _FULL, whole, first, tmp_path]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.splitlines() == [f"File too large {tmp_path / name}" for name in ("n", "n.gguf")]
    assert sorted(os.listdir(tmp_path)) == before
