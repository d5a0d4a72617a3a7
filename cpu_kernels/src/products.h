// Sums of products of weights and activations: what is common, and the choice for the instruction set.
//
// `IntegerDot<F, m, n>::meet` meets m weight rows with n rows of activations; `Panel<g>` holds 256 columns of 16 weight
// rows, a scale and an offset for g neighbours, and meets up to 16 activations at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats.h"
#include "kernels.h"

namespace MLA_ISA {

using mla::Activations;
using mla::ActivationTile;
using mla::Matrix;
using mla::Selection;
using mla::Vectors;

constexpr int kPanelRows = ActivationTile::kRows;

// A chunk in memory. What lies past the end of a row has scale and offset 0.
template <int kGroup>
struct Codes {
  static constexpr int kGroups = kChunk / kGroup;
  alignas(64) uint8_t codes[kChunk];
  alignas(64) float scales[kGroups];
  alignas(64) float offsets[kGroups];
  uint8_t middle;  // what codes are best taken less of, to be signed bytes: 128, or 0 where none is above 127
};

template <class F>
constexpr bool kInRegisters = true;
template <int kGroup>
constexpr bool kInRegisters<Unpacked<kGroup>> = false;

// How many groups chunk `c` of a row has.
template <class F>
inline int groups_in(const Matrix& matrix, int c) {
  return static_cast<int>(std::min<int64_t>(matrix.size - static_cast<int64_t>(c) * kChunk, kChunk)) / F::kGroup;
}

template <class F>
inline void unpack(const Matrix& matrix, int64_t row, int chunk, Codes<F::kGroup>* out) {
  const Row source = {matrix.header + row * matrix.header_bytes, matrix.blocks + row * matrix.row_bytes};
  const int left = static_cast<int>(std::min<int64_t>(matrix.size - static_cast<int64_t>(chunk) * kChunk, kChunk));
  if constexpr (kInRegisters<F>)
    F::unpack(source, chunk, left / F::kBlock, out->codes, out->scales, out->offsets);
  else
    matrix.format->unpack(source, chunk, left / matrix.format->block, out->codes, out->scales, out->offsets);
  out->middle = matrix.format->narrow ? 0 : 128;
  if (left < kChunk) {
    std::memset(out->codes + left, 0, kChunk - left);
    std::fill(out->scales + left / F::kGroup, out->scales + Codes<F::kGroup>::kGroups, 0.0f);
    std::fill(out->offsets + left / F::kGroup, out->offsets + Codes<F::kGroup>::kGroups, 0.0f);
  }
}

}  // namespace MLA_ISA

#if defined(__AVX512VNNI__)
#include "transposed512.h"
#else
#include "products_plain.h"
#endif
