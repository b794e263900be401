// Weights rounded to bytes as the right operand of dot products of quads: per panel and step two tiles of 16 quads (of
// what is summed over) by 16 columns. The left operand are bytes without sign, x + 128, so that sums begin at -128
// times the sum of a column. Both sides of a weight are multiples of 32.
#pragma once

#include "products/pack.hpp"

namespace rankwise::RW_ISA {

// Of one panel, in the order of its tiles.
struct ByteColumns {
    alignas(64) int32_t start[kPanel];
    alignas(64) float scale[kPanel];
};

static inline __m512i add_quads(__m512i sum, __m512i a, __m512i b) {
    // GCC 12 copies the sums of the intrinsic to memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// factor in the order in which a panel's tiles have columns, for each 32 elements.
static inline void in_tile_order(const float* factor, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = factor[i / kPanel * kPanel + column_of(i % kPanel / 16, i % 16)];
}

// 32 elements of bfloat16 times both factors, rounded; by_column, and the result, in the order of tiles. `at`: where
// the elements of a dithered row are in its sequence.
static inline __attribute__((always_inline)) void integers(const uint16_t* w, const float* by_column, __m512 by_row,
                                                           __m512i (&out)[2], const __m512i* at = nullptr) {
    const __m512i all = _mm512_loadu_si512(w), zero = _mm512_setzero_si512();
    const __m512i half[2] = {_mm512_unpacklo_epi16(zero, all), _mm512_unpackhi_epi16(zero, all)};
    for (int i = 0; i < 2; ++i) {
        const __m512 z = _mm512_mul_ps(_mm512_castsi512_ps(half[i]), _mm512_loadu_ps(by_column + 16 * i));
        __m512 quotient = _mm512_mul_ps(z, by_row);
        if (at) {
            const __m512 noise = _mm512_cvtepi32_ps(_mm512_srli_epi32(at[i], 32 - kDitherBits));
            quotient = _mm512_add_ps(quotient, _mm512_fmadd_ps(noise, _mm512_set1_ps(kDitherStep),
                                                               _mm512_set1_ps(0.5f * kDitherStep - 0.5f)));
        }
        out[i] = _mm512_cvtps_epi32(quotient);
    }
}

// A step of 64 elements as bytes, or its first half and zeros.
static inline __attribute__((always_inline)) __m512i step_to_bytes(const uint16_t* w, const float* by_column,
                                                                   __m512 by_row, bool whole,
                                                                   const __m512i* at = nullptr) {
    __m512i a[2], b[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    integers(w, by_column, by_row, a, at);
    if (whole) integers(w + 32, by_column + 32, by_row, b, at ? at + 2 : nullptr);
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a[0], a[1]), _mm512_packs_epi32(b[0], b[1]));
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), bytes);
}

// Elements [column, column + count) of a row of the weight in bfloat16, where they lie or in `made`.
static inline const uint16_t* row_of_weight(const rw_term& term, int64_t row, int64_t column, int64_t count,
                                            uint16_t* made) {
    if (!term.packed) return static_cast<const uint16_t*>(term.w) + row * term.w_stride + column;
    decode<Avx512, RW_BFLOAT16>(*term.packed, term.w_first + row * term.w_stride + column, count, made);
    return made;
}

// Elements [begin, end) of rows that are columns of the result, for the panel at column n; by_column from `begin` on.
static void pack_byte_outputs(const rw_term& term, const float* by_column, int64_t n, int64_t begin, int64_t end,
                              uint32_t* out, int32_t* sums) {
    struct Owner {};
    // Not a power of two: rows would fall into few cache sets.
    constexpr int64_t piece = 512, stride = piece + kByteStep;
    int8_t* rows = scratch<Owner, int8_t, 0>(kPanel * stride);
    uint16_t* made = scratch<Owner, uint16_t, 1>(piece);
    for (int64_t k = begin; k < end; k += piece, out += piece / kByteStep * kStepWords) {
        const int64_t length = end - k < piece ? end - k : piece;
        for (int64_t i = 0; i < kPanel; ++i) {
            const uint16_t* w = row_of_weight(term, n + column_of(i / 16, i % 16), k, length, made);
            const __m512 by_row = _mm512_set1_ps(term.eight_bit->by_row[n + column_of(i / 16, i % 16)]);
            int8_t* row = rows + column_of(i / 16, i % 16) * stride;
            __m512i sum = _mm512_setzero_si512();
            for (int64_t j = 0; j < length; j += kByteStep) {
                const __m512i bytes = step_to_bytes(w + j, by_column + k - begin + j, by_row, length - j > 32);
                _mm512_storeu_si512(row + j, bytes);
                sum = add_quads(sum, _mm512_set1_epi8(1), bytes);
            }
            sums[i] += _mm512_reduce_add_epi32(sum);
        }
        pack_rows(reinterpret_cast<const uint16_t*>(rows), stride / 2, kPanel, length / 2, out);
    }
}

