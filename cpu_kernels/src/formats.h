// What formats share. A format unpacks a chunk of 256 weights into unsigned bytes, and a scale and an offset per group:
//
//     weight[i] = scale[i / kGroup] * code[i] + offset[i / kGroup]
//
// A row of blocks of less than 256 may end within its last chunk: `blocks` says how many are there. Loops over the
// weights of a block have fixed counts and no branches, so that the compiler turns them into vector code; the same
// functions serve every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace MLA_ISA {

constexpr int kChunk = 256;  // weights that are unpacked at a time

// Without hardware conversion: by adding to the exponent, which no mode that flushes small numbers can disturb.
inline float half_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t exponent = half & 0x7C00, sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t bits = (static_cast<uint32_t>(half & 0x7FFF) << 13) + (112u << 23);
  if (exponent == 0x7C00) bits += 112u << 23;
  if (exponent == 0) bits += 1u << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  if (exponent == 0) value -= 0x1p-14f;
  return sign ? -value : value;
#endif
}

inline float float_at(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return value;
}

using mla::Row;

// Any format whose scales are shared by so many neighbours: by the function that its matrix has for it.
template <int kScaled>
struct Unpacked {
  static constexpr int kGroup = kScaled;
};

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Bytes32 __attribute__((vector_size(32)));
typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint64_t Longs2 __attribute__((vector_size(16)));

template <class V>
inline V load(const uint8_t* p) {
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
}

template <class V>
inline void store(uint8_t* p, V value) {
  std::memcpy(p, &value, sizeof(V));
}

// Scales and offsets of groups that all have one scale, with codes that are `zero` too high.
inline void share_scale(float scale, int zero, int groups, float* scales, float* offsets) {
  for (int g = 0; g < groups; ++g) {
    scales[g] = scale;
    offsets[g] = static_cast<float>(-zero) * scale;
  }
}

// Bytes that are all ones where one of the 32 bits at p is set, low bits first, and zero elsewhere.
inline Bytes32 masks_of_bits(const uint8_t* p) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Bytes32>(_mm256_movm_epi8(load<uint32_t>(p)));
#elif defined(__AVX2__)
  const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bits = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(p)), places);
  return reinterpret_cast<Bytes32>(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bits), bits));
#else
  uint64_t spread[4];
  uint8_t bytes[32];
  for (int i = 0; i < 4; ++i) spread[i] = p[i] * 0x0101010101010101u & 0x8040201008040201u;
  std::memcpy(bytes, spread, 32);
  for (uint8_t& byte : bytes) byte = byte == 0 ? 0 : 255;
  return load<Bytes32>(bytes);
#endif
}

// 256 codes of two bits: of 32 bytes the lowest bits, the next ones and so on, then of 32 more.
inline void unpack_pairs(const uint8_t* p, uint8_t* codes) {
  for (int half = 0; half < 2; ++half) {
    const Bytes32 packed = load<Bytes32>(p + 32 * half);
    for (int k = 0; k < 4; ++k) store(codes + 128 * half + 32 * k, packed >> (2 * k) & 3);
  }
}

inline Bytes32 join(Bytes16 low, Bytes16 high) {
#if defined(__AVX2__)
  const __m256i wide = _mm256_castsi128_si256(reinterpret_cast<__m128i>(low));
  return reinterpret_cast<Bytes32>(_mm256_inserti128_si256(wide, reinterpret_cast<__m128i>(high), 1));
#else
  uint8_t both[32];
  store(both, low);
  store(both + 16, high);
  return load<Bytes32>(both);
#endif
}

// Returns levels[indices[i]] for 16 indices below 16.
inline Bytes16 look_up(Bytes16 levels, Bytes16 indices) {
#if defined(__SSSE3__)
  return reinterpret_cast<Bytes16>(
      _mm_shuffle_epi8(reinterpret_cast<__m128i>(levels), reinterpret_cast<__m128i>(indices)));
#elif defined(__ARM_NEON)
  return reinterpret_cast<Bytes16>(
      vqtbl1q_u8(reinterpret_cast<uint8x16_t>(levels), reinterpret_cast<uint8x16_t>(indices)));
#else
  uint8_t from[16], at[16], result[16];
  store(from, levels);
  store(at, indices);
  for (int i = 0; i < 16; ++i) result[i] = from[at[i]];
  return load<Bytes16>(result);
#endif
}

// Nibbles of 16 bytes, the low ones first.
inline void unpack_nibbles(const uint8_t* p, uint8_t* codes) {
  const Bytes16 packed = load<Bytes16>(p);
  store(codes, packed & 15);
  store(codes + 16, packed >> 4);
}

// The same, each standing for a level.
inline void look_up_nibbles(Bytes16 levels, const uint8_t* p, uint8_t* codes) {
  const Bytes16 packed = load<Bytes16>(p);
  store(codes, look_up(levels, packed & 15));
  store(codes + 16, look_up(levels, packed >> 4));
}

// Blocks of 32 that begin with a float16 scale: codes that are kZero too high, or, without a zero, a float16 minimum
// after the scale. F::unpack_block unpacks the codes of a block.
template <class F, int kBlockBytes, int kZero>
struct BlocksOf32 {
  static constexpr int kBlock = 32, kBytes = kBlockBytes, kGroup = 32;
  static void unpack(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets) {
    const uint8_t* p = row.blocks + chunk * 8 * kBytes;
    for (int b = 0; b < blocks; ++b, p += kBytes) {
      scales[b] = half_at(p);
      offsets[b] = kZero > 0 ? -kZero * scales[b] : half_at(p + 2);
      F::unpack_block(p, codes + 32 * b);
    }
  }
};

}  // namespace MLA_ISA
