// Activations as signed bytes: 32 neighbours share a scale, their largest magnitude / 127.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mla {

// Rows of activations, as they came and quantised. Quantised rows are padded with zeros to whole chunks of 256.
struct Activations {
  const float* values = nullptr;  // [rows, size]
  int rows = 0, size = 0, padded = 0;
  std::vector<int8_t> codes;     // [rows, padded]
  std::vector<float> scales;     // [rows, padded / 32]
  std::vector<float> sums32;     // [rows, padded / 32]: scale * sum of the codes of 32 neighbours
  std::vector<float> sums16;     // [rows, padded / 16]: the same of 16

  void resize(int num_rows, int row_size) {
    rows = num_rows;
    size = row_size;
    padded = (size + 255) / 256 * 256;
    codes.resize(static_cast<size_t>(rows) * padded);
    scales.resize(static_cast<size_t>(rows) * padded / 32);
    sums32.resize(static_cast<size_t>(rows) * padded / 32);
    sums16.resize(static_cast<size_t>(rows) * padded / 16);
  }
  const float* values_of(int row) const { return values + static_cast<size_t>(row) * size; }
  const int8_t* codes_of(int row) const { return codes.data() + static_cast<size_t>(row) * padded; }
  const float* scales_of(int row) const { return scales.data() + static_cast<size_t>(row) * padded / 32; }
  const float* sums32_of(int row) const { return sums32.data() + static_cast<size_t>(row) * padded / 32; }
  const float* sums16_of(int row) const { return sums16.data() + static_cast<size_t>(row) * padded / 16; }
};

}  // namespace mla
