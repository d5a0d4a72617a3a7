// New rows of the cache, in the planes of `mla_jax.cache.codec` and by its rules, of the types that most caches have:
// those of the others are in cache_encoders.cc.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "formats.h"
#include "quantise.h"

namespace MLA_ISA {

using mla::CacheTarget;

constexpr float kLargestHalf = 65504;
constexpr float kLargest = 0x1p24f;  // numbers beyond are taken for it where codes have a scale

// The nearest float16, ties to even, and the largest one for what lies beyond; a NaN stays one.
inline uint16_t to_half(float x) {
  if (x != x) return 0x7E00;
  x = std::clamp(x, -kLargestHalf, kLargestHalf);
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits < 113u << 23) {  // no normal number: counted in steps of 2 ** -24
    float counted;
    std::memcpy(&counted, &bits, 4);
    counted += 0.5f;
    std::memcpy(&bits, &counted, 4);
    return static_cast<uint16_t>(sign | (bits - (126u << 23)));
  }
  return static_cast<uint16_t>(sign | ((bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13));
#endif
}

inline void encode_f32(const float* row, int size, int64_t place, const CacheTarget& target) {
  std::memcpy(static_cast<float*>(target.low) + place * size, row, sizeof(float) * size);
}

inline void encode_f16(const float* row, int size, int64_t place, const CacheTarget& target) {
  uint16_t* out = static_cast<uint16_t*>(target.low) + place * size;
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= size; i += 16) {
    const __m512 limit = _mm512_set1_ps(kLargestHalf), x = _mm512_loadu_ps(row + i);
    // Of a NaN and a number, both give the second operand.
    const __m512 within = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtps_ph(within, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < size; ++i) out[i] = to_half(row[i]);
}

inline void encode_bf16(const float* row, int size, int64_t place, const CacheTarget& target) {
  uint16_t* out = static_cast<uint16_t*>(target.low) + place * size;
  for (int i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, 4);
    const uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
  }
}

inline void encode_q8_0(const float* row, int size, int64_t place, const CacheTarget& target) {
  int8_t* codes = static_cast<int8_t*>(target.low) + place * size;
  uint16_t* scales = static_cast<uint16_t*>(target.scale) + place * (size / 32);
  for (int b = 0; b < size / 32; ++b) {
    Vector values[2];
    std::memcpy(values, row + 32 * b, sizeof(values));
    for (Vector& v : values) {
      v = v > kLargest ? spread(kLargest) : v;
      v = v < -kLargest ? spread(-kLargest) : v;
    }
    const int32_t bits = largest_bits(values);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const float inverse = 127 / largest;
    const bool usable = inverse <= std::numeric_limits<float>::max();  // no NaN, and no infinity
    const auto code = [&](Vector v) { return usable ? rounded(v * inverse) : Ints{}; };
    store_bytes(code(values[0]), code(values[1]), codes + 32 * b);
    scales[b] = to_half(largest / 127);
  }
}

}  // namespace MLA_ISA
