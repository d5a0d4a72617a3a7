// Which instruction set is in use, and what Python asks the library.
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/c_api.h"

#if defined(MLA_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MLA_DECLARE(isa)              \
  namespace isa {                     \
  extern const mla::Kernels kernels;  \
  }
MLA_DECLARE(generic)
MLA_DECLARE(avx2)
MLA_DECLARE(avx512)
namespace avx512bf16 {
void attend_rounded_latents(const mla::LatentCache& cache, const int32_t* pages, int begin, int end,
                            const mla::Queries& queries, const mla::Partials& partials);
}
namespace amx {
void attend_tiled_latents(const mla::LatentCache& cache, const int32_t* pages, int begin, int end,
                          const mla::Queries& queries, const mla::Partials& partials);
void round_latents(const mla::LatentCache& cache, const int32_t* pages, int begin, int end, mla::Lanes* out);
void attend_tiled_head(const mla::HeadSlots& slots, const mla::Queries& queries, const mla::Partials& partials);
extern const mla::TileProducts tile_products;
}

namespace mla {

namespace {

#if defined(MLA_HAS_AVX512)
// AVX-512 but for attention.
[[maybe_unused]] Kernels attending_by(const char* name, decltype(Kernels::attend_latents) attend_latents) {
  Kernels kernels = avx512::kernels;
  kernels.name = name;
  kernels.attend_latents = attend_latents;
  return kernels;
}
#endif

#if defined(MLA_HAS_AMX)
const Kernels& with_tiles() {
  static const Kernels all = [] {
    Kernels kernels = attending_by("amx", amx::attend_tiled_latents);
    kernels.round_latents = amx::round_latents;
    kernels.attend_head = amx::attend_tiled_head;
    kernels.tile_products = &amx::tile_products;
    return kernels;
  }();
  return all;
}

// Whether there are tile registers for bfloat16 and for bytes, and the system lets this process use them.
bool has_tiles() {
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24, kBytes = 1u << 25;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kBfloat16 | kTiles | kBytes))) return false;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

// The n-th of those that this machine has, the best first; null past the last.
const Kernels* available(int n) {
  const Kernels* found[5];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(MLA_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(MLA_HAS_AMX)
    if (__builtin_cpu_supports("avx512bf16") && has_tiles()) found[count++] = &with_tiles();
#endif
#if defined(MLA_HAS_AVX512BF16)
    static const Kernels with_bfloat16 = attending_by("avx512bf16", avx512bf16::attend_rounded_latents);
    if (__builtin_cpu_supports("avx512bf16")) found[count++] = &with_bfloat16;
#endif
    found[count++] = &avx512::kernels;
  }
#endif
#if defined(MLA_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))  // and so has F16C
    found[count++] = &avx2::kernels;
#endif
  found[count++] = &generic::kernels;
  return n < count ? found[n] : nullptr;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const bool asks_for_weights = [] {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return false;
#endif
}();

const Kernels& kernels() {
  const Kernels* chosen = in_use.load(std::memory_order_relaxed);
  if (chosen == nullptr) {
    chosen = available(0);
    in_use.store(chosen, std::memory_order_relaxed);
  }
  return *chosen;
}

Codebook codebooks[kNumCodebooks] = {
    {"iq2_xxs", 256 * 8, nullptr}, {"iq2_xs", 512 * 8, nullptr}, {"iq2_s", 1024 * 8, nullptr},
    {"iq3_xxs", 256 * 4, nullptr}, {"iq3_s", 512 * 4, nullptr},  {"iq1", 2048 * 8, nullptr},
};

}  // namespace mla

// Returns whether there is such a codebook; `weights` must stay where they are.
extern "C" int mla_set_codebook(const char* name, const uint8_t* weights, int64_t bytes) {
  for (mla::Codebook& codebook : mla::codebooks)
    if (std::string_view(name) == codebook.name && bytes == codebook.bytes) {
      codebook.weights = weights;
      return 1;
    }
  return 0;
}

extern "C" const char* mla_available(int n) {
  const mla::Kernels* found = mla::available(n);
  return found == nullptr ? nullptr : found->name;
}

extern "C" void mla_use(int n) { mla::in_use.store(mla::available(n), std::memory_order_relaxed); }

extern "C" const char* mla_format(int n) {
  const mla::Kernels& kernels = mla::kernels();
  return n < kernels.num_formats ? kernels.formats[n].name : nullptr;
}

// Of `mla_format`: the bytes of its blocks, and whether its weights may lie in panels, also to be read transposed.
extern "C" int mla_block_bytes(int n) { return mla::kernels().formats[n].bytes; }
extern "C" int mla_reads_panels(int n) { return mla::kernels().formats[n].reads_panels; }
extern "C" int mla_transposes_panels(int n) { return mla::kernels().formats[n].transposes_panels; }

// Lays `panels` times 16 rows of blocks out in panels, where they are. Of a block all but a scale of two bytes at
// `scale` (or nowhere: -1) is words of four bytes, and comes after it or before.
extern "C" void mla_to_panels(uint8_t* weight, int64_t panels, int64_t per_row, int64_t bytes, int64_t scale) {
  constexpr int kRows = mla::ActivationTile::kRows;
  const int64_t row_bytes = per_row * bytes, first = scale == 0 ? 2 : 0, words = bytes / 4;
  std::vector<uint8_t> rows(kRows * row_bytes);
  uint8_t* out = weight;
  for (int64_t panel = 0; panel < panels; ++panel) {
    std::memcpy(rows.data(), out, rows.size());
    for (int64_t b = 0; b < per_row; ++b, out += kRows * bytes) {
      const uint8_t* block = rows.data() + b * bytes;
      uint8_t* codes = out + first * kRows;
      uint8_t* scales = scale == 0 ? out : out + 4 * words * kRows;
      for (int row = 0; row < kRows; ++row, block += row_bytes) {
        for (int64_t w = 0; w < words; ++w) std::memcpy(codes + (w * kRows + row) * 4, block + first + 4 * w, 4);
        if (scale >= 0) std::memcpy(scales + 2 * row, block + scale, 2);
      }
    }
  }
}

// MLA_SOURCES comes from CMakeLists.txt: a digest of what the library is built from.
extern "C" const char* mla_sources() { return MLA_SOURCES; }

extern "C" int mla_ffi_major() { return XLA_FFI_API_MAJOR; }
extern "C" int mla_ffi_minor() { return XLA_FFI_API_MINOR; }