// Quads of a tile's columns, and what they add to the columns' sums.
static inline __attribute__((always_inline)) void add_quads_of_tile(__m512i quads, uint32_t* out, int32_t* sums) {
    _mm512_store_si512(out, quads);
    _mm512_store_si512(sums, add_quads(_mm512_load_si512(sums), _mm512_set1_epi8(1), quads));
}

// Steps [first, last) of rows that are summed over, for `count` columns from `column` on.
static void pack_bytes_across(const rw_term& term, const float* by_column, int64_t column, int64_t count, int64_t first,
                              int64_t last, uint32_t* out, int64_t panel_words, ByteColumns* columns, int64_t next) {
    struct Owner {};
    const __m512i turn = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    uint16_t* made = scratch<Owner, uint16_t, 0>(4 * count);
    for (int64_t quad = 16 * first; quad < 16 * last; ++quad, out += quad % 16 ? 16 : 16 + kStepWords - kTileWords) {
        const uint16_t* row[4];
        __m512 by_row[4];
        for (int64_t i = 0; i < 4; ++i) {
            // Past the last row zeros are packed.
            const int64_t k = 4 * quad + i < term.length ? 4 * quad + i : term.length - 1;
            row[i] = row_of_weight(term, k, column, count, made + i * count);
            by_row[i] = _mm512_set1_ps(k == 4 * quad + i ? term.eight_bit->by_row[k] : 0.0f);
            // Each row may lie in another page, where the hardware's own prefetching ends.
            for (int64_t n = 0; !term.packed && n < count; n += 32) __builtin_prefetch(row[i] + 16 * term.w_stride + n);
        }
        for (int64_t n = 0; n < count; n += kPanel) {
            __m512i part[4][2];
            for (int i = 0; i < 4; ++i) integers(row[i] + n, by_column + n, by_row[i], part[i]);
            for (int tile = 0; tile < 2; ++tile) {
                const __m512i low = _mm512_packs_epi32(part[0][tile], part[1][tile]),
                              high = _mm512_packs_epi32(part[2][tile], part[3][tile]),
                              bytes = _mm512_shuffle_epi8(_mm512_packs_epi16(low, high), turn);
                add_quads_of_tile(bytes, out + n / kPanel * panel_words + kTileWords * tile,
                                  columns[n / kPanel * next].start + 16 * tile);
            }
        }
    }
}

// Elements [begin, end) of rows of W_q that are columns of the result, for the panel at column n.
static void pack_rounded_outputs(const rw_term& term, int64_t n, int64_t begin, int64_t end, uint32_t* out,
                                 int32_t* sums) {
    constexpr int64_t piece = 512;
    const int8_t* rows = static_cast<const int8_t*>(term.w) + n * term.w_stride;
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t k = begin; k < end; k += piece) {
        const int64_t length = end - k < piece ? end - k : piece;
        pack_rows(reinterpret_cast<const uint16_t*>(rows + k), term.w_stride / 2, kPanel, length / 2, out);
        for (int64_t step = 0; step < length; step += kByteStep, out += kStepWords)
            for (int64_t i = 0; i < kStepWords; i += 16)
                sum[i / kTileWords] =
                    add_quads(sum[i / kTileWords], _mm512_set1_epi8(1), _mm512_load_si512(out + i));
    }
    for (int tile = 0; tile < 2; ++tile) _mm512_store_si512(sums + 16 * tile, sum[tile]);
}

// Steps [first, last) of rows of W_q that are summed over, for `count` columns from `column` on.
static void pack_rounded_across(const rw_term& term, int64_t column, int64_t count, int64_t first, int64_t last,
                                uint32_t* out, int64_t panel_words, ByteColumns* columns, int64_t next) {
    for (int64_t quad = 16 * first; quad < 16 * last; ++quad, out += quad % 16 ? 16 : 16 + kStepWords - kTileWords) {
        const int8_t* w = static_cast<const int8_t*>(term.w) + 4 * quad * term.w_stride + column;
        for (int64_t n = 0; n < count; n += kPanel) {
            // Past the last row zeros are packed.
            __m512i row[4] = {};
            for (int i = 0; i < 4 && 4 * quad < term.length; ++i) {
                const auto* bytes = reinterpret_cast<const __m256i*>(w + i * term.w_stride + n);
                __builtin_prefetch(reinterpret_cast<const char*>(bytes) + 16 * term.w_stride);
                row[i] = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes));
            }
            const __m512i low = _mm512_or_si512(row[0], _mm512_slli_epi16(row[1], 8)),
                          high = _mm512_or_si512(row[2], _mm512_slli_epi16(row[3], 8));
            uint32_t* to = out + n / kPanel * panel_words;
            int32_t* sums = columns[n / kPanel * next].start;
            add_quads_of_tile(_mm512_unpacklo_epi16(low, high), to, sums);
            add_quads_of_tile(_mm512_unpackhi_epi16(low, high), to + kTileWords, sums + 16);
        }
    }
}

