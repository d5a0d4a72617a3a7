"""The table of GGUF block formats: weights in a block, bytes in a block, and the decoder of a block."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Format:
    """One GGUF block format.

    Attributes:
      name: spelling of the type in lower case, with the capital K of the k-quants, for example "q4_K".
      ggml_type: id of the type in a GGUF tensor table.
      block_size: weights in a block.
      block_bytes: bytes of a block.
      decode: uint8[..., block_bytes] -> float32[..., block_size], exact, and pure so that it runs inside jit.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    decode: Callable[[jax.Array], jax.Array]


def _float16(blocks: jax.Array, start: int) -> jax.Array:
    """Returns the little-endian float16 at byte `start` of each block as float32[..., 1]."""
    return jax.lax.bitcast_convert_type(blocks[..., start : start + 2], jnp.float16)[..., None].astype(
        jnp.float32
    )


def _split(values: jax.Array, count: int) -> jax.Array:
    """Splits the last axis into `count` equal runs: [..., n] -> [..., count, n / count]."""
    *lead, size = values.shape
    return values.reshape(*lead, count, size // count)


def _join(values: jax.Array, axes: int) -> jax.Array:
    """Merges the last `axes` axes into one."""
    return values.reshape(*values.shape[:-axes], -1)


def fields(values: jax.Array, shifts: tuple[int, ...], mask: int) -> jax.Array:
    """Extracts bit fields of bytes: [..., n] -> [..., shifts, n], field s being `(byte >> s) & mask`."""
    parts = [jax.lax.shift_right_logical(values, jnp.full_like(values, s)) & jnp.uint8(mask) for s in shifts]
    return jnp.stack(parts, axis=-2)


def _decode_q8_0(blocks: jax.Array) -> jax.Array:
    codes = jax.lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
    return codes.astype(jnp.float32) * _float16(blocks, 0)


def _decode_q4_0(blocks: jax.Array) -> jax.Array:
    codes = _join(fields(blocks[..., 2:], (0, 4), 0x0F), 2)
    return _float16(blocks, 0) * (codes.astype(jnp.float32) - jnp.float32(8))


def _decode_q5_0(blocks: jax.Array) -> jax.Array:
    """Decodes `d * (code - 16)`; bit j of bytes 2 to 5 is the fifth bit of code j."""
    low = _join(fields(blocks[..., 6:], (0, 4), 0x0F), 2)
    high = _join(fields(blocks[..., 2:6], tuple(range(8)), 0x01).swapaxes(-1, -2), 2)
    codes = low | (high << jnp.uint8(4))
    return _float16(blocks, 0) * (codes.astype(jnp.float32) - jnp.float32(16))


def _decode_q4_k(blocks: jax.Array) -> jax.Array:
    """Decodes 8 runs of 32 weights, each `d * scale * code - dmin * minimum` with 6-bit scales and minima.

    The products of a float16, a 6-bit and a 4-bit number are exact in float32, so that the result is the same
    whether or not the compiler contracts the last product and difference into one operation.
    """
    low, high, mixed = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    six, two, four = jnp.uint8(0x3F), jnp.uint8(2), jnp.uint8(4)
    scales = jnp.concatenate([low & six, (mixed & jnp.uint8(0x0F)) | ((low >> two) & jnp.uint8(0x30))], -1)
    minima = jnp.concatenate([high & six, (mixed >> four) | ((high >> two) & jnp.uint8(0x30))], -1)
    codes = fields(_split(blocks[..., 16:], 4), (0, 4), 0x0F)
    codes = codes.reshape(*blocks.shape[:-1], 8, 32).astype(jnp.float32)
    scale = _float16(blocks, 0) * scales.astype(jnp.float32)
    minimum = _float16(blocks, 2) * minima.astype(jnp.float32)
    return _join(scale[..., None] * codes - minimum[..., None], 2)


def _decode_q6_k(blocks: jax.Array) -> jax.Array:
    """Decodes 16 runs of 16 weights, each `d * scale * (code - 32)`; a code is 4 low and 2 high bits."""
    shape = (*blocks.shape[:-1], 16, 16)
    low = fields(_split(blocks[..., :128], 2), (0, 4), 0x0F).reshape(shape)
    high = fields(_split(blocks[..., 128:192], 2), (0, 2, 4, 6), 0x03).reshape(shape)
    codes = (low | (high << jnp.uint8(4))).astype(jnp.float32) - jnp.float32(32)
    scales = jax.lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8).astype(jnp.float32)
    return _join((_float16(blocks, 208) * scales)[..., None] * codes, 2)


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("q4_0", 2, 32, 18, _decode_q4_0),
        Format("q5_0", 6, 32, 22, _decode_q5_0),
        Format("q8_0", 8, 32, 34, _decode_q8_0),
        Format("q4_K", 12, 256, 144, _decode_q4_k),
        Format("q6_K", 14, 256, 210, _decode_q6_k),
    )
}
