// What one instruction-set level offers: each function works on one thread's share of a larger job.
#pragma once

#include <cstdint>

#include "rankwise_native.h"

namespace rankwise {

struct QuantizeJob {
    const void* w;
    int dtype;
    int64_t n, block_size;
    const float* bound;
    const uint8_t* order;
    uint8_t* packed;
    float* absmax;
};

struct LinearJob {
    const rw_weight* weight;
    // Pieces of `piece` columns (the last may be narrower), each with all T rows: at row stride K they would fall into
    // few sets of the cache. Floats, or bfloat16 where dtype is that and the level multiplies it.
    const void* x;
    int64_t piece;
    bool apart;  // within each group of x, elements stand in the order in which codes are cheap to decode
    bool fused;  // one piece per group, T <= fused_rows
    int64_t T, N, K;
    int dtype;
    const void* bias;
    void* y;
};

struct FourBitKernels {
    // Blocks [first, last); returns the first one with NaN or Inf, or -1.
    int64_t (*quantize)(const QuantizeJob& job, int64_t first, int64_t last);
    // Elements [first, first + count) of the weight to out[0 ...].
    void (*dequantize)(const rw_weight& weight, int64_t first, int64_t count, int dtype, void* out);
    // Output features [first, last).
    void (*linear)(const LinearJob& job, int64_t first, int64_t last);
    void (*row_norms)(const rw_weight& weight, int64_t K, int dtype, int64_t first, int64_t last, float* norms);
    // Columns [k, k + count) of T rows of x, of `dtype`, to the elements that `linear` reads.
    void (*arrange)(const void* x, int dtype, int64_t T, int64_t K, int64_t k, int64_t count, bool apart, void* out);
    // Elements of x per group of `linear`.
    int64_t (*group)(int dtype);
    // Whether `linear` reads bfloat16 x as it is.
    bool multiplies_bfloat16;
    // Maximum number of rows of x for which `linear` decodes weights into registers.
    int64_t fused_rows;
    // `linear` for a single row of x, of float32 or bfloat16, that `arrange_one_row` has reordered; null where the
    // level has no such kernel.
    void (*one_row)(const LinearJob& job, int64_t first, int64_t last);
    void (*arrange_one_row)(const void* x, int dtype, int64_t K, float* out);
};

}  // namespace rankwise
