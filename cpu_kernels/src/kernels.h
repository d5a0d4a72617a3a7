// What each instruction set implements; `kernels.cc` is compiled once for each of them.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <string_view>

#include "activations.h"

namespace mla {

struct Format;

// A weight matrix [rows, size]. The blocks of a row lie together; the headers that some formats have lie apart.
struct Matrix {
  const Format* format;
  int64_t rows, size;
  const uint8_t* blocks;
  const uint8_t* end;  // of the memory that may be read
  const uint8_t* header;
  int64_t row_bytes, header_bytes;
  bool in_panels = false;  // of 16 rows: see panels512.h
  const uint8_t* next = nullptr;  // a hint: what panels are met after the rows of a call; null: those that follow

  // A part that begins with a row; in panels its number must be a multiple of 16.
  Matrix from_row(int64_t row) const {
    Matrix part = *this;
    part.blocks += row * row_bytes;
    part.header += row * header_bytes;
    return part;
  }
};

// A row of it.
struct Row {
  const uint8_t* header;
  const uint8_t* blocks;
};

constexpr int kFewRows = 2;  // of activations: more are met in tiles

// Some rows of activations: `index[i]` is the row of `source` that stands at place i; null: i itself.
struct Selection {
  const Activations* source;
  const int32_t* index;
  int count;
  const ActivationTile* tiles = nullptr;  // [tiles, chunks], where there are more than few and `arrange` makes them

  int row(int place) const { return index ? index[place] : place; }
  int64_t num_tiles() const { return (count + ActivationTile::kRows - 1) / ActivationTile::kRows; }
};

// A chunk of 256 columns of 16 rows of weights, unpacked: four columns of a row beside the same four of the next. Its
// product with an activation is the sum over groups of scale * (scale of the activation) * dot + offset * (its sum).
struct PanelView {
  const uint8_t* codes;           // [64][16][4]
  const float *scales, *offsets;  // [groups][16]
  int groups;
};

// Products of panels, whose scales are of `group` columns, with tiles of activations, by tile registers of a thread.
struct TileProducts {
  static constexpr int kFewest = ActivationTile::kRows + 1;  // fewer meet panels faster in other registers
  void (*begin)(int group);  // what `multiply` needs of the registers, which nothing else uses until `end`
  void (*end)();
  // sums[t][k] += dot(activations t, row k) of `count` rows of a tile.
  void (*multiply)(int group, const PanelView& weights, const ActivationTile& x, int count, float* sums);
};

// Some vectors that a transposed weight multiplies, and where the results go.
struct Vectors {
  const float* first;
  int64_t stride;  // from one to the next
  float* out;
  int64_t out_stride;
  int count;

  const float* in(int t) const { return first + t * stride; }
  float* to(int t) const { return out + t * out_stride; }
};

// What the codes of a format stand for: a byte for each of 8 or 4 neighbouring weights. Who calls the library has it.
struct Codebook {
  const char* name;
  int64_t bytes;
  const uint8_t* weights;  // null until it is set
};
enum { kIQ2_XXS, kIQ2_XS, kIQ2_S, kIQ3_XXS, kIQ3_S, kIQ1, kNumCodebooks };
extern Codebook codebooks[kNumCodebooks];

// A weight format, blocks of `block` weights in `bytes` bytes, and what can be done with it.
struct Format {
  const char* name;
  int block, bytes, header_bytes;
  bool is_float;  // meets activations as they are; the others meet bytes
  // out[i * stride + r] = dot(activations i, matrix row r) for r in [begin, end): the same whatever else is computed.
  void (*matmul)(const Matrix& matrix, int64_t begin, int64_t end, const Selection& x, float* out, int64_t stride);
  // to(t)[j] = sum over i of in(t)[i] * weight[begin + i][j]: the transposed product, of `count` rows.
  void (*transposed)(const Matrix& matrix, int64_t begin, int count, const Vectors& x);
  // Unpacks blocks to memory, see formats.h.
  void (*unpack)(Row row, int chunk, int blocks, uint8_t* codes, float* scales, float* offsets);
  const Codebook* codebook;  // null for most
  bool narrow;               // no code is above 127
  // out[i][k] = row r + k at column i of a chunk of 256: of 16 rows, the last of `rows` stands for missing ones. Zeros
  // follow the last column. Null: there are no such kernels.
  void (*columns)(const Matrix& matrix, int64_t r, int rows, int chunk, float (*out)[16]) = nullptr;
  bool reads_panels = false;       // `matmul` does
  bool transposes_panels = false;  // `transposed` does
};

// Attention to nothing has this as its largest score.
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// 16 numbers, a multiple of 64 bytes in memory.
constexpr int kLanes = 16;
struct alignas(64) Lanes {
  float of[kLanes] = {};
};

// Rows that attention reads are padded to whole vectors; keys and queries with zeros.
constexpr int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// How many `Lanes` hold so many numbers in bfloat16.
constexpr int64_t rounded_lanes(int64_t size) { return (size + 2 * kLanes - 1) / (2 * kLanes); }

struct CacheType;

// One part of cached rows, [pages, slots of a page, size], in the planes of `mla_jax.cache.codec`.
struct CachePart {
  const CacheType* type;
  int size;
  const void *low, *high, *scale, *offset;
};

// Where rows of a part are written to.
struct CacheTarget {
  void *low, *high, *scale, *offset;
};

// Rows are whole numbers of blocks, each of so many bytes in every plane.
struct CacheType {
  const char* name;
  int block, low, high, scale, offset;
  bool one_scale;  // for the whole row
  // Decodes the row at `place`, counted over all pages.
  void (*read)(const CachePart& part, int64_t place, float* out);
  // Encodes a row of `size` numbers to that place.
  void (*encode)(const float* row, int size, int64_t place, const CacheTarget& target);

