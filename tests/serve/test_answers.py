"""What an engine tells becomes one stream: pieces that come at once are put together, and nothing is lost."""

import asyncio
import types

import pytest

from mla_jax.completion import Piece
from mla_jax.serve.http.answers import Answers
from mla_jax.serve.http.api_error import ApiError
from mla_jax.serve.http.metrics import Metrics
from mla_jax.serve.request import Failure

LAST = Piece(token=9, text="!", finish_reason="stop")
LOST = Failure(message="the step failed.", error=RuntimeError("no"))


class Engine:
    """Tells what the script has for each request, as soon as it is asked."""

    def __init__(self, script):
        self.script, self.listeners, self.cancelled = script, [], []

    def submit(self, request, listener):
        self.listeners.append(listener)
        for event in self.script.pop(0):
            listener(event)
        number = len(self.listeners) - 1
        return types.SimpleNamespace(cancel=lambda: self.cancelled.append(number))


def piece(number):
    return Piece(token=number, text=f"{number} ")


def read(script, *, during=None, seconds=5.0):
    """Returns what came, (number of the text, tokens) each, the error that ended it, and the metrics."""
    metrics, came, engine = Metrics(lambda: None), [], Engine(script)

    async def run():
        answers = Answers(engine, metrics, seconds=seconds, is_draining=lambda: False)
        answers.submit([None] * len(script))
        try:
            async for index, pieces in answers.pieces():
                came.append((index, [piece.token for piece in pieces]))
                if during:
                    during(answers, engine, came)
        except ApiError as error:
            return error
        return None

    error = asyncio.run(run())
    return came, error, metrics, engine


def _count(metrics, name):
    total = next(metric for metric in getattr(metrics, name).collect())
    return next(sample.value for sample in total.samples if sample.name.endswith("_count"))


def test_pieces_that_come_at_once_are_one():
    came, error, metrics, _ = read([[piece(1), piece(2), LAST]])
    assert came == [(0, [1, 2, 9])] and error is None
    assert (_count(metrics, "first_token"), _count(metrics, "between_tokens")) == (1, 2)


def test_what_comes_later_is_another():
    def during(answers, engine, came):
        assert not answers.is_ahead
        if len(came) < 3:
            engine.listeners[0](piece(3))
            engine.listeners[0](piece(4) if len(came) < 2 else LAST)

    came, error, metrics, _ = read([[piece(1), piece(2)]], during=during)
    assert came == [(0, [1, 2]), (0, [3, 4]), (0, [3, 9])] and error is None
    assert _count(metrics, "between_tokens") == 5


def test_texts_are_kept_apart():
    came, error, _, _ = read([[piece(1), piece(2), LAST], [piece(5), LAST]])
    assert came == [(0, [1, 2, 9]), (1, [5, 9])] and error is None


def test_pieces_before_a_failure_are_told():
    came, error, _, engine = read([[piece(1), piece(2), LOST]])
    assert came == [(0, [1, 2])] and error.status == 500
    assert engine.cancelled == []


def test_a_text_that_was_ended_is_not_heard_any_more():
    def during(answers, engine, came):
        if came == [(0, [1])]:
            assert answers.is_ahead  # the other text
            answers.end(0)
            engine.listeners[0](piece(2))

    came, error, _, engine = read([[piece(1)], [LAST]], during=during)
    assert came == [(0, [1]), (1, [9])] and error is None
    assert engine.cancelled == [0]


def test_a_text_that_does_not_end_is_given_up_in_time():
    came, error, _, _ = read([[piece(1)]], seconds=0.05)
    assert came == [(0, [1])] and error.status == 503 and error.code == "timeout"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_who_is_lost_hears_of_it(after):
    def during(answers, engine, came):
        answers.lose("the engine stands still")

    came, error, _, _ = read([[piece(1)], [piece(2)] if after else []], during=during)
    assert came[0] == (0, [1]) and "stands still" in error.message
