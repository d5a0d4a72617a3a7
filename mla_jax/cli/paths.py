"""Files and folders that a command line names for writing, checked before any work is done for them."""

import os
import pathlib
from collections.abc import Iterable

from checkpoints_tools import folders
from mla_jax.cli.argv import UsageError


def output_file(written: str, value: str) -> pathlib.Path:
    """Returns the path of a file to be written.

    Args:
      written: the flag as its user knows it, for the message.
      value: its value.

    Raises:
      UsageError: if its folder does not exist, or something else than a file is there.
    """
    path = pathlib.Path(value)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(f"{written} must be a file in a folder that exists, got {value!r}.")
    return path


def output_folder(written: str, value: str) -> pathlib.Path:
    """Returns the path of a folder to be written; arguments as for `output_file`.

    Raises:
      UsageError: if the folder above does not exist, or this one exists and cannot be replaced.
    """
    path = pathlib.Path(value)
    if not path.parent.is_dir() or not folders.is_free(path):
        raise UsageError(f"{written} must be {folders.FREE}, in one that exists, got {value!r}.")
    return path


def check_not_read(written: str, out: str | os.PathLike, read: Iterable[str | os.PathLike | None]) -> None:
    """Checks that what is written replaces nothing that the same command reads.

    Args:
      written: the flag as its user knows it, for the message.
      out: the file or folder to be written.
      read: files, and folders with all that is in them; None is ignored.

    Raises:
      UsageError: if it would.
    """
    out = pathlib.Path(out).resolve()
    places = [pathlib.Path(path).resolve() for path in read if path is not None]
    is_same = lambda place: out.exists() and place.exists() and out.samefile(place)
    if any(is_same(place) or (place.is_dir() and place in out.parents) for place in places):
        raise UsageError(f"{written} must not be a file that is read, got {str(out)!r}.")
