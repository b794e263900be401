// y = x W'^T + b for a single row of x with AVX2. Two rows of the weight share each register, one in either half: so
// the 16 bytes that `vpshufb` chooses from are each row's own, and to make them for a block costs two rows as much as
// one.
#pragma once

#include <immintrin.h>

#include "common/scratch.hpp"
#include "four_bit/decode.hpp"
#include "four_bit/tile.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kRowStep = 32;  // elements of a row whose codes fill half a register

// Four numbers in either half.
static inline __m256 in_both(const float* four) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)); }

static inline __m256i in_both(const uint8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
}

static inline __m256i halves(const uint8_t* first, const uint8_t* second) {
    const __m128i lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(lower),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)), 1);
}

static inline __m256 halves(const float& first, const float& second) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(&first)), _mm_broadcast_ss(&second), 1);
}

// Two rows of the weight on their way to two sums.
template <int D>
struct TwoRows;

// Weights are value * scale rounded to bfloat16, 16 of them per block and row: two tables of bytes.
template <>
struct TwoRows<RW_BFLOAT16> {
    static constexpr int at_once = 2;
    using Values = const float*;

    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256i low, high;

    static Values values(const float* value) { return value; }

    // The upper halves of a and b, rounded to nearest even, in turns: a0 b0 a1 b1 ... A NaN must have zeros in its
    // lower half.
    static __m256i rounded(__m256 a, __m256 b) {
        const __m256i of_a = _mm256_castps_si256(a), of_b = _mm256_castps_si256(b);
        const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(of_a, 16), of_b, 0xaa);
        const __m256i lower = _mm256_blend_epi16(of_a, _mm256_slli_epi32(of_b, 16), 0xaa);
        // The average rounds up: its highest bit is the carry of lower + 0x7fff + (upper & 1).
        const __m256i half = _mm256_or_si256(_mm256_and_si256(upper, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x7ffe));
        return _mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_avg_epu16(lower, half), 15));
    }

    void begin_block(Values value, __m256 scale) {
        const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        scale = _mm256_blendv_ps(scale, nan, _mm256_cmp_ps(scale, scale, _CMP_UNORD_Q));
        const auto four = [&](int i) { return _mm256_mul_ps(in_both(value + 4 * i), scale); };
        const __m256i apart = _mm256_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15,  //
                                               0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
        const __m256i first = _mm256_shuffle_epi8(rounded(four(0), four(1)), apart);
        const __m256i second = _mm256_shuffle_epi8(rounded(four(2), four(3)), apart);
        low = _mm256_unpacklo_epi64(first, second), high = _mm256_unpackhi_epi64(first, second);
    }

    // The products of 16 codes of either row with 16 elements of x.
    void multiply(Values, __m256i codes, const float* x) {
        const __m256i lower = _mm256_shuffle_epi8(low, codes), upper = _mm256_shuffle_epi8(high, codes);
        const __m256i words[2] = {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)};
        for (int i = 0; i < 2; ++i) {
            const __m256i even = _mm256_slli_epi32(words[i], 16);
            const __m256i odd = _mm256_and_si256(words[i], _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
            sum[2 * i] = _mm256_fmadd_ps(_mm256_castsi256_ps(even), in_both(x + 8 * i), sum[2 * i]);
            sum[2 * i + 1] = _mm256_fmadd_ps(_mm256_castsi256_ps(odd), in_both(x + 8 * i + 4), sum[2 * i + 1]);
        }
    }

    void end_block(__m256) {}

    __m256 total() const { return _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])); }

    // Which of 16 codes meets element i of x.
    static constexpr int64_t code_at(int64_t i) { return i / 8 * 8 + i % 4 * 2 + i / 4 % 2; }
};

// A block's sum of value * x is scaled as a whole, so that the four tables of bytes are the same for all blocks. It
// differs from the sum of (value * scale) * x in float32's last bits, as another order of summation does.
template <>
struct TwoRows<RW_FLOAT32> {
    static constexpr int at_once = 1;
    struct Values {
        __m256i byte[4];
    };

    __m256 sum = _mm256_setzero_ps();
    __m256 block[2];

    static Values values(const float* value) {
        uint8_t bytes[4][16];
        for (int code = 0; code < 16; ++code)
            for (int i = 0; i < 4; ++i) bytes[i][code] = static_cast<uint8_t>(bits_of(value[code]) >> (8 * i));
        return {{in_both(bytes[0]), in_both(bytes[1]), in_both(bytes[2]), in_both(bytes[3])}};
    }

    void begin_block(const Values&, __m256) { block[0] = block[1] = _mm256_setzero_ps(); }

