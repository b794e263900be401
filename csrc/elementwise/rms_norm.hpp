// y = (offset + w) * (x rstd) and its gradient, a row at a time: the second pass over a row finds it in the first-level
// cache.
#pragma once

#include "common/vector.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

// The sum of value(i, part) over a row, in four interleaved sums.
template <class Value>
RW_INLINE float sum_of_row(int64_t count, const Value& value) {
    Floats sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sum[k] = value(sum[k], i + k * W, Whole{});
    for (; i + W <= count; i += W) sum[0] = value(sum[0], i, Whole{});
    if (i < count) sum[1] = value(sum[1], i, Some{static_cast<int>(count - i)});
    return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <int D, bool CastFirst>
void norm_rows(const NormJob job, int64_t first, int64_t last) {
    const float offset = static_cast<float>(job.offset);
    for (int64_t t = first; t < last; ++t) {
        const int64_t from = t * job.x_stride, to = t * job.D;
        const float square = sum_of_row(job.D, [&](Floats sum, int64_t i, auto part) RW_INLINED {
            const Floats x = load<D>(job.x, from + i, part);
            return madd(x, x, sum);
        });
        const float rstd = 1.0f / __builtin_sqrtf(square / static_cast<float>(job.D) + job.eps);
        job.rstd[t] = rstd;
        each_vector(job.D, [&](int64_t i, auto part) RW_INLINED {
            const Floats normal = load<D>(job.x, from + i, part) * rstd;
            const Floats factor = load<D>(job.w, i, part) + offset;
            store<D>(job.y, to + i, factor * (CastFirst ? rounded_to<D>(normal) : normal), part);
        });
    }
}

template <int D, bool Residual>
void norm_backward_rows(const NormBackwardJob job, int64_t first, int64_t last) {
    const float offset = static_cast<float>(job.offset);
    for (int64_t t = first; t < last; ++t) {
        const int64_t x_row = t * job.x_stride, dy_row = t * job.dy_stride, residual_row = t * job.residual_stride;
        const auto h = [&](int64_t i, auto part) RW_INLINED {
            return load<D>(job.dy, dy_row + i, part) * (load<D>(job.w, i, part) + offset);
        };
        const float product = sum_of_row(job.D, [&](Floats sum, int64_t i, auto part) RW_INLINED {
            return madd(h(i, part), load<D>(job.x, x_row + i, part), sum);
        });
        const float rstd = job.rstd[t], share = -rstd * rstd * (product / static_cast<float>(job.D));
        each_vector(job.D, [&](int64_t i, auto part) RW_INLINED {
            Floats dx = madd(load<D>(job.x, x_row + i, part), all(share), h(i, part)) * rstd;
            if (Residual) dx = dx + load<D>(job.residual, residual_row + i, part);
            store<D>(job.dx, t * job.D + i, dx, part);
        });
    }
}

template <int D>
void rms_norm_of(const NormJob& job, int64_t first, int64_t last) {
    job.cast_first ? norm_rows<D, true>(job, first, last) : norm_rows<D, false>(job, first, last);
}

template <int D>
void rms_norm_backward_of(const NormBackwardJob& job, int64_t first, int64_t last) {
    job.residual ? norm_backward_rows<D, true>(job, first, last) : norm_backward_rows<D, false>(job, first, last);
}

inline void rms_norm(const NormJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? rms_norm_of<RW_FLOAT32>(job, first, last) : rms_norm_of<RW_BFLOAT16>(job, first, last);
}

inline void rms_norm_backward(const NormBackwardJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? rms_norm_backward_of<RW_FLOAT32>(job, first, last)
                            : rms_norm_backward_of<RW_BFLOAT16>(job, first, last);
}

}  // namespace
}  // namespace rankwise::RW_ISA
