// Dot products for AVX2: `vpmaddubsw` multiplies unsigned by signed bytes, so weights give their magnitudes, and their
// signs to the activations. Of codes up to 255 two products would not fit 16 bits: these are taken less 128. Small ones
// stay small, or most of the sums would cancel out.
#pragma once

namespace MLA_ISA {

// The running dot products of one weight row and some rows of activations.
template <int kCount>
struct DotSums {
  __m256 products[kCount];

  DotSums() {
    for (int t = 0; t < kCount; ++t) products[t] = _mm256_setzero_ps();
  }

  template <int kGroup>
  void add(const Codes<kGroup>& weights, const Activations& x, const int* rows, int chunk) {
    const __m256i middle = _mm256_set1_epi8(static_cast<char>(weights.middle));
    for (int i = 0; i < 8; ++i) {
      const __m256i code = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights.codes + 32 * i));
      const __m256i signed_code = _mm256_xor_si256(code, middle);
      const __m256i magnitude = _mm256_abs_epi8(signed_code);
      const __m256 scale = scales_of(weights, i);
      for (int t = 0; t < kCount; ++t) {
        const int8_t* x_code = x.codes_of(rows[t]) + chunk * kChunk + 32 * i;
        const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x_code));
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(other, signed_code));
        const __m256i dots = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales_of(rows[t])[8 * chunk + i]));
        products[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), factor, products[t]);
      }
    }
    for (int g = 0; g < kChunk / kGroup; g += 8) {
      const __m256 scale = _mm256_load_ps(weights.scales + g), offset = _mm256_load_ps(weights.offsets + g);
      const __m256 raised = _mm256_fmadd_ps(scale, _mm256_set1_ps(weights.middle), offset);
      for (int t = 0; t < kCount; ++t) {
        const float* sums = kGroup == 32 ? x.sums32_of(rows[t]) : x.sums16_of(rows[t]);
        const __m256 of_chunk = _mm256_loadu_ps(sums + kChunk / kGroup * chunk + g);
        products[t] = _mm256_fmadd_ps(raised, of_chunk, products[t]);
      }
    }
  }

  float result(int t) const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(products[t]), _mm256_extractf128_ps(products[t], 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

 private:
  // Of the products of codes 32 * i and following: four neighbours are a lane.
  static __m256 scales_of(const Codes<32>& weights, int i) { return _mm256_set1_ps(weights.scales[i]); }
  static __m256 scales_of(const Codes<16>& weights, int i) {
    return _mm256_set_m128(_mm_set1_ps(weights.scales[2 * i + 1]), _mm_set1_ps(weights.scales[2 * i]));
  }
};

}  // namespace MLA_ISA
