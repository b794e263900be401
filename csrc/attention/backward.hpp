// With P_ij = exp(scale <q_i, k_j> - lse_i) and delta_i = <dO_i, O_i>:
//     dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q
// (Dao, FlashAttention-2, algorithm 2, with queries in the outer loop: heads that share a key head then add to the same
// sums). dK and dV are kept transposed, tiles of (D, 64 keys): P and dS are then right operands as they come.
#pragma once

#include <initializer_list>

#include "attention/forward.hpp"

namespace rankwise::RW_ISA {

struct BackwardTile {
    const Ranges* ranges;
    int64_t D;
    float factor;
    const uint32_t *q, *grad;                // (kTile, D) as pairs
    const uint32_t *q_across, *grad_across;  // (D, kTile) as pairs
    const float *lse, *delta;                // (kTile,); lse in powers of two
    uint32_t *ds, *p_right, *ds_right;       // (kTile, kTile): pairs of keys, and of queries
    float* dq;                               // (kTile, D)
};

struct BackwardKeys {
    const uint32_t *k, *v, *k_right;  // (D / 2, kTile) pairs along D, twice; (kTilePairs, D) pairs of keys
    float *dk, *dv;                   // (D, kTile)
};

// Two rows to a row of pairs of them.
template <int C>
RW_INLINE void store_pairs(uint32_t* to, const __m512 (&even)[C], const __m512 (&odd)[C]) {
    const __m512i in_turn = turns(0, 16);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd[c], even[c]));
        _mm512_storeu_si512(to + 16 * c, _mm512_permutexvar_epi16(in_turn, both));
    }
}

// Zeros where a group of queries sees no key of the tile.
RW_INLINE void clear_pairs(uint32_t* to, int from, int until) {
    for (int64_t pair = 0; pair < kGroup / 2; ++pair)
        for (int c = from; c < until; ++c) _mm512_storeu_si512(to + pair * kTile + 16 * c, _mm512_setzero_si512());
}

template <int C>
static void backward_group(const BackwardTile& tile, const BackwardKeys& keys, int64_t g, int64_t key,
                           Ranges::Span span) {
    const int64_t i = kGroup * g, D = tile.D;
    const __m512 factor = _mm512_set1_ps(tile.factor);
    __m512 p[kGroup][C], s[kGroup][C];
    clear(s);
    multiply<kGroup, C>(tile.q + i * D / 2, D / 2, keys.k + 16 * span.from, kTile, D / 2, s);
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) {
        const __m512 lse = _mm512_set1_ps(tile.lse[i + r]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            p[r][c] = exp2(_mm512_fmsub_ps(s[r][c], factor, lse));
            if (!span.whole)
                p[r][c] = _mm512_maskz_mov_ps(
                    between(tile.ranges->first[i + r], tile.ranges->last[i + r], key + 16 * (span.from + c)), p[r][c]);
        }
    }
    uint32_t* right = tile.p_right + i / 2 * kTile + 16 * span.from;
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; r += 2) store_pairs<C>(right + r / 2 * kTile, p[r], p[r + 1]);
    clear(s);
    multiply<kGroup, C>(tile.grad + i * D / 2, D / 2, keys.v + 16 * span.from, kTile, D / 2, s);
    uint32_t* row = tile.ds + i * kTilePairs;
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) {
        const __m512 delta = _mm512_set1_ps(tile.delta[i + r]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) s[r][c] = _mm512_mul_ps(p[r][c], _mm512_sub_ps(s[r][c], delta));
        store_row<C>(row + r * kTilePairs, s[r]);
    }
    right = tile.ds_right + i / 2 * kTile + 16 * span.from;
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; r += 2) store_pairs<C>(right + r / 2 * kTile, s[r], s[r + 1]);
    accumulate_row(row, kTilePairs, keys.k_right + 8 * span.from * D, D, 8 * C, nullptr, tile.dq + i * D, D, D);
}

// The groups of queries that see some key of each half of a tile: [first, last).
struct Halves {
    int64_t first[2] = {kTile, kTile}, last[2] = {0, 0};

    void add(int64_t g, Ranges::Span span) {
        for (int half = 0; half < 2; ++half) {
            if (span.from >= kVectors / 2 * (half + 1) || span.to <= kVectors / 2 * half) continue;
            first[half] = g < first[half] ? g : first[half];
            last[half] = g + 1;
        }
    }
    bool alike() const { return first[0] == first[1] && last[0] == last[1]; }
};

