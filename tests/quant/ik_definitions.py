"""What the blocks of ik_llama.cpp mean, weight by weight: slow, plain, and apart from the decoders.

Each function returns the scale and the value of weight e of a block, a list B of bytes; the weight is
`(d * scale) * value` in float32. Weight e is at place r of run b of 32, which is place j of half h of it.
"""

import functools

import gguf
import numpy as np

T2 = [-31, -13, 1, 17, -26, -8, 6, 22]
T3 = [-63, -40, -23, -10, 1, 13, 28, 47, -59, -36, -19, -6, 5, 17, 32, 51]
T4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
T4 = [*T4, -123, -100, -79, -61, -45, -31, -18, -6, 5, 17, 29, 42, 57, 73, 93, 117]
T5 = [-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6]
T5 = [*T5, -1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121]
T5 = [*T5, -124, -112, -101, -90, -81, -72, -63, -55, -48, -41, -34, -28, -22, -16, -10, -4]
T5 = [*T5, 1, 7, 13, 19, 25, 31, 38, 45, 53, 61, 70, 79, 89, 99, 111, 123]
T6 = [round(-127 + q * (6.2568 + q * (-0.11218 + q * 0.0011972))) for q in range(64)]
T6 = [*T6, *(value + 1 for value in T6)]
PAIRS = """
    e9c1 0dc1 c1d8 f6d8 0dd8 2fd8 d8e9 e9e9 01e9 0de9 1ce9 c1f6 01f6 0df6 2ff6 e901
    f601 0101 0d01 1c01 d80d e90d f60d 010d 0d0d c11c e91c 011c 1c1c 2f1c e92f 0d2f
"""  # the first of a pair is the low byte
PAIRS = [int(pair, 16) for pair in PAIRS.split()]


def bit(x, k):
    return x >> k & 1


def nib(x, k):
    return x >> 4 * k & 15


def u16(B, at):
    return B[at] | B[at + 1] << 8


def u32(B, at):
    return u16(B, at) | u16(B, at + 2) << 16


def signed(byte):
    return byte - 256 if byte > 127 else byte


