"""The routes of the server, as a Starlette application behind its gates."""

import pathlib
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mla_jax.serve.http import (
    llama_completion,
    openai_chat,
    openai_text,
    slot_routes,
    status_routes,
    text_routes,
)
from mla_jax.serve.http.access import Access
from mla_jax.serve.http.api_error import ApiError
from mla_jax.serve.http.metrics import Metrics
from mla_jax.serve.http.service import Service

_STATIC = pathlib.Path(__file__).parent / "static"
_CLIENT_LEFT = 499  # what logs of servers call it; nobody reads the answer


def application(service: Service) -> ASGIApp:
    """Returns the server's application."""
    settings = service.settings
    app = Starlette(routes=routes(service), exception_handlers=_HANDLERS)
    app.state.service = service
    guarded = Access(app, keys=settings.api_keys, hosts=settings.hosts, origins=settings.origins)
    return _Counted(guarded, service.metrics)


def routes(service: Service) -> list[Route | Mount]:
    """Returns every route that the settings of the server allow."""
    get = lambda path, function: Route(path, function, methods=["GET"])
    post = lambda path, function: Route(path, function, methods=["POST"])
    found = [
        get("/health", status_routes.health),
        get("/ready", status_routes.ready),
        get("/props", status_routes.props),
        get("/lora-adapters", status_routes.lora_adapters),
        post("/lora-adapters", status_routes.change_lora_adapters),
        get("/models", status_routes.models),
        get("/v1/models", status_routes.models),
        post("/v1/chat/completions", openai_chat.chat_completions),
        post("/chat/completions", openai_chat.chat_completions),
        post("/v1/completions", openai_text.completions),
        post("/completions", llama_completion.completion),
        post("/completion", llama_completion.completion),
        post("/tokenize", text_routes.tokenize),
        post("/detokenize", text_routes.detokenize),
        post("/apply-template", openai_chat.apply_template),
    ]
    if service.settings.has_slots:
        found += [get("/slots", slot_routes.slots), post("/slots/{slot}", slot_routes.act)]
    if service.settings.has_metrics:
        found.append(get("/metrics", status_routes.metrics))
    if service.settings.has_page:
        found += [
            get("/", _page),
            get("/index.html", _page),
            Mount("/static", StaticFiles(directory=_STATIC)),
        ]
    return found


async def _page(request: Request) -> Response:
    return FileResponse(_STATIC / "index.html")


async def _on_api_error(request: Request, error: ApiError) -> Response:
    closes = {"connection": "close"} if error.status in (408, 413) else {}
    return error.response(**closes)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    found = ApiError(f"{request.method} {request.url.path[:80]}: {error.detail}.", status=error.status_code)
    return found.response(**{name.lower(): value for name, value in (error.headers or {}).items()})


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _on_failure(request: Request, error: Exception) -> Response:
    return ApiError("the server failed to answer this request.", status=500).response()


_HANDLERS: dict[Any, Any] = {
    ApiError: _on_api_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_disconnect,
    Exception: _on_failure,
}


class _Counted:
    """Counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.responses.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
