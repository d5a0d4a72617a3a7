"""Text to token ids and back, and conversations to prompts, without drawing anything."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_jax.serve.http import bodies, schema
from mla_jax.serve.http.api_error import ApiError
from mla_jax.serve.http.body_reader import while_connected
from mla_jax.serve.http.routing import read_body, service_of


async def tokenize(request: Request) -> Response:
    """Answers a `POST /tokenize`."""
    service = service_of(request)
    fields = await read_body(request, lambda body: schema.read(bodies.TOKENIZE_TABLE, body))
    bodies.required(fields, "content")
    work = lambda: _tokenize(service.model.tokenizer, **fields)
    return await while_connected(request, lambda: service.workers.run(work))


async def detokenize(request: Request) -> Response:
    """Answers a `POST /detokenize`."""
    service = service_of(request)
    fields = await read_body(request, lambda body: schema.read(bodies.DETOKENIZE_TABLE, body))
    ids = bodies.required(fields, "tokens")
    return await while_connected(request, lambda: service.workers.run(_detokenize, service, ids))


def _tokenize(tokenizer, content, add_special=False, parse_special=True, with_pieces=False):
    try:
        ids = tokenizer.encode(content, add_special=add_special, parse_special=parse_special)
    except ValueError as error:
        raise ApiError(str(error), param="content") from None
    if with_pieces:
        ids = [{"id": token, "piece": _piece(tokenizer, token)} for token in ids]
    return JSONResponse({"tokens": ids})


def _detokenize(service, ids):
    ids = service.checked_ids(ids, "tokens")
    return JSONResponse({"content": service.model.tokenizer.decode(ids, skip_special=False)})


def _piece(tokenizer, token):
    """Returns the text of a token, or its bytes where they are no text of their own."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
