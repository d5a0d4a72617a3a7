"""Thousands of requests over canaries, with all that may happen to them at once: none is crossed.

MLA_JAX_CANARY_REQUESTS sets how many they are.
"""

import collections
import dataclasses
import os
import random

import pytest
from canaries import (
    REDUCTIONS,
    Answer,
    assert_nothing_is_left,
    check_all_pages,
    make_engine,
    make_request,
    mixed_requests,
    run,
    tokens_alone,
)
from canary import Fault, kill_the_rest

from mla_jax import expert_reduction as reduction_lib
from mla_jax.cache import PoolExhausted
from mla_jax.sampler import SamplingParams
from mla_jax.serve.engine import Engine

NUM_REQUESTS = int(os.environ.get("MLA_JAX_CANARY_REQUESTS", "3000"))
NUM_PAGES = 26
CTX_SIZE = 4 * NUM_PAGES
PHASES = ("prefill", "decode", "draw", "take", "put", "copy")
MOST_LIVE = 24
RECENT = 300  # requests; what is in the pool was last used by one of them


class Stumble(RuntimeError):
    """What devices fail of here."""


@dataclasses.dataclass
class Storm:
    """A run: who is there, who was there, and what became of them."""

    engine: object
    chance: random.Random
    folder: object
    live: list = dataclasses.field(default_factory=list)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seen: dict = dataclasses.field(default_factory=dict)  # root -> tokens whose rows it may have


def _requests(count):
    """Yields requests with seeds of their own; what they begin with changes every hundred."""
    for first in range(0, count, 100):
        for i, request in enumerate(mixed_requests(min(100, count - first), seed=first)):
            yield dataclasses.replace(request, sampling=SamplingParams(seed=first + i))


def _arrive(storm, request):
    if storm.chance.random() < 0.01:
        drawn = storm.chance.randrange(8)
        storm.engine._device.infinite[request.sampling.seed] = len(request.prompt) + drawn
    answer = Answer(storm.engine, request)
    storm.live.append(answer)
    _remember(storm, answer.ticket.root, answer.ticket.tokens)


def _remember(storm, root, tokens):
    storm.seen.setdefault(root, collections.deque(maxlen=RECENT)).append(tokens)


def _stir(storm):
    """Has something happen between two steps."""
    chance, engine = storm.chance, storm.engine
    if storm.live and chance.random() < 0.06:
        chance.choice(storm.live).ticket.cancel()
    if chance.random() < 0.004:
        error = Stumble("the device stumbled")
        fault = Fault(chance.choice(PHASES), chance.randrange(4), error, chance.random() < 0.3)
        engine._device.faults.append(fault)
    if chance.random() < 0.02:
        _save(storm)
    if chance.random() < 0.02:
        _restore(storm)
    if chance.random() < 0.005:
        _attempt(storm, "erased", lambda: engine.erase_slot(chance.randrange(4)))
    if chance.random() < 0.001:
        engine.forget()


def _save(storm):
    salt, settings, number = (
        storm.chance.choice("01"),
        storm.chance.choice(REDUCTIONS),
        storm.chance.randrange(3),
    )
    path = storm.folder / f"{number}.npz"
    slot = storm.chance.randrange(4)
    save = lambda: storm.engine.save_slot(slot, path, salt=salt, expert_reduction=settings)
    _attempt(storm, "saved", save)


def _restore(storm):
    path = storm.folder / f"{storm.chance.randrange(3)}.npz"
    if not path.exists():
        return
    salt, slot, cancels = storm.chance.choice("01"), storm.chance.randrange(4), storm.chance.random() < 0.3
    restore = lambda: storm.engine.restore_slot(slot, path, salt=salt, cancels=cancels)
    tokens = _attempt(storm, "restored", restore)
    if tokens:
        _remember(storm, f"{salt}|{_words(REDUCTIONS[0])}", tokens)


