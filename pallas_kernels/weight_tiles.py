"""Quantised weights as kernels read them: the blocks of GGUF taken apart into arrays, once, at load.

Blocks of 34, 18, 144, 210 or 136 bytes do not lie at addresses from which a GPU loads 16 bytes at once. So
the codes of a row go to words of 32 bits, and scales to arrays of their own. No number changes: where a scale
is a product of two numbers, both are kept. Words also keep a weight of 2 to 4 GiB addressable (`dispatch`).

A word has one code of each of P planes. A group of weights with one scale is `group / P` neighbouring words,
and its n-th run of `group / P` weights is in plane n of them: the same columns of all planes share a scale.
Whoever multiplies by a tile reads x in this order too (`in_planes`).

format      P  group  arrays, each [..., columns]
q8_0        4     32  words, d float16
q4_0        8     32  words, d float16
iq4_xs      8     32  words, scale int8, d float16 of 256 weights
iq4_ks      8     32  words, scale uint8 (the lowest bit chooses the table), d float32 of a row
q4_K        8     32  words, scale and minimum uint8, d and dmin float16 of 256 weights
q6_K        8     16  words of 4 low bits, uint16 words of 2 high bits, scale int8, d float16 of 256 weights
f16, bf16   1      -  the weights
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

_SUPER = 256  # weights of a block of the k-quants and i-quants
_GROUP_OF_PLAIN = 8  # 16 bytes
_ROW = 2**31  # of a number that serves the whole row: more weights than a row has

# What the codes of iq4_xs and iq4_ks stand for, and the second version of iq4_ks.
_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_TABLE = np.concatenate([_VALUES, _VALUES + np.float32(4)])


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of a weight: plane n is `values(n) * scale + offset`.

    Attributes:
      values: n -> dtype[..., groups, words of a group].
      scale: float32[..., groups], or None for 1.
      offset: float32[..., groups], or None for 0.
    """

    values: Callable[[int], jax.Array]
    scale: jax.Array | None = None
    offset: jax.Array | None = None

    def plane(self, n: int) -> jax.Array:
        """Returns the weights of plane n, [..., words], of the type of `values`."""
        values = self.values(n)
        spread = lambda factors: factors.astype(values.dtype)[..., None]
        if self.scale is not None:
            values = values * spread(self.scale)
        if self.offset is not None:
            values = values + spread(self.offset)
        return values.reshape(*values.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a format lies in memory.

    Attributes:
      block_size: weights of a block: rows are whole blocks.
      block_bytes: what the arrays have for a block, without numbers that serve a whole row.
      planes: P.
      group: weights that share a scale; without scales, how many are summed in one go.
      weights_per_entry: for each array, the weights that an entry belongs to.
      take_apart: (blocks uint8[..., n, bytes], header) -> arrays.
      tile: (tiles of the arrays, table, dtype) -> Tile. `dtype` is that of the values.
      rounds_once: whether tiles of float16 are the weights rounded once; true if scales are float16.
      table: what codes stand for, if they are not numbers.
    """

    block_size: int
    block_bytes: int
    planes: int
    group: int
    weights_per_entry: tuple[int, ...]
    take_apart: Callable
    tile: Callable[..., Tile]
    rounds_once: bool = False
    table: np.ndarray | None = None

    @property
    def words_of_group(self) -> int:
        """Neighbouring columns that share a scale."""
        return self.group // self.planes

    def spans(self, start: jax.Array, words: int) -> Iterator[tuple[jax.Array | int, int]]:
        """Yields, for each array, where the tile of `words` columns from `start` on begins, and its length.

        The tile does not cross a block's end, or it begins and ends at one.
        """
        for weights in self.weights_per_entry:
            if weights == _ROW:
                yield 0, 1
            elif weights <= self.planes:
                yield start, words
            else:
                columns = weights // self.planes
                yield jax.lax.div(start, jnp.int32(columns)), max(1, words // columns)


def layout(name: str) -> Layout:
    """Returns the layout of a format.

    Raises:
      ValueError: for a format that has none.
    """
    if name not in LAYOUTS:
        raise ValueError(f"format must be one of {sorted(LAYOUTS)}, got {name!r}.")
    return LAYOUTS[name]


def repack(blocks: jax.Array, header: jax.Array | None, format: str) -> tuple[jax.Array, ...]:
    """Takes the blocks of a weight apart; each row by itself, so that a large weight may come in parts.

    Args:
      blocks: uint8[..., n, bytes of a block]; of f16 and bf16 the weight itself, [..., D].
      header: uint8[..., bytes] in front of each row, for the formats that have it.
      format: name of the GGUF type, as in `LAYOUTS`.

    Returns:
      The arrays of the format, each [..., columns]. Together they are as large as the blocks, with q4_K 3 and
      with iq4_xs 1.5 percent larger.

    Raises:
      ValueError: for a format without layout.
    """
    return layout(format).take_apart(blocks, header)


def num_columns(planes: tuple[jax.Array, ...], format: str) -> int:
    """Returns D, the size of a row of the weight."""
    return planes[0].shape[-1] * layout(format).planes


def row_bytes(size: int, format: str) -> int:
    """Returns what the arrays take in memory for a row of `size` weights."""
    kind = layout(format)
    return size // kind.block_size * kind.block_bytes + 4 * kind.weights_per_entry.count(_ROW)


def decode(planes: tuple[jax.Array, ...], format: str) -> jax.Array:
    """Returns the weight as float32[..., D], exactly what its blocks decode to.

    Args:
      planes: what `repack` returned, or the same index of all arrays.
      format: name of the GGUF type.
    """
    kind = layout(format)
    table = None if kind.table is None else jnp.asarray(kind.table)
    tile = kind.tile(planes, table, jnp.float32)
    parts = jnp.stack([tile.plane(n) for n in range(kind.planes)], axis=-2)
    if kind.planes == 1:
        return parts[..., 0, :]
    *lead, _, words = parts.shape
    runs = parts.reshape(*lead, kind.planes, -1, kind.words_of_group)
    return runs.swapaxes(-3, -2).reshape(*lead, kind.planes * words)


def in_planes(x: jax.Array, format: str) -> jax.Array:
    """Puts the columns of x [..., D] in the order of the planes of a weight: [..., P, D / P]."""
    kind = layout(format)
    *lead, size = x.shape
    if kind.planes == 1:
        return x[..., None, :]
    runs = x.reshape(*lead, -1, kind.planes, kind.words_of_group)
    return runs.swapaxes(-3, -2).reshape(*lead, kind.planes, size // kind.planes)


# --- taking apart -------------------------------------------------------------------------------


def _take_q8_0(blocks, header):
    codes = blocks[..., 2:] ^ jnp.uint8(0x80)  # code + 128: in words, numbers without a sign are simpler
    return _words(_row(codes), 8, 4, 32), _row(_float16(blocks, 0))


def _take_q4_0(blocks, header):
    return _words(_row(_fields(blocks[..., 2:], 4, 1)), 4, 8, 32), _row(_float16(blocks, 0))


def _take_iq4_xs(blocks, header):
    scales = _fields(blocks[..., 4:8], 4, 4) | (_fields(blocks[..., 2:4], 2, 2) << jnp.uint8(4))
    codes = _words(_row(_fields(blocks[..., 8:], 4, 8)), 4, 8, 32)
    return codes, _row(scales.astype(jnp.int8) - jnp.int8(32)), _row(_float16(blocks, 0))


def _take_iq4_ks(blocks, header):
    codes = _words(_row(_fields(blocks[..., 8:], 4, 8)), 4, 8, 32)
    return codes, _row(blocks[..., :8]), jax.lax.bitcast_convert_type(header, jnp.float32)[..., None]


def _take_q4_k(blocks, header):
    codes = _words(_row(_fields(blocks[..., 16:], 4, 4)), 4, 8, 32)
    first, second, mixed = (blocks[..., start : start + 4] for start in (4, 8, 12))
    six_bits, high = jnp.uint8(0x3F), lambda part: (part >> jnp.uint8(2)) & jnp.uint8(0x30)
    scales = jnp.concatenate([first & six_bits, mixed & jnp.uint8(0x0F) | high(first)], axis=-1)
    minima = jnp.concatenate([second & six_bits, mixed >> jnp.uint8(4) | high(second)], axis=-1)
    return codes, _row(scales), _row(minima), _row(_float16(blocks, 0)), _row(_float16(blocks, 2))


def _take_q6_k(blocks, header):
    low = _words(_row(_fields(blocks[..., :128], 4, 2)), 4, 8, 16)
    high = _words(_row(_fields(blocks[..., 128:192], 2, 2)), 2, 8, 16).astype(jnp.uint16)
    scales = jax.lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8)
    return low, high, _row(scales), _row(_float16(blocks, 208))


def _row(parts):
    """Joins what the blocks of a row have: [..., n, m] -> [..., n * m]."""
    return parts.reshape(*parts.shape[:-2], -1)


def _float16(blocks, start):
    return jax.lax.bitcast_convert_type(blocks[..., start : start + 2], jnp.float16)[..., None]


def _fields(packed, width, runs):
    """Unpacks bytes of `runs` equal runs: the lowest `width` bits of a run come first, then the next ones."""
    parts = packed.reshape(*packed.shape[:-1], runs, 1, -1)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]
    parts, shifts = jnp.broadcast_arrays(
        parts, jnp.broadcast_to(shifts, (1,) * (parts.ndim - 2) + shifts.shape)
    )
    return ((parts >> shifts) & jnp.uint8(2**width - 1)).reshape(*packed.shape[:-1], -1)


def _words(codes, width, planes, group):
    """Packs codes uint8[..., D] of `width` bits in words uint32[..., D / planes], one of each plane."""
    runs = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, planes, group // planes)
    words = jnp.zeros_like(runs[..., 0, :])
    for n in range(planes):
        words |= runs[..., n, :] << jnp.uint32(n * width)
    return words.reshape(*codes.shape[:-1], codes.shape[-1] // planes)


# --- tiles: the same code in kernels and in `decode` ----------------------------------------------


def _tile_q8_0(parts, table, dtype):
    words, d = parts
    words = _grouped(words, 8)
    return Tile(lambda n: _number(_field(words, 8 * n, 8), 128, dtype), d.astype(jnp.float32))


def _tile_q4_0(parts, table, dtype):
    words, d = parts
    words = _grouped(words, 4)
    return Tile(lambda n: _number(_field(words, 4 * n, 4), 8, dtype), d.astype(jnp.float32))


def _tile_iq4_xs(parts, table, dtype):
    words, scale, d = parts
    words = _grouped(words, 4)
    return Tile(lambda n: _looked_up(table, _field(words, 4 * n, 4), dtype), _times(scale, d))


def _tile_iq4_ks(parts, table, dtype):
    words, scale, d = parts
    words = _grouped(words, 4)
    version = (scale & jnp.uint8(1)).astype(jnp.uint32)[..., None] << jnp.uint32(4)
    values = lambda n: _looked_up(table, _field(words, 4 * n, 4) | version, dtype)
    scale = (scale & jnp.uint8(0xFE)).astype(jnp.float32) - jnp.float32(127)
    return Tile(values, d * scale)


def _tile_q4_k(parts, table, dtype):
    words, scale, minimum, d, dmin = parts
    words = _grouped(words, 4)
    return Tile(
        lambda n: _number(_field(words, 4 * n, 4), 0, dtype), _times(scale, d), -_times(minimum, dmin)
    )


def _tile_q6_k(parts, table, dtype):
    low, high, scale, d = parts
    low, high = _grouped(low, 2), _grouped(high, 2).astype(jnp.uint32)

    def values(n):
        return _number(_field(low, 4 * n, 4) | (_field(high, 2 * n, 2) << jnp.uint32(4)), 32, dtype)

    return Tile(values, _times(scale, d))


def _tile_plain(parts, table, dtype):
    (values,) = parts
    values = _grouped(values, math.gcd(values.shape[-1], _GROUP_OF_PLAIN))
    return Tile(lambda n: values.astype(dtype))


def _grouped(words, size):
    return words.reshape(*words.shape[:-1], words.shape[-1] // size, size)


def _field(words, shift, width):
    return (words >> jnp.uint32(shift)) & jnp.uint32(2**width - 1)


def _number(codes, bias, dtype):
    """Returns `codes - bias` for codes below 256.

    The code becomes the lowest bits of a float of a known exponent: bits are set and a difference is taken at
    full speed, where a GPU converts integers at a quarter of it.
    """
    if dtype == jnp.float16:
        number = jax.lax.bitcast_convert_type(codes.astype(jnp.uint16) | jnp.uint16(0x6400), jnp.float16)
        return number - jnp.float16(1024 + bias)
    number = jax.lax.bitcast_convert_type(codes | jnp.uint32(0x4B000000), jnp.float32)
    return number - jnp.float32(2**23 + bias)


def _looked_up(table, codes, dtype):
    return table[codes.astype(jnp.int32)].astype(dtype)


def _times(scale, d):
    """Multiplies scales [..., groups] by the float16 of their blocks [..., blocks], as float32."""
    *lead, groups = scale.shape
    scale = scale.astype(jnp.float32).reshape(*lead, d.shape[-1], -1)
    return (scale * d.astype(jnp.float32)[..., None]).reshape(*lead, groups)


def _plain(dtype):
    take_apart = lambda weight, header: (weight.astype(dtype),)
    return Layout(1, 2, 1, _GROUP_OF_PLAIN, (1,), take_apart, _tile_plain, rounds_once=True)


LAYOUTS: dict[str, Layout] = {
    "q8_0": Layout(32, 34, 4, 32, (4, 32), _take_q8_0, _tile_q8_0, rounds_once=True),
    "q4_0": Layout(32, 18, 8, 32, (8, 32), _take_q4_0, _tile_q4_0, rounds_once=True),
    "iq4_xs": Layout(_SUPER, 138, 8, 32, (8, 32, _SUPER), _take_iq4_xs, _tile_iq4_xs, table=_TABLE),
    "iq4_ks": Layout(_SUPER, 136, 8, 32, (8, 32, _ROW), _take_iq4_ks, _tile_iq4_ks, table=_TABLE),
    "q4_K": Layout(_SUPER, 148, 8, 32, (8, 32, 32, _SUPER, _SUPER), _take_q4_k, _tile_q4_k),
    "q6_K": Layout(_SUPER, 210, 8, 16, (8, 8, 16, _SUPER), _take_q6_k, _tile_q6_k),
    "f16": _plain(jnp.float16),
    "bf16": _plain(jnp.bfloat16),
}
