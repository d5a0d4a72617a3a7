"""Folders take their place whole, and what they cannot replace is refused before anything is written."""

import os

import pytest

from checkpoints_tools.folders import creating, is_free


def _link(path):
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


TAKEN = {
    "a file": lambda path: path.write_text("mine"),
    "a folder in use": lambda path: (path / "mine").mkdir(parents=True),
    "a link to an empty folder": _link,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_what_cannot_be_replaced_is_refused_at_once(tmp_path, make):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"out must be a new or an empty folder, no link .*, it is not\.$"):
        with creating(tmp_path / "out"):
            raise AssertionError("the work must not begin")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("written", [".", "{}", "../{}"])
def test_the_current_folder_stays(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    assert not is_free(written.format(tmp_path if written == "{}" else tmp_path.name))


def test_a_mounted_disk_stays(tmp_path, monkeypatch):
    assert is_free(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    assert not is_free(tmp_path)


@pytest.mark.parametrize("ending", ["", "/"])
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty"])
def test_a_folder_takes_its_place(tmp_path, is_there, ending):
    if is_there:
        (tmp_path / "out").mkdir()
    with creating(f"{tmp_path}/out{ending}") as unfinished:
        with open(os.path.join(unfinished, "file"), "w") as file:
            file.write("new")
        assert not (tmp_path / "out" / "file").exists()
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "file"]


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), creating(tmp_path / "out") as unfinished:
        os.mkdir(os.path.join(unfinished, "inner"))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_known", [False, True], ids=["full disk", "no such place"])
def test_an_error_names_the_folder_that_was_asked_for(tmp_path, is_known):
    with pytest.raises(OSError) as caught, creating(tmp_path / "out") as unfinished:
        raise OSError(28, "No space left", *([os.path.join(unfinished, "file")] if is_known else []))
    assert caught.value.filename == str(tmp_path / "out")
    with pytest.raises(OSError) as caught, creating(tmp_path / "absent" / "out"):
        pass
    assert caught.value.filename == str(tmp_path / "absent" / "out")
    with pytest.raises(OSError) as caught, creating(tmp_path / "out"):
        raise OSError(2, "No such file", "another file")
    assert caught.value.filename == "another file"
