// <W_n A^T, B_n> per row n of W, in float32: what DoRA's norm needs of W + s B A without its dense sum.
#pragma once

#include "common/vector.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

// Rows of W and of A whose products are in registers together.
constexpr int kCrossRows = 4;

template <int D, int Rows, int Ranks>
RW_INLINE void cross_block(const RowCrossJob& job, int64_t n, int64_t r) {
    Floats sum[Rows][Ranks] = {};
    each_vector(job.K, [&](int64_t k, auto part) RW_INLINED {
        Floats w[Rows];
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) w[i] = load<D>(job.W, (n + i) * job.K + k, part);
#pragma GCC unroll 4
        for (int j = 0; j < Ranks; ++j) {
            const Floats a = load<RW_FLOAT32>(job.A, (r + j) * job.K + k, part);
#pragma GCC unroll 4
            for (int i = 0; i < Rows; ++i) sum[i][j] = madd(w[i], a, sum[i][j]);
        }
    });
    for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < Ranks; ++j) job.cross[n + i] += total(sum[i][j]) * job.B[(n + i) * job.R + r + j];
}

template <int D, int Rows>
void cross_rows(const RowCrossJob& job, int64_t n) {
    for (int i = 0; i < Rows; ++i) job.cross[n + i] = 0.0f;
    int64_t r = 0;
    for (; r + kCrossRows <= job.R; r += kCrossRows) cross_block<D, Rows, kCrossRows>(job, n, r);
    for (; r < job.R; ++r) cross_block<D, Rows, 1>(job, n, r);
}

template <int D>
void cross_of(const RowCrossJob& job, int64_t first, int64_t last) {
    int64_t n = first;
    for (; n + kCrossRows <= last; n += kCrossRows) cross_rows<D, kCrossRows>(job, n);
    for (; n < last; ++n) cross_rows<D, 1>(job, n);
}

inline void row_cross(const RowCrossJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? cross_of<RW_FLOAT32>(job, first, last) : cross_of<RW_BFLOAT16>(job, first, last);
}

}  // namespace
}  // namespace rankwise::RW_ISA
