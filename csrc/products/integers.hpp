// Products of integers without AVX-512: weights are rounded while they are packed, rows by `quantize_integer_rows`.
// Sums are exact, and become float32 as `rw_eight_bit` says.
//
// A word has 32 bits: the integers that an instruction multiplies for one column and adds up.
#pragma once

#include "common/multiply_float.hpp"
#include "common/scratch.hpp"
#include "four_bit/isa_avx2.hpp"
#include "products/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

#if defined(__AVXVNNI__)
// Bytes: four in a word. Those of rows have no sign, x + 128, so that sums begin at -128 times the sum of a column.
struct Integers {
    using Element = uint8_t;
    static constexpr int64_t kPerWord = 4;
    static constexpr int kLargest = 127;

    static RW_INLINE __m256i add(__m256i sum, __m256i row, __m256i column) {
        // GCC 12 copies the sums of the intrinsic to memory.
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(row), "x"(column));
        return sum;
    }

    // To what sums of a column begin at, word by word.
    static RW_INLINE __m256i add_start(__m256i start, __m256i column) {
        return add(start, _mm256_set1_epi8(1), column);
    }

    static RW_INLINE __m256i finish_start(__m256i start) { return _mm256_mullo_epi32(start, _mm256_set1_epi32(-128)); }

    // Integers to the eight words of a step.
    static RW_INLINE __m256i words_of(const __m256i (&part)[4]) {
        const __m256i bytes =
            _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
        return _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    }

    // Integers of eight columns, a register for each row, to their words.
    static RW_INLINE __m256i words_across(const __m256i (&row)[4]) {
        const __m256i turn =
            _mm256_broadcastsi128_si256(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
        return _mm256_shuffle_epi8(
            _mm256_packs_epi16(_mm256_packs_epi32(row[0], row[1]), _mm256_packs_epi32(row[2], row[3])), turn);
    }

    static RW_INLINE __m256i of_rows(__m256i words) { return _mm256_xor_si256(words, _mm256_set1_epi8(-128)); }
};
#else
// Integers of 11 bits: two of 16 bits in a word. A sum of 1,024 products of two of them stays below 2^31.
struct Integers {
    using Element = int16_t;
    static constexpr int64_t kPerWord = 2;
    static constexpr int kLargest = 1023;

    static RW_INLINE __m256i add(__m256i sum, __m256i row, __m256i column) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(row, column));
    }

    static RW_INLINE __m256i add_start(__m256i start, __m256i) { return start; }

    static RW_INLINE __m256i finish_start(__m256i start) { return start; }

    static RW_INLINE __m256i words_of(const __m256i (&part)[2]) {
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(part[0], part[1]), _MM_SHUFFLE(3, 1, 2, 0));
    }

    static RW_INLINE __m256i words_across(const __m256i (&row)[2]) {
        return _mm256_blend_epi16(row[0], _mm256_slli_epi32(row[1], 16), 0xaa);
    }

    static RW_INLINE __m256i of_rows(__m256i words) { return words; }
};
#endif

constexpr int64_t kStepIntegers = 8 * Integers::kPerWord;
constexpr int64_t kPieceElements = 256;  // of a row that is decoded or converted before it is packed

// Of one strip of a term: what its sums begin at, and their scale.
struct IntegerStrip {
    const int32_t *words, *start;
    const float* scale;
};

// Eight elements times both factors, rounded, or what is rounded already. S: the dtype in memory.
template <int S>
RW_INLINE __m256i to_integers(const void* w, int64_t i, const float* by_column, Floats by_row,
                              const float* noise = nullptr) {
    if constexpr (S == RW_INT8)
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(w) + i)));
    else {
        Floats quotient = load<S>(w, i) * load<RW_FLOAT32>(by_column, 0) * by_row;
        if (noise) quotient += load<RW_FLOAT32>(noise, 0);
        return _mm256_cvtps_epi32(reinterpret_cast<__m256>(quotient));
    }
}

// Elements [i, i + kStepIntegers) of a row; `noise`: of a dithered one, for as many.
template <int S>
RW_INLINE __m256i step_to_words(const void* w, int64_t i, const float* by_column, Floats by_row,
                                const float* noise = nullptr) {
    __m256i part[Integers::kPerWord];
#pragma GCC unroll 4
    for (int64_t j = 0; j < Integers::kPerWord; ++j)
        part[j] = to_integers<S>(w, i + j * W, by_column + j * W, by_row,
                                 noise ? noise + j * W : nullptr);
    return Integers::words_of(part);
}

