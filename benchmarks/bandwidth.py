"""Measures how fast plain reads of memory are, with a thread on each core that the process may use.

    taskset --cpu-list 0,1 python benchmarks/bandwidth.py

Each thread reads its own part of 512 MiB, far more than caches hold, by NumPy's `or` of all words, and by the
C library's search for a byte that is not there. Prints the bytes per second of the fastest pass, of 7 each.
"""

import ctypes
import os
import threading
import time

import numpy as np

_NUM_BYTES = 512 << 20
_PASSES = 7


_memchr = ctypes.CDLL(None).memchr
_memchr.argtypes, _memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p


def _search(words):
    _memchr(words.ctypes.data, 0, words.nbytes)


def _pass_seconds(read, parts):
    threads = [threading.Thread(target=read, args=(part,)) for part in parts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def measure(num_threads: int) -> float:
    """Returns bytes per second of the fastest pass of `num_threads` that read at the same time."""
    words = np.full(_NUM_BYTES // 8, 0x0101010101010101, np.uint64)
    parts = np.array_split(words, num_threads)
    reads = (np.bitwise_or.reduce, _search)
    return words.nbytes / min(_pass_seconds(read, parts) for read in reads for _ in range(_PASSES))


if __name__ == "__main__":
    print(measure(len(os.sched_getaffinity(0))))
