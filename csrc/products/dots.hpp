// Products with so few rows that packing the weight would cost more than multiplying it: dot products of its rows, as
// they lie in memory, with those rows, all sums in registers.
#pragma once

#include "common/multiply_float.hpp"
#include "common/scratch.hpp"
#include "products/terms.hpp"

namespace rankwise::RW_ISA {
namespace {

constexpr int64_t kFewRowsOfDots = 16;
constexpr int64_t kPair = 2;  // rows of the weight that are multiplied at once, with kBlockRows rows of a

bool is_few_rows(const ProductJob& job) {
    if (job.T > kFewRowsOfDots) return false;
    for (int i = 0; i < job.count; ++i)
        if (job.terms[i].source.across) return false;
    return true;
}

// A pair of rows of a term's weight: as they are, or made float32.
struct PairOfRows {
    const void* row[kPair];
    bool is_bfloat16;
};

// sums[r][i] += <a_r, row_i> over `length` elements.
template <int Rows, int D>
RW_INLINE void add_dots(const float* a, int64_t a_stride, const PairOfRows& pair, int64_t length,
                        Floats (&sums)[Rows][kPair]) {
    each_vector(length, [&](int64_t k, auto part) RW_INLINED {
        const Floats first = load<D>(pair.row[0], k, part), second = load<D>(pair.row[1], k, part);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const Floats x = load<RW_FLOAT32>(a + r * a_stride, k, part);
            sums[r][0] = madd(x, first, sums[r][0]);
            sums[r][1] = madd(x, second, sums[r][1]);
        }
    });
}

// The sums of the lanes of a and of b, in lanes 0 and 1.
RW_INLINE Floats totals(Floats a, Floats b) {
    const __m256 pairs = _mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)),
                 fours = _mm256_hadd_ps(pairs, pairs);
    return reinterpret_cast<Floats>(_mm256_add_ps(fours, _mm256_permute2f128_ps(fours, fours, 1)));
}

// Rows [row, row + Rows) of the result, columns [n, n + columns).
template <int D, int Rows>
__attribute__((noinline)) void multiply_pair(const ProductJob& job, const FloatSegments& segments,
                                             const PairOfRows* pairs, const float* left, int64_t row, int64_t n,
                                             int64_t columns) {
    Floats sums[Rows][kPair] = {};
    for (int i = 0; i < segments.count; ++i) {
        const FloatSegment& segment = segments.of[i];
        const int64_t length = segment.to - segment.from;
        if (pairs[i].is_bfloat16)
            add_dots<Rows, RW_BFLOAT16>(left + segment.at, segments.length, pairs[i], length, sums);
        else add_dots<Rows, RW_FLOAT32>(left + segment.at, segments.length, pairs[i], length, sums);
    }
    for (int r = 0; r < Rows; ++r)
        store_product<D>(job, (row + r) * job.out_stride + n, n, totals(sums[r][0], sums[r][1]),
                         Some{static_cast<int>(columns)});
}

// Rows n and, where there is one, n + 1 of the weight of `segment`; `made` has room for both.
template <int D>
PairOfRows pair_of(const FloatSegment& segment, int64_t n, int64_t columns, float* made) {
    const rw_term& term = *segment.term;
    const int64_t second = columns - 1, length = segment.to - segment.from;
    if (term.packed || term.gain || term.scale != 1.0f) {
        for (int64_t i = 0; i < columns; ++i) fetch_floats<D>(term, n + i, segment.from, length, made + i * length);
        return {{made, made + second * length}, false};
    }
    const bool is_bfloat16 = term.w_dtype == RW_BFLOAT16;
    const char* first = static_cast<const char*>(term.w) + (n * term.w_stride + segment.from) * (is_bfloat16 ? 2 : 4);
    return {{first, first + second * term.w_stride * (is_bfloat16 ? 2 : 4)}, is_bfloat16};
}

template <int D>
void product_of_dots(const ProductJob& job, const ProductShare& share) {
    struct Owner {};
    int64_t steps = 0;
    for (int i = 0; i < job.count; ++i) steps += job.terms[i].steps;
    const FloatSegments segments(job, 0, steps);
    const int64_t rows = share.to - share.from, end = share.last * kPanel < job.N ? share.last * kPanel : job.N;
    float* left = scratch<Owner, float, 0>(rows * segments.length);
    float* made = scratch<Owner, float, 1>(kPair * segments.length);
    widen_rows<D>(segments, share.from, rows, left, segments.length);
    for (int64_t n = share.first * kPanel; n < end; n += kPair) {
        const int64_t columns = end - n < kPair ? end - n : kPair;
        PairOfRows pairs[kMostTerms];
        for (int i = 0; i < segments.count; ++i)
            pairs[i] = pair_of<D>(segments.of[i], n, columns, made + kPair * segments.of[i].at);
        for (int64_t row = 0; row < rows; row += kBlockRows)
            with_rows(rows - row < kBlockRows ? rows - row : kBlockRows, [&](auto count) {
                multiply_pair<D, decltype(count)::value>(job, segments, pairs, left + row * segments.length,
                                                         share.from + row, n, columns);
            });
    }
}

}  // namespace
}  // namespace rankwise::RW_ISA
