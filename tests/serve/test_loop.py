"""The engine over canaries: nothing crosses, nothing leaks, and who fails fails alone."""

import dataclasses

import numpy as np
import pytest
from canaries import (
    EOS,
    Answer,
    assert_nothing_is_left,
    make_engine,
    make_request,
    mixed_requests,
    run,
    tokenizer,
    tokens_alone,
)
from canary import CanaryError, Fault

from mla_jax.serve.request import QueueFull

PROMPT = range(10, 30)


@pytest.mark.parametrize("keep_drawn", [False, True], ids=["prompts", "drawn rows too"])
@pytest.mark.parametrize("num_pages", [18, 40, 400], ids=["tight", "fair", "ample"])
def test_texts_are_those_of_lone_runs(num_pages, keep_drawn):
    engine = make_engine(num_pages=num_pages, keep_drawn=keep_drawn)
    answers = [Answer(engine, request) for request in mixed_requests(60)]
    run(engine)
    for answer in answers:
        answer.check(4 * num_pages)
    stats = engine.stats()
    assert stats.cached_tokens > 20
    assert stats.preemptions > 0 if num_pages == 18 else stats.preemptions == 0 or num_pages == 40
    assert_nothing_is_left(engine)


def test_canaries_tell_a_row_that_is_not_theirs():
    engine = make_engine()
    answer = Answer(engine, make_request(PROMPT, 9))
    engine.step()
    engine._device.pool[engine._loop.scheduler.pages(0, answer.ticket.pages)[1], 2, 1] += 1
    engine.step()
    assert answer.failed and isinstance(answer.heard[-1].error, CanaryError)


def test_stats_add_up():
    engine = make_engine(max_waiting=40)
    answers = [Answer(engine, request) for request in mixed_requests(40)]
    with pytest.raises(QueueFull):
        engine.submit(make_request(PROMPT), print)
    before = engine.stats()
    assert (before.num_waiting, before.requests, before.rejected) == (40, 40, 1)
    assert before.waiting_tokens == sum(len(answer.request.prompt) for answer in answers)
    answers[3].ticket.cancel()
    engine._device.infinite[answers[7].request.sampling.seed] = 0
    run(engine)
    stats = engine.stats()
    reasons = [answer.heard[-1].finish_reason for answer in answers if not answer.failed]
    assert stats.finished == {reason: reasons.count(reason) for reason in set(reasons)}
    assert stats.failed == 1 and sum(stats.finished.values()) == 39
    assert stats.drawn_tokens == sum(len(answer.heard) for answer in answers) - 2  # a failure, a cancellation
    timings = [answer.ticket.timings for answer in answers]
    assert stats.prompt_tokens == sum(it.prompt_tokens for it in timings)
    assert stats.cached_tokens == sum(it.cached_tokens for it in timings) > 0
    for answer in answers:
        if answer.heard[-1] is not answers[3].heard[-1] and not answer.failed:
            assert answer.ticket.timings.decoded_tokens == len(answer.heard) - 1
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("after", [0, 1, 2, 5], ids=["waiting", "first piece", "later pieces", "drawing"])
def test_who_is_cancelled_hears_of_it_before_the_next_step_and_leaves_no_page(after):
    engine = make_engine(num_slots=2)
    other = Answer(engine, make_request(range(40, 49), 25, seed=3, ignore_eos=True))
    answer = Answer(engine, make_request(range(3, 33), 30, seed=4, ignore_eos=True, reuse_prefix=False))
    for _ in range(after):
        engine.step()
    assert not answer.heard or answer.heard[-1].finish_reason is None
    for _ in range(2):
        answer.ticket.cancel()
    engine.step()
    last = answer.heard[-1]
    assert (last.finish_reason, last.token) == ("cancel", -1) and answer.ticket.slot is None
    count = len(answer.heard)
    run(engine)
    assert len(answer.heard) == count
    other.check()
    answer.ticket.cancel()
    run(engine)
    assert len(answer.heard) == count and engine.stats().finished == {"cancel": 1, "length": 1}
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("length", [1, 157, 158, 159, 160])
def test_a_text_ends_where_the_context_is_full(length):
    engine = make_engine()
    answers = [
        Answer(engine, make_request(range(5, 5 + length), None, seed=i, ignore_eos=True)) for i in (0, 1, 2)
    ]
    run(engine)
    for answer in answers:
        answer.check()
        assert len(answer.tokens) == 161 - length
    assert_nothing_is_left(engine)


