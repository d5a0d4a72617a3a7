// Tile registers of AMX, each of up to 16 rows of 16 words, and what attention makes of their products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tiles_bf16.h"

namespace MLA_ISA {

// Makes the tile registers of this thread sums (0 to 3), rows of `bytes` (4 and 5), and columns of as many (6 and 7).
inline void shape_tiles(int bytes) {
  const auto row = static_cast<uint16_t>(bytes);
  const auto words = static_cast<uint8_t>(bytes / 4);
  const struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shapes = {1, 0, {}, {64, 64, 64, 64, row, row, 64, 64}, {16, 16, 16, 16, 16, 16, words, words}};
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
inline void release_tiles() { asm volatile("tilerelease"); }

// The tile registers of this thread, all of them whole, for as long as this lives.
class TileRegisters {
 public:
  TileRegisters() { shape_tiles(64); }
  ~TileRegisters() { release_tiles(); }
  TileRegisters(const TileRegisters&) = delete;
};

// The intrinsics of GCC do not say that they read memory.
template <int n>
inline void load_tile(const void* first, int64_t stride) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(first), "r"(stride), "i"(n) : "memory");
}
// What comes from further away, and should not displace what is in the nearest cache.
template <int n>
inline void stream_tile(const void* first, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1), %%tmm%c2" : : "r"(first), "r"(stride), "i"(n) : "memory");
}
template <int n>
inline void store_tile(void* first) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(first), "r"(int64_t{64}), "i"(n) : "memory");
}
template <int n>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(n));
}
template <int sums, int rows, int columns>
inline void add_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(columns));
}
// Of signed bytes with unsigned ones.
template <int sums, int rows, int columns>
inline void add_byte_products() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(columns));
}

// Calls use(0), ..., use(count - 1) with constants.
template <int count, class Use>
[[gnu::always_inline]] inline void unrolled(const Use& use) {
  if constexpr (count > 0) {
    unrolled<count - 1>(use);
    use(std::integral_constant<int, count - 1>());
  }
}

constexpr int kRows = 16;  // of a tile

using TileFloats = float[kRows][kRows];

// scores[s][q] of kBlocks times 16 slots.
template <int kBlocks>
void score_tiles(const uint32_t* keys, int key_pairs, const uint32_t* queries, TileFloats* scores) {
  const int64_t stride = 4 * key_pairs;
  unrolled<kBlocks>([](auto j) { clear_tile<j>(); });
  for (int c = 0; c < key_pairs; c += kPairs) {
    load_tile<6>(queries + c * kRows, 64);
    unrolled<kBlocks>([&](auto j) __attribute__((always_inline)) {
      stream_tile<4 + j % 2>(keys + c + j * kRows * key_pairs, stride);
      add_products<j, 4 + j % 2, 6>();
    });
  }
  unrolled<kBlocks>([&](auto j) __attribute__((always_inline)) { store_tile<j>(scores[j]); });
}

// Adds the values of kHalves times 32 slots, weighted as tiles 6 and 7 say, to kBlocks times 16 columns.
template <int kBlocks, int kHalves>
void add_tiles(const uint32_t* values, int value_pairs, const TileFloats* sums, TileFloats* out) {
  const int64_t stride = 8 * value_pairs;
  unrolled<kBlocks>([&](auto j) __attribute__((always_inline)) { load_tile<j>(sums[j], 64); });
  unrolled<kHalves>([&](auto half) __attribute__((always_inline)) {
    unrolled<kBlocks>([&](auto j) __attribute__((always_inline)) {
      stream_tile<4 + j % 2>(values + half * kRows * 2 * value_pairs + j * kRows, stride);
      add_products<j, 6 + half, 4 + j % 2>();
    });
  });
  unrolled<kBlocks>([&](auto j) __attribute__((always_inline)) { store_tile<j>(out[j]); });
}

// out[s][k][i][j] = the product of row i of block s with column j of weight k: tiles of both follow each other.
inline void expand_tiles(const void* blocks, const void* const* weights, int pairs, TileFloats (*out)[2]) {
  const auto* const first = static_cast<const uint8_t*>(blocks);
  unrolled<4>([](auto j) { clear_tile<j>(); });
  for (int c = 0; c < 64 * pairs; c += 1024) {
    unrolled<2>([&](auto s) __attribute__((always_inline)) { stream_tile<4 + s>(first + s * 64 * pairs + c, 64); });
    unrolled<2>([&](auto k) __attribute__((always_inline)) {
      load_tile<6 + k>(static_cast<const uint8_t*>(weights[k]) + c, 64);
    });
    unrolled<4>([](auto j) { add_products<j, 4 + j / 2, 6 + j % 2>(); });
  }
  unrolled<4>([&](auto j) __attribute__((always_inline)) { store_tile<j>(out[j / 2][j % 2]); });
}

}  // namespace MLA_ISA
