// y = x W'^T + b for few rows of x on AMX tiles: 16 weight rows are decoded into a left operand in the first-level
// cache, and multiplied with all of x, which is the right operand. Codes are decoded even and odd elements apart, and x
// is packed in the same order.
#pragma once

#include "products/pack.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kGroupElements = 64;
constexpr int64_t kWeightRows = 16;

// 16 rows of 64 weights: 32 even elements of each, then the odd ones.
struct alignas(64) DecodedGroup {
    uint16_t words[2][kWeightRows][32];
};

static void pack_few_rows_amx(const uint16_t* arranged, int64_t T, int64_t K, uint32_t* packed) {
    const int64_t rows = T <= 16 ? 16 : T <= 32 ? 32 : 64;
    for (int64_t group = 0; group < K / kGroupElements; ++group, arranged += T * kGroupElements)
        for (int64_t half = 0; half < 2; ++half)
            for (int64_t t = 0; t < rows; t += 16, packed += kTileWords) {
                __m512i r[16];
                for (int64_t i = 0; i < 16; ++i)
                    r[i] = t + i < T ? _mm512_loadu_si512(arranged + (t + i) * kGroupElements + 32 * half)
                                     : _mm512_setzero_si512();
                transpose(r);
                for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(packed + 16 * i, r[i]);
            }
}

template <bool Plain>
static inline __attribute__((always_inline)) void decode_group(const rw_weight& weight, int64_t K, int64_t n,
                                                               int64_t rows, int64_t group, const float* scales,
                                                               int64_t blocks, DecodedGroup& out) {
    using Isa = Avx512;
    const int64_t block = group * kGroupElements / weight.block_size;
    const uint8_t* packed = weight.packed + (n * K + group * kGroupElements) / 2;
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r, packed += K / 2) {
        __builtin_prefetch(packed + 512);
        const auto table = Isa::template table<RW_BFLOAT16, Plain>(weight.value, scales[r * blocks + block],
                                                                   static_cast<uint16_t*>(nullptr));
        __m512i w[2];
        Isa::unpack(table, packed, w);
        _mm512_store_si512(out.words[0][r], w[0]);
        _mm512_store_si512(out.words[1][r], w[1]);
    }
}

// Sums of the even elements in tiles 0 and 1, of the odd ones in 2 and 3: no product waits for the one before it.
template <int Tiles>
static inline __attribute__((always_inline)) void multiply_group(const DecodedGroup& w, const uint32_t* x) {
    _tile_loadd(4, w.words[0], 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (Tiles > 1) {
        _tile_loadd(7, x + kTileWords, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    x += Tiles * kTileWords;
    _tile_loadd(5, w.words[1], 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (Tiles > 1) {
        _tile_loadd(7, x + kTileWords, 64);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// For 33 to 64 rows of x: four tiles of sums for even and odd elements together.
template <>
inline __attribute__((always_inline)) void multiply_group<4>(const DecodedGroup& w, const uint32_t* x) {
    for (int half = 0; half < 2; ++half, x += 4 * kTileWords) {
        _tile_loadd(4, w.words[half], 64);
        _tile_loadd(5, x, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, x + kTileWords, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, x + 2 * kTileWords, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, x + 3 * kTileWords, 64);
        _tile_dpbf16ps(3, 4, 5);
    }
}

template <int Tiles, bool Plain>
static void multiply_weight_rows(const LinearJob& job, int64_t n, int64_t rows, const float* scales, int64_t blocks) {
    const auto* x = static_cast<const uint32_t*>(job.x);
    const int64_t groups = job.K / kGroupElements;
    DecodedGroup decoded[2];
    if (rows < kWeightRows) std::memset(decoded, 0, sizeof(decoded));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    decode_group<Plain>(*job.weight, job.K, n, rows, 0, scales, blocks, decoded[0]);
    for (int64_t group = 0; group < groups; ++group, x += 2 * Tiles * kTileWords) {
        // The next group is decoded while the tiles multiply this one.
        if (group + 1 < groups)
            decode_group<Plain>(*job.weight, job.K, n, rows, group + 1, scales, blocks, decoded[(group + 1) % 2]);
        multiply_group<Tiles>(decoded[group % 2], x);
    }
}

// Sums of 16 weight rows by 16 rows of x, to y.
static inline void store_few_rows(const LinearJob& job, int64_t n, int64_t rows, int64_t t, const float* sums,
                                  const float* others) {
    const __mmask16 some = first_of_16(rows);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
        __m512 sum = _mm512_load_ps(sums + 16 * i);
        if (others) sum = _mm512_add_ps(sum, _mm512_load_ps(others + 16 * i));
        r[i] = _mm512_castps_si512(sum);
    }
    transpose(r);
    __m512 bias = _mm512_setzero_ps();
    if (job.bias) bias = widened(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(job.bias) + n));
    for (int64_t i = 0; i < 16 && t + i < job.T; ++i) {
        const __m512 value = _mm512_add_ps(_mm512_castsi512_ps(r[i]), bias);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.y) + (t + i) * job.N + n, some,
                                 reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
}

template <int Tiles>
static void few_rows_of(const LinearJob& job, int64_t first, int64_t last) {
    struct Owner {};
    const Amx tiles;
    alignas(64) float sums[4][256];
    const int64_t blocks = job.K / job.weight->block_size;
    float* scales = scratch<Owner, float, 0>(kWeightRows * blocks);
    for (int64_t n = first; n < last; n += kWeightRows) {
        const int64_t rows = last - n < kWeightRows ? last - n : kWeightRows;
        prefetch_scales(*job.weight, (n + rows) * blocks, rows * blocks);
        if (Avx512::scales(*job.weight, n * blocks, rows * blocks, scales)) {
            multiply_weight_rows<Tiles, true>(job, n, rows, scales, blocks);
        } else {
            multiply_weight_rows<Tiles, false>(job, n, rows, scales, blocks);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int64_t tile = 0; tile < Tiles && 16 * tile < job.T; ++tile)
            store_few_rows(job, n, rows, 16 * tile, sums[tile], Tiles < 4 ? sums[tile + 2] : nullptr);
    }
}

static void few_rows_amx(const LinearJob& job, int64_t first, int64_t last) {
    if (job.T <= 16) return few_rows_of<1>(job, first, last);
    if (job.T <= 32) return few_rows_of<2>(job, first, last);
    few_rows_of<4>(job, first, last);
}

}  // namespace rankwise::RW_ISA
