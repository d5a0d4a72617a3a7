"""The groups of a mesh behind one queue: each has a scheduler of its own, and all take each step together.

Devices along `data` share out the sequences and the pool, so a request stays in the group that it was given
to, on pages of that group. It is given to one no sooner than a slot is idle there.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from mla_jax.serve.scheduler import Job, Piece, Scheduler, Slot


@dataclasses.dataclass(frozen=True)
class Step:
    """What the device does in a step, in this order. Pages are numbers in the whole pool.

    Attributes:
      leaving: (job, its pages): rows to be copied to the host.
      copies: (source, target) pages.
      coming: (job, pages) to be filled with its `swapped` rows.
      prefill: pieces of prompts that are computed in one call, at most one of each group.
      decode: jobs that draw tokens, of each group.
      num_steps: how many at most.
    """

    leaving: list[tuple[Job, tuple[int, ...]]]
    copies: list[tuple[int, int]]
    coming: list[tuple[Job, tuple[int, ...]]]
    prefill: list[list[Piece]]
    decode: list[list[Job]]
    num_steps: int

    def calls(self, size: int, is_meant: Callable[[Job], bool]) -> list[list[Job]]:
        """Returns those who draw and are meant, in calls of at most `size` of each group."""
        groups = [[job for job in jobs if is_meant(job)] for jobs in self.decode]
        starts = range(0, max(map(len, groups)), size)
        return [list(itertools.chain(*(jobs[first : first + size] for jobs in groups))) for first in starts]


class Groups:
    """The requests that wait and run, and the pages of the pool: as a `Scheduler`, of one group or more.

    Attributes:
      schedulers: one for each group.
      slots: places to run in, of all groups, in order.
    """

    def __init__(
        self, num_groups: int, *, num_slots: int, num_pages: int, prefix_limit: int | None = None, **settings
    ):
        """Shares out slots and pages.

        Args:
          num_groups: how many.
          num_slots: of all groups, rounded up to as many for each.
          num_pages: of all groups, a multiple of `num_groups`.
          prefix_limit: pages for earlier prompts of all groups; None for as many as there are.
          **settings: of each `Scheduler`.
        """
        self._num_slots, self._num_pages = -(-num_slots // num_groups), num_pages // num_groups
        sizes = dict(num_slots=self._num_slots, num_pages=self._num_pages)
        limit = None if prefix_limit is None else prefix_limit // num_groups
        self.schedulers = [
            Scheduler(first_slot=group * self._num_slots, prefix_limit=limit, **sizes, **settings)
            for group in range(num_groups)
        ]
        self.slots: list[Slot] = [slot for scheduler in self.schedulers for slot in scheduler.slots]
        self._queue: collections.deque[Job] = collections.deque()  # of those that no group has yet

    @property
    def running(self) -> Sequence[Job]:
        """Jobs that have a slot; of each group the first to come first."""
        return [job for scheduler in self.schedulers for job in scheduler.running]

    @property
    def waiting(self) -> Sequence[Job]:
        """Jobs to be let in, in order; first those that a group has already."""
        return [*itertools.chain(*(scheduler.waiting for scheduler in self.schedulers)), *self._queue]

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs or waits; any thread may ask."""
        return not (self._queue or any(group.running or group.waiting for group in self.schedulers))

    @property
    def num_preemptions(self) -> int:
        """How often a job was swapped out."""
        return sum(scheduler.num_preemptions for scheduler in self.schedulers)

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return sum(scheduler.table.num_free for scheduler in self.schedulers)

    @property
    def num_cached(self) -> int:
        """Pages that are kept for prompts that begin alike."""
        return sum(len(scheduler.prefix) for scheduler in self.schedulers)

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue."""
        self._queue.append(job)

    def plan(self, steps_wanted: Callable[[], int]) -> Step | None:
        """Decides what the device does next, see `Scheduler.plan`; None if there is nothing to do."""
        self._give_out()
        is_busy = self._queue or not all(job.is_prefilled for job in self.running)
        wanted = (lambda: 1) if is_busy else steps_wanted
        is_drawing = [any(job.is_prefilled for job in group.running) for group in self.schedulers]
        plans = []
        for group, draws in zip(self.schedulers, is_drawing, strict=True):
            plans.append(group.plan(wanted, beside=sum(is_drawing) > draws))
        return self._merged(plans) if any(plans) else None

    def pages(self, slot: int, sequence: int) -> tuple[int, ...]:
        """Returns the pages of a sequence that runs in a slot or is kept there, as numbers in the pool."""
        group = self._group(slot)
        return self._in_pool(group, self.schedulers[group].table.pages(sequence))

    def wrote(self, piece: Piece) -> None:
        """Notes that a piece was computed: its rows can be found by other requests from now on."""
        self._of(piece.job).wrote(piece)

    def drew(self, job: Job) -> None:
        """Notes that a job's tokens have grown by what it drew."""
        self._of(job).drew(job)

    def settle(self) -> None:
        """Takes back the room for what a step that failed was to draw."""
        for scheduler in self.schedulers:
            scheduler.settle()

    def finish(self, job: Job) -> None:
        """Takes a job out, whether it runs or waits; its rows are kept where others may use them."""
        self._out(job, Scheduler.finish)

    def discard(self, job: Job) -> None:
        """Takes a job out of which no row is to be used again."""
        self._out(job, Scheduler.discard)

    def forget(self) -> None:
        """Forgets all rows that nobody runs on."""
        for scheduler in self.schedulers:
            scheduler.forget()

    def erase(self, slot: Slot) -> int:
        """Forgets what a slot keeps, and returns how many tokens that was."""
        return self.schedulers[self._group(slot.id)].erase(slot)

    def keep(self, slot: Slot, tokens: Sequence[int], root: str) -> tuple[int, ...]:
        """Makes an idle slot keep rows of `tokens`, and returns the pages to write them to.

        Raises:
          PoolExhausted: if there is no room for them.
        """
        group = self._group(slot.id)
        return self._in_pool(group, self.schedulers[group].keep(slot, tokens, root))

    def _give_out(self):
        """Gives those who wait to groups with an idle slot, where least is at work and left to compute."""
        while self._queue:
            open_to = [group for group in self.schedulers if len(group.waiting) < _num_idle(group)]
            if not open_to:
                return
            job, best = self._queue.popleft(), open_to[0]
            if len(open_to) > 1:  # else nothing is looked up in vain
                best = min(open_to, key=lambda group: _num_at_work(group) - group.num_known(job))
            best.submit(job)

    def _merged(self, plans):
        leaving, copies, coming = [], [], []
        for group, plan in enumerate(plans):
            if plan is None:
                continue
            leaving += [(job, self._in_pool(group, pages)) for job, pages in plan.leaving]
            copies += [self._in_pool(group, pair) for pair in plan.copies]
            coming += [(job, self._in_pool(group, pages)) for job, pages in plan.coming]
        pieces = itertools.zip_longest(*(plan.prefill if plan else () for plan in plans))
        prefill = [[piece for piece in call if piece is not None] for call in pieces]
        decode = [plan.decode if plan else [] for plan in plans]
        num_steps = min(plan.num_steps for plan in plans if plan)
        return Step(leaving, copies, coming, prefill, decode, num_steps)

    def _group(self, slot):
        return slot // self._num_slots

    def _in_pool(self, group, pages):
        first = group * self._num_pages
        return tuple(first + page for page in pages) if first else pages

    def _out(self, job, how):
        if job.slot is None and job in self._queue:
            self._queue.remove(job)
        else:
            how(self._of(job), job)

    def _of(self, job):
        if job.slot is not None:
            return self.schedulers[self._group(job.slot)]
        return next(scheduler for scheduler in self.schedulers if job in scheduler.waiting)


def _num_idle(scheduler):
    return sum(slot.job is None for slot in scheduler.slots)


def _num_at_work(scheduler):
    return sum(len(job.tokens) for job in itertools.chain(scheduler.running, scheduler.waiting))
