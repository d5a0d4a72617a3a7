// Weights straight into registers: 32 codes at a time, and the 8 or 16 scales of a chunk.
#pragma once

#include "formats_iq4.h"
#include "formats_k.h"
#include "formats_legacy.h"

namespace MLA_ISA {

// Asks for weights, which a token meets once, so that they displace nothing that is used again.
inline void prefetch_weights(const uint8_t* first, int64_t bytes) {
  if (!mla::asks_for_weights) return;
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(first + i, _MM_HINT_NTA);
}

// The float16 scales of 8 neighbouring blocks.
template <int kBytes>
inline __m256 scales_of_blocks(const uint8_t* p) {
  short s[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&s[i], p + i * kBytes, 2);
  return _mm256_cvtph_ps(_mm_set_epi16(s[7], s[6], s[5], s[4], s[3], s[2], s[1], s[0]));
}

inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Nibbles of 16 bytes, the low ones first.
inline __m256i nibbles(const uint8_t* p) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}

// The low nibbles of 32 bytes, or the high ones.
inline __m256i nibbles_of(__m256i bytes, bool high) {
  return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

// Nibbles and, of other bytes, the two bits above a nibble.
inline __m256i with_high_pairs(__m256i nibbles, __m256i bytes) {
  constexpr int kFirstOrBothOthers = 0xF8;
  return _mm256_ternarylogic_epi32(nibbles, bytes, _mm256_set1_epi8(0x30), kFirstOrBothOthers);
}

inline __m256i non_linear(__m256i nibbles) {
  const __m256i levels = _mm256_broadcastsi128_si256(reinterpret_cast<__m128i>(kNonLinear));
  return _mm256_shuffle_epi8(levels, nibbles);
}

// A whole chunk of 256 weights of a row: `codes(i)` are those of its weights 32 * i to 32 * i + 31.
template <class F>
struct Chunk;

template <>
struct Chunk<Q8_0> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * Q8_0::kBytes) {}
  __m256 scales() const { return scales_of_blocks<Q8_0::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-128)); }
  __m256i codes(int i) const { return _mm256_xor_si256(load32(p + 34 * i + 2), _mm256_set1_epi8(-128)); }
};

template <>
struct Chunk<Q4_0> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * Q4_0::kBytes) {}
  __m256 scales() const { return scales_of_blocks<Q4_0::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-8)); }
  __m256i codes(int i) const { return nibbles(p + 18 * i + 2); }
};

template <>
struct Chunk<IQ4_NL> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * IQ4_NL::kBytes) {}
  __m256 scales() const { return scales_of_blocks<IQ4_NL::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-127)); }
  __m256i codes(int i) const { return non_linear(nibbles(p + 18 * i + 2)); }
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
  __m256 offsets() const {  // odd bytes mean levels that are higher by 4
    const __m256i raised = _mm256_slli_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(1)), 2);
    return _mm256_mul_ps(scales(), _mm256_cvtepi32_ps(_mm256_sub_epi32(raised, _mm256_set1_epi32(127))));
  }
  __m256i codes(int i) const { return non_linear(nibbles(p + 8 + 16 * i)); }
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
  __m256i codes(int i) const { return non_linear(nibbles(p + 8 + 16 * i)); }
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
  __m256i codes(int i) const { return nibbles_of(load32(p + 16 + 32 * (i / 2)), i % 2); }
};

template <>
struct Chunk<Q5_K> {
  const uint8_t* p;
  __m256 scale, offset;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * Q5_K::kBytes) { six_bit_scales(p, &scale, &offset); }
  __m256 scales() const { return scale; }
  __m256 offsets() const { return offset; }
  __m256i codes(int i) const {
    const __m256i low = nibbles_of(load32(p + 48 + 32 * (i / 2)), i % 2);
    const __mmask32 raised = _mm256_test_epi8_mask(load32(p + 16), _mm256_set1_epi8(static_cast<char>(1 << i)));
    return _mm256_mask_add_epi8(low, raised, low, _mm256_set1_epi8(16));
  }
};

template <>
struct Chunk<Q6_0> {
  const uint8_t* p;
  Chunk(Row row, int chunk) : p(row.blocks + chunk * 8 * Q6_0::kBytes) {}
  __m256 scales() const { return scales_of_blocks<Q6_0::kBytes>(p); }
  __m256 offsets() const { return _mm256_mul_ps(scales(), _mm256_set1_ps(-32)); }
  __m256i codes(int i) const {
    const uint8_t* block = p + 26 * i;
    long long high;
    std::memcpy(&high, block + 2, 8);
    const __m256i pairs = _mm256_rolv_epi64(_mm256_set1_epi64x(high), _mm256_setr_epi64x(4, 0, 2, 62));
    return with_high_pairs(nibbles(block + 10), pairs);
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
  __m256i codes(int i) const {
    const int half = i / 4, quarter = i % 4;
    const __m256i low = nibbles_of(load32(p + 64 * half + 32 * (quarter % 2)), quarter / 2);
    const __m256i high = load32(p + 128 + 32 * half);
    return with_high_pairs(low, quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter)
                                            : _mm256_srli_epi16(high, 2 * quarter - 4));
  }
};

}  // namespace MLA_ISA
