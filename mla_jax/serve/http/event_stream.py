"""Answers that come in pieces, as server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mla_jax.serve.http.answers import Answers
from mla_jax.serve.http.api_error import ApiError

DONE = b"data: [DONE]\n\n"
_HEADERS = {"x-accel-buffering": "no"}  # a proxy in between shall not collect pieces


class EventStream(StreamingResponse):
    """Streams JSON values, and cancels the texts they come from when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, values: AsyncIterator[Any], answers: Answers, *, has_done: bool = True):
        """Makes the response.

        Args:
          values: one for each event.
          answers: what `values` comes from.
          has_done: end with the event `[DONE]`, as OpenAI's streams do.
        """
        super().__init__(_events(values, answers, has_done), headers=_HEADERS)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.leave()


async def _events(values, answers, has_done):
    ready = b""
    try:
        async for value in values:
            ready += _event(value)
            if not answers.is_ahead:  # else there is more to be sent with it
                yield ready
                ready = b""
    except ApiError as error:
        answers.close()
        ready += _event(error.body())
    if has_done:
        ready += DONE
    if ready:
        yield ready


def _event(value):
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
