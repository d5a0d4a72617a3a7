// The rules of `mla_jax.quant.quantisers`, a block at a time, and the planes of `mla_jax.cache.codec`.
#define MLA_ISA plain  // what is shared with instruction sets is compiled for this file alone
#include "cache_encoders.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cache_encode.h"

namespace mla {

namespace {

constexpr int kBlock = 32, kMaxMoves = 1024;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLevels[16] = {  // of iq4_nl, as signed numbers
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Scale {
  float scale, offset = 0;
};

// The number of largest magnitude, of several the first.
float extreme_of(const float* x) {
  float extreme = x[0];
  for (int i = 1; i < kBlock; ++i)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  return extreme;
}

// What brings `extreme` to `code`, by way of the scale; 0 for a block of zeros, or of numbers too small for a scale.
float inverse_of(float extreme, float code) {
  const float inverse = 1 / (extreme / code);
  return std::isfinite(inverse) ? inverse : 0;
}

// The nearest whole number in [smallest, largest], ties to even.
int nearest(float x, float smallest, float largest) {
  return static_cast<int>(std::nearbyintf(std::clamp(x, smallest, largest)));
}

// The two sums of a least-squares scale for levels c: of w c x and w c c.
struct Fit {
  float along = 0, length = 0;

  void add(float weight, float level, float x) {
    const float product = weight * level;
    along += product * x;
    length += product * level;
  }
  float scale(float otherwise) const { return length > 0 ? along / length : otherwise; }
};

// Codes of kHalf below to kHalf - 1 above zero; the scale has the sign that puts the extreme at code 0.
template <int kHalf, bool kRefit>
Scale from_extreme(const float* x, uint8_t* codes) {
  const float extreme = extreme_of(x), inverse = inverse_of(extreme, -kHalf);
  Fit fit;
  for (int i = 0; i < kBlock; ++i) {
    const float scaled = x[i] * inverse;
    codes[i] = static_cast<uint8_t>(std::min(static_cast<int>(scaled + (kHalf + 0.5f)), 2 * kHalf - 1));
    if (kRefit) fit.add(scaled * scaled, static_cast<float>(codes[i] - kHalf), x[i]);
  }
  return {fit.scale(extreme / -kHalf)};
}

template <int kLargestCode>
Scale from_minimum(const float* x, uint8_t* codes) {
  const float smallest = *std::min_element(x, x + kBlock), spread = *std::max_element(x, x + kBlock) - smallest;
  const float inverse = inverse_of(spread, kLargestCode);
  for (int i = 0; i < kBlock; ++i)
    codes[i] = static_cast<uint8_t>(std::min(static_cast<int>((x[i] - smallest) * inverse + 0.5f), kLargestCode));
  return {spread / kLargestCode, smallest};
}

Scale search_q4_0(const float* x, uint8_t* codes) {
  const float smallest = *std::min_element(x, x + kBlock), largest = *std::max_element(x, x + kBlock);
  const float extreme = std::fabs(largest) > std::fabs(smallest) ? largest : smallest;
  const float inverse = std::fabs(extreme) > 1e-13f ? inverse_of(extreme, -8) : 0;
  Fit fit;
  for (int i = 0; i < kBlock; ++i) {
    const int code = nearest(x[i] * inverse, -8, 7);
    codes[i] = static_cast<uint8_t>(code + 8);
    fit.add(x[i] * x[i], static_cast<float>(code), x[i]);
  }
  return {fit.scale(extreme / -8)};
}

// Moves the code whose step needs the least push, if the fit improves; returns whether it did.
bool move_one_code(const float* x, uint8_t* codes, Fit* fit) {
  const float scale = fit->along / fit->length;
  float least = std::numeric_limits<float>::infinity();
  int chosen = -1, moved = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float level = kLevels[codes[i]], slope = scale * (x[i] * x[i]) * (x[i] - scale * level);
    const int next = codes[i] + (slope > 0) - (slope < 0);
    if (next == codes[i] || next < 0 || next > 15) continue;
    const float push = (kLevels[next] - level) / slope;
    if (push < least) least = push, chosen = i, moved = next;
  }
  if (chosen < 0) return false;
  const float level = kLevels[codes[chosen]], next = kLevels[moved], weight = x[chosen] * x[chosen];
  const float along = fit->along + weight * x[chosen] * (next - level);
  const float length = fit->length + weight * (next * next - level * level);
  if (!(length > 0 && along * along > scale * fit->along * length)) return false;
  codes[chosen] = static_cast<uint8_t>(moved);
  *fit = {along, length};
  return true;
}

Scale search_iq4_nl(const float* x, uint8_t* codes) {
  const float extreme = extreme_of(x), inverse = inverse_of(extreme, kLevels[0]);
  Fit fit;
  for (int i = 0; i < kBlock; ++i) {
    const float scaled = x[i] * inverse;
    int code = 0;
    for (int level = 1; level < 16; ++level) code += scaled >= (kLevels[level - 1] + kLevels[level]) / 2;
    codes[i] = static_cast<uint8_t>(extreme == 0 ? 0 : code);
    fit.add(x[i] * x[i], kLevels[codes[i]], x[i]);
  }
  for (int i = 0; i < kMaxMoves; ++i)
    if (extreme == 0 || !move_one_code(x, codes, &fit)) break;
  return {fit.scale(0)};
}

// Numbers of a row within the range that scales reach; returns whether each is one.
bool read_block(const float* row, int count, float* x) {
  bool are_numbers = true;
  for (int i = 0; i < count; ++i) {
    are_numbers &= row[i] == row[i];
    x[i] = std::clamp(row[i], -plain::kLargest, plain::kLargest);
  }
  return are_numbers;
}

// Of codes of less than a byte, the kBits from bit kFirst on: byte j of a row holds those of j, j + n, j + 2 n, ...
template <int kBits, int kFirst>
void pack(const std::vector<uint8_t>& codes, void* plane, int64_t place) {
  const int bytes = static_cast<int>(codes.size()) * kBits / 8;
  uint8_t* out = static_cast<uint8_t*>(plane) + place * bytes;
  std::fill_n(out, bytes, 0);
  for (int part = 0; part < 8 / kBits; ++part)
    for (int i = 0; i < bytes; ++i)
      out[i] |= static_cast<uint8_t>((codes[part * bytes + i] >> kFirst & ((1 << kBits) - 1)) << (part * kBits));
}

template <int kHighBits, class Search>
void encode_blocks(const float* row, int size, int64_t place, const CacheTarget& target, const Search& search) {
  thread_local std::vector<uint8_t> codes;
  codes.resize(size);
  const int blocks = size / kBlock;
  for (int b = 0; b < blocks; ++b) {
    float x[kBlock];
    Scale found{kNan, kNan};
    if (read_block(row + b * kBlock, kBlock, x))
      found = search(x, codes.data() + b * kBlock);
    else
      std::fill_n(codes.data() + b * kBlock, kBlock, 0);
    static_cast<uint16_t*>(target.scale)[place * blocks + b] = plain::to_half(found.scale);
    if (target.offset != nullptr)
      static_cast<uint16_t*>(target.offset)[place * blocks + b] = plain::to_half(found.offset);
  }
  pack<4, 0>(codes, target.low, place);
  if constexpr (kHighBits > 0) pack<kHighBits, 4>(codes, target.high, place);
}

}  // namespace

// Four bits of exponent, three of fraction, no infinities: what lies beyond 448 is taken for it.
void encode_fp8_e4m3(const float* row, int size, int64_t place, const CacheTarget& target) {
  uint8_t* out = static_cast<uint8_t*>(target.low) + place * size;
  for (int i = 0; i < size; ++i) {
    const float magnitude = std::min(std::fabs(row[i]), 448.0f);
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    uint32_t code;
    if (bits < 121u << 23)  // below 2 ** -6: counted in steps of 2 ** -9
      code = static_cast<uint32_t>(std::nearbyintf(magnitude * 512));
    else
      code = (bits - (120u << 23) + 0x7FFFF + (bits >> 20 & 1)) >> 20;
    out[i] = static_cast<uint8_t>(row[i] != row[i] ? 0x7F : code | (std::signbit(row[i]) ? 0x80 : 0));
  }
}

void encode_q8_kv(const float* row, int size, int64_t place, const CacheTarget& target) {
  thread_local std::vector<float> x;
  x.resize(size);
  const bool are_numbers = read_block(row, size, x.data());
  float largest = 0;
  for (const float number : x) largest = std::max(largest, std::fabs(number));
  const float scale = largest / 127, inverse = are_numbers ? inverse_of(scale, 1) : 0;
  int8_t* codes = static_cast<int8_t*>(target.low) + place * size;
  for (int i = 0; i < size; ++i) codes[i] = static_cast<int8_t>(are_numbers ? nearest(x[i] * inverse, -128, 127) : 0);
  static_cast<float*>(target.scale)[place] = are_numbers ? scale : kNan;
}

void encode_q6_0(const float* row, int size, int64_t place, const CacheTarget& target) {
  encode_blocks<2>(row, size, place, target, from_extreme<32, true>);
}

void encode_q5_1(const float* row, int size, int64_t place, const CacheTarget& target) {
  encode_blocks<1>(row, size, place, target, from_minimum<31>);
}

void encode_q5_0(const float* row, int size, int64_t place, const CacheTarget& target) {
  encode_blocks<1>(row, size, place, target, from_extreme<16, false>);
}

void encode_q4_1(const float* row, int size, int64_t place, const CacheTarget& target) {
  encode_blocks<0>(row, size, place, target, from_minimum<15>);
}

void encode_q4_0(const float* row, int size, int64_t place, const CacheTarget& target) {
  encode_blocks<0>(row, size, place, target, search_q4_0);
}

void encode_iq4_nl(const float* row, int size, int64_t place, const CacheTarget& target) {
  encode_blocks<0>(row, size, place, target, search_iq4_nl);
}

}  // namespace mla
