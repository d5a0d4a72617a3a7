// Weights straight into registers for AVX-512: 64 codes at a time, and 8 or 16 scales.
#pragma once

#include "formats_iq4.h"
#include "formats_k.h"
#include "formats_legacy.h"

namespace MLA_ISA {

// The float16 scales of 8 neighbouring blocks.
template <int kBytes>
inline __m256 scales_of_blocks(const uint8_t* p) {
  short s[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&s[i], p + i * kBytes, 2);
  return _mm256_cvtph_ps(_mm_set_epi16(s[7], s[6], s[5], s[4], s[3], s[2], s[1], s[0]));
}

// 32 bytes at p and 32 at q.
inline __m512i join32(const uint8_t* p, const uint8_t* q) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Nibbles of 16 bytes at p, low ones first, then those of 16 bytes at q.
inline __m512i nibbles16(const uint8_t* p, const uint8_t* q) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  const __m512i order = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
  const __m512i twice = _mm512_permutexvar_epi64(order, _mm512_castsi256_si512(both));
  const __m512i shifts = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                           0x0004000400040004);
  return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(15));
}

// Nibbles of 32 bytes at p: the low ones, then the high ones.
inline __m512i nibbles32(const uint8_t* p) {
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
  return _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(15));
}

inline __m512i non_linear(__m512i nibbles) {
  const __m512i levels = _mm512_broadcast_i32x4(reinterpret_cast<__m128i>(kNonLinear));
  return _mm512_shuffle_epi8(levels, nibbles);
}

// A whole chunk of 256 weights of a row: `codes(i)` are those of its weights 64 * i to 64 * i + 63.
template <class F>
struct Chunk;

template <>
struct Chunk<Q8_0> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * Q8_0::kBytes) {}
  __m256 scales() const { return scales_of_blocks<Q8_0::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-128)); }
  __m512i codes(int i) const {
    return _mm512_xor_si512(join32(p + 68 * i + 2, p + 68 * i + 36), _mm512_set1_epi8(-128));
  }
};

template <>
struct Chunk<Q4_0> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * Q4_0::kBytes) {}
  __m256 scales() const { return scales_of_blocks<Q4_0::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-8)); }
  __m512i codes(int i) const { return nibbles16(p + 36 * i + 2, p + 36 * i + 20); }
};

template <>
struct Chunk<IQ4_NL> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * IQ4_NL::kBytes) {}
  __m256 scales() const { return scales_of_blocks<IQ4_NL::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-127)); }
  __m512i codes(int i) const { return non_linear(nibbles16(p + 36 * i + 2, p + 36 * i + 20)); }
};

template <>
struct Chunk<IQ4_KS> {
  const uint8_t* p;
  __m256i bytes;
  float scale;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * IQ4_KS::kBytes), scale(float_at(row.header)) {
    bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  __m256 scales() const {
    const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi32(254));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(even, _mm256_set1_epi32(127))), _mm256_set1_ps(scale));
  }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-127)); }
  __m512i codes(int i) const {
    const __m512i low = non_linear(nibbles16(p + 8 + 32 * i, p + 24 + 32 * i));
    const __mmask16 raised = (p[2 * i] & 1 ? 0x00FF : 0) | (p[2 * i + 1] & 1 ? 0xFF00 : 0);
    return _mm512_mask_add_epi32(low, raised, low, _mm512_set1_epi32(0x04040404));
  }
};

template <>
struct Chunk<IQ4_XS> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * IQ4_XS::kBytes) {}
  __m256 scales() const {
    uint32_t low, high = 0;
    std::memcpy(&low, p + 4, 4);
    std::memcpy(&high, p + 2, 2);
    const __m256i fours = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i twos = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i low_bits = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(low), fours), _mm256_set1_epi32(15));
    const __m256i high_bits = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(high), twos), _mm256_set1_epi32(3));
    const __m256i codes = _mm256_or_si256(low_bits, _mm256_slli_epi32(high_bits, 4));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(32))),
                         _mm256_set1_ps(half_at(p)));
  }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-127)); }
  __m512i codes(int i) const { return non_linear(nibbles16(p + 8 + 32 * i, p + 24 + 32 * i)); }
};

