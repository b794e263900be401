// out_i = sum_j softmax_j(scale <q_i, k_j>) v_j, a tile of keys at a time (Dao, FlashAttention-2, algorithm 1).
#pragma once

#include "attention/tile.hpp"
#include "common/scratch.hpp"

namespace rankwise::RW_ISA {

struct ForwardTile {
    const Ranges* ranges;
    int64_t D;
    float factor;       // scale / ln 2: powers of two are cheaper than of e
    const uint32_t* q;  // (kTile, D) as pairs
    uint32_t* p;        // (kTile, kTile) as pairs
    float* out;         // (kTile, D), sum_j 2^(s_ij - top_i) v_j
    float* top;         // (kTile,), max_j s_ij
    float* sum;         // (kTile, 16), parts of sum_j 2^(s_ij - top_i)
};

// Weights of 4 queries and 16 C keys: P = 2^(S - top), and the factor that rescales the sums so far to the new top.
template <int C>
RW_INLINE void weigh(const ForwardTile& tile, int64_t g, int64_t key, bool whole, __m512 (&s)[kGroup][C],
                     __m512 (&shrink)[kGroup]) {
    const __m512 factor = _mm512_set1_ps(tile.factor);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) {
        const int64_t i = kGroup * g + r;
        if (!whole)
            for (int c = 0; c < C; ++c)
                s[r][c] =
                    _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()),
                                       between(tile.ranges->first[i], tile.ranges->last[i], key + 16 * c), s[r][c]);
        __m512 most = s[r][0];
        for (int c = 1; c < C; ++c) most = _mm512_max_ps(most, s[r][c]);
        const float found = _mm512_reduce_max_ps(most) * tile.factor, before = tile.top[i],
                    top = found < before ? before : found;
        const __m512 offset = _mm512_set1_ps(top);
        shrink[r] = exp2(_mm512_sub_ps(_mm512_set1_ps(before), offset));
        tile.top[i] = top;
        __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(tile.sum + 16 * i), shrink[r]);
        for (int c = 0; c < C; ++c) {
            s[r][c] = exp2(_mm512_fmsub_ps(s[r][c], factor, offset));
            sum = _mm512_add_ps(sum, s[r][c]);
        }
        _mm512_storeu_ps(tile.sum + 16 * i, sum);
    }
}

// Rows of P or dS to bfloat16, as pairs of neighbours.
template <int C>
RW_INLINE void store_row(uint32_t* to, const __m512 (&x)[C]) {
#pragma GCC unroll 8
    for (int c = 0; c + 1 < C; c += 2)
        _mm512_storeu_si512(to + 8 * c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[c + 1], x[c])));
    if (C % 2) store_rounded(reinterpret_cast<uint16_t*>(to + 8 * (C - 1)), x[C - 1]);
}

template <int C>
static void forward_group(const ForwardTile& tile, int64_t g, int64_t key, Ranges::Span span, const uint32_t* k,
                          const uint32_t* v) {
    const int64_t i = kGroup * g, D = tile.D;
    __m512 s[kGroup][C], shrink[kGroup];
    clear(s);
    multiply<kGroup, C>(tile.q + i * D / 2, D / 2, k + 16 * span.from, kTile, D / 2, s);
    weigh<C>(tile, g, key + 16 * span.from, span.whole, s, shrink);
    uint32_t* p = tile.p + i * kTilePairs;
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) store_row<C>(p + r * kTilePairs, s[r]);
    accumulate_row(p, kTilePairs, v + 8 * span.from * D, D, 8 * C, shrink, tile.out + i * D, D, D);
}

[[maybe_unused]] static void forward_tile(const ForwardTile& tile, int64_t key, const uint32_t* k, const uint32_t* v) {
    for (int64_t g = 0; g < kTile / kGroup; ++g) {
        const Ranges::Span span = tile.ranges->span(g, key);
        switch (span.to - span.from) {
            case 1: forward_group<1>(tile, g, key, span, k, v); break;
            case 2: forward_group<2>(tile, g, key, span, k, v); break;
            case 3: forward_group<3>(tile, g, key, span, k, v); break;
            case 4: forward_group<4>(tile, g, key, span, k, v); break;
            default: break;
        }
    }
}

