"""The table of GGUF block formats: weights in a block, bytes in a block, and the decoder of a block."""

import dataclasses
from collections.abc import Callable

import jax

from mla_jax.quant import k_quants, legacy


@dataclasses.dataclass(frozen=True)
class Format:
    """One GGUF block format.

    Attributes:
      name: spelling of the type in lower case, with the capital K of the k-quants, for example "q4_K".
      ggml_type: id of the type in a GGUF tensor table.
      block_size: weights in a block.
      block_bytes: bytes of a block.
      decode: uint8[..., block_bytes] -> float32[..., block_size], exact, and pure so that it runs inside jit.
        With a row header: (uint8[..., n, block_bytes], uint8[..., header_bytes]) -> float32[..., n, size].
      header_bytes: bytes in front of the blocks of each row, 0 for most.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    decode: Callable[..., jax.Array]
    header_bytes: int = 0


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("q4_0", 2, 32, 18, legacy.decode_q4_0),
        Format("q5_0", 6, 32, 22, legacy.decode_q5_0),
        Format("q8_0", 8, 32, 34, legacy.decode_q8_0),
        Format("q4_K", 12, 256, 144, k_quants.decode_q4_k),
        Format("q6_K", 14, 256, 210, k_quants.decode_q6_k),
    )
}