  // Bytes of a row of `size` numbers in the planes low, high, scale and offset.
  std::array<int64_t, 4> row_bytes(int64_t size) const {
    const int64_t blocks = size / block;
    return {low * blocks, high * blocks, scale * (one_scale ? 1 : blocks), offset * blocks};
  }
};

struct LatentCache {
  CachePart latent, rope;
  int num_pages, page_size;

  int key_size() const { return latent.size + rope.size; }
  bool is_exact() const { return latent.type->name == std::string_view("f32"); }  // and nothing may be rounded
};

// Queries [count, padded key size]; each sees the slots up to its position.
struct Queries {
  const float* rows;
  const int32_t* positions;
  int count;
  float scale;  // multiplies the scores
  bool of_one_token = false;
  int length = 0;  // slots of their sequence, where the cache is read
};

// What attention to some slots gives for each query: the largest score, the sum of exp(score - largest), and the values
// weighted so, [count, padded value size].
struct Partials {
  float *tops, *sums, *out;
};

// Slots [0, end) with keys and values for one head: products of two weights with latents, which `round_latents` made.
struct HeadSlots {
  const LatentCache& cache;
  const int32_t* pages;
  const Lanes* latents;  // up to a multiple of 32 slots: later ones, or zeros
  Matrix keys, values;   // [key_size, rank] and [value_size, rank]
  int key_size, value_size, end;
};

struct Kernels {
  const char* name;
  const Format* formats;
  int num_formats;
  // Quantises row `row` of `out` from its values.
  void (*quantise)(Activations* out, int row);
  // Lays 16 rows of a selection, from place 16 * `tile` on, out as a tile of each chunk; null: none are needed.
  void (*arrange)(const Selection& x, int64_t tile, ActivationTile* out);
  // up[i] *= silu(gate[i])
  void (*gate)(const float* gate, float* up, int64_t count);
  // out[i] = x[i] * weight[i] / sqrt(mean of x squared + epsilon)
  void (*normalise)(const float* x, const float* weight, int64_t count, float epsilon, float* out);
  // out[i] += weight * x[i]
  void (*add)(const float* x, float weight, float* out, int64_t count);
  // Decodes one part of slots [begin, end) of a sequence to rows `stride` apart; zeros where there is no page.
  void (*read_slots)(const LatentCache& cache, const CachePart& part, const int32_t* pages, int begin, int end,
                     float* out, int64_t stride);
  // Attends to the latents in slots [begin, end) of a sequence: values are the latents themselves.
  void (*attend_latents)(const LatentCache& cache, const int32_t* pages, int begin, int end, const Queries& queries,
                         const Partials& partials);
  // Folds slots [begin, end) with keys [slots, padded key size] and values, both `stride` apart, into `partials`. Both
  // are readable up to the next multiple of 16 slots.
  void (*attend_tile)(const float* keys, int key_size, const float* values, int value_size, int64_t stride, int begin,
                      int end, const Queries& queries, const Partials& partials);
  // Rounds the latents in slots [begin, end) of a sequence to bfloat16, for `attend_head`: `rounded_lanes` of the rank
  // for each, 16 slots at a time. Both are null where a head is left to `attend_tile`.
  void (*round_latents)(const LatentCache& cache, const int32_t* pages, int begin, int end, Lanes* out);
  // Attends to slots of a head that are decompressed meanwhile.
  void (*attend_head)(const HeadSlots& slots, const Queries& queries, const Partials& partials);
  // Returns a cache type, null where there is none of that name.
  const CacheType* (*cache_type)(std::string_view name);
  const TileProducts* tile_products = nullptr;  // null: panels are met in other registers

  const Format* find(std::string_view format) const {
    for (int i = 0; i < num_formats; ++i)
      if (format == formats[i].name) return &formats[i];
    return nullptr;
  }
};

// Whether weights that lie in a row are asked for ahead of their products. AMD's processors are the faster for it.
// Intel's ask by themselves, and have fewer places left for that.
extern const bool asks_for_weights;

const Kernels& kernels();  // those in use: the best that this machine has, unless told otherwise

// Returns what multiplies so many rows of activations by tile registers; null where other registers do.
inline const TileProducts* tiles_for(int count) {
  return count >= TileProducts::kFewest ? kernels().tile_products : nullptr;
}

}  // namespace mla
