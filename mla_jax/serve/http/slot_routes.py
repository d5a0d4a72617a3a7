"""`/slots`: what is in the cache, and its files: names in one folder, never links, never anything else."""

import contextlib
import os
import pathlib
import re
import stat
import time
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_jax.cache import PoolExhausted
from mla_jax.serve.http import schema, shapes
from mla_jax.serve.http.api_error import ApiError
from mla_jax.serve.http.body_reader import while_connected
from mla_jax.serve.http.routing import read_body, salt_of_request, service_of

_NUMBER = re.compile(r"[0-9]{1,6}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TABLE = {"filename": schema.Text()}
_RETRY_AFTER = 1.0  # seconds


async def slots(request: Request) -> Response:
    """Answers a `GET /slots`; it tells numbers of tokens and no text, and how one draws to its key alone."""
    service, salt = service_of(request), salt_of_request(request)
    infos = await service.workers.run(service.engine.slots)
    return JSONResponse([_told(info, service.model.ctx_size, salt) for info in infos])


async def act(request: Request) -> Response:
    """Answers a `POST /slots/{slot}?action=save|restore|erase`."""
    service, written = service_of(request), request.path_params["slot"]
    actions = {"save": _save, "restore": _restore, "erase": _erase}
    action = request.query_params.get("action")
    if action not in actions:
        raise ApiError(f"action must be one of {', '.join(actions)}, got {action!r:.40}.", param="action")
    num_slots = service.engine.stats().num_slots
    slot = int(written) if _NUMBER.fullmatch(written) else num_slots
    if slot >= num_slots:
        message = f"the slot must be a number in [0, {num_slots}), got {written!r:.40}."
        raise ApiError(message, status=404, param="id_slot")
    if service.lost is not None:
        raise ApiError(service.lost, status=503, code="not_ready", retry_after=_RETRY_AFTER)
    salt = salt_of_request(request)
    name = None if action == "erase" else await read_body(request, _name)
    if name is not None and service.settings.slot_folder is None:
        raise ApiError("the server must be started with --slot-save-path to keep slots in files.", status=501)
    work = lambda: service.workers.run(actions[action], service, slot, name, salt)
    return JSONResponse(await while_connected(request, work))


def _told(info, context, salt):
    is_own = info.sampling is not None and info.salt == salt
    sampling = shapes.generation_settings(info.sampling, None) if is_own else {}
    return {
        "id": info.id,
        "id_task": -1 if info.request_id is None else info.request_id,
        "n_ctx": context,
        "is_processing": info.is_busy,
        "n_prompt": info.num_prompt,
        "n_cached": info.num_cached,
        "n_decoded": info.num_drawn,
        "n_kept": info.num_kept,
        "params": sampling,
    }


def _name(body: dict[str, Any]) -> str:
    name = schema.read(_TABLE, body).get("filename")
    if name is None or not _NAME.fullmatch(name) or not name.strip("."):
        shown = name if name is None else name[:80]
        raise ApiError(
            "filename must be 1 to 64 letters, digits, dots, hyphens or underscores, and not dots alone, "
            f"got {shown!r}.",
            param="filename",
        )
    return name


def _save(service, slot, name, salt):
    began = time.perf_counter()
    path = _path(service, name, salt)
    with _naming(path, name):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"{path} must be a plain file where it exists.")
        num_tokens, num_bytes = service.engine.save_slot(slot, path, salt=salt)
    told = {"id_slot": slot, "filename": name, "n_saved": num_tokens, "n_written": num_bytes}
    return told | {"timings": {"save_ms": _milliseconds(began)}}


def _restore(service, slot, name, salt):
    began = time.perf_counter()
    path = _path(service, name, salt)
    with _naming(path, name), _plain_file(path, name) as num_bytes:
        try:
            num_tokens = len(service.engine.restore_slot(slot, path, salt=salt))
        except PoolExhausted as error:  # until those who run have ended
            raise ApiError(str(error), status=429, code="pool_full", retry_after=_RETRY_AFTER) from None
    told = {"id_slot": slot, "filename": name, "n_restored": num_tokens, "n_read": num_bytes}
    return told | {"timings": {"restore_ms": _milliseconds(began)}}


def _erase(service, slot, name, salt):
    try:
        return {"id_slot": slot, "n_erased": service.engine.erase_slot(slot, salt=salt)}
    except ValueError as error:
        raise ApiError(str(error), param="id_slot") from None


def _path(service, name, salt):
    """Returns where a file lies: those of another key have other names."""
    return service.settings.slot_folder / (f"{salt[:16]}-{name}" if salt else name)


@contextlib.contextmanager
def _plain_file(path: pathlib.Path, name: str) -> Iterator[int]:
    """Yields the bytes of a file that is neither a link nor a device, FIFO or the like."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise ApiError(f"there is no saved slot {name}.", status=404, param="filename") from None
    except OSError:
        raise ValueError(f"{path} must be a plain file.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} must be a plain file.")
        yield status.st_size
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: pathlib.Path, name: str) -> Iterator[None]:
    """Turns errors into answers that name the file as its owner does, and not the folder."""
    try:
        yield
    except ValueError as error:
        raise ApiError(str(error).replace(str(path), name), param="filename") from None
    except OSError as error:
        raise ApiError(f"{name} cannot be used: {error.strerror}.", status=500) from None


def _milliseconds(began):
    return round(1000 * (time.perf_counter() - began), 3)