// out = O / sum, lse = ln(sum) + top ln 2; zero and -inf where no key is seen.
static void finish_forward(const AttentionForward& call, const ForwardTile& tile, int64_t b, int64_t h, int64_t query) {
    const AttentionJob& job = call.job;
    const int64_t rows = job.Lq - query < kTile ? job.Lq - query : kTile, D = job.D;
    alignas(64) float total[kTile];
    for (int64_t i = 0; i < rounded_up(rows, 16); ++i)
        total[i] = _mm512_reduce_add_ps(_mm512_loadu_ps(tile.sum + 16 * i));
    for (int64_t i = 0; i < rows; ++i) {
        const __m512 inverse = _mm512_set1_ps(total[i] > 0.0f ? 1.0f / total[i] : 0.0f);
        uint16_t* out = static_cast<uint16_t*>(call.out) + ((b * job.Lq + query + i) * job.H + h) * D;
        for (int64_t d = 0; d < D; d += 16)
            store_rounded(out + d, _mm512_mul_ps(_mm512_loadu_ps(tile.out + i * D + d), inverse));
    }
    for (int64_t i = 0; i < rows; i += 16) {
        const __mmask16 some = between(0, rows, i);
        const __m512 lse = _mm512_add_ps(log2(_mm512_load_ps(total + i)), _mm512_loadu_ps(tile.top + i));
        _mm512_mask_storeu_ps(call.lse + (b * job.H + h) * job.Lq + query + i, some,
                              _mm512_mul_ps(lse, _mm512_set1_ps(0.693147181f)));
    }
}

// `Tile` adds what a tile of keys gives to a tile of queries.
template <void (*Tile)(const ForwardTile&, int64_t, const uint32_t*, const uint32_t*)>
static void forward(const AttentionForward& call, const AttentionShare& share) {
    const AttentionJob& job = call.job;
    const KeyTiles tiles(job, share);
    const int64_t D = job.D, tile_size = kTilePairs * D;
    auto* k = scratch<AttentionForward, uint32_t, 0>(tiles.count() * tile_size);
    auto* v = scratch<AttentionForward, uint32_t, 1>(tiles.count() * tile_size);
    for (int64_t t = 0; t < tiles.count(); ++t) {
        if (!tiles.seen[tiles.first + t]) continue;
        const int64_t key = (tiles.first + t) * kTile, rows = job.Lk - key < kTile ? job.Lk - key : kTile;
        pair_columns(job.k.row(share.b, key, share.head), job.k.token, rows, D, k + t * tile_size);
        pair_rows(job.v.row(share.b, key, share.head), job.v.token, rows, D, v + t * tile_size);
    }
    auto* q = scratch<AttentionForward, uint32_t, 2>(tile_size);
    auto* out = scratch<AttentionForward, float, 3>(kTile * D);
    alignas(64) uint32_t p[kTile * kTilePairs];
    alignas(64) float top[kTile], sum[kTile * 16];
    for (int64_t query = share.first * kTile; query < share.last * kTile; query += kTile) {
        const Ranges* ranges = all_ranges(job, share.b, query);
        const int64_t rows = job.Lq - query < kTile ? job.Lq - query : kTile;
        for (int64_t h = share.head * job.group(); h < (share.head + 1) * job.group(); ++h) {
            copy_rows(job.q.row(share.b, query, h), job.q.token, rows, D, q);
            std::memset(out, 0, static_cast<std::size_t>(rounded_up(rows, kGroup) * D * 4));
            std::memset(sum, 0, sizeof sum);
            for (float& one : top) one = -1e30f;  // finite, so that a query that has seen no key yet makes no NaN
            ForwardTile tile = {ranges, D, job.scale * 1.44269504f, q, p, out, top, sum};
            for (; tile.ranges < ranges + job.R; ++tile.ranges)
                for (int64_t t = tile.ranges->first_tile(); t < tile.ranges->last_tile(); ++t)
                    Tile(tile, t * kTile, k + (t - tiles.first) * tile_size, v + (t - tiles.first) * tile_size);
            finish_forward(call, tile, share.b, h, query);
        }
    }
}

}  // namespace rankwise::RW_ISA
