// AVX2 with FMA and F16C. 16-bit tables are looked up a byte at a time, low bytes and high bytes apart.
#pragma once

#include <immintrin.h>

#include "convert.hpp"
#include "decode.hpp"
#include "kernels.hpp"

namespace rankwise {

struct Avx2 {
    static constexpr bool multiplies_bfloat16 = false;
    static constexpr int columns = 2;  // with 4 weight rows: 8 of 16 registers are sums
    static constexpr int64_t fused_rows = 2;
    static constexpr int64_t stream_bytes = int64_t{16} << 20;

    struct Table16 {
        __m128i low, high;
        uint16_t words[16];
    };
    struct Table32 {
        __m256 lower, upper;
        float entries[16];
    };

    template <int D, bool Plain>
    static Table16 table(const float* value, float scale, uint16_t*) {
        Table16 table;
        for (int c = 0; c < 16; ++c) store_float<D>(table.words, c, value[c] * scale);
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.words));
        const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.words + 8));
        const __m128i byte = _mm_set1_epi16(0xff);
        table.low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
        table.high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        return table;
    }

    template <int D, bool Plain>
    static Table32 table(const float* value, float scale, float*) {
        Table32 table;
        for (int c = 0; c < 16; ++c) table.entries[c] = rounded<D>(value[c] * scale);
        table.lower = _mm256_loadu_ps(table.entries);
        table.upper = _mm256_loadu_ps(table.entries + 8);
        return table;
    }

    static uint16_t entry(const Table16& table, int code) { return table.words[code]; }
    static float entry(const Table32& table, int code) { return table.entries[code]; }

    // Bytes to codes in element order.
    static __m128i nibbles(__m128i bytes) {
        const __m128i four_bits = _mm_set1_epi8(15);
        return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), four_bits), _mm_and_si128(bytes, four_bits));
    }

    template <bool Stream>
    static void store(uint16_t* out, __m128i words) {
        if (Stream)
            _mm_stream_si128(reinterpret_cast<__m128i*>(out), words);
        else
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), words);
    }

    template <bool Stream>
    static void expand(const Table16& table, const uint8_t* packed, int64_t bytes, uint16_t* out) {
        int64_t j = 0;
        for (; j + 8 <= bytes; j += 8) {
            const __m128i codes = nibbles(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + j)));
            const __m128i low = _mm_shuffle_epi8(table.low, codes), high = _mm_shuffle_epi8(table.high, codes);
            store<Stream>(out + 2 * j, _mm_unpacklo_epi8(low, high));
            store<Stream>(out + 2 * j + 8, _mm_unpackhi_epi8(low, high));
        }
        for (; j < bytes; ++j) {
            out[2 * j] = table.words[packed[j] >> 4];
            out[2 * j + 1] = table.words[packed[j] & 15];
        }
    }

    // Three bits of each index choose an entry of either half, the fourth chooses the half; higher ones are ignored.
    static __m256 look_up(const Table32& table, __m256i index) {
        const __m256 lower = _mm256_permutevar8x32_ps(table.lower, index), upper = _mm256_permutevar8x32_ps(table.upper, index);
        return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }

    struct Pair {
        __m256 even, odd;
    };

    // The next two vectors of weights, even and odd elements apart.
    static Pair pair(const Table32& table, const uint8_t* packed) {
        const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
        return {look_up(table, _mm256_srli_epi32(b, 4)), look_up(table, b)};
    }

    static bool scales(const rw_weight& weight, int64_t first, int64_t count, float* scales) {
        return scales_one_by_one(weight, first, count, scales);
    }

    template <bool Stream>
    static void store(float* out, __m256 floats) {
        if (Stream)
            _mm256_stream_ps(out, floats);
        else
            _mm256_storeu_ps(out, floats);
    }

    template <bool Stream>
    static void expand(const Table32& table, const uint8_t* packed, int64_t bytes, float* out) {
        int64_t j = 0;
        for (; j + 8 <= bytes; j += 8) {
            const __m128i codes = nibbles(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + j)));
            store<Stream>(out + 2 * j, look_up(table, _mm256_cvtepu8_epi32(codes)));
            store<Stream>(out + 2 * j + 8, look_up(table, _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))));
        }
        for (; j < bytes; ++j) {
            out[2 * j] = table.entries[packed[j] >> 4];
            out[2 * j + 1] = table.entries[packed[j] & 15];
        }
    }

    template <bool Stream, class Table, class Out>
    static void expand_block(const Table& table, const uint8_t* packed, int64_t bytes, Out* out) {
        expand<Stream>(table, packed, bytes, out);
    }

    static void fence() { _mm_sfence(); }

    template <int D>
    static __m256 load8(const void* data, int64_t i) {
        if (D == RW_FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(data) + i);
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + i));
        if (D == RW_FLOAT16) return _mm256_cvtph_ps(half);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }

    template <int D>
    static uint32_t absmax_bits(const void* data, int64_t count) {
        const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
        __m256i most = _mm256_setzero_si256();
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(load8<D>(data, i)), magnitude));
        uint32_t lanes[9];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
        lanes[8] = 0;
        for (; i < count; ++i) {
            const uint32_t one = bits_of(load_as_float<D>(data, i)) & 0x7fffffffu;
            lanes[8] = one > lanes[8] ? one : lanes[8];
        }
        uint32_t bits = 0;
        for (uint32_t lane : lanes) bits = lane > bits ? lane : bits;
        return bits;
    }

    struct Bounds {
        __m256 bound[15];
        __m128i order;
        explicit Bounds(const QuantizeJob& job) : order(_mm_loadu_si128(reinterpret_cast<const __m128i*>(job.order))) {
            for (int k = 0; k < 15; ++k) bound[k] = _mm256_set1_ps(job.bound[k]);
        }
    };

    // The number of bounds below each value: a true comparison is -1.
    static __m256i count_below(__m256 v, const Bounds& bounds) {
        __m256i below = _mm256_setzero_si256();
        for (int k = 0; k < 15; ++k)
            below = _mm256_sub_epi32(below, _mm256_castps_si256(_mm256_cmp_ps(v, bounds.bound[k], _CMP_GT_OQ)));
        return below;
    }

    template <int D>
    static void encode(const void* data, int64_t count, float inverse, const Bounds& bounds, uint8_t* packed) {
        const __m256 factor = _mm256_set1_ps(inverse);
        for (int64_t i = 0; i < count; i += 16) {
            const __m256i first = count_below(_mm256_mul_ps(load8<D>(data, i), factor), bounds);
            const __m256i second = count_below(_mm256_mul_ps(load8<D>(data, i + 8), factor), bounds);
            // The packing works within 128-bit halves; the permutation puts the words back in order.
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
            const __m128i below = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
            const __m128i code = _mm_shuffle_epi8(bounds.order, below);
            const __m128i pairs = _mm_maddubs_epi16(code, _mm_set1_epi16(0x0110));  // 16 * first + second
            _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm_packus_epi16(pairs, pairs));
        }
    }

    struct FloatLane {
        using Element = float;
        using Vector = __m256;
        using Sum = __m256;
        static constexpr int width = 8;
        static Sum zero() { return _mm256_setzero_ps(); }
        static Vector load(const float* p) { return _mm256_loadu_ps(p); }
        static Vector load_some(const float* p, int count) {
            float some[8] = {};
            for (int i = 0; i < count; ++i) some[i] = p[i];
            return _mm256_loadu_ps(some);
        }
        static void store(float* p, Vector v) { _mm256_store_ps(p, v); }
        static Sum multiply_add(Vector a, Vector b, Sum sum) { return _mm256_fmadd_ps(a, b, sum); }
        static Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
        static float total(Sum sum) {
            const __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
        }
        static void totals(const Sum* sum, int64_t stride, float* out) {
            for (int i = 0; i < 16; ++i) out[i] = total(sum[i * stride]);
        }
    };
};

}  // namespace rankwise