// The 8 six-bit scales and 8 minima of a q4_K or q5_K block.
inline void six_bit_scales(const uint8_t* p, __m256* scales, __m256* offsets) {
  uint32_t low, high, mixed;
  std::memcpy(&low, p + 4, 4);
  std::memcpy(&high, p + 8, 4);
  std::memcpy(&mixed, p + 12, 4);
  const uint32_t scale_end = (mixed & 0x0F0F0F0F) | (low >> 2 & 0x30303030);
  const uint32_t minimum_end = (mixed >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030);
  const auto times = [](uint32_t first, uint32_t second, float factor) {
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(second) << 32 | first));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(factor));
  };
  *scales = times(low & 0x3F3F3F3F, scale_end, half_at(p));
  *offsets = times(high & 0x3F3F3F3F, minimum_end, -half_at(p + 2));
}

template <>
struct Chunk<Q4_K> {
  const uint8_t* p;
  __m256 scale, offset;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * Q4_K::kBytes) { six_bit_scales(p, &scale, &offset); }
  __m256 scales() const { return scale; }
  __m256 offsets() const { return offset; }
  __m512i codes(int i) const { return nibbles32(p + 16 + 32 * i); }
};

template <>
struct Chunk<Q5_K> {
  const uint8_t* p;
  __m256 scale, offset;
  __m512i high;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * Q5_K::kBytes) {
    six_bit_scales(p, &scale, &offset);
    high = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  __m256 scales() const { return scale; }
  __m256 offsets() const { return offset; }
  __m512i codes(int i) const {
    const __m512i bit = _mm512_inserti64x4(_mm512_set1_epi8(1 << (2 * i)), _mm256_set1_epi8(2 << (2 * i)), 1);
    const __m512i low = nibbles32(p + 48 + 32 * i);
    return _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(high, bit), low, _mm512_set1_epi8(16));
  }
};

template <>
struct Chunk<Q6_0> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * Q6_0::kBytes) {}
  __m256 scales() const { return scales_of_blocks<Q6_0::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-32)); }
  __m512i codes(int i) const {
    const uint8_t* a = p + 52 * i;
    uint64_t first, second;
    std::memcpy(&first, a + 2, 8);
    std::memcpy(&second, a + 28, 8);
    const __m512i both = _mm512_setr_epi64(first, first, first, first, second, second, second, second);
    const __m512i high = _mm512_srlv_epi64(both, _mm512_setr_epi64(0, 4, 2, 6, 0, 4, 2, 6));
    const __m512i bits = _mm512_slli_epi16(_mm512_and_si512(high, _mm512_set1_epi8(3)), 4);
    return _mm512_or_si512(nibbles16(a + 10, a + 36), bits);
  }
};

template <>
struct Chunk<Q6_K> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * Q6_K::kBytes) {}
  __m512 scales() const {
    const __m512i bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 192)));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(bytes), _mm512_set1_ps(half_at(p + 208)));
  }
  __m512 offsets() const { return _mm512_mul_ps(scales(), _mm512_set1_ps(-32)); }
  __m512i codes(int i) const {
    const int half = i / 2, high_nibble = i % 2;
    const __m512i low = _mm512_loadu_si512(p + 64 * half);
    const __m512i part = _mm512_and_si512(high_nibble ? _mm512_srli_epi16(low, 4) : low, _mm512_set1_epi8(15));
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 128 + 32 * half));
    const __m512i twice = _mm512_broadcast_i64x4(packed);
    const __m512i shifts = high_nibble ? _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(6), 1)
                                       : _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    const __m512i bits = _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(3));
    return _mm512_or_si512(part, _mm512_slli_epi16(bits, 4));
  }
};

}  // namespace MLA_ISA