def q6_0(B, e, b, r, h, j):
    return 1, (nib(B[10 + j], h) | (B[2 + j % 8] >> 4 * (j // 8) + 2 * h & 3) << 4) - 32


def signed_bytes(B, e, b, r, h, j):
    """The last bytes of a block are its codes: q8_KV, and a row of q8_k_r8."""
    return 1, signed(B[len(B) % 32 + e])


def iq2_k(B, e, b, r, h, j):
    code = B[12 + 32 * (b // 4) + r] >> 2 * (b % 4) & 3
    return nib(B[4 + b], h) - 8, T2[code + 4 * bit(u16(B, 2), 2 * b + h)]


def iq2_ks(B, e, b, r, h, j):
    code = B[6 + 32 * (b // 4) + r] >> 2 * (b % 4) & 3
    scale = nib(B[2 + b // 2], b % 2) | bit(u16(B, 0), 8 + b) << 4
    return scale - 16, T2[code + 4 * bit(u16(B, 0), b)]


def iq2_kl(B, e, b, r, h, j):
    pair = PAIRS[nib(B[6 + 16 * (b // 2) + r // 2], b % 2) | bit(B[70 + r // 2], b) << 4]
    scale = nib(B[2 + b % 4], b // 4) | (u16(B, 0) >> 2 * b & 3) << 4
    return scale - 32, signed(pair >> 8 * (e % 2) & 255)


def iq3_k(B, e, b, r, h, j):
    code = B[14 + 32 * (b // 4) + r] >> 2 * (b % 4) & 3 | bit(B[78 + r], b) << 2
    sign = -1 if bit(u16(B, 4), 2 * b + h) else 1
    return sign * (2 * nib(B[6 + b], h) + 1), T3[code + 8 * bit(u16(B, 2), 2 * b + h)]


def iq3_ks(B, e, b, r, h, j):
    code = B[6 + 32 * (b // 4) + r] >> 2 * (b % 4) & 3 | bit(B[70 + r], b) << 2
    scale = nib(B[2 + b % 4], b // 4) | bit(u16(B, 0), b) << 4
    return scale - 16, T3[code + 8 * bit(u16(B, 0), 8 + b)]


def iq4_k(B, e, b, r, h, j):
    scale = nib(B[8 + b], h) | (B[4 + b // 2] >> 4 * (b % 2) + 2 * h & 3) << 4
    return scale - 32, T4[nib(B[16 + 16 * b + j], h) + 16 * bit(u16(B, 2), 2 * b + h)]


def iq4_ks(B, e, b, r, h, j):
    return (B[b] & 254) - 127, T4[nib(B[8 + 16 * b + j], h) + 16 * (B[b] & 1)]


def iq4_kss(B, e, b, r, h, j):
    scale = sum(bit(u16(B, 16 * b + 2 * k), 0) << k for k in range(8))
    word = u16(B, 16 * b + j // 2 * 2) & 0xFFFE
    word ^= word >> 1
    return (scale & 254) - 127, T4[nib(word >> 8 * (j % 2), h) + 16 * (scale & 1)]


def iq5_k(B, e, b, r, h, j):
    code = nib(B[16 + 32 * (b // 2) + r], b % 2) | bit(B[144 + r], b) << 4
    return iq4_k(B, e, b, r, h, j)[0], T5[code + 32 * bit(u16(B, 2), 2 * b + h)]


def iq5_ks(B, e, b, r, h, j):
    code = nib(B[8 + 32 * (b // 2) + r], b % 2) | bit(B[136 + r], b) << 4
    return (B[b] & 254) - 127, T5[code + 32 * (B[b] & 1)]


def iq6_k(B, e, b, r, h, j):
    code = nib(B[20 + 32 * (b // 2) + r], b % 2) | (B[148 + 32 * (b // 4) + r] >> 2 * (b % 4) & 3) << 4
    return signed(B[4 + 2 * b + h]), T6[code + 64 * bit(u16(B, 2), 2 * b + h)]


def trellis(seed, step):
    x = seed
    for _ in range(step + 1):
        x = x * 0xCBAC1FED % 2**32
    return sum(x >> shift & 0x3F for shift in (0, 8, 16, 24)) - 126


def iq1_kt(B, e, b, r, h, j):
    g = r // 8
    seed = B[8 + 4 * b + g] | nib(B[40 + 4 * (b % 4) + g], b // 4) << 8 | bit(B[b], 4 + g) << 12
    return T4[B[b] & 15], trellis(seed + 4096, e % 8)


def iq2_kt(B, e, b, r, h, j):
    return T4[nib(B[b % 4], b // 4)], trellis(u16(B, 4 + 2 * (e // 8)) + 4096, e % 8)


def iq3_kt(B, e, b, r, h, j):
    """A sign makes a negative zero of zero."""
    value = float(abs(trellis(u16(B, 4 + 2 * (e // 8)) + 4096, e % 8)))
    return nib(B[b % 4], b // 4), -value if bit(B[68 + r], b) else value


def iq4_kt(B, e, b, r, h, j):
    J = e // 4
    word = u32(B, 4 * b)
    seed = B[32 + J] | nib(B[96 + J % 32], J // 32) << 8 | (word >> 8 + 3 * (J % 8) & 7) << 12
    return (word >> 1 & 127) - 64, trellis(seed + 4096 + 32768 * (word & 1), e % 4)


def ternary(byte, power):
    shifted = byte * 3**power & 255
    return (shifted + (shifted >> 1) >> 7) - 1


def iq1_bn(B, e, b, r, h, j):
    g = e // 16
    return 1, ternary(B[12], 4 - g) if j == 15 else ternary(B[3 * g + j // 5], 4 - j % 5)


def iq2_bn(B, e, b, r, h, j):
    return 1, (B[j] >> 2 * (e // 16) & 3) - 1


@functools.cache
def grid():
    """Returns the codebook of mainline's IQ1_S: 2048 times 8 of -1, 0 and 1."""
    gguf.quants.IQ1_S.init_grid()
    return gguf.quants.IQ1_S.grid.reshape(2048, 8).tolist()


def iq1_s_r4(B, e, b, r, h, j):
    g, word = r // 8, u16(B, 4)
    shift = -0.125 if bit(word, 15) else 0.125
    return 2 * (word >> 12 & 7) + 1, grid()[B[g] | (word >> 3 * g & 7) << 8][e % 8] + shift


def iq1_m_r4(B, e, b, r, h, j):
    g = r // 8
    nibble = nib(B[4 + h], g % 2)
    shift = -0.125 if bit(nibble, 3) else 0.125
    return nib(B[6], h), grid()[B[g] | (nibble & 7) << 8][e % 8] + shift


# name -> where the scale d is, its type, and the definition of a weight
DEFINITIONS = {
    "q6_0": ("block", "<f2", q6_0),
    "q8_KV": ("header", "<f4", signed_bytes),
    "iq2_k": ("block", "<f2", iq2_k),
    "iq3_k": ("block", "<f2", iq3_k),
    "iq4_k": ("block", "<f2", iq4_k),
    "iq5_k": ("block", "<f2", iq5_k),
    "iq6_k": ("block", "<f2", iq6_k),
    "iq2_ks": ("header", "<f2", iq2_ks),
    "iq2_kl": ("header", "<f2", iq2_kl),
    "iq3_ks": ("header", "<f2", iq3_ks),
    "iq4_ks": ("header", "<f4", iq4_ks),
    "iq4_kss": ("header", "<f4", iq4_kss),
    "iq5_ks": ("header", "<f4", iq5_ks),
    "iq1_kt": ("header", "<f4", iq1_kt),
    "iq2_kt": ("header", "<f4", iq2_kt),
    "iq3_kt": ("header", "<f4", iq3_kt),
    "iq4_kt": ("header", "<f4", iq4_kt),
    "iq1_bn": ("header", "<f2", iq1_bn),
    "iq2_bn": ("header", "<f4", iq2_bn),
    "iq1_s_r4": ("header", "<f2", iq1_s_r4),
    "iq1_m_r4": ("header", "<f2", iq1_m_r4),
    "q8_k_r8": ("block", "<f2", signed_bytes),
}


def scale_of(name, blocks, header):
    """Returns d of the row or of each block as float32[..., 1 or n, 1]."""
    source, kind, _ = DEFINITIONS[name]
    held = blocks if source == "block" else header[..., None, :]
    return np.ascontiguousarray(held[..., : np.dtype(kind).itemsize]).view(kind).astype(np.float32)


def parts_of(name, blocks, block_size):
    """Returns scale and value of every weight, float32[..., n, size], of blocks uint8[..., n, bytes]."""
    weight = DEFINITIONS[name][2]
    places = [(e, e // 32, e % 32, e % 32 // 16, e % 16) for e in range(block_size)]
    rows = blocks.reshape(-1, blocks.shape[-1]).tolist()
    parts = np.array([[weight(block, *place) for place in places] for block in rows], np.float32)
    return np.moveaxis(parts.reshape(*blocks.shape[:-1], block_size, 2), -1, 0)


def decode_by_definition(name, blocks, header, block_size):
    """Returns float32[..., n, block_size] of uint8[..., n, block_bytes] and uint8[..., header_bytes]."""
    scale, value = parts_of(name, blocks, block_size)
    with np.errstate(all="ignore"):
        return scale_of(name, blocks, header) * scale * value
