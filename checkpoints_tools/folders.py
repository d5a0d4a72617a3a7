"""Folders that appear whole or not at all, and a place beside a file for what is not whole yet."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator

from checkpoints_tools.gguf_writer import sync_folder

FREE = "a new or an empty folder, no link or mounted disk and not the current folder"


@contextlib.contextmanager
def creating(path: str | os.PathLike) -> Iterator[str]:
    """Makes a folder beside its place and moves it there when it is complete and on the disk.

    Args:
      path: the folder; an empty one that is there is replaced, if it can be.

    Yields:
      Path of the folder to be filled. If that fails, it vanishes with all that is in it.

    Raises:
      ValueError: if `is_free` is false of `path`.
      OSError: if the folder cannot be made or moved.
    """
    path = os.path.normpath(path)
    if not is_free(path):
        raise ValueError(f"{path} must be {FREE}, it is not.")
    with beside(path) as temporary:
        unfinished = os.path.join(temporary, "unfinished")
        os.mkdir(unfinished)
        yield unfinished
        _sync_all(unfinished)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)
        os.rename(unfinished, path)
        sync_folder(os.path.dirname(path) or ".")


def is_free(path: str | os.PathLike) -> bool:
    """Whether `path` is `FREE`, so that a folder can be moved there."""
    if not os.path.lexists(path):
        return True
    is_folder = os.path.isdir(path) and not os.path.islink(path) and not os.path.ismount(path)
    return is_folder and not os.path.samefile(path, os.curdir) and not os.listdir(path)


@contextlib.contextmanager
def beside(path: str | os.PathLike) -> Iterator[str]:
    """Makes a folder for unfinished files on the disk of `path`; what is left in it vanishes at the end.

    Args:
      path: file or folder that need not exist; its parent must.

    Yields:
      Path of the folder.

    Raises:
      OSError: if the folder cannot be made, or a file in it; it names `path`, as the folder will be gone.
    """
    temporary = f"{os.path.normpath(path)}.{secrets.token_hex(4)}.tmp"
    try:
        os.mkdir(temporary)
        yield temporary
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(temporary):
            error.filename = os.fspath(path)  # a full disk does not say where
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_all(folder: str) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(parent)
