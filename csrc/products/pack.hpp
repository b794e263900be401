// Weights as the right operand of AMX tiles: per panel and step two tiles of 16 pairs (of what is summed over) by 16
// columns.
#pragma once

#include "common/scratch.hpp"
#include "common/transpose.hpp"
#include "four_bit/isa_avx512.hpp"
#include "products/kernels.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kTileWords = 256;
constexpr int64_t kStepWords = 2 * kTileWords;
constexpr int64_t kPieceColumns = 256;  // of a row that is decoded or converted before it is packed

static inline __m512 widened(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m512i rounded(__m512 low, __m512 high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

static inline __m512 rest_of(__m512 value) {
    return _mm512_sub_ps(value, widened(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value))));
}

static inline __mmask32 first_of_32(int64_t count) {
    return static_cast<__mmask32>(count >= 32 ? 0xffffffffu : (1u << count) - 1u);
}

static inline __mmask16 first_of_16(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffffu : count > 0 ? (1u << count) - 1u : 0u);
}

// Words (a_i, b_i) of two rows of 32 elements, in the order of a panel's columns: the first tile has columns 0 to 3, 8
// to 11, 16 to 19 and 24 to 27, the second the others, because that is how the quickest instruction leaves them.
static inline __attribute__((always_inline)) void interleave(__m512i a, __m512i b, __m512i& first, __m512i& second) {
    first = _mm512_unpacklo_epi16(a, b);
    second = _mm512_unpackhi_epi16(a, b);
}

// The same of 16 elements, in their own order.
static inline __m512i in_turns(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

// Column i of tile 0 or 1, within its panel.
static inline int64_t column_of(int64_t tile, int64_t i) { return i / 4 * 8 + 4 * tile + i % 4; }

// Whether a panel has no more columns than a tile. Its first tile then has them in order, and there is no second one.
static inline bool is_narrow(int64_t columns) { return columns <= kPanel / 2; }

// Sums of a panel's two tiles to its columns in order.
static inline __attribute__((always_inline)) void in_order(__m512& first, __m512& second) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const __m512 a = first, b = second;
    first = _mm512_permutex2var_ps(a, low, b);
    second = _mm512_permutex2var_ps(a, high, b);
}

// Whether a term's weight can be read where it lies.
static inline bool is_plain(const rw_term& term) {
    return !term.packed && term.w_dtype == RW_BFLOAT16 && !term.gain && term.scale == 1.0f;
}

// Scale and gain of elements [column, column + 16) of a row of the weight.
static inline __m512 factor_of(const rw_term& term, int64_t row, int64_t column, __mmask16 some) {
    const __m512 scale = _mm512_set1_ps(term.scale);
    if (!term.gain) return scale;
    return _mm512_mul_ps(
        scale, term.across ? _mm512_set1_ps(term.gain[row]) : _mm512_maskz_loadu_ps(some, term.gain + column));
}

static inline void scale_elements(const rw_term& term, int64_t row, int64_t column, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = first_of_16(count - i);
        const __m512 factor = factor_of(term, row, column + i, some);
        const __m512 w = widened(_mm256_maskz_loadu_epi16(some, out + i));
        _mm256_mask_storeu_epi16(out + i, some,
                                 reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(w, factor))));
    }
}

// With Rest, what rounding them leaves.
template <bool Rest>
static inline void convert_elements(const rw_term& term, int64_t row, int64_t column, int64_t count, uint16_t* out) {
    const float* w = static_cast<const float*>(term.w) + row * term.w_stride + column;
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = first_of_16(count - i);
        const __m512 factor = factor_of(term, row, column + i, some);
        __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, w + i), factor);
        if (Rest) value = rest_of(value);
        _mm256_mask_storeu_epi16(out + i, some, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
}

// Elements [column, column + count) of a row of the weight, times scale and gain.
static void fetch(const rw_term& term, int64_t row, int64_t column, int64_t count, uint16_t* out) {
    if (!term.packed && term.w_dtype == RW_FLOAT32) return convert_elements<false>(term, row, column, count, out);
    if (term.packed) {
        decode<Avx512, RW_BFLOAT16>(*term.packed, term.w_first + row * term.w_stride + column, count, out);
    } else {
        std::memcpy(out, static_cast<const uint16_t*>(term.w) + row * term.w_stride + column,
                    2 * static_cast<std::size_t>(count));
    }
    if (term.gain || term.scale != 1.0f) scale_elements(term, row, column, count, out);
}

// The same of a row that repeats, or of what rounding it leaves.
static void fetch_part(const ProductTerm& term, int64_t row, int64_t column, int64_t count, uint16_t* out) {
    while (count > 0) {
        const int64_t from = column % term.period, some = term.period - from < count ? term.period - from : count;
        if (term.is_rest) convert_elements<true>(term.source, row, from, some, out);
        else fetch(term.source, row, from, some, out);
        column += some, count -= some, out += some;
    }
}

// One tile of columns, step by step: `length` elements of each of the tile's rows among the `count` that there are.
static void pack_tile(const uint16_t* rows, int64_t stride, int64_t count, int64_t tile, int64_t length,
                      uint32_t* out) {
    for (int64_t k = 0; k < length; k += kTileStep, out += kStepWords) {
        const __mmask32 some = first_of_32(length - k);
        __m512i r[16];
        if (count >= kPanel) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const uint16_t* row = rows + column_of(tile, i) * stride + k;
                r[i] = _mm512_maskz_loadu_epi16(some, row);
                __builtin_prefetch(row + 8 * kTileStep);
            }
        } else {
            for (int i = 0; i < 16; ++i) {
                const int64_t n = is_narrow(count) ? i : column_of(tile, i);
                r[i] = n < count ? _mm512_maskz_loadu_epi16(some, rows + n * stride + k) : _mm512_setzero_si512();
            }
        }
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 16 * i, r[i]);
    }
}

