// What formats share. A format unpacks a chunk of 256 weights into unsigned bytes, and a scale and an offset per group:
//
//     weight[i] = scale[i / kGroup] * code[i] + offset[i / kGroup]
//
// Blocks of 32 may end within the last chunk of a row: `blocks` says how many are there. Loops have fixed counts and
// no branches, so that the compiler turns them into vector code; the same functions serve every instruction set.
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

inline Bytes16 load16(const uint8_t* p) {
  Bytes16 value;
  std::memcpy(&value, p, 16);
  return value;
}

inline void store16(uint8_t* p, Bytes16 value) { std::memcpy(p, &value, 16); }

// Returns levels[indices[i]] for 16 indices below 16.
inline Bytes16 look_up(Bytes16 levels, Bytes16 indices) {
#if defined(__SSSE3__)
  return reinterpret_cast<Bytes16>(
      _mm_shuffle_epi8(reinterpret_cast<__m128i>(levels), reinterpret_cast<__m128i>(indices)));
#elif defined(__ARM_NEON)
  return reinterpret_cast<Bytes16>(
      vqtbl1q_u8(reinterpret_cast<uint8x16_t>(levels), reinterpret_cast<uint8x16_t>(indices)));
#else
  Bytes16 result;
  for (int i = 0; i < 16; ++i) result[i] = levels[indices[i]];
  return result;
#endif
}

}  // namespace MLA_ISA
