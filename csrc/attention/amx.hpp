// Attention's products on AMX tiles, for heads whose size is a multiple of 32; packing, weights and sums are those of
// AVX-512.
//
// tdpbf16ps multiplies 16 rows of 16 pairs by 16 rows of pairs of 16 columns: the layouts are those of vdpbf16ps, so a
// block is four groups of queries. Weights of keys that a query does not see are stored as zeros, since whole tiles are
// multiplied.
#pragma once

#include "attention/backward.hpp"
#include "common/amx.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kBlock = 16;  // rows, pairs and columns of a hardware tile
constexpr int64_t kBlockGroups = kBlock / kGroup;

// out (16, 16 columns) = or += a (16, pairs) b (pairs, 16 columns); columns 1 to 4, pairs a multiple of 16; strides in
// elements.
template <bool Add>
RW_INLINE void multiply_block(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs,
                              float* out, int64_t out_stride, int columns) {
    if (Add) {
        _tile_loadd(0, out, 4 * out_stride);
        if (columns > 1) _tile_loadd(1, out + 16, 4 * out_stride);
        if (columns > 2) _tile_loadd(2, out + 32, 4 * out_stride);
        if (columns > 3) _tile_loadd(3, out + 48, 4 * out_stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = 0; p < pairs; p += kBlock) {
        const uint32_t* row = b + p * b_stride;
        _tile_loadd(4, a + p, 4 * a_stride);
        _tile_loadd(5, row, 4 * b_stride);
        _tile_dpbf16ps(0, 4, 5);
        if (columns > 1) {
            _tile_loadd(6, row + 16, 4 * b_stride);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (columns > 2) {
            _tile_loadd(7, row + 32, 4 * b_stride);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (columns > 3) {
            _tile_loadd(5, row + 48, 4 * b_stride);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, out, 4 * out_stride);
    if (columns > 1) _tile_stored(1, out + 16, 4 * out_stride);
    if (columns > 2) _tile_stored(2, out + 32, 4 * out_stride);
    if (columns > 3) _tile_stored(3, out + 48, 4 * out_stride);
}

// out (16, columns) += a (16, pairs) b (pairs, columns), columns a multiple of 16.
RW_INLINE void add_block(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs,
                         float* out, int64_t out_stride, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 64)
        multiply_block<true>(a, a_stride, b + c, b_stride, pairs, out + c, out_stride,
                             columns - c < 64 ? static_cast<int>((columns - c) / 16) : 4);
}

// The spans of a block's groups, and the vectors of keys that some of them sees: [from, to); [first, last) in whole
// tiles of 32 keys.
struct BlockSpans {
    Ranges::Span of[kBlockGroups];
    int from = kVectors, to = 0, first = 0, last = 0;

    BlockSpans(const Ranges& ranges, int64_t block, int64_t key) {
        for (int64_t n = 0; n < kBlockGroups; ++n) {
            of[n] = ranges.span(kBlockGroups * block + n, key);
            if (of[n].from == of[n].to) continue;
            from = of[n].from < from ? of[n].from : from;
            to = of[n].to > to ? of[n].to : to;
        }
        first = from / 2 * 2, last = (to + 1) / 2 * 2;
    }
    bool empty() const { return from >= to; }
    int64_t pairs() const { return 8 * (last - first); }
};

template <int C>
RW_INLINE void load_group(const float* from, __m512 (&s)[kGroup][C]) {
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) s[r][c] = _mm512_loadu_ps(from + r * kTile + 16 * c);
}

// Zeros in four rows of weights, in the vectors [from, to).
RW_INLINE void clear_rows(uint32_t* rows, int from, int to) {
    for (int r = 0; r < kGroup; ++r)
        for (int c = from; c < to; ++c)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + r * kTilePairs + 8 * c), _mm256_setzero_si256());
}

template <int C>
static void weigh_group(const ForwardTile& tile, int64_t g, int64_t key, Ranges::Span span, const float* scores) {
    __m512 s[kGroup][C], shrink[kGroup];
    load_group<C>(scores + 16 * span.from, s);
    weigh<C>(tile, g, key + 16 * span.from, span.whole, s, shrink);
    for (int r = 0; r < kGroup; ++r) {
        const int64_t i = kGroup * g + r;
        store_row<C>(tile.p + i * kTilePairs + 8 * span.from, s[r]);
        float* out = tile.out + i * tile.D;
        for (int64_t d = 0; d < tile.D; d += 16)
            _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), shrink[r]));
    }
}

static void forward_tile_amx(const ForwardTile& tile, int64_t key, const uint32_t* k, const uint32_t* v) {
    alignas(64) float scores[kBlock * kTile];
    const int64_t D = tile.D;
    for (int64_t block = 0; block < kTile / kBlock; ++block) {
        const BlockSpans spans(*tile.ranges, block, key);
        if (spans.empty()) continue;
        const int64_t i = kBlock * block;
        multiply_block<false>(tile.q + i * D / 2, D / 2, k + 16 * spans.from, kTile, D / 2, scores + 16 * spans.from,
                              kTile, spans.to - spans.from);
        for (int64_t n = 0; n < kBlockGroups; ++n) {
            const int64_t g = kBlockGroups * block + n;
            const Ranges::Span span = spans.of[n];
            uint32_t* p = tile.p + kGroup * g * kTilePairs;
            const bool none = span.from == span.to;
            clear_rows(p, spans.first, none ? spans.last : span.from);
            if (!none) clear_rows(p, span.to, spans.last);
            const float* own = scores + kGroup * n * kTile;
            switch (span.to - span.from) {
                case 1: weigh_group<1>(tile, g, key, span, own); break;
                case 2: weigh_group<2>(tile, g, key, span, own); break;
                case 3: weigh_group<3>(tile, g, key, span, own); break;
                case 4: weigh_group<4>(tile, g, key, span, own); break;
                default: break;
            }
        }
        add_block(tile.p + i * kTilePairs + 8 * spans.first, kTilePairs, v + 8 * spans.first * D, D, spans.pairs(),
                  tile.out + i * D, D, D);
    }
}

