// The trellises of ik_llama.cpp: a seed of 16 bits or so yields the states of 4 or 8 neighbouring weights.
//
// A state is the seed times a power of the multiplier, modulo 2 ** 32; its code is the sum of the low 6 bits of its
// bytes, 126 too high.
#pragma once

#include "formats_iqk.h"

namespace MLA_ISA {

constexpr int kTrellisZero = 126;

// The first power of the multiplier, the second and so on.
constexpr uint32_t power(int step) { return step < 0 ? 1 : 0xCBAC1FED * power(step - 1); }

// 8 seeds, stored in 16 bits each from p on: they begin at 4096.
inline Words8 seeds_at(const uint8_t* p) {
#if defined(__AVX2__)
  return reinterpret_cast<Words8>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(load<Bytes16>(p)))) + 4096;
#else
  typedef uint16_t Seeds __attribute__((vector_size(16)));
  return __builtin_convertvector(load<Seeds>(p), Words8) + 4096;
#endif
}

// Stores 32 seeds of so many low and high bits.
inline void store_seeds(Bytes32 low, Bytes32 high, uint8_t* seeds) {
  store(seeds, __builtin_shuffle(low, high, kPairs));
  store(seeds + 32, __builtin_shuffle(low, high, kPairs + 16));
}

// Returns 32 codes: lane i has the seed of codes 4 * i to 4 * i + 3, and `powers[k]` what it takes to code 4 * i + k.
inline Bytes32 codes_of(Words8 seeds, const Words8* powers) {
  Words8 codes = {};
  for (int k = 3; k >= 0; --k) {
    const Words8 parts = seeds * powers[k] & 0x3F3F3F3F;
#if defined(__AVX512VNNI__)
    codes = reinterpret_cast<Words8>(_mm256_dpbusd_epi32(reinterpret_cast<__m256i>(codes << 8),
                                                         reinterpret_cast<__m256i>(parts), _mm256_set1_epi8(1)));
#else
    codes = codes << 8 | parts * 0x01010101 >> 24;  // at most 252: no carry is lost
#endif
  }
  return reinterpret_cast<Bytes32>(codes);
}

constexpr Words8 kPowersOf4[4] = {Words8{} + power(0), Words8{} + power(1), Words8{} + power(2), Words8{} + power(3)};

// For lanes of which two have the same seed.
constexpr Words8 powers_of_8(int k) {
  const uint32_t p = power(k), q = power(k + 4);
  return Words8{p, q, p, q, p, q, p, q};
}
constexpr Words8 kPowersOf8[4] = {powers_of_8(0), powers_of_8(1), powers_of_8(2), powers_of_8(3)};

// Codes of 8 seeds with 8 weights each: two runs.
inline void codes_of_eights(const uint8_t* seeds, Bytes32* runs) {
  constexpr Words8 kTwice = {0, 0, 1, 1, 2, 2, 3, 3};
  const Words8 eight = seeds_at(seeds);
  runs[0] = codes_of(__builtin_shuffle(eight, kTwice), kPowersOf8);
  runs[1] = codes_of(__builtin_shuffle(eight, kTwice + 4), kPowersOf8);
}

// Codes of 32 seeds with 8 weights each.
inline void unpack_eights(const uint8_t* seeds, uint8_t* codes) {
  for (int b = 0; b < 8; b += 2) {
    Bytes32 runs[2];
    codes_of_eights(seeds + 8 * b, runs);
    for (int i = 0; i < 2; ++i) store(codes + 32 * (b + i), runs[i]);
  }
}

// Scales whose numbers are chosen from the levels of iq4_nl.
inline void scale_runs_by_levels(float scale, Ints8 indices, float* scales, float* offsets) {
  const Bytes32 levels = look_up(kNonLinear, reinterpret_cast<Bytes32>(indices));
  const Ints8 numbers = (reinterpret_cast<Ints8>(levels) & 255) - 127;
  scale_runs<8>(scale, numbers, Ints8{}, 0, kTrellisZero, scales, offsets);
}

