// From the scores of a query to weights: a softmax that goes on from tile to tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace MLA_ISA {

using mla::kLanes;
using mla::kNothing;

typedef float Vector __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), may_alias));

constexpr Ints kPlaces = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Vector spread(float x) { return Vector{} + x; }

// e to the x for |x| at most ln(2) / 2: seven terms of the series.
template <class T>
inline T exponential_of_rest(T x) {
  const T end = 0.16666667f + x * (0.041666668f + x * (0.0083333333f + x * 0.0013888889f));
  return 1 + x * (1 + x * (0.5f + x * end));
}

// e to the x: 2 to the whole part by its bits, times a polynomial of the rest; 2 units in the last place.
inline float exponential(float x) {
  const float least = x > -87.0f ? x : -87.0f;  // and so of a NaN, which is no integer
  const float scaled = std::min(least, 88.0f) * 1.44269504f;
  const float whole = std::floor(scaled + 0.5f);
  const float rest = (scaled - whole) * 0.69314718f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x == x ? exponential_of_rest(rest) * power : x;
}

// The same for 16 numbers that are at most 0.
inline Vector exponentials(Vector x) {
  const Vector scaled = (x > -87.0f ? x : spread(-87.0f)) * 1.44269504f;
  const Ints whole = __builtin_convertvector(scaled - 0.5f, Ints);  // of a number below 0: rounds to the nearest
  const Vector rest = (scaled - __builtin_convertvector(whole, Vector)) * 0.69314718f;
  const Vector result = exponential_of_rest(rest) * reinterpret_cast<Vector>((whole + 127) << 23);
  return x == x ? result : x;
}

// The larger of two numbers, or the one that is a NaN.
template <class T>
inline T larger(T a, T b) {
  return (a > b) | (a != a) ? a : b;
}

// Joins 16 numbers, halves at a time.
template <class Join>
inline float across(Vector vector, const Join& join) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  Quarter quarters[2];
  std::memcpy(halves, &vector, sizeof(vector));
  const Half half = join(halves[0], halves[1]);
  std::memcpy(quarters, &half, sizeof(half));
  const Quarter quarter = join(quarters[0], quarters[1]);
  return join(join(quarter[0], quarter[1]), join(quarter[2], quarter[3]));
}

// Turns `count` scores of the slots from `first` on, a multiple of 16, into weights; slots after `limit` get none.
// Weights are rounded before they are summed. Returns by what all that was summed before shrinks.
template <class Round>
float weigh(int first, int count, int limit, float scale, const Round& round, float* scores, float* top, float* sum) {
  Vector* vectors = reinterpret_cast<Vector*>(scores);
  Vector best = spread(*top);
  for (int s = 0; s < count / kLanes; ++s) {
    const Ints seen = kPlaces <= Ints{} + (limit - first - s * kLanes);
    vectors[s] = seen ? vectors[s] * scale : spread(kNothing);
    best = larger(vectors[s], best);
  }
  const float highest = across(best, [](auto a, auto b) { return larger(a, b); });
  // A query that has seen nothing yet keeps its top at minus infinity: take 0 instead, all its weights are 0.
  const float base = highest == kNothing ? 0 : highest;
  Vector total = {};
  for (int s = 0; s < count / kLanes; ++s) {
    const Ints hidden = vectors[s] == spread(kNothing);
    vectors[s] = hidden ? Vector{} : round(exponentials(vectors[s] - base));
    total += vectors[s];
  }
  const float shrink = *top == base ? 1 : exponential(*top - base);
  *sum = *sum * shrink + across(total, [](auto a, auto b) { return a + b; });
  *top = highest;
  return shrink;
}

}  // namespace MLA_ISA