def _seed_of_a_text_that_ends(prompt):
    return next(s for s in range(999) if 3 < len(tokens_alone(make_request(prompt, 30, seed=s))) < 30)


@pytest.mark.parametrize("num_logprobs", [None, 0], ids=["plain", "constrained"])
def test_an_end_of_generation_token_ends_a_text_unless_it_is_to_be_ignored(num_logprobs):
    engine, seed = make_engine(), _seed_of_a_text_that_ends(PROMPT)
    about = dict(seed=seed, num_logprobs=num_logprobs)
    answers = [Answer(engine, make_request(PROMPT, 30, ignore_eos=flag, **about)) for flag in (False, True)]
    run(engine)
    for answer in answers:
        answer.check()
    assert answers[0].tokens[-1] == EOS and answers[0].heard[-1].text == ""
    assert EOS in answers[1].tokens and len(answers[1].tokens) == 30


def test_a_control_token_is_part_of_the_text_where_it_is_shown():
    engine = make_engine()
    shown = dict(ignore_eos=True, logit_bias=((EOS, 100.0),))
    plain = Answer(engine, make_request(PROMPT, 2, **shown))
    seen = Answer(engine, make_request(PROMPT, 2, shown_tokens=frozenset([EOS]), **shown))
    run(engine)
    assert (plain.text, seen.text) == ("", "<eos><eos>")


@pytest.mark.parametrize("count", [None, 0, 1, 20])
def test_as_many_logprobs_are_told_as_were_asked_for(count):
    engine = make_engine()
    answer = Answer(engine, make_request(PROMPT, 3, num_logprobs=count, ignore_eos=True))
    run(engine)
    told = [piece.logprobs and len(piece.logprobs.top) for piece in answer.heard]
    assert told == [count] * 3


class Digits:
    """A grammar of digits, three of them; it breaks down as it is told to."""

    def __init__(self, breaks=None):
        self.breaks = breaks

    def start(self):
        if self.breaks == "start":
            raise ValueError("no such grammar")
        return dataclasses.replace(_DigitsMatcher(), breaks=self.breaks)


@dataclasses.dataclass
class _DigitsMatcher:
    breaks: str | None = None
    count: int = 0

    def mask(self):
        if self.breaks == "mask" and self.count == 1:
            raise RuntimeError("the mask broke")
        ids = [tokenizer().encode(str(digit), add_special=False)[0] for digit in range(10)]
        words = np.zeros(10, np.uint32)
        for token in ids if self.count < 3 else [EOS]:
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def accept(self, token):
        if self.breaks == "accept" and self.count == 1:
            raise ValueError("the token broke it")
        self.count += 1


def test_a_grammar_rules_the_text_of_its_request_alone():
    engine = make_engine()
    answers = [Answer(engine, request) for request in mixed_requests(6)]
    ruled = [Answer(engine, make_request(PROMPT, 9, seed=i, grammar=Digits())) for i in range(3)]
    run(engine)
    for answer in answers:
        answer.check()
    for answer in ruled:
        assert len(answer.text) == 3 and answer.text.isdigit() and answer.heard[-1].finish_reason == "stop"
    assert len({answer.text for answer in ruled}) > 1


@pytest.mark.parametrize("breaks", ["mask", "accept"])
def test_a_grammar_that_breaks_ends_its_request_alone(breaks):
    engine = make_engine()
    good = [Answer(engine, request) for request in mixed_requests(6)]
    bad = Answer(engine, make_request(PROMPT, 9, grammar=Digits(breaks)))
    fine = Answer(engine, make_request(PROMPT, 9, grammar=Digits()))
    run(engine)
    assert bad.failed and "broke" in bad.heard[-1].message and len(bad.heard) == 2
    assert len(fine.text) == 3
    for answer in good:
        answer.check()
    assert_nothing_is_left(engine)


def test_a_grammar_that_does_not_start_is_refused():
    engine = make_engine()
    with pytest.raises(ValueError, match="no such grammar"):
        engine.submit(make_request(PROMPT, grammar=Digits("start")), print)
    assert engine.stats().requests == 0 and not engine.step()


