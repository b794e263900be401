// AVX-512 (F, BW, DQ, VL), with products of bfloat16 pairs where the CPU has AVX512_BF16.
#pragma once

#include <immintrin.h>

#include "common/convert.hpp"
#include "four_bit/decode.hpp"
#include "four_bit/kernels.hpp"

namespace rankwise::RW_ISA {

struct Avx512 {
#ifdef __AVX512BF16__
    static constexpr bool multiplies_bfloat16 = true;
#else
    static constexpr bool multiplies_bfloat16 = false;
#endif
    static constexpr int columns = 6;  // with 4 weight rows: 24 of 32 registers are sums
    static constexpr int64_t fused_rows = 4;
    static constexpr int64_t stream_bytes = int64_t{64} << 20;

    struct Table16 {
        static constexpr int vectors = 2;
        __m512i words;  // the 16 entries twice: an index's fifth bit is then of no account
    };
    struct Table32 {
        static constexpr int vectors = 2;
        __m512 entries;
    };

    static __m512 products(const float* value, float scale) {
        return _mm512_mul_ps(_mm512_loadu_ps(value), _mm512_set1_ps(scale));
    }

    // Whether a block with this scale has no subnormal weights: vcvtneps2bf16 would flush those to zero.
    static bool plain(float scale) {
        const uint32_t magnitude = bits_of(scale) & 0x7fffffffu;
        return magnitude - 0x0da24260u < 0x7f800000u - 0x0da24260u;  // 1e-30 <= |scale| < inf
    }

