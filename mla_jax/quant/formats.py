"""The table of GGUF block formats: weights in a block, bytes in a block, and the decoder of a block."""

import dataclasses
from collections.abc import Callable

import jax

from mla_jax.quant import float4, i_quants, iqk_quants, k_quants, legacy, ternary, trellis


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
        Format("q4_1", 3, 32, 20, legacy.decode_q4_1),
        Format("q5_0", 6, 32, 22, legacy.decode_q5_0),
        Format("q5_1", 7, 32, 24, legacy.decode_q5_1),
        Format("q8_0", 8, 32, 34, legacy.decode_q8_0),
        Format("q2_K", 10, 256, 84, k_quants.decode_q2_k),
        Format("q3_K", 11, 256, 110, k_quants.decode_q3_k),
        Format("q4_K", 12, 256, 144, k_quants.decode_q4_k),
        Format("q5_K", 13, 256, 176, k_quants.decode_q5_k),
        Format("q6_K", 14, 256, 210, k_quants.decode_q6_k),
        Format("iq2_xxs", 16, 256, 66, i_quants.decode_iq2_xxs),
        Format("iq2_xs", 17, 256, 74, i_quants.decode_iq2_xs),
        Format("iq3_xxs", 18, 256, 98, i_quants.decode_iq3_xxs),
        Format("iq1_s", 19, 256, 50, i_quants.decode_iq1_s),
        Format("iq4_nl", 20, 32, 18, i_quants.decode_iq4_nl),
        Format("iq3_s", 21, 256, 110, i_quants.decode_iq3_s),
        Format("iq2_s", 22, 256, 82, i_quants.decode_iq2_s),
        Format("iq4_xs", 23, 256, 136, i_quants.decode_iq4_xs),
        Format("iq1_m", 29, 256, 56, i_quants.decode_iq1_m),
        Format("tq1_0", 34, 256, 54, ternary.decode_tq1_0),
        Format("tq2_0", 35, 256, 66, ternary.decode_tq2_0),
        Format("mxfp4", 39, 32, 17, float4.decode_mxfp4),
        Format("nvfp4", 40, 64, 36, float4.decode_nvfp4),
        Format("q1_0_g128", 41, 128, 18, ternary.decode_q1_0_g128),
        Format("q6_0", 133, 32, 26, iqk_quants.decode_q6_0),
        Format("iq1_bn", 134, 64, 13, ternary.decode_iq1_bn, 2),
        Format("iq2_bn", 135, 64, 16, ternary.decode_iq2_bn, 4),
        Format("iq2_k", 137, 256, 76, iqk_quants.decode_iq2_k),
        Format("iq3_k", 138, 256, 110, iqk_quants.decode_iq3_k),
        Format("iq4_k", 139, 256, 144, iqk_quants.decode_iq4_k),
        Format("iq5_k", 140, 256, 176, iqk_quants.decode_iq5_k),
        Format("iq6_k", 141, 256, 212, iqk_quants.decode_iq6_k),
        Format("iq4_ks", 144, 256, 136, iqk_quants.decode_iq4_ks, 4),
        Format("iq2_ks", 145, 256, 70, iqk_quants.decode_iq2_ks, 2),
        Format("iq4_kss", 146, 256, 128, iqk_quants.decode_iq4_kss, 4),
        Format("q8_KV", 151, 32, 32, iqk_quants.decode_q8_kv, 8),
        Format("iq5_ks", 152, 256, 168, iqk_quants.decode_iq5_ks, 4),
        Format("iq2_kt", 153, 256, 68, trellis.decode_iq2_kt, 4),
        Format("iq3_kt", 154, 256, 100, trellis.decode_iq3_kt, 4),
        Format("iq4_kt", 155, 256, 128, trellis.decode_iq4_kt, 4),
        Format("iq3_ks", 156, 256, 102, iqk_quants.decode_iq3_ks, 2),
        Format("iq2_kl", 157, 256, 86, iqk_quants.decode_iq2_kl, 2),
        Format("iq1_kt", 158, 256, 56, trellis.decode_iq1_kt, 4),
        # In files the rows of these are interleaved; here they are taken apart.
        Format("iq1_s_r4", 219, 32, 6, i_quants.decode_iq1_s_row, 2),
        Format("iq1_m_r4", 229, 32, 7, i_quants.decode_iq1_m_row, 2),
        Format("q8_k_r8", 399, 256, 258, legacy.decode_q8_0),
    )
}
