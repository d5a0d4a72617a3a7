// Dot products in plain loops, which the compiler turns into vector code.
#pragma once

namespace MLA_ISA {

// The running dot products of one weight row and some rows of activations.
template <int kCount>
struct DotSums {
  float products[kCount] = {};

  template <int kGroup>
  void add(const Codes<kGroup>& weights, const Activations& x, const int* rows, int chunk) {
    for (int t = 0; t < kCount; ++t) {
      const int8_t* x_codes = x.codes_of(rows[t]) + chunk * kChunk;
      const float* x_scales = x.scales_of(rows[t]) + 8 * chunk;
      const float* x_sums = kGroup == 32 ? x.sums32_of(rows[t]) + 8 * chunk : x.sums16_of(rows[t]) + 16 * chunk;
      for (int g = 0; g < kChunk / kGroup; ++g) {
        int32_t dot = 0;
        for (int i = kGroup * g; i < kGroup * (g + 1); ++i)
          dot += static_cast<int32_t>(weights.codes[i]) * static_cast<int32_t>(x_codes[i]);
        products[t] += weights.scales[g] * x_scales[g * kGroup / 32] * static_cast<float>(dot);
        products[t] += weights.offsets[g] * x_sums[g];
      }
    }
  }

  float result(int t) const { return products[t]; }
};

}  // namespace MLA_ISA
