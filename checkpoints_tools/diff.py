"""Compares two GGUF files, of any architecture: keys, and tensor by tensor how far the weights are apart.

Tensors of equal bytes are not decoded. Others are, some rows at a time, so that memory does not depend on the
size of the files.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator

import numpy as np

from checkpoints_tools.gguf_file import GGUFFile, TensorInfo, open_gguf
from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.inspect import columns, plain, short, show_field
from checkpoints_tools.layout import FORMAT_NAMES
from checkpoints_tools.progress import Progress, ProgressLine
from checkpoints_tools.row_chunks import decoded, row_chunks

_COMPARED_BYTES = 32 << 20  # of each file at a time


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far weights are from those of the first file; NaN where a weight is not finite.

    Attributes:
      largest: the largest absolute difference.
      rmse: root of the mean squared difference.
      relative_rmse: `rmse` over the root mean square of the first file's weights.
      cosine: of the angle between the two tensors as vectors.
    """

    largest: float
    rmse: float
    relative_rmse: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class TensorDiff:
    """A tensor that is in one or both of the files.

    Attributes:
      name: its name.
      a: row of the tensor table of the first file, None if it does not have the tensor.
      b: the same of the second file.
      is_identical: shape, type and all bytes are the same.
      errors: None if the tensor is in one file only, or if `reason` says why the weights cannot be compared.
      reason: "shapes differ", or "bytes differ" for a type that cannot be decoded; empty otherwise.
    """

    name: str
    a: TensorInfo | None
    b: TensorInfo | None
    is_identical: bool = False
    errors: Errors | None = None
    reason: str = ""

    @property
    def num_weights(self) -> int:
        """Number of weights, of the first file that has the tensor."""
        return math.prod((self.a or self.b).shape)


@dataclasses.dataclass(frozen=True)
class KeyDiff:
    """A key whose type or value differs: both values as short text, None in a file that does not have it."""

    name: str
    a: str | None
    b: str | None


@dataclasses.dataclass(frozen=True)
class FileDiff:
    """What differs between two files, in the order of the first.

    Attributes:
      tensors: every tensor of either file.
      keys: those that differ.
    """

    tensors: tuple[TensorDiff, ...]
    keys: tuple[KeyDiff, ...]

    @property
    def is_identical(self) -> bool:
        """Whether all keys and tensors are the same, whatever their order and the gaps between them."""
        return not self.keys and all(tensor.is_identical for tensor in self.tensors)


def diff(a: str | os.PathLike, b: str | os.PathLike, progress: Progress | None = None) -> FileDiff:
    """Compares two files.

    Args:
      a: the file that errors are relative to, or the first part of a split one.
      b: the other file.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor; bytes are of both
        files. None prints one line to stderr, if that is a terminal or it takes over a second.

    Returns:
      What differs.

    Raises:
      GGUFError: if a file cannot be read or is not sound.
    """
    first, second = open_gguf(a), open_gguf(b)
    report, tensors, bytes_done = progress or ProgressLine(b), [], 0
    names = dict.fromkeys([*first.tensors, *second.tensors])
    num_bytes = sum(info.num_bytes for file in (first, second) for info in file.tensors.values())
    for done, name in enumerate(names, start=1):
        tensors.append(_tensor_diff(first, second, name))
        bytes_done += sum(file.tensors[name].num_bytes for file in (first, second) if name in file.tensors)
        report(done, len(names), bytes_done, num_bytes)
    return FileDiff(tuple(tensors), tuple(_key_diffs(first, second)))


def table(found: FileDiff) -> str:
    """Returns what differs as text of some lines, the last one a summary, without a newline at the end."""
    parts = []
    if found.keys:
        rows = [(short(key.name), key.a or "-", key.b or "-") for key in found.keys]
        parts.append(columns([("key", "first", "second"), *rows]))
    rows = [_row(tensor) for tensor in found.tensors if not tensor.is_identical]
    if rows:
        head = ("tensor", "first", "second", "weights", "largest error", "RMSE", "relative RMSE", "cosine")
        parts.append(columns([head, *rows]))
    return "\n\n".join([*parts, _summary(found)])


