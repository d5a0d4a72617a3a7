// Formats whose codes stand for 8 or 4 neighbouring weights, looked up in a codebook.
#pragma once

#include "formats.h"

namespace MLA_ISA {

typedef uint64_t Longs4 __attribute__((vector_size(32)));

// 32 weights of 4 codes, or of 8.
template <class Code>
inline Bytes32 eights(const uint8_t* book, const Code* codes) {
  const auto at = [&](int i) { return load<uint64_t>(book + 8 * codes[i]); };
  return reinterpret_cast<Bytes32>(Longs4{at(0), at(1), at(2), at(3)});
}

template <class Code>
inline Bytes32 fours(const uint8_t* book, const Code* codes) {
  const auto at = [&](int i) { return load<uint32_t>(book + 4 * codes[i]); };
  return reinterpret_cast<Bytes32>(Words8{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)});
}

constexpr int kZero = 64;  // the code of 0 where weights have signs

// Magnitudes below 64, negative where a bit at `signs` is set.
inline Bytes32 with_signs(Bytes32 magnitudes, const uint8_t* signs) {
  const Bytes32 masks = masks_of_bits(signs);
  return (magnitudes ^ masks) - masks + kZero;
}

// The bytes of two vectors, in turn.
struct Interleaved {
  Bytes16 low, high;
  Interleaved(Bytes16 first, Bytes16 second) {
    constexpr Bytes16 kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    low = __builtin_shuffle(first, second, kLow);
    high = __builtin_shuffle(first, second, kLow + 8);
  }
};

template <int kBytes>
inline Bytes16 load_first(const uint8_t* p) {
  uint64_t word = 0;
  std::memcpy(&word, p, kBytes);
  return reinterpret_cast<Bytes16>(Longs2{word, 0});
}

// 16 codes of a low byte and of high bits.
inline void join_codes(const uint8_t* low, Bytes16 high, uint16_t* codes) {
  const Interleaved both(load<Bytes16>(low), high);
  std::memcpy(codes, &both, 32);
}

// Scales `scale * (2 * n + 1)` of numbers of four bits, low ones first.
template <int kGroups>
inline void unpack_odd_scales(const uint8_t* p, float scale, float* scales, float* offsets) {
  const Bytes16 packed = load_first<kGroups / 2>(p);
  uint8_t numbers[16];
  store(numbers, Interleaved(packed & 15, packed >> 4).low);
  for (int g = 0; g < kGroups; ++g) {
    scales[g] = scale * static_cast<float>(2 * numbers[g] + 1);
    offsets[g] = -kZero * scales[g];
  }
}

// Eight words, `stride` bytes apart, of four times 7 signs and a scale: the eighth sign makes the negative ones even.
inline void unpack_sevens(const uint8_t* p, int stride, float scale, uint8_t* signs, float* scales, float* offsets) {
  for (int b = 0; b < 8; ++b) {
    const uint32_t word = load<uint32_t>(p + b * stride);
    scales[b] = scale * static_cast<float>(2 * (word >> 28) + 1);
    offsets[b] = -kZero * scales[b];
    uint32_t sevens = (word & 0x7F) | (word << 1 & 0x7F00) | (word << 2 & 0x7F0000) | (word << 3 & 0x7F000000);
    uint32_t parity = sevens ^ sevens >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    sevens |= (parity & 0x01010101) << 7;
    std::memcpy(signs + 4 * b, &sevens, 4);
  }
}

// The four lowest numbers of three bits, a byte for each.
inline uint32_t four_triples(uint32_t x) {
  return (x & 7) | (x << 5 & 0x700) | (x << 10 & 0x70000) | (x << 15 & 0x7000000);
}

struct IQ2_XXS {
  static constexpr int kBlock = 256, kBytes = 66, kGroup = 32;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ2_XXS];
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * kBytes, *book = kCodebook->weights;
    uint8_t signs[32];
    unpack_sevens(p + 6, 8, half_at(p) / 8, signs, scales, offsets);
    for (int b = 0; b < 8; ++b)
      store(codes + 32 * b, with_signs(eights(book, p + 2 + 8 * b), signs + 4 * b));
  }
};

