"""A stand-in for the server: serves the page, and answers by script instead of by model."""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

STATIC = pathlib.Path(__file__).parents[2] / "mla_jax/serve/http/static"
PROPS = {
    "model_alias": "stub-16b",
    "total_slots": 4,
    "num_experts": 64,
    "num_experts_per_token": 6,
    "default_generation_settings": {"n_ctx": 8192, "params": {"temperature": 0.7}},
}
SLOTS = [{"id": number, "is_processing": number == 0, "n_kept": 200 * number} for number in range(4)]
USAGE = {"prompt_tokens": 40, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 32}}
TIMINGS = {"cache_n": 32, "prompt_n": 8, "predicted_n": 12, "predicted_per_second": 123.4}


@dataclasses.dataclass
class Stub:
    """What the stand-in answers next, and what it was asked.

    `deltas` are sent one after the other; at a None the answer waits for `gate`.
    """

    url: str = ""
    deltas: list[dict | None] = dataclasses.field(default_factory=list)
    refusal: JSONResponse | None = None
    is_cut: bool = False  # the connection ends before the answer does
    key: str = ""
    asked: list[dict] = dataclasses.field(default_factory=list)
    num_aborted: int = 0
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        """Makes the next requests fail with an OpenAI error object."""
        body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
        self.refusal = JSONResponse(body, status, {name.replace("_", "-"): v for name, v in headers.items()})

    async def chat(self, request):
        """Answers `POST /v1/chat/completions`."""
        if not self.is_open_to(request):
            return JSONResponse({"error": {"message": "Wrong key."}}, 401)
        self.asked.append(await request.json())
        return self.refusal or StreamingResponse(self.events(), media_type="text/event-stream")

    async def events(self):
        """Yields the answer as server-sent events."""
        is_over = False
        try:
            for delta in self.deltas:
                while delta is None and not self.gate.is_set():
                    await asyncio.sleep(0.01)
                yield event({"choices": [{"index": 0, "delta": delta or {}, "finish_reason": None}]})
            if not self.is_cut:
                yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                yield event({"choices": [], "usage": USAGE, "timings": TIMINGS})
                yield b"data: [DONE]\n\n"
            is_over = True
        finally:
            self.num_aborted += not is_over

    def is_open_to(self, request) -> bool:
        """Tells if the request has the key, if there is one."""
        return not self.key or request.headers.get("Authorization") == f"Bearer {self.key}"

    def tell(self, value):
        """Returns a route that answers `value` to those who have the key."""
        return lambda request: JSONResponse(value, 200 if self.is_open_to(request) else 401)


def event(value: dict) -> bytes:
    """Returns a server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()


class Guarded:
    """Adds the content security policy that the page has to live with."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        """Passes everything on, with one header more."""

        async def send_guarded(message):
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", b"default-src 'self'"))
            await send(message)

        await self.app(scope, receive, send_guarded)


@contextlib.contextmanager
def serving():
    """Yields a `Stub` that is reachable at its `url`."""
    stub = Stub()
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html")),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/props", stub.tell(PROPS)),
        Route("/slots", stub.tell(SLOTS)),
        Route("/v1/chat/completions", stub.chat, methods=["POST"]),
    ]
    config = uvicorn.Config(
        Guarded(Starlette(routes=routes)), port=0, log_level="error", ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    try:
        yield stub
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
