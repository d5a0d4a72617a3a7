"""What a cached number is kept as: `encode` turns values into a cache type, `decode` turns them back.

A block type keeps 32 neighbours of a row as small integers with one scale. Its parts lie in arrays of their
own, so that a tile of each is a power of two and none has to be picked out of the middle of a block. Codes
of less than a byte are packed in planes: byte j of a 4-bit row holds elements j and j + n / 2.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits, i_quants, packing, quantisers

PLAIN = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16, "fp8_e4m3": jnp.float8_e4m3fn}

_LARGEST = 2.0**24  # no float16 scale reaches further, and its square times itself is finite in float32


@dataclasses.dataclass(frozen=True)
class BlockType:
    """One quantised cache type.

    Attributes:
      low_bits: bits of a code in `Codes.low`: 8 or 4.
      high_bits: bits of a code in `Codes.high`: 0, 1 or 2.
      block: neighbours that share a scale; None for the whole row.
      scale_dtype: of scales and offsets.
      levels: the value of each code before scaling, or the code that stands for zero.
      quantise: float32[..., blocks, block] -> codes of that shape, scale and offset (or None)
        float32[..., blocks].
    """

    low_bits: int
    high_bits: int
    block: int | None
    scale_dtype: jnp.dtype
    levels: np.ndarray | int
    quantise: Callable


BLOCK_TYPES: dict[str, BlockType] = {
    "q8_0": BlockType(8, 0, 32, jnp.float16, 0, quantisers.q8_0),
    "q8_KV": BlockType(8, 0, None, jnp.float32, 0, quantisers.q8_kv),
    "q6_0": BlockType(4, 2, 32, jnp.float16, 32, quantisers.q6_0),
    "q5_1": BlockType(4, 1, 32, jnp.float16, 0, quantisers.q5_1),
    "q5_0": BlockType(4, 1, 32, jnp.float16, 16, quantisers.q5_0),
    "q4_1": BlockType(4, 0, 32, jnp.float16, 0, quantisers.q4_1),
    "q4_0": BlockType(4, 0, 32, jnp.float16, 8, quantisers.q4_0),
    "iq4_nl": BlockType(4, 0, 32, jnp.float16, i_quants.VALUES_4, quantisers.iq4_nl),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
    """Rows of n quantised numbers.

    Attributes:
      low: int8[..., n], or uint8[..., n / 2]: the lower four bits, two a byte.
      high: uint8[..., n / 8 or n / 4]: the bits above those four, or None.
      scale: [..., n / block], float16, or float32 for q8_KV.
      offset: float16[..., n / block], the smallest value of a block, or None.
      type: key of `BLOCK_TYPES`; static under jit.
    """

    low: jax.Array
    high: jax.Array | None
    scale: jax.Array
    offset: jax.Array | None
    type: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers that are kept."""
        *lead, size = self.low.shape
        return (*lead, size * 8 // BLOCK_TYPES[self.type].low_bits)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.low.ndim


Stored = jax.Array | Codes


def empty(shape: tuple[int, ...], name: str) -> Stored:
    """Returns zeros of `shape` in the cache type `name`.

    Raises:
      ValueError: if the last axis is no whole number of blocks.
    """
    multiple = 1 if name in PLAIN else BLOCK_TYPES[name].block or 1
    if shape[-1] % multiple:
        raise ValueError(f"rows of cache type {name} must be a multiple of {multiple} wide, got {shape[-1]}.")
    parts = jax.eval_shape(lambda: encode(jnp.zeros(shape, jnp.float32), name))
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), parts)


def type_of(stored: Stored) -> str:
    """Returns the name of the cache type that `stored` is kept in."""
    if isinstance(stored, Codes):
        return stored.type
    return next(name for name, dtype in PLAIN.items() if stored.dtype == dtype)


def quantiser(name: str) -> Callable | None:
    """Returns how blocks of numbers become codes of the cache type `name`; None for one without codes."""
    return BLOCK_TYPES[name].quantise if name in BLOCK_TYPES else None


def parts(stored: Stored) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns low, high, scale and offset as kernels take them; uint8[0] for what a type lacks."""
    none = jnp.zeros((0,), jnp.uint8)
    if not isinstance(stored, Codes):
        return stored, none, none, none
    arrays = stored.low, stored.high, stored.scale, stored.offset
    return tuple(none if array is None else array for array in arrays)


def from_parts(arrays: tuple[jax.Array, ...], name: str) -> Stored:
    """Returns what `parts` took apart, of the cache type `name`."""
    low, high, scale, offset = (array if array.size else None for array in arrays)
    return low if name in PLAIN else Codes(low=low, high=high, scale=scale, offset=offset, type=name)


def encode(values: jax.Array, name: str) -> Stored:
    """Returns `values`, float[..., n], in the cache type `name`.

    A value beyond the range of f16 or fp8_e4m3 saturates, and so does a scale beyond float16: an infinity in
    the cache would be a NaN in every later softmax. A NaN stays one.

    Source: the CPU quantisers of ik_llama.cpp, see `quantisers`.
    """
    if name in PLAIN:
        return _saturate(values, PLAIN[name])
    kind = BLOCK_TYPES[name]
    blocks = jnp.clip(values.astype(jnp.float32), -_LARGEST, _LARGEST)
    blocks = blocks.reshape(*values.shape[:-1], -1, kind.block or values.shape[-1])
    codes, scale, offset = kind.quantise(blocks)
    scale = jnp.where(jnp.any(jnp.isnan(blocks), axis=-1), jnp.nan, scale)  # XLA's max may skip a NaN
    codes = codes.reshape(values.shape)
    if kind.low_bits == 8:
        low, high = codes.astype(jnp.int8), None
    else:
        codes = codes.astype(jnp.uint8)
        low = packing.planes(codes & jnp.uint8(0x0F), 4)
        high = packing.planes(codes >> jnp.uint8(4), kind.high_bits) if kind.high_bits else None
    small = lambda numbers: None if numbers is None else _saturate(numbers, kind.scale_dtype)
    return Codes(low=low, high=high, scale=small(scale), offset=small(offset), type=name)


def decode(stored: Stored, dtype=jnp.float32) -> jax.Array:
    """Returns the numbers of `stored` as dtype[..., n]; codes are scaled in float32 first."""
    if not isinstance(stored, Codes):
        return stored.astype(dtype)
    kind = BLOCK_TYPES[stored.type]
    codes = stored.low if kind.low_bits == 8 else bits.planes(stored.low, 4)
    if kind.high_bits:
        codes = codes | (bits.planes(stored.high, kind.high_bits) << jnp.uint8(4))
    if isinstance(kind.levels, int):
        levels = codes.astype(jnp.float32) - jnp.float32(kind.levels)
    else:
        levels = jnp.take(jnp.asarray(kind.levels), codes, axis=0)
    blocks = levels.reshape(*stored.scale.shape, -1) * stored.scale.astype(jnp.float32)[..., None]
    if stored.offset is not None:
        blocks += stored.offset.astype(jnp.float32)[..., None]
    return blocks.reshape(levels.shape).astype(dtype)


def _saturate(values, dtype):
    if dtype in (jnp.float16, jnp.float8_e4m3fn):
        largest = float(jnp.finfo(dtype).max)
        values = jnp.clip(values, -largest, largest)
    return values.astype(dtype)
