"""Memory that tensors are read into.

It lies in huge pages where the system has them: a core reads weights faster out of pages of 2 MiB than out of
pages of 4 KiB. Small tensors share a mapping, which goes when the last of them goes.
"""

import contextlib
import mmap
import threading

import numpy as np

BUFFER_ALIGNMENT = 64  # what XLA asks of a host buffer that it adopts without a copy

_SHARED_BYTES = 16 << 20
# Memory of the process alone; what processes may share gets no huge pages. Windows has no such flags.
_PRIVATE = dict(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_PRIVATE") else {}

_lock = threading.Lock()
_rest = np.empty(0, np.uint8)  # of the newest mapping that is shared


def aligned_empty(num_bytes: int) -> np.ndarray:
    """Returns an unset uint8[num_bytes] whose address is a multiple of `BUFFER_ALIGNMENT`.

    Raises:
      MemoryError: if there is not so much.
    """
    global _rest
    size = max(1, -(-num_bytes // BUFFER_ALIGNMENT)) * BUFFER_ALIGNMENT
    if size > _SHARED_BYTES // 4:
        return _map(size)[:num_bytes]
    with _lock:
        if _rest.size < size:
            _rest = _map(_SHARED_BYTES)
        data, _rest = _rest[:num_bytes], _rest[size:]
    return data


def _map(size):
    try:
        mapping = mmap.mmap(-1, size, **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"{size} bytes of memory could not be had: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel that has none
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)
