"""What `mla-jax serve` does with its flags; `mla-jax llama-server` is the same."""

import functools
import ipaddress
import json
import os
import pathlib
import socket

from mla_jax import chat
from mla_jax.cli import hosts, loading
from mla_jax.cli.argv import UsageError, spelled
from mla_jax.serve import grammar
from mla_jax.serve.http import access, server
from mla_jax.serve.http.service import Service, Settings

_KEY_VARIABLE = "MLA_API_KEY"
_REASONING_FORMATS = ("auto", "deepseek", "none")
_MIN_KEY_CHARS_TOLD = 16  # a shorter one is guessed sooner or later


def serve(values):
    """Loads a model and serves it over HTTP until a signal ends it."""
    _check(values)
    if hosts.is_follower(values):
        hosts.follow(values, "serve")
        return
    settings = _settings(values)
    settings |= dict(
        sampling=loading.sampling_params(values), max_tokens=None if values.predict < 0 else values.predict
    )
    settings |= dict(chat_template=_template(values), template_kwargs=_template_kwargs(values))
    bound = _bind(values)
    try:
        settings |= _hosts(values, bound, settings["api_keys"])
        with hosts.leading(values, "serve") as programs:
            _serve(values, bound, settings, programs)
    finally:
        bound.close()
    loading.tell("every request has been answered or cut off; goodbye")


def _serve(values, bound, settings, programs):
    """Serves at a bound socket. A server whose engine stands still is left behind with its process."""
    model = loading.load(
        values,
        parallel=values.parallel,
        cache_ram=None if values.cache_ram < 0 else values.cache_ram,
        keep_drawn=False,  # or a text would depend, by rounding, on what was asked before
        max_waiting=values.max_waiting,
        max_waiting_tokens=values.max_waiting_tokens,
        programs=programs,
    )
    template, kwargs = settings["chat_template"], settings["template_kwargs"]
    if template is not None or kwargs:
        model.encode_chat([{"role": "user", "content": "hello"}], template=template, kwargs=kwargs)
    if template is None and model.tokenizer.vocabulary.chat_template is None:
        loading.tell("the file has no chat template, so turns are written as its family does")
    if values.warmup:
        model.engine.warm_up(_tell_progress)
        grammar.prepare(model.tokenizer)
    service = Service(model, Settings(**settings))
    address = server.url(bound, is_secure=values.ssl_cert_file is not None)
    has_ended = server.run(
        service,
        bound,
        drain_seconds=values.drain_seconds,
        started=lambda: loading.tell(f"serving {settings['alias']} at {address}"),
        stopping=lambda: loading.tell(
            f"stopping: requests have {values.drain_seconds:g} s to end; a second signal ends them now"
        ),
        ssl_certificate=values.ssl_cert_file,
        ssl_key=values.ssl_key_file,
        watch=functools.partial(hosts.watch, programs),
    )
    if service.lost is not None:
        os._exit(hosts.LOST)
    if not has_ended:
        loading.tell("the engine stands still and is left behind")
        os._exit(1)


def _check(values):
    """Refuses what this server has only one way of."""
    if not values.cont_batching:
        raise UsageError("--no-cont-batching cannot be used: requests are always computed together.")
    if not values.jinja:
        raise UsageError("--no-jinja cannot be used: chat templates are always jinja.")
    if values.predict == 0:
        raise UsageError("--predict must be positive, or -1 for no limit, got 0.")
    if values.reasoning_format not in _REASONING_FORMATS:
        names = ", ".join(_REASONING_FORMATS)
        raise UsageError(f"--reasoning-format must be one of {names}, got {values.reasoning_format!r}.")
    if (values.ssl_cert_file is None) != (values.ssl_key_file is None):
        raise UsageError("--ssl-cert-file and --ssl-key-file must be given together.")
    for name in ("ssl_cert_file", "ssl_key_file"):
        if values[name].value is not None:
            _read(spelled(name), values[name].value)


