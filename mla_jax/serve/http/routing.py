"""What every route does with its request before it knows more."""

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from mla_jax.serve.http import body_reader, json_body
from mla_jax.serve.http.service import Service, salt_of

_SHORT_BYTES = 16 << 10  # of a body that is read at once; others wait for nobody meanwhile
_Result = TypeVar("_Result")


def service_of(request: Request) -> Service:
    """Returns the state of the server that got `request`."""
    return request.app.state.service


def salt_of_request(request: Request) -> str:
    """Returns the salt of whoever sent `request`."""
    return salt_of(request.scope.get("state", {}).get("key"))


async def read_body(request: Request, reader: Callable[[dict[str, Any]], _Result]) -> _Result:
    """Returns what `reader` makes of the JSON object that a request has as its body.

    Raises:
      ApiError: the body exceeds the limits of the server, is no such object, or `reader` refuses it.
      ClientDisconnect: the client left.
    """
    service = service_of(request)
    settings = service.settings
    body = await body_reader.read_bytes(request, max_bytes=settings.body_bytes, seconds=settings.body_seconds)
    work = lambda: reader(json_body.parse(body))
    return work() if len(body) <= _SHORT_BYTES else await service.workers.run(work)
