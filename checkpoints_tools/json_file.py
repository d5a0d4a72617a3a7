"""Reads JSON objects from files that may be anything."""

import io
import json
import os
from typing import Any

from checkpoints_tools.gguf_file import GGUFError, opened

_MAX_BYTES = 1 << 28  # vocabularies and indices of published models stay below a tenth of that


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the object that a JSON file holds.

    Args:
      path: the file.

    Returns:
      The object, as `json` decodes it.

    Raises:
      GGUFError: if the file cannot be read, is too large, or holds no sound JSON object.
    """
    return parse_object(read_bytes(path), os.fspath(path))


def read_bytes(path: str | os.PathLike) -> bytes:
    """Reads a small file.

    Raises:
      GGUFError: if it cannot be read, is no regular file, or has more than 256 MiB.
    """
    path = os.fspath(path)
    with opened(path) as raw, io.BufferedReader(raw) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES:
            raise GGUFError(f"{path}: must have at most {_MAX_BYTES} bytes, got {size}.")
        return file.read(size)


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """Decodes a JSON object; keys must differ.

    Args:
      text: UTF-8.
      what: the file, for messages.

    Raises:
      GGUFError: if it is no sound JSON object.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise GGUFError(f"{what}: must be a JSON object, got text that is not: {_sentence(error)}.") from None
    if not isinstance(value, dict):
        raise GGUFError(f"{what}: must be a JSON object, got a {type(value).__name__}.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = {}
    for key, entry in pairs:
        if key in value:
            raise ValueError(f"key {key!r:.80} is there twice")
        value[key] = entry
    return value


def _sentence(error: Exception) -> str:
    return str(error).rstrip(".")
