"""Weights in panels of 16 rows, for instruction sets that multiply all of them at once without moving them.

Of every block the words of four bytes lie beside those of the 15 rows that follow: no byte more or less, in
another order. A float16 scale at an end of a block lies beside those of the other rows too.
"""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np

from cpu_kernels import library

ROWS = 16  # of a panel
_SCALE = {"q4_0": 0, "q6_0": 0, "q8_0": 0, "iq4_nl": 0, "q6_K": 208}  # its place in a block
_TASK_BYTES = 1 << 22


def num_rows(shape: tuple[int, ...], format: str) -> int:
    """Returns the rows of a matrix by the shape of its blocks, its panels (rows / 16, ...) or its numbers."""
    size = ROWS * library.block_bytes().get(format, 0)
    return shape[0] * (ROWS if len(shape) == 3 and shape[2] == size else 1)


def pack(blocks: np.ndarray, *, format: str) -> np.ndarray:
    """Lays rows out in panels, in the memory that they have.

    Args:
      blocks: u8[rows, blocks of a row, bytes], rows a multiple of 16, in one piece. They are gone after it.
      format: one of `library.panel_formats`.

    Returns:
      u8[rows / 16, blocks of a row, 16 * bytes], the same memory.

    Raises:
      ValueError: if the blocks are not so, or cannot be written.
    """
    rows, per_row, size = blocks.shape
    if rows % ROWS or not (blocks.flags.c_contiguous and blocks.flags.writeable):
        raise ValueError(f"blocks must be 16 rows at a time, in one piece and writeable, got {blocks.shape}.")
    step = ROWS * max(1, _TASK_BYTES // max(1, ROWS * per_row * size))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pieces = [blocks[first : first + step] for first in range(0, rows, step)]
        to_panels = lambda piece: library.to_panels(piece, len(piece) // ROWS, _SCALE.get(format, -1))
        list(pool.map(to_panels, pieces))
    return blocks.reshape(rows // ROWS, per_row, ROWS * size)


def places(indices: np.ndarray, shape: tuple[int, ...], *, format: str) -> np.ndarray:
    """Returns where bytes i64[n], counted through blocks [..., blocks of a row, bytes], lie in panels."""
    *_, per_row, size = shape
    row, rest = np.divmod(indices, per_row * size)
    block, byte = np.divmod(rest, size)
    panel, row = np.divmod(row, ROWS)
    scale = _SCALE.get(format)
    first = 2 if scale == 0 else 0  # byte of the words
    word, rest = np.divmod(byte - first, 4)
    place = ROWS * (first + 4 * word) + 4 * row + rest
    if scale is not None:
        place = np.where(byte // 2 == scale // 2, ROWS * scale + 2 * row + byte - scale, place)
    return (panel * per_row + block) * ROWS * size + place


def unpack(panels: jax.Array, *, format: str) -> jax.Array:
    """Returns blocks u8[..., rows, n, bytes] of panels [..., rows / 16, n, 16 * bytes]."""
    *lead, count, per_row, size = panels.shape
    scale, words = _SCALE.get(format), (4, size // ROWS // 4)  # (bytes, how many)
    pieces = {None: [words], 0: [(2, 1), words]}.get(scale, [words, (2, 1)])
    parts, first = [], 0
    for width, repeats in pieces:
        part = panels[..., first : first + ROWS * width * repeats]
        part = part.reshape(*panels.shape[:-1], repeats, ROWS, width)
        parts.append(jnp.moveaxis(part, -2, -4).reshape(*lead, count, ROWS, per_row, repeats * width))
        first += ROWS * width * repeats
    return jnp.concatenate(parts, axis=-1).reshape(*lead, count * ROWS, per_row, size // ROWS)
