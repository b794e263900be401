// ||W'_n|| per output row: decode the row, multiply it with itself in float32.
#pragma once

#include "linear.hpp"

namespace rankwise {

template <class Isa, int D>
static void norms_of_rows(const rw_weight& weight, int64_t K, int64_t first, int64_t last, float* norms) {
    float* row = scratch<Isa, float>(K);
    for (int64_t n = first; n < last; ++n) {
        decode<Isa, D>(weight, n * K, K, row);
        float square;
        tile<typename Isa::FloatLane, 1, 1>(row, K, row, K, K, &square);
        norms[n] = __builtin_sqrtf(square);
    }
}

template <class Isa>
static void row_norms(const rw_weight& weight, int64_t K, int dtype, int64_t first, int64_t last, float* norms) {
    switch (dtype) {
        case RW_FLOAT32: return norms_of_rows<Isa, RW_FLOAT32>(weight, K, first, last, norms);
        case RW_BFLOAT16: return norms_of_rows<Isa, RW_BFLOAT16>(weight, K, first, last, norms);
        default: return norms_of_rows<Isa, RW_FLOAT16>(weight, K, first, last, norms);
    }
}

}  // namespace rankwise
