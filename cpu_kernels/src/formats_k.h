// The k-quants: superblocks of 256 with quantised scales.
#pragma once

#include "formats.h"

namespace MLA_ISA {

struct Q2_K {
  static constexpr int kBlock = 256, kBytes = 84, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const float scale = half_at(p + 80), minimum = -half_at(p + 82);
    for (int b = 0; b < 16; ++b) {
      scales[b] = scale * static_cast<float>(p[b] & 15);
      offsets[b] = minimum * static_cast<float>(p[b] >> 4);
    }
    unpack_pairs(p + 16, codes);
  }
};

struct Q3_K {
  static constexpr int kBlock = 256, kBytes = 110, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const float scale = half_at(p + 108);
    // Four bytes of four bits, four of two bits: each word of four scales has its own shift of both.
    uint32_t words[4], low[2], high;
    std::memcpy(low, p + 96, 8);
    std::memcpy(&high, p + 104, 4);
    for (int w = 0; w < 4; ++w)
      words[w] = (low[w % 2] >> (4 * (w / 2)) & 0x0F0F0F0F) | (high >> (2 * w) & 0x03030303) << 4;
    int8_t whole[16];
    std::memcpy(whole, words, 16);
    for (int b = 0; b < 16; ++b) {
      scales[b] = scale * static_cast<float>(whole[b] - 32);
      offsets[b] = -4 * scales[b];
    }
    const Bytes32 thirds = load<Bytes32>(p);
    for (int half = 0; half < 2; ++half) {
      const Bytes32 pairs = load<Bytes32>(p + 32 + 32 * half);
      for (int k = 0; k < 4; ++k)
        store(codes + 128 * half + 32 * k, (pairs >> (2 * k) & 3) | (thirds >> (4 * half + k) & 1) << 2);
    }
  }
};

// The 6-bit scales and minima of q4_K and q5_K.
inline void unpack_k_scales(const uint8_t* p, float* scales, float* offsets) {
  const float scale = half_at(p), minimum = -half_at(p + 2);
  p += 4;
  for (int b = 0; b < 4; ++b) {
    scales[b] = scale * static_cast<float>(p[b] & 63);
    offsets[b] = minimum * static_cast<float>(p[4 + b] & 63);
    scales[4 + b] = scale * static_cast<float>((p[8 + b] & 15) | (p[b] >> 6) << 4);
    offsets[4 + b] = minimum * static_cast<float>((p[8 + b] >> 4) | (p[4 + b] >> 6) << 4);
  }
}

struct Q4_K {
  static constexpr int kBlock = 256, kBytes = 144, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    unpack_k_scales(p, scales, offsets);
    for (int pair = 0; pair < 4; ++pair)
      for (int i = 0; i < 32; ++i) {
        codes[64 * pair + i] = p[16 + 32 * pair + i] & 15;
        codes[64 * pair + 32 + i] = p[16 + 32 * pair + i] >> 4;
      }
  }
};

struct Q5_K {
  static constexpr int kBlock = 256, kBytes = 176, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    unpack_k_scales(p, scales, offsets);
    for (int pair = 0; pair < 4; ++pair)
      for (int i = 0; i < 32; ++i) {
        const uint8_t low = p[48 + 32 * pair + i], high = p[16 + i] >> (2 * pair);
        codes[64 * pair + i] = (low & 15) | (high & 1) << 4;
        codes[64 * pair + 32 + i] = (low >> 4) | (high & 2) << 3;
      }
  }
};

struct Q6_K {
  static constexpr int kBlock = 256, kBytes = 210, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const float scale = half_at(p + 208);
    for (int b = 0; b < 16; ++b) {
      scales[b] = scale * static_cast<float>(static_cast<int8_t>(p[192 + b]));
      offsets[b] = -32 * scales[b];
    }
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 32; ++i) {
        const uint8_t first = p[64 * half + i], second = p[64 * half + 32 + i], high = p[128 + 32 * half + i];
        uint8_t* out = codes + 128 * half + i;
        out[0] = (first & 15) | (high & 3) << 4;
        out[32] = (second & 15) | (high & 12) << 2;
        out[64] = (first >> 4) | (high & 48);
        out[96] = (second >> 4) | (high & 192) >> 2;
      }
  }
};

}  // namespace MLA_ISA
