"""Takes apart rows that ik_llama.cpp interleaves (types *_r4, *_r8, *_r16), and interleaves them again.

Both ways are moves of bits, compiled from the one table in `interleaved_layouts`. Nothing is lost: bytes that
were taken apart come back as they were.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.interleaved_layouts import LAYOUTS, Layout

_CHUNK_BYTES = 1 << 18  # moved at a time, so that what is made on the way stays in the processor's cache
_GAP = 16  # columns without use that are cheaper than a term more
_SUM_BYTES = {"q8_KV_r8": 4}  # only the header of the base ends in the sum of the codes


class Base(NamedTuple):
    """What the rows of an interleaved type become one by one.

    Attributes:
      name: key of `quant.FORMATS`, or "bf16".
      rows: rows in a group; a matrix has a whole number of groups.
      block_size: weights in a block; a row has a whole number of blocks.
      block_bytes: bytes of a block of one row.
      header_bytes: bytes in front of the blocks of a row.
    """

    name: str
    rows: int
    block_size: int
    block_bytes: int
    header_bytes: int

    def row_bytes(self, row_size: int) -> int:
        """Returns the bytes of a row of `row_size` weights, which must be a multiple of `block_size`."""
        return self.header_bytes + row_size // self.block_size * self.block_bytes


def _base(name: str, layout: Layout) -> Base:
    block_bytes = sum(field.size for field in layout.base_fields.values()) // 8
    entry = TYPES[IDS[name]]
    block_size = entry.block_size * block_bytes // entry.block_bytes
    header_bytes = entry.row_header + _SUM_BYTES.get(name, 0)
    return Base(layout.base, layout.rows, block_size, block_bytes, header_bytes)


BASES: dict[str, Base] = {name: _base(name, layout) for name, layout in LAYOUTS.items()}


def deinterleave(name: str, data: np.ndarray, row_size: int) -> np.ndarray:
    """Takes rows apart.

    Args:
      name: key of `BASES`.
      data: uint8[num_bytes], whole groups of rows.
      row_size: weights in a row.

    Returns:
      uint8[rows, bytes of a row], each row a header, if the base has one, and blocks of the base.

    Raises:
      ValueError: if the bytes are no whole groups of rows, or a row no whole blocks.
    """
    base = BASES[name]
    shape = _shape(name, data.size, row_size, TYPES[IDS[name]].row_bytes(row_size))
    row_bytes = base.row_bytes(row_size)
    rows = np.empty((shape[0] * base.rows, row_bytes), np.uint8)
    stored, taken_apart = _stored_parts(name, data, shape), _row_parts(name, rows, shape)
    taken_apart.headers[...] = stored.headers
    move = _move(name, is_interleaving=False)
    for part in _chunks(stored.blocks):
        taken_apart.blocks[part] = move(stored.blocks[part])
    if name in _SUM_BYTES:
        sums = rows[:, base.header_bytes :].view(np.int8).sum(axis=1, dtype="<i4", keepdims=True)
        rows[:, base.header_bytes - _SUM_BYTES[name] : base.header_bytes] = sums.view(np.uint8)
    return rows


def interleave(name: str, rows: np.ndarray, row_size: int) -> np.ndarray:
    """Interleaves rows; the inverse of `deinterleave`.

    Args:
      name: key of `BASES`.
      rows: uint8[rows, bytes of a row] in the base format, whole groups.
      row_size: weights in a row.

    Returns:
      uint8[num_bytes].

    Raises:
      ValueError: if the rows are no whole groups, or a row no whole blocks.
    """
    base = BASES[name]
    shape = _shape(name, rows.size, row_size, base.row_bytes(row_size))
    data = np.empty(shape[0] * base.rows * TYPES[IDS[name]].row_bytes(row_size), np.uint8)
    stored, single = _stored_parts(name, data, shape), _row_parts(name, rows, shape)
    stored.headers[...] = single.headers
    move = _move(name, is_interleaving=True)
    for part in _chunks(stored.blocks):
        stored.blocks[part] = move(single.blocks[part])
    return data


def _shape(name: str, num_bytes: int, row_size: int, row_bytes: int) -> tuple[int, int]:
    """Returns the number of groups, and of blocks of a row."""
    base = BASES[name]
    if row_size < 1 or row_size % base.block_size:
        raise ValueError(
            f"rows of {name} must have a positive multiple of {base.block_size} weights, got {row_size}."
        )
    num_groups, rest = divmod(num_bytes, base.rows * row_bytes)
    if rest:
        raise ValueError(
            f"{name} must have groups of {base.rows} rows of {row_bytes} bytes, got {num_bytes} bytes."
        )
    return num_groups, row_size // base.block_size


class _Parts(NamedTuple):
    """Views of one matrix.

    Attributes:
      headers: uint8[groups, rows of a group, bytes].
      blocks: uint8[groups, blocks of a row, rows of a group, bytes of a block], or of an interleaved matrix
        uint8[groups, blocks of a row, 1, bytes of an interleaved block].
    """

    headers: np.ndarray
    blocks: np.ndarray


def _stored_parts(name: str, data: np.ndarray, shape: tuple[int, int]) -> _Parts:
    base, num_groups = BASES[name], shape[0]
    header_bytes = base.header_bytes - _SUM_BYTES.get(name, 0)
    block_bytes = base.rows * base.block_bytes
    groups = data.reshape(num_groups, base.rows * header_bytes + shape[1] * block_bytes)
    headers = groups[:, : base.rows * header_bytes].reshape(num_groups, base.rows, header_bytes)
    blocks = groups[:, base.rows * header_bytes :].reshape(*shape, 1, block_bytes)
    return _Parts(headers, blocks)


def _row_parts(name: str, rows: np.ndarray, shape: tuple[int, int]) -> _Parts:
    base, (num_groups, num_blocks) = BASES[name], shape
    groups = rows.reshape(num_groups, base.rows, base.header_bytes + num_blocks * base.block_bytes)
    headers = groups[..., : base.header_bytes - _SUM_BYTES.get(name, 0)]
    blocks = groups[..., base.header_bytes :].reshape(num_groups, base.rows, num_blocks, base.block_bytes)
    return _Parts(headers, blocks.swapaxes(1, 2))


def _chunks(blocks: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Cuts the two leading axes into pieces of about `_CHUNK_BYTES`."""
    num_groups, num_blocks, *shape = blocks.shape
    block_bytes = math.prod(shape)
    block_step = min(num_blocks, max(1, _CHUNK_BYTES // block_bytes))
    group_step = max(1, _CHUNK_BYTES // (block_bytes * block_step))
    for group in range(0, num_groups, group_step):
        for block in range(0, num_blocks, block_step):
            yield slice(group, group + group_step), slice(block, block + block_step)


class _Term(NamedTuple):
    """One byte of the source for each byte of some columns of the destination, some of whose bits it gives.

    Attributes:
      columns: of the destination.
      source: int[rows, columns], which byte.
      factor: uint16[rows, columns], 256 shifted as the byte is to be shifted.
      mask: uint16[rows, columns], the bits that it gives, in the upper byte.
    """

    columns: slice
    source: np.ndarray
    factor: np.ndarray
    mask: np.ndarray


class _Move(NamedTuple):
    """Makes blocks of others: each bit is the exclusive or of some bits, or the inverse of that.

    Attributes:
      terms: which bits.
      flips: uint8[rows, columns], the bits to be inverted.
    """

    terms: tuple[_Term, ...]
    flips: np.ndarray

    def __call__(self, source: np.ndarray) -> np.ndarray:
        """Returns uint8[groups, blocks, *bytes] of blocks with another order of bytes."""
        lead = source.shape[:2]
        wide = source.reshape(lead[0] * lead[1], -1).astype(np.uint16)
        moved = np.zeros((len(wide), *self.flips.shape), np.uint16)
        for term in self.terms:
            part = wide.take(term.source, axis=1)
            part *= term.factor
            part &= term.mask
            moved[..., term.columns] ^= part
        moved >>= np.uint16(8)
        return (moved.astype(np.uint8) ^ self.flips).reshape(*lead, *self.flips.shape)


@functools.cache
def _move(name: str, is_interleaving: bool) -> _Move:
    """Compiles the move of the blocks of a group of rows, in one of the two directions."""
    layout, base = LAYOUTS[name], BASES[name]
    flips = np.zeros(base.rows * base.block_bytes, np.uint8)
    row_starts = 8 * base.block_bytes * np.arange(base.rows)[:, None, None]
    pairs = []
    for field, stored in layout.fields.items():
        single, width = layout.base_fields[field] + row_starts, stored.shape[-1]
        target, source = (stored, single) if is_interleaving else (single, stored)
        # a running sum is undone by the difference of neighbours
        reach = 1 if field != layout.summed else width if is_interleaving else 2
        pairs += [(target[..., i:].ravel(), source[..., : width - i].ravel()) for i in range(reach)]
        if field == layout.flipped:
            byte, bit = np.divmod(target[..., -1], 8)
            np.bitwise_xor.at(flips, byte, np.left_shift(1, bit).astype(np.uint8))
    targets, sources = np.concatenate(pairs, axis=1)
    flips = flips.reshape(1 if is_interleaving else base.rows, -1)
    return _Move(tuple(_terms(targets, sources, flips.shape)), flips)


def _terms(targets: np.ndarray, sources: np.ndarray, shape: tuple[int, int]) -> Iterator[_Term]:
    """Yields the terms of a move, given as positions of bits: what one byte gives another is in one term."""
    num_bytes = shape[0] * shape[1]
    keys = (targets // 8 * num_bytes + sources // 8) * 16 + 8 + targets % 8 - sources % 8
    keys, index = np.unique(keys, return_inverse=True)
    masks = np.zeros(len(keys), np.uint16)
    np.bitwise_or.at(masks, index, np.left_shift(256, targets % 8).astype(np.uint16))
    pairs, shifts = np.divmod(keys, 16)
    target_bytes, source_bytes = np.divmod(pairs, num_bytes)
    number = np.arange(len(keys)) - np.searchsorted(target_bytes, target_bytes)
    for term in range(number.max() + 1):
        chosen = number == term
        source, factor, mask = (np.zeros(num_bytes, dtype) for dtype in (np.intp, np.uint16, np.uint16))
        at = target_bytes[chosen]
        source[at], factor[at], mask[at] = source_bytes[chosen], 1 << shifts[chosen], masks[chosen]
        source, factor, mask = (part.reshape(shape) for part in (source, factor, mask))
        used = np.flatnonzero(mask.any(axis=0))
        for run in np.split(used, np.flatnonzero(np.diff(used) > _GAP) + 1):
            columns = slice(run[0], run[-1] + 1)
            yield _Term(columns, source[:, columns], factor[:, columns], mask[:, columns])