struct IQ2_XS {
  static constexpr int kBlock = 256, kBytes = 74, kGroup = 16;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ2_XS];
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * kBytes, *book = kCodebook->weights;
    unpack_odd_scales<16>(p + 66, half_at(p) / 8, scales, offsets);
    uint16_t words[32];
    uint8_t signs[32];
    std::memcpy(words, p + 2, 64);
    for (int i = 0; i < 32; ++i) {
      uint8_t parity = static_cast<uint8_t>(words[i] >> 9);
      signs[i] = parity;
      parity ^= parity >> 4;
      parity ^= parity >> 2;
      parity ^= parity >> 1;
      signs[i] |= static_cast<uint8_t>(parity << 7);
      words[i] &= 511;
    }
    for (int b = 0; b < 8; ++b) store(codes + 32 * b, with_signs(eights(book, words + 4 * b), signs + 4 * b));
  }
};

struct IQ2_S {
  static constexpr int kBlock = 256, kBytes = 82, kGroup = 16;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ2_S];
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * kBytes, *book = kCodebook->weights;
    unpack_odd_scales<16>(p + 74, half_at(p) / 8, scales, offsets);
    const Bytes16 packed = load_first<8>(p + 66);
    const Bytes16 nibbles = Interleaved(packed & 15, packed >> 4).low;
    const Interleaved pairs(nibbles & 3, nibbles >> 2);
    uint16_t own[32];
    join_codes(p + 2, pairs.low, own);
    join_codes(p + 18, pairs.high, own + 16);
    for (int b = 0; b < 8; ++b) store(codes + 32 * b, with_signs(eights(book, own + 4 * b), p + 34 + 4 * b));
  }
};

struct IQ3_XXS {
  static constexpr int kBlock = 256, kBytes = 98, kGroup = 32;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ3_XXS];
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * kBytes, *book = kCodebook->weights;
    uint8_t signs[32];
    unpack_sevens(p + 66, 4, half_at(p) / 4, signs, scales, offsets);
    for (int b = 0; b < 8; ++b) store(codes + 32 * b, with_signs(fours(book, p + 2 + 8 * b), signs + 4 * b));
  }
};

struct IQ3_S {
  static constexpr int kBlock = 256, kBytes = 110, kGroup = 32;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ3_S];
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * kBytes, *book = kCodebook->weights;
    unpack_odd_scales<8>(p + 106, half_at(p), scales, offsets);
    uint8_t high[64];
    for (int i = 0; i < 2; ++i) store(high + 32 * i, masks_of_bits(p + 66 + 4 * i) & 1);
    uint16_t own[64];
    for (int i = 0; i < 64; ++i) own[i] = static_cast<uint16_t>(p[2 + i] | high[i] << 8);
    for (int b = 0; b < 8; ++b) store(codes + 32 * b, with_signs(fours(book, own + 8 * b), p + 74 + 4 * b));
  }
};

// Weights -1, 0 and 1 plus a shift of 1/8, or of -1/8 where the highest bit of their word is set; the code of 0 is 1.
struct IQ1_S {
  static constexpr int kBlock = 256, kBytes = 50, kGroup = 32;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ1];
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * kBytes, *book = kCodebook->weights;
    const float scale = half_at(p);
    uint16_t words[8];
    uint32_t triples[8];
    std::memcpy(words, p + 34, 16);
    for (int b = 0; b < 8; ++b) {
      scales[b] = scale * static_cast<float>(2 * (words[b] >> 12 & 7) + 1);
      offsets[b] = scales[b] * (static_cast<float>(words[b] >> 15) * -0.25f - 0.875f);
      triples[b] = four_triples(words[b]);
    }
    uint8_t high[32];
    std::memcpy(high, triples, 32);
    uint16_t own[32];
    for (int i = 0; i < 32; i += 16) join_codes(p + 2 + i, load<Bytes16>(high + i), own + i);
    for (int b = 0; b < 8; ++b) store(codes + 32 * b, eights(book, own + 4 * b) + 1);
  }
};

