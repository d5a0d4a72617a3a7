// Formats with blocks of 32 and a float16 scale, and their kin of one scale for more.
#pragma once

#include "formats.h"

namespace MLA_ISA {

struct Q8_0 : BlocksOf32<Q8_0, 34, 128> {
  static void unpack_block(const uint8_t* p, uint8_t* codes) {
    for (int i = 0; i < 32; ++i) codes[i] = p[2 + i] ^ 0x80;
  }
};

// Of a row that has one scale.
struct Q8_KV {
  static constexpr int kBlock = 32, kBytes = 32, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    share_scale(float_at(row.header), 128, blocks, scales, offsets);
    for (int i = 0; i < 32 * blocks; ++i) codes[i] = p[i] ^ 0x80;
  }
};

// Blocks of 256 with one scale.
struct Q8_K_R8 {
  static constexpr int kBlock = 256, kBytes = 258, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    share_scale(half_at(p), 128, 8, scales, offsets);
    for (int i = 0; i < 256; ++i) codes[i] = p[2 + i] ^ 0x80;
  }
};

struct Q4_0 : BlocksOf32<Q4_0, 18, 8> {
  static void unpack_block(const uint8_t* p, uint8_t* codes) { unpack_nibbles(p + 2, codes); }
};

struct Q4_1 : BlocksOf32<Q4_1, 20, 0> {
  static void unpack_block(const uint8_t* p, uint8_t* codes) { unpack_nibbles(p + 4, codes); }
};

// Nibbles at p + 4, low ones first, with fifth bits at p.
inline void unpack_fives(const uint8_t* p, uint8_t* codes) {
  const Bytes32 high = masks_of_bits(p) & 16;
  const Bytes16 packed = load<Bytes16>(p + 4);
  store(codes, join(packed & 15, packed >> 4) | high);
}

struct Q5_0 : BlocksOf32<Q5_0, 22, 16> {
  static void unpack_block(const uint8_t* p, uint8_t* codes) { unpack_fives(p + 2, codes); }
};

struct Q5_1 : BlocksOf32<Q5_1, 24, 0> {
  static void unpack_block(const uint8_t* p, uint8_t* codes) { unpack_fives(p + 4, codes); }
};

struct Q6_0 : BlocksOf32<Q6_0, 26, 32> {
  static void unpack_block(const uint8_t* p, uint8_t* codes) {
    uint64_t bits[2];
    std::memcpy(bits, p + 2, 8);
    bits[1] = bits[0] >> 4;
    const Bytes16 low = load<Bytes16>(p + 10), high = load<Bytes16>(reinterpret_cast<const uint8_t*>(bits));
    store(codes, (low & 15) | (high & 3) << 4);
    store(codes + 16, (low >> 4) | (high & 12) << 2);
  }
};

}  // namespace MLA_ISA
