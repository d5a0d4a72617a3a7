// Formats with blocks of 32 and a float16 scale, and their kin of one scale for more.
#pragma once

#include "formats.h"

namespace MLA_ISA {

struct Q8_0 {
  static constexpr int kBlock = 32, kBytes = 34, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      scales[b] = half_at(p);
      offsets[b] = -128 * scales[b];
      for (int i = 0; i < 32; ++i) codes[32 * b + i] = p[2 + i] ^ 0x80;
    }
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

struct Q4_0 {
  static constexpr int kBlock = 32, kBytes = 18, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      scales[b] = half_at(p);
      offsets[b] = -8 * scales[b];
      const Bytes16 packed = load<Bytes16>(p + 2);
      store(codes + 32 * b, packed & 15);
      store(codes + 32 * b + 16, packed >> 4);
    }
  }
};

struct Q4_1 {
  static constexpr int kBlock = 32, kBytes = 20, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      scales[b] = half_at(p);
      offsets[b] = half_at(p + 2);
      const Bytes16 packed = load<Bytes16>(p + 4);
      store(codes + 32 * b, packed & 15);
      store(codes + 32 * b + 16, packed >> 4);
    }
  }
};

// Nibbles at p + 4, low ones first, with fifth bits at p.
inline void unpack_fives(const uint8_t* p, uint8_t* codes) {
  const Bytes32 high = masks_of_bits(p) & 16;
  const Bytes16 packed = load<Bytes16>(p + 4);
  store(codes, join(packed & 15, packed >> 4) | high);
}

struct Q5_0 {
  static constexpr int kBlock = 32, kBytes = 22, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      scales[b] = half_at(p);
      offsets[b] = -16 * scales[b];
      unpack_fives(p + 2, codes + 32 * b);
    }
  }
};

struct Q5_1 {
  static constexpr int kBlock = 32, kBytes = 24, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      scales[b] = half_at(p);
      offsets[b] = half_at(p + 2);
      unpack_fives(p + 4, codes + 32 * b);
    }
  }
};

struct Q6_0 {
  static constexpr int kBlock = 32, kBytes = 26, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      scales[b] = half_at(p);
      offsets[b] = -32 * scales[b];
      uint64_t bits[2];
      std::memcpy(bits, p + 2, 8);
      bits[1] = bits[0] >> 4;
      const Bytes16 low = load<Bytes16>(p + 10), high = load<Bytes16>(reinterpret_cast<const uint8_t*>(bits));
      store(codes + 32 * b, (low & 15) | (high & 3) << 4);
      store(codes + 32 * b + 16, (low >> 4) | (high & 12) << 2);
    }
  }
};

}  // namespace MLA_ISA
