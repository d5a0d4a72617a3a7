// The formats of ik_llama.cpp with levels that are not evenly spaced, in 8 runs of 32 or 16 runs of 16 weights.
//
// A run may take another version of the levels, all of which lie a little higher: that goes into its offset. Levels
// are raised so that they are unsigned, by `zero`.
#pragma once

#include "formats_iq4.h"

namespace MLA_ISA {

// 8 or 16 whole numbers, one for each run of a block, and as many floats.
template <int kRuns>
struct PerRun {
  typedef int32_t Ints __attribute__((vector_size(4 * kRuns)));
  typedef float Floats __attribute__((vector_size(4 * kRuns)));
};
typedef PerRun<8>::Ints Ints8;
typedef PerRun<16>::Ints Ints16;

constexpr Ints8 kPlaces8 = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr Ints16 kPlaces16 = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline int word16(const uint8_t* p) { return p[0] | p[1] << 8; }
inline int word32(const uint8_t* p) { return load<int>(p); }

// 16 numbers of 4 bits, low bits first.
inline Ints16 nibbles_at(const uint8_t* p) {
  const Ints16 words = kPlaces16 < 8 ? Ints16{} + word32(p) : Ints16{} + word32(p + 4);
  return words >> 4 * (kPlaces16 % 8) & 15;
}

// 8 numbers of 4 bits: the low ones of 4 bytes, then the high ones.
inline Ints8 nibble_planes_at(const uint8_t* p) { return word32(p) >> (kPlaces8 % 4 * 8 + kPlaces8 / 4 * 4) & 15; }

// 8 bytes.
inline Ints8 bytes_at(const uint8_t* p) {
  const Ints8 words = kPlaces8 < 4 ? Ints8{} + word32(p) : Ints8{} + word32(p + 4);
  return words >> 8 * (kPlaces8 % 4) & 255;
}

// Stores scales and offsets of runs, of which some have levels that lie higher: their `versions` are 1, not 0.
template <int kRuns>
inline void scale_runs(float scale, typename PerRun<kRuns>::Ints numbers, typename PerRun<kRuns>::Ints versions,
                       int higher, int zero, float* scales, float* offsets) {
  using Floats = typename PerRun<kRuns>::Floats;
  const Floats all = scale * __builtin_convertvector(numbers, Floats);
  const Floats zeros = __builtin_convertvector(versions * higher - zero, Floats) * all;
  std::memcpy(scales, &all, sizeof(all));
  std::memcpy(offsets, &zeros, sizeof(zeros));
}

// Scales of 6 bits: 8 bytes with the low 4 from p + 8 on, 4 with the high 2 from p + 4 on.
inline void scale_runs_of_6_bits(const uint8_t* p, int higher, int zero, float* scales, float* offsets) {
  const Ints16 high = word32(p + 4) >> 2 * kPlaces16 & 3;
  const Ints16 versions = word16(p + 2) >> kPlaces16 & 1;
  scale_runs<16>(half_at(p), nibbles_at(p + 8) + 16 * high - 32, versions, higher, zero, scales, offsets);
}

// Scales of 7 bits of a byte, the lowest bit telling the version of the levels.
inline void scale_runs_by_bytes(float scale, const uint8_t* bytes, int higher, int zero, float* scales,
                                float* offsets) {
  const Ints8 numbers = bytes_at(bytes);
  scale_runs<8>(scale, (numbers & 254) - 127, numbers & 1, higher, zero, scales, offsets);
}

// Of two vectors, byte by byte: half of the pairs, the others are 16 places further.
constexpr Bytes32 kPairs = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Returns levels[indices[i]] for 32 indices below 16.
inline Bytes32 look_up(Bytes16 levels, Bytes32 indices) {
#if defined(__AVX2__)
  return reinterpret_cast<Bytes32>(
      _mm256_shuffle_epi8(reinterpret_cast<__m256i>(join(levels, levels)), reinterpret_cast<__m256i>(indices)));
#else
  Bytes16 halves[2];
  std::memcpy(halves, &indices, 32);
  return join(look_up(levels, halves[0]), look_up(levels, halves[1]));
#endif
}

// The same in 32 levels: `choice` is not 0 where the second 16 are meant.
inline Bytes32 look_up(const Bytes16* levels, Bytes32 indices, Bytes32 choice) {
  return choice != 0 ? look_up(levels[1], indices) : look_up(levels[0], indices);
}

constexpr Bytes16 kLevels2 = {0, 18, 32, 48};
constexpr Bytes16 kLevels3[2] = {{0, 23, 40, 53}, {64, 76, 91, 110}};
constexpr Bytes16 kLevels5[2] = {{0, 12, 23, 34, 43, 52, 61, 69, 76, 83, 90, 96, 102, 108, 114, 120},
                                 {125, 131, 137, 143, 149, 155, 162, 169, 177, 185, 194, 203, 213, 223, 235, 247}};
constexpr Bytes16 kLevels6[4] = {{0, 6, 12, 18, 23, 29, 34, 39, 43, 48, 53, 57, 61, 65, 69, 73},
                                 {76, 80, 83, 87, 90, 93, 96, 99, 102, 105, 108, 111, 114, 116, 119, 122},
                                 {125, 127, 130, 133, 136, 139, 141, 144, 147, 150, 154, 157, 160, 163, 167, 171},
                                 {174, 178, 182, 186, 190, 195, 199, 204, 209, 214, 219, 225, 230, 236, 242, 248}};
// Pairs of neighbours, each one of the 8 levels.
constexpr Bytes16 kFirstOfPair[2] = {{0, 0, 23, 23, 23, 23, 40, 40, 40, 40, 40, 53, 53, 53, 53, 64},
                                     {64, 64, 64, 64, 76, 76, 76, 76, 76, 91, 91, 91, 91, 91, 110, 110}};
constexpr Bytes16 kSecondOfPair[2] = {{40, 76, 0, 53, 76, 110, 23, 40, 64, 76, 91, 0, 64, 76, 110, 40},
                                      {53, 64, 76, 91, 23, 40, 53, 64, 76, 0, 40, 64, 91, 110, 40, 76}};

// Codes of 2 bits: 64 bytes.
inline void unpack_levels2(const uint8_t* p, uint8_t* codes) {
  for (int half = 0; half < 2; ++half)
    for (int b = 0; b < 4; ++b) {
      const Bytes32 low = load<Bytes32>(p + 32 * half) >> static_cast<uint8_t>(2 * b) & 3;
      store(codes + 128 * half + 32 * b, look_up(kLevels2, low));
    }
}

// Codes of 3 bits: 64 bytes with the low 2 and 32 with the high one.
inline void unpack_levels3(const uint8_t* p, uint8_t* codes) {
  const Bytes32 high = load<Bytes32>(p + 64);
  for (int b = 0; b < 8; ++b) {
    const Bytes32 low = load<Bytes32>(p + 32 * (b / 4)) >> static_cast<uint8_t>(2 * (b % 4)) & 3;
    const uint8_t bit = static_cast<uint8_t>(1 << b);
    store(codes + 32 * b, look_up(kLevels3, low, high & bit));
  }
}

// Codes of 4 bits: the low ones of 16 bytes are a run, half by half, with the high ones.
inline void unpack_levels4(Bytes32 packed, uint8_t* codes) {
  constexpr Bytes32 kFirst = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                              32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47};
  const Bytes32 low = look_up(kNonLinear, packed & 15), high = look_up(kNonLinear, packed >> 4);
  store(codes, __builtin_shuffle(low, high, kFirst));
  store(codes + 32, __builtin_shuffle(low, high, kFirst + 16));
}

