"""GGUF -> orbax -> GGUF is byte-equal; a folder that was altered is refused in one sentence."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from checkpoints_tools import gguf_file, orbax_files
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_file import GGUFError
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.orbax_files import from_orbax, load_orbax, to_orbax
from checkpoints_tools.split import split

VARIANTS = {
    "plain": {},
    "q8_0 both": dict(weight_type="Q8_0", kv="both"),
    "old split": dict(weight_type="BF16", kv="k_b_v_b_2d", q_lora=False),
    "merged": dict(weight_type="F16", merged=True, gating="softmax", groups=2, groups_used=1),
    "alignment 32": dict(weight_type="Q8_0", alignment=None, sizes={"embed": 96}),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back_gives_the_same_file(tmp_path, options):
    write_deepseek2(tmp_path / "a.gguf", **options)
    to_orbax(tmp_path / "a.gguf", tmp_path / "folder")
    from_orbax(tmp_path / "folder", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf", "folder"]


def _changed(path, change):
    """Writes a file anew with the list of its tensors changed."""
    file = gguf_file.open_gguf(path)
    tensors = [
        TensorData(name, info.shape, info.ggml_type, file.read(name)) for name, info in file.tensors.items()
    ]
    write_gguf(path, file.metadata, change(tensors))


def test_interleaved_tensors(tmp_path):
    def interleave(tensors):
        r8 = lambda t: dataclasses.replace(t, ggml_type=IDS["q8_0_r8"]) if t.ggml_type == IDS["q8_0"] else t
        return [r8(tensor) for tensor in tensors]

    write_deepseek2(tmp_path / "a.gguf", weight_type="Q8_0")
    _changed(tmp_path / "a.gguf", interleave)
    to_orbax(tmp_path / "a.gguf", tmp_path / "folder")
    from_orbax(tmp_path / "folder", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_tensors_that_the_network_does_not_read(tmp_path):
    def add(tensors):
        for place, name in ((2, "blk.3.nextn.eh_proj.weight"), (7, "../a/b.zarray")):
            tensors.insert(place, TensorData(name, (2, 256), IDS["iq2_k"], np.full(152, place, np.uint8)))
        return tensors

    path = tmp_path / "a.gguf"
    write_deepseek2(path)
    _changed(path, add)
    to_orbax(path, tmp_path / "folder")
    from_orbax(tmp_path / "folder", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


def test_split_files_become_one(tmp_path):
    write_deepseek2(tmp_path / "a.gguf")
    to_orbax(split(tmp_path / "a.gguf", tmp_path / "m", max_tensors=20)[0], tmp_path / "folder")
    from_orbax(tmp_path / "folder", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_what_is_loaded_is_the_checkpoint_of_the_file(tmp_path):
    write_deepseek2(tmp_path / "a.gguf", weight_type="Q8_0", yarn=True)
    to_orbax(tmp_path / "a.gguf", tmp_path / "folder")
    expected, found = checkpoints_tools.load_gguf(tmp_path / "a.gguf"), load_orbax(tmp_path / "folder")
    assert found.config == expected.config and found.metadata.fields == expected.metadata.fields
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        assert isinstance(ours, jax.Array) and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_orbax_alone_reads_the_arrays(tmp_path):
    stored = write_deepseek2(tmp_path / "a.gguf", weight_type="BF16")
    to_orbax(tmp_path / "a.gguf", tmp_path / "folder")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "folder")
    weight = restored["params"]["layers_0"]["attn"]["q_a"]["weight"]
    assert weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(weight, np.float32), stored["blk.0.attn_q_a.weight"])
    assert json.loads((tmp_path / "folder/gguf.json").read_text())["config"]["mla"]["kv_lora_rank"] == 32


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_deepseek2(folder / "a.gguf", weight_type="Q8_0", layers=2, kv="both")
    to_orbax(folder / "a.gguf", folder / "folder")
    return folder


def _flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


CHANGES = {
    "one bit": lambda path: path.write_bytes(_flip(path.read_bytes())),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_altered_folder_is_refused(written, tmp_path, change):
    files = sorted(path.relative_to(written) for path in written.glob("folder/**/*") if path.is_file())
    assert len(files) > 5
    for path in files:
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        shutil.copytree(written / "folder", tmp_path / "folder")
        change(tmp_path / path)
        with pytest.raises(GGUFError, match=r"folder(/gguf\.json)?: [^\n]*\.$"):
            from_orbax(tmp_path / "folder", tmp_path / "b.gguf")
        assert not (tmp_path / "b.gguf").exists()


def _train_like(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {"step": jnp.int32(3)})


FOREIGN = {
    "missing": lambda folder: None,
    "empty": lambda folder: folder.mkdir(),
    "a file": lambda folder: folder.write_text("text"),
    "another checkpoint": _train_like,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_folder_is_refused(tmp_path, make):
    make(tmp_path / "folder")
    with pytest.raises(GGUFError, match=r"folder/gguf\.json: cannot be read: [^\n]*\.$"):
        from_orbax(tmp_path / "folder", tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def _rewritten(written, tmp_path, change):
    """Copies the folder with another `gguf.json` that has the right sha256, as somebody malicious could."""
    shutil.copytree(written / "folder", tmp_path / "folder")
    about = json.loads((tmp_path / "folder/gguf.json").read_text())
    del about["sha256"]
    change(about)
    about["sha256"] = orbax_files._digest(about)
    (tmp_path / "folder/gguf.json").write_text(json.dumps(about))


def test_an_altered_key_is_refused(written, tmp_path):
    shutil.copytree(written / "folder", tmp_path / "folder")
    path = tmp_path / "folder/gguf.json"
    about = json.loads(path.read_text())
    about["keys"][-1][2] = "AQ==" if about["keys"][-1][2] == "AA==" else "AA=="
    path.write_text(json.dumps(about))
    with pytest.raises(GGUFError, match=r"folder: must be as it was written, but gguf\.json is not"):
        load_orbax(tmp_path / "folder")


LIES = {
    "format": (lambda about: about.update(format="another"), "format 'mla-jax checkpoint 1', got 'another'"),
    "no keys": (lambda about: about.update(keys=[]), "general.architecture"),
    "shape": (lambda about: about["table"][0].__setitem__(1, [1 << 40, 64]), "token_embd.weight"),
    "unread size": (lambda about: about["table"][-1].__setitem__(1, [1 << 40]), "must"),
    "type": (lambda about: about["table"][0].__setitem__(2, 10**9), "must be a whole checkpoint"),
    "value": (lambda about: about["keys"][0].__setitem__(2, ""), "must be a whole checkpoint"),
    "list": (lambda about: about.update(table=3), "must be a whole checkpoint"),
}


@pytest.mark.parametrize(("change", "match"), LIES.values(), ids=LIES)
def test_a_lie_with_a_right_sha256_is_refused(written, tmp_path, change, match):
    _rewritten(written, tmp_path, change)
    with pytest.raises(GGUFError, match=match):
        load_orbax(tmp_path / "folder")


def test_a_pipe_in_the_folder_is_not_waited_for(written, tmp_path):
    shutil.copytree(written / "folder", tmp_path / "folder")
    os.mkfifo(tmp_path / "folder" / "pipe")
    with pytest.raises(GGUFError, match=r"folder/pipe: cannot be read: it must be a regular file"):
        load_orbax(tmp_path / "folder")


def test_too_little_memory_is_not_the_fault_of_the_folder(written, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(orbax_files.layout, "check_layout", fail)
    with pytest.raises(MemoryError):
        load_orbax(written / "folder")


def test_a_folder_in_use_is_kept(written, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"folder must be a new or an empty folder"):
        to_orbax(written / "a.gguf", tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "mine"]
    os.unlink(tmp_path / "folder" / "mine")
    to_orbax(written / "a.gguf", tmp_path / "folder")
    from_orbax(tmp_path / "folder", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (written / "a.gguf").read_bytes()


def test_a_failed_run_leaves_nothing(written, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_orbax(written / "a.gguf", tmp_path / "folder", progress=stop)
    (tmp_path / "bad.gguf").write_bytes((written / "a.gguf").read_bytes()[:-1000])
    with pytest.raises(GGUFError, match="cut off"):
        to_orbax(tmp_path / "bad.gguf", tmp_path / "folder")
    assert os.listdir(tmp_path) == ["bad.gguf"]


_FULL = """
import resource, sys
from checkpoints_tools.orbax_files import to_orbax
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    to_orbax(*sys.argv[1:])
except OSError as error:
    print(error.strerror, error.filename)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit on the size of files")
def test_a_disk_without_room_is_left_alone(written, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, and the disk has less") as caught:
        to_orbax(written / "a.gguf", tmp_path / "folder")
    assert caught.value.filename == str(tmp_path / "folder") and os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(written, tmp_path):
    command = [sys.executable, "-c", _FULL, written / "a.gguf", tmp_path / "folder"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output == f"File too large {tmp_path / 'folder'}\n"
    assert os.listdir(tmp_path) == []
