"""Groups of a mesh: requests are shared out among them, and each text is the one that it has alone."""

import dataclasses

import pytest
from canaries import (
    Answer,
    assert_nothing_is_left,
    check_all_pages,
    make_engine,
    make_request,
    mixed_requests,
    run,
)
from canary import Fault

from mla_jax.serve import loop as loop_lib

PROMPT = range(10, 30)


def _group(engine, answer):
    return answer.ticket.newest_slot // (engine.stats().num_slots // engine._device.num_groups)


@pytest.mark.parametrize("num_groups", [2, 3])
@pytest.mark.parametrize("keep_drawn", [False, True], ids=["prompts", "drawn rows too"])
@pytest.mark.parametrize("num_pages", [18, 400], ids=["tight", "ample"])
def test_texts_are_those_of_lone_runs(num_pages, keep_drawn, num_groups):
    engine = make_engine(num_pages=num_pages, num_groups=num_groups, num_slots=12, keep_drawn=keep_drawn)
    answers = [Answer(engine, request) for request in mixed_requests(60)]
    run(engine)
    for answer in answers:
        answer.check(4 * num_pages)
    stats = engine.stats()
    assert stats.cached_tokens > 0 and stats.pages_total == num_groups * num_pages
    assert (stats.preemptions > 0) == (num_pages == 18)
    assert {_group(engine, answer) for answer in answers} == set(range(num_groups))
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("loses_rows", [False, True], ids=["rows stay", "rows are lost"])
@pytest.mark.parametrize("call", [0, 4])
@pytest.mark.parametrize("phase", ["prefill", "decode", "draw", "take", "put"])
def test_a_device_that_fails_ends_those_at_work(phase, call, loses_rows):
    engine = make_engine(num_pages=18, num_groups=2, num_slots=8)
    requests = mixed_requests(60, longest=30)
    fault = Fault(phase, call, RuntimeError("the device stumbled"), loses_rows)
    engine._device.faults.append(fault)
    answers = [Answer(engine, request) for request in requests]
    run(engine)
    assert not engine._device.faults, "the phase was never met so often"
    failed = [answer for answer in answers if answer.failed]
    whole = loses_rows or phase in ("take", "put")
    assert 1 <= len(failed) <= (10 if whole else 2 if phase == "prefill" else 8)
    for answer in answers:
        if not answer.failed:
            answer.check(72)
    again = [Answer(engine, request) for request in requests[:6]]
    run(engine)
    for answer in again:
        answer.check(72)
    assert_nothing_is_left(engine)


def test_those_who_wait_go_wherever_a_slot_is_idle():
    engine = make_engine(num_groups=2, num_slots=2)
    long = Answer(engine, make_request(PROMPT, 60, ignore_eos=True))
    short = [Answer(engine, make_request([5 + i], 2, seed=i, ignore_eos=True)) for i in range(9)]
    while not all(answer.ticket.has_ended for answer in short):
        assert engine.step() and not long.ticket.has_ended
    assert {_group(engine, answer) for answer in short} == {1 - _group(engine, long)}
    run(engine)
    assert_nothing_is_left(engine)


def test_a_request_goes_where_its_beginning_is_known():
    engine = make_engine(num_groups=3, num_slots=6, num_pages=60)
    first = [Answer(engine, make_request([7 + i] * 40, 2, seed=i)) for i in range(3)]
    run(engine)
    assert {_group(engine, answer) for answer in first} == {0, 1, 2}
    next_turns = [Answer(engine, make_request([*it.request.prompt, 9], 2)) for it in reversed(first)]
    run(engine)
    for answer, before in zip(next_turns, reversed(first), strict=True):
        assert _group(engine, answer) == _group(engine, before) and answer.ticket.num_cached == 39
        answer.check(240)


def test_a_request_goes_elsewhere_where_that_is_less_work():
    engine = make_engine(num_groups=2, num_slots=8, num_pages=200)
    alike = [make_request([*PROMPT, 5 + i], 30, seed=i, ignore_eos=True) for i in range(6)]
    answers = [Answer(engine, alike[0])]
    for _ in range(5):
        engine.step()
    answers += [Answer(engine, request) for request in alike[1:]]
    run(engine)
    assert 2 <= sum(_group(engine, answer) for answer in answers) <= 4


