// The innermost loop of float32 products: a few rows by a strip of two vectors of columns, with all sums in registers.
#pragma once

#include <type_traits>

#include "common/vector.hpp"

namespace rankwise::RW_ISA {
namespace {

constexpr int64_t kStrip = 2 * W;
constexpr int kBlockRows = 6;  // 12 sums, 2 vectors of columns and one element fill the 16 registers of AVX2

// sums[r] += sum_k a[r * row_stride + k * step] * b[k * b_stride + ...], k < length.
template <int Rows>
RW_INLINE void multiply_add(const float* a, int64_t row_stride, int64_t step, const float* b, int64_t b_stride,
                            int64_t length, Floats (&sums)[Rows][2]) {
    for (int64_t k = 0; k < length; ++k, a += step, b += b_stride) {
        const Floats first = load<RW_FLOAT32>(b, 0), second = load<RW_FLOAT32>(b, W);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const Floats element = all(a[r * row_stride]);
            sums[r][0] = madd(element, first, sums[r][0]);
            sums[r][1] = madd(element, second, sums[r][1]);
        }
    }
}

template <int Rows>
RW_INLINE void load_sums(const float* from, int64_t stride, Floats (&sums)[Rows][2]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
        sums[r][0] = load<RW_FLOAT32>(from, r * stride), sums[r][1] = load<RW_FLOAT32>(from, r * stride + W);
}

template <int Rows>
RW_INLINE void store_sums(const Floats (&sums)[Rows][2], float* to, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        store<RW_FLOAT32>(to, r * stride, sums[r][0]);
        store<RW_FLOAT32>(to, r * stride + W, sums[r][1]);
    }
}

// out (Rows, kStrip) = a b. Never inlined: among the registers of a larger function GCC keeps a sum in memory.
template <int Rows>
__attribute__((noinline)) void multiply_block(const float* a, int64_t row_stride, const float* b, int64_t length,
                                              float* out) {
    Floats sums[Rows][2] = {};
    multiply_add<Rows>(a, row_stride, 1, b, kStrip, length, sums);
    store_sums<Rows>(sums, out, kStrip);
}

// body(std::integral_constant<int, count>) for a count from 1 to kBlockRows.
template <class Body, int Rows = kBlockRows>
RW_INLINE void with_rows(int64_t count, const Body& body) {
    if (count == Rows) return body(std::integral_constant<int, Rows>{});
    if constexpr (Rows > 1) with_rows<Body, Rows - 1>(count, body);
}

// An 8 x 8 transpose in registers.
RW_INLINE void transpose(__m256 (&r)[8]) {
    __m256 a[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2)
        a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        a[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20), a[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = a[i];
}

// strip (length, kStrip) = rows (kStrip, length) transposed; `rows` may be read up to a multiple of 8 elements.
inline void transpose_strip(const float* rows, int64_t stride, int64_t length, float* strip) {
    static_assert(W == 8, "written for vectors of 8 floats");
    for (int64_t k = 0; k < length; k += W)
        for (int64_t half = 0; half < 2; ++half) {
            __m256 block[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) block[i] = _mm256_loadu_ps(rows + (half * W + i) * stride + k);
            transpose(block);
            for (int64_t i = 0; i < 8 && k + i < length; ++i)
                _mm256_storeu_ps(strip + (k + i) * kStrip + half * W, block[i]);
        }
}

}  // namespace
}  // namespace rankwise::RW_ISA
