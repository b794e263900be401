// (q_1 cos_1 - q_2 sin_1, q_2 cos_2 + q_1 sin_2), or transposed (q_1 cos_1 + q_2 sin_2, q_2 cos_2 - q_1 sin_1).
#pragma once

#include "training.hpp"
#include "vector.hpp"

namespace rankwise {
namespace {

template <int D, int C>
void turn_head(const RopeJob& job, int64_t q, int64_t table, int64_t out) {
    const int64_t half = job.rotary / 2;
    each_vector(half, [&](int64_t i, auto part) {
        const Floats q_1 = load<D>(job.q, q + i, part), q_2 = load<D>(job.q, q + half + i, part);
        const Floats cos_1 = load<C>(job.cos, table + i, part), cos_2 = load<C>(job.cos, table + half + i, part);
        Floats sin_1 = load<C>(job.sin, table + i, part), sin_2 = load<C>(job.sin, table + half + i, part);
        if (job.inverse) {
            const Floats other = -sin_1;
            sin_1 = -sin_2;
            sin_2 = other;
        }
        store<D>(job.out, out + i, q_1 * cos_1 - q_2 * sin_1, part);
        store<D>(job.out, out + half + i, q_2 * cos_2 + q_1 * sin_2, part);
    });
    if (job.out == job.q || job.rotary == job.D) return;
    constexpr int64_t size = D == RW_FLOAT32 ? 4 : 2;
    std::memcpy(static_cast<char*>(job.out) + (out + job.rotary) * size, static_cast<const char*>(job.q) + (q + job.rotary) * size,
                static_cast<std::size_t>((job.D - job.rotary) * size));
}

template <int D, int C>
void turn_positions(const RopeJob& job, int64_t first, int64_t last) {
    for (int64_t position = first; position < last; ++position) {
        const int64_t b = position / job.L, l = position % job.L, table = b * job.batch_stride + l * job.rotary;
        for (int64_t h = 0; h < job.H; ++h)
            turn_head<D, C>(job, b * job.q_stride[0] + h * job.q_stride[1] + l * job.q_stride[2], table,
                            b * job.out_stride[0] + h * job.out_stride[1] + l * job.out_stride[2]);
    }
}

template <int D>
void rope_of(const RopeJob& job, int64_t first, int64_t last) {
    job.table_dtype == RW_FLOAT32 ? turn_positions<D, RW_FLOAT32>(job, first, last) : turn_positions<D, RW_BFLOAT16>(job, first, last);
}

inline void rope(const RopeJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? rope_of<RW_FLOAT32>(job, first, last) : rope_of<RW_BFLOAT16>(job, first, last);
}

}  // namespace
}  // namespace rankwise
