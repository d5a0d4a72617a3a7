"""What the server says of itself: health, readiness, the model, its settings, metrics."""

import importlib.metadata
import time

import prometheus_client
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_jax import chat
from mla_jax import expert_reduction as reduction_lib
from mla_jax.serve.http import shapes
from mla_jax.serve.http.api_error import ApiError
from mla_jax.serve.http.routing import service_of

_STARTED = int(time.time())
_RETRY_AFTER = 5.0  # seconds


async def health(request: Request) -> Response:
    """Answers a `GET /health`: the process lives."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Answers a `GET /ready`: whether requests should be sent here."""
    reason = service_of(request).not_ready_because()
    if reason is not None:
        raise ApiError(reason, status=503, code="not_ready", retry_after=_RETRY_AFTER)
    return JSONResponse({"status": "ready"})


async def models(request: Request) -> Response:
    """Answers a `GET /v1/models`: there is one."""
    service = service_of(request)
    config = service.model.config
    about = {
        "n_vocab": config.vocab_size,
        "n_ctx": service.model.ctx_size,
        "n_ctx_train": config.context_length,
        "n_embd": config.embed_dim,
    }
    entry = {"id": service.settings.alias, "object": "model", "created": _STARTED, "owned_by": "mla-jax"}
    return JSONResponse({"object": "list", "data": [entry | {"meta": about}]})


async def props(request: Request) -> Response:
    """Answers a `GET /props`: the settings of the server, in llama-server's words and some of ours."""
    service = service_of(request)
    model, settings = service.model, service.settings
    moe = model.config.moe
    params = shapes.generation_settings(settings.sampling, settings.max_tokens)
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": model.ctx_size, "params": params},
            "total_slots": service.engine.stats().num_slots,
            "model_alias": settings.alias,
            "model_path": settings.file_name,
            "n_ctx": model.ctx_size,
            **chat.special_texts(model.tokenizer),
            "chat_template": service.template,
            "build_info": f"mla-jax {importlib.metadata.version('mla-jax')}",
            "cache_type": model.run.cache_type,
            "mla": int(model.run.mla),
            "num_experts": 0 if moe is None else moe.num_experts,
            "num_experts_per_token": 0 if moe is None else moe.num_experts_per_token,
            "expert_reduction": reduction_lib.describe(model.expert_reduction),
        }
    )


async def lora_adapters(request: Request) -> Response:
    """Answers a `GET /lora-adapters`: the adapters that the weights have."""
    adapters = service_of(request).settings.adapters
    found = [{"id": index, "path": name, "scale": scale} for index, (name, scale) in enumerate(adapters)]
    return JSONResponse(found)


async def change_lora_adapters(request: Request) -> Response:
    """Answers a `POST /lora-adapters`, which would change their scales."""
    raise ApiError("the scales of adapters must be given at the start, by --lora-scaled.", status=501)


async def metrics(request: Request) -> Response:
    """Answers a `GET /metrics` in the text format of Prometheus."""
    body = service_of(request).metrics.render()
    return Response(body, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})
