// The formats of four bits with levels that are not evenly spaced.
#pragma once

#include "formats.h"

namespace MLA_ISA {

// The levels of iq4_nl, raised by 127 so that they are unsigned: the zero of the codes.
constexpr Bytes16 kNonLinear = {0, 23, 44, 62, 78, 92, 105, 117, 128, 140, 152, 165, 180, 196, 216, 240};
constexpr Bytes16 kNonLinearRaised = {4, 27, 48, 66, 82, 96, 109, 121, 132, 144, 156, 169, 184, 200, 220, 244};

struct IQ4_NL : BlocksOf32<IQ4_NL, 18, 127> {
  static void unpack_block(const uint8_t* p, uint8_t* codes) { look_up_nibbles(kNonLinear, p + 2, codes); }
};

struct IQ4_XS {
  static constexpr int kBlock = 256, kBytes = 136, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const float scale = half_at(p);
    const int high = p[2] | p[3] << 8;
    for (int b = 0; b < 8; ++b) {
      const int low = p[4 + b / 2] >> (4 * (b % 2)) & 15;
      scales[b] = scale * static_cast<float>((low | (high >> (2 * b) & 3) << 4) - 32);
      offsets[b] = -127 * scales[b];
      look_up_nibbles(kNonLinear, p + 8 + 16 * b, codes + 32 * b);
    }
  }
};

struct IQ4_KS {
  static constexpr int kBlock = 256, kBytes = 136, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const float scale = float_at(row.header);
    for (int b = 0; b < 8; ++b) {
      scales[b] = scale * static_cast<float>((p[b] & 254) - 127);
      offsets[b] = -127 * scales[b];
      look_up_nibbles(p[b] & 1 ? kNonLinearRaised : kNonLinear, p + 8 + 16 * b, codes + 32 * b);
    }
  }
};

}  // namespace MLA_ISA
