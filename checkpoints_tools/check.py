"""Reads a whole GGUF file and says what is wrong with it: its structure, and every number in it."""

import collections
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import hparams
from checkpoints_tools.ggml_types import TYPES
from checkpoints_tools.gguf_file import GGUFError, GGUFFile, TensorInfo, open_gguf
from checkpoints_tools.interleave import BASES
from checkpoints_tools.layout import FORMAT_NAMES
from checkpoints_tools.model_file import check_model
from checkpoints_tools.progress import Progress, ProgressLine
from checkpoints_tools.row_chunks import row_chunks
from mla_jax import quant

_MAX_TOLD = 10  # tensors that are named
_INTEGERS = ("i8", "i16", "i32", "i64")  # whatever they hold is sound


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a check found.

    Attributes:
      problems: a sentence for each thing that is wrong; none for a sound file.
      checked: a sentence that says what was looked at.
    """

    problems: tuple[str, ...]
    checked: str


def check(path: str | os.PathLike, progress: Progress | None = None) -> Findings:
    """Checks the container, the model in it, and that every weight decodes to a finite number.

    Args:
      path: the file, or the first part of a split one. Config and shapes are checked for deepseek2 only,
        the rest of any file.
      progress: called with (tensors done, tensors, bytes done, bytes) after each tensor. None prints one line
        to stderr, if that is a terminal or it takes over a second.

    Returns:
      The findings.

    Raises:
      GGUFError: if the container itself is not sound, so that nothing in it can be found.
    """
    file = open_gguf(path)
    problems, model = _check_structure(file)
    bad, unknown = [], collections.Counter()
    report = progress or ProgressLine(path)
    num_bytes, bytes_done = sum(info.num_bytes for info in file.tensors.values()), 0
    for done, info in enumerate(file.tensors.values(), start=1):
        if info.ggml_type in FORMAT_NAMES:
            position = _first_bad(file, info)
            bad += [] if position is None else [_sentence(info, position)]
        elif info.type_name not in _INTEGERS:
            unknown[info.type_name] += 1
        bytes_done += info.num_bytes
        report(done, len(file.tensors), bytes_done, num_bytes)
    if len(bad) > _MAX_TOLD:
        bad[_MAX_TOLD:] = [
            f"{file.path}: {len(bad) - _MAX_TOLD} more tensors hold values that are not finite."
        ]
    return Findings((*problems, *bad), _summary(file, model, num_bytes, unknown))


def _check_structure(file: GGUFFile) -> tuple[list[str], str]:
    """Returns what is wrong with the model, and a clause that says whether it was checked."""
    architecture = file.metadata.get("general.architecture")
    if architecture != hparams.ARCHITECTURE:
        return (
            [],
            f"container (its architecture is {architecture!r:.80}, so no more is known of its structure)",
        )
    try:
        check_model(file)
    except GGUFError as error:
        return [str(error)], "container"
    return [], "container, config, tensor names, shapes and types"


def _first_bad(file: GGUFFile, info: TensorInfo) -> tuple[int, int] | None:
    """Returns row and block of the first value that is not finite; in plain types each value is a block."""
    for first, weight in row_chunks(file, info.name):
        is_bad = np.asarray(_bad_blocks(weight))
        if is_bad.any():
            row, block = np.unravel_index(is_bad.argmax(), is_bad.shape)
            return first + int(row), int(block)
    return None


@jax.jit
def _bad_blocks(weight: quant.QuantizedTensor | jax.Array) -> jax.Array:
    """Returns bool[rows, blocks]: whether something in a block is not finite."""
    values = quant.decode(weight)
    size = quant.FORMATS[weight.format].block_size if isinstance(weight, quant.QuantizedTensor) else 1
    return ~jnp.isfinite(values.reshape(len(values), -1, size)).all(axis=-1)


def _sentence(info: TensorInfo, position: tuple[int, int]) -> str:
    row, block = position
    entry, size = TYPES[info.ggml_type], info.shape[-1] if info.shape else 1
    base = BASES.get(info.type_name)
    if base is None:
        number, kind = row * (size // entry.block_size) + block, "value" if entry.block_size == 1 else "block"
        offset = row * entry.row_bytes(size) + entry.row_header + block * entry.block_bytes
        what = f"{kind} {number}, in row {row} and at byte {info.offset + offset},"
    else:
        offset = row // base.rows * base.rows * entry.row_bytes(size)
        what = f"row {row}, in the {base.rows} rows from byte {info.offset + offset} on,"
    return f"{info.path}: tensor {info.name!r} of type {entry.name} must be finite, but {what} is not."


def _summary(file: GGUFFile, model: str, num_bytes: int, unknown: collections.Counter) -> str:
    skipped = ", ".join(f"{count} of type {name}" for name, count in unknown.items())
    return f"{file.path}: {model}; {len(file.tensors)} tensors of {num_bytes:,} bytes, all values finite" + (
        f", except that those in {skipped} cannot be decoded and were not looked at." if skipped else "."
    )
