"""The engine as its callers see it: threads, queues, slots, and its end."""

import dataclasses
import threading
import time

import pytest
from canaries import (
    REDUCTIONS,
    Answer,
    assert_nothing_is_left,
    make_engine,
    make_request,
    mixed_requests,
    run,
    tokens_alone,
)
from canary import Fault

from mla_jax.cache import PoolExhausted
from mla_jax.serve import loop as loop_lib
from mla_jax.serve.engine import Engine
from mla_jax.serve.request import Draining, QueueFull

PROMPT = range(10, 30)


@pytest.fixture
def started():
    """Returns a function that makes an engine with a thread of its own."""
    engines = []

    def start(**settings):
        engines.append(make_engine(**settings))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture
def one_token_a_step(monkeypatch):
    monkeypatch.setattr(loop_lib, "_SMOOTH_SECONDS", 0)


def _wait(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def test_no_more_wait_than_may():
    engine = make_engine(num_slots=1, max_waiting=3, max_waiting_tokens=50)
    [Answer(engine, make_request([5], 4)) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests with 3 tokens wait already") as caught:
        engine.submit(make_request([5]), print)
    assert caught.value.retry_after > 0
    engine.step()  # one of them runs now
    with pytest.raises(QueueFull, match="2 requests with 2 tokens"):
        engine.submit(make_request([5] * 49), print)
    Answer(engine, make_request([5] * 48, 1))
    run(engine)
    assert engine.stats().rejected == 2 and engine.stats().requests == 4
    Answer(engine, make_request([5] * 50, 1))


def test_many_threads_ask_at_once(started):
    engine = started(num_pages=24)
    requests, answers = mixed_requests(120, longest=30), []

    def ask(mine):
        for request in mine:
            answers.append(Answer(engine, request))
            if request.sampling.seed % 5 == 0:
                answers[-1].ticket.cancel()

    threads = [threading.Thread(target=ask, args=(requests[i::6],)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _wait(lambda: all(answer.ticket.has_ended for answer in answers))
    assert len({answer.ticket.id for answer in answers}) == 120
    for answer in answers:
        if answer.heard[-1].finish_reason == "cancel":
            assert answer.tokens[:-1] == tokens_alone(answer.request, 96)[: len(answer.tokens) - 1]
        else:
            answer.check(96)
    _wait(lambda: engine.stats().num_running == 0)
    assert_nothing_is_left(engine)


def test_requests_whose_rows_are_all_there_do_not_hang(started):
    engine = started()
    for prompt in ([5], [5], PROMPT, PROMPT):
        answer = Answer(engine, make_request(prompt, 2))
        _wait(lambda answer=answer: answer.ticket.has_ended)
        answer.check()


def test_streams_are_read_with_and_without_a_thread(started):
    request = make_request(PROMPT, 6, ignore_eos=True)
    for engine, step in ((make_engine(), Engine.step), (started(), lambda _: False)):
        for _ in range(2):
            _, pieces = engine.stream(request)
            assert [piece.token for piece in pieces] == tokens_alone(request)
        ticket, pieces = engine.stream(request)
        next(pieces)
        pieces.close()
        assert list(pieces) == []
        unread, pieces = engine.stream(request)
        pieces.close()
        _wait(lambda unread=unread, engine=engine, step=step: step(engine) or unread.has_ended)
        _wait(lambda ticket=ticket, engine=engine, step=step: step(engine) or ticket.has_ended)
        engine._device.infinite[0] = 0
        with pytest.raises(ArithmeticError, match="finite"):
            list(engine.stream(request)[1])


def test_an_engine_that_drains_lets_all_end_who_run_and_wait(started):
    engine = started(num_slots=2)
    answers = [Answer(engine, request) for request in mixed_requests(20)]
    assert engine.drain(20.0)
    for answer in answers:
        answer.check()
    with pytest.raises(Draining):
        engine.submit(make_request(PROMPT), print)
    engine.stop()


def test_an_engine_that_drains_cuts_off_who_takes_too_long(started):
    engine = started(num_slots=2)
    decode = engine._device.decode
    engine._device.decode = lambda *args: (time.sleep(0.02), decode(*args))[1]
    answers = [Answer(engine, make_request(PROMPT, 100, seed=i, ignore_eos=True)) for i in range(4)]
    assert not engine.drain(0.1)
    assert all(answer.failed and "about to stop" in answer.heard[-1].message for answer in answers)
    assert_nothing_is_left(engine)


def test_an_engine_that_was_stopped_answers_and_starts_again(started):
    engine = started()
    answer = Answer(engine, make_request(PROMPT, 3))
    _wait(lambda: answer.ticket.has_ended)
    engine.stop()
    engine.stop()
    assert engine.erase_slot(0) + engine.erase_slot(1) + engine.erase_slot(2) + engine.erase_slot(3) == 19
    later = Answer(engine, make_request(PROMPT, 3))
    assert not later.heard
    engine.start()
    _wait(lambda: later.ticket.has_ended)
    later.check()


def test_an_idle_engine_is_not_taken_for_one_that_is_stuck():
    engine = make_engine()
    assert engine.stats().seconds_since_step is None
    engine._loop.stepped -= 1000
    Answer(engine, make_request(PROMPT, 3))
    assert engine.stats().seconds_since_step < 100
    engine._loop.stepped -= 1000
    Answer(engine, make_request(PROMPT, 3))
    assert engine.stats().seconds_since_step > 900
    run(engine)
    assert engine.stats().seconds_since_step is None


def test_a_request_keeps_the_expert_reduction_that_it_came_with():
    engine = make_engine()
    first = Answer(engine, make_request(PROMPT, 9))
    for _ in range(3):
        engine.step()
    engine.expert_reduction = REDUCTIONS[1]
    second = Answer(engine, make_request(PROMPT, 9))
    run(engine)
    first.check()
    assert second.tokens == tokens_alone(dataclasses.replace(second.request, expert_reduction=REDUCTIONS[1]))
    assert second.ticket.num_cached == 0


@pytest.mark.parametrize(("salt", "cached"), [("a", 19), ("b", 0), ("", 0)])
def test_rows_are_shared_within_a_salt(salt, cached):
    engine = make_engine()
    Answer(engine, make_request(PROMPT, 2, salt="a"))
    run(engine)
    answer = Answer(engine, make_request(PROMPT, 2, salt=salt))
    run(engine)
    answer.check()
    assert answer.ticket.timings.cached_tokens == engine.stats().cached_tokens == cached


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (dict(prompt=()), "at least one token, got none"),
        (dict(prompt=(5,) * 161), "fit the context of 160 tokens, got 161"),
        (dict(prompt=(5, 320)), r"token ids must be in \[0, 320\), got 320 at position 1"),
        (dict(prompt=(-1,)), "got -1 at position 0"),
        (dict(max_tokens=0), "max_tokens must be at least 1, got 0"),
        (dict(num_logprobs=21), r"num_logprobs must be in \[0, 20\], got 21"),
        (dict(num_logprobs=-1), "num_logprobs must be"),
        (dict(logit_bias=((5, 1.0),) * 301), "logit_bias must be of at most 300 tokens, got 301"),
        (dict(logit_bias=((320, 1.0),)), "got 320 by 1.0"),
        (dict(logit_bias=((-1, 1.0),)), "got -1 by 1.0"),
        (dict(logit_bias=((2**31, 1.0),)), "got 2147483648 by 1.0"),
        (dict(logit_bias=((5, float("nan")),)), "got 5 by nan"),
        (dict(logit_bias=((5, float("inf")),)), "got 5 by inf"),
        (dict(stop=("a", "")), "stop must be of texts that are not empty"),
        (dict(seed=None), "seed must be chosen"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_requests_that_can_never_run_are_refused_at_once(about, words):
    engine = make_engine()
    with pytest.raises(ValueError, match=words):
        engine.submit(make_request(**dict(prompt=PROMPT) | about), print)
    assert engine.stats().requests == 0 and not engine.step()


def _kept(engine):
    return {slot.id: slot.num_kept for slot in engine.slots() if slot.num_kept}


@pytest.mark.parametrize("keep_drawn", [False, True], ids=["prompt", "drawn rows too"])
def test_a_restored_slot_goes_on_as_if_nothing_had_happened(tmp_path, keep_drawn):
    engine, path = make_engine(keep_drawn=keep_drawn, prefix_pages=0), tmp_path / "rows.npz"
    first = Answer(engine, make_request(PROMPT, 4, salt="a", ignore_eos=True))
    run(engine)
    num_kept = 19 + 4 * keep_drawn
    assert _kept(engine) == {0: num_kept}
    assert engine.save_slot(0, path, salt="a")[0] == num_kept
    engine.forget()
    tokens = [*PROMPT, *first.tokens][:num_kept]
    assert engine.restore_slot(2, path, salt="a") == tokens and _kept(engine) == {2: num_kept}
    for salt, cached in (("b", 0), ("a", num_kept)):
        answer = Answer(engine, make_request([*tokens, 7], 5, salt=salt, seed=9))
        run(engine)
        answer.check()
        assert answer.ticket.num_cached == cached
    assert engine.erase_slot(2) == engine.erase_slot(2, salt="b") == 0
    assert engine.erase_slot(2, salt="a") == num_kept + 5 * keep_drawn
    assert engine.erase_slot(2, salt="a") == 0
    assert_nothing_is_left(engine)


def test_a_slot_is_saved_while_it_runs_and_as_far_as_is_asked(tmp_path, one_token_a_step):
    engine, path = make_engine(), tmp_path / "rows.npz"
    answer = Answer(engine, make_request(PROMPT, 9, ignore_eos=True))
    for _ in range(6):
        engine.step()
    assert engine.save_slot(0, path)[0] == answer.ticket.num_rows > 19
    assert engine.save_slot(0, path, num_tokens=7)[0] == 7
    run(engine)
    answer.check()
    assert engine.restore_slot(1, path) == list(PROMPT[:7])


def test_slots_say_what_goes_on(one_token_a_step):
    engine = make_engine(num_slots=2)
    answer = Answer(engine, make_request(PROMPT, 9, ignore_eos=True))
    for _ in range(5):
        engine.step()
    busy, idle = engine.slots()
    assert (busy.id, busy.is_busy, busy.request_id, busy.num_prompt) == (0, True, answer.ticket.id, 20)
    assert busy.num_drawn == len(answer.heard) and busy.sampling is answer.request.sampling
    assert not idle.is_busy and idle.request_id is None and idle.num_kept == 0
    run(engine)
    assert [(slot.is_busy, slot.num_kept) for slot in engine.slots()] == [(False, 19), (False, 0)]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda engine, path: engine.save_slot(4, path), r"slot must be in \[0, 4\), got 4"),
        (lambda engine, path: engine.save_slot(-1, path), "slot must be in"),
        (lambda engine, path: engine.save_slot(2, path), "slot 2 must have rows of a request, got none"),
        (lambda engine, path: engine.save_slot(3, path, salt="b"), "slot 3 must have rows .* got none"),
        (lambda engine, path: engine.save_slot(3, path, num_tokens=20), "must have rows of 20, got 19"),
        (lambda engine, path: engine.erase_slot(1), "slot 1 must be idle, but a request runs in it"),
        (lambda engine, path: engine.restore_slot(1, path), "slot 1 must be idle"),
        (lambda engine, path: engine.restore_slot(9, path), "slot must be in"),
    ],
    ids=[
        "no slot",
        "a negative slot",
        "nothing",
        "a salt",
        "too many",
        "erase",
        "restore",
        "no slot to restore",
    ],
)
def test_slots_refuse(tmp_path, ask, words, one_token_a_step):
    engine, path = make_engine(), tmp_path / "rows.npz"
    done = Answer(engine, make_request(PROMPT, 1))
    run(engine)
    engine.save_slot(done.ticket.id, path)
    engine.erase_slot(0)
    engine.restore_slot(3, path)
    running = Answer(engine, make_request([5], 9))
    engine.step()
    assert running.ticket.slot == 1
    with pytest.raises(ValueError, match=words):
        ask(engine, path)
    run(engine)
    running.check()
    assert _kept(engine)[3] == 19


def test_rows_that_were_not_restored_are_not_kept(tmp_path):
    engine, path = make_engine(), tmp_path / "rows.npz"
    Answer(engine, make_request(PROMPT, 1))
    run(engine)
    engine.save_slot(0, path)
    engine.forget()
    engine._device.faults.append(Fault("put", 0, RuntimeError("the device stumbled")))
    with pytest.raises(RuntimeError, match="stumbled"):
        engine.restore_slot(0, path)
    answer = Answer(engine, make_request(PROMPT, 3))
    run(engine)
    answer.check()
    assert answer.ticket.num_cached == 0
    assert_nothing_is_left(engine)


def test_a_slot_is_not_restored_where_running_requests_have_the_room(tmp_path, one_token_a_step):
    engine, path = make_engine(num_pages=12), tmp_path / "rows.npz"
    Answer(engine, make_request(range(3, 43), 1))
    run(engine)
    engine.save_slot(0, path)
    engine.forget()
    running = Answer(engine, make_request(range(50, 80), 9))
    engine.step()
    with pytest.raises(PoolExhausted, match="pages of 4 tokens must be free, got"):
        engine.restore_slot(3, path)
    run(engine)
    running.check(48)
    assert len(engine.restore_slot(3, path)) == 39
