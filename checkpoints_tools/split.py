"""One GGUF file as several and back, in the convention of llama.cpp; bytes are copied, nothing is decoded.

`PREFIX-00001-of-0000N.gguf` and so on. Each part is a GGUF file with the keys `split.no`, `split.count` and
`split.tensors.count`; the first has all other keys too.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from checkpoints_tools import folders
from checkpoints_tools.gguf_file import GGUFFile, TensorInfo, open_gguf
from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.gguf_writer import TensorData, sync_folder, write_gguf
from checkpoints_tools.progress import Progress, ProgressLine

DEFAULT_MAX_TENSORS = 128  # that of llama-gguf-split
_MAX_PARTS = 65_535  # `split.count` is a u16
_COPIED_BYTES = 64 << 20  # at a time


def split(
    path: str | os.PathLike,
    prefix: str | os.PathLike,
    *,
    max_bytes: int | None = None,
    max_tensors: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes a file as parts; all of them appear, or none does.

    Args:
      path: the file, or the first part of one that is split otherwise.
      prefix: path of the parts without their numbers, for example "out/model".
      max_bytes: of tensors in a part; a larger tensor has a part of its own. None: no limit.
      max_tensors: in a part. None: no limit, or 128 if `max_bytes` is None too.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor. None prints one line
        to stderr, if that is a terminal or it takes over a second.

    Returns:
      The paths of the parts, in order.

    Raises:
      GGUFError: if the file cannot be read or is not sound.
      ValueError: if a limit is not positive, makes more than 65,535 parts, or if a part is already there.
      OSError: if the parts cannot be written.
    """
    file = open_gguf(path)
    parts = plan(file, prefix, max_bytes=max_bytes, max_tensors=max_tensors)
    copy = _Copy(file, progress or ProgressLine(file.path))
    with folders.beside(prefix) as folder:
        for number, (part, infos) in enumerate(parts.items()):
            keys = _part_keys(file, number, len(parts))
            write_gguf(_within(folder, part), keys, [copy.tensor(info) for info in infos])
        _move(folder, list(parts))
    return list(parts)


def plan(
    file: GGUFFile,
    prefix: str | os.PathLike,
    *,
    max_bytes: int | None = None,
    max_tensors: int | None = None,
) -> dict[str, list[TensorInfo]]:
    """Decides which tensors each part gets; arguments and errors as for `split`, of an opened file.

    Returns:
      Path of a part -> its tensors, in order.
    """
    for what, limit in (("max_bytes", max_bytes), ("max_tensors", max_tensors)):
        if limit is not None and limit < 1:
            raise ValueError(f"{what} must be at least 1, got {limit}.")
    if max_bytes is None and max_tensors is None:
        max_tensors = DEFAULT_MAX_TENSORS
    groups = groups_within(file.tensors.values(), max_bytes=max_bytes, max_tensors=max_tensors)
    if len(groups) > _MAX_PARTS:
        raise ValueError(f"{file.path} must be split in at most {_MAX_PARTS} parts, got {len(groups)}.")
    prefix = os.fspath(prefix)
    paths = [f"{prefix}-{number:05}-of-{len(groups):05}.gguf" for number in range(1, len(groups) + 1)]
    for part in paths:
        if os.path.lexists(part):
            raise ValueError(f"{part} must not be there before a file is split, but it is.")
    return dict(zip(paths, groups, strict=True))


def merge(
    first: str | os.PathLike,
    out: str | os.PathLike,
    progress: Progress | None = None,
    *,
    alignment: int | None = None,
) -> None:
    """Writes the parts of a split file as one: all keys and tensors in order, without the `split.*` keys.

    Args:
      first: the first part, or a file that is whole.
      out: the file; one that is there is replaced, and kept as it was if anything fails.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor. None prints one line
        to stderr, if that is a terminal or it takes over a second.
      alignment: bytes that each tensor begins at a multiple of, a power of two up to 2**20, to be written as
        `general.alignment`; 64 makes a file that can be mapped. None: that of the first part.

    Raises:
      GGUFError: if a part is missing, cannot be read or is not sound, or for another `alignment`.
      ValueError: if `out` is one of the parts.
      OSError: if the file cannot be written.
    """
    file = open_gguf(first)
    for part in {file.path, *(info.path for info in file.tensors.values())}:
        if os.path.exists(out) and os.path.samefile(part, out):
            raise ValueError(f"{os.fspath(out)} must not be one of the parts that are merged, but it is.")
    copy = _Copy(file, progress or ProgressLine(file.path))
    keys = _whole_keys(file)
    if alignment is not None:
        keys["general.alignment"] = Field.of(alignment, "u32")
    write_gguf(out, keys, [copy.tensor(info) for info in file.tensors.values()])


class _Copy:
    """Tensors of a file as they are to be written: read when their turn comes, in pieces.

    Args:
      file: where they come from.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor.
    """

    def __init__(self, file: GGUFFile, progress: Progress):
        self._file, self._progress = file, progress
        self._num_bytes = sum(info.num_bytes for info in file.tensors.values())
        self._done = self._bytes_done = 0

    def tensor(self, info: TensorInfo) -> TensorData:
        return TensorData(info.name, info.shape, info.ggml_type, functools.partial(self._read, info))

    def _read(self, info: TensorInfo) -> Iterator[np.ndarray]:
        yield from self._file.read_pieces(info.name, _COPIED_BYTES)
        self._done, self._bytes_done = self._done + 1, self._bytes_done + info.num_bytes
        self._progress(self._done, len(self._file.tensors), self._bytes_done, self._num_bytes)


def groups_within(
    tensors: Iterable[Any], *, max_bytes: int | None = None, max_tensors: int | None = None
) -> list[list[Any]]:
    """Cuts tensors, which tell their `num_bytes`, into runs in their order; there is at least one run.

    Args:
      tensors: the tensors.
      max_bytes: of a run; a larger tensor has a run of its own. None: no limit.
      max_tensors: of a run. None: no limit.
    """
    groups, size = [[]], 0
    for tensor in tensors:
        is_full = max_tensors is not None and len(groups[-1]) == max_tensors
        is_too_large = max_bytes is not None and size + tensor.num_bytes > max_bytes
        if groups[-1] and (is_full or is_too_large):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    return groups


def _part_keys(file: GGUFFile, number: int, count: int) -> dict[str, Field]:
    keys = _whole_keys(file)
    if number > 0:  # the alignment is each part's own
        keys = {key: field for key, field in keys.items() if key == "general.alignment"}
    return keys | {
        "split.no": Field.of(number, "u16"),
        "split.count": Field.of(count, "u16"),
        "split.tensors.count": Field.of(len(file.tensors), "i32"),
    }


def _whole_keys(file: GGUFFile) -> dict[str, Field]:
    return {key: field for key, field in file.metadata.fields.items() if not key.startswith("split.")}


def _within(folder: str, path: str) -> str:
    return os.path.join(folder, os.path.basename(path))


def _move(folder: str, paths: list[str]) -> None:
    """Moves the parts to their places, the first, by which the others are found, last."""
    with contextlib.ExitStack() as undo:
        for path in reversed(paths):
            os.rename(_within(folder, path), path)
            undo.callback(os.unlink, path)
        undo.pop_all()
    sync_folder(os.path.dirname(paths[0]) or ".")