// out (D, kTile) += a (D, pairs of queries) b (pairs of queries, kTile), without the queries that see nothing of a
// half.
RW_INLINE void add_keys(const uint32_t* a, const uint32_t* b, const Halves& halves, int64_t D, float* out) {
    constexpr int64_t group = kGroup / 2, half = kTile / 2;  // pairs, columns
    if (halves.alike()) {
        const int64_t first = halves.first[0] * group, pairs = halves.last[0] * group - first;
        for (int64_t d = 0; d < D; d += kGroup)
            accumulate<kVectors>(a + d * kTilePairs + first, kTilePairs, b + first * kTile, kTile, pairs, nullptr,
                                 out + d * kTile, kTile);
        return;
    }
    for (int h = 0; h < 2; ++h) {
        const int64_t first = halves.first[h] * group, pairs = halves.last[h] * group - first;
        for (int64_t d = 0; d < D && pairs > 0; d += 2 * kGroup)
            accumulate<kVectors / 2, 2 * kGroup>(a + d * kTilePairs + first, kTilePairs, b + first * kTile + h * half,
                                                 kTile, pairs, nullptr, out + d * kTile + h * half, kTile);
    }
}

[[maybe_unused]] static void backward_tile(const BackwardTile& tile, const BackwardKeys& keys, int64_t key) {
    Halves halves;
    for (int64_t g = 0; g < kTile / kGroup; ++g) {
        const Ranges::Span span = tile.ranges->span(g, key);
        for (uint32_t* to : {tile.p_right, tile.ds_right}) {
            clear_pairs(to + kGroup / 2 * g * kTile, 0, span.from);
            clear_pairs(to + kGroup / 2 * g * kTile, span.to, kVectors);
        }
        halves.add(g, span);
        switch (span.to - span.from) {
            case 1: backward_group<1>(tile, keys, g, key, span); break;
            case 2: backward_group<2>(tile, keys, g, key, span); break;
            case 3: backward_group<3>(tile, keys, g, key, span); break;
            case 4: backward_group<4>(tile, keys, g, key, span); break;
            default: break;
        }
    }
    if (halves.alike() && halves.last[0] == 0) return;
    add_keys(tile.grad_across, tile.p_right, halves, tile.D, keys.dv);
    add_keys(tile.q_across, tile.ds_right, halves, tile.D, keys.dk);
}

// Tiles of keys in the layouts of BackwardKeys.
struct PackedKeys {
    uint32_t *k, *v, *k_right;
    int64_t tile_size;
};

static PackedKeys pack_keys(const AttentionJob& job, const AttentionShare& share, const KeyTiles& tiles) {
    const int64_t D = job.D, size = kTilePairs * D;
    const PackedKeys packed = {scratch<AttentionBackward, uint32_t, 0>(tiles.count() * size),
                               scratch<AttentionBackward, uint32_t, 1>(tiles.count() * size),
                               scratch<AttentionBackward, uint32_t, 2>(tiles.count() * size), size};
    for (int64_t t = 0; t < tiles.count(); ++t) {
        if (!tiles.seen[tiles.first + t]) continue;
        const int64_t key = (tiles.first + t) * kTile, rows = job.Lk - key < kTile ? job.Lk - key : kTile;
        const uint16_t* k = job.k.row(share.b, key, share.head);
        pair_columns(k, job.k.token, rows, D, packed.k + t * size);
        pair_rows(k, job.k.token, rows, D, packed.k_right + t * size);
        pair_columns(job.v.row(share.b, key, share.head), job.v.token, rows, D, packed.v + t * size);
    }
    return packed;
}

// to (D, kTile) as pairs of queries.
static void pack_across(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t D, uint32_t* pairs, uint32_t* to) {
    pair_rows(x, x_stride, rows, D, pairs);
    transpose(pairs, 4 * D, (rows + 1) / 2, D, to, kTilePairs);
}

// delta, and lse in powers of two; +inf where no key is seen makes P zero.
static void row_terms(const AttentionBackward& call, int64_t b, int64_t h, int64_t query, int64_t rows, float* lse,
                      float* delta) {
    const AttentionJob& job = call.job;
    for (int64_t i = 0; i < kTile; ++i) {
        lse[i] = __builtin_inff(), delta[i] = 0.0f;
        if (i >= rows) continue;
        const uint16_t* out = static_cast<const uint16_t*>(call.out) + ((b * job.Lq + query + i) * job.H + h) * job.D;
        const uint16_t* grad = call.grad.row(b, query + i, h);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < job.D; d += 16) sum = _mm512_fmadd_ps(load_floats(out + d), load_floats(grad + d), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
        const float found = call.lse[(b * job.H + h) * job.Lq + query + i];
        lse[i] = found == -__builtin_inff() ? __builtin_inff() : found * 1.44269504f;
    }
}

static int64_t sums_size(const AttentionJob& job) { return (job.Lk + kTile - 1) / kTile * kTile * job.D * 2; }