def _words(settings):
    return reduction_lib.describe(settings)


def _attempt(storm, name, function):
    """Does what a slot may refuse, and what a device may fail of."""
    try:
        done = function()
    except (ValueError, PoolExhausted, Stumble):
        storm.counts[f"not {name}"] += 1
        return None
    storm.counts[name] += 1
    return done


def _check(storm, answer):
    """Checks all that a request has heard, and that what it found was of its own kind."""
    last, request = answer.heard[-1], answer.request
    expected = tokens_alone(request, CTX_SIZE)
    if answer.failed:
        is_infinite = request.sampling.seed in storm.engine._device.infinite
        assert isinstance(last.error, Stumble | ArithmeticError if is_infinite else Stumble), last
        drawn, kind = [piece.token for piece in answer.heard[:-1]], "failed"
    elif last.finish_reason == "cancel":
        drawn, kind = answer.tokens[:-1], "cancelled"
    else:
        answer.check(CTX_SIZE)
        drawn, kind = expected, "whole"
    assert drawn == expected[: len(drawn)]
    storm.counts[kind] += 1
    num_cached = answer.ticket.num_cached
    if num_cached:
        storm.counts["cached"] += 1
        assert request.reuse_prefix
        mine, others = answer.ticket.tokens, storm.seen[answer.ticket.root]
        assert any(it is not mine and it[:num_cached] == mine[:num_cached] for it in others)


@pytest.mark.parametrize("keep_drawn", [False, True], ids=["prompts", "drawn rows too"])
def test_none_of_many_requests_is_crossed(tmp_path, keep_drawn):
    engine = make_engine(num_pages=NUM_PAGES, keep_drawn=keep_drawn)
    storm = Storm(engine, random.Random(keep_drawn), tmp_path)
    requests = _requests(NUM_REQUESTS)
    coming = next(requests, None)
    while coming is not None or storm.live:
        while coming is not None and len(storm.live) < MOST_LIVE and storm.chance.random() < 0.4:
            _arrive(storm, coming)
            coming = next(requests, None)
        _stir(storm)
        kill_the_rest(engine._device, engine._loop.scheduler.schedulers)
        engine.step()
        check_all_pages(engine)
        for answer in [answer for answer in storm.live if answer.ticket.has_ended]:
            storm.live.remove(answer)
            _check(storm, answer)
    counts, calls, stats = storm.counts, engine._device.calls, engine.stats()
    assert counts["whole"] + counts["cancelled"] + counts["failed"] == NUM_REQUESTS == stats.requests
    assert counts["whole"] > NUM_REQUESTS / 2 and counts["failed"] == stats.failed
    for name in ("cancelled", "failed", "cached", "saved", "restored", "erased"):
        assert counts[name] > 0, name
    assert stats.preemptions > 0 and all(calls[phase] for phase in PHASES)
    engine._device.faults.clear()
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("num_running", [0, 3], ids=["idle", "busy"])
@pytest.mark.parametrize(("phase", "act"), [("put", Engine.restore_slot), ("take", Engine.save_slot)])
def test_rows_that_a_slot_takes_along_fail_no_one_later(tmp_path, phase, act, num_running):
    engine, path = make_engine(), tmp_path / "rows.npz"
    first = Answer(engine, make_request(range(10, 30), 1))
    run(engine)
    engine.save_slot(first.ticket.id, path)
    running = [Answer(engine, make_request([5], 40, seed=i, ignore_eos=True)) for i in range(num_running)]
    engine.step()
    engine._device.faults.append(Fault(phase, 0, Stumble("the device stumbled"), loses_rows=True))
    with pytest.raises(Stumble):
        act(engine, 0, path)
    later = [Answer(engine, request) for request in mixed_requests(6)]
    run(engine)
    for answer in running:
        assert isinstance(answer.heard[-1].error, Stumble)
    for answer in later:
        answer.check()
    assert_nothing_is_left(engine)
