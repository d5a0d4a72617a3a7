"""Which page of a pool has which tokens of which sequence: plain lists on the host, no arrays.

A page has one owner, or several that share what they have in common. No sequence ever writes to a shared
page: `append` gives it a copy first. The device learns of all this through `row` alone.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from mla_jax.cache.rows import PAGE_SIZE


class PoolExhausted(Exception):
    """More pages are needed than are free; nothing was changed."""


@dataclasses.dataclass
class _Sequence:
    pages: list[int]
    length: int


class PageTable:
    """The pages of a pool and their owners.

    Attributes:
      num_pages: pages Z in the pool.
      page_size: tokens G in a page.
    """

    def __init__(self, num_pages: int, page_size: int = PAGE_SIZE):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}.")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(reversed(range(num_pages)))
        self._owners = [0] * num_pages
        self._sequences: dict[int, _Sequence] = {}
        self._names = itertools.count()

    @property
    def num_free(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def length(self, sequence: int) -> int:
        """Returns the number of tokens of a sequence."""
        return self._sequences[sequence].length

    def row(self, sequence: int, width: int) -> list[int]:
        """Returns the pages of a sequence in order, filled up to `width` with `num_pages`, which is no page.

        Raises:
          ValueError: if it has more.
        """
        pages = self._sequences[sequence].pages
        if len(pages) > width:
            raise ValueError(f"width must be at least the {len(pages)} pages of the sequence, got {width}.")
        return pages + [self.num_pages] * (width - len(pages))

    def pages(self, sequence: int) -> tuple[int, ...]:
        """Returns the pages of a sequence in order."""
        return tuple(self._sequences[sequence].pages)

    def open(self, pages: Sequence[int] = ()) -> int:
        """Returns a new sequence: without tokens, or with `pages`, full ones that others have or hold."""
        sequence = next(self._names)
        self._sequences[sequence] = _Sequence(list(pages), len(pages) * self.page_size)
        for page in pages:
            self.hold(page)
        return sequence

    def hold(self, page: int) -> None:
        """Keeps a page that somebody has from being freed, until `drop`."""
        if not self._owners[page]:
            raise ValueError(f"page must have an owner to be held, got the free page {page}.")
        self._owners[page] += 1

    def drop(self, page: int) -> None:
        """Takes back one `hold`."""
        self._release(page)

    def num_owners(self, page: int) -> int:
        """Returns how many sequences have the page, and holds."""
        return self._owners[page]

    def append(self, sequence: int, count: int) -> list[tuple[int, int]]:
        """Makes room for `count` more tokens.

        Returns:
          (source, target) pages to be copied before the tokens are written: at most one, where the sequence
          goes on within a page that it shares.

        Raises:
          PoolExhausted: if there are not enough free pages. Nothing is changed then.
        """
        entry = self._sequences[sequence]
        needed, is_copied = self.needed(sequence, count), self._copies(entry, count)
        if needed > len(self._free):
            raise PoolExhausted(
                f"{needed} pages of {self.page_size} tokens must be free, "
                f"got {len(self._free)} of {self.num_pages}."
            )
        copies = []
        if is_copied:
            last = entry.pages[-1]
            entry.pages[-1] = self._take()
            self._release(last)
            copies.append((last, entry.pages[-1]))
        entry.pages += [self._take() for _ in range(needed - is_copied)]
        entry.length += count
        return copies

    def needed(self, sequence: int, count: int) -> int:
        """Returns how many free pages `append` would take."""
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}.")
        entry = self._sequences[sequence]
        num_more = self.pages_for(entry.length + count) - len(entry.pages)
        return num_more + self._copies(entry, count)

    def pages_for(self, length: int) -> int:
        """Returns how many pages so many tokens lie on."""
        return -(-length // self.page_size)

    def fork(self, sequence: int) -> int:
        """Returns a new sequence with the same tokens, sharing all pages."""
        entry = self._sequences[sequence]
        twin = self.open(entry.pages)
        self._sequences[twin].length = entry.length
        return twin

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets the tokens of a sequence from `length` on."""
        entry = self._sequences[sequence]
        if not 0 <= length <= entry.length:
            raise ValueError(f"length must be in [0, {entry.length}], got {length}.")
        num_kept = self.pages_for(length)
        for page in reversed(entry.pages[num_kept:]):
            self._release(page)
        del entry.pages[num_kept:]
        entry.length = length

    def free(self, sequence: int) -> None:
        """Frees the pages of a sequence that no other has, and forgets it."""
        self.truncate(sequence, 0)
        del self._sequences[sequence]

    def _copies(self, entry, count):
        """Whether it would write to a page that it shares."""
        is_within = count > 0 and entry.length % self.page_size > 0
        return is_within and self._owners[entry.pages[-1]] > 1

    def _take(self):
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _release(self, page):
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)
