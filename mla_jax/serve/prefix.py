"""Rows of earlier prompts, found again by what they were computed from: page by page, on the host alone.

A full page is known by a hash over everything that its rows depend on: the tokens up to its end, the
expert reduction, and the salt of who asked. Pages that nobody runs on are freed when room is needed, those
first that were not asked for longest, and of a prompt the last page first.
"""

import collections
import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from mla_jax.cache import PageTable


def page_keys(tokens: Sequence[int], page_size: int, root: str) -> list[bytes]:
    """Returns a key for each full page of `tokens`; `root` is what rows depend on besides."""
    key, keys = hashlib.sha256(root.encode()).digest(), []
    data = np.asarray(tokens, "<i4").tobytes()
    for end in range(page_size, len(tokens) + 1, page_size):
        key = hashlib.sha256(key + data[4 * (end - page_size) : 4 * end]).digest()
        keys.append(key)
    return keys


def num_shared(first: list[int], second: list[int]) -> int:
    """Returns the length of the common beginning of two lists of tokens."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixCache:
    """Which page has the rows of which key. Each is held once, so it stays when its sequence ends.

    Attributes:
      limit: how many pages it holds at most; None for as many as there are.
    """

    def __init__(self, table: PageTable, limit: int | None = None):
        self.limit = limit
        self._table = table
        self._pages: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # least used first
        self._before: dict[bytes, bytes | None] = {}  # key of the page before each

    def __len__(self):
        return len(self._pages)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Returns the pages of the longest known beginning of `keys`, which counts as used now."""
        found = []
        for key in keys:
            if key not in self._pages:
                break
            found.append(self._pages[key])
        self._touch(keys[: len(found)])
        return found

    def add(self, keys: Sequence[bytes], pages: Iterable[int]) -> None:
        """Holds the pages of a prompt under their keys; all their rows must have been written."""
        before = None
        for key, page in zip(keys, pages, strict=True):
            if key not in self._pages:
                self._table.hold(page)
                self._pages[key], self._before[key] = page, before
            before = key
        self._touch(keys)
        while self.limit is not None and len(self._pages) > self.limit:
            self._drop(next(iter(self._pages)))

    def evict(self, count: int) -> int:
        """Frees up to `count` pages that nobody else has, the least used first, and returns how many."""
        idle = (key for key, page in self._pages.items() if self._table.num_owners(page) == 1)
        chosen = list(itertools.islice(idle, count))
        for key in chosen:
            self._drop(key)
        return len(chosen)

    def clear(self) -> None:
        """Forgets everything."""
        for key in list(self._pages):
            self._drop(key)

    def forget(self, pages: Iterable[int]) -> None:
        """Forgets some pages, whose rows turned out to be wrong, with whatever came after them."""
        pages = set(pages)
        wrong = {key for key, page in self._pages.items() if page in pages}
        while wrong:
            for key in wrong:
                self._drop(key)
            wrong = {key for key in self._pages if self._before[key] in wrong}

    def _drop(self, key):
        del self._before[key]
        self._table.drop(self._pages.pop(key))

    def _touch(self, keys):
        for key in reversed(keys):  # the first page last: it must outlive those after it
            self._pages.move_to_end(key)
