"""Writes a GGUF file anew with adapters merged into its weights, some rows at a time.

Weights with an adapter are decoded, added to and encoded again; every other tensor is copied byte by byte.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from checkpoints_tools import hparams, interleave, lora_files, lora_forms
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_file import GGUFError, GGUFFile, TensorInfo, open_gguf
from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.inspect import columns
from checkpoints_tools.layout import FORMAT_NAMES
from checkpoints_tools.model_file import check_model
from checkpoints_tools.progress import Progress, ProgressLine
from checkpoints_tools.recipe import QUANTIZATION_VERSION, Recipe, fitting, is_weight_matrix
from checkpoints_tools.row_chunks import decoded, row_chunks
from checkpoints_tools.save import file_rows
from mla_jax import quant
from mla_jax.lora import Adapter

_COPIED_BYTES = 16 << 20  # at a time

Source = tuple[str | os.PathLike, float]
"""A file or folder of an adapter, and what its updates are multiplied by."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be merged.

    Attributes:
      file: the model's container, opened.
      types: types of the new file by name of tensor, of those that get an update.
      updates: `b @ a` is what is added to the tensor, its axes as in the file or with those of `b` and `a` in
        front of the last two.
    """

    file: GGUFFile
    types: dict[str, str]
    updates: dict[str, Adapter]

    def table(self) -> str:
        """Returns the tensors that get an update, as text of many lines."""
        rows = [("tensor", "rank", "from", "to")]
        for name, new in self.types.items():
            rows.append((name, str(self.updates[name].rank), self.file.tensors[name].type_name, new))
        return columns(rows)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What encoding a weight again costs.

    Attributes:
      name: GGUF name.
      type_name: type that it has now.
      error: root mean square of the error over that of the weight.
      share: the same over that of the update.
    """

    name: str
    type_name: str
    error: float
    share: float


def plan(model: str | os.PathLike, adapters: Sequence[Source], *, type: str | None = None) -> Plan:
    """Decides what a merged file holds; adapters are read, weights are not.

    Args:
      model: the file, or the first part of a split one.
      adapters: their updates add up.
      type: of the weights that get an update, as for `quantize.quantize`; None for the one that each has.

    Returns:
      The plan. A weight that the file has in two forms gets its update in both.

    Raises:
      GGUFError: for a file that is no sound model, or no sound adapter of it.
      ValueError: without adapters, for a scale that is not finite or makes factors of what is not, a type
        that is not known, or a weight whose own type has no encoder.
    """
    if not adapters:
        raise ValueError("adapters must be at least one, got none.")
    recipe = None if type is None else Recipe.of(type)
    file = open_gguf(model)
    config, _ = check_model(file)
    scaled: dict[str, list[Adapter]] = {}
    for path, strength in adapters:
        lora = lora_files.load_lora(path, config, file.tensors.keys())
        lora_forms.check_strength(lora, strength)
        for name, part in lora.adapters.items():
            b = np.asarray(part.b) * np.float32(strength * lora.alpha / part.rank)
            scaled.setdefault(name, []).append(Adapter(a=np.asarray(part.a), b=b))
    updates = {name: _sum(scaled[name]) for name in file.tensors if name in scaled}
    types = {name: _new_type(file.tensors[name], recipe) for name in updates}
    return Plan(file, types, updates)


def merge(
    model: str | os.PathLike,
    out: str | os.PathLike,
    adapters: Sequence[Source],
    *,
    type: str | None = None,
    progress: Progress | None = None,
) -> list[Loss]:
    """Writes a model with adapters merged in.

    Args:
      model: as for `plan`, and so are `adapters` and `type`.
      out: file to write, which may be `model`. One that is there is replaced when the new one is complete,
        and kept as it was if anything fails.
      progress: called with (tensors done, tensors, bytes read, bytes) after each tensor. None prints one line
        to stderr, if that is a terminal or it takes over a second.

    Returns:
      What encoding cost each weight that got an update.

    Raises:
      GGUFError: as `plan`, and for a sum that is not finite in its type.
      ValueError: as `plan`.
      OSError: if the file cannot be written.
    """
    chosen = plan(model, adapters, type=type)
    stream = _Stream(chosen, progress or ProgressLine(out))
    fields = dict(chosen.file.metadata.fields)
    is_new = lambda name, kind: kind in quant.FORMATS and kind != chosen.file.tensors[name].type_name
    if any(is_new(name, kind) for name, kind in chosen.types.items()):
        fields.setdefault("general.quantization_version", Field.of(QUANTIZATION_VERSION, "u32"))
    tensors = [stream.tensor(info) for info in chosen.file.tensors.values()]
    write_gguf(out, hparams.of_new_file(fields), tensors)
    return stream.losses