def _settings(values):
    folder = None
    if values.slot_save_path is not None:
        folder = pathlib.Path(values.slot_save_path)
        if not folder.is_dir():
            raise UsageError(f"--slot-save-path must be a folder that exists, got {str(folder)!r}.")
        folder = folder.resolve()
    path = pathlib.Path(values.model)
    return dict(
        alias=values.alias or path.stem,
        file_name=path.name,
        adapters=tuple((pathlib.Path(source).name, scale) for source, scale in loading.adapters(values)),
        api_keys=_keys(values),
        origins=_list(values.cors_origins),
        slot_folder=folder,
        reasoning_format=values.reasoning_format,
        has_page=values.webui,
        has_slots=values.slots,
        has_metrics=values.metrics,
        num_threads=values.threads_http,
        body_bytes=values.max_body_bytes,
        answer_seconds=float(values.max_seconds),
        send_seconds=float(values.timeout),
        stall_seconds=float(values.stall_seconds),
    )


def _keys(values):
    """Returns the keys of flags, file and environment. Messages name none of them."""
    keys = [key for given in values.api_key for key in given.split(",")]
    if values.api_key_file is not None:
        found = [line.strip() for line in _read("--api-key-file", values.api_key_file).splitlines()]
        found = [line for line in found if line]
        if not found:
            raise UsageError("--api-key-file must hold at least one key, one a line.")
        keys += found
    if os.environ.get(_KEY_VARIABLE):
        keys.append(os.environ[_KEY_VARIABLE])
    for key in keys:
        if not key.isprintable() or not key or " " in key:
            raise UsageError("an API key must be made of printable characters without spaces, got another.")
    if any(len(key) < _MIN_KEY_CHARS_TOLD for key in keys):
        loading.tell(f"an API key has fewer than {_MIN_KEY_CHARS_TOLD} characters and can be guessed")
    return tuple(dict.fromkeys(keys))


def _bind(values):
    try:
        return server.bind(values.host, values.port)
    except OSError as error:
        raise UsageError(
            f"--host {values.host} --port {values.port} cannot be listened at: {error.strerror}."
        ) from None


def _hosts(values, bound, keys):
    """Returns the names by which requests may address the server, after a look at who can reach it."""
    address = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0])
    if not address.is_loopback and not keys:
        if not values.allow_unauthenticated:
            raise UsageError(
                f"--host {values.host} can be reached from other machines, so it must come with --api-key, "
                "--api-key-file or --allow-unauthenticated."
            )
        loading.tell("anyone who can reach this machine can use the model: there is no API key")
    hosts = _list(values.allowed_hosts)
    if not hosts and address.is_loopback:
        hosts = (*access.LOOPBACK_HOSTS, values.host)
    elif not hosts and not keys:
        hosts = (access.ADDRESSES, "localhost", socket.gethostname(), values.host)
    return dict(hosts=hosts)


def _template(values):
    if values.chat_template is not None and values.chat_template_file is not None:
        raise UsageError("--chat-template must not come with --chat-template-file, which is another.")
    if values.chat_template_file is not None:
        return _read("--chat-template-file", values.chat_template_file)
    given = values.chat_template
    if given is None or "{" in given:
        return given
    if given not in chat.BUILTIN_TEMPLATES:
        names = ", ".join(chat.BUILTIN_TEMPLATES)
        raise UsageError(f"--chat-template must be jinja or one of {names}, got {given[:60]!r}.")
    return chat.BUILTIN_TEMPLATES[given]


def _template_kwargs(values):
    if values.chat_template_kwargs is None:
        return {}
    try:
        kwargs = json.loads(values.chat_template_kwargs)
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise UsageError(
            f"--chat-template-kwargs must be a JSON object, got {values.chat_template_kwargs[:60]!r}."
        )
    return kwargs


def _list(text):
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _read(written, path):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{written} must be text in UTF-8, but byte {error.start} is none.") from None


def _tell_progress(done, count, what):
    loading.tell(f"compiling {done} of {count}: {what}")