    void multiply(const Values& values, __m256i codes, const float* x) {
        __m256i byte[4];
        for (int i = 0; i < 4; ++i) byte[i] = _mm256_shuffle_epi8(values.byte[i], codes);
        const __m256i lower[2] = {_mm256_unpacklo_epi8(byte[0], byte[1]), _mm256_unpackhi_epi8(byte[0], byte[1])};
        const __m256i upper[2] = {_mm256_unpacklo_epi8(byte[2], byte[3]), _mm256_unpackhi_epi8(byte[2], byte[3])};
        for (int i = 0; i < 2; ++i) {
            const __m256i first = _mm256_unpacklo_epi16(lower[i], upper[i]),
                          second = _mm256_unpackhi_epi16(lower[i], upper[i]);
            block[0] = _mm256_fmadd_ps(_mm256_castsi256_ps(first), in_both(x + 8 * i), block[0]);
            block[1] = _mm256_fmadd_ps(_mm256_castsi256_ps(second), in_both(x + 8 * i + 4), block[1]);
        }
    }

    void end_block(__m256 scale) { sum = _mm256_fmadd_ps(_mm256_add_ps(block[0], block[1]), scale, sum); }

    __m256 total() const { return sum; }

    static constexpr int64_t code_at(int64_t i) { return i; }
};

// Elements of x as floats, in the order in which `multiply` meets them: of each step the first codes of 16 bytes, then
// the second ones.
template <int D>
static void arrange_one_row_as(const void* x, int64_t K, float* out) {
    for (int64_t k = 0; k < K; k += kRowStep)
        for (int i = 0; i < kRowStep; ++i)
            out[k + i] = load_as_float<D>(x, k + 2 * TwoRows<D>::code_at(i % 16) + i / 16);
}

// `rows` <= 2 P rows of the weight from n on; where rows are missing, the last one is multiplied again.
template <int D, int P>
static void rows_by_one(const LinearJob& job, const typename TwoRows<D>::Values& values, const float* scales, int64_t n,
                        int64_t rows) {
    const rw_weight& weight = *job.weight;
    const int64_t blocks = job.K / weight.block_size, row_bytes = job.K / 2;
    const auto* x = static_cast<const float*>(job.x);
    const uint8_t* packed[2 * P];
    const float* scale[2 * P];
    for (int64_t r = 0; r < 2 * P; ++r) {
        const int64_t row = r < rows ? r : rows - 1;
        packed[r] = weight.packed + (n + row) * row_bytes, scale[r] = scales + row * blocks;
    }
    const __m256i four_bits = _mm256_set1_epi8(15);
    TwoRows<D> pair[P];
    for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            pair[p].begin_block(values, halves(scale[2 * p][block], scale[2 * p + 1][block]));
            // The same row of the next few: these short streams are too many for the hardware's own prefetching.
            __builtin_prefetch(packed[2 * p] + 2 * P * row_bytes);
            __builtin_prefetch(packed[2 * p + 1] + 2 * P * row_bytes);
        }
        for (int64_t done = 0; done < weight.block_size; done += kRowStep, x += kRowStep)
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                const __m256i bytes = halves(packed[2 * p], packed[2 * p + 1]);
                pair[p].multiply(values, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four_bits), x);
                pair[p].multiply(values, _mm256_and_si256(bytes, four_bits), x + kRowStep / 2);
                packed[2 * p] += kRowStep / 2, packed[2 * p + 1] += kRowStep / 2;
            }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) pair[p].end_block(halves(scale[2 * p][block], scale[2 * p + 1][block]));
    }
    for (int p = 0; p < P; ++p) {
        alignas(32) float total[8];
        _mm256_store_ps(total, pair[p].total());
        for (int64_t r = 2 * p; r < 2 * p + 2 && r < rows; ++r) {
            const float* four = total + 4 * (r % 2);
            store_sum<D>(job, n + r, 0, (four[0] + four[1]) + (four[2] + four[3]));
        }
    }
}

template <class Isa, int D>
static void one_row_as(const LinearJob& job, int64_t first, int64_t last) {
    constexpr int P = TwoRows<D>::at_once;
    const rw_weight& weight = *job.weight;
    const auto values = TwoRows<D>::values(weight.value);
    const int64_t blocks = job.K / weight.block_size;
    float* made = weight.nested_absmax ? scratch<Isa, float, 2>(2 * P * blocks) : nullptr;
    for (int64_t n = first; n < last; n += 2 * P) {
        const int64_t rows = last - n < 2 * P ? last - n : 2 * P;
        prefetch_scales(weight, (n + rows) * blocks, rows * blocks);
        if (made) Isa::scales(weight, n * blocks, rows * blocks, made);
        rows_by_one<D, P>(job, values, made ? made : static_cast<const float*>(weight.absmax) + n * blocks, n, rows);
    }
}

template <class Isa>
static void one_row(const LinearJob& job, int64_t first, int64_t last) {
    if (job.dtype == RW_FLOAT32) return one_row_as<Isa, RW_FLOAT32>(job, first, last);
    one_row_as<Isa, RW_BFLOAT16>(job, first, last);
}

static void arrange_one_row(const void* x, int dtype, int64_t K, float* out) {
    if (dtype == RW_FLOAT32) return arrange_one_row_as<RW_FLOAT32>(x, K, out);
    arrange_one_row_as<RW_BFLOAT16>(x, K, out);
}

}  // namespace rankwise::RW_ISA
