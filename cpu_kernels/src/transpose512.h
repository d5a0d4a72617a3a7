// Turns words of four bytes that lie in rows into columns.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace MLA_ISA {

// 16 rows of 16 words; `a` is changed.
inline void transpose_words(__m512i* a, void* out) {
  auto* columns = static_cast<uint8_t*>(out);
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j)
    for (int half = 0; half < 2; ++half) {
      b[8 * half + j] = _mm512_shuffle_i32x4(a[8 * half + j], a[8 * half + 4 + j], 0x88);
      b[8 * half + 4 + j] = _mm512_shuffle_i32x4(a[8 * half + j], a[8 * half + 4 + j], 0xDD);
    }
  for (int j = 0; j < 8; ++j) {
    _mm512_storeu_si512(columns + 64 * j, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
    _mm512_storeu_si512(columns + 64 * (j + 8), _mm512_shuffle_i32x4(b[j], b[8 + j], 0xDD));
  }
}

// The same, of rows that are `stride` bytes apart.
inline void transpose_words(const void* first, size_t stride, void* out) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(static_cast<const uint8_t*>(first) + i * stride);
  transpose_words(rows, out);
}

}  // namespace MLA_ISA
