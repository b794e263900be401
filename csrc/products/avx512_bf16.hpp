// Pairs of bfloat16 multiplied with AVX-512: two vectors of columns by some rows of sums in registers. A pair of a row
// goes to all columns from memory. Intel's dot products of pairs take twice as long as two multiply-adds in float32,
// AMD's half as long: the quicker way is taken, as it is measured once.
#pragma once

#include <chrono>

#include "products/pairs.hpp"

namespace rankwise::RW_ISA {

// A row's first numbers of 16 pairs, and the second ones, in float32.
static inline __attribute__((always_inline)) void widen_pairs(const void* pairs, float* first, float* second) {
    const __m512i w = _mm512_loadu_si512(pairs);
    _mm512_store_si512(first, _mm512_slli_epi32(w, 16));
    _mm512_store_si512(second, _mm512_and_si512(w, _mm512_set1_epi32(-65536)));
}

// sum + first * the first of b's pairs + second * the second.
static inline __attribute__((always_inline)) __m512 add_widened(__m512 sum, float first, float second,
                                                                const __m512 (&b)[2]) {
    return _mm512_fmadd_ps(_mm512_set1_ps(second), b[1], _mm512_fmadd_ps(_mm512_set1_ps(first), b[0], sum));
}

static inline __attribute__((always_inline)) void widen_column(__m512i pairs, __m512 (&b)[2]) {
    b[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    b[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
}

// Widens: whether pairs are multiplied in float32.
template <bool Widens>
struct VectorUnit {
    // Nothing to set up. The constructor exists so that the compiler does not warn of an unused variable.
    struct Session {
        Session() {}
    };

    static constexpr int kPairs = kTileStep / 2;

    static inline __attribute__((always_inline)) __m512i to_all(const uint16_t* pair) {
        int32_t both;
        std::memcpy(&both, pair, sizeof both);
        return _mm512_set1_epi32(both);
    }

    // Pairs [0, pairs) of one step.
    template <int Rows, int Vectors>
    static inline __attribute__((always_inline)) void add_pairs(const uint16_t* a, int64_t stride, const uint32_t* b,
                                                                int pairs, __m512 (&sum)[Rows][Vectors]) {
        if constexpr (Widens) {
            alignas(64) float first[Rows][16], second[Rows][16];
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) widen_pairs(a + r * stride, first[r], second[r]);
            for (int pair = 0; pair < pairs; ++pair, b += 16) {
                __m512 column[Vectors][2];
                for (int v = 0; v < Vectors; ++v) widen_column(_mm512_load_si512(b + v * kTileWords), column[v]);
#pragma GCC unroll 16
                for (int r = 0; r < Rows; ++r)
                    for (int v = 0; v < Vectors; ++v)
                        sum[r][v] = add_widened(sum[r][v], first[r][pair], second[r][pair], column[v]);
            }
            return;
        }
        for (int pair = 0; pair < pairs; ++pair, a += 2, b += 16) {
            __m512i column[Vectors];
            for (int v = 0; v < Vectors; ++v) column[v] = _mm512_load_si512(b + v * kTileWords);
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) {
                const __m512i x = to_all(a + r * stride);
                for (int v = 0; v < Vectors; ++v) sum[r][v] = dot_pairs(sum[r][v], x, column[v]);
            }
        }
    }

    template <bool Add>
    static __attribute__((noinline)) void multiply_bytes(const PairSegment& segment, const ByteColumns& columns,
                                                         const uint32_t* panel, int64_t rows, float* sums,
                                                         int64_t stride) {
        for (int64_t row = 0; row < rows; row += 8) {
            __m512i sum[8][2];
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r)
                for (int v = 0; v < 2; ++v) sum[r][v] = _mm512_load_si512(columns.start + 16 * v);
            const uint16_t* a = segment.a + row * segment.stride;
            const uint32_t* b = panel;
            for (int64_t left = segment.pairs; left > 0; left -= kPairs, b += kStepWords - kTileWords)
                for (int64_t quad = 0; quad < kPairs && quad < left; ++quad, a += 2, b += 16) {
                    const __m512i low = _mm512_load_si512(b), high = _mm512_load_si512(b + kTileWords);
#pragma GCC unroll 8
                    for (int r = 0; r < 8; ++r) {
                        const __m512i x = to_all(a + r * segment.stride);
                        sum[r][0] = add_quads(sum[r][0], x, low), sum[r][1] = add_quads(sum[r][1], x, high);
                    }
                }
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r)
                for (int v = 0; v < 2; ++v)
                    store_byte_sums<Add>(sum[r][v], segment.a_scale[row + r], columns.scale + 16 * v,
                                         sums + (row + r) * stride + 16 * v);
        }
    }

    template <bool Add, int Rows, int Vectors>
    static __attribute__((noinline)) void multiply_rows(const Block& block, int first, int64_t row, const uint32_t* b,
                                                        float* sums, int64_t stride) {
        __m512 sum[Rows][Vectors];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
            for (int v = 0; v < Vectors; ++v)
                sum[r][v] = Add ? _mm512_loadu_ps(sums + r * stride + 16 * v) : _mm512_setzero_ps();
        for (int i = first; i < block.count; ++i) {
            const PairSegment& segment = block.segments[i];
            const uint16_t* a = segment.a + row * segment.stride;
            int64_t left = segment.pairs;
            for (; left >= kPairs; left -= kPairs, a += kTileStep, b += kStepWords)
                add_pairs<Rows, Vectors>(a, segment.stride, b, kPairs, sum);
            if (left == 0) continue;
            add_pairs<Rows, Vectors>(a, segment.stride, b, static_cast<int>(left), sum);
            b += kStepWords;
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
            for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(sums + r * stride + 16 * v, sum[r][v]);
    }

    // Sixteen sums at once: more would not hide more of the latency between dependent additions.
    template <bool Add>
    static void multiply_panel(const Block& block, int first, const uint32_t* b, bool narrow, float* sums,
                               int64_t stride) {
        if (narrow) {
            for (int64_t row = 0; row < block.rows; row += 16)
                multiply_rows<Add, 16, 1>(block, first, row, b, sums + row * stride, stride);
        } else {
            for (int64_t row = 0; row < block.rows; row += 8)
                multiply_rows<Add, 8, 2>(block, first, row, b, sums + row * stride, stride);
        }
    }

    static void multiply_pairs(const uint32_t* left, const uint32_t* right, int64_t steps, float* out) {
        for (int rank = 0; rank < 16; rank += 4) {
            __m512 sum[4][4];
            for (int r = 0; r < 4; ++r)
                for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
            const uint32_t *a = left + 16 * rank, *b = right;
            for (int64_t step = 0; step < steps; ++step, a += kTileWords, b += 2 * kStepWords) {
                if constexpr (Widens) {
                    alignas(64) float first[4][16], second[4][16];
                    for (int r = 0; r < 4; ++r) widen_pairs(a + 16 * r, first[r], second[r]);
                    for (int pair = 0; pair < 16; ++pair) {
                        __m512 column[4][2];
#pragma GCC unroll 4
                        for (int c = 0; c < 4; ++c)
                            widen_column(_mm512_load_si512(b + c * kTileWords + 16 * pair), column[c]);
#pragma GCC unroll 4
                        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
                            for (int c = 0; c < 4; ++c)
                                sum[r][c] = add_widened(sum[r][c], first[r][pair], second[r][pair], column[c]);
                    }
                    continue;
                }
                for (int pair = 0; pair < 16; ++pair) {
                    __m512i column[4];
#pragma GCC unroll 4
                    for (int c = 0; c < 4; ++c) column[c] = _mm512_load_si512(b + c * kTileWords + 16 * pair);
#pragma GCC unroll 4
                    for (int r = 0; r < 4; ++r) {
                        const __m512i x = _mm512_set1_epi32(static_cast<int>(a[16 * r + pair]));
#pragma GCC unroll 4
                        for (int c = 0; c < 4; ++c) sum[r][c] = dot_pairs(sum[r][c], x, column[c]);
                    }
                }
            }
            for (int r = 0; r < 4; ++r)
                for (int c = 0; c < 4; ++c) _mm512_storeu_ps(out + 64 * (rank + r) + 16 * c, sum[r][c]);
        }
    }
};

