"""Memory for tensors: aligned, apart from each other, and given back."""

import pathlib
import re

import numpy as np
import pytest

from checkpoints_tools import buffers

_MAPPED = pathlib.Path("/proc/self/statm")
_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_buffers_are_aligned_and_do_not_share_bytes():
    sizes = [0, 1, 63, 64, 65, 4096, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 17 << 20, 100]
    filled = []
    for value, size in enumerate(sizes):
        data = buffers.aligned_empty(size)
        assert data.shape == (size,) and data.ctypes.data % buffers.BUFFER_ALIGNMENT == 0
        data[:] = value
        filled.append(data)
    for value, data in enumerate(filled):
        assert np.all(data == value)


@pytest.mark.skipif(not _MAPPED.exists(), reason="needs the process table of Linux")
@pytest.mark.parametrize("size", [1 << 20, 24 << 20], ids=["shared", "alone"])
def test_memory_is_given_back(size):
    def mapped():
        return int(_MAPPED.read_text().split()[0]) * 4096

    before = mapped()
    for _ in range(128):
        buffers.aligned_empty(size)[:] = 1
    assert mapped() - before < 64 << 20
    kept = [buffers.aligned_empty(size) for _ in range(8)]
    assert mapped() - before >= sum(part.size for part in kept) - buffers._SHARED_BYTES, (
        "it is not in the table"
    )


def _has_huge_pages():
    return _HUGE_PAGES.exists() and "[never]" not in _HUGE_PAGES.read_text()


@pytest.mark.skipif(not _has_huge_pages(), reason="needs huge pages of Linux")
@pytest.mark.parametrize("size", [1 << 20, 24 << 20], ids=["shared", "alone"])
def test_buffers_lie_in_huge_pages(size):
    kept = [buffers.aligned_empty(size) for _ in range((32 << 20) // size)]
    for part in kept:
        part[:] = 1
    starts = {part.ctypes.data >> 12 for part in kept}
    huge, inside = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(end, 16) >> 12 for end in match.groups())
            inside = any(first <= start < last for start in starts)
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) << 10
    assert huge >= sum(part.size for part in kept) // 2
