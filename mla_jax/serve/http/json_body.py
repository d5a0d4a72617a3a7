"""Bytes of a request body to JSON values, without what JSON leaves open."""

import json
import math
from typing import Any

from mla_jax.serve.http.api_error import ApiError

MAX_DEPTH = 64
_MAX_DIGITS = 400  # of a number; those of every float in full are fewer


def parse(body: bytes) -> dict[str, Any]:
    """Returns the object that `body` is.

    Raises:
      ApiError: it is no UTF-8, no JSON or no object; it nests deeper than `MAX_DEPTH`; a key comes twice in
        an object; or it holds NaN, an infinity, a number that is none as a float, or a lone surrogate.
    """
    try:
        value = json.loads(
            body.decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_float,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise ApiError(f"the body must be UTF-8, but byte {error.start} is none.") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise ApiError(
            f"the body must be JSON, but at character {error.pos} it is not: {error.msg}."
        ) from None
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object.")
    _check(value)
    return value


def _object(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ApiError(f"keys of the body must not repeat in an object, got {twice[:60]!r} twice.")
    return value


def _refuse_constant(text):
    raise ApiError(f"numbers must be finite, got {text}.")


def _float(text):
    value = float(text) if len(text) <= _MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ApiError(f"numbers must be finite as 64-bit floats, got {text[:20]}.")
    return value


def _integer(text):
    if len(text) > _MAX_DIGITS:
        raise ApiError(f"numbers must have at most {_MAX_DIGITS} digits, got {len(text)}.")
    return int(text)


def _check(value):
    """Looks at every value once, level by level: nothing here recurses."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = []
        for container in level:
            if isinstance(container, dict):
                _check_text(container)
                container = container.values()
            _check_text(part for part in container if isinstance(part, str))
            inner += [part for part in container if isinstance(part, dict | list)]
        if not inner:
            return
        level = inner
    raise _too_deep()


def _check_text(texts):
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(
                f"the body must be valid Unicode, got the lone surrogate U+{ord(text[error.start]):04X}."
            ) from None


def _too_deep():
    return ApiError(f"the body must nest at most {MAX_DEPTH} levels deep.")
