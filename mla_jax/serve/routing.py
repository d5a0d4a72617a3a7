"""What every route does with its request before it knows more."""

from typing import Any

from starlette.requests import Request

from mla_jax.serve import body_reader
from mla_jax.serve.service import Service, salt_of


def service_of(request: Request) -> Service:
    """Returns the state of the server that got `request`."""
    return request.app.state.service


def salt_of_request(request: Request) -> str:
    """Returns the salt of whoever sent `request`."""
    return salt_of(request.scope.get("state", {}).get("key"))


async def read_body(request: Request) -> dict[str, Any]:
    """Returns the JSON object of a body within the server's limits; errors: `body_reader.read_object`."""
    settings = service_of(request).settings
    return await body_reader.read_object(
        request, max_bytes=settings.body_bytes, seconds=settings.body_seconds
    )
