"""Who runs, on which pages, and what the device does next: lists and numbers, no arrays.

Requests wait in order. One is let in when a slot is free and the pool has room for its prompt; from then on
it takes pages as it grows. Where there are none left, pages of earlier prompts are given up, and then the
request that came last is swapped out to the host, to go on later from the very same rows.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from mla_jax import steps
from mla_jax.cache import PageTable, PoolExhausted
from mla_jax.serve.prefix import PrefixCache, num_shared, page_keys
from mla_jax.serve.request import Request

_BESIDE_DECODE = 128  # tokens of prompts that are computed while others wait for their next token


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
      request: what was asked for.
      root: what its rows depend on besides its tokens.
      tokens: prompt and what was drawn.
      limit: tokens at which it ends.
      num_rows: rows of the cache that were written: those of the first tokens.
      num_cached: how many of them it found.
      pages: its name in the page table; None while it waits.
      slot: where it runs; None while it waits.
      newest_slot: where it runs or ran; None if it never did.
      keys: of the full pages of its prompt, once they were asked for.
      swapped: its rows on the host, if it was swapped out.
    """

    request: Request
    root: str
    tokens: list[int]
    limit: int
    num_rows: int = 0
    num_cached: int = 0
    pages: int | None = None
    slot: int | None = None
    newest_slot: int | None = None
    keys: list[bytes] | None = None
    swapped: Any = None

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def is_prefilled(self) -> bool:
        """Whether rows of all tokens but the newest are there, so that the next token can be drawn."""
        return self.num_rows == len(self.tokens) - 1


@dataclasses.dataclass(frozen=True)
class Kept:
    """The rows of a slot's last request, kept until the slot or the room is needed."""

    pages: int
    tokens: list[int]
    root: str


@dataclasses.dataclass
class Slot:
    """A place to run in."""

    id: int
    job: Job | None = None
    kept: Kept | None = None
    used: float = 0.0  # when last, by the clock of `time.monotonic`


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens of a prompt to be computed in one call: `tokens`, padded to `width`, from slot `start` on."""

    job: Job
    tokens: list[int]
    start: int
    width: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the device does in a step, in this order.

    Attributes:
      leaving: (job, its pages): rows to be copied to the host.
      copies: (source, target) pages.
      coming: (job, pages) to be filled with its `swapped` rows.
      prefill: pieces of prompts.
      decode: jobs that draw tokens.
      num_steps: how many at most.
    """

    leaving: list[tuple[Job, tuple[int, ...]]]
    copies: list[tuple[int, int]]
    coming: list[tuple[Job, tuple[int, ...]]]
    prefill: list[Piece]
    decode: list[Job]
    num_steps: int


