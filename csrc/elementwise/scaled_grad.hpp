// dz = dy * g and sum_t dy * y. Four rows at a time, so that the open sums of a column are read and written once for
// the four.
#pragma once

#include "common/vector.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

template <int D, bool Dot, int Rows>
void grad_rows(const ScaledGradJob job, int64_t t, float* sums) {
    each_vector(job.N, [&](int64_t n, auto part) RW_INLINED {
        const Floats g = load<RW_FLOAT32>(job.g, n, part);
        Floats sum = Dot ? load<RW_FLOAT32>(sums, n, part) : Floats{};
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const Floats dy = load<D>(job.dy, (t + r) * job.dy_stride + n, part);
            store<D>(job.dz, (t + r) * job.N + n, dy * g, part);
            if (Dot) sum = madd(dy, load<D>(job.y, (t + r) * job.y_stride + n, part), sum);
        }
        if (Dot) store<RW_FLOAT32>(sums, n, sum, part);
    });
}

template <int D, bool Dot>
void grad_blocks(const ScaledGradJob job, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        float* sums = Dot ? job.partial + block * job.N : nullptr;
        if (Dot) std::memset(sums, 0, sizeof(float) * static_cast<std::size_t>(job.N));
        const int64_t end = (block + 1) * kGradRows < job.T ? (block + 1) * kGradRows : job.T;
        int64_t t = block * kGradRows;
        for (; t + 4 <= end; t += 4) grad_rows<D, Dot, 4>(job, t, sums);
        for (; t < end; ++t) grad_rows<D, Dot, 1>(job, t, sums);
    }
}

inline void scaled_grad(const ScaledGradJob& job, int64_t first, int64_t last) {
    if (job.dtype == RW_FLOAT32) {
        job.y ? grad_blocks<RW_FLOAT32, true>(job, first, last) : grad_blocks<RW_FLOAT32, false>(job, first, last);
    } else {
        job.y ? grad_blocks<RW_BFLOAT16, true>(job, first, last) : grad_blocks<RW_BFLOAT16, false>(job, first, last);
    }
}

}  // namespace
}  // namespace rankwise::RW_ISA
