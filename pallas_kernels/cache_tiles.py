"""Rows of the latent cache as kernels read them: codes and scales, taken apart in planes of columns.

A part of the cache is a tuple of four arrays, in pools [Z, G, ...] of Z pages of G slots:
low     [..., n] numbers or int8 codes, or uint8[..., n / 2]: byte j has four bits of elements j and j + n / 2
high    uint8[..., n * bits / 8]: byte j has the bits above those four of elements j, j + its width, ...
scale   [..., n / block]
offset  [..., n / block], what a code of zero stands for
Those that a type lacks are uint8[0]. A tile of rows is never joined again: a product with it is a sum over
its planes, each of contiguous columns, so it takes queries and gives values plane by plane.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Part = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

NARROWEST = 16  # columns of a plane: the least that a product on a tensor core sums over

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclasses.dataclass(frozen=True)
class CacheType:
    """How numbers of one type are kept.

    Attributes:
      low_bits: bits of a number in `low`.
      high_bits: bits of a code in `high`.
      block: neighbours that share a scale; None for the whole row.
      scale_dtype: of scales and offsets; None: `low` holds the numbers themselves.
      has_offset: whether there are offsets.
      zero: code of `low` and `high` that stands for zero.
      levels: what codes stand for before scaling, if that is not `code - zero`.
      product_dtype: in which a kernel multiplies such numbers.
    """

    low_bits: int
    high_bits: int = 0
    block: int | None = 32
    scale_dtype: type | None = jnp.float16
    has_offset: bool = False
    zero: int = 0
    levels: tuple[int, ...] | None = None
    product_dtype: type = jnp.float16

    def row_bytes(self, size: int) -> int:
        """Returns the bytes of a row of `size` numbers."""
        codes = size * (self.low_bits + self.high_bits) // 8
        if self.scale_dtype is None:
            return codes
        scales = (1 + self.has_offset) * size // (self.block or size)
        return codes + scales * np.dtype(self.scale_dtype).itemsize

    def plane_width(self, size: int) -> int:
        """Returns the columns of a plane of rows of `size` numbers: as many as meet the same bits of bytes.

        Where these are fewer than a block, bits of several planes of `high` are put side by side.
        """
        if self.low_bits != 4:
            return size
        natural = size * self.high_bits // 8 if self.high_bits else size // 2
        return max(natural, min(size // 2, 32))


TYPES: dict[str, CacheType] = {
    "f32": CacheType(32, scale_dtype=None, product_dtype=jnp.float32),
    "f16": CacheType(16, scale_dtype=None),
    "bf16": CacheType(16, scale_dtype=None, product_dtype=jnp.bfloat16),
    "fp8_e4m3": CacheType(8, scale_dtype=None),
    "q8_0": CacheType(8),
    "q8_KV": CacheType(8, block=None, scale_dtype=jnp.float32),
    "q6_0": CacheType(4, 2, zero=32),
    "q5_1": CacheType(4, 1, has_offset=True),
    "q5_0": CacheType(4, 1, zero=16),
    "q4_1": CacheType(4, has_offset=True),
    "q4_0": CacheType(4, zero=8),
    "iq4_nl": CacheType(4, levels=_IQ4_NL),
}


def decode(part: Part, name: str) -> jax.Array:
    """Returns the numbers of a part of type `name` as float32[..., n]."""
    (low, high, scale, offset), kind = part, TYPES[name]
    if kind.scale_dtype is None:
        return low.astype(jnp.float32)
    codes = low if kind.low_bits == 8 else _unpacked(low, 4)
    if kind.high_bits:
        codes |= _unpacked(high, kind.high_bits) << np.uint8(4)
    if kind.levels:
        values = jnp.asarray(kind.levels, jnp.float32)[codes.astype(jnp.int32)]
    else:
        values = codes.astype(jnp.float32) - np.float32(kind.zero)
    blocks = values.reshape(*scale.shape, -1) * scale.astype(jnp.float32)[..., None]
    if kind.has_offset:
        blocks += offset.astype(jnp.float32)[..., None]
    return blocks.reshape(values.shape)


def _unpacked(packed, width):
    mask = np.uint8((1 << width) - 1)
    return jnp.concatenate([packed >> np.uint8(shift) & mask for shift in range(0, 8, width)], axis=-1)


def unsupported(name: str, size: int) -> str | None:
    """Says why kernels cannot read rows of `size` numbers of type `name`, or returns None."""
    if size & (size - 1):
        return f"the width of a cached row must be a power of two, got {size}."
    width = TYPES[name].plane_width(size)
    if width < NARROWEST:
        return f"a plane of {name} must be at least {NARROWEST} columns wide, got {width} of {size}."
    return None


def operands(part: Part, name: str) -> list[jax.Array]:
    """Returns the arrays that a kernel needs to read a part of type `name`: `Rows` takes their refs."""
    levels = TYPES[name].levels
    table = [] if levels is None else [jnp.asarray(levels, jnp.float16)]
    return [array for array in part if array.size] + table


@dataclasses.dataclass(frozen=True)
class Rows:
    """Reads tiles of rows inside a kernel.

    Loading and decoding are two steps, so that a loop can load a tile while it computes with the one before.

    Attributes:
      refs: of `operands`.
      name: key of `TYPES`.
      size: numbers of a row.
    """

    refs: tuple
    name: str
    size: int

    @property
    def kind(self) -> CacheType:
        """How the numbers are kept."""
        return TYPES[self.name]

    @property
    def columns(self) -> list:
        """Slices of the columns of each plane."""
        width = self.kind.plane_width(self.size)
        return [pl.ds(start, width) for start in range(0, self.size, width)]

    def load(self, page, start, live):
        """Loads a tile as it is kept, from row `start` of a page on; rows not `live` bool[s] are zero.

        Dead rows keep their codes, as any code is finite: their scales and offsets are zero.
        """
        kind, rows = self.kind, pl.ds(start, live.shape[0])
        alive = lambda ref, columns: plgpu.load(ref.at[page, rows, columns], mask=live[:, None], other=0)
        low_ref, *refs = self.refs
        if self.name == "fp8_e4m3":  # no mask: Triton has no zeros of this type
            words = jax.lax.bitcast_convert_type(low_ref[page, rows, :], jnp.uint8)
            return jnp.where(live[:, None], words, np.uint8(0))
        if kind.scale_dtype is None:
            return alive(low_ref, pl.ds(0, self.size))
        refs = iter(refs[:-1] if kind.levels else refs)
        width, packed = self.columns[0].size, self.size * kind.low_bits // 8
        width = min(width, packed)
        lows = [low_ref[page, rows, pl.ds(first, width)] for first in range(0, packed, width)]
        high = next(refs)[page, rows, :] if kind.high_bits else ()
        scales = [[alive(ref, blocks) for blocks in self._blocks()] for ref in refs]
        return lows, high, scales

    def planes(self, tile) -> list[jax.Array]:
        """Decodes what `load` gave to planes [s, width] in the dtype of products."""
        kind = self.kind
        if self.name == "fp8_e4m3":
            return [_float8(tile)]
        if kind.scale_dtype is None:
            return [tile]
        lows, high, scales = tile
        values = [self._values(lows, high, place) for place in range(len(self.columns))]
        return [_scaled(*plane).astype(kind.product_dtype) for plane in zip(values, *scales, strict=True)]

    def _blocks(self):
        """Slices of the scales of each plane."""
        block = self.kind.block or self.size
        return [pl.ds(c.start // block, max(1, c.size // block)) for c in self.columns]

    def _values(self, lows, high, place):
        """Returns what the codes of a plane stand for, float16."""
        kind = self.kind
        low = lows[place % len(lows)]
        if kind.low_bits == 8:
            return _integers(jax.lax.bitcast_convert_type(low, jnp.uint8) ^ np.uint8(128), 128)
        codes = low & np.uint8(15) if place < len(lows) else low >> np.uint8(4)
        if kind.levels:
            return self.refs[-1][codes.astype(jnp.int32)]
        if kind.high_bits:
            codes |= self._high_bits(high, place) << np.uint8(4)
        return _integers(codes, kind.zero)

    def _high_bits(self, high, place):
        """Returns the bits of a plane that are kept in `high`."""
        bits, (rows, narrow) = self.kind.high_bits, high.shape
        width = self.columns[0].size
        mask, count = np.uint8((1 << bits) - 1), width // narrow
        if count == 1:
            return high >> np.uint8(bits * place) & mask
        # Part i of a plane has the bits of shift i: `high` once for each, side by side.
        part = jax.lax.broadcasted_iota(jnp.int32, (rows, count, narrow), 1)
        shift = (bits * (place * count + part)).astype(jnp.uint8)
        return (jnp.broadcast_to(high[:, None], shift.shape) >> shift & mask).reshape(rows, width)


def _integers(codes, zero):
    """Returns `codes - zero` in float16: 0x6400 is 1024, whose last ten bits count in ones."""
    words = codes.astype(jnp.uint16) | np.uint16(0x6400)
    return jax.lax.bitcast_convert_type(words, jnp.float16) - np.float16(1024 + zero)


def _float8(numbers):
    """Returns the bytes of float8_e4m3fn as float16, by shifts: Ampere has no instruction for it."""
    words = numbers.astype(jnp.uint16)
    magnitude, sign = words & np.uint16(0x7F), words & np.uint16(0x80)
    half = magnitude << np.uint16(7) | sign << np.uint16(8)
    values = jax.lax.bitcast_convert_type(half, jnp.float16) * np.float16(256)  # exponents are 8 apart
    return jnp.where(magnitude == np.uint16(0x7F), np.float16(np.nan), values)


def _scaled(values, scale, offset=None):
    """Multiplies blocks of values [s, width] by scale [s, blocks], and adds offset, in the dtype of these."""
    blocks = values.astype(scale.dtype).reshape(*scale.shape, -1) * scale[:, :, None]
    if offset is not None:
        blocks += offset[:, :, None]
    return blocks.reshape(values.shape)