def table(losses: Sequence[Loss]) -> str:
    """Returns losses as text of many lines."""
    rows = [("tensor", "type", "error / weight", "error / update")]
    rows += [(loss.name, loss.type_name, f"{loss.error:.2e}", f"{loss.share:.2e}") for loss in losses]
    return columns(rows)


def _sum(parts: list[Adapter]) -> Adapter:
    """Returns one adapter of the sum of updates, whose rank is the sum of the ranks."""
    a = np.concatenate([part.a for part in parts], axis=-2)
    return Adapter(a=a, b=np.concatenate([part.b for part in parts], axis=-1))


def _new_type(info: TensorInfo, recipe: Recipe | None) -> str:
    if recipe is not None and is_weight_matrix(info):
        return fitting(recipe.wanted(info.name), info.shape[-1])
    if FORMAT_NAMES[info.ggml_type] not in quant.ENCODABLE:
        raise ValueError(
            f"{info.path}: tensor {info.name!r} has type {info.type_name}, which there is no encoder of, so "
            "the type of changed weights must be given (--type)."
        )
    return info.type_name


class _Stream:
    """Yields the bytes of tensors as they are to be written, chunk by chunk, and reports how far it is.

    Attributes:
      losses: of the tensors that have been encoded.
    """

    def __init__(self, chosen: Plan, progress: Progress):
        self.losses: list[Loss] = []
        self._plan, self._progress = chosen, progress
        self._num_bytes = sum(info.num_bytes for info in chosen.file.tensors.values())
        self._done = self._bytes_done = 0

    def tensor(self, info: TensorInfo) -> TensorData:
        """Returns a tensor whose data is made when its turn comes."""
        new = self._plan.types.get(info.name, info.type_name)
        return TensorData(info.name, info.shape, IDS[new], functools.partial(self._parts, info, new))

    def _parts(self, info: TensorInfo, new: str) -> Iterator[np.ndarray]:
        if info.name in self._plan.types:
            yield from self._merged(info, new)
        else:
            yield from self._plan.file.read_pieces(info.name, _COPIED_BYTES)
        self._done, self._bytes_done = self._done + 1, self._bytes_done + info.num_bytes
        self._progress(self._done, len(self._plan.file.tensors), self._bytes_done, self._num_bytes)

    def _merged(self, info: TensorInfo, new: str) -> Iterator[np.ndarray]:
        update, done, squares = self._plan.updates[info.name], 0, np.zeros(3)
        base = interleave.BASES.get(new)
        for first, weight in row_chunks(self._plan.file, info.name):
            values = np.asarray(decoded(weight))[done - first :]
            added = _rows(update, done, done + len(values))
            values = values + added
            try:
                encoded = quant.encode(values, base.name if base else new)
            except ValueError as error:
                where = f"{info.path}: tensor {info.name!r}, rows {done} to {done + len(values) - 1}"
                raise GGUFError(f"{where}: {error}") from None
            error = np.asarray(decoded(encoded)) - values
            squares += [np.sum(np.square(part, dtype=np.float64)) for part in (error, values, added)]
            rows = np.ascontiguousarray(file_rows(encoded))
            yield (
                interleave.interleave(new, rows.reshape(-1).view(np.uint8), info.shape[-1]) if base else rows
            )
            done += len(values)
        error, weight, added = np.sqrt(squares)
        share = lambda whole: error / whole if whole else 0.0
        self.losses.append(Loss(info.name, new, float(share(weight)), float(share(added))))


def _rows(update: Adapter, start: int, stop: int) -> np.ndarray:
    """Returns rows of an update seen as a matrix, all experts or heads one below the other."""
    a, b = (part.reshape(-1, *part.shape[-2:]) for part in (update.a, update.b))
    height, parts = b.shape[1], []
    while start < stop:
        index, row = divmod(start, height)
        count = min(stop - start, height - row)
        parts.append(b[index, row : row + count] @ a[index])
        start += count
    return np.concatenate(parts)
