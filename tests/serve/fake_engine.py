"""An engine that draws by script instead of by model, and what a server needs beside it."""

import itertools
import threading
import time
import types

import checkpoints_tools
from checkpoints_tools import hparams
from mla_jax import chat, generate, tokenizer
from mla_jax import expert_reduction as reduction_lib
from mla_jax.cache import PoolExhausted
from mla_jax.completion import Logprobs, Piece, Timings
from mla_jax.config import RunConfig
from mla_jax.serve.request import Draining, Failure, QueueFull
from mla_jax.serve.stats import EngineStats, SlotInfo

CTX_SIZE = 512


class Ticket:
    def __init__(self, number, request, listener, tokens):
        self.id, self.request, self.listener, self.tokens = number, request, listener, list(tokens)
        self.num_drawn, self.is_cancelled, self.slot, self.timings = 0, False, None, Timings()
        self.limit = min(len(tokens), request.max_tokens or len(tokens))

    def cancel(self):
        self.is_cancelled = True


class FakeEngine:
    """Draws tokens of `script(request)`, so many for each running request every `step_seconds`."""

    def __init__(self, tokenizer, *, num_slots=4, max_waiting=16, step_seconds=0.0005, tokens_per_step=1):
        self._tokenizer, self.num_slots, self.max_waiting = tokenizer, num_slots, max_waiting
        self.say("Hello there.")
        self.tokens_per_step = tokens_per_step
        self.step_seconds, self._lock, self._numbers = step_seconds, threading.Lock(), itertools.count()
        self.waiting, self.running, self.submitted = [], [], []
        self.is_draining = self.is_stopped = self.is_stuck = self.is_full = False
        self.finished, self.rejected, self.steps, self.most_waiting, self.age = {}, 0, 0, 0, None
        self.fails_after, self.stalls_after, self.saved, self.erased = None, None, {}, []
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def say(self, text, *, ends=True):
        """Makes `text` the answer to all requests from now on."""
        tokens = self._tokenizer.encode(text, add_special=False) + [self._tokenizer.vocabulary.eos_id] * ends
        self.script = lambda request: tokens

    def submit(self, request, listener):
        with self._lock:
            if self.is_draining:
                raise Draining("the server is about to stop.")
            if len(self.waiting) >= self.max_waiting:
                self.rejected += 1
                raise QueueFull(f"{self.max_waiting} requests wait already.", retry_after=1.5)
            ticket = Ticket(next(self._numbers), request, listener, self.script(request))
            ticket.timings.prompt_tokens = len(request.prompt)
            self.waiting.append(ticket)
            self.submitted.append(ticket)
            self.most_waiting = max(self.most_waiting, len(self.waiting))
            return ticket

    def start(self):
        self._thread.start()

    def stop(self):
        self.is_stopped = True
        if self._thread.is_alive():
            self._thread.join(5)

    def drain(self, seconds):
        self.is_draining = True
        deadline = time.monotonic() + seconds
        while (self.waiting or self.running) and time.monotonic() < deadline:
            time.sleep(0.005)
        with self._lock:
            cut = self.waiting + self.running
            self.waiting, self.running = [], []
            for ticket in cut:
                ticket.listener(Failure(message="the server is about to stop.", error=RuntimeError("no")))
        return not cut

    def _loop(self):
        while not self.is_stopped:
            time.sleep(self.step_seconds)
            if self.is_stuck:
                continue
            with self._lock:
                self._step()

    def _step(self):
        self.steps += 1
        for tickets in (self.waiting, self.running):
            for ticket in [ticket for ticket in tickets if ticket.is_cancelled]:
                tickets.remove(ticket)
                self._end(ticket, "cancel")
        while self.waiting and len(self.running) < self.num_slots:
            self.running.append(self.waiting.pop(0))
            self.running[-1].slot = 0
        for ticket in list(self.running):
            for _ in range(self.tokens_per_step):
                if ticket in self.running:
                    self._draw(ticket)

    def _draw(self, ticket):
        if self.fails_after is not None and ticket.num_drawn >= self.fails_after:
            self.running.remove(ticket)
            ticket.listener(Failure(message="the step failed.", error=RuntimeError("no")))
            return
        if ticket.num_drawn == self.stalls_after:
            return
        token = ticket.tokens[ticket.num_drawn]
        ticket.num_drawn += 1
        reason = None
        if token in self._tokenizer.eog_ids:
            reason = "stop"
        elif ticket.num_drawn == ticket.limit:
            reason = "length"
        ticket.timings.prompt_seconds, ticket.timings.decode_seconds = 0.25, 0.5
        ticket.timings.decoded_tokens = ticket.num_drawn - 1
        text = "" if reason == "stop" else self._tokenizer.decode([token], skip_special=False)
        num = ticket.request.num_logprobs
        logprobs = None if num is None else Logprobs(chosen=-0.5, top=((token, -0.5), (7, -1e9))[:num])
        if reason:
            self.running.remove(ticket)
            self.finished[reason] = self.finished.get(reason, 0) + 1
        ticket.listener(Piece(token=token, text=text, finish_reason=reason, logprobs=logprobs))

    def _end(self, ticket, reason):
        self.finished[reason] = self.finished.get(reason, 0) + 1
        ticket.listener(Piece(token=0, text="", finish_reason=reason))

    def stats(self):
        return EngineStats(
            num_slots=self.num_slots,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            waiting_tokens=sum(len(ticket.request.prompt) for ticket in self.waiting),
            pages_total=64,
            pages_free=60,
            pages_cached=4,
            page_size=16,
            seconds_since_step=self.age,
            requests=len(self.submitted),
            rejected=self.rejected,
            finished=dict(self.finished),
            failed=0,
            prompt_tokens=1,
            cached_tokens=0,
            drawn_tokens=2,
            steps=self.steps,
            preemptions=0,
            compiles=3,
        )

    def slots(self):
        return [SlotInfo(id=number) for number in range(self.num_slots)]

    def save_slot(self, slot, path, salt=""):
        self.saved[path.name] = salt
        path.write_bytes(b"saved")
        return 3, 5

    def restore_slot(self, slot, path, salt=""):
        if self.is_full:
            raise PoolExhausted("4 pages must be free, got 2.")
        if path.read_bytes() != b"saved":
            raise ValueError(f"{path} must be a saved cache.")
        return [5, 6, 7]

    def erase_slot(self, slot, salt=""):
        self.erased.append((slot, salt))
        return 3


def fake_model(**engine):
    """Returns the packaged model's vocabulary and sizes around an engine without weights."""
    checkpoint = checkpoints_tools.load_gguf(generate.PACKAGED_MODEL, progress=lambda *args: None)
    words = tokenizer.Tokenizer(hparams.vocabulary(checkpoint.metadata, checkpoint.config, checkpoint.path))
    return types.SimpleNamespace(
        tokenizer=words,
        config=checkpoint.config,
        run=RunConfig(),
        ctx_size=CTX_SIZE,
        expert_reduction=reduction_lib.per_layer(checkpoint.config, None),
        encode_chat=lambda messages, **options: chat.encode(messages, words, **options),
        engine=FakeEngine(words, **engine),
    )
