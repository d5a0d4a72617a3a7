// Activations as signed bytes: 32 neighbours share a scale, their largest magnitude / 127.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mla {

// A chunk of 256 columns of 16 rows, as panels of weights meet them: four columns of a row beside those of the next, or
// whole rows where tile registers are used.
struct alignas(64) ActivationTile {
  static constexpr int kRows = 16;
  union {
    int8_t codes[64][kRows][4];
    int8_t rows[kRows][256];
  };
  float scales[8][kRows], sums32[8][kRows], sums16[16][kRows];
};

// Makes room for `count`, and leaves more as it is: a vector that shrinks and grows clears what it grows by each time.
template <class T>
void hold(size_t count, std::vector<T>* out) {
  if (out->size() < count) out->resize(count);
}

// Rows of activations, as they came and quantised. Quantised rows are padded with zeros to whole chunks of 256.
struct Activations {
  const float* values = nullptr;  // [rows, size]
  int rows = 0, size = 0, padded = 0;
  std::vector<int8_t> codes;     // [rows, padded], these and the following at least
  std::vector<float> scales;     // [rows, padded / 32]
  std::vector<float> sums32;     // [rows, padded / 32]: scale * sum of the codes of 32 neighbours
  std::vector<float> sums16;     // [rows, padded / 16]: the same of 16
  std::vector<ActivationTile> tiles;  // memory for selections of them

  void resize(int num_rows, int row_size) {
    rows = num_rows;
    size = row_size;
    padded = (size + 255) / 256 * 256;
    const size_t count = static_cast<size_t>(rows) * padded;
    hold(count, &codes);
    hold(count / 32, &scales);
    hold(count / 32, &sums32);
    hold(count / 16, &sums16);
  }
  int64_t chunks() const { return padded / 256; }
  const float* values_of(int row) const { return values + static_cast<size_t>(row) * size; }
  const int8_t* codes_of(int row) const { return codes.data() + static_cast<size_t>(row) * padded; }
  const float* scales_of(int row) const { return scales.data() + static_cast<size_t>(row) * padded / 32; }
  const float* sums32_of(int row) const { return sums32.data() + static_cast<size_t>(row) * padded / 32; }
  const float* sums16_of(int row) const { return sums16.data() + static_cast<size_t>(row) * padded / 16; }
};

}  // namespace mla