struct IQ1_S_R4 {
  static constexpr int kBlock = 32, kBytes = 6, kGroup = 32;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ1];
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * 8 * kBytes, *book = kCodebook->weights;
    const float scale = half_at(row.header);
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      const int word = p[4] | p[5] << 8;
      scales[b] = scale * static_cast<float>(2 * (word >> 12 & 7) + 1);
      offsets[b] = scales[b] * (static_cast<float>(word >> 15) * -0.25f - 0.875f);
      int own[4];
      for (int i = 0; i < 4; ++i) own[i] = p[i] | (word >> (3 * i) & 7) << 8;
      store(codes + 32 * b, eights(book, own) + 1);
    }
  }
};

constexpr int kNine = 9;  // the code of 0 where a step is an eighth

// Eight times 32 weights of -1, 0 and 1, with a step of one down for each 8 whose nibble has bit 3 set, and up for the
// others; raised by 9. `first` is the first of their four nibbles.
inline Bytes32 with_shifts(Bytes32 weights, Bytes16 nibbles, int first) {
  const Bytes16 shifts = kNine + 1 - (nibbles >> 2 & 2);
  const Bytes16 from = Bytes16{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1} + static_cast<uint8_t>(first);
  return (weights << 3) + join(look_up(shifts, from), look_up(shifts, from + 2));
}

struct IQ1_M {
  static constexpr int kBlock = 256, kBytes = 56, kGroup = 16;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ1];
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * kBytes, *book = kCodebook->weights;
    uint16_t half = 0;
    uint32_t triples[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = p[48 + 2 * i] | p[49 + 2 * i] << 8;
      half |= static_cast<uint16_t>(word >> 12 << (4 * i));
      triples[i] = four_triples(word);
    }
    const float scale = half_at(reinterpret_cast<const uint8_t*>(&half)) / 8;
    uint8_t numbers[16];
    std::memcpy(numbers, triples, 16);
    for (int g = 0; g < 16; ++g) {
      scales[g] = scale * static_cast<float>(2 * numbers[g] + 1);
      offsets[g] = -kNine * scales[g];
    }
    const Interleaved nibbles(load<Bytes16>(p + 32) & 15, load<Bytes16>(p + 32) >> 4);
    uint16_t own[32];
    join_codes(p, nibbles.low & 7, own);
    join_codes(p + 16, nibbles.high & 7, own + 16);
    for (int b = 0; b < 8; ++b) {
      const Bytes32 weights = eights(book, own + 4 * b);
      store(codes + 32 * b, with_shifts(weights, b < 4 ? nibbles.low : nibbles.high, 4 * (b % 4)));
    }
  }
};

struct IQ1_M_R4 {
  static constexpr int kBlock = 32, kBytes = 7, kGroup = 16;
  static constexpr const mla::Codebook* kCodebook = &mla::codebooks[mla::kIQ1];
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t *p = row.blocks + chunk * 8 * kBytes, *book = kCodebook->weights;
    const float scale = half_at(row.header) / 8;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      for (int half = 0; half < 2; ++half) {
        scales[2 * b + half] = scale * static_cast<float>(p[6] >> (4 * half) & 15);
        offsets[2 * b + half] = -kNine * scales[2 * b + half];
      }
      const uint32_t word = p[4] | p[5] << 8;
      const uint32_t nibbles = (word & 15) | (word << 4 & 0xF00) | (word << 8 & 0xF0000) | (word << 12 & 0xF000000);
      unsigned own[4];
      for (int i = 0; i < 4; ++i) own[i] = p[i] | (nibbles >> (8 * i) & 7) << 8;
      store(codes + 32 * b, with_shifts(eights(book, own), reinterpret_cast<Bytes16>(Longs2{nibbles, 0}), 0));
    }
  }
};

}  // namespace MLA_ISA
