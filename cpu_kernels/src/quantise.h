// From 32 floats to signed bytes of one scale: for activations and for cached rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "softmax.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace MLA_ISA {

// The largest of 16 numbers, and their sum.
inline int32_t largest_of(Ints x) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const Ints other = __builtin_shuffle(x, kPlaces ^ half);
    x = x > other ? x : other;
  }
  return x[0];
}

inline int32_t sum_of(Ints x) {
  for (int half = kLanes / 2; half > 0; half /= 2) x += __builtin_shuffle(x, kPlaces ^ half);
  return x[0];
}

// The bits of the largest magnitude of 32 numbers: magnitudes are in the order of their bits, with infinity and NaN
// above all numbers.
inline int32_t largest_bits(const Vector (&values)[2]) {
  const Ints first = reinterpret_cast<Ints>(values[0]) & 0x7FFFFFFF;
  const Ints second = reinterpret_cast<Ints>(values[1]) & 0x7FFFFFFF;
  return largest_of(first > second ? first : second);
}

// To the nearest whole number, ties to the even one, of numbers up to 2 ** 21.
inline Ints rounded(Vector x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof(x));
  const __m256i whole[2] = {_mm256_cvtps_epi32(halves[0]), _mm256_cvtps_epi32(halves[1])};
  Ints all;
  std::memcpy(&all, whole, sizeof(all));
  return all;
#else
  constexpr float kOneAndHalf = 0x1.8p23f;  // there a float's last bit is worth 1
  return reinterpret_cast<Ints>(x + kOneAndHalf) - 0x4B400000;
#endif
}

// Each half is stored by itself: to join them in memory first takes longer than all else that is done to 32 numbers.
inline void store_bytes(Ints low, Ints high, int8_t* out) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes first = __builtin_convertvector(low, Bytes), second = __builtin_convertvector(high, Bytes);
  std::memcpy(out, &first, sizeof(first));
  std::memcpy(out + kLanes, &second, sizeof(second));
}

}  // namespace MLA_ISA