// Codes of 5 bits: 128 bytes with the low 4 and 32 with the high one.
inline void unpack_levels5(const uint8_t* p, uint8_t* codes) {
  const Bytes32 high = load<Bytes32>(p + 128);
  for (int b = 0; b < 8; ++b) {
    const Bytes32 low = load<Bytes32>(p + 32 * (b / 2)) >> static_cast<uint8_t>(4 * (b % 2)) & 15;
    const uint8_t bit = static_cast<uint8_t>(1 << b);
    store(codes + 32 * b, look_up(kLevels5, low, high & bit));
  }
}

// Codes of 6 bits: 128 bytes with the low 4 and 64 with the high 2.
inline void unpack_levels6(const uint8_t* p, uint8_t* codes) {
  for (int b = 0; b < 8; ++b) {
    const Bytes32 low = load<Bytes32>(p + 32 * (b / 2)) >> static_cast<uint8_t>(4 * (b % 2)) & 15;
    const Bytes32 high = load<Bytes32>(p + 128 + 32 * (b / 4));
    const uint8_t fifth = static_cast<uint8_t>(1 << 2 * (b % 4)), sixth = static_cast<uint8_t>(2 << 2 * (b % 4));
    const Bytes32 lower = look_up(kLevels6, low, high & fifth), upper = look_up(kLevels6 + 2, low, high & fifth);
    store(codes + 32 * b, (high & sixth) != 0 ? upper : lower);
  }
}

struct IQ2_K {
  static constexpr int kBlock = 256, kBytes = 76, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const Ints16 versions = word16(p + 2) >> kPlaces16 & 1;
    scale_runs<16>(half_at(p), nibbles_at(p + 4) - 8, versions, 5, 31, scales, offsets);
    unpack_levels2(p + 12, codes);
  }
};

struct IQ2_KS {
  static constexpr int kBlock = 256, kBytes = 70, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const Ints8 low = word32(p + 2) >> 4 * kPlaces8 & 15, high = p[1] >> kPlaces8 & 1;
    scale_runs<8>(half_at(row.header), low + 16 * high - 16, p[0] >> kPlaces8 & 1, 5, 31, scales, offsets);
    unpack_levels2(p + 6, codes);
  }
};

