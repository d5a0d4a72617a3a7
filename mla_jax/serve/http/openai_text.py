"""`/v1/completions`: the continuation of texts, as OpenAI's older interface has it."""

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_jax.completion import Piece
from mla_jax.serve.http import bodies, shapes
from mla_jax.serve.http.answers import Answers
from mla_jax.serve.http.body_reader import while_connected
from mla_jax.serve.http.event_stream import EventStream
from mla_jax.serve.http.routing import read_body, salt_of_request, service_of
from mla_jax.serve.http.service import Service


async def completions(request: Request) -> Response:
    """Answers a `POST /v1/completions`."""
    service = service_of(request)
    settings = service.settings
    asked = await read_body(request, lambda body: bodies.text(body, settings.sampling, settings.max_tokens))
    salt = salt_of_request(request)
    return await while_connected(request, lambda: _complete(service, asked, salt))


@dataclasses.dataclass(kw_only=True)
class _Text:
    """One choice while it is drawn; `length` is of the text so far, the echoed prompt included."""

    tally: shapes.Tally
    prompt: str
    length: int = 0
    parts: list[str] = dataclasses.field(default_factory=list)
    places: list[tuple[Piece, int]] = dataclasses.field(default_factory=list)

    def add(self, pieces):
        """Takes pieces, and returns them with their places."""
        self.tally.add(pieces)
        places = []
        for piece in pieces:
            places.append((piece, self.length))
            self.parts.append(piece.text)
            self.length += len(piece.text)
        self.places += places
        return places


async def _complete(service, asked, salt):
    compiled = await service.grammar(asked.drawing)
    prompts, requests = await service.workers.run(_prepare, service, asked, compiled, salt)
    answers = service.answers()
    with answers.held():
        answers.submit(requests)
        per_prompt = asked.drawing.num_choices
        texts = []
        for index, ticket in enumerate(answers.tickets):
            prompt = prompts[index // per_prompt][1]
            texts.append(_Text(tally=shapes.Tally(ticket), prompt=prompt, length=len(prompt)))
        head = _head(service)
        if asked.drawing.stream:
            return EventStream(_chunks(service, asked, answers, texts, head), answers)
        async for index, pieces in answers.pieces():
            texts[index].add(pieces)
    choices = [_choice(service, asked, index, text) for index, text in enumerate(texts)]
    body = head | {"choices": choices, "usage": _usage(texts, per_prompt)}
    return JSONResponse(body | {"timings": texts[0].tally.timings()})


def _prepare(service, asked, compiled, salt):
    """Returns (ids, text to echo) of each prompt, and the requests of all."""
    decode = lambda ids: service.model.tokenizer.decode(ids, skip_special=False)
    prompts, requests = [], []
    for prompt in asked.prompts:
        ids = service.encode(prompt)
        echoed = "" if not asked.echo else prompt if isinstance(prompt, str) else decode(ids)
        prompts.append((ids, echoed))
        requests += service.requests(
            ids, asked.drawing, salt=salt, grammar=compiled, num_logprobs=asked.num_logprobs
        )
    return prompts, requests


def _head(service):
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.settings.alias,
    }


def _choice(service, asked, index, text):
    logprobs = None
    if asked.num_logprobs is not None:
        logprobs = shapes.text_logprobs(service.model.tokenizer, text.places)
    return {
        "index": index,
        "text": text.prompt + "".join(text.parts),
        "logprobs": logprobs,
        "finish_reason": text.tally.finish_reason,
    }


async def _chunks(
    service: Service, asked: bodies.TextBody, answers: Answers, texts: list[_Text], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    for index, text in enumerate(texts):
        if text.prompt:
            choice = {"index": index, "text": text.prompt, "logprobs": None, "finish_reason": None}
            yield head | {"choices": [choice]}
    async for index, pieces in answers.pieces():
        tally, places = texts[index].tally, texts[index].add(pieces)
        logprobs, new = None, "".join(piece.text for piece in pieces)
        if asked.num_logprobs is not None:
            logprobs = shapes.text_logprobs(service.model.tokenizer, places)
        if not (new or tally.finish_reason or logprobs or asked.drawing.timings_per_token):
            continue
        choice = {
            "index": index,
            "text": new,
            "logprobs": logprobs,
            "finish_reason": tally.finish_reason,
        }
        chunk = head | {"choices": [choice]}
        if tally.finish_reason or asked.drawing.timings_per_token:
            chunk["timings"] = tally.timings()
        yield chunk
    if asked.drawing.include_usage:
        yield head | {"choices": [], "usage": _usage(texts, asked.drawing.num_choices)}


def _usage(texts, per_prompt):
    prompts = [text.tally.ticket_timings for text in texts[::per_prompt]]
    return shapes.usage(
        sum(of.prompt_tokens for of in prompts),
        sum(of.cached_tokens for of in prompts),
        sum(text.tally.num_drawn for text in texts),
    )
