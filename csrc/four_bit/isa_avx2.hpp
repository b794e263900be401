// AVX2 with FMA and F16C. 16-bit tables are looked up a byte at a time, low bytes and high bytes apart.
#pragma once

#include <immintrin.h>

#include "common/convert.hpp"
#include "four_bit/decode.hpp"
#include "four_bit/kernels.hpp"

namespace rankwise::RW_ISA {

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
        static constexpr int vectors = 2;
        __m256 lower, upper;
        float entries[16];
    };
    // Of bfloat16 numbers as floats: two bytes make one.
    struct TableOfBytes {
        static constexpr int vectors = 4;
        __m256i low, high;  // the 16 bytes twice
    };

    // 8 numbers of a table rounded to D, as words in 32-bit lanes.
    template <int D>
    static __m256i words(const float* value, float scale) {
        const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(value), _mm256_set1_ps(scale));
        if (D == RW_FLOAT16) return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        const __m256i up = _mm256_srli_epi32(rounded_up(value, scale), 16);
        const __m256 is_number = _mm256_cmp_ps(v, v, _CMP_ORD_Q);
        return _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), up, _mm256_castps_si256(is_number));
    }

    template <int D, bool Plain>
    static Table16 table(const float* value, float scale, uint16_t*) {
        Table16 table;
        // The packing works within 128-bit halves; the permutation puts the words back in order.
        const __m256i packed = _mm256_packus_epi32(words<D>(value, scale), words<D>(value + 8, scale));
        const __m256i all = _mm256_permute4x64_epi64(packed, 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(table.words), all);
        const __m128i first = _mm256_castsi256_si128(all), second = _mm256_extracti128_si256(all, 1),
                      byte = _mm_set1_epi16(0xff);
        table.low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
        table.high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        return table;
    }

    // The numbers of a table, rounded to float16 if D is that.
    template <int D>
    static __m256 floats(const float* value, float scale) {
        const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(value), _mm256_set1_ps(scale));
        return D == RW_FLOAT16 ? _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)) : v;
    }

    template <int D, bool Plain>
    static auto table(const float* value, float scale, float*) {
        if constexpr (D == RW_BFLOAT16 && Plain) {
            return table_of_bytes(value, scale);
        } else if constexpr (D == RW_BFLOAT16) {
            const Table16 words = table<D, Plain>(value, scale, static_cast<uint16_t*>(nullptr));
            return TableOfBytes{_mm256_broadcastsi128_si256(words.low), _mm256_broadcastsi128_si256(words.high)};
        } else {
            return table_of_floats<D>(value, scale);
        }
    }

    // Of a finite scale: the upper two bytes of each rounded number.
    static TableOfBytes table_of_bytes(const float* value, float scale) {
        const __m256i first = rounded_up(value, scale), second = rounded_up(value + 8, scale);
        const __m256i of_first = _mm256_setr_epi8(2, 6, 10, 14, 3, 7, 11, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                  2, 6, 10, 14, 3, 7, 11, 15, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i of_second = _mm256_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                                   -1, -1, -1, -1, -1, -1, -1, -1, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m256i both =
            _mm256_or_si256(_mm256_shuffle_epi8(first, of_first), _mm256_shuffle_epi8(second, of_second));
        return {_mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6)),
                _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(1, 5, 3, 7, 1, 5, 3, 7))};
    }

    // Numbers whose upper halves are bfloat16, rounded as convert.hpp does; NaN aside.
    static __m256i rounded_up(const float* value, float scale) {
        const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(value), _mm256_set1_ps(scale)));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    }

    template <int D>
    static Table32 table_of_floats(const float* value, float scale) {
        Table32 table = {floats<D>(value, scale), floats<D>(value + 8, scale), {}};
        _mm256_storeu_ps(table.entries, table.lower);
        _mm256_storeu_ps(table.entries + 8, table.upper);
        return table;
    }

    static uint16_t entry(const Table16& table, int code) { return table.words[code]; }
    static float entry(const Table32& table, int code) { return table.entries[code]; }
    static float entry(const TableOfBytes& table, int code) {
        uint8_t low[32], high[32];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), table.low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), table.high);
        return from_bfloat16(static_cast<uint16_t>(high[code] << 8 | low[code]));
    }

    // bfloat16 to float.
    static __m256 widened(__m128i words) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }

    // Bytes to codes in element order.
    static __m128i nibbles(__m128i bytes) {
        const __m128i four_bits = _mm_set1_epi8(15);
        return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), four_bits), _mm_and_si128(bytes, four_bits));
    }

    template <bool Stream>
    static void store(uint16_t* out, __m128i words) {
        if (Stream) _mm_stream_si128(reinterpret_cast<__m128i*>(out), words);
        else _mm_storeu_si128(reinterpret_cast<__m128i*>(out), words);
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
        const __m256 lower = _mm256_permutevar8x32_ps(table.lower, index),
                     upper = _mm256_permutevar8x32_ps(table.upper, index);
        return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }

    // The next two vectors of weights, even and odd elements apart.
    static void unpack(const Table32& table, const uint8_t* packed, __m256 (&w)[2]) {
        const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
        w[0] = look_up(table, _mm256_srli_epi32(b, 4)), w[1] = look_up(table, b);
    }

    // The next four vectors of weights. Of 16 bytes the first codes are looked up in the lower half of a register and
    // the second ones in the upper half; of each pair of bfloat16 numbers that come out, one vector takes the lower and
    // one the upper.
    static void unpack(const TableOfBytes& table, const uint8_t* packed, __m256 (&w)[4]) {
        const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        const __m256i codes =
            _mm256_and_si256(_mm256_srlv_epi32(bytes, _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0)), _mm256_set1_epi8(15));
        const __m256i low = _mm256_shuffle_epi8(table.low, codes), high = _mm256_shuffle_epi8(table.high, codes);
        const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
        for (int i = 0; i < 2; ++i) {
            w[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
            w[2 * i + 1] =
                _mm256_castsi256_ps(_mm256_and_si256(words[i], _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
        }
    }

    // The element of a group that stands at i.
    template <int64_t Group>
    static constexpr int64_t element_at(int64_t i) {
        if (Group == 16) return i < 8 ? 2 * i : 2 * i - 15;
        const int64_t vector = i / 8, lane = i % 8, byte = vector / 2 * 8 + lane % 4 * 2 + vector % 2;
        return 2 * byte + lane / 4;
    }

    // The scales of `count` blocks; whether all are finite.
    static bool scales(const rw_weight& weight, int64_t first, int64_t count, float* scales) {
        uint32_t most = 0;
        for (int64_t i = 0; i < count; ++i) {
            scales[i] = block_scale(weight, first + i);
            const uint32_t magnitude = bits_of(scales[i]) & 0x7fffffffu;
            most = magnitude > most ? magnitude : most;
        }
        return most < 0x7f800000u;
    }

    template <bool Stream>
    static void store(float* out, __m256 floats) {
        if (Stream) _mm256_stream_ps(out, floats);
        else _mm256_storeu_ps(out, floats);
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

    template <bool Stream>
    static void expand(const TableOfBytes& table, const uint8_t* packed, int64_t bytes, float* out) {
        int64_t j = 0;
        for (; j + 8 <= bytes; j += 8) {
            const __m128i codes = nibbles(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + j)));
            const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(table.low), codes);
            const __m128i high = _mm_shuffle_epi8(_mm256_castsi256_si128(table.high), codes);
            store<Stream>(out + 2 * j, widened(_mm_unpacklo_epi8(low, high)));
            store<Stream>(out + 2 * j + 8, widened(_mm_unpackhi_epi8(low, high)));
        }
        for (; j < bytes; ++j) {
            out[2 * j] = entry(table, packed[j] >> 4);
            out[2 * j + 1] = entry(table, packed[j] & 15);
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
        return D == RW_FLOAT16 ? _mm256_cvtph_ps(half) : widened(half);
    }

    template <int D>
    static uint32_t absmax_bits(const void* data, int64_t count) {
        constexpr int64_t width = D == RW_FLOAT32 ? 8 : 16;
        const __m256i magnitude = D == RW_FLOAT32 ? _mm256_set1_epi32(0x7fffffff) : _mm256_set1_epi16(0x7fff);
        __m256i most = _mm256_setzero_si256();
        int64_t i = 0;
        for (; i + width <= count; i += width) {
            const char* next = static_cast<const char*>(data) + i * (32 / width);
            const __m256i bits =
                _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)), magnitude);
            most = D == RW_FLOAT32 ? _mm256_max_epu32(most, bits) : _mm256_max_epu16(most, bits);
        }
        uint32_t bits = greatest<D>(most);
        for (; i < count; ++i) {
            const uint32_t one = bits_of(load_as_float<D>(data, i)) & 0x7fffffffu;
            bits = one > bits ? one : bits;
        }
        return bits;
    }

    // The greatest of magnitudes of D, as the bits of a float.
    template <int D>
    static uint32_t greatest(__m256i magnitudes) {
        const __m128i lower = _mm256_castsi256_si128(magnitudes), upper = _mm256_extracti128_si256(magnitudes, 1);
        if (D != RW_FLOAT32) {
            const __m128i least = _mm_minpos_epu16(_mm_xor_si128(_mm_max_epu16(lower, upper), _mm_set1_epi16(-1)));
            const uint16_t half = static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
            return bits_of(D == RW_BFLOAT16 ? from_bfloat16(half) : from_float16(half));
        }
        const __m128i four = _mm_max_epu32(lower, upper), two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_srli_epi64(two, 32))));
    }

    // The bounds by steps of a bisection. What is looked up is minus the number of bounds found below so far, of which
    // a permutation reads the lower bits: entry k of a table of four or eight stands at -k.
    struct Bounds {
        __m256 half, quarter[2], eighths, sixteenths;
        __m128i order;
        explicit Bounds(const QuantizeJob& job)
            : half(_mm256_set1_ps(job.bound[7])),
              quarter{_mm256_set1_ps(job.bound[3]), _mm256_set1_ps(job.bound[11])},
              order(_mm_loadu_si128(reinterpret_cast<const __m128i*>(job.order))) {
            alignas(32) float four[8], eight[8];
            for (int k = 0; k < 8; ++k)
                four[-k & 3] = four[4 + (-k & 3)] = job.bound[1 + 4 * (k & 3)], eight[-k & 7] = job.bound[2 * k];
            eighths = _mm256_load_ps(four), sixteenths = _mm256_load_ps(eight);
        }
    };

    // Minus the number of bounds below each value, by bisection: a true comparison is -1.
    static __m256i minus_below(__m256 v, const Bounds& bounds) {
        const auto step = [&](__m256i before, __m256 bound) {
            return _mm256_add_epi32(_mm256_add_epi32(before, before),
                                    _mm256_castps_si256(_mm256_cmp_ps(v, bound, _CMP_GT_OQ)));
        };
        const __m256 above_half = _mm256_cmp_ps(v, bounds.half, _CMP_GT_OQ);
        __m256i below =
            step(_mm256_castps_si256(above_half), _mm256_blendv_ps(bounds.quarter[0], bounds.quarter[1], above_half));
        below = step(below, _mm256_permutevar_ps(bounds.eighths, below));
        return step(below, _mm256_permutevar8x32_ps(bounds.sixteenths, below));
    }

    // The even and the odd ones of the next 16 numbers: of bfloat16 ones in order, of others 0 1 4 5 2 3 6 7.
    template <int D>
    static void load_pairs(const void* data, int64_t i, __m256& even, __m256& odd) {
        if (D == RW_BFLOAT16) {
            const __m256i words =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + i));
            even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
            odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
        } else {
            const __m256 first = load8<D>(data, i), second = load8<D>(data, i + 8);
            even = _mm256_shuffle_ps(first, second, 0x88), odd = _mm256_shuffle_ps(first, second, 0xdd);
        }
    }

    // 16 times the number of bounds below an even element and that of the odd one after it, for the next 16 numbers.
    template <int D>
    static __m256i below_pairs(const void* data, int64_t i, __m256 factor, const Bounds& bounds) {
        __m256 even, odd;
        load_pairs<D>(data, i, even, odd);
        const __m256i high = minus_below(_mm256_mul_ps(even, factor), bounds),
                      low = minus_below(_mm256_mul_ps(odd, factor), bounds);
        const __m256i pairs =
            _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_add_epi32(_mm256_slli_epi32(high, 4), low));
        return D == RW_BFLOAT16 ? pairs : _mm256_permute4x64_epi64(pairs, 0xd8);
    }

    template <int D>
    static void encode(const void* data, int64_t count, float inverse, const Bounds& bounds, uint8_t* packed) {
        const __m256 factor = _mm256_set1_ps(inverse);
        const __m128i four_bits = _mm_set1_epi8(15);
        for (int64_t i = 0; i < count; i += 32) {
            const __m256i first = below_pairs<D>(data, i, factor, bounds),
                          second = below_pairs<D>(data, i + 16, factor, bounds);
            // The packing works within 128-bit halves; the permutation puts the words back in order.
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
            const __m128i below = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
            const __m128i low = _mm_shuffle_epi8(bounds.order, _mm_and_si128(below, four_bits));
            const __m128i high = _mm_shuffle_epi8(bounds.order, _mm_and_si128(_mm_srli_epi16(below, 4), four_bits));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm_or_si128(_mm_slli_epi16(high, 4), low));
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

}  // namespace rankwise::RW_ISA