static void pack_rows(const uint16_t* rows, int64_t stride, int64_t count, int64_t length, uint32_t* out) {
    pack_tile(rows, stride, count, 0, length, out);
    if (!is_narrow(count)) pack_tile(rows, stride, count, 1, length, out + kTileWords);
}

// Steps [first, last) of a weight whose rows are columns of the result, for one panel.
static void pack_outputs(const ProductTerm& part, int64_t N, int64_t panel, int64_t first, int64_t last,
                         uint32_t* out) {
    struct Owner {};
    const rw_term& term = part.source;
    const int64_t begin = first * kTileStep, end = last * kTileStep < term.length ? last * kTileStep : term.length;
    const int64_t n = panel * kPanel, count = N - n < kPanel ? N - n : kPanel;
    if (is_plain(term))
        return pack_rows(static_cast<const uint16_t*>(term.w) + n * term.w_stride + begin, term.w_stride, count,
                         end - begin, out);
    uint16_t* rows = scratch<Owner, uint16_t, 0>(kPanel * kPieceColumns);
    for (int64_t k = begin; k < end; k += kPieceColumns, out += kPieceColumns / kTileStep * kStepWords) {
        const int64_t length = end - k < kPieceColumns ? end - k : kPieceColumns;
        for (int64_t i = 0; i < count; ++i) fetch_part(part, n + i, k, length, rows + i * kPieceColumns);
        pack_rows(rows, kPieceColumns, count, length, out);
    }
}

// 32 elements of a row of bfloat16, times a factor.
template <bool Scaled>
static inline __attribute__((always_inline)) __m512i row_of_weight(const uint16_t* row, __mmask32 some, __m512 factor) {
    const __m512i w = _mm512_maskz_loadu_epi16(some, row);
    if (!Scaled) return w;
    return rounded(_mm512_mul_ps(widened(_mm512_castsi512_si256(w)), factor),
                   _mm512_mul_ps(widened(_mm512_extracti64x4_epi64(w, 1)), factor));
}

// Rows k and k + 1 of a weight, `columns` elements of each, as pairs in the panels that they cross.
template <bool Scaled>
static inline void pack_pair(const uint16_t* const (&row)[2], const float (&factor)[2], int64_t columns, uint32_t* out,
                             int64_t panel_words) {
    const __m512 first = _mm512_set1_ps(factor[0]), second = _mm512_set1_ps(factor[1]);
    for (int64_t n = 0; n < columns; n += kPanel, out += panel_words) {
        const __mmask32 some = first_of_32(columns - n);
        const __m512i a = row_of_weight<Scaled>(row[0] + n, some, first),
                      b = row_of_weight<Scaled>(row[1] + n, some, second);
        if (is_narrow(columns - n)) {
            _mm512_store_si512(out, in_turns(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b)));
            break;
        }
        __m512i pairs[2];
        interleave(a, b, pairs[0], pairs[1]);
        _mm512_store_si512(out, pairs[0]);
        _mm512_store_si512(out + kTileWords, pairs[1]);
    }
}

// Steps [first, last) of a weight whose rows are summed over, for panels [panel, end): `panel_words` from one to the
// next.
static void pack_across(const rw_term& term, int64_t N, int64_t panel, int64_t end, int64_t first, int64_t last,
                        uint32_t* out, int64_t panel_words) {
    struct Owner {};
    const int64_t column = panel * kPanel, columns = (end * kPanel < N ? end * kPanel : N) - column,
                  width = (columns + 31) / 32 * 32;
    uint16_t* rows = scratch<Owner, uint16_t, 0>(2 * width);
    const bool in_place = !term.packed && term.w_dtype == RW_BFLOAT16, scaled = !is_plain(term);
    // A weight of 4 bits is decoded first, and then scaled like a dense one; a float32 one is scaled while it is
    // converted.
    rw_term decoded = term;
    decoded.gain = nullptr;
    decoded.scale = 1.0f;
    const bool converted = !term.packed && term.w_dtype == RW_FLOAT32;
    for (int64_t pair = 16 * first; pair < 16 * last; ++pair, out += 16) {
        if (pair % 16 == 0 && pair != 16 * first) out += kStepWords - kTileWords;
        const uint16_t* row[2];
        float factor[2] = {term.scale, term.scale};
        for (int64_t i = 0; i < 2; ++i) {
            const int64_t k = 2 * pair + i;
            row[i] = rows + i * width;
            if (k >= term.length) {
                std::memset(rows + i * width, 0, 2 * static_cast<std::size_t>(columns));
                continue;
            }
            if (term.gain) factor[i] *= term.gain[k];
            if (in_place) {
                row[i] = static_cast<const uint16_t*>(term.w) + k * term.w_stride + column;
                // Each row may lie in another page, where the hardware's own prefetching ends.
                for (int64_t n = 0; n < columns; n += 32) __builtin_prefetch(row[i] + 16 * term.w_stride + n);
            } else {
                fetch(converted ? term : decoded, k, column, columns, rows + i * width);
            }
        }
        if (scaled && !converted && (term.gain || term.scale != 1.0f))
            pack_pair<true>(row, factor, columns, out, panel_words);
        else pack_pair<false>(row, factor, columns, out, panel_words);
    }
}

}  // namespace rankwise::RW_ISA
