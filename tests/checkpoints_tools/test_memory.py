"""What memory is at hand, and what is locked in it."""

import ctypes
import pathlib

import jax.numpy as jnp
import pytest

from checkpoints_tools import memory

MIB = 1 << 20


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Returns a folder that stands for the system's: 800 MiB are at hand, and the process is in group a/b."""
    (tmp_path / "meminfo").write_text("MemTotal: 1024000 kB\nMemAvailable: 819200 kB\n")
    (tmp_path / "own").write_text("4:memory:/other\n0::/a/b\n")
    (tmp_path / "groups" / "a" / "b").mkdir(parents=True)
    for name, path in {"_MEMORY": "meminfo", "_OWN_GROUP": "own", "_GROUPS": "groups"}.items():
        monkeypatch.setattr(memory, name, tmp_path / path)
    return tmp_path


def _limit(group, limit, used, of_files):
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    half = of_files // 2
    (group / "memory.stat").write_text(f"anon 7\nactive_file {half}\ninactive_file {half}\n")


@pytest.mark.parametrize(
    ("group", "limit", "expected"),
    [
        (None, None, 800 * MIB),
        ("a/b", "max", 800 * MIB),
        ("a/b", 500 * MIB, 300 * MIB),
        ("a", 500 * MIB, 300 * MIB),
        ("a", 4000 * MIB, 800 * MIB),
        ("a/b", 1 * MIB, 0),
    ],
    ids=["no groups", "no limit", "own", "parent", "large", "full"],
)
def test_limits_of_groups_count(system, group, limit, expected):
    if group is not None:
        _limit(system / "groups" / group, limit, 300 * MIB, 100 * MIB)
    assert memory.available_memory() == expected


def test_a_system_that_does_not_tell(system):
    (system / "meminfo").unlink()
    assert memory.available_memory() is None


def _locked():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) << 10
    pytest.skip("needs the process table of Linux")


def test_arrays_are_locked():
    before, array = _locked(), jnp.ones((1 << 16,), jnp.uint8)
    assert memory.lock([array]) == 1 << 16
    assert _locked() - before >= 1 << 16
    libc = ctypes.CDLL(None)
    libc.munlock(ctypes.c_void_p(array.unsafe_buffer_pointer()), ctypes.c_size_t(1 << 16))


def test_what_cannot_be_locked_is_told(monkeypatch):
    class Full:
        def mlock(self, address, size):
            ctypes.set_errno(12)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, **_: Full())
    with pytest.raises(OSError, match=r"^Cannot allocate memory after 0.0 GiB; see `ulimit -l`$"):
        memory.lock([jnp.ones(4)])
