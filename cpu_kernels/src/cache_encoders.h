// Encoders of cache types whose codes take more than a rounding: built once, so that no instruction set changes a code.
#pragma once

#include "kernels.h"

namespace mla {

void encode_fp8_e4m3(const float* row, int size, int64_t place, const CacheTarget& target);
void encode_q8_kv(const float* row, int size, int64_t place, const CacheTarget& target);
void encode_q6_0(const float* row, int size, int64_t place, const CacheTarget& target);
void encode_q5_1(const float* row, int size, int64_t place, const CacheTarget& target);
void encode_q5_0(const float* row, int size, int64_t place, const CacheTarget& target);
void encode_q4_1(const float* row, int size, int64_t place, const CacheTarget& target);
void encode_q4_0(const float* row, int size, int64_t place, const CacheTarget& target);
void encode_iq4_nl(const float* row, int size, int64_t place, const CacheTarget& target);

}  // namespace mla
