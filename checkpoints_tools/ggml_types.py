"""Every tensor type of ggml and ik_llama.cpp, so that those that cannot be decoded here can be named."""

import math
import re
from typing import NamedTuple

_GROUP = re.compile(r"_r(\d+)$|_(\d+)x\d+$")


class GGMLType(NamedTuple):
    """Layout of one type: a row is `row_header` bytes, then its blocks.

    Rows that are interleaved in groups (names ending in _r4, _r8, _r16, _4x8) take as many bytes on average.
    """

    name: str
    block_size: int  # weights in a block
    block_bytes: int
    row_header: int = 0

    @property
    def rows_per_group(self) -> int:
        """Number of rows that are interleaved; a matrix has a multiple of it. 1 for most types."""
        match = _GROUP.search(self.name)
        return int(match[1] or match[2]) if match else 1

    def row_bytes(self, row_size: int) -> int:
        """Returns the bytes of a row of `row_size` weights, which must be a multiple of `block_size`."""
        return self.row_header + row_size // self.block_size * self.block_bytes

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes of a tensor of `shape` in NumPy order, whole rows of blocks."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1] if shape else 1)


# Source: ggml.h and the traits in ggml.c of ik_llama.cpp; 34, 35 and 40 are of llama.cpp.
TYPES: dict[int, GGMLType] = {
    0: GGMLType("f32", 1, 4),
    1: GGMLType("f16", 1, 2),
    2: GGMLType("q4_0", 32, 18),
    3: GGMLType("q4_1", 32, 20),
    6: GGMLType("q5_0", 32, 22),
    7: GGMLType("q5_1", 32, 24),
    8: GGMLType("q8_0", 32, 34),
    9: GGMLType("q8_1", 32, 36),
    10: GGMLType("q2_K", 256, 84),
    11: GGMLType("q3_K", 256, 110),
    12: GGMLType("q4_K", 256, 144),
    13: GGMLType("q5_K", 256, 176),
    14: GGMLType("q6_K", 256, 210),
    15: GGMLType("q8_K", 256, 296),
    16: GGMLType("iq2_xxs", 256, 66),
    17: GGMLType("iq2_xs", 256, 74),
    18: GGMLType("iq3_xxs", 256, 98),
    19: GGMLType("iq1_s", 256, 50),
    20: GGMLType("iq4_nl", 32, 18),
    21: GGMLType("iq3_s", 256, 110),
    22: GGMLType("iq2_s", 256, 82),
    23: GGMLType("iq4_xs", 256, 136),
    24: GGMLType("i8", 1, 1),
    25: GGMLType("i16", 1, 2),
    26: GGMLType("i32", 1, 4),
    27: GGMLType("i64", 1, 8),
    28: GGMLType("f64", 1, 8),
    29: GGMLType("iq1_m", 256, 56),
    30: GGMLType("bf16", 1, 2),
    31: GGMLType("q4_0_4x4", 32, 18),
    32: GGMLType("q4_0_4x8", 32, 18),
    33: GGMLType("q4_0_8x8", 32, 18),
    34: GGMLType("tq1_0", 256, 54),
    35: GGMLType("tq2_0", 256, 66),
    36: GGMLType("i2_s", 1, 1),
    39: GGMLType("mxfp4", 32, 17),
    40: GGMLType("nvfp4", 64, 36),
    41: GGMLType("q1_0_g128", 128, 18),
    97: GGMLType("q8_0_x4", 32, 34),
    98: GGMLType("q8_1_x4", 32, 36),
    99: GGMLType("q8_2_x4", 32, 36),
    133: GGMLType("q6_0", 32, 26),
    134: GGMLType("iq1_bn", 64, 13, 2),
    135: GGMLType("iq2_bn", 64, 16, 4),
    136: GGMLType("q8_K64", 64, 68),
    137: GGMLType("iq2_k", 256, 76),
    138: GGMLType("iq3_k", 256, 110),
    139: GGMLType("iq4_k", 256, 144),
    140: GGMLType("iq5_k", 256, 176),
    141: GGMLType("iq6_k", 256, 212),
    144: GGMLType("iq4_ks", 256, 136, 4),
    145: GGMLType("iq2_ks", 256, 70, 2),
    146: GGMLType("iq4_kss", 256, 128, 4),
    147: GGMLType("q8_K16", 64, 64, 20),
    148: GGMLType("q8_K32", 256, 296),
    149: GGMLType("q8_KR8", 256, 296),
    150: GGMLType("q8_K128", 128, 140),
    151: GGMLType("q8_KV", 32, 32, 8),
    152: GGMLType("iq5_ks", 256, 168, 4),
    153: GGMLType("iq2_kt", 256, 68, 4),
    154: GGMLType("iq3_kt", 256, 100, 4),
    155: GGMLType("iq4_kt", 256, 128, 4),
    156: GGMLType("iq3_ks", 256, 102, 2),
    157: GGMLType("iq2_kl", 256, 86, 2),
    158: GGMLType("iq1_kt", 256, 56, 4),
    202: GGMLType("q4_0_r8", 32, 18),
    206: GGMLType("q5_0_r4", 32, 22),
    208: GGMLType("q8_0_r8", 32, 34),
    210: GGMLType("q2_k_r4", 256, 84),
    211: GGMLType("q3_k_r4", 256, 110),
    212: GGMLType("q4_k_r4", 256, 144),
    213: GGMLType("q5_k_r4", 256, 176),
    214: GGMLType("q6_k_r4", 256, 210),
    216: GGMLType("iq2_xxs_r4", 256, 66),
    217: GGMLType("iq2_xs_r4", 256, 74),
    218: GGMLType("iq3_xxs_r4", 256, 98),
    219: GGMLType("iq1_s_r4", 32, 6, 2),
    220: GGMLType("iq4_nl_r4", 32, 18),
    221: GGMLType("iq3_s_r4", 256, 110),
    222: GGMLType("iq2_s_r4", 256, 82),
    223: GGMLType("iq4_xs_r8", 256, 136),
    229: GGMLType("iq1_m_r4", 32, 7, 2),
    230: GGMLType("bf16_r16", 1, 2),
    233: GGMLType("q6_0_r4", 32, 26),
    335: GGMLType("iq2_bn_r4", 64, 16, 4),
    337: GGMLType("iq2_k_r4", 256, 76),
    338: GGMLType("iq3_k_r4", 256, 110),
    339: GGMLType("iq4_k_r4", 256, 144),
    340: GGMLType("iq5_k_r4", 256, 176),
    344: GGMLType("iq4_ks_r4", 256, 136, 4),
    352: GGMLType("iq5_ks_r4", 256, 168, 4),
    353: GGMLType("mxfp4_r8", 32, 17),
    397: GGMLType("q8_k_r16", 256, 258),
    398: GGMLType("q8_KV_r8", 32, 32, 4),
    399: GGMLType("q8_k_r8", 256, 258),
}

IDS: dict[str, int] = {entry.name: ggml_type for ggml_type, entry in TYPES.items()}