template <void (*Tile)(const BackwardTile&, const BackwardKeys&, int64_t)>
static void backward(const AttentionBackward& call, const AttentionShare& share, float* sums) {
    const AttentionJob& job = call.job;
    const KeyTiles tiles(job, share);
    const int64_t D = job.D;
    std::memset(sums, 0, static_cast<std::size_t>(4 * sums_size(job)));
    const PackedKeys packed = pack_keys(job, share, tiles);
    auto* q = scratch<AttentionBackward, uint32_t, 3>(packed.tile_size);
    auto* grad = scratch<AttentionBackward, uint32_t, 4>(packed.tile_size);
    auto* q_across = scratch<AttentionBackward, uint32_t, 5>(packed.tile_size);
    auto* grad_across = scratch<AttentionBackward, uint32_t, 6>(packed.tile_size);
    auto* pairs = scratch<AttentionBackward, uint32_t, 7>(packed.tile_size);
    auto* dq = scratch<AttentionBackward, float, 8>(kTile * D);
    alignas(64) uint32_t ds[kTile * kTilePairs], p_right[kTile * kTilePairs], ds_right[kTile * kTilePairs];
    alignas(64) float lse[kTile], delta[kTile];
    const __m512 scale = _mm512_set1_ps(job.scale);
    for (int64_t query = share.first * kTile; query < share.last * kTile; query += kTile) {
        const Ranges* ranges = all_ranges(job, share.b, query);
        const int64_t rows = job.Lq - query < kTile ? job.Lq - query : kTile;
        for (int64_t h = share.head * job.group(); h < (share.head + 1) * job.group(); ++h) {
            const uint16_t *q_rows = job.q.row(share.b, query, h), *grad_rows = call.grad.row(share.b, query, h);
            copy_rows(q_rows, job.q.token, rows, D, q);
            copy_rows(grad_rows, call.grad.token, rows, D, grad);
            pack_across(q_rows, job.q.token, rows, D, pairs, q_across);
            pack_across(grad_rows, call.grad.token, rows, D, pairs, grad_across);
            row_terms(call, share.b, h, query, rows, lse, delta);
            std::memset(dq, 0, static_cast<std::size_t>(rounded_up(rows, kGroup) * D * 4));
            BackwardTile tile = {
                ranges,   D, job.scale * 1.44269504f, q, grad, q_across, grad_across, lse, delta, ds, p_right,
                ds_right, dq};
            for (; tile.ranges < ranges + job.R; ++tile.ranges)
                for (int64_t t = tile.ranges->first_tile(); t < tile.ranges->last_tile(); ++t) {
                    const int64_t at = (t - tiles.first) * packed.tile_size;
                    float* dk = sums + 2 * t * kTile * D;
                    Tile(tile, {packed.k + at, packed.v + at, packed.k_right + at, dk, dk + kTile * D}, t * kTile);
                }
            for (int64_t i = 0; i < rows; ++i) {
                uint16_t* to = static_cast<uint16_t*>(call.dq) + ((share.b * job.Lq + query + i) * job.H + h) * D;
                for (int64_t d = 0; d < D; d += 16)
                    store_rounded(to + d, _mm512_mul_ps(_mm512_loadu_ps(dq + i * D + d), scale));
            }
        }
    }
}

// out rows [key, key + rows) of one key head = scale * sums (D, kTile) transposed.
static void store_keys(const AttentionJob& job, const float* sums, float scale, int64_t rows, uint16_t* out) {
    for (int64_t j = 0; j < rows; j += 16)
        for (int64_t d = 0; d < job.D; d += 16) {
            __m512i block[16];
            for (int r = 0; r < 16; ++r) block[r] = _mm512_loadu_si512(sums + (d + r) * kTile + j);
            transpose(block);
            for (int64_t r = 0; r < 16 && j + r < rows; ++r)
                store_rounded(out + (j + r) * job.Hkv * job.D + d,
                              _mm512_mul_ps(_mm512_castsi512_ps(block[r]), _mm512_set1_ps(scale)));
        }
}

static void finish(const AttentionBackward& call, int64_t b, int64_t head, float* sums, int64_t shares) {
    const AttentionJob& job = call.job;
    const int64_t size = sums_size(job), D = job.D;
    for (int64_t s = 1; s < shares; ++s)
        for (int64_t i = 0; i < size; i += 16)
            _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_loadu_ps(sums + s * size + i)));
    for (int64_t key = 0; key < job.Lk; key += kTile) {
        const int64_t rows = job.Lk - key < kTile ? job.Lk - key : kTile,
                      to = ((b * job.Lk + key) * job.Hkv + head) * D;
        store_keys(job, sums + 2 * key * D, job.scale, rows, static_cast<uint16_t*>(call.dk) + to);
        store_keys(job, sums + (2 * key + kTile) * D, 1.0f, rows, static_cast<uint16_t*>(call.dv) + to);
    }
}

}  // namespace rankwise::RW_ISA
