// Formats of two or three values.
#pragma once

#include "formats.h"

namespace MLA_ISA {

// The first digits in base 3 of fractions of 256.
inline Bytes16 first_digits(Bytes16 x) {
  return -(reinterpret_cast<Bytes16>(x > 85) + reinterpret_cast<Bytes16>(x > 170));
}

struct TQ1_0 {
  static constexpr int kBlock = 256, kBytes = 54, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    share_scale(half_at(p + 52), 1, 8, scales, offsets);
    // Digits of one place lie side by side: of 32 bytes, of 16, and four digits of four.
    Bytes16 columns[3] = {load<Bytes16>(p), load<Bytes16>(p + 16), load<Bytes16>(p + 32)};
    for (int place = 0; place < 5; ++place) {
      store(codes + 32 * place, first_digits(columns[0]));
      store(codes + 32 * place + 16, first_digits(columns[1]));
      store(codes + 160 + 16 * place, first_digits(columns[2]));
      for (Bytes16& column : columns) column += column + column;
    }
    constexpr Bytes16 kPowers = {1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27};
    const uint32_t last = load<uint32_t>(p + 48);
    store(codes + 240, first_digits(reinterpret_cast<Bytes16>(Words4{last, last, last, last}) * kPowers));
  }
};

struct TQ2_0 {
  static constexpr int kBlock = 256, kBytes = 66, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    share_scale(half_at(p + 64), 1, 8, scales, offsets);
    unpack_pairs(p, codes);
  }
};

struct Q1_0 {
  static constexpr int kBlock = 128, kBytes = 18, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 2 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      const float scale = half_at(p);
      for (int g = 0; g < 4; ++g) {
        scales[4 * b + g] = 2 * scale;
        offsets[4 * b + g] = -scale;
        store(codes + 128 * b + 32 * g, masks_of_bits(p + 2 + 4 * g) & 1);
      }
    }
  }
};

struct IQ1_BN {
  static constexpr int kBlock = 64, kBytes = 13, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    // Of 16 weights, 15 are the digits of three bytes, last ones first, and one is a digit of the last byte.
    constexpr Bytes16 kFrom[4] = {{0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 15},
                                  {3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 15},
                                  {6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 11, 11, 11, 11, 11, 15},
                                  {12, 12, 12, 12, 12, 13, 13, 13, 13, 13, 14, 14, 14, 14, 14, 15}};
    constexpr uint8_t kLast[4] = {81, 27, 9, 3};
    const uint8_t* p = row.blocks + chunk * 4 * kBytes;
    share_scale(half_at(row.header), 1, 2 * blocks, scales, offsets);
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      const Longs2 overlapping = {load<uint64_t>(p), load<uint64_t>(p + 5)};  // of 13 bytes
      const Bytes16 packed = reinterpret_cast<Bytes16>(overlapping);
      for (int g = 0; g < 4; ++g) {
        const Bytes16 powers = {81, 27, 9, 3, 1, 81, 27, 9, 3, 1, 81, 27, 9, 3, 1, kLast[g]};
        store(codes + 64 * b + 16 * g, first_digits(look_up(packed, kFrom[g]) * powers));
      }
    }
  }
};

struct IQ2_BN {
  static constexpr int kBlock = 64, kBytes = 16, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 4 * kBytes;
    share_scale(float_at(row.header), 1, 2 * blocks, scales, offsets);
    for (int b = 0; b < blocks; ++b, p += kBytes)
      for (int k = 0; k < 4; ++k) store(codes + 64 * b + 16 * k, load<Bytes16>(p) >> (2 * k) & 3);
  }
};

}  // namespace MLA_ISA
