import pathlib
import re
import shutil

import pytest

import cpu_kernels
from cpu_kernels import library

ROOT = pathlib.Path(__file__).parent.parent.parent
SOURCES = ROOT / "cpu_kernels"


@pytest.fixture(autouse=True)
def kernels_compute():
    """Skips nothing because of a library that is there and is not taken: that is what fails here."""
    if library._find() is None:
        pytest.skip(f"the CPU kernels are not there: {cpu_kernels.unavailable_because()}")


@pytest.fixture
def load_anew():
    """Lets the next call find the library again, and the call after the test."""

    def forget():
        library._load.cache_clear()
        library.formats.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def sources(tmp_path, monkeypatch, load_anew):
    """Makes the library believe that its sources are in a folder, which it returns."""
    shutil.copytree(SOURCES / "src", tmp_path / "src")
    shutil.copy(SOURCES / "CMakeLists.txt", tmp_path)
    path = library._find()
    monkeypatch.setattr(library, "_find", lambda: path)
    monkeypatch.setattr(library, "_ROOT", tmp_path)
    return tmp_path


def test_library_is_built_from_these_sources():
    assert cpu_kernels.unavailable_because() == ""
    assert cpu_kernels.available()


def test_same_sources_elsewhere_fit(sources):
    assert cpu_kernels.unavailable_because() == ""


@pytest.mark.parametrize("name", ["src/kernels.h", "src/matmul.cc", "CMakeLists.txt", "src/new.h"])
def test_other_sources_leave_the_library_out(name, sources):
    with (sources / name).open("a") as file:
        file.write("\n")
    reason = cpu_kernels.unavailable_because()
    assert reason == (
        f"{library._find()} was built from other sources than {sources / 'src'} has now: "
        "install anew (`pip install -e .`)"
    )
    assert not cpu_kernels.available()
    assert cpu_kernels.formats() == frozenset() and cpu_kernels.instruction_sets() == ()


def test_without_sources_nothing_is_compared(sources):
    shutil.rmtree(sources / "src")
    assert cpu_kernels.available()


def test_library_for_a_newer_jax_is_left_out(load_anew, tmp_path, monkeypatch):
    """jax itself says so only when its CPU backend starts, which then fails for everything."""
    header = tmp_path / "xla/ffi/api/c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    monkeypatch.setattr("jax.ffi.include_dir", lambda: str(tmp_path))
    assert re.search(
        r"built for version 0\.\d+ of XLA's FFI, .* has 0\.1:", cpu_kernels.unavailable_because()
    )
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 10\n")
    load_anew()
    assert cpu_kernels.available()


def test_file_that_is_no_library_is_left_out(load_anew, tmp_path, monkeypatch):
    path = tmp_path / "cpu_kernels.so"
    path.write_text("not a library")
    monkeypatch.setattr(library, "_find", lambda: path)
    assert cpu_kernels.unavailable_because().startswith(f"{path} does not fit")


def test_no_library_is_no_error(load_anew, monkeypatch):
    monkeypatch.setattr(library, "_find", lambda: None)
    assert "pip install -v" in cpu_kernels.unavailable_because()
    with pytest.raises(ValueError, match="name must be one of"):
        cpu_kernels.use_instruction_set("generic")


def test_plain_loops_are_there_on_every_machine():
    names = cpu_kernels.instruction_sets()
    assert names[-1] == "generic" and len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_instruction_set_that_is_not_there_is_refused(name):
    with pytest.raises(
        ValueError, match=re.escape(f"one of {', '.join(cpu_kernels.instruction_sets())}, got")
    ):
        cpu_kernels.use_instruction_set(name)
