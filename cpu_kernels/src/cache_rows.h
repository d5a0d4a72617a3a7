// Cached rows of every type, in the planes of `mla_jax.cache.codec`, decoded to float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "cache_encode.h"
#include "cache_encoders.h"
#include "float_products.h"
#include "formats_iq4.h"
#include "kernels.h"

namespace MLA_ISA {

using mla::CachePart;
using mla::LatentCache;

template <class F>
void read_floats(const CachePart& part, int64_t place, float* out) {
  F::widen(static_cast<const uint8_t*>(part.low) + place * part.size * F::kBytes, 0, part.size, out);
}

// Four bits of exponent, three of fraction; no infinities.
inline void read_fp8_e4m3(const CachePart& part, int64_t place, float* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(part.low) + place * part.size;
  for (int i = 0; i < part.size; ++i) {
    const uint32_t sign = static_cast<uint32_t>(codes[i] & 0x80) << 24, rest = codes[i] & 0x7F;
    const uint32_t bits = sign | ((rest << 20) + (120u << 23));
    float value;
    std::memcpy(&value, &bits, 4);
    if (rest < 8) value = (sign ? -0x1p-9f : 0x1p-9f) * static_cast<float>(rest);
    if (rest == 0x7F) value = NAN;
    out[i] = value;
  }
}

inline float scale_at(const void* scales, int64_t place) {
  return half_at(static_cast<const uint8_t*>(scales) + 2 * place);
}

inline void read_q8_0(const CachePart& part, int64_t place, float* out) {
  const int8_t* codes = static_cast<const int8_t*>(part.low) + place * part.size;
  const int blocks = part.size / 32;
  for (int b = 0; b < blocks; ++b) {
    const float scale = scale_at(part.scale, place * blocks + b);
    for (int i = 0; i < 32; ++i) out[32 * b + i] = static_cast<float>(codes[32 * b + i]) * scale;
  }
}

inline void read_q8_kv(const CachePart& part, int64_t place, float* out) {
  const int8_t* codes = static_cast<const int8_t*>(part.low) + place * part.size;
  const float scale = float_at(static_cast<const uint8_t*>(part.scale) + 4 * place);
  for (int i = 0; i < part.size; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

// Codes of 4 + kHigh bits less kZero, or levels where kZero is negative; an offset where `part.offset` is there.
template <int kHigh, int kZero>
void read_planes(const CachePart& part, int64_t place, float* out) {
  const int n = part.size, blocks = n / 32;
  const uint8_t* low = static_cast<const uint8_t*>(part.low) + place * (n / 2);
  for (int i = 0; i < n / 2; ++i) {
    out[i] = static_cast<float>(low[i] & 15);
    out[i + n / 2] = static_cast<float>(low[i] >> 4);
  }
  if constexpr (kHigh > 0) {
    constexpr int kPlanes = 8 / kHigh;
    const uint8_t* high = static_cast<const uint8_t*>(part.high) + place * (n / kPlanes);
    for (int p = 0; p < kPlanes; ++p)
      for (int i = 0; i < n / kPlanes; ++i)
        out[p * (n / kPlanes) + i] += static_cast<float>((high[i] >> (p * kHigh) & ((1 << kHigh) - 1)) << 4);
  }
  for (int b = 0; b < blocks; ++b) {
    const float scale = scale_at(part.scale, place * blocks + b);
    const float offset = part.offset ? scale_at(part.offset, place * blocks + b) : 0.0f;
    for (int i = 32 * b; i < 32 * b + 32; ++i) {
      const float level = kZero < 0 ? static_cast<float>(kNonLinear[static_cast<int>(out[i])]) - 127 : out[i] - kZero;
      out[i] = level * scale + offset;
    }
  }
}

const mla::CacheType kCacheTypes[] = {
    {"f32", 1, 4, 0, 0, 0, false, read_floats<F32>, encode_f32},
    {"f16", 1, 2, 0, 0, 0, false, read_floats<F16>, encode_f16},
    {"bf16", 1, 2, 0, 0, 0, false, read_floats<BF16>, encode_bf16},
    {"fp8_e4m3", 1, 1, 0, 0, 0, false, read_fp8_e4m3, mla::encode_fp8_e4m3},
    {"q8_0", 32, 32, 0, 2, 0, false, read_q8_0, encode_q8_0},
    {"q8_KV", 1, 1, 0, 4, 0, true, read_q8_kv, mla::encode_q8_kv},
    {"q6_0", 32, 16, 8, 2, 0, false, read_planes<2, 32>, mla::encode_q6_0},
    {"q5_1", 32, 16, 4, 2, 2, false, read_planes<1, 0>, mla::encode_q5_1},
    {"q5_0", 32, 16, 4, 2, 0, false, read_planes<1, 16>, mla::encode_q5_0},
    {"q4_1", 32, 16, 0, 2, 2, false, read_planes<0, 0>, mla::encode_q4_1},
    {"q4_0", 32, 16, 0, 2, 0, false, read_planes<0, 8>, mla::encode_q4_0},
    {"iq4_nl", 32, 16, 0, 2, 0, false, read_planes<0, -1>, mla::encode_iq4_nl},
};

const mla::CacheType* cache_type(std::string_view name) {
  for (const mla::CacheType& type : kCacheTypes)
    if (name == type.name) return &type;
  return nullptr;
}

// The place of a slot, counted over all pages; -1 where there is no page.
inline int64_t place_of(const LatentCache& cache, const int32_t* pages, int slot) {
  const int32_t page = pages[slot / cache.page_size];
  if (page < 0 || page >= cache.num_pages) return -1;
  return static_cast<int64_t>(page) * cache.page_size + slot % cache.page_size;
}

void read_slots(const LatentCache& cache, const CachePart& part, const int32_t* pages, int begin, int end, float* out,
                int64_t stride) {
  for (int slot = begin; slot < end; ++slot, out += stride) {
    const int64_t place = place_of(cache, pages, slot);
    if (place < 0)
      std::memset(out, 0, sizeof(float) * part.size);
    else
      part.type->read(part, place, out);
  }
}

// Asks for the codes of a slot, so that they come while others are met. GCC leaves out calls to a function that does
// nothing else.
[[gnu::always_inline]] inline void prefetch_slot(const LatentCache& cache, const int32_t* pages, int slot) {
  const int64_t place = place_of(cache, pages, slot);
  if (place < 0) return;
  for (const CachePart* part : {&cache.latent, &cache.rope}) {
    const int64_t bytes = part->size / part->type->block * part->type->low;
    const char* low = static_cast<const char*>(part->low) + place * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(low + i);
  }
}

}  // namespace MLA_ISA
