// Float32 numbers in registers of whatever width the instruction set has.
#pragma once

#include <cstring>

#include "softmax.h"

namespace MLA_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Part __attribute__((vector_size(4 * kWidth), may_alias));

inline Part load_part(const float* p) {
  Part value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

inline void store_part(float* p, Part value) { std::memcpy(p, &value, sizeof(value)); }

#if defined(__clang__)
#define MLA_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MLA_PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Element i of the result is the sum of `parts[i]`.
inline Part add_across(const Part (&parts)[kWidth]) {
#if defined(__AVX512F__)
  Part twos[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i) {
    const Part a = parts[2 * i], b = parts[2 * i + 1];
    twos[i] = MLA_PICK(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
              MLA_PICK(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const Part a = twos[2 * i], b = twos[2 * i + 1];
    fours[i] = MLA_PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               MLA_PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Part a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = MLA_PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                MLA_PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  return MLA_PICK(eights[0], eights[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         MLA_PICK(eights[0], eights[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#else
  Part total = {};
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < kWidth; ++j) total[i] += parts[i][j];
  return total;
#endif
}

}  // namespace MLA_ISA