def _key_diffs(a: GGUFFile, b: GGUFFile) -> Iterator[KeyDiff]:
    def text(field: Field | None) -> str | None:
        return None if field is None else f"{field.type_name} {show_field(field)}"

    for key in dict.fromkeys([*a.metadata, *b.metadata]):
        fields = a.metadata.fields.get(key), b.metadata.fields.get(key)
        if fields[0] != fields[1]:
            yield KeyDiff(key, *map(text, fields))


def _tensor_diff(a: GGUFFile, b: GGUFFile, name: str) -> TensorDiff:
    infos = a.tensors.get(name), b.tensors.get(name)
    if None in infos:
        return TensorDiff(name, *infos)
    if _kind(infos[0]) == _kind(infos[1]) and _are_same_bytes(a, b, name):
        return TensorDiff(name, *infos, is_identical=True, errors=Errors(0.0, 0.0, 0.0, 1.0))
    if infos[0].shape != infos[1].shape:
        return TensorDiff(name, *infos, reason="shapes differ")
    if any(info.ggml_type not in FORMAT_NAMES for info in infos):
        return TensorDiff(name, *infos, reason="bytes differ")
    return TensorDiff(name, *infos, errors=_errors(a, b, name))


def _kind(info: TensorInfo) -> tuple:
    return info.shape, info.ggml_type


def _are_same_bytes(a: GGUFFile, b: GGUFFile, name: str) -> bool:
    pieces = (file.read_pieces(name, _COMPARED_BYTES) for file in (a, b))
    return all(itertools.starmap(np.array_equal, zip(*pieces, strict=True)))


def _errors(a: GGUFFile, b: GGUFFile, name: str) -> Errors:
    """Decodes and compares two tensors of one shape; sums are in float64."""
    done, count, largest, sums = 0, 0, 0.0, np.zeros(4)
    with np.errstate(all="ignore"):  # of weights that are not finite
        for (start, rows_a), (_, rows_b) in zip(row_chunks(a, name), row_chunks(b, name), strict=True):
            x, y = (np.asarray(decoded(rows))[done - start :].astype(np.float64) for rows in (rows_a, rows_b))
            done = start + rows_a.shape[0]
            count += x.size
            error = y - x
            sums += [np.vdot(error, error), np.vdot(x, x), np.vdot(y, y), np.vdot(x, y)]
            largest = np.maximum(largest, np.abs(error, out=error).max())
        squared_error, squared_a, squared_b, product = sums
        if squared_error == 0:
            return Errors(0.0, 0.0, 0.0, 1.0)
        relative, cosine = np.sqrt(squared_error / squared_a), product / np.sqrt(squared_a * squared_b)
        return Errors(float(largest), math.sqrt(squared_error / count), float(relative), float(cosine))


def _row(tensor: TensorDiff) -> tuple[str, ...]:
    def text(info: TensorInfo | None) -> str:
        return "-" if info is None else f"{' x '.join(map(str, info.shape))} {info.type_name}"

    errors = tensor.errors
    numbers = (tensor.reason or "-", "-", "-", "-")
    if errors is not None:
        numbers = (
            *(f"{x:.3g}" for x in (errors.largest, errors.rmse, errors.relative_rmse)),
            f"{errors.cosine:.6f}",
        )
    return plain(tensor.name), text(tensor.a), text(tensor.b), f"{tensor.num_weights:,}", *numbers


def _summary(found: FileDiff) -> str:
    num_identical = sum(tensor.is_identical for tensor in found.tensors)
    only_a = sum(tensor.b is None for tensor in found.tensors)
    only_b = sum(tensor.a is None for tensor in found.tensors)
    compared = [t for t in found.tensors if t.errors is not None and not t.is_identical]
    parts = [
        f"{len(found.keys)} keys differ",
        f"{num_identical} of {len(found.tensors)} tensors are identical",
        f"{only_a} only in the first file, {only_b} only in the second",
    ]
    if compared:
        worst = max(compared, key=lambda t: (math.isnan(t.errors.relative_rmse), t.errors.relative_rmse))
        parts.append(f"largest relative RMSE {worst.errors.relative_rmse:.3g} in {plain(worst.name)}")
    return "; ".join(parts) + "."
