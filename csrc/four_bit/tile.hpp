// Sums of products of a few weight rows with a few rows of x.
#pragma once

#include "common/convert.hpp"
#include "four_bit/kernels.hpp"

namespace rankwise::RW_ISA {

constexpr int kRows = 4;  // weight rows multiplied at once

// sum[r * stride + c] += <w_r, x_c> over `count` elements, lane by lane.
template <class Lane, int R, int C>
static void tile(const typename Lane::Element* w, int64_t w_stride, const typename Lane::Element* x, int64_t x_stride,
                 int64_t count, typename Lane::Sum* sum, int64_t stride) {
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

// The same for `count` <= 16 features from n on.
template <int D>
static void store_sums(const LinearJob& job, int64_t n, int64_t count, int64_t t, float* sums) {
    if (job.bias)
        for (int64_t i = 0; i < count; ++i) sums[i] += load_as_float<D>(job.bias, n + i);
    // Sixteen at a time whatever the count: a loop of fixed length becomes vector instructions.
    constexpr int64_t size = D == RW_FLOAT32 ? 4 : 2;
    alignas(64) char stored[16 * size];
    for (int64_t i = count; i < 16; ++i) sums[i] = 0.0f;
    for (int i = 0; i < 16; ++i) store_float<D>(stored, i, sums[i]);
    std::memcpy(static_cast<char*>(job.y) + (t * job.N + n) * size, stored, static_cast<std::size_t>(count * size));
}

// The next C of the `left` rows of x, with C found among C, C - 1, ..., 1.
template <class Lane, int R, int C>
static void tile_of(int columns, const typename Lane::Element* w, int64_t w_stride, const typename Lane::Element* x,
                    int64_t x_stride, int64_t count, typename Lane::Sum* sum, int64_t stride) {
    if (columns == C) return tile<Lane, R, C>(w, w_stride, x, x_stride, count, sum, stride);
    if constexpr (C > 1) tile_of<Lane, R, C - 1>(columns, w, w_stride, x, x_stride, count, sum, stride);
}

// The table of a block, as it is looked up for elements of Lane.
template <class Isa, class Lane, int D, bool Plain>
using TableOf = decltype(Isa::template table<D, Plain>(nullptr, 0.0f, static_cast<typename Lane::Element*>(nullptr)));

// Elements that are decoded at once: `TableOf::vectors` vectors.
template <class Isa, class Lane, int D>
constexpr int64_t group_size() {
    return TableOf<Isa, Lane, D, false>::vectors * Lane::width;
}

// The next group of elements of R rows of codes with C rows of x, both in the order of `Isa::element_at`. Returns
// nothing but the grown sums; with `w` it also leaves the decoded weights there, rows at w_stride. Decoding and
// multiplying use different units of the core: together they take little more than the longer of the two.
template <class Isa, class Lane, int R, int C, class Table>
static inline __attribute__((always_inline)) void multiply_group(const Table (&tables)[R], const uint8_t* packed,
                                                                 int64_t row_bytes, const typename Lane::Element* x,
                                                                 int64_t x_stride, typename Lane::Sum (&sum)[R][C],
                                                                 typename Lane::Element* w = nullptr,
                                                                 int64_t w_stride = 0) {
    constexpr int V = Table::vectors;
    // Of two vectors a row, all rows fit into registers, and each vector of x is loaded once.
    constexpr int at_once = V == 2 ? R : 1;
#pragma GCC unroll 4
    for (int first = 0; first < R; first += at_once) {
        typename Lane::Vector row[at_once][V];
#pragma GCC unroll 8
        for (int r = 0; r < at_once; ++r) {
            Isa::unpack(tables[first + r], packed + (first + r) * row_bytes, row[r]);
            if (w)
                for (int v = 0; v < V; ++v) Lane::store(w + (first + r) * w_stride + v * Lane::width, row[r][v]);
        }
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            typename Lane::Vector column[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) column[v] = Lane::load(x + c * x_stride + v * Lane::width);
#pragma GCC unroll 8
            for (int r = 0; r < at_once; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v)
                    sum[first + r][c] = Lane::multiply_add(row[r][v], column[v], sum[first + r][c]);
        }
    }
}

}  // namespace rankwise::RW_ISA
