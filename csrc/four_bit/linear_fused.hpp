// y = x W'^T + b for very few rows of x: weights are decoded into registers and multiplied there. Storing them and
// loading them again would cost as much as the products.
#pragma once

#include "common/scratch.hpp"
#include "four_bit/decode.hpp"
#include "four_bit/tile.hpp"

namespace rankwise::RW_ISA {

// R weight rows from n on against all C rows of x, which come in groups, in the order of `Isa::element_at`.
template <class Isa, class Lane, int D, int R, int C, bool Plain>
static void fused_rows(const LinearJob& job, int64_t n, const float* scales) {
    using Element = typename Lane::Element;
    constexpr int64_t group = group_size<Isa, Lane, D>();
    const rw_weight& weight = *job.weight;
    const int64_t blocks = job.K / weight.block_size, row_bytes = job.K / 2;
    const uint8_t* packed = weight.packed + n * row_bytes;
    const uint8_t* ahead = next_codes(packed, R * row_bytes);
    const auto* x = static_cast<const Element*>(job.x);
    typename Lane::Sum sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = Lane::zero();
    for (int64_t block = 0; block < blocks; ++block) {
        TableOf<Isa, Lane, D, Plain> tables[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            tables[r] =
                Isa::template table<D, Plain>(weight.value, scales[r * blocks + block], static_cast<Element*>(nullptr));
        for (int64_t done = 0; done < weight.block_size; done += group, x += C * group, packed += group / 2) {
            prefetch_next<R * group / 2>(ahead);
            multiply_group<Isa, Lane, R, C>(tables, packed, row_bytes, x, group, sum);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store_sum<D>(job, n + r, c, Lane::total(sum[r][c]));
}

template <class Isa, class Lane, int D, int R, int C>
static void fused_at(const LinearJob& job, int64_t n) {
    const int64_t blocks = job.K / job.weight->block_size;
    float* scales = scratch<Isa, float, 2>(R * blocks);
    prefetch_scales(*job.weight, (n + R) * blocks, R * blocks);
    if (Isa::scales(*job.weight, n * blocks, R * blocks, scales)) {
        fused_rows<Isa, Lane, D, R, C, true>(job, n, scales);
    } else {
        fused_rows<Isa, Lane, D, R, C, false>(job, n, scales);
    }
}

template <class Isa, class Lane, int D, int C>
static void fused(const LinearJob& job, int64_t first, int64_t last) {
    if constexpr (C > 1) {
        if (job.T < C) return fused<Isa, Lane, D, C - 1>(job, first, last);
    }
    int64_t n = first;
    for (; n + kRows <= last; n += kRows) fused_at<Isa, Lane, D, kRows, C>(job, n);
    for (; n < last; ++n) fused_at<Isa, Lane, D, 1, C>(job, n);
}

}  // namespace rankwise::RW_ISA