template <bool Widens>
static double seconds_of_pairs(const uint32_t* words, float* out) {
    double least = 1.0;
    for (int i = 0; i < 16; ++i) {
        const auto start = std::chrono::steady_clock::now();
        VectorUnit<Widens>::multiply_pairs(words, words, 4, out);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        least = taken.count() < least ? taken.count() : least;
    }
    return least;
}

static bool widening_is_quicker() {
    alignas(64) static uint32_t words[8 * kStepWords];
    alignas(64) static float out[16 * 64];
    return seconds_of_pairs<true>(words, out) < seconds_of_pairs<false>(words, out);
}

// The ways differ by a factor of two and more, so each process of a machine finds the same.
static bool widens() {
    static const bool found = widening_is_quicker();
    return pairs_asked() ? pairs_asked() == kWidened : found;
}

static void product_of_vectors(const ProductJob& job, const ProductShare& share) {
    widens() ? product_of_pairs<VectorUnit<true>>(job, share) : product_of_pairs<VectorUnit<false>>(job, share);
}

static void row_product_of_vectors(const RowProductJob& job, int64_t chunk, int64_t first, int64_t last) {
    widens() ? row_product_of_pairs<VectorUnit<true>>(job, chunk, first, last)
             : row_product_of_pairs<VectorUnit<false>>(job, chunk, first, last);
}

}  // namespace rankwise::RW_ISA
