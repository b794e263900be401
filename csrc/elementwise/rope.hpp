// (q_1 cos_1 - q_2 sin_1, q_2 cos_2 + q_1 sin_2), or transposed (q_1 cos_1 + q_2 sin_2, q_2 cos_2 - q_1 sin_1).
#pragma once

#include "common/vector.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

// All heads at position l of batch b: a vector of cos and sin is read once for them.
template <int D, int C>
void turn_position(const RopeJob& job, int64_t b, int64_t l) {
    const int64_t half = job.rotary / 2, heads = job.H, q_step = job.q_stride[1], out_step = job.out_stride[1];
    const int64_t table = b * job.batch_stride + l * job.rotary;
    const int64_t q = b * job.q_stride[0] + l * job.q_stride[2], out = b * job.out_stride[0] + l * job.out_stride[2];
    const void *from = job.q, *cos = job.cos, *sin = job.sin;
    void* to = job.out;
    const bool inverse = job.inverse;
    each_vector(half, [&](int64_t i, auto part) RW_INLINED {
        const Floats cos_1 = load<C>(cos, table + i, part), cos_2 = load<C>(cos, table + half + i, part);
        Floats sin_1 = load<C>(sin, table + i, part), sin_2 = load<C>(sin, table + half + i, part);
        if (inverse) {
            const Floats other = -sin_1;
            sin_1 = -sin_2;
            sin_2 = other;
        }
        for (int64_t h = 0; h < heads; ++h) {
            const Floats q_1 = load<D>(from, q + h * q_step + i, part),
                         q_2 = load<D>(from, q + h * q_step + half + i, part);
            store<D>(to, out + h * out_step + i, q_1 * cos_1 - q_2 * sin_1, part);
            store<D>(to, out + h * out_step + half + i, q_2 * cos_2 + q_1 * sin_2, part);
        }
    });
    if (to == from || job.rotary == job.D) return;
    constexpr int64_t size = D == RW_FLOAT32 ? 4 : 2;
    for (int64_t h = 0; h < heads; ++h)
        std::memcpy(static_cast<char*>(to) + (out + h * out_step + job.rotary) * size,
                    static_cast<const char*>(from) + (q + h * q_step + job.rotary) * size,
                    static_cast<std::size_t>((job.D - job.rotary) * size));
}

template <int D, int C>
void turn_positions(const RopeJob& job, int64_t first, int64_t last) {
    for (int64_t position = first; position < last; ++position)
        turn_position<D, C>(job, position / job.L, position % job.L);
}

template <int D>
void rope_of(const RopeJob& job, int64_t first, int64_t last) {
    job.table_dtype == RW_FLOAT32 ? turn_positions<D, RW_FLOAT32>(job, first, last)
                                  : turn_positions<D, RW_BFLOAT16>(job, first, last);
}

inline void rope(const RopeJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? rope_of<RW_FLOAT32>(job, first, last) : rope_of<RW_BFLOAT16>(job, first, last);
}

}  // namespace
}  // namespace rankwise::RW_ISA
