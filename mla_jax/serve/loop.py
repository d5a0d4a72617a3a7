"""The one loop: plans a step, has the device do it, and tells what was drawn.

A request that fails ends alone. Only a failure that took the rows of the pool along ends all that run.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence

from absl import logging

from mla_jax import steps
from mla_jax.completion import Logprobs, Piece
from mla_jax.serve.device import Device, Part, Row
from mla_jax.serve.groups import Groups, Step
from mla_jax.serve.request import Failure, GrammarFailed, Lost
from mla_jax.serve.ticket import Ticket

_SMOOTH_SECONDS = 0.05  # that a stream may stand still for: 20 times a second looks like flowing


class Loop:
    """What happens between two steps, and in them. Everything here is for one thread.

    Attributes:
      scheduler: who runs on which pages.
      counts: of requests, tokens and steps, by their names in `EngineStats`.
      finished: requests by reason.
      stepped: when the last step ended, by `time.monotonic`.
      logs_failures: whether failures are logged; without it they reach nobody but their listeners.
    """

    def __init__(
        self,
        device: Device,
        new_scheduler: Callable[[], Groups],
        eog_ids: frozenset[int],
    ):
        self.scheduler = new_scheduler()
        self.counts: collections.Counter[str] = collections.Counter()
        self.finished: collections.Counter[str] = collections.Counter()
        self.stepped, self.logs_failures = time.monotonic(), False
        self._device, self._new_scheduler, self._eog_ids = device, new_scheduler, eog_ids
        self._seconds_per_step = 0.0
        self._at_work: Sequence[Ticket] | None = None  # whose call may have failed; None while planning

    def step(self) -> bool:
        """Takes one step; returns False if there was nothing to do."""
        self._at_work = None
        try:
            plan = self.scheduler.plan(self._steps_wanted)
            if plan is None:
                return False
            self._execute(plan)
        except Exception as error:
            if not isinstance(error, Lost):
                self._log("a step failed")
            self.do(functools.partial(self._recover, error))
            return not self.scheduler.is_idle
        except BaseException as error:  # an interrupt
            self._recover(error)
            raise
        self.counts["steps"] += 1
        self.stepped = time.monotonic()
        return True

    def cancel(self, ticket: Ticket) -> None:
        """Ends a ticket that has not ended."""
        if not ticket.has_ended:
            self._end(ticket, Piece(token=-1, text=ticket.text.flush(), finish_reason="cancel"))

    def fail_all(self, error: BaseException) -> int:
        """Ends all that run and wait with a failure, and returns how many those were; no row is kept."""
        tickets = [*self.scheduler.running, *self.scheduler.waiting]
        self._renew([])
        for ticket in tickets:
            self._fail(ticket, error, _forget)  # whatever state its scheduler was in
        return len(tickets)

    def do(self, function: Callable[[], None]) -> None:
        """Runs a function between two steps. If it fails, so do all that run and wait."""
        try:
            function()
        except Exception as error:
            self._log("what was to be done between two steps failed")
            self.fail_all(error)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Ends those who run, and starts anew, if a call to the device in it takes the rows along."""
        try:
            yield
        except Exception as error:
            if not self._device.is_sound:
                self._at_work = ()
                self._recover(error)
            raise

    def _steps_wanted(self):
        """Returns how many tokens to draw between two looks of the host; a first one comes alone."""
        if any(ticket.num_drawn == 0 for ticket in self.scheduler.running):
            return 1
        return steps.within(_SMOOTH_SECONDS, self._seconds_per_step)

    def _execute(self, plan: Step):
        self._at_work = [*self.scheduler.running, *(ticket for ticket, _ in plan.leaving)]
        for ticket in self.scheduler.running:
            self._begin(ticket)
        for ticket, pages in plan.leaving:
            ticket.swapped = self._device.take(pages)
        self._device.copy(plan.copies)
        for ticket, pages in plan.coming:
            num_pages = -(-ticket.num_rows // self._device.page_size)
            self._device.put(pages[:num_pages], ticket.swapped)
            ticket.swapped = None
        for pieces in plan.prefill:
            self._prefill(pieces)
        size = self._device.batches[-1]
        for tickets in plan.calls(size, lambda ticket: not ticket.is_constrained):
            self._decode(tickets, plan.num_steps)
        for tickets in plan.calls(size, lambda ticket: ticket.is_constrained):
            self._draw(tickets)

    def _begin(self, ticket):
        if ticket.began is None:
            ticket.began = time.perf_counter()
            ticket.timings.prompt_tokens = ticket.num_prompt
            self._leave_queue(ticket)

    def _leave_queue(self, ticket):
        self.counts["left_queue"] += 1
        self.counts["left_queue_tokens"] += ticket.num_prompt

    def _prefill(self, pieces):
        self._at_work, parts = [piece.job for piece in pieces], []
        for piece in pieces:
            about = dict(pages=self._pages(piece.job), reduction=piece.job.request.expert_reduction)
            parts.append(Part(tokens=piece.tokens, start=piece.start, **about))
        self._device.prefill(parts, max(piece.width for piece in pieces))
        for piece in pieces:
            self.scheduler.wrote(piece)

    def _pages(self, ticket):
        return self.scheduler.pages(ticket.slot, ticket.pages)

    def _decode(self, tickets, num_steps):
        self._at_work, began = tickets, time.perf_counter()
        drawn = self._device.decode([self._row(ticket) for ticket in tickets], num_steps)
        self._seconds_per_step = (time.perf_counter() - began) / len(drawn[0])
        for ticket, tokens in zip(tickets, drawn, strict=True):
            self._tell(ticket, [(token, None) for token in tokens], began)

    def _draw(self, tickets):
        rows, drawing = [], []
        for ticket in tickets:
            with self._blaming(ticket):
                rows.append(self._constrained_row(ticket))
                drawing.append(ticket)
        if not rows:
            return
        self._at_work, began = drawing, time.perf_counter()
        drawn = self._device.draw(rows)
        self._seconds_per_step = time.perf_counter() - began
        for ticket, pair in zip(drawing, drawn, strict=True):
            self._tell(ticket, [pair], began)

    def _row(self, ticket, **more):
        pages, request = self._pages(ticket), ticket.request
        settings = dict(sampling=request.sampling, reduction=request.expert_reduction)
        return Row(tokens=ticket.tokens, pages=pages, **settings, **more)

    def _constrained_row(self, ticket):
        request = ticket.request
        allowed = ticket.matcher.mask() if ticket.matcher else None
        return self._row(ticket, bias=request.logit_bias, allowed=allowed, num_logprobs=request.num_logprobs)

    def _tell(self, ticket, drawn: Sequence[tuple[int, Logprobs | None]], began):
        """Hands drawn tokens on, up to the one that ends the text."""
        with self._blaming(ticket):
            for count, (token, logprobs) in enumerate(drawn, start=1):
                if token == steps.NOT_FINITE:
                    raise ArithmeticError("the model must give finite logits, got infinite ones or NaN")
                now = began + count * self._seconds_per_step
                piece = ticket.take(token, logprobs, self._eog_ids, now)
                self.counts["drawn_tokens"] += 1
                if piece.finish_reason:
                    break
                ticket.listener(piece)
            self.scheduler.drew(ticket)
            if piece.finish_reason:
                self._end(ticket, piece)

    def _end(self, ticket, last):
        """Takes a ticket out, and then tells its last: whoever hears it finds the slot free."""
        self._out(ticket, self.scheduler.finish)
        self.finished[last.finish_reason] += 1
        with contextlib.suppress(Exception):  # it has ended, whatever its listener makes of it
            ticket.listener(last)

    def _fail(self, ticket, error, how):
        self._out(ticket, how)
        self.counts["failed"] += 1
        with contextlib.suppress(Exception):
            ticket.listener(Failure(message=f"the request failed: {error}.", error=error))

    def _out(self, ticket, how):
        how(ticket)
        ticket.has_ended = True
        if ticket.began is None:
            self._leave_queue(ticket)
        self.counts["prompt_tokens"] += ticket.timings.prompt_tokens
        self.counts["cached_tokens"] += ticket.timings.cached_tokens

    @contextlib.contextmanager
    def _blaming(self, ticket) -> Iterator[None]:
        """Ends a ticket whose own text, grammar or listener fails; its rows are sound if they are finite."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, GrammarFailed):  # which is its sender's
                self._log(f"request {ticket.id} failed")
            if not ticket.has_ended:
                is_sound = not isinstance(error, ArithmeticError)
                self._fail(ticket, error, self.scheduler.finish if is_sound else self.scheduler.discard)

    def _log(self, what):
        if self.logs_failures:
            logging.exception(what)

    def _recover(self, error):
        """Ends those who were at work; where rows were lost, all that run; after a bad plan, all."""
        if self._at_work is None:
            self.fail_all(error)
            return
        is_sound = self._device.is_sound
        for ticket in [*self._at_work, *(() if is_sound else self.scheduler.running)]:
            if not ticket.has_ended:
                self._fail(ticket, error, self.scheduler.discard)
        if is_sound:
            self.scheduler.settle()
        else:
            self._renew(self.scheduler.waiting)

    def _renew(self, waiting):
        """Begins anew with an empty pool and those who wait."""
        self.counts["preemptions"] += self.scheduler.num_preemptions
        self.scheduler = self._new_scheduler()
        for ticket in waiting:
            self.scheduler.submit(ticket)
        self._device.reset()


def _forget(ticket):
    ticket.slot = None
