"""Writes a GGUF file anew with its weights in other types: planned from the header, then streamed by rows.

Norms, routers, biases and whatever else is no weight matrix stay as they are, and tensors that have their
type already are copied byte by byte. Memory is some chunks of rows, whatever the sizes of the tensors.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from checkpoints_tools import hparams
from checkpoints_tools import imatrix as imatrix_lib
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_file import GGUFError, GGUFFile, TensorInfo, open_gguf
from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.inspect import columns, plain
from checkpoints_tools.layout import FORMAT_NAMES
from checkpoints_tools.model_file import check_model
from checkpoints_tools.progress import Progress, ProgressLine
from checkpoints_tools.recipe import QUANTIZATION_VERSION, Recipe, fitting, is_weight_matrix, misfits
from checkpoints_tools.row_chunks import decoded, row_chunks
from checkpoints_tools.save import file_rows
from mla_jax import quant

_COPIED_BYTES = 16 << 20  # at a time


@dataclasses.dataclass(frozen=True)
class Row:
    """What becomes of one tensor.

    Attributes:
      name: GGUF name.
      shape: as in the file.
      old: type that it has.
      new: type that it gets.
      wanted: type that was asked for, which `new` is not if rows do not fit it; None for what stays as it is.
    """

    name: str
    shape: tuple[int, ...]
    old: str
    new: str
    wanted: str | None

    @property
    def is_misfit(self) -> bool:
        """Whether rows do not fit the type that was asked for."""
        return self.wanted not in (None, self.new)

    @property
    def is_copied(self) -> bool:
        """Whether the bytes stay the same."""
        return self.new == self.old

    def num_bytes(self, type_name: str) -> int:
        """Returns the size of the tensor in a type."""
        return TYPES[IDS[type_name]].num_bytes(self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of a file.

    Attributes:
      file: the container, opened.
      recipe: what was asked for.
      rows: one for each tensor, in file order.
      importance: tensor name -> importance of its columns, or None.
    """

    file: GGUFFile
    recipe: Recipe
    rows: tuple[Row, ...]
    importance: Mapping[str, np.ndarray] | None

    def table(self) -> str:
        """Returns every tensor with its types and sizes, as text of many lines."""
        head = ("tensor", "shape", "from", "to", "bytes", "become", "")
        return columns([head, *map(_cells, self.rows)])

    def summary(self) -> str:
        """Returns the totals, and what is not as it was asked for, as text of a few lines."""
        num_weights = sum(math.prod(row.shape) for row in self.rows)
        old = sum(row.num_bytes(row.old) for row in self.rows)
        new = sum(row.num_bytes(row.new) for row in self.rows)
        count, copied = len(self.rows), sum(row.is_copied for row in self.rows)
        lines = [
            f"{count} tensors, {count - copied} encoded and {copied} copied: {old:,} bytes become {new:,}, "
            f"{8 * old / num_weights:.2f} bits per weight become {8 * new / num_weights:.2f}"
        ]
        lines += misfits((row.wanted, row.new) for row in self.rows if row.wanted is not None)
        names = [row.name for row in self.rows if row.wanted is not None]
        lines += [
            f"no weight has the pattern {pattern!r} in its name" for pattern in self.recipe.unused(names)
        ]
        if self.importance is not None:
            names = [row.name for row in self.rows if not row.is_copied]
            num_found = sum(name in self.importance for name in names)
            lines.append(f"{num_found} of the {len(names)} encoded tensors have an importance")
        return "\n".join(lines)


def plan(
    src: str | os.PathLike,
    *,
    type: str,
    custom: Sequence[str] = (),
    imatrix: str | os.PathLike | None = None,
    allow_requantize: bool = False,
) -> Plan:
    """Decides what type each tensor of a file gets; no weight is read.

    Args:
      src: the file, or the first part of a split one.
      type: type of weight matrices as llama-quantize spells it, in any case, or a mixture: Q4_K_S is Q4_K
        with the output in Q6_K; in Q4_K_M the up-projection of values and `ffn_down` of every other layer are
        in Q6_K as well; Q5_K_S and Q5_K_M likewise.
      custom: rules "REGEX=TYPE", or several with commas between. The first whose expression is found in the
        name of a tensor decides on it.
      imatrix: file with the importance of columns, which types of few bits need.
      allow_requantize: encode weights anew that are in blocks of another type, at the loss of both types.

    Returns:
      The plan. A tensor whose rows are no whole number of blocks gets a type that fits them.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF.
      ValueError: if a type or a rule cannot be read, or if weights would be requantised without leave.
    """
    recipe = Recipe.of(type, custom)
    file = open_gguf(src)
    check_model(file)
    rows = tuple(_row(info, recipe, allow_requantize) for info in file.tensors.values())
    importance = None if imatrix is None else _read_importance(imatrix, rows)
    return Plan(file, recipe, rows, importance)