def test_prompts_of_all_groups_are_computed_side_by_side():
    engine = make_engine(num_groups=2, num_slots=2)
    for i in range(2):
        Answer(engine, make_request([7 + i] * 33, 1))
    run(engine)
    assert engine._device.calls["prefill"] == 4 and engine._device.calls["decode"] == 1


def test_prompts_leave_room_for_those_who_draw_in_another_group():
    engine = make_engine(num_groups=2, num_slots=2, num_pages=400, widths=(32, 128, 512))
    Answer(engine, make_request([5], 60, ignore_eos=True))
    engine.step()
    Answer(engine, make_request([6] * 513, 1))
    before = engine._device.calls["prefill"]
    run(engine)
    assert engine._device.calls["prefill"] - before == 4


def test_nobody_draws_many_tokens_in_a_row_while_another_group_has_a_prompt(monkeypatch):
    monkeypatch.setattr(loop_lib, "_SMOOTH_SECONDS", 1e9)
    engine = make_engine(num_groups=2, num_slots=2, num_pages=100)
    first = Answer(engine, make_request([5], 90, ignore_eos=True))
    for _ in range(3):
        engine.step()
    count = len(first.heard)
    assert count > 10
    second = Answer(engine, make_request([6] * 20, 1))
    engine.step()
    assert len(first.heard) == count + 1 and not second.heard
    run(engine)
    first.check(400)


def test_nobody_draws_many_tokens_in_a_row_while_somebody_waits_for_a_slot(monkeypatch):
    monkeypatch.setattr(loop_lib, "_SMOOTH_SECONDS", 1e9)
    engine = make_engine(num_groups=2, num_slots=2, num_pages=100)
    answers = [Answer(engine, make_request([5 + i], 90, seed=i, ignore_eos=True)) for i in range(3)]
    for count in range(1, 6):
        engine.step()
        assert [len(answer.heard) for answer in answers] == [count, count, 0]
    answers[2].ticket.cancel()
    engine.step()
    assert len(answers[0].heard) > 10
    run(engine)


def test_cancelled_requests_leave_wherever_they_are():
    engine = make_engine(num_groups=2, num_slots=4, num_pages=12)
    requests = [dataclasses.replace(it, ignore_eos=True) for it in mixed_requests(24, longest=20)]
    answers = [Answer(engine, request) for request in requests]
    for step in range(12):
        answers[2 * step].ticket.cancel()
        engine.step()
        check_all_pages(engine)
    run(engine)
    for answer in answers[1::2]:
        answer.check(48)
    for answer in answers[::2]:
        assert answer.heard[-1].finish_reason in ("cancel", "length")
    assert engine.stats().finished["cancel"] > 6
    assert_nothing_is_left(engine)


def test_slots_are_numbered_through_all_groups(tmp_path):
    engine, path = make_engine(num_groups=2, num_slots=3), tmp_path / "rows.npz"
    assert [slot.id for slot in engine.slots()] == [0, 1, 2, 3]
    answers = [Answer(engine, make_request([7 + i] * 20, 1)) for i in range(4)]
    run(engine)
    assert sorted(answer.ticket.newest_slot for answer in answers) == [0, 1, 2, 3]
    last = next(answer for answer in answers if answer.ticket.newest_slot == 3)
    assert engine.save_slot(3, path)[0] == 19
    assert engine.erase_slot(3) == 19 and [slot.num_kept for slot in engine.slots()] == [19, 19, 19, 0]
    engine.forget()
    engine.restore_slot(0, path)
    again = Answer(engine, last.request)
    run(engine)
    again.check()
    assert again.ticket.newest_slot == 0 and again.ticket.num_cached == 19
    assert_nothing_is_left(engine)


def test_who_waits_when_all_fails_is_told():
    engine = make_engine(num_groups=2, num_slots=2)
    answers = [Answer(engine, request) for request in mixed_requests(8)]
    engine.step()
    assert not engine.drain(0) and all(answer.failed or answer.heard[-1].finish_reason for answer in answers)
    assert_nothing_is_left(engine)