    template <int D, bool Plain>
    static __m256i words_of(const float* value, float scale) {
        const __m512 v = products(value, scale);
        if (D == RW_FLOAT16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#ifdef __AVX512BF16__
        if (Plain || __builtin_expect(plain(scale), 1)) return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#endif
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i half_up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(
            _mm512_mask_mov_epi32(_mm512_srli_epi32(half_up, 16), nan, _mm512_set1_epi32(0x7fc0)));
    }

    template <int D, bool Plain>
    static Table16 table(const float* value, float scale, uint16_t*) {
        return {_mm512_broadcast_i64x4(words_of<D, Plain>(value, scale))};
    }

    template <int D, bool Plain>
    static Table32 table(const float* value, float scale, float*) {
        if (D == RW_FLOAT32) return {products(value, scale)};
        const __m256i words = words_of<D, Plain>(value, scale);
        if (D == RW_FLOAT16) return {_mm512_cvtph_ps(words)};
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
    }

    static uint16_t entry(const Table16& table, int code) {
        alignas(64) uint16_t words[32];
        _mm512_store_si512(words, table.words);
        return words[code];
    }

    static float entry(const Table32& table, int code) {
        alignas(64) float entries[16];
        _mm512_store_ps(entries, table.entries);
        return entries[code];
    }

    // 16 bytes to 32 words: each byte becomes the pair (b >> 4, b) of indices.
    static __m512i look_up(const Table16& table, __m128i bytes) {
        const __m512i b = _mm512_cvtepu8_epi32(bytes);
        return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16)),
                                        table.words);
    }

    // 8 bytes to 16 floats.
    static __m512 look_up(const Table32& table, __m128i bytes) {
        const __m512i b = _mm512_cvtepu8_epi64(bytes);
        return _mm512_permutexvar_ps(_mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32)), table.entries);
    }

    // The next weights in order, as many as a vector holds.
    static __m512i vector(const Table16& table, const uint8_t* packed) {
        return look_up(table, _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    }
    static __m512 vector(const Table32& table, const uint8_t* packed) {
        return look_up(table, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    }

    // The next two vectors of weights, even and odd elements apart: one code per index, whose upper bits the tables
    // ignore.
    static void unpack(const Table16& table, const uint8_t* packed, __m512i (&w)[2]) {
        const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
        w[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), table.words),
        w[1] = _mm512_permutexvar_epi16(b, table.words);
    }
    static void unpack(const Table32& table, const uint8_t* packed, __m512 (&w)[2]) {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        w[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), table.entries),
        w[1] = _mm512_permutexvar_ps(b, table.entries);
    }

    // The element of a group that stands at i.
    template <int64_t Group>
    static constexpr int64_t element_at(int64_t i) {
        return i < Group / 2 ? 2 * i : 2 * i - Group + 1;
    }

    // The scales of `count` blocks; whether all are plain.
    static bool scales(const rw_weight& weight, int64_t first, int64_t count, float* scales) {
        __mmask16 other = 0;
        for (int64_t i = 0; i < count; i += 16) {
            const __mmask16 some = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1u : 0xffffu);
            const __m512 scale = weight.nested_absmax ? nested_scales(weight, first + i, some)
                                                      : _mm512_maskz_loadu_ps(
                                                            some, static_cast<const float*>(weight.absmax) + first + i);
            const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(scale), _mm512_set1_epi32(0x7fffffff));
            const __m512i above = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(0x0da24260));
            other |= _mm512_mask_cmpge_epu32_mask(some, above, _mm512_set1_epi32(0x7f800000 - 0x0da24260));
            _mm512_mask_storeu_ps(scales + i, some, scale);
        }
        return other == 0;
    }

    static __m512 nested_scales(const rw_weight& weight, int64_t block, __mmask16 some) {
        const __m512i code =
            _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, static_cast<const uint8_t*>(weight.absmax) + block));
        const __m512 value = _mm512_i32gather_ps(code, weight.dynamic_map, 4);
        // 16 blocks lie under one or two second-level scales.
        const int64_t last = block + 31 - __builtin_clz(static_cast<unsigned>(some));
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __mmask16 next = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(static_cast<int>(256 - (block & 255))));
        const __m512 lower = _mm512_set1_ps(weight.nested_absmax[block >> 8]);
        const __m512 scale = _mm512_mask_mov_ps(lower, next, _mm512_set1_ps(weight.nested_absmax[last >> 8]));
        return _mm512_add_ps(_mm512_mul_ps(value, scale), _mm512_set1_ps(*weight.offset));
    }

    template <bool Stream>
    static void store(uint16_t* out, __m512i words) {
        if (Stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), words);
        else _mm512_storeu_si512(out, words);
    }

    template <bool Stream>
    static void store(float* out, __m512 floats) {
        if (Stream) _mm512_stream_ps(out, floats);
        else _mm512_storeu_ps(out, floats);
    }

    template <bool Stream>
    static void expand(const Table16& table, const uint8_t* packed, int64_t bytes, uint16_t* out) {
        int64_t j = 0;
        for (; j + 16 <= bytes; j += 16) store<Stream>(out + 2 * j, vector(table, packed + j));
        if (j < bytes) {
            const int rest = static_cast<int>(bytes - j);
            const __m128i some = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << rest) - 1u), packed + j);
            _mm512_mask_storeu_epi16(out + 2 * j, (1u << 2 * rest) - 1u, look_up(table, some));
        }
    }

    template <bool Stream>
    static void expand(const Table32& table, const uint8_t* packed, int64_t bytes, float* out) {
        int64_t j = 0;
        for (; j + 8 <= bytes; j += 8) store<Stream>(out + 2 * j, vector(table, packed + j));
        if (j < bytes) {
            const int rest = static_cast<int>(bytes - j);
            const __m128i some = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << rest) - 1u), packed + j);
            _mm512_mask_storeu_ps(out + 2 * j, static_cast<__mmask16>((1u << 2 * rest) - 1u), look_up(table, some));
        }
    }

    // A whole block: a multiple of 16 bytes, so without ends to take care of.
    template <bool Stream, class Table, class Out>
    static void expand_block(const Table& table, const uint8_t* packed, int64_t bytes, Out* out) {
        constexpr int step = 32 / sizeof(Out);
        for (int64_t j = 0; j < bytes; j += step) store<Stream>(out + 2 * j, vector(table, packed + j));
    }

    static void fence() { _mm_sfence(); }

    template <int D>
    static __m512 load16(const void* data, int64_t i) {
        if (D == RW_FLOAT32) return _mm512_loadu_ps(static_cast<const float*>(data) + i);
        const __m256i half =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + i));
        if (D == RW_FLOAT16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }

    template <int D>
    static uint32_t absmax_bits(const void* data, int64_t count) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        __m512i most = _mm512_setzero_si512();
        int64_t i = 0;
        for (; i + 16 <= count; i += 16)
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(load16<D>(data, i)), magnitude));
        uint32_t bits = _mm512_reduce_max_epu32(most);
        for (; i < count; ++i) {
            const uint32_t one = bits_of(load_as_float<D>(data, i)) & 0x7fffffffu;
            bits = one > bits ? one : bits;
        }
        return bits;
    }

    struct Bounds {
        __m512 bound;
        __m512i order;
        explicit Bounds(const QuantizeJob& job)
            : bound(_mm512_maskz_loadu_ps(0x7fff, job.bound)),
              order(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(job.order)))) {}
    };

    // The number of bounds below each value, by bisection: 8, 4, 2, 1.
    static __m512i count_below(__m512 v, __m512 bound) {
        const auto bisect = [&](__m512i below, int step) {
            const __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(below, _mm512_set1_epi32(step - 1)), bound);
            return _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(v, middle, _CMP_GT_OQ), below,
                                         _mm512_set1_epi32(step));
        };
        return bisect(bisect(bisect(bisect(_mm512_setzero_si512(), 8), 4), 2), 1);
    }

    template <int D>
    static void encode(const void* data, int64_t count, float inverse, const Bounds& bounds, uint8_t* packed) {
        const __m512 factor = _mm512_set1_ps(inverse);
        for (int64_t i = 0; i < count; i += 16) {
            const __m512i below = count_below(_mm512_mul_ps(load16<D>(data, i), factor), bounds.bound);
            const __m512i code = _mm512_permutexvar_epi32(below, bounds.order);
            const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi64_epi8(pair));
        }
    }

    // out[i] = the sum of the 16 lanes of sum[i * stride], by halving all of them together: 45 instructions where one
    // after the other takes 128.
    static void totals16(const __m512* sum, int64_t stride, float* out) {
        __m512 eight[8], four[4], two[2];
        for (int i = 0; i < 8; ++i) {
            const __m512 a = sum[i * stride], b = sum[(i + 8) * stride];
            eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
        const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                      odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        for (int i = 0; i < 4; ++i) {
            const __m512d a = _mm512_castps_pd(eight[i]), b = _mm512_castps_pd(eight[i + 4]);
            four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_permutex2var_pd(a, even, b)),
                                    _mm512_castpd_ps(_mm512_permutex2var_pd(a, odd, b)));
        }
        for (int i = 0; i < 2; ++i) {
            const __m512d a = _mm512_castps_pd(four[i]), b = _mm512_castps_pd(four[i + 2]);
            two[i] =
                _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
        }
        const __m512 one =
            _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
        _mm512_storeu_ps(out, _mm512_permute_ps(one, 0xd8));
    }

    struct FloatLane {
        using Element = float;
        using Vector = __m512;
        using Sum = __m512;
        static constexpr int width = 16;
        static Sum zero() { return _mm512_setzero_ps(); }
        static Vector load(const float* p) { return _mm512_loadu_ps(p); }
        static Vector load_some(const float* p, int count) {
            return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
        }
        static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
        static Sum multiply_add(Vector a, Vector b, Sum sum) { return _mm512_fmadd_ps(a, b, sum); }
        static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
        static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
        static void totals(const Sum* sum, int64_t stride, float* out) { totals16(sum, stride, out); }
    };

#ifdef __AVX512BF16__
    struct Bfloat16Lane {
        using Element = uint16_t;
        using Vector = __m512i;
        using Sum = __m512;
        static constexpr int width = 32;
        static Sum zero() { return _mm512_setzero_ps(); }
        static Vector load(const uint16_t* p) { return _mm512_loadu_si512(p); }
        static Vector load_some(const uint16_t* p, int count) {
            return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1u), p);
        }
        static void store(uint16_t* p, Vector v) { _mm512_store_si512(p, v); }
        static Sum multiply_add(Vector a, Vector b, Sum sum) {
            return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
        }
        static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
        static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
        static void totals(const Sum* sum, int64_t stride, float* out) { totals16(sum, stride, out); }
    };
#endif
};

}  // namespace rankwise::RW_ISA