constexpr int64_t bytes_of(int dtype) { return dtype == RW_FLOAT32 ? 4 : dtype == RW_INT8 ? 1 : 2; }

// Elements [column, column + count) of a row of the weight: where they lie, or decoded to `made`, rounded to D.
template <int D>
RW_INLINE const void* row_of_weight(const rw_term& term, int64_t row, int64_t column, int64_t count, float* made) {
    const int64_t at = row * term.w_stride + column;
    if (!term.packed) return static_cast<const char*>(term.w) + at * bytes_of(term.w_dtype);
    decode<Avx2, D>(*term.packed, term.w_first + at, count, made);
    return made;
}

// Rows of the weight are columns of the result: elements [from, to) of the strip at column n.
template <int D, int S>
void pack_integer_outputs(const rw_term& term, int64_t n, int64_t from, int64_t to, int32_t* strip, int32_t* start) {
    struct Owner {};
    float* made = scratch<Owner, float, 0>(kStrip * kPieceElements);
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t k = from; k < to; k += kPieceElements) {
        const int64_t length = to - k < kPieceElements ? to - k : kPieceElements;
        const void* row[kStrip];
        for (int64_t i = 0; i < kStrip; ++i)
            row[i] = row_of_weight<D>(term, n + i, k, length, made + i * kPieceElements);
        const float *by_row = term.eight_bit->by_row + n, *by_column = term.eight_bit->by_column + k;
        for (int64_t j = 0; j < length; j += kStepIntegers, strip += 8 * kStrip)
            for (int64_t half = 0; half < 2; ++half) {
                __m256 block[8];
#pragma GCC unroll 8
                for (int64_t i = 0; i < 8; ++i)
                    block[i] = _mm256_castsi256_ps(
                        step_to_words<S>(row[half * W + i], j, by_column + j, all(by_row[half * W + i])));
                transpose(block);
#pragma GCC unroll 8
                for (int64_t i = 0; i < 8; ++i) {
                    _mm256_storeu_ps(reinterpret_cast<float*>(strip + i * kStrip + half * W), block[i]);
                    sums[half] = Integers::add_start(sums[half], _mm256_castps_si256(block[i]));
                }
            }
    }
    for (int64_t half = 0; half < 2; ++half)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(start + half * W), Integers::finish_start(sums[half]));
}

// Rows of the weight are summed over: columns [n, n + columns) of rows [from, to) into strips `strip_words` apart.
template <int D, int S>
void pack_integers_across(const rw_term& term, int64_t n, int64_t columns, int64_t from, int64_t to, int32_t* strips,
                          int64_t strip_words, int32_t* start) {
    struct Owner {};
    constexpr int64_t rows = Integers::kPerWord;
    float* made = scratch<Owner, float, 0>(rows * columns);
    std::memset(start, 0, sizeof(int32_t) * static_cast<std::size_t>(columns));
    for (int64_t k = from; k < to; k += rows, strips += kStrip) {
        const void* row[rows];
        for (int64_t i = 0; i < rows; ++i) {
            row[i] = row_of_weight<D>(term, k + i, n, columns, made + i * columns);
            if (term.packed) continue;
            // Each row may lie in another page, where the hardware's own prefetching ends.
            constexpr int64_t size = bytes_of(S);
            const char* ahead = static_cast<const char*>(row[i]) + 4 * rows * term.w_stride * size;
            for (int64_t at = 0; at < columns * size; at += 64) __builtin_prefetch(ahead + at);
        }
        const float *by_row = term.eight_bit->by_row + k, *by_column = term.eight_bit->by_column + n;
        for (int64_t c = 0; c < columns; c += W) {
            __m256i part[rows];
#pragma GCC unroll 4
            for (int64_t i = 0; i < rows; ++i) part[i] = to_integers<S>(row[i], c, by_column + c, all(by_row[i]));
            const __m256i words = Integers::words_across(part);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(strips + c / kStrip * strip_words + c % kStrip), words);
            auto* sums = reinterpret_cast<__m256i*>(start + c);
            _mm256_storeu_si256(sums, Integers::add_start(_mm256_loadu_si256(sums), words));
        }
    }
    for (int64_t c = 0; c < columns; c += W) {
        auto* sums = reinterpret_cast<__m256i*>(start + c);
        _mm256_storeu_si256(sums, Integers::finish_start(_mm256_loadu_si256(sums)));
    }
}

