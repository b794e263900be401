// y = x W'^T + b for few rows of x. Sums are float32, bias added before the only rounding.
//
// Up to four rows of x: weights are decoded into registers and multiplied there. More rows: pieces of a few weight rows are decoded
// into the first-level cache and multiplied with the same piece of every row of x while both are there.
#pragma once

#include "decode.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace rankwise {

constexpr int kRows = 4;          // weight rows decoded at once
constexpr int kGroup = 16;        // weight rows whose sums are open at once

// sum[r * stride + c] += <w_r, x_c> over `count` elements, lane by lane.
template <class Lane, int R, int C>
static void tile(const typename Lane::Element* w, int64_t w_stride, const typename Lane::Element* x, int64_t x_stride, int64_t count,
                 typename Lane::Sum* sum, int64_t stride) {
    typename Lane::Sum local[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) local[r][c] = sum[r * stride + c];
    int64_t k = 0;
    for (; k + Lane::width <= count; k += Lane::width) {
        typename Lane::Vector row[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) row[r] = Lane::load(w + r * w_stride + k);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const auto column = Lane::load(x + c * x_stride + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) local[r][c] = Lane::multiply_add(row[r], column, local[r][c]);
        }
    }
    if (k < count) {
        const int some = static_cast<int>(count - k);
        for (int c = 0; c < C; ++c) {
            const auto column = Lane::load_some(x + c * x_stride + k, some);
            for (int r = 0; r < R; ++r)
                local[r][c] = Lane::multiply_add(Lane::load_some(w + r * w_stride + k, some), column, local[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r * stride + c] = local[r][c];
}

template <int D>
static void store_sum(const LinearJob& job, int64_t n, int64_t t, float sum) {
    const float bias = job.bias ? load_as_float<D>(job.bias, n) : 0.0f;
    store_float<D>(job.y, t * job.N + n, sum + bias);
}

// R weight rows of whole blocks against all C rows of x, decoded into registers. For so few rows, storing the decoded weights and
// loading them again would cost as much as the products.
template <class Isa, class Lane, int D, int R, int C>
static void fused_rows(const LinearJob& job, const typename Lane::Element* x, int64_t n) {
    using Element = typename Lane::Element;
    const rw_weight& weight = *job.weight;
    const int64_t blocks = job.K / weight.block_size, row_bytes = job.K / 2;
    const uint8_t* packed = weight.packed + n * row_bytes;
    typename Lane::Sum sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = Lane::zero();
    for (int64_t block = 0; block < blocks; ++block) {
        decltype(table_of<Isa, D, Element>(weight, 0)) tables[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            tables[r] = table_of<Isa, D, Element>(weight, (n + r) * blocks + block);
        for (int64_t k = block * weight.block_size; k < (block + 1) * weight.block_size; k += Lane::width) {
            typename Lane::Vector column[C];
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) column[c] = Lane::load(x + c * job.K + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const auto row = Isa::vector(tables[r], packed + r * row_bytes + k / 2);
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) sum[r][c] = Lane::multiply_add(row, column[c], sum[r][c]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store_sum<D>(job, n + r, c, Lane::total(sum[r][c]));
}

template <class Isa, class Lane, int D, int C>
static void fused(const LinearJob& job, const typename Lane::Element* x, int64_t first, int64_t last) {
    int64_t n = first;
    for (; n + kRows <= last; n += kRows) fused_rows<Isa, Lane, D, kRows, C>(job, x, n);
    for (; n < last; ++n) fused_rows<Isa, Lane, D, 1, C>(job, x, n);
}

// The next C of the `left` rows of x, with C found among C, C - 1, ..., 1.
template <class Lane, int R, int C>
static void tile_of(int columns, const typename Lane::Element* w, int64_t w_stride, const typename Lane::Element* x, int64_t x_stride,
                    int64_t count, typename Lane::Sum* sum, int64_t stride) {
    if (columns == C) return tile<Lane, R, C>(w, w_stride, x, x_stride, count, sum, stride);
    if constexpr (C > 1) tile_of<Lane, R, C - 1>(columns, w, w_stride, x, x_stride, count, sum, stride);
}

// Codes and scales of elements [first, first + count), asked for while earlier ones are being multiplied: the pieces jump from row to
// row, which the hardware's own prefetching does not follow.
static inline void prefetch(const rw_weight& weight, int64_t first, int64_t count) {
    if (first + count > weight.elements) return;
    for (int64_t i = first / 2; i < (first + count) / 2; i += 64) __builtin_prefetch(weight.packed + i);
    const int64_t block = first / weight.block_size, size = weight.nested_absmax ? 1 : 4;
    __builtin_prefetch(static_cast<const char*>(weight.absmax) + block * size);
}

// Elements [k, k + count) of R weight rows from n on, times the same elements of every row of x.
template <class Isa, class Lane, int D, int R>
static void piece_of_rows(const LinearJob& job, const typename Lane::Element* x, int64_t n, int64_t k, int64_t count,
                          typename Lane::Element* w, typename Lane::Sum* sum) {
    for (int r = 0; r < R; ++r) decode<Isa, D>(*job.weight, (n + r) * job.K + k, count, w + r * count);
    for (int r = 0; r < R; ++r) prefetch(*job.weight, k + count < job.K ? (n + r) * job.K + k + count : (n + r + kGroup) * job.K, count);
    for (int64_t t = 0; t < job.T;) {
        // Tiles of nearly equal width: 16 is 6 + 5 + 5, not 6 + 6 + 4.
        const int64_t left = job.T - t, tiles = (left + Isa::columns - 1) / Isa::columns;
        const int columns = static_cast<int>((left + tiles - 1) / tiles);
        tile_of<Lane, R, Isa::columns>(columns, w, count, x + k * job.T + t * count, count, count, sum + t, job.T);
        t += columns;
    }
}

template <class Isa, class Lane, int D>
static void decoded_group(const LinearJob& job, const typename Lane::Element* x, int64_t first, int64_t last) {
    using Element = typename Lane::Element;
    using Sum = typename Lane::Sum;
    const int64_t piece = job.piece;
    Element* w = scratch<Isa, Element, 0>(kRows * piece);
    Sum* sum = scratch<Isa, Sum, 1>(kGroup * job.T);
    for (int64_t i = 0; i < (last - first) * job.T; ++i) sum[i] = Lane::zero();
    for (int64_t k = 0; k < job.K; k += piece) {
        const int64_t count = job.K - k < piece ? job.K - k : piece;
        int64_t n = first;
        for (; n + kRows <= last; n += kRows)
            piece_of_rows<Isa, Lane, D, kRows>(job, x, n, k, count, w, sum + (n - first) * job.T);
        for (; n < last; ++n) piece_of_rows<Isa, Lane, D, 1>(job, x, n, k, count, w, sum + (n - first) * job.T);
    }
    for (int64_t t = 0; t < job.T; ++t) {
        float totals[kGroup];
        if (last - first == kGroup) {
            Lane::totals(sum + t, job.T, totals);
        } else {
            for (int64_t n = first; n < last; ++n) totals[n - first] = Lane::total(sum[(n - first) * job.T + t]);
        }
        for (int64_t n = first; n < last; ++n) store_sum<D>(job, n, t, totals[n - first]);
    }
}

template <class Isa, class Lane, int D>
static void decoded(const LinearJob& job, const typename Lane::Element* x, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n += kGroup)
        decoded_group<Isa, Lane, D>(job, x, n, n + kGroup < last ? n + kGroup : last);
}

template <class Isa, class Lane, int D>
static void linear_rows(const LinearJob& job, int64_t first, int64_t last) {
    const auto* x = static_cast<const typename Lane::Element*>(job.x);
    if (job.T <= Isa::fused_rows && job.K % job.weight->block_size == 0) {
        if (job.T == 1) return fused<Isa, Lane, D, 1>(job, x, first, last);
        if (job.T == 2) return fused<Isa, Lane, D, 2>(job, x, first, last);
        if constexpr (Isa::fused_rows >= 4) {
            if (job.T == 3) return fused<Isa, Lane, D, 3>(job, x, first, last);
            if (job.T == 4) return fused<Isa, Lane, D, 4>(job, x, first, last);
        }
    }
    decoded<Isa, Lane, D>(job, x, first, last);
}

template <class Isa>
static void linear(const LinearJob& job, int64_t first, int64_t last) {
    using Float = typename Isa::FloatLane;
    switch (job.dtype) {
        case RW_FLOAT32: return linear_rows<Isa, Float, RW_FLOAT32>(job, first, last);
        case RW_BFLOAT16:
            if constexpr (Isa::multiplies_bfloat16) {
                return linear_rows<Isa, typename Isa::Bfloat16Lane, RW_BFLOAT16>(job, first, last);
            } else {
                return linear_rows<Isa, Float, RW_BFLOAT16>(job, first, last);
            }
        default: return linear_rows<Isa, Float, RW_FLOAT16>(job, first, last);
    }
}

}  // namespace rankwise