// Codes of 5 bits choose pairs: 64 bytes with the low 4, 16 with the high one.
struct IQ2_KL {
  static constexpr int kBlock = 256, kBytes = 86, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const Ints8 high_bits = word16(p) >> 2 * kPlaces8 & 3;
    scale_runs<8>(half_at(row.header), nibble_planes_at(p + 2) + 16 * high_bits - 32, Ints8{}, 0, 63, scales, offsets);
    const Bytes16 high = load<Bytes16>(p + 70);
    for (int b = 0; b < 8; b += 2) {
      const Bytes16 packed = load<Bytes16>(p + 6 + 8 * b);
      const Bytes32 low = join(packed & 15, packed >> 4);
      const uint8_t bit = static_cast<uint8_t>(1 << b), next = static_cast<uint8_t>(2 << b);
      const Bytes32 choice = join(high & bit, high & next);
      const Bytes32 first = look_up(kFirstOfPair, low, choice), second = look_up(kSecondOfPair, low, choice);
      store(codes + 32 * b, __builtin_shuffle(first, second, kPairs));
      store(codes + 32 * b + 32, __builtin_shuffle(first, second, kPairs + 16));
    }
  }
};

struct IQ3_K {
  static constexpr int kBlock = 256, kBytes = 110, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const Ints16 versions = word16(p + 2) >> kPlaces16 & 1, signs = 1 - 2 * (word16(p + 4) >> kPlaces16 & 1);
    scale_runs<16>(half_at(p), (2 * nibbles_at(p + 6) + 1) * signs, versions, 4, 63, scales, offsets);
    unpack_levels3(p + 14, codes);
  }
};

struct IQ3_KS {
  static constexpr int kBlock = 256, kBytes = 102, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    const Ints8 numbers = nibble_planes_at(p + 2) + 16 * (p[0] >> kPlaces8 & 1) - 16;
    scale_runs<8>(half_at(row.header), numbers, p[1] >> kPlaces8 & 1, 4, 63, scales, offsets);
    unpack_levels3(p + 6, codes);
  }
};

struct IQ4_K {
  static constexpr int kBlock = 256, kBytes = 144, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    scale_runs_of_6_bits(p, 4, 127, scales, offsets);
    for (int b = 0; b < 8; b += 2) unpack_levels4(load<Bytes32>(p + 16 + 16 * b), codes + 32 * b);
  }
};

// A run is 8 words of 16 bits, whose lowest bits are its scale. The others are 4 codes each as a Gray code.
struct IQ4_KSS {
  static constexpr int kBlock = 256, kBytes = 128, kGroup = 32;
  typedef uint16_t Words __attribute__((vector_size(32)));

  // Moves bits 0, 16, 32 and 48 to bits 48 to 51, and bits 4, 20, 36 and 52 to those after them.
  static uint8_t lowest_bits(const uint8_t* p) {
    constexpr uint64_t kLowest = 0x0001000100010001;
    const uint64_t bits = (load<uint64_t>(p) & kLowest) | (load<uint64_t>(p + 8) & kLowest) << 4;
    return static_cast<uint8_t>(bits * 0x0001000200040008 >> 48);
  }

  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    uint8_t bytes[8];
    for (int b = 0; b < 8; ++b) bytes[b] = lowest_bits(p + 16 * b);
    scale_runs_by_bytes(float_at(row.header), bytes, 4, 127, scales, offsets);
    for (int b = 0; b < 8; b += 2) {
      const Words gray = load<Words>(p + 16 * b) & 0xFFFE;
      unpack_levels4(reinterpret_cast<Bytes32>(gray ^ gray >> 1), codes + 32 * b);
    }
  }
};

struct IQ5_K {
  static constexpr int kBlock = 256, kBytes = 176, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    scale_runs_of_6_bits(p, 2, 126, scales, offsets);
    unpack_levels5(p + 16, codes);
  }
};

struct IQ5_KS {
  static constexpr int kBlock = 256, kBytes = 168, kGroup = 32;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    scale_runs_by_bytes(float_at(row.header), p, 2, 126, scales, offsets);
    unpack_levels5(p + 8, codes);
  }
};

struct IQ6_K {
  static constexpr int kBlock = 256, kBytes = 212, kGroup = 16;
  static void unpack(Row row, int chunk, int, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * kBytes;
    Ints16 numbers;
    for (int b = 0; b < 16; ++b) numbers[b] = static_cast<int8_t>(p[4 + b]);
    scale_runs<16>(half_at(p), numbers, word16(p + 2) >> kPlaces16 & 1, 1, 127, scales, offsets);
    unpack_levels6(p + 20, codes);
  }
};

}  // namespace MLA_ISA