class Scheduler:
    """The requests that wait and run, and the pages of the pool.

    Attributes:
      table: who has which page.
      prefix: rows of earlier prompts.
      slots: places to run in.
      waiting: jobs to be let in, in order.
      num_preemptions: how often a job was swapped out.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        widths: Sequence[int],
        prefix_limit: int | None = None,
        keep_drawn: bool = False,
        first_slot: int = 0,
    ):
        self.table = PageTable(num_pages, page_size)
        self.prefix = PrefixCache(self.table, prefix_limit)
        self.slots = [Slot(first_slot + i) for i in range(num_slots)]
        self.waiting: collections.deque[Job] = collections.deque()
        self.num_preemptions = 0
        self._running: list[Job] = []  # in the order of their coming
        self._keep_drawn = keep_drawn
        self._widths = tuple(widths)

    @property
    def running(self) -> Sequence[Job]:
        """Jobs that have a slot, the first to come first."""
        return self._running

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue."""
        self.waiting.append(job)

    def plan(self, steps_wanted: Callable[[], int], beside: bool = False) -> Plan | None:
        """Decides what the device does next; None if there is nothing to do.

        Args:
          steps_wanted: how many tokens to draw in a row where nobody waits.
          beside: whether tokens are drawn elsewhere in the same step.
        """
        ready = [job for job in self._running if job.is_prefilled]
        is_busy = self.waiting or len(ready) < len(self._running)
        longest = max((job.limit - len(job.tokens) for job in ready), default=0)
        num_steps = 1 if is_busy or not ready else min(longest, steps_wanted())
        num_steps, leaving = self._make_room_to_draw(ready, num_steps)
        ready = [job for job in ready if job.slot is not None]
        copies = []
        for job in ready:
            copies += self.table.append(job.pages, _rows_to_draw(job, num_steps))
        coming = [] if leaving else self._admit(copies)
        prefill = self._prefill(_BESIDE_DECODE if ready or beside else self._widths[-1])
        if not (ready or prefill or coming or leaving):
            return self.plan(steps_wanted, beside) if self._running else None  # all rows were there already
        return Plan(leaving, copies, coming, prefill, ready, num_steps)

    def wrote(self, piece: Piece) -> None:
        """Notes that a piece was computed: its rows can be found by other requests from now on."""
        job = piece.job
        job.num_rows += len(piece.tokens)
        if job.request.reuse_prefix:
            full = job.num_rows // self.table.page_size
            self.prefix.add(self._keys(job)[:full], self.table.pages(job.pages)[:full])

    def drew(self, job: Job) -> None:
        """Notes that a job's tokens have grown by what it drew."""
        job.num_rows = len(job.tokens) - 1
        self.table.truncate(job.pages, job.num_rows)

    def settle(self) -> None:
        """Takes back the room for what a step that failed was to draw."""
        for job in self._running:
            length = max(job.num_rows, job.num_prompt - 1)
            self.table.truncate(job.pages, min(length, self.table.length(job.pages)))

    def num_known(self, job: Job) -> int:
        """Returns how many tokens of the prompt of a job that waits have rows here; a slot must be idle."""
        is_new = job.swapped is None and job.request.reuse_prefix
        found = self.prefix.find(self._keys(job)) if is_new else []
        kept = self._choose_slot(job, [slot for slot in self.slots if slot.job is None])[1]
        return max(len(found) * self.table.page_size, kept)

    def finish(self, job: Job) -> None:
        """Takes a job out, whether it runs or waits; its rows are kept where others may use them."""
        if job.slot is None:
            self.waiting.remove(job)
            return
        slot = self._leave(job)
        count = job.num_rows if self._keep_drawn else min(job.num_rows, job.num_prompt - 1)
        self.table.truncate(job.pages, count)
        if not (job.request.reuse_prefix and count):
            self.table.free(job.pages)
            return
        slot.kept = Kept(job.pages, job.tokens[:count], job.root)
        if self._keep_drawn:
            keys = page_keys(slot.kept.tokens, self.table.page_size, job.root)
            self.prefix.add(keys, self.table.pages(job.pages)[: len(keys)])

    def discard(self, job: Job) -> None:
        """Takes a job out of which no row is to be used again."""
        if job.slot is None:
            self.waiting.remove(job)
            return
        self._leave(job)
        pages = self.table.pages(job.pages)
        self.prefix.forget(pages)
        self.table.free(job.pages)
        for slot in self.slots:
            if slot.kept and set(pages).intersection(self.table.pages(slot.kept.pages)):
                self.erase(slot)

    def forget(self) -> None:
        """Forgets all rows that nobody runs on."""
        for slot in self.slots:
            self.erase(slot)
        self.prefix.clear()

    def erase(self, slot: Slot) -> int:
        """Forgets what a slot keeps, and returns how many tokens that was."""
        if slot.kept is None:
            return 0
        kept, slot.kept = slot.kept, None
        self.table.free(kept.pages)
        return len(kept.tokens)

    def keep(self, slot: Slot, tokens: Sequence[int], root: str) -> tuple[int, ...]:
        """Makes an idle slot keep rows of `tokens`, and returns the pages to write them to.

        Raises:
          PoolExhausted: if there is no room for them.
        """
        needed = self.table.pages_for(len(tokens))
        if not self._make_room(needed):
            raise PoolExhausted(f"{needed} pages of {self.table.page_size} tokens must be free, got fewer.")
        self.erase(slot)
        slot.kept = Kept(self.table.open(), list(tokens), root)
        self.table.append(slot.kept.pages, len(tokens))
        return self.table.pages(slot.kept.pages)

    def _leave(self, job):
        slot = self.slots[job.slot - self.slots[0].id]
        slot.job, slot.used, job.slot = None, time.monotonic(), None
        self._running.remove(job)
        return slot

    def _keys(self, job):
        if job.keys is None:
            job.keys = page_keys(job.tokens[: job.num_prompt - 1], self.table.page_size, job.root)
        return job.keys

    def _make_room(self, count, own=None):
        """Frees pages that neither who runs nor `own` has until `count` are free; False if that cannot be."""
        if self.table.num_free >= count:
            return True
        taken = self._taken() | set(() if own is None else self.table.pages(own))
        if self.table.num_pages - len(taken) < count:
            return False
        kept = sorted((slot for slot in self.slots if slot.kept), key=lambda slot: slot.used)
        while self.table.num_free < count:
            if not self.prefix.evict(count - self.table.num_free):
                self.erase(kept.pop(0))
        return True

    def _make_room_to_draw(self, ready, num_steps):
        """Swaps out those who came last until the others have room; returns the steps and who leaves."""
        leaving = []
        while True:
            rows = ((job.pages, _rows_to_draw(job, num_steps)) for job in ready)
            if self._make_room(sum(self.table.needed(*pair) for pair in rows)):
                return num_steps, leaving
            if num_steps > 1:
                num_steps = 1
                continue
            victim = self._running[-1]
            leaving.append((victim, self.table.pages(victim.pages)))
            self._leave(victim)
            self.table.free(victim.pages)
            victim.pages = None
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            ready = [job for job in ready if job is not victim]

    def _admit(self, copies):
        coming = []
        while self.waiting and self._let_in(self.waiting[0], copies):
            job = self.waiting.popleft()
            if job.swapped is not None:
                coming.append((job, self.table.pages(job.pages)))
        return coming

    def _let_in(self, job, copies):
        """Gives a job a slot, and pages for its prompt or the rows that it had; False if there are none."""
        idle = [slot for slot in self.slots if slot.job is None]
        if not idle:
            return False
        is_new = job.swapped is None
        found = self.prefix.find(self._keys(job)) if is_new and job.request.reuse_prefix else []
        if self._running and not self._fits(job, found):
            return False
        slot, shared = self._choose_slot(job, idle)
        if not (self._attach(job, slot, found, shared, copies) or self._attach(job, slot, [], 0, copies)):
            job.pages = None
            return False  # until others have ended: alone it fits
        slot.job, job.slot, job.newest_slot = job, slot.id, slot.id
        self._running.append(job)
        return True

    def _taken(self):
        return set(itertools.chain.from_iterable(self.table.pages(job.pages) for job in self._running))

    def _fits(self, job, found):
        """Whether a job can run beside the others, each of which may soon need a page more."""
        taken = self._taken()
        needed = self.table.pages_for(len(job.tokens)) + 1 - len(taken.intersection(found))
        return needed + len(taken) + len(self._running) <= self.table.num_pages

    def _attach(self, job, slot, found, shared, copies):
        """Gives a job pages: `shared` tokens of what its slot keeps, or `found` ones, and new ones."""
        if shared > len(found) * self.table.page_size:
            job.pages, slot.kept = slot.kept.pages, None
            self.table.truncate(job.pages, shared)
        else:
            job.pages = self.table.open(found)
            self.erase(slot)
        length = self.table.length(job.pages)
        num_rows = length if job.swapped is None else job.num_rows
        num_more = max(num_rows, job.num_prompt - 1) - length
        if not self._make_room(self.table.needed(job.pages, num_more), job.pages):
            self.table.free(job.pages)
            return False
        copies += self.table.append(job.pages, num_more)
        if job.swapped is None:
            job.num_rows = job.num_cached = length
        return True

    def _choose_slot(self, job, idle):
        """Returns the idle slot that keeps the longest beginning of a job's prompt, and its length.

        Of those that keep none of it, one that keeps nothing, else the one that was used longest ago.
        """
        wanted = job.tokens[: job.num_prompt - 1]

        def shared(slot):
            is_alike = slot.kept and slot.kept.root == job.root and job.request.reuse_prefix
            return num_shared(slot.kept.tokens, wanted) if is_alike and job.swapped is None else 0

        best = max(idle, key=lambda slot: (shared(slot), slot.kept is None, -slot.used))
        return best, shared(best)

    def _prefill(self, budget):
        """Returns the next pieces of prompts, of at most `budget` tokens together."""
        pieces = []
        for job in self._running:
            widths = [width for width in self._widths if width <= budget]
            if job.is_prefilled or not widths:
                continue
            self._look_again(job)
            if rest := job.tokens[job.num_rows : job.num_prompt - 1]:
                count, width = steps.split_prompt(len(rest), widths[-1])[0]
                pieces.append(Piece(job, rest[:count], job.num_rows, width))
                budget -= width
        return pieces

    def _look_again(self, job):
        """Takes pages that another request has computed while this one waited for its first piece."""
        if job.num_rows > job.num_cached or not job.request.reuse_prefix:
            return
        found = self.prefix.find(self._keys(job))
        if len(found) * self.table.page_size > job.num_rows:
            pages = self.table.open(found)
            self.table.free(job.pages)
            job.pages, job.num_rows = pages, self.table.length(pages)
            job.num_cached = job.num_rows
            self.table.append(pages, job.num_prompt - 1 - job.num_rows)


def _rows_to_draw(job, num_steps):
    return min(num_steps, job.limit - len(job.tokens))
