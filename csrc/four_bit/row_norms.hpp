// ||W'_n|| per output row: decode a piece of the row, multiply it with itself in float32.
#pragma once

#include "four_bit/decode.hpp"
#include "four_bit/tile.hpp"

namespace rankwise::RW_ISA {

template <class Isa, int D>
static void norms_of_rows(const rw_weight& weight, int64_t K, int64_t first, int64_t last, float* norms) {
    using Lane = typename Isa::FloatLane;
    constexpr int64_t piece = 1024;
    float row[piece];
    for (int64_t n = first; n < last; ++n) {
        typename Lane::Sum square = Lane::zero();
        for (int64_t k = 0; k < K; k += piece) {
            const int64_t count = K - k < piece ? K - k : piece;
            decode<Isa, D>(weight, n * K + k, count, row);
            tile<Lane, 1, 1>(row, 0, row, 0, count, &square, 0);
        }
        norms[n] = __builtin_sqrtf(Lane::total(square));
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

}  // namespace rankwise::RW_ISA
