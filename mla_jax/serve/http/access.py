"""Who may ask: one middleware around every route, which lets nothing pass that it does not know.

A request goes through three gates, in this order. Its `Host` must be one of ours where only this machine is
meant: a name that an attacker owns can be made to point here. Its `Origin`, which only browsers send, must be
ours or allowed: a page elsewhere could otherwise have its reader's browser act here. And its key must be one
of the server's, but for `/health` and `/ready`. A browser is asked for the key of the chat page and
of its files, as password.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mla_jax.serve.http.api_error import ApiError

OPEN_PATHS = ("/health", "/ready")
_PAGE_PATHS = ("/", "/index.html")  # what a person opens; programs are asked for a bearer token
_PAGE_FILES = "/static/"
_BASIC = 'Basic realm="mla-jax", charset="UTF-8"'
_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_ALLOWED_HEADERS = "authorization, content-type, x-api-key"
_PREFLIGHT_SECONDS = "600"
HEAD_BYTES = 16 << 10  # of a request without its body
ADDRESSES = "any address"  # among hosts; a page at an address has it from there, not from a name's owner
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Access:
    """Guards an application. It puts the key that a request came with into `scope["state"]["key"]`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Iterable[str] = (),
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
    ):
        """Makes the gates.

        Args:
          app: what is guarded.
          keys: that open it; none leaves it open.
          hosts: names without ports that it may be addressed by, `ADDRESSES` for all that are none but
            addresses; none for any.
          origins: of other sites' pages that may use it, such as "https://example.org".
        """
        self._app, self._keys = app, tuple(key.encode() for key in keys)
        hosts = {host.lower() for host in hosts}
        self._takes_any_host, self._takes_addresses = not hosts, ADDRESSES in hosts
        self._hosts = frozenset(hosts - {ADDRESSES})
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it with 401, 403 or, to a browser's question, 204."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        send = self._marked(send, origin)
        answer = self._stopped(scope, headers, origin)
        if answer is not None:
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _stopped(self, scope, headers, origin):
        """Returns the answer to a request that may not pass, None if it may."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > HEAD_BYTES:
            message = f"path and headers must have at most {HEAD_BYTES} bytes, got {size}."
            return ApiError(message, status=431).response(connection="close")
        host = headers.get("host", "")
        if not self._is_ours(_without_port(host)):
            return _refusal(
                f"the Host header must name this server, got {host[:80]!r}; --allowed-hosts says what may."
            )
        if origin is not None and origin not in self._origins and not _is_own(origin, host):
            return _refusal(
                f"pages of {origin[:80]!r} may not use this server; --cors-origins names those that may."
            )
        if origin in self._origins and scope["method"] == "OPTIONS":
            return _preflight(headers)
        key = self._key(headers)
        if self._keys and key is None and scope["path"] not in OPEN_PATHS:
            is_of_page = scope["path"] in _PAGE_PATHS or scope["path"].startswith(_PAGE_FILES)
            error = ApiError("the API key is missing or wrong.", status=401, code="invalid_api_key")
            return error.response(www_authenticate=_BASIC if is_of_page else "Bearer", connection="close")
        scope.setdefault("state", {})["key"] = key
        return None

    def _is_ours(self, name):
        is_named = self._takes_any_host or name in self._hosts
        return is_named or (self._takes_addresses and _is_address(name))

    def _key(self, headers):
        """Returns the key of the server that a request came with, None if it came with none."""
        matches = [key for key in self._keys for given in _given_keys(headers) if _equal(given, key)]
        return matches[0] if matches else None

    def _marked(self, send, origin):
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
                if origin in self._origins:
                    headers["access-control-allow-origin"] = origin
                    headers["access-control-expose-headers"] = "retry-after"
                    headers["cross-origin-resource-policy"] = "cross-origin"
                if self._origins:
                    headers.add_vary_header("origin")
            await send(message)

        return marked


def _preflight(headers):
    """Returns the answer to a browser that asks what a page may send: any headers; clients have their own."""
    told = {
        "access-control-allow-headers": headers.get("access-control-request-headers", _ALLOWED_HEADERS),
        "access-control-allow-methods": "GET, POST",
        "access-control-max-age": _PREFLIGHT_SECONDS,
        "vary": "access-control-request-headers",
    }
    return Response(status_code=204, headers=told)


def _refusal(message):
    return ApiError(message, status=403, code="forbidden").response(connection="close")


def _given_keys(headers):
    """Yields the bytes that a request gives as its key, at most one for each way to give it."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        yield value.encode("latin-1")
    elif scheme.lower() == "basic":
        try:
            yield base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            pass
    if "x-api-key" in headers:
        yield headers["x-api-key"].encode("latin-1")


def _equal(given, key):
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(key).digest())


def _without_port(host):
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def _is_address(name):
    try:
        if name.startswith("["):
            ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]"))
        else:
            ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


def _is_own(origin, host):
    return origin.partition("://")[2].lower() == host.lower() != ""
