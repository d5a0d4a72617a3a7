"""`/completion`: the continuation of a text, as llama-server's own interface has it."""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_jax.completion import Piece
from mla_jax.serve.http import bodies, shapes
from mla_jax.serve.http.body_reader import while_connected
from mla_jax.serve.http.event_stream import EventStream
from mla_jax.serve.http.routing import read_body, salt_of_request, service_of

_STOP_TYPES = {"length": "limit", "cancel": "none"}


async def completion(request: Request) -> Response:
    """Answers a `POST /completion`."""
    service = service_of(request)
    settings = service.settings
    asked = await read_body(
        request, lambda body: bodies.completion(body, settings.sampling, settings.max_tokens)
    )
    salt = salt_of_request(request)
    return await while_connected(request, lambda: _complete(service, asked, salt))


async def _complete(service, asked, salt):
    compiled = await service.grammar(asked.drawing)
    drawn = await service.workers.run(_prepare, service, asked, compiled, salt)
    answers = service.answers()
    with answers.held():
        answers.submit([drawn])
        tally = shapes.Tally(answers.tickets[0])
        if asked.drawing.stream:
            return EventStream(_chunks(service, asked, drawn, answers, tally), answers, has_done=False)
        pieces = []
        async for _, part in answers.pieces():
            tally.add(part)
            pieces += part
    return JSONResponse(_last(service, asked, drawn, answers, tally, pieces))


def _prepare(service, asked, compiled, salt):
    (drawn,) = service.requests(
        service.encode(asked.prompts[0]),
        asked.drawing,
        salt=salt,
        grammar=compiled,
        num_logprobs=asked.num_logprobs,
    )
    return drawn


async def _chunks(service, asked, drawn, answers, tally) -> AsyncIterator[dict[str, Any]]:
    async for _, pieces in answers.pieces():
        tally.add(pieces)
        if tally.finish_reason:
            yield _last(service, asked, drawn, answers, tally, pieces)
            continue
        chunk = _part(service, asked, pieces) | {
            "stop": False,
            "tokens_predicted": tally.num_drawn,
            "tokens_evaluated": len(drawn.prompt),
        }
        if asked.drawing.timings_per_token:
            chunk["timings"] = tally.timings()
        yield chunk


def _part(service, asked, pieces: list[Piece]) -> dict[str, Any]:
    text = "".join(piece.text for piece in pieces)
    part = {"index": 0, "content": text, "tokens": [piece.token for piece in pieces]}
    if asked.num_logprobs is not None:
        tokenizer = service.model.tokenizer
        part["completion_probabilities"] = [
            {"id": piece.token} | shapes.chat_logprobs(tokenizer, piece.token, piece.logprobs)
            for piece in pieces
            if piece.logprobs is not None
        ]
    return part


def _last(service, asked, drawn, answers, tally, pieces):
    piece, told = pieces[-1], tally.timings()
    stop_type = "word" if piece.stop is not None else _STOP_TYPES.get(piece.finish_reason, "eos")
    ticket = answers.tickets[0]
    return _part(service, asked, pieces) | {
        "id_slot": -1 if ticket.slot is None else ticket.slot,
        "stop": True,
        "model": service.settings.alias,
        "prompt": asked.prompts[0] if isinstance(asked.prompts[0], str) else list(asked.prompts[0]),
        "tokens_predicted": tally.num_drawn,
        "tokens_evaluated": len(drawn.prompt),
        "tokens_cached": told["cache_n"],
        "truncated": False,
        "stop_type": stop_type,
        "stopping_word": piece.stop or "",
        "generation_settings": shapes.generation_settings(drawn.sampling, drawn.max_tokens),
        "timings": told,
    }
