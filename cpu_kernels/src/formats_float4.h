// Formats of four-bit floats (E2M1) with scales of a byte.
#pragma once

#include "formats.h"

namespace MLA_ISA {

// Twice the numbers of E2M1, raised by 12 so that they are unsigned.
constexpr Bytes16 kTwiceE2M1 = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct MXFP4 {
  static constexpr int kBlock = 32, kBytes = 17, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      // Half of 2 ** (p[0] - 127); the two smallest are subnormal.
      scales[b] = float_of_bits(p[0] < 2 ? 1u << (21 + p[0]) : (p[0] - 1u) << 23);
      offsets[b] = -12 * scales[b];
      look_up_nibbles(kTwiceE2M1, p + 1, codes + 32 * b);
    }
  }
};

// Half of a number in E4M3; its sign is not read, and what would be NaN is 0.
inline float half_of_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7F;
  const bool subnormal = magnitude < 8;
  const float value = float_of_bits((magnitude << 20) + ((subnormal ? 120u : 119u) << 23));
  return magnitude == 0x7F ? 0 : subnormal ? value - 0x1p-7f : value;
}

struct NVFP4 {
  static constexpr int kBlock = 64, kBytes = 36, kGroup = 16;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 4 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      for (int g = 0; g < 4; ++g) {
        scales[4 * b + g] = half_of_e4m3(p[g]);
        offsets[4 * b + g] = -12 * scales[4 * b + g];
      }
      for (int half = 0; half < 2; ++half) {
        const Bytes16 packed = load<Bytes16>(p + 4 + 16 * half);
        const Longs2 low = reinterpret_cast<Longs2>(look_up(kTwiceE2M1, packed & 15));
        const Longs2 high = reinterpret_cast<Longs2>(look_up(kTwiceE2M1, packed >> 4));
        store(codes + 64 * b + 32 * half, __builtin_shuffle(low, high, Longs2{0, 2}));
        store(codes + 64 * b + 32 * half + 16, __builtin_shuffle(low, high, Longs2{1, 3}));
      }
    }
  }
};

}  // namespace MLA_ISA
