"""Text to token ids and back, and conversations to prompts, without drawing anything."""

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_jax.serve import bodies, schema
from mla_jax.serve.api_error import ApiError
from mla_jax.serve.body_reader import while_connected
from mla_jax.serve.routing import read_body, service_of


async def tokenize(request: Request) -> Response:
    """Answers a `POST /tokenize`."""
    fields = schema.read(bodies.TOKENIZE_TABLE, await read_body(request))
    text, tokenizer = bodies.required(fields, "content"), service_of(request).model.tokenizer
    encode = lambda: _encode(
        tokenizer, text, fields.get("add_special", False), fields.get("parse_special", True)
    )
    ids = await while_connected(request, lambda: to_thread.run_sync(encode))
    if not fields.get("with_pieces", False):
        return JSONResponse({"tokens": ids})
    return JSONResponse({"tokens": [{"id": token, "piece": _piece(tokenizer, token)} for token in ids]})


async def detokenize(request: Request) -> Response:
    """Answers a `POST /detokenize`."""
    fields = schema.read(bodies.DETOKENIZE_TABLE, await read_body(request))
    ids, model = bodies.required(fields, "tokens"), service_of(request).model
    size = model.config.vocab_size
    for position, token in enumerate(ids):
        if token >= size:
            raise ApiError(
                f"token ids must be in [0, {size}), got {token} at position {position}.", param="tokens"
            )
    decode = lambda: model.tokenizer.decode(ids, skip_special=False)
    return JSONResponse({"content": await while_connected(request, lambda: to_thread.run_sync(decode))})


def _encode(tokenizer, text, add_special, parse_special):
    try:
        return tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
    except ValueError as error:
        raise ApiError(str(error), param="content") from None


def _piece(tokenizer, token):
    """Returns the text of a token, or its bytes where they are no text of their own."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