// Steps [first, last) of a weight in 8 bits, for panels [panel, end): `panel_words` and `next` from one to the next.
static void pack_bytes(const rw_term& term, int64_t panel, int64_t end, int64_t first, int64_t last, uint32_t* out,
                       int64_t panel_words, ByteColumns* columns, int64_t next) {
    struct Owner {};
    const int64_t begin = first * kByteStep, stop = last * kByteStep < term.length ? last * kByteStep : term.length;
    const int64_t column = panel * kPanel, count = (end - panel) * kPanel, factors = term.across ? count : stop - begin;
    float* by_column = scratch<Owner, float, 0>(factors);
    const bool is_rounded = term.w_dtype == RW_INT8;
    in_tile_order(term.eight_bit->by_column + (term.across ? column : begin), factors, by_column);
    for (int64_t i = 0; i < end - panel; ++i) {
        std::memset(columns[i * next].start, 0, sizeof columns->start);
        in_tile_order(term.eight_bit->out_scale + column + i * kPanel, kPanel, columns[i * next].scale);
        if (term.across) continue;
        const int64_t n = column + i * kPanel;
        uint32_t* panel_out = out + i * panel_words;
        if (is_rounded) pack_rounded_outputs(term, n, begin, stop, panel_out, columns[i * next].start);
        else pack_byte_outputs(term, by_column, n, begin, stop, panel_out, columns[i * next].start);
    }
    if (term.across && is_rounded)
        pack_rounded_across(term, column, count, first, last, out, panel_words, columns, next);
    else if (term.across)
        pack_bytes_across(term, by_column, column, count, first, last, out, panel_words, columns, next);
    for (int64_t i = 0; i < end - panel; ++i)
        for (int32_t& start : columns[i * next].start) start *= -128;
}

// `rw_quantize_rows`. A row with NaN or Inf has that as its scale, and so in all its products.
static void quantize_rows(const void* rows, int, int64_t x_stride, const float* factor, int64_t T, int64_t K,
                          uint8_t* q, int64_t q_stride, float* scale, int64_t dither) {
    struct Owner {};
    const auto* x = static_cast<const uint16_t*>(rows);
    float* ordered = scratch<Owner, float, 0>(K);
    in_tile_order(factor, K, ordered);
    const __m512i zero = _mm512_setzero_si512(), step = _mm512_set1_epi32(static_cast<int>(dither_at(0, kByteStep)));
    alignas(64) uint32_t begin[kByteStep];
    for (int64_t i = 0; i < kByteStep; ++i) begin[i] = dither_at(0, i / 32 * 32 + column_of(i / 16 % 2, i % 16));
    for (int64_t t = 0; t < T; ++t, x += x_stride, q += q_stride) {
        __m512i most[2] = {zero, zero};
        for (int64_t k = 0; k < K; k += 32) {
            const __m512i w = _mm512_loadu_si512(x + k);
            const __m512i half[2] = {_mm512_unpacklo_epi16(zero, w), _mm512_unpackhi_epi16(zero, w)};
            for (int i = 0; i < 2; ++i) {
                const __m512 z = _mm512_mul_ps(_mm512_castsi512_ps(half[i]), _mm512_loadu_ps(ordered + k + 16 * i));
                most[i] = _mm512_max_epi32(most[i], _mm512_castps_si512(_mm512_abs_ps(z)));
            }
        }
        const int largest_bits = _mm512_reduce_max_epi32(_mm512_max_epi32(most[0], most[1]));
        const float largest = float_of(static_cast<uint32_t>(largest_bits));
        // Below this the quotient would overflow.
        const bool is_zero = largest < 1e-30f;
        scale[t] = is_zero ? 0.0f : largest / kLargestByte;
        const __m512 inverse = _mm512_set1_ps(is_zero ? 0.0f : kLargestByte / largest);
        const __m512i row = _mm512_set1_epi32(static_cast<int>(dither_at(dither + t, 0)));
        __m512i at[4];
        for (int i = 0; i < 4; ++i) at[i] = _mm512_add_epi32(_mm512_load_si512(begin + 16 * i), row);
        for (int64_t k = 0; k < K; k += kByteStep) {
            __m512i bytes;
            if (dither < 0) {
                bytes = step_to_bytes(x + k, ordered + k, inverse, K - k > 32);
            } else {
                bytes = step_to_bytes(x + k, ordered + k, inverse, K - k > 32, at);
                for (__m512i& one : at) one = _mm512_add_epi32(one, step);
            }
            _mm512_storeu_si512(q + k, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
        }
    }
}

}  // namespace rankwise::RW_ISA
