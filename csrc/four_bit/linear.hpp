// y = x W'^T + b for few rows of x. Sums are float32, bias added before the only rounding.
#pragma once

#include "four_bit/linear_decoded.hpp"
#include "four_bit/linear_fused.hpp"

namespace rankwise::RW_ISA {

template <class Isa, class Lane, int D>
static void linear_rows(const LinearJob& job, int64_t first, int64_t last) {
    if (job.fused) return fused<Isa, Lane, D, Isa::fused_rows>(job, first, last);
    decoded<Isa, Lane, D>(job, first, last);
}

// The lane in which products of a dtype are summed: bfloat16 where the level multiplies it, else float.
template <class Isa>
static constexpr auto bfloat16_lane() {
    if constexpr (Isa::multiplies_bfloat16) {
        return typename Isa::Bfloat16Lane{};
    } else {
        return typename Isa::FloatLane{};
    }
}

template <class Isa>
static void linear(const LinearJob& job, int64_t first, int64_t last) {
    using Float = typename Isa::FloatLane;
    switch (job.dtype) {
        case RW_FLOAT32: return linear_rows<Isa, Float, RW_FLOAT32>(job, first, last);
        case RW_BFLOAT16: return linear_rows<Isa, decltype(bfloat16_lane<Isa>()), RW_BFLOAT16>(job, first, last);
        default: return linear_rows<Isa, Float, RW_FLOAT16>(job, first, last);
    }
}

// Elements of x that `linear` takes as one group.
template <class Isa>
static int64_t group_of(int dtype) {
    switch (dtype) {
        case RW_FLOAT32: return group_size<Isa, typename Isa::FloatLane, RW_FLOAT32>();
        case RW_BFLOAT16: return group_size<Isa, decltype(bfloat16_lane<Isa>()), RW_BFLOAT16>();
        default: return group_size<Isa, typename Isa::FloatLane, RW_FLOAT16>();
    }
}

}  // namespace rankwise::RW_ISA