// Seeds of 13 bits: 32 bytes, 32 nibbles in 16 bytes, and the high nibbles of 8 bytes that begin with the scales.
struct IQ1_KT {
  static constexpr int kBlock = 256, kBytes = 56, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    scale_runs_by_levels(float_at(row.header), bytes_at(p) & 15, scales, offsets);
    constexpr Bytes32 kFours = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7};
    constexpr Bytes32 kBits = {16, 32, 64, 128, 16, 32, 64, 128, 16, 32, 64, 128, 16, 32, 64, 128,
                               16, 32, 64, 128, 16, 32, 64, 128, 16, 32, 64, 128, 16, 32, 64, 128};
    const Bytes32 top = (look_up(load<Bytes16>(p), kFours) & kBits) != 0 ? Bytes32{} + 16 : Bytes32{};
    const Bytes16 packed = load<Bytes16>(p + 40);
    uint8_t seeds[64];
    store_seeds(load<Bytes32>(p + 8), join(packed & 15, packed >> 4) | top, seeds);
    unpack_eights(seeds, codes);
  }
};

struct IQ2_KT {
  static constexpr int kBlock = 256, kBytes = 68, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    scale_runs_by_levels(float_at(row.header), nibble_planes_at(p), scales, offsets);
    unpack_eights(p + 4, codes);
  }
};

// The values are magnitudes, with a bit each that is set for negative ones.
struct IQ3_KT {
  static constexpr int kBlock = 256, kBytes = 100, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    scale_runs<8>(float_at(row.header), nibble_planes_at(p), Ints8{}, 0, kTrellisZero, scales, offsets);
    const Bytes32 signs = load<Bytes32>(p + 68);
    for (int b = 0; b < 8; b += 2) {
      Bytes32 runs[2];
      codes_of_eights(p + 4 + 8 * b, runs);
      for (int i = 0; i < 2; ++i) {
        const Bytes32 mirrored = 2 * kTrellisZero - runs[i];
        const Bytes32 positive = runs[i] > mirrored ? runs[i] : mirrored, negative = 2 * kTrellisZero - positive;
        const uint8_t bit = static_cast<uint8_t>(1 << (b + i));
        store(codes + 32 * (b + i), (signs & bit) != 0 ? negative : positive);
      }
    }
  }
};

// 64 seeds with 4 weights each: 64 bytes and 64 nibbles in 32 bytes. A run has a word of 32 bits: 8 times the 3 bits
// above them, 7 bits of the scale and, lowest, the top bit of all its seeds.
struct IQ4_KT {
  static constexpr int kBlock = 256, kBytes = 128, kGroup = 32;
  typedef uint64_t Longs __attribute__((vector_size(32)));

  // Bits 4 to 7 of the high bytes of 32 seeds, which have 4 words.
  static Bytes32 top_bits(const uint8_t* p) {
    const Longs words = {load<uint32_t>(p), load<uint32_t>(p + 4), load<uint32_t>(p + 8), load<uint32_t>(p + 12)};
    Longs spread = words >> 8;
    spread = (spread | spread << 20) & 0x00000FFF00000FFF;
    spread = (spread | spread << 10) & 0x003F003F003F003F;
    spread = (spread | spread << 5) & 0x0707070707070707;
    return reinterpret_cast<Bytes32>(spread << 4 | (-(words & 1) & 0x8080808080808080));
  }

  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const Ints8 numbers = (load<Ints8>(p) >> 1 & 127) - 64;
    scale_runs<8>(float_at(row.header), numbers, Ints8{}, 0, kTrellisZero, scales, offsets);
    const Bytes32 packed = load<Bytes32>(p + 96);
    uint8_t seeds[128];
    store_seeds(load<Bytes32>(p + 32), (packed & 15) | top_bits(p), seeds);
    store_seeds(load<Bytes32>(p + 64), packed >> 4 | top_bits(p + 16), seeds + 64);
    for (int b = 0; b < 8; ++b) store(codes + 32 * b, codes_of(seeds_at(seeds + 16 * b), kPowersOf4));
  }
};

}  // namespace MLA_ISA
