// From XLA's buffers to what the kernels take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace mla {

namespace ffi = xla::ffi;

constexpr int64_t kTaskNumbers = 2 << 10;  // to quantise, or of the gated middle: enough to pay for taking them
constexpr int kPanelRows = ActivationTile::kRows;
constexpr int64_t kTaskBytes = 64 << 10;  // of weights that few activations meet: enough to pay for taking a task

// Returns activations that this thread keeps, so that their memory is taken once.
inline Activations& scratch(int which) {
  thread_local Activations kept[2];
  return kept[which];
}

// Describes a weight: blocks [..., rows, blocks of a row, bytes], panels [..., rows / 16, blocks of a row, 16 * bytes],
// or numbers [..., rows, size]. The first matrix is meant.
inline ffi::Error read_matrix(const ffi::AnyBuffer& blocks, const ffi::AnyBuffer& header, std::string_view name,
                              Matrix* out) {
  const Format* format = kernels().find(name);
  if (format == nullptr) return ffi::Error::InvalidArgument("there is no kernel for format " + std::string(name));
  if (format->codebook != nullptr && format->codebook->weights == nullptr)
    return ffi::Error::InvalidArgument("the codebook of format " + std::string(name) + " was not set");
  const auto dims = blocks.dimensions();
  const size_t per_row = format->is_float ? 1 : 2;
  const bool in_panels = dims.size() > 0 && !format->is_float && dims.back() == kPanelRows * format->bytes;
  if (in_panels && !format->reads_panels)
    return ffi::Error::InvalidArgument("panels are read with AVX-512 alone, not panels of format " + std::string(name));
  if (dims.size() < per_row + 1 || (!format->is_float && !in_panels && dims.back() != format->bytes))
    return ffi::Error::InvalidArgument("blocks do not have the shape of format " + std::string(name));
  int64_t rows = in_panels ? kPanelRows : 1;
  for (size_t i = 0; i + per_row < dims.size(); ++i) rows *= dims[i];
  if (static_cast<int64_t>(header.size_bytes()) < rows * format->header_bytes)
    return ffi::Error::InvalidArgument("headers are missing for format " + std::string(name));
  out->format = format;
  out->in_panels = in_panels;
  out->rows = dims[dims.size() - per_row - 1] * (in_panels ? kPanelRows : 1);
  out->size = format->is_float ? dims.back() : dims[dims.size() - 2] * format->block;
  out->row_bytes = format->is_float ? dims.back() * format->bytes : dims[dims.size() - 2] * format->bytes;
  out->header_bytes = format->header_bytes;
  out->blocks = static_cast<const uint8_t*>(blocks.untyped_data());
  out->end = out->blocks + blocks.size_bytes();
  out->header = static_cast<const uint8_t*>(header.untyped_data());
  return ffi::Error::Success();
}

// A weight, and where it keeps the rows of each head.
struct Heads {
  Matrix matrix;
  int64_t stride, first;

  Matrix of(int64_t n) const { return matrix.from_row(n * stride + first); }

  bool hold(int64_t heads, int64_t size) const {
    if (matrix.in_panels && (stride % kPanelRows || first % kPanelRows || size % kPanelRows)) return false;
    const int64_t rows = matrix.row_bytes == 0 ? 0 : (matrix.end - matrix.blocks) / matrix.row_bytes;
    const auto within = [&](int64_t row) { return row >= 0 && row <= rows; };
    return within(stride) && within(first) && within((heads - 1) * stride + first + size);
  }
};

// Makes `out` hold rows of activations, quantised where the weights are.
inline void read_activations(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t size, bool quantised,
                             Activations* out) {
  out->values = x;
  out->rows = static_cast<int>(rows);
  out->size = static_cast<int>(size);
  if (!quantised) return;
  out->resize(out->rows, out->size);
  parallel_ranges(pool, rows, step_of(kTaskNumbers, size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernels().quantise(out, static_cast<int>(row));
  });
}

// Whether products with some rows of activations, quantised where the weights are, need tiles of them.
inline bool needs_tiles(const Selection& x, bool quantised) {
  return quantised && x.count > kFewRows && kernels().arrange != nullptr;
}

// Lays a selection out in tiles, if products with it need these.
inline void arrange_here(bool quantised, std::vector<ActivationTile>* memory, Selection* x) {
  if (!needs_tiles(*x, quantised)) return;
  const int64_t chunks = x->source->chunks();
  hold(x->num_tiles() * chunks, memory);
  for (int64_t tile = 0; tile < x->num_tiles(); ++tile) kernels().arrange(*x, tile, memory->data() + tile * chunks);
  x->tiles = memory->data();
}

// The same of all rows of some activations, which keep the tiles, by several threads.
inline void arrange(ffi::ThreadPool& pool, Activations* memory, bool quantised, Selection* x) {
  if (!needs_tiles(*x, quantised)) return;
  hold(x->num_tiles() * memory->chunks(), &memory->tiles);
  parallel_for(pool, x->num_tiles(), [&](int64_t tile) {
    kernels().arrange(*x, tile, memory->tiles.data() + tile * memory->chunks());
  });
  x->tiles = memory->tiles.data();
}

// Returns how many rows of `parts` matrices, which so many activations meet, a task takes: each is worth its taking,
// and all threads take as many, as nearly as whole panels allow.
inline int64_t rows_per_task(const Matrix& matrix, int64_t parts, int64_t activations, int64_t threads) {
  threads = std::max<int64_t>(threads, 1);
  const int64_t work = matrix.rows * parts * matrix.row_bytes * std::clamp<int64_t>(activations, 1, 4);
  int64_t tasks = std::clamp<int64_t>((work + kTaskBytes - 1) / kTaskBytes, 1, 4 * threads);
  if (tasks > threads) tasks -= tasks % threads;
  const int64_t step = std::max<int64_t>((matrix.rows * parts + tasks - 1) / tasks, 1);
  const int64_t steps = std::max<int64_t>((matrix.rows + step - 1) / step, 1);  // of a matrix
  return std::max<int64_t>((matrix.rows + steps - 1) / steps + 15, 16) / 16 * 16;
}

}  // namespace mla
