// Products of bytes by the tile registers of AMX: 16 rows of activations with 16 rows of weights at a time.
#include <immintrin.h>

#include "formats.h"
#include "kernels.h"
#include "tiles_amx.h"

namespace MLA_ISA {

using mla::ActivationTile;
using mla::PanelView;

namespace {

using TileDots = int32_t[kRows][kRows];  // of a row of activations with each row of weights

// The dot products over each group: while those of one are stored, the next are under way.
template <int kGroup>
void multiply_groups(const PanelView& weights, const ActivationTile& x, TileDots* out) {
  constexpr int kAtOnce = 4;
  unrolled<kChunk / kGroup + kAtOnce>([&](auto n) __attribute__((always_inline)) {
    constexpr int g = n, before = g - kAtOnce, sums = g % kAtOnce, side = g % 2;
    if constexpr (before >= 0) store_tile<sums>(out[before]);
    if constexpr (g < kChunk / kGroup) {
      clear_tile<sums>();
      load_tile<4 + side>(x.rows[0] + kGroup * g, kChunk);
      load_tile<6 + side>(weights.codes + g * kGroup * kRows, 64);
      add_byte_products<sums, 4 + side, 6 + side>();
    }
  });
}

// What the dot products of kCount rows, from row `t` on, come to in kGroups groups from the n-th on, in the order of
// `meet_chunk` and added as there.
template <int kGroup, int kCount, int kGroups>
struct GroupSums {
  __m512 of[kCount];

  [[gnu::always_inline]] GroupSums(const PanelView& weights, const ActivationTile& x, const TileDots* dots, int t,
                                   int n) {
    if constexpr (kGroups > 1) {
      const GroupSums<kGroup, kCount, kGroups / 2> first(weights, x, dots, t, n);
      const GroupSums<kGroup, kCount, kGroups / 2> second(weights, x, dots, t, n + kGroups / 2);
      for (int i = 0; i < kCount; ++i) of[i] = _mm512_add_ps(first.of[i], second.of[i]);
    } else {
      const int g = kGroup == 32 ? n : n / 2 + 8 * (n % 2);
      for (int i = 0; i < kCount; ++i) of[i] = _mm512_setzero_ps();
      if (g >= weights.groups) return;
      const __m512 scale = _mm512_load_ps(weights.scales + g * kRows);
      const __m512 offset = _mm512_load_ps(weights.offsets + g * kRows);
      for (int i = 0; i < kCount; ++i) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[g * kGroup / 32][t + i]));
        const float sum = (kGroup == 32 ? x.sums32 : x.sums16)[g][t + i];
        of[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots[g][t + i])), both);
        of[i] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sum), of[i]);
      }
    }
  }
};

template <int kGroup>
void multiply_tile(const PanelView& weights, const ActivationTile& x, int count, float* sums) {
  alignas(64) TileDots dots[kChunk / kGroup];
  multiply_groups<kGroup>(weights, x, dots);
  int t = 0;
  const auto add = [&](auto at_once) {
    constexpr int kCount = at_once;
    for (; t + kCount <= count; t += kCount, sums += kCount * kRows) {
      const GroupSums<kGroup, kCount, kChunk / kGroup> all(weights, x, dots, t, 0);
      for (int i = 0; i < kCount; ++i)
        _mm512_storeu_ps(sums + i * kRows, _mm512_add_ps(_mm512_loadu_ps(sums + i * kRows), all.of[i]));
    }
  };
  add(std::integral_constant<int, 2>());
  add(std::integral_constant<int, 1>());
}

void multiply(int group, const PanelView& weights, const ActivationTile& x, int count, float* sums) {
  if (group == 32)
    multiply_tile<32>(weights, x, count, sums);
  else
    multiply_tile<16>(weights, x, count, sums);
}

}  // namespace

extern const mla::TileProducts tile_products;
const mla::TileProducts tile_products = {shape_tiles, release_tiles, multiply};

}  // namespace MLA_ISA