@pytest.mark.parametrize("at", [1, 3, 8], ids=["first", "amid", "last"])
def test_a_listener_that_raises_hurts_nobody_else(at):
    engine = make_engine()
    heard = []

    def listen(piece):
        heard.append(piece)
        if len(heard) >= at:
            raise OSError("nobody is there")

    ticket = engine.submit(make_request(PROMPT, 8, ignore_eos=True), listen)
    answers = [Answer(engine, request) for request in mixed_requests(12)]
    run(engine)
    for answer in answers:
        answer.check()
    assert ticket.has_ended and len(heard) == (8 if at == 8 else at + 1)
    assert engine.stats().failed == (at != 8)
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("loses_rows", [False, True], ids=["rows stay", "rows are lost"])
@pytest.mark.parametrize("call", [0, 1, 4])
@pytest.mark.parametrize("phase", ["prefill", "decode", "draw", "take", "put", "copy"])
def test_a_device_that_fails(phase, call, loses_rows):
    engine = make_engine(num_pages=18)
    requests = _requests_that_copy() if phase == "copy" else mixed_requests(40, longest=30)
    fault = Fault(phase, call, RuntimeError("the device stumbled"), loses_rows)
    engine._device.faults.append(fault)
    answers = [Answer(engine, request) for request in requests]
    run(engine)
    assert not engine._device.faults, "the phase was never met so often"
    failed = [answer for answer in answers if answer.failed]
    whole = loses_rows or phase in ("take", "put", "copy")
    assert 1 <= len(failed) <= (5 if whole else 1 if phase == "prefill" else 4)
    for answer in failed:
        assert answer.heard[-1].error is fault.error
        drawn = [piece.token for piece in answer.heard[:-1]]
        assert drawn == tokens_alone(answer.request, 72)[: len(drawn)]
    for answer in answers:
        if not answer.failed:
            answer.check(72)
    again = [Answer(engine, request) for request in requests[:6]]
    run(engine)
    for answer in again:
        answer.check(72)
    assert engine.stats().failed == len(failed)
    assert_nothing_is_left(engine)


def _requests_that_copy():
    """Requests that part from what a slot keeps within a page that the prefix cache holds."""
    return [make_request([*range(3, 21), *[30 + i] * 5], 9, seed=i) for i in range(40)]


@pytest.mark.parametrize("drawn", [0, 3])
def test_logits_that_are_not_finite_end_their_request_alone(drawn):
    engine = make_engine()
    requests = [dataclasses.replace(request, ignore_eos=True) for request in mixed_requests(12)]
    victim = dataclasses.replace(requests[5], max_tokens=20)
    requests[5] = victim
    engine._device.infinite[victim.sampling.seed] = len(victim.prompt) + drawn
    answers = [Answer(engine, request) for request in requests]
    run(engine)
    assert answers[5].failed and "finite" in answers[5].heard[-1].message
    assert [piece.token for piece in answers[5].heard[:-1]] == tokens_alone(victim)[:drawn]
    for answer in (*answers[:5], *answers[6:]):
        answer.check()
    engine._device.infinite.clear()
    again = Answer(engine, victim)
    run(engine)
    again.check()
    assert_nothing_is_left(engine)


def test_who_fails_of_his_own_leaves_the_rows_of_his_prompt_to_others():
    engine = make_engine()
    bad = Answer(engine, make_request(PROMPT, 9, grammar=Digits("accept")))
    run(engine)
    assert bad.failed
    answer = Answer(engine, make_request(PROMPT, 9))
    run(engine)
    answer.check()
    assert answer.ticket.num_cached == 19


@pytest.mark.parametrize("what", ["discard", "plan", "finish"])
def test_a_scheduler_that_breaks_ends_who_is_there_and_no_one_else(what, monkeypatch):
    engine = make_engine(num_slots=2)
    answers = [Answer(engine, request) for request in mixed_requests(6)]
    engine.step()
    monkeypatch.setattr(engine._loop.scheduler, what, None)  # what is called fails
    answers[0].ticket.cancel()
    if what == "discard":
        engine._device.faults.append(Fault("decode", 0, RuntimeError("the device stumbled"), False))
    run(engine)
    assert all(answer.failed or answer.heard[-1].finish_reason for answer in answers)
    assert any(answer.failed for answer in answers)
    again = Answer(engine, make_request(PROMPT, 9))
    run(engine)
    again.check()
    assert_nothing_is_left(engine)
