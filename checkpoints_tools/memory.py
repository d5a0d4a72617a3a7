"""How much memory there is to be had, and how arrays are kept in it."""

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Iterable, Iterator

import jax

_MEMORY = pathlib.Path("/proc/meminfo")
_OWN_GROUP = pathlib.Path("/proc/self/cgroup")
_GROUPS = pathlib.Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Returns the bytes that programs can have without swapping, or None where the system does not tell.

    What the system keeps of files counts, for it gives that up. Limits of control groups (version 2), which
    containers are, count as well.
    """
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *_left_in_groups()], default=None)


def _left_in_groups() -> Iterator[int]:
    """Yields what each control group that this process is in may still take."""
    with contextlib.suppress(OSError):
        own = [line[3:] for line in _OWN_GROUP.read_text().splitlines() if line.startswith("0::")]
        path = _GROUPS.joinpath(*pathlib.PurePath(own[0].strip("/")).parts) if own else _GROUPS
        for group in (path, *path.parents):
            with contextlib.suppress(OSError, ValueError):  # a group without a limit says "max"
                limit = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                of_files = int(stat["active_file"]) + int(stat["inactive_file"])
                yield max(0, limit - used + of_files)


def lock(arrays: Iterable[jax.Array]) -> int:
    """Keeps arrays that lie in the memory of this machine from being swapped out or dropped.

    Args:
      arrays: the arrays. Pages of a mapped file are read first. Those of another device are passed over.

    Returns:
      The bytes that are locked.

    Raises:
      OSError: if the system does not let it, saying how far it came; what was locked stays so.
    """
    if os.name != "posix":
        raise OSError("this system has no mlock")
    libc, locked = ctypes.CDLL(None, use_errno=True), 0
    for array in arrays:
        for shard in array.addressable_shards:
            if shard.device.platform != "cpu":
                continue
            size = shard.data.nbytes
            if libc.mlock(ctypes.c_void_p(shard.data.unsafe_buffer_pointer()), ctypes.c_size_t(size)):
                reason = os.strerror(ctypes.get_errno())
                raise OSError(f"{reason} after {locked / 2**30:.1f} GiB; see `ulimit -l`")
            locked += size
    return locked