def quantize(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    type: str,
    custom: Sequence[str] = (),
    imatrix: str | os.PathLike | None = None,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Writes a file with its weights in other types.

    Args:
      src: as for `plan`, and so are `type`, `custom`, `imatrix` and `allow_requantize`.
      dst: file to write, which may be `src`. One that is there is replaced when the new one is complete, and
        kept as it was if anything fails.
      progress: called with (tensors done, tensors, bytes read, bytes) after each chunk. None prints one line
        to stderr, if that is a terminal or it takes over a second.

    Returns:
      The plan that was carried out.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF, or has a value that is not finite.
      ValueError: as `plan`.
      OSError: if the file cannot be written.
    """
    chosen = plan(src, type=type, custom=custom, imatrix=imatrix, allow_requantize=allow_requantize)
    stream = _Stream(chosen, progress or ProgressLine(dst))
    write_gguf(dst, _metadata(chosen, imatrix), [stream.tensor(row) for row in chosen.rows])
    return chosen


def _row(info: TensorInfo, recipe: Recipe, allow_requantize: bool) -> Row:
    wanted = recipe.wanted(info.name) if is_weight_matrix(info) else None
    new = fitting(wanted, info.shape[-1]) if wanted else info.type_name
    single = FORMAT_NAMES.get(info.ggml_type)  # what interleaved rows are one by one
    is_exact = single not in quant.FORMATS or new in (info.type_name, single, "f32")
    if not (is_exact or allow_requantize):
        raise ValueError(
            f"{info.path}: tensor {info.name!r} is quantised already, as {info.type_name}: making it {new} "
            "loses precision twice, and must be allowed (--allow-requantize)."
        )
    return Row(info.name, info.shape, info.type_name, new, wanted)


def _read_importance(imatrix: str | os.PathLike, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Reads the importance of columns, that of tensors to be encoded in a shape that broadcasts to theirs."""
    importance = imatrix_lib.read_imatrix(imatrix)
    for row in rows:
        if row.is_copied or row.name not in importance:
            continue
        importance[row.name] = fitted = imatrix_lib.fit(importance[row.name], row.shape)
        try:
            is_fitting = np.broadcast_shapes(fitted.shape, row.shape) == row.shape
        except ValueError:
            is_fitting = False
        if not is_fitting:
            raise ValueError(
                f"{os.fspath(imatrix)}: importance of {row.name!r} must fit its shape {row.shape}, "
                f"got {fitted.shape}."
            )
    return importance


def _cells(row: Row) -> tuple[str, ...]:
    shape, old, new = " x ".join(map(str, row.shape)), row.num_bytes(row.old), row.num_bytes(row.new)
    note = f"rows do not fit {row.wanted}" if row.is_misfit else ""
    return plain(row.name), shape, row.old, row.new, f"{old:,}", f"{new:,}", note


def _metadata(chosen: Plan, imatrix: str | os.PathLike | None) -> dict[str, Field]:
    """Returns the keys of the file with those that tell how it was quantised brought up to date."""
    fields = dict(chosen.file.metadata.fields)
    if all(row.is_copied for row in chosen.rows):
        return fields
    fields = {key: field for key, field in fields.items() if not key.startswith("quantize.imatrix.")}
    if chosen.recipe.file_type is None:
        fields.pop("general.file_type", None)
    else:
        fields["general.file_type"] = Field.of(chosen.recipe.file_type, "u32")
    if any(row.new in quant.FORMATS for row in chosen.rows):
        fields["general.quantization_version"] = Field.of(QUANTIZATION_VERSION, "u32")
    if chosen.importance is not None:
        fields["quantize.imatrix.file"] = Field.of(os.path.basename(os.fspath(imatrix)))
        fields["quantize.imatrix.entries_count"] = Field.of(len(chosen.importance), "i32")
    return hparams.of_new_file(fields)


class _Stream:
    """Yields the bytes of tensors as they are to be written, chunk by chunk, and reports how far it is."""

    def __init__(self, chosen: Plan, progress: Progress):
        self._file, self._importance, self._progress = chosen.file, chosen.importance or {}, progress
        self._num_bytes = sum(info.num_bytes for info in chosen.file.tensors.values())
        self._done = self._bytes_done = 0

    def tensor(self, row: Row) -> TensorData:
        """Returns a tensor whose data is made when its turn comes."""
        read = self._copied if row.is_copied else self._encoded
        return TensorData(row.name, row.shape, IDS[row.new], functools.partial(self._parts, read, row))

    def _parts(self, read: Callable, row: Row) -> Iterator[np.ndarray]:
        num_bytes, before = self._file.tensors[row.name].num_bytes, self._bytes_done
        for part, share in read(row):
            yield part
            self._report(before + int(share * num_bytes))
        self._done += 1
        self._report(before + num_bytes)

    def _report(self, bytes_done: int) -> None:
        self._bytes_done = bytes_done
        self._progress(self._done, len(self._file.tensors), bytes_done, self._num_bytes)

    def _copied(self, row: Row) -> Iterator[tuple[np.ndarray, float]]:
        num_bytes, done = self._file.tensors[row.name].num_bytes, 0
        for piece in self._file.read_pieces(row.name, _COPIED_BYTES):
            done += piece.size
            yield piece, done / num_bytes

    def _encoded(self, row: Row) -> Iterator[tuple[np.ndarray, float]]:
        num_rows, done = math.prod(row.shape[:-1]), 0
        for first, weight in row_chunks(self._file, row.name):
            rows = np.arange(done, first + weight.shape[0])
            if isinstance(weight, quant.QuantizedTensor) and weight.format == row.new:
                encoded = weight[done - first :]  # it was interleaved, and nothing else
            else:
                encoded = self._encode(row, np.asarray(decoded(weight))[done - first :], rows)
            done += len(rows)
            yield file_rows(encoded), done / num_rows

    def _encode(self, row: Row, values: np.ndarray, rows: np.ndarray) -> np.ndarray | quant.QuantizedTensor:
        try:
            return quant.encode(values, row.new, self._importance_of(row, rows))
        except ValueError as error:
            where = f"{self._file.path}: tensor {row.name!r}, rows {rows[0]} to {rows[-1]}"
            raise GGUFError(f"{where}: {error}") from None

    def _importance_of(self, row: Row, rows: np.ndarray) -> np.ndarray | None:
        """Returns the importance of some rows of the tensor seen as a matrix."""
        if row.name not in self._importance:
            return None
        return np.broadcast_to(self._importance[row.name], row.shape)[np.unravel_index(rows, row.shape[:-1])]
