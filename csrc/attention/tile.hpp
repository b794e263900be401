// Products and layouts of 64 x 64 tiles of bfloat16 on AVX-512 with BF16.
//
// vdpbf16ps multiplies pairs of neighbours: a matrix is kept as 32-bit pairs along the dimension that is summed. The
// left operand is a row-major matrix of pairs, read one pair at a time; the right one has a row per pair, read 16 pairs
// at a time.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "attention/ranges.hpp"
#include "common/inline.hpp"
#include "common/transpose.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kTilePairs = kTile / 2;

RW_INLINE __m512i load_pairs(const void* data) { return _mm512_loadu_si512(data); }

RW_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// sum[r][16 c + lane] += <a_r, b_(16 c + lane)> over `pairs` pairs.
template <int R, int C>
RW_INLINE void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs,
                        __m512 (&sum)[R][C]) {
    for (int64_t p = 0; p < pairs; ++p) {
        __m512i column[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) column[c] = load_pairs(b + p * b_stride + 16 * c);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512i row = _mm512_set1_epi32(static_cast<int>(a[r * a_stride + p]));
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sum[r][c] = dot(sum[r][c], row, column[c]);
        }
    }
}

template <int R, int C>
RW_INLINE void clear(__m512 (&sum)[R][C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
}

// out[r][...] = factor[r] * out[r][...] + a b.
template <int C, int R = kGroup>
RW_INLINE void accumulate(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs,
                          const __m512* factor, float* out, int64_t out_stride) {
    __m512 sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            sum[r][c] = _mm512_loadu_ps(out + r * out_stride + 16 * c);
            if (factor) sum[r][c] = _mm512_mul_ps(sum[r][c], factor[r]);
        }
    multiply<R, C>(a, a_stride, b, b_stride, pairs, sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + r * out_stride + 16 * c, sum[r][c]);
}

// The same over `columns` columns, a multiple of 16; no piece is a single vector where two can share.
RW_INLINE void accumulate_row(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs,
                              const __m512* factor, float* out, int64_t out_stride, int64_t columns) {
    for (int64_t left = columns / 16; left > 0;) {
        const int64_t width = left < 5 ? left : left < 8 ? (left + 1) / 2 : 4;
        switch (width) {
            case 1: accumulate<1>(a, a_stride, b, b_stride, pairs, factor, out, out_stride); break;
            case 2: accumulate<2>(a, a_stride, b, b_stride, pairs, factor, out, out_stride); break;
            case 3: accumulate<3>(a, a_stride, b, b_stride, pairs, factor, out, out_stride); break;
            default: accumulate<4>(a, a_stride, b, b_stride, pairs, factor, out, out_stride);
        }
        b += 16 * width;
        out += 16 * width;
        left -= width;
    }
}

// to (columns, 16 ceil(rows / 16)) = from (rows, columns) transposed, in 32-bit elements; columns a multiple of 8,
// strides in bytes.
static void transpose(const void* from, int64_t from_stride, int64_t rows, int64_t columns, uint32_t* to,
                      int64_t to_stride) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16) {
            const int64_t width = columns - j < 16 ? columns - j : 16;
            const __mmask16 some = static_cast<__mmask16>((1u << width) - 1u);
            __m512i block[16];
            for (int r = 0; r < 16; ++r)
                block[r] = i + r < rows ? _mm512_maskz_loadu_epi32(
                                              some, static_cast<const char*>(from) + (i + r) * from_stride + 4 * j)
                                        : _mm512_setzero_si512();
            transpose(block);
            for (int c = 0; c < width; ++c) _mm512_storeu_si512(to + (j + c) * to_stride + i, block[c]);
        }
}

// The next words of a row that has `left` of them, an even number.
RW_INLINE __mmask32 words(int64_t left) { return left >= 32 ? 0xffffffffu : (1u << left) - 1u; }

