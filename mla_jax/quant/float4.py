"""Decoders of the types of 4-bit floats (E2M1) with scales of one byte.

Each pair of a scale and a code has its value in a table: a product would lose the smallest values of mxfp4,
which are subnormal in float32, and zero in the arithmetic of XLA on CPUs.

Source: OCP Microscaling Formats (MX) specification 1.0; ggml for the order of the codes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.quant import bits

_BYTES = np.arange(256)
_TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float64)  # has no -0


def decode_mxfp4(blocks: jax.Array) -> jax.Array:
    """Decodes 32 weights, `2 ** (scale - 127) * code`; low nibbles are the first half of the block."""
    return _decode(blocks[..., :1], blocks[..., 1:], _MXFP4)


def decode_nvfp4(blocks: jax.Array) -> jax.Array:
    """Decodes 4 runs of 16 weights, `scale * code` with scales in E4M3, whose sign bit is not read.

    A file may have one more scale for a whole tensor, which is not part of the blocks.
    """
    return _decode(blocks[..., :4], blocks[..., 4:], _NVFP4)


def _table(scales: np.ndarray) -> np.ndarray:
    """Returns half of the product of each scale and code: float64[256] -> float32[256 * 16]."""
    with np.errstate(over="ignore"):
        return (scales[:, None] / 2 * _TWICE_E2M1).astype(np.float32).reshape(-1)


def _e4m3(codes: np.ndarray) -> np.ndarray:
    """Returns magnitudes of floats of 4 exponent and 3 fraction bits; as in ggml, 0x7F is 0, not NaN."""
    exponent, fraction = codes >> 3 & 0x0F, codes & 0x07
    normal = np.ldexp(8.0 + fraction, exponent - 10)
    return np.where(codes == 0x7F, 0.0, np.where(exponent == 0, np.ldexp(fraction, -9), normal))


_MXFP4 = _table(np.ldexp(1.0, _BYTES - 127))
_NVFP4 = _table(_e4m3(_BYTES))


def _decode(scales: jax.Array, packed: jax.Array, table: np.ndarray) -> jax.Array:
    """Looks up `table[16 * scale + code]`: uint8[..., runs], uint8[..., bytes] -> float32[..., 2 * bytes]."""
    runs = scales.shape[-1]
    codes = bits.split(bits.planes(packed, 4, runs), runs).astype(jnp.uint16)
    rows = scales[..., None].astype(jnp.uint16) << jnp.uint16(4)
    return bits.join(bits.lookup(table, rows | codes), 2)