template <int C>
static void differentiate_group(const BackwardTile& tile, int64_t g, int64_t key, Ranges::Span span,
                                const float* scores, const float* grads) {
    const int64_t i = kGroup * g;
    const __m512 factor = _mm512_set1_ps(tile.factor);
    __m512 p[kGroup][C], s[kGroup][C];
    load_group<C>(scores + 16 * span.from, p);
    load_group<C>(grads + 16 * span.from, s);
    for (int r = 0; r < kGroup; ++r) {
        const __m512 lse = _mm512_set1_ps(tile.lse[i + r]), delta = _mm512_set1_ps(tile.delta[i + r]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            p[r][c] = exp2(_mm512_fmsub_ps(p[r][c], factor, lse));
            if (!span.whole)
                p[r][c] = _mm512_maskz_mov_ps(
                    between(tile.ranges->first[i + r], tile.ranges->last[i + r], key + 16 * (span.from + c)), p[r][c]);
            s[r][c] = _mm512_mul_ps(p[r][c], _mm512_sub_ps(s[r][c], delta));
        }
        store_row<C>(tile.ds + (i + r) * kTilePairs + 8 * span.from, s[r]);
    }
    for (int r = 0; r < kGroup; r += 2) {
        const int64_t at = (i + r) / 2 * kTile + 16 * span.from;
        store_pairs<C>(tile.p_right + at, p[r], p[r + 1]);
        store_pairs<C>(tile.ds_right + at, s[r], s[r + 1]);
    }
}

static void backward_tile_amx(const BackwardTile& tile, const BackwardKeys& keys, int64_t key) {
    alignas(64) float scores[kBlock * kTile], grads[kBlock * kTile];
    const int64_t D = tile.D;
    int64_t first_block = kTile / kBlock, last_block = 0;
    for (int64_t block = 0; block < kTile / kBlock; ++block) {
        const BlockSpans spans(*tile.ranges, block, key);
        const int64_t i = kBlock * block;
        for (int64_t n = 0; n < kBlockGroups; ++n)
            for (uint32_t* to : {tile.p_right, tile.ds_right}) {
                uint32_t* rows = to + (i + kGroup * n) / 2 * kTile;
                clear_pairs(rows, 0, spans.of[n].from == spans.of[n].to ? kVectors : spans.of[n].from);
                clear_pairs(rows, spans.of[n].to, kVectors);
            }
        if (spans.empty()) continue;
        first_block = block < first_block ? block : first_block;
        last_block = block + 1;
        const int columns = spans.to - spans.from;
        multiply_block<false>(tile.q + i * D / 2, D / 2, keys.k + 16 * spans.from, kTile, D / 2,
                              scores + 16 * spans.from, kTile, columns);
        multiply_block<false>(tile.grad + i * D / 2, D / 2, keys.v + 16 * spans.from, kTile, D / 2,
                              grads + 16 * spans.from, kTile, columns);
        for (int64_t n = 0; n < kBlockGroups; ++n) {
            const int64_t g = kBlockGroups * block + n, at = kGroup * n * kTile;
            const Ranges::Span span = spans.of[n];
            uint32_t* ds = tile.ds + kGroup * g * kTilePairs;
            const bool none = span.from == span.to;
            clear_rows(ds, spans.first, none ? spans.last : span.from);
            if (!none) clear_rows(ds, span.to, spans.last);
            switch (span.to - span.from) {
                case 1: differentiate_group<1>(tile, g, key, span, scores + at, grads + at); break;
                case 2: differentiate_group<2>(tile, g, key, span, scores + at, grads + at); break;
                case 3: differentiate_group<3>(tile, g, key, span, scores + at, grads + at); break;
                case 4: differentiate_group<4>(tile, g, key, span, scores + at, grads + at); break;
                default: break;
            }
        }
        add_block(tile.ds + i * kTilePairs + 8 * spans.first, kTilePairs, keys.k_right + 8 * spans.first * D, D,
                  spans.pairs(), tile.dq + i * D, D, D);
    }
    if (first_block >= last_block) return;
    // Queries in whole tiles of 32: two blocks.
    const int64_t from = first_block / 2 * kBlock, pairs = (last_block + 1) / 2 * kBlock - from;
    for (int64_t d = 0; d < D; d += kBlock) {
        add_block(tile.grad_across + d * kTilePairs + from, kTilePairs, tile.p_right + from * kTile, kTile, pairs,
                  keys.dv + d * kTile, kTile, kTile);
        add_block(tile.q_across + d * kTilePairs + from, kTilePairs, tile.ds_right + from * kTile, kTile, pairs,
                  keys.dk + d * kTile, kTile, kTile);
    }
}

}  // namespace rankwise::RW_ISA
