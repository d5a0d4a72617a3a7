"""Tile sizes that were measured, a JSON file for each kind of GPU: operation -> key -> fields of its Config.

A key names shapes and types, with sizes that vary from call to call rounded up to powers of two, so that a
few measurements serve many calls. A file is read once in a process: what is written later counts in the next.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile

import jax
from absl import logging


def cache_home() -> str:
    """Returns the user's folder for what can be made again, not expanded. Source: XDG Base Directory."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return home if os.path.isabs(home) else "~/.cache"


USER_FOLDER = f"{cache_home()}/mla_jax/tuning"
SHIPPED_FOLDER = str(pathlib.Path(__file__).parent / "tuned")

_ROUNDED = ("batch", "heads", "pairs", "queries", "slots", "tokens")
_COUNTS = ("splits", "num_stages")  # fields that need not be powers of two
_LARGEST = 1 << 16  # of a field


def key(**sizes: int | str) -> str:
    """Returns the name under which measurements for shapes and types are kept.

    Args:
      **sizes: `batch`, `heads`, `pairs`, `queries`, `slots` and `tokens` are rounded up to powers of two,
        others stay as they are.
    """
    power = lambda size: 1 << max(size - 1, 0).bit_length()
    shown = {name: power(size) if name in _ROUNDED else size for name, size in sizes.items()}
    return " ".join(f"{name}={shown[name]}" for name in sorted(shown))


def device_kind() -> str | None:
    """Returns the kind of the GPU, or None if there is none."""
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def file_of(folder: str | os.PathLike, kind: str) -> pathlib.Path:
    """Returns the path of the measurements on a kind of GPU: "NVIDIA H200" is nvidia-h200.json."""
    name = re.sub(r"[^a-z0-9.]+", "-", kind.lower()).strip("-.")
    return pathlib.Path(os.path.expanduser(folder)) / f"{name}.json"


def lookup(op: str, key: str, *, kind: str, folder: str | os.PathLike | None = None) -> dict | None:
    """Returns what was measured: in the user's folder, else in the one that is shipped.

    Args:
      op: name of the operation.
      key: from `key`.
      kind: of the GPU.
      folder: that of the user; None for `USER_FOLDER`.

    Returns:
      Fields of the operation's Config, or None. A file that is none of ours counts as absent, and the log
      says so.
    """
    for place in (USER_FOLDER if folder is None else folder, SHIPPED_FOLDER):
        found = _read(file_of(place, kind)).get(op, {}).get(key)
        if found is not None:
            return dict(found)
    return None


def measured(cls: type, op: str, **sizes: int | str):
    """Returns the `cls` that was measured for an operation on this GPU, or None.

    Args:
      cls: the operation's Config, a dataclass with a default for each field.
      op: name of the operation.
      **sizes: as for `key`.
    """
    kind = device_kind()
    return None if kind is None else _config(cls, op, key(**sizes), kind, USER_FOLDER, SHIPPED_FOLDER)


def write(folder: str | os.PathLike, kind: str, results: dict[str, dict[str, dict]]) -> pathlib.Path:
    """Adds measurements to the file of a kind of GPU, which is replaced as a whole.

    Args:
      folder: it is made if need be.
      kind: of the GPU.
      results: operation -> key -> fields of its Config.

    Returns:
      Path of the file.

    Raises:
      OSError: if it cannot be written.
    """
    path = file_of(folder, kind)
    merged = {op: dict(entries) for op, entries in _parse(path).items()}
    for op, entries in results.items():
        merged.setdefault(op, {}).update(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".mla-jax-", delete=False) as file:
        try:
            file.write(json.dumps(merged, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are for their owner alone
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise
    return path


@functools.cache
def _read(path):
    return _parse(path)


def _parse(path):
    """Returns operation -> key -> fields, or {} and a sentence in the log if the file is none of ours."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _left_aside(path, error)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _left_aside(path, error)
    levels = [table]
    for _ in range(3):
        if not all(isinstance(entry, dict) for entry in levels):
            return _left_aside(path, "it must hold objects: operation, key, fields of a configuration")
        levels = [value for entry in levels for value in entry.values()]
    return table


def _left_aside(path, reason):
    logging.warning("%s is left aside: %s.", path, str(reason).rstrip("."))
    return {}


@functools.cache
def _config(cls, op, key, kind, *folders):
    """Builds the Config once, so that the log says once what is wrong. `folders` tell cache entries apart."""
    found = lookup(op, key, kind=kind, folder=folders[0])
    if found is None:
        return None
    where = f"The measurement of {op} for {key}"
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    if unknown := sorted(found.keys() - defaults.keys()):
        logging.warning("%s has fields that are ignored: %s.", where, ", ".join(unknown))
    fields = {name: value for name, value in found.items() if name in defaults}
    for name, value in fields.items():
        if not _is_valid(name, value, defaults[name]):
            logging.warning("%s is left aside: %s cannot be %r.", where, name, value)
            return None
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        logging.warning("%s is left aside: %s.", where, str(error).rstrip("."))
        return None


def _is_valid(name, value, default):
    if type(value) is not type(default):
        return False
    if isinstance(value, bool):
        return True
    return 1 <= value <= _LARGEST and (name in _COUNTS or value & (value - 1) == 0)