// The strips of columns [n, end), of elements [from, to) of what is summed over. start: of each column.
template <int D, int S>
void pack_integers(const rw_term& term, int64_t n, int64_t end, int64_t from, int64_t to, int32_t* strips,
                   int64_t strip_words, int32_t* start) {
    if (term.across) return pack_integers_across<D, S>(term, n, end - n, from, to, strips, strip_words, start);
    for (int64_t c = n; c < end; c += kStrip, strips += strip_words, start += kStrip)
        pack_integer_outputs<D, S>(term, c, from, to, strips, start);
}

// out (Rows, kStrip), `out_stride` apart, = or += a_scale * scale * (start + the rows of a times a strip).
template <int Rows, bool Add>
__attribute__((noinline)) void multiply_integers(const Integers::Element* a, int64_t a_stride, const float* a_scale,
                                                 const IntegerStrip& strip, int64_t words, float* out,
                                                 int64_t out_stride) {
    __m256i sums[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < 2; ++v)
            sums[r][v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(strip.start + v * W));
    const int32_t* columns = strip.words;
    for (int64_t k = 0; k < words; ++k, a += Integers::kPerWord, columns += kStrip) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)),
                      second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + W));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            int32_t word;
            std::memcpy(&word, a + r * a_stride, sizeof word);
            const __m256i row = _mm256_set1_epi32(word);
            sums[r][0] = Integers::add(sums[r][0], row, first);
            sums[r][1] = Integers::add(sums[r][1], row, second);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r, out += out_stride)
        for (int v = 0; v < 2; ++v) {
            const Floats factor = all(a_scale[r]) * load<RW_FLOAT32>(strip.scale, v * W),
                         value = reinterpret_cast<Floats>(_mm256_cvtepi32_ps(sums[r][v])) * factor;
            store<RW_FLOAT32>(out, v * W, Add ? value + load<RW_FLOAT32>(out, v * W) : value);
        }
}

// `rw_quantize_rows`. A row with NaN or Inf has that as its scale, and so in all its products.
template <int D>
void quantize_integer_rows_of(const void* x, int64_t x_stride, const float* factor, int64_t T, int64_t K, uint8_t* q,
                              int64_t q_stride_bytes, float* scale, int64_t dither) {
    for (int64_t t = 0; t < T; ++t, q += q_stride_bytes) {
        __m256i most = _mm256_setzero_si256();
        for (int64_t k = 0; k < K; k += W) {
            const Floats z = load<D>(x, t * x_stride + k) * load<RW_FLOAT32>(factor, k);
            most = _mm256_max_epi32(most, reinterpret_cast<__m256i>(bits_of(z) & 0x7fffffffu));
        }
        alignas(32) int32_t each[W];
        _mm256_store_si256(reinterpret_cast<__m256i*>(each), most);
        int32_t bits = 0;
        for (int32_t one : each) bits = one > bits ? one : bits;
        const float largest = float_of(static_cast<uint32_t>(bits));
        // Below this the quotient would overflow.
        const bool is_zero = largest < 1e-30f;
        scale[t] = is_zero ? 0.0f : largest / Integers::kLargest;
        const Floats inverse = all(is_zero ? 0.0f : Integers::kLargest / largest);
        for (int64_t k = 0; k < K; k += kStepIntegers) {
            float noise[kStepIntegers];
            for (int64_t i = 0; dither >= 0 && i < kStepIntegers; ++i) {
                const uint32_t h = dither_at(dither + t, k + i) >> (32 - kDitherBits);
                noise[i] = (static_cast<float>(h) + 0.5f) * kDitherStep - 0.5f;
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + k * static_cast<int64_t>(sizeof(Integers::Element))),
                                Integers::of_rows(step_to_words<D>(x, t * x_stride + k, factor + k, inverse,
                                                                   dither < 0 ? nullptr : noise)));
        }
    }
}

void quantize_integer_rows(const void* x, int dtype, int64_t x_stride, const float* factor, int64_t T, int64_t K,
                           uint8_t* q, int64_t q_stride_bytes, float* scale, int64_t dither) {
    const auto quantize =
        dtype == RW_FLOAT32 ? quantize_integer_rows_of<RW_FLOAT32> : quantize_integer_rows_of<RW_BFLOAT16>;
    quantize(x, x_stride, factor, T, K, q, q_stride_bytes, scale, dither);
}

}  // namespace
}  // namespace rankwise::RW_ISA