// to (rows to whole groups, D) = `rows` rows of x, then zeros. Strides of x in elements.
static void copy_rows(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t D, uint32_t* to) {
    for (int64_t i = 0; i < rounded_up(rows, kGroup); ++i, to += D / 2)
        for (int64_t d = 0; d < D; d += 32) {
            const __mmask32 some = words(D - d);
            const __m512i row =
                i < rows ? _mm512_maskz_loadu_epi16(some, x + i * x_stride + d) : _mm512_setzero_si512();
            _mm512_mask_storeu_epi16(to + d / 2, some, row);
        }
}

RW_INLINE __m512i load_words(const uint16_t* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

RW_INLINE __m512 load_floats(const uint16_t* x) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_words(x), 16)); }

RW_INLINE void store_rounded(uint16_t* out, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// Indices of the words first, second, first + 1, second + 1, ...
RW_INLINE __m512i turns(int first, int second) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(_mm512_add_epi32(lane, _mm512_set1_epi32(first)),
                           _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(second)), 16));
}

// to (rows to a multiple of 32 / 2, D) = pairs of neighbouring rows of x, zeros after row `rows`.
static void pair_rows(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t D, uint32_t* to) {
    const __m512i low = turns(0, 32), high = turns(16, 48);
    for (int64_t i = 0; i < rounded_up(rows, 32); i += 2)
        for (int64_t d = 0; d < D; d += 32) {
            const __mmask32 some = words(D - d);
            const uint16_t* row = x + i * x_stride + d;
            const __m512i even = i < rows ? _mm512_maskz_loadu_epi16(some, row) : _mm512_setzero_si512();
            const __m512i odd = i + 1 < rows ? _mm512_maskz_loadu_epi16(some, row + x_stride) : _mm512_setzero_si512();
            uint32_t* pair = to + i / 2 * D + d;
            _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(even, low, odd));
            if (D - d >= 32) _mm512_storeu_si512(pair + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
}

// to (D / 2, rows to a multiple of 16): pairs along D of `rows` rows of x, transposed. Later columns stay as they are:
// no span has them.
static void pair_columns(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t D, uint32_t* to) {
    transpose(x, 2 * x_stride, rows, D / 2, to, kTile);
}

// 2^x to 3e-7 of itself: 2^floor(x) times the minimax polynomial of the rest in [0, 1) that is exact at 0.
RW_INLINE __m512 exp2(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(0.00186713017f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.00901702978f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.0557999127f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240164444f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693151295f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, x);
}

// log2(x) of positive x, by the series of the inverse hyperbolic tangent.
RW_INLINE __m512 log2(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const __m512 exponent = _mm512_getexp_ps(_mm512_div_ps(x, m));
    const __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), t2 = _mm512_mul_ps(t, t);
    __m512 y = _mm512_set1_ps(1.0f / 9);
    y = _mm512_fmadd_ps(y, t2, _mm512_set1_ps(1.0f / 7));
    y = _mm512_fmadd_ps(y, t2, _mm512_set1_ps(1.0f / 5));
    y = _mm512_fmadd_ps(y, t2, _mm512_set1_ps(1.0f / 3));
    y = _mm512_fmadd_ps(y, t2, one);
    return _mm512_fmadd_ps(_mm512_mul_ps(y, t), _mm512_set1_ps(2.885390082f), exponent);  // 2 / ln 2
}

// Which of 16 keys from `key` on lie in [first, last).
RW_INLINE __mmask16 between(int64_t first, int64_t last, int64_t key) {
    const int64_t a = first - key, b = last - key;
    const uint32_t before = a <= 0 ? 0u : a >= 16 ? 0xffffu : (1u << a) - 1u;
    const uint32_t until = b <= 0 ? 0u : b >= 16 ? 0xffffu : (1u << b) - 1u;
    return static_cast<__mmask16>(until & ~before);
}

}  // namespace rankwise::RW_ISA
