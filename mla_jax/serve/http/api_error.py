"""The error object of the OpenAI API, as an exception and as an answer."""

import math
from typing import Any

from starlette.responses import JSONResponse

from mla_jax.serve.request import QueueFull

_SHOWN_CHARS = 60
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered by an error.

    Attributes:
      message: one sentence for its sender.
      status: HTTP status, 400 or more.
      param: the field that is wrong, None if it is none alone.
      code: word for programs, None if there is none.
      retry_after: seconds until it is worth another try, None where it never is.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Returns the error object."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, **headers: str) -> JSONResponse:
        """Returns the answer, with more headers: underscores in their names become hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.retry_after is not None:
            named["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return JSONResponse(self.body(), self.status, headers=named)


def invalid(name: str, requirement: str, value: Any, *, part: str = "") -> ApiError:
    """Returns the error of a field, or of a `part` of it, that is not what it must be."""
    return ApiError(f"{part or name} must be {requirement}, got {_shown(value)}.", param=name)


def busy(error: QueueFull) -> ApiError:
    """Returns the error of a request that there is no room for now."""
    return ApiError(str(error), status=429, code="queue_full", retry_after=error.retry_after)


def _shown(value):
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARS:
        return "a longer number"
    text = repr(value if not isinstance(value, str) else value[:_SHOWN_CHARS])
    return text if not isinstance(value, str) or len(value) <= _SHOWN_CHARS else f"{text}..."
