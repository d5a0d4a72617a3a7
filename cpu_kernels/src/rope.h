// Rotary positions: neighbours are the pairs that are turned.
#pragma once

#include <cstdint>

namespace mla {

inline void rotate_pairs(const float* x, const float* cos, const float* sin, int64_t pairs, float* out) {
  for (int64_t j = 0; j < pairs; ++j) {
    const float even = x[2 * j], odd = x[2 * j + 1];
    out[2 * j] = even * cos[j] - odd * sin[j];
    out[2 * j + 1] = even * sin[j] + odd * cos[j];
  }
}

}  // namespace mla
