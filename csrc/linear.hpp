// y = x W'^T + b for few rows of x: decode a handful of weight rows into the first-level cache, then multiply them with every row
// of x while they are there. Sums are float32, bias added before the only rounding.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "decode.hpp"
#include "kernels.hpp"

namespace rankwise {

constexpr int kRows = 4;  // weight rows decoded at once

// One thread's decoded rows, kept between calls.
template <class Isa, class E>
static E* scratch(int64_t elements) {
    struct Buffer {
        void* data = nullptr;
        int64_t bytes = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(E)) + 64;
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer.data = std::malloc(static_cast<std::size_t>(bytes));
        buffer.bytes = buffer.data ? bytes : 0;
        if (!buffer.data) throw std::bad_alloc();
    }
    return reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(buffer.data) + 63) / 64 * 64);
}

// sums[r * C + c] = <w_r, x_c>, with enough independent sums to hide the latency of a multiply-add.
template <class Lane, int R, int C>
static void tile(const typename Lane::Element* w, int64_t w_stride, const typename Lane::Element* x, int64_t x_stride, int64_t K,
                 float* sums) {
    constexpr int U = R * C >= 8 ? 1 : 2;
    typename Lane::Sum sum[U][R][C];
    for (int u = 0; u < U; ++u)
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sum[u][r][c] = Lane::zero();
    int64_t k = 0;
    for (; k + U * Lane::width <= K; k += U * Lane::width) {
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) {
            typename Lane::Vector row[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) row[r] = Lane::load(w + r * w_stride + k + u * Lane::width);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                const auto column = Lane::load(x + c * x_stride + k + u * Lane::width);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sum[u][r][c] = Lane::multiply_add(row[r], column, sum[u][r][c]);
            }
        }
    }
    for (; k < K; k += Lane::width) {
        const int count = static_cast<int>(K - k < Lane::width ? K - k : Lane::width);
        for (int c = 0; c < C; ++c) {
            const auto column = Lane::load_some(x + c * x_stride + k, count);
            for (int r = 0; r < R; ++r)
                sum[0][r][c] = Lane::multiply_add(Lane::load_some(w + r * w_stride + k, count), column, sum[0][r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            sums[r * C + c] = Lane::total(U == 2 ? Lane::add(sum[0][r][c], sum[U - 1][r][c]) : sum[0][r][c]);
}

template <int D, int R, int C>
static void store_tile(const LinearJob& job, int64_t n, int64_t t, const float* sums) {
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) {
            const float bias = job.bias ? load_as_float<D>(job.bias, n + r) : 0.0f;
            store_float<D>(job.y, (t + c) * job.N + n + r, sums[r * C + c] + bias);
        }
}

// R decoded weight rows against x from row t on, C rows at a time, then fewer.
template <class Lane, int D, int R, int C>
static void columns(const LinearJob& job, const typename Lane::Element* w, const typename Lane::Element* x, int64_t n, int64_t t) {
    for (; t + C <= job.T; t += C) {
        float sums[R * C];
        tile<Lane, R, C>(w, job.K, x + t * job.K, job.K, job.K, sums);
        store_tile<D, R, C>(job, n, t, sums);
    }
    if constexpr (C > 1) {
        if (t < job.T) columns<Lane, D, R, C - 1>(job, w, x, n, t);
    }
}

template <class Isa, class Lane, int D>
static void linear_rows(const LinearJob& job, const typename Lane::Element* x, int64_t first, int64_t last) {
    auto* w = scratch<Isa, typename Lane::Element>(kRows * job.K);
    int64_t n = first;
    for (; n + kRows <= last; n += kRows) {
        decode<Isa, D>(*job.weight, n * job.K, kRows * job.K, w);
        columns<Lane, D, kRows, Isa::columns>(job, w, x, n, 0);
    }
    for (; n < last; ++n) {
        decode<Isa, D>(*job.weight, n * job.K, job.K, w);
        columns<Lane, D, 1, Isa::columns>(job, w, x, n, 0);
    }
}

template <class Isa>
static void linear(const LinearJob& job, int64_t first, int64_t last) {
    using Float = typename Isa::FloatLane;
    switch (job.dtype) {
        case RW_FLOAT32:
            return linear_rows<Isa, Float, RW_FLOAT32>(job, static_cast<const float*>(job.x), first, last);
        case RW_BFLOAT16:
            if constexpr (Isa::multiplies_bfloat16) {
                return linear_rows<Isa, typename Isa::Bfloat16Lane, RW_BFLOAT16>(job, static_cast<const uint16_t*>(job.x), first,
                                                                                 last);
            } else {
                return linear_rows<Isa, Float, RW_BFLOAT16>(job, job.x_float, first, last);
            }
        default: return linear_rows<Isa, Float, RW_FLOAT16>(job, job.x_float, first, last);
    }
}

}  // namespace rankwise
