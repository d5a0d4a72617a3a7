"""The front of the loop: many threads may ask, one takes the steps.

Whoever reads a stream takes its steps; after `start` a thread does. All state belongs to whoever takes the
steps: the others leave what they want in a queue, which is emptied between two steps.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable

from mla_jax import expert_reduction as reduction_lib
from mla_jax.completion import Piece
from mla_jax.expert_reduction import Setting
from mla_jax.serve import request as request_lib
from mla_jax.serve.device import Device
from mla_jax.serve.groups import Groups
from mla_jax.serve.loop import Loop
from mla_jax.serve.request import Draining, Failure, QueueFull, Request
from mla_jax.serve.scheduler import Kept, Slot
from mla_jax.serve.stats import EngineStats, SlotInfo
from mla_jax.serve.stream import Stream
from mla_jax.serve.text import TextStream
from mla_jax.serve.ticket import Listener, Ticket
from mla_jax.tokenizer import Tokenizer


class Engine:
    """Draws the texts of many requests at once from one model.

    Attributes:
      ctx_size: tokens that the pool holds for each group, and a request at most.
      expert_reduction: (Kmin, t) of each layer for requests that do not say.
    """

    def __init__(
        self,
        device: Device,
        tokenizer: Tokenizer,
        *,
        ctx_size: int,
        expert_reduction: tuple[Setting, ...],
        num_slots: int = 1,
        prefix_pages: int | None = None,
        keep_drawn: bool = False,
        max_waiting: int | None = None,
        max_waiting_tokens: int | None = None,
    ):
        """Makes an engine without requests.

        Args:
          device: weights and the pool.
          tokenizer: of the model.
          ctx_size: tokens, at most those of the pool for each group.
          expert_reduction: (Kmin, t) of each layer for requests that do not say.
          num_slots: requests that run at a time, rounded up to as many for each group.
          prefix_pages: pages that may be kept for prompts that begin alike; None for all, 0 for none.
          keep_drawn: keep rows of drawn tokens too. The next turn of a chat then starts sooner, but its text
            is that of a fresh start only up to rounding: a drawn token's row is not computed as a prompt's.
          max_waiting: requests that may wait; None for any number.
          max_waiting_tokens: tokens that their prompts may have together; None for any number.
        """
        self.ctx_size, self.expert_reduction = ctx_size, expert_reduction
        self._device, self._tokenizer = device, tokenizer

        def new_scheduler():
            sizes = dict(num_pages=device.num_pages, page_size=device.page_size, widths=device.widths)
            kept = dict(prefix_limit=prefix_pages, keep_drawn=keep_drawn)
            return Groups(device.num_groups, num_slots=num_slots, **kept, **sizes)

        self._loop = Loop(device, new_scheduler, tokenizer.eog_ids)
        self._limits = max_waiting, max_waiting_tokens
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock, self._ids = threading.Lock(), itertools.count()
        self._stepping = threading.RLock()  # held by whoever takes a step: readers do, where no thread does
        self._taken = self._taken_tokens = self._rejected = 0
        self._is_draining = self._is_stopping = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Takes a request; any thread may call this.

        Args:
          request: what to draw.
          listener: called with a `Piece` for each token, the last of which has a `finish_reason`, or at last
            with a `Failure`. It must not block: it is called between two steps of everybody's.

        Raises:
          ValueError: if the request can never run.
          QueueFull: if too many wait.
          Draining: if the engine is about to stop.
        """
        request_lib.check(request, ctx_size=self.ctx_size, vocab_size=self._device.vocab_size)
        settings = request.expert_reduction or self.expert_reduction
        request = dataclasses.replace(request, expert_reduction=settings)
        num_prompt = len(request.prompt)
        room = self.ctx_size - num_prompt + 1  # the last token that is drawn needs no row
        ticket = Ticket(
            request=request,
            root=_root(request.salt, settings),
            tokens=list(request.prompt),
            limit=num_prompt + min(request.max_tokens or room, room),
            id=next(self._ids),
            listener=listener,
            text=TextStream(self._tokenizer, request.stop, request.shown_tokens),
            matcher=request.grammar.start() if request.grammar else None,
            leave=lambda ticket: self._inbox.put(lambda: self._loop.cancel(ticket)),
        )
        with self._lock:
            if self._is_draining:
                raise Draining("the engine takes no more requests: it is about to stop.")
            self._refuse_if_full(num_prompt)
            if not self._is_busy():
                self._loop.stepped = time.monotonic()  # until now there was nothing to do
            self._taken, self._taken_tokens = self._taken + 1, self._taken_tokens + num_prompt
            self._inbox.put(lambda: self._loop.scheduler.submit(ticket))
        return ticket

    def stream(self, request: Request) -> tuple[Ticket, Stream]:
        """Takes a request whose text is read in this thread; reading raises what the request fails of."""
        pieces: queue.SimpleQueue[Piece | Failure] = queue.SimpleQueue()
        ticket = self.submit(request, pieces.put)
        return ticket, Stream(ticket, pieces, self._step_by_reader)

    def step(self) -> bool:
        """Takes one step; returns False if there was nothing to do."""
        with self._stepping:
            self._receive()
            return self._loop.step()

    def start(self) -> None:
        """Has a thread take the steps from now on."""
        self._loop.logs_failures = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for those that there are; returns False if some were cut off."""
        with self._lock:
            self._is_draining = True
        deadline = time.monotonic() + seconds
        while self._is_busy() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._call(lambda: self._loop.fail_all(RuntimeError("the server is about to stop")))

    def stop(self) -> None:
        """Ends the thread after its current step."""
        if self._thread is None:
            return
        self._inbox.put(lambda: setattr(self, "_is_stopping", True))
        self._thread.join()
        with self._lock:
            self._thread, self._is_stopping = None, False
        self._receive()

    def warm_up(self, progress: Callable[[int, int, str], None]) -> None:
        """Compiles every program that requests can need; calls `progress(done, all, what comes now)`."""
        programs = self._device.programs()
        for done, (name, run) in enumerate(programs):
            progress(done, len(programs), name)
            run()
        progress(len(programs), len(programs), "")

    def stats(self) -> EngineStats:
        """Returns what goes on and what has been; any thread may ask."""
        loop = self._loop
        scheduler, counts = loop.scheduler, loop.counts
        names = "failed prompt_tokens cached_tokens drawn_tokens steps".split()
        return EngineStats(
            num_slots=len(scheduler.slots),
            num_running=len(scheduler.running),
            num_waiting=self._num_waiting,
            waiting_tokens=self._waiting_tokens,
            pages_total=self._device.num_pages,
            pages_free=scheduler.num_free,
            pages_cached=scheduler.num_cached,
            page_size=self._device.page_size,
            seconds_since_step=time.monotonic() - loop.stepped if self._is_busy() else None,
            requests=self._taken,
            rejected=self._rejected,
            finished=dict(loop.finished),
            preemptions=counts["preemptions"] + scheduler.num_preemptions,
            compiles=self._device.num_compiled,
            **{name: counts[name] for name in names},
        )

    def slots(self) -> list[SlotInfo]:
        """Returns what each slot does."""
        return [_describe(slot) for slot in self._loop.scheduler.slots]

    def forget(self) -> None:
        """Forgets the rows of requests that have ended."""
        self._call(lambda: self._loop.scheduler.forget())

    def save_slot(
        self,
        slot: int,
        path,
        *,
        salt: str = "",
        num_tokens: int | None = None,
        expert_reduction: tuple[Setting, ...] | None = None,
    ) -> tuple[int, int]:
        """Writes the rows that a slot keeps, or has so far, to a file; see `cache.save`.

        Args:
          slot: which.
          path: the file, replaced if it exists; it is there whole or not at all.
          salt: of who asks; rows of another salt are not there.
          num_tokens: how many tokens of it; None for all.
          expert_reduction: that they were computed with; None for the engine's.

        Returns:
          Tokens and bytes written.

        Raises:
          ValueError: if the slot has no such rows.
          OSError: if the file cannot be written.
        """
        settings = expert_reduction or self.expert_reduction

        def take():
            rows = self._rows_of(slot, _root(salt, settings))
            if rows is None or len(rows.tokens) < (num_tokens or 0):
                has = "none" if rows is None else len(rows.tokens)
                raise ValueError(f"slot {slot} must have rows of {num_tokens or 'a request'}, got {has}.")
            tokens = rows.tokens[:num_tokens]
            num_pages = -(-len(tokens) // self._device.page_size)
            pages = self._loop.scheduler.pages(slot, rows.pages)[:num_pages]
            with self._loop.between_steps():
                return tokens, self._device.take(pages)

        tokens, layers = self._call(take)
        return len(tokens), self._device.save(path, tokens, layers, reduction_lib.describe(settings))

    def restore_slot(self, slot: int, path, *, salt: str = "", cancels: bool = False) -> list[int]:
        """Has an idle slot keep what `save_slot` wrote, for requests that begin so; returns its tokens.

        Args:
          slot: which.
          path: the file.
          salt: of who asks.
          cancels: whether a request that runs in the slot is given up.

        Raises:
          ValueError: if the slot is busy, or the file is not sound, of another model, other settings or a
            larger context.
          PoolExhausted: if those who run have too many of the pages.
          OSError: if the file cannot be read.
        """
        settings = self.expert_reduction
        layers, tokens = self._device.load(path, reduction_lib.describe(settings))

        def keep():
            if cancels and (running := self._slot(slot).job) is not None:
                self._loop.cancel(running)
            scheduler, idle = self._loop.scheduler, self._idle(slot)
            try:
                pages = scheduler.keep(idle, tokens, _root(salt, settings))
                with self._loop.between_steps():
                    self._device.put(pages, layers)
            except Exception:
                scheduler.erase(idle)
                raise

        if len(tokens) > self.ctx_size:
            raise ValueError(
                f"{path} must have at most the {self.ctx_size} tokens of the context, got {len(tokens)}."
            )
        self._call(keep)
        return tokens

    def erase_slot(self, slot: int, *, salt: str = "") -> int:
        """Has an idle slot forget what it keeps, and returns how many tokens those were.

        Args:
          slot: which.
          salt: of who asks; rows of another salt are not there.

        Raises:
          ValueError: if the slot is busy.
        """

        def erase():
            kept = self._idle(slot).kept
            return self._loop.scheduler.erase(self._slot(slot)) if kept and _salt(kept.root) == salt else 0

        return self._call(erase)

    @property
    def _num_waiting(self):
        return self._taken - self._loop.counts["left_queue"]

    @property
    def _waiting_tokens(self):
        return self._taken_tokens - self._loop.counts["left_queue_tokens"]

    def _is_busy(self):
        return bool(self._num_waiting or not self._loop.scheduler.is_idle)

    def _refuse_if_full(self, num_prompt):
        max_waiting, max_tokens = self._limits
        has_room = max_waiting is None or self._num_waiting < max_waiting
        if has_room and (max_tokens is None or self._waiting_tokens + num_prompt <= max_tokens):
            return
        self._rejected += 1
        raise QueueFull(
            f"the queue must have room for the request, but {self._num_waiting} requests with "
            f"{self._waiting_tokens} tokens wait already."
        )

    def _run(self):
        while not self._is_stopping:
            if not self.step() and not self._is_stopping:
                self._loop.do(self._inbox.get())

    def _receive(self):
        with self._stepping, contextlib.suppress(queue.Empty):
            while True:
                self._loop.do(self._inbox.get_nowait())

    def _call(self, function):
        """Runs a function between two steps, and returns what it does."""
        future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._lock:
            self._inbox.put(run)
            is_own = self._thread is None
        if is_own:
            self._receive()
        return future.result()

    def _step_by_reader(self):
        if self._thread is not None:
            return False
        self.step()
        return True

    def _slot(self, slot):
        slots = self._loop.scheduler.slots
        if not 0 <= slot < len(slots):
            raise ValueError(f"slot must be in [0, {len(slots)}), got {slot}.")
        return slots[slot]

    def _idle(self, slot):
        if self._slot(slot).job is not None:
            raise ValueError(f"slot {slot} must be idle, but a request runs in it.")
        return self._slot(slot)

    def _rows_of(self, slot, root) -> Kept | None:
        slot = self._slot(slot)
        job, kept = slot.job, slot.kept
        if job is not None:
            kept = Kept(job.pages, job.tokens[: job.num_rows], job.root)
        return kept if kept is not None and kept.root == root else None


def _root(salt, settings):
    return f"{reduction_lib.describe(settings)}|{salt}"


def _salt(root):
    return root.partition("|")[2]


def _describe(slot: Slot) -> SlotInfo:
    job, kept = slot.job, slot.kept
    if job is None and kept is None:
        return SlotInfo(id=slot.id)
    if job is None:
        return SlotInfo(id=slot.id, salt=_salt(kept.root), num_kept=len(kept.tokens))
    return SlotInfo(
        id=slot.id,
        salt=_salt(job.root),
        is_busy=True,
        request_id=job.id,
        num_prompt=job.num_prompt,
        num_cached=job.num_cached,
        num_drawn=job.num_drawn,
        sampling=job.request.sampling,
    )
