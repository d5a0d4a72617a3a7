"""Reads the body of a request within its limits, and does work that ends when the client leaves."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from mla_jax.serve.http.api_error import ApiError

_Result = TypeVar("_Result")


async def read_bytes(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """Returns the body of a request.

    Raises:
      ApiError: 413 if it is longer than `max_bytes`, 408 if it takes longer than `seconds` to come.
      ClientDisconnect: the client left.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_long(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
    except TimeoutError:
        message = f"the body must come within {seconds:g} seconds."
        raise ApiError(message, status=408, code="request_timeout") from None
    return bytes(body)


async def while_connected(request: Request, work: Callable[[], Awaitable[_Result]]) -> _Result:
    """Returns what `work` does, unless the client leaves before, which cancels it.

    Args:
      request: its body has been read.
      work: is called once.

    Raises:
      ClientDisconnect: the client left.
    """
    job = asyncio.ensure_future(work())
    watcher = asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait({job, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientDisconnect
        return job.result()
    finally:
        for task in (job, watcher):
            task.cancel()
        await asyncio.gather(job, watcher, return_exceptions=True)


async def _leaves(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_long(max_bytes):
    return ApiError(f"the body must have at most {max_bytes} bytes.", status=413, code="body_too_large")
