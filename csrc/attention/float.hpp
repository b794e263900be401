// Attention where no instruction multiplies bfloat16: tiles are widened to float32, and P and dS are never rounded. The
// algorithms are those of forward.hpp and backward.hpp. Type: the dtype of all tensors but lse, bfloat16 or float32.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention/ranges.hpp"
#include "common/functions.hpp"
#include "common/multiply_float.hpp"
#include "common/scratch.hpp"

namespace rankwise::RW_ISA {
namespace {

static_assert(kStrip == 16, "a span of keys is counted in vectors of 16");
constexpr float kInfinity = __builtin_inff();

// A tile of keys or values, widened: `rows` (kTile, D), and `across`, per 16 of them a strip (D, 16). Zeros past the
// last one.
struct WideTile {
    float *rows, *across;
};

template <int Type>
using ElementOf = std::conditional_t<Type == RW_FLOAT32, float, uint16_t>;

// to (kTile, D) = `rows` rows of a head from token i on, then zeros.
template <int Type>
void widen(const Heads& x, int64_t b, int64_t i, int64_t head, int64_t rows, int64_t D, float* to) {
    const auto* row = x.row<ElementOf<Type>>(b, i, head);
    for (int64_t r = 0; r < rows; ++r, row += x.token, to += D)
        for (int64_t d = 0; d < D; d += W) store<RW_FLOAT32>(to, d, load<Type>(row, d));
    std::memset(to, 0, static_cast<std::size_t>((kTile - rows) * D * 4));
}

void turn(const float* rows, int64_t D, float* across) {
    for (int64_t key = 0; key < kTile; key += kStrip) transpose_strip(rows + key * D, D, D, across + key * D);
}

// The keys of which a query sees [first, last), as ones among the W from `key` on.
RW_INLINE Ints seen(int64_t first, int64_t last, int64_t key) {
    Ints lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    const Ints at = lane + static_cast<int32_t>(key);
    return (at >= static_cast<int32_t>(first)) & (at < static_cast<int32_t>(last));
}

RW_INLINE float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < W; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// out (kGroup, 16 per vector of the span) = rows (kGroup, D) times the strips of a tile.
__attribute__((noinline)) void multiply_keys(const float* rows, int64_t D, const float* across, Ranges::Span span,
                                             float* out) {
    for (int c = span.from; c < span.to; ++c) {
        Floats sums[kGroup][2] = {};
        multiply_add<kGroup>(rows, D, 1, across + c * kStrip * D, kStrip, D, sums);
        store_sums<kGroup>(sums, out + c * kStrip, kTile);
    }
}

// out (kGroup, D) = factor * out + weights (kGroup, count) times rows (count, D); the weight of row r and element k
// lies at r * row_stride + k * step. Without `factor` it is 1.
__attribute__((noinline)) void add_rows(const float* weights, int64_t row_stride, int64_t step, const float* rows,
                                        int64_t count, int64_t D, const float* factor, float* out) {
    for (int64_t d = 0; d < D; d += kStrip) {
        Floats sums[kGroup][2];
        load_sums<kGroup>(out + d, D, sums);
        if (factor)
            for (int r = 0; r < kGroup; ++r) sums[r][0] *= factor[r], sums[r][1] *= factor[r];
        multiply_add<kGroup>(weights, row_stride, step, rows + d, D, count, sums);
        store_sums<kGroup>(sums, out + d, D);
    }
}

// Replaces rows of scores S by P = e^(scale S - top); returns the factor that rescales the sums so far to the new top.
float weigh(const Ranges& ranges, int64_t i, int64_t key, Ranges::Span span, float scale, float* row, float& top,
            float& sum) {
    const int64_t from = 16 * span.from, to = 16 * span.to;
    Floats most = all(-kInfinity);
    for (int64_t j = from; j < to; j += W) {
        Floats s = load<RW_FLOAT32>(row, j) * scale;
        if (!span.whole) s = seen(ranges.first[i], ranges.last[i], key + j) ? s : all(-kInfinity);
        store<RW_FLOAT32>(row, j, s);
        most = larger(s, most);
    }
    const float found = largest(most), before = top;
    top = found < before ? before : found;
    const float shrink = std::exp(before - top);
    Floats sums = {};
    for (int64_t j = from; j < to; j += W) {
        const Floats p = exp_of(load<RW_FLOAT32>(row, j) - top);
        store<RW_FLOAT32>(row, j, p);
        sums += p;
    }
    sum = sum * shrink + total(sums);
    return shrink;
}

struct ForwardFloats {
    float q[kTile * 256], out[kTile * 256], p[kGroup * kTile], top[kTile], sum[kTile];
};

void forward_tile(const Ranges& ranges, ForwardFloats& tile, const float* across, const float* v, int64_t key,
                  float scale, int64_t D) {
    for (int64_t g = 0; g < kTile / kGroup; ++g) {
        const Ranges::Span span = ranges.span(g, key);
        if (span.from == span.to) continue;
        multiply_keys(tile.q + kGroup * g * D, D, across, span, tile.p);
        float shrink[kGroup];
        for (int64_t r = 0; r < kGroup; ++r) {
            const int64_t i = kGroup * g + r;
            shrink[r] = weigh(ranges, i, key, span, scale, tile.p + r * kTile, tile.top[i], tile.sum[i]);
        }
        const int64_t first = 16 * span.from;
        add_rows(tile.p + first, kTile, 1, v + first * D, 16 * span.to - first, D, shrink, tile.out + kGroup * g * D);
    }
}

template <int Type>
void finish_forward(const AttentionForward& call, const ForwardFloats& tile, int64_t b, int64_t h, int64_t query) {
    const AttentionJob& job = call.job;
    const int64_t rows = job.Lq - query < kTile ? job.Lq - query : kTile, D = job.D;
    for (int64_t i = 0; i < rows; ++i) {
        const bool some = tile.sum[i] > 0.0f;
        const float inverse = some ? 1.0f / tile.sum[i] : 0.0f;
        auto* out = static_cast<ElementOf<Type>*>(call.out) + ((b * job.Lq + query + i) * job.H + h) * D;
        for (int64_t d = 0; d < D; d += W) store<Type>(out, d, load<RW_FLOAT32>(tile.out, i * D + d) * inverse);
        call.lse[(b * job.H + h) * job.Lq + query + i] = some ? std::log(tile.sum[i]) + tile.top[i] : -kInfinity;
    }
}

template <int Type>
void forward_of(const AttentionForward& call, const AttentionShare& share) {
    const AttentionJob& job = call.job;
    const KeyTiles tiles(job, share);
    const int64_t D = job.D, size = kTile * D;
    auto* keys = scratch<AttentionForward, float, 0>((2 * tiles.count() + 1) * size);
    float* wide = keys + 2 * tiles.count() * size;
    for (int64_t t = 0; t < tiles.count(); ++t) {
        if (!tiles.seen[tiles.first + t]) continue;
        const int64_t key = (tiles.first + t) * kTile, rows = job.Lk - key < kTile ? job.Lk - key : kTile;
        widen<Type>(job.k, share.b, key, share.head, rows, D, wide);
        turn(wide, D, keys + 2 * t * size);
        widen<Type>(job.v, share.b, key, share.head, rows, D, keys + (2 * t + 1) * size);
    }
    ForwardFloats& tile = *scratch<AttentionForward, ForwardFloats, 1>(1);
    for (int64_t query = share.first * kTile; query < share.last * kTile; query += kTile) {
        const Ranges* all = all_ranges(job, share.b, query);
        const int64_t rows = job.Lq - query < kTile ? job.Lq - query : kTile;
        for (int64_t h = share.head * job.group(); h < (share.head + 1) * job.group(); ++h) {
            widen<Type>(job.q, share.b, query, h, rows, D, tile.q);
            std::memset(tile.out, 0, static_cast<std::size_t>(size * 4));
            std::memset(tile.sum, 0, sizeof tile.sum);
            for (float& one : tile.top) one = -1e30f;  // finite, so that a query that has seen no key yet makes no NaN
            for (int64_t range = 0; range < job.R; ++range)
                for (int64_t t = all[range].first_tile(); t < all[range].last_tile(); ++t) {
                    const float* across = keys + 2 * (t - tiles.first) * size;
                    forward_tile(all[range], tile, across, across + size, t * kTile, job.scale, D);
                }
            finish_forward<Type>(call, tile, share.b, h, query);
        }
    }
}

void forward_float(const AttentionForward& call, const AttentionShare& share) {
    call.job.dtype == RW_FLOAT32 ? forward_of<RW_FLOAT32>(call, share) : forward_of<RW_BFLOAT16>(call, share);
}

struct BackwardFloats {
    float q[kTile * 256], grad[kTile * 256], dq[kTile * 256], p[kTile * kTile], ds[kTile * kTile], lse[kTile],
        delta[kTile];
};

struct BackwardKeyTile {
    const float *k, *k_across, *v_across;  // (kTile, D), and strips (D, 16) of 16 keys
    float *dk, *dv;                        // (kTile, D)
};

// +inf where no key is seen makes P zero.
template <int Type>
void row_terms(const AttentionBackward& call, int64_t b, int64_t h, int64_t query, int64_t rows, BackwardFloats& tile) {
    const AttentionJob& job = call.job;
    for (int64_t i = 0; i < kTile; ++i) {
        tile.lse[i] = kInfinity, tile.delta[i] = 0.0f;
        if (i >= rows) continue;
        const auto* out =
            static_cast<const ElementOf<Type>*>(call.out) + ((b * job.Lq + query + i) * job.H + h) * job.D;
        Floats sum = {};
        for (int64_t d = 0; d < job.D; d += W)
            sum = madd(load<Type>(out, d), load<RW_FLOAT32>(tile.grad, i * job.D + d), sum);
        tile.delta[i] = total(sum);
        const float found = call.lse[(b * job.H + h) * job.Lq + query + i];
        tile.lse[i] = found == -kInfinity ? kInfinity : found;
    }
}

// P and dS of a group of queries; zeros where it sees no key of the tile.
void backward_group(const Ranges& ranges, BackwardFloats& tile, const BackwardKeyTile& keys, int64_t g, int64_t key,
                    Ranges::Span span, float scale, int64_t D) {
    const int64_t i = kGroup * g;
    float *p = tile.p + i * kTile, *ds = tile.ds + i * kTile;
    multiply_keys(tile.q + i * D, D, keys.k_across, span, p);
    multiply_keys(tile.grad + i * D, D, keys.v_across, span, ds);
    for (int64_t r = 0; r < kGroup; ++r, p += kTile, ds += kTile)
        for (int64_t j = 0; j < kTile; j += W) {
            Floats weight = {}, change = {};
            if (j >= 16 * span.from && j < 16 * span.to) {
                weight = exp_of(load<RW_FLOAT32>(p, j) * scale - tile.lse[i + r]);
                if (!span.whole) weight = seen(ranges.first[i + r], ranges.last[i + r], key + j) ? weight : Floats{};
                change = weight * (load<RW_FLOAT32>(ds, j) - tile.delta[i + r]);
            }
            store<RW_FLOAT32>(p, j, weight);
            store<RW_FLOAT32>(ds, j, change);
        }
    const int64_t first = 16 * span.from;
    add_rows(tile.ds + i * kTile + first, kTile, 1, keys.k + first * D, 16 * span.to - first, D, nullptr,
             tile.dq + i * D);
}

void backward_tile(const Ranges& ranges, BackwardFloats& tile, const BackwardKeyTile& keys, int64_t key, float scale,
                   int64_t D) {
    // Per vector of 16 keys, the groups of queries that see some of them: [first, last).
    int64_t first[kVectors], last[kVectors];
    for (int v = 0; v < kVectors; ++v) first[v] = kTile, last[v] = 0;
    for (int64_t g = 0; g < kTile / kGroup; ++g) {
        const Ranges::Span span = ranges.span(g, key);
        if (span.from == span.to) {
            std::memset(tile.p + kGroup * g * kTile, 0, kGroup * kTile * 4);
            std::memset(tile.ds + kGroup * g * kTile, 0, kGroup * kTile * 4);
            continue;
        }
        for (int v = span.from; v < span.to; ++v) first[v] = g < first[v] ? g : first[v], last[v] = g + 1;
        backward_group(ranges, tile, keys, g, key, span, scale, D);
    }
    for (int64_t j = 0; j < kTile; j += kGroup) {
        const int64_t from = kGroup * first[j / 16], count = kGroup * last[j / 16] - from;
        if (count <= 0) continue;
        add_rows(tile.p + from * kTile + j, 1, kTile, tile.grad + from * D, count, D, nullptr, keys.dv + j * D);
        add_rows(tile.ds + from * kTile + j, 1, kTile, tile.q + from * D, count, D, nullptr, keys.dk + j * D);
    }
}

int64_t sums_size_float(const AttentionJob& job) { return rounded_up(job.Lk, kTile) * job.D * 2; }

template <int Type>
void backward_of(const AttentionBackward& call, const AttentionShare& share, float* sums) {
    const AttentionJob& job = call.job;
    const KeyTiles tiles(job, share);
    const int64_t D = job.D, size = kTile * D;
    std::memset(sums, 0, static_cast<std::size_t>(4 * sums_size_float(job)));
    auto* packed = scratch<AttentionBackward, float, 0>((3 * tiles.count() + 1) * size);
    float* wide = packed + 3 * tiles.count() * size;
    for (int64_t t = 0; t < tiles.count(); ++t) {
        if (!tiles.seen[tiles.first + t]) continue;
        const int64_t key = (tiles.first + t) * kTile, rows = job.Lk - key < kTile ? job.Lk - key : kTile;
        float* k = packed + 3 * t * size;
        widen<Type>(job.k, share.b, key, share.head, rows, D, k);
        turn(k, D, k + size);
        widen<Type>(job.v, share.b, key, share.head, rows, D, wide);
        turn(wide, D, k + 2 * size);
    }
    BackwardFloats& tile = *scratch<AttentionBackward, BackwardFloats, 1>(1);
    for (int64_t query = share.first * kTile; query < share.last * kTile; query += kTile) {
        const Ranges* all = all_ranges(job, share.b, query);
        const int64_t rows = job.Lq - query < kTile ? job.Lq - query : kTile;
        for (int64_t h = share.head * job.group(); h < (share.head + 1) * job.group(); ++h) {
            widen<Type>(job.q, share.b, query, h, rows, D, tile.q);
            widen<Type>(call.grad, share.b, query, h, rows, D, tile.grad);
            row_terms<Type>(call, share.b, h, query, rows, tile);
            std::memset(tile.dq, 0, static_cast<std::size_t>(size * 4));
            for (int64_t range = 0; range < job.R; ++range)
                for (int64_t t = all[range].first_tile(); t < all[range].last_tile(); ++t) {
                    const float* k = packed + 3 * (t - tiles.first) * size;
                    float* dk = sums + 2 * t * size;
                    const BackwardKeyTile keys = {k, k + size, k + 2 * size, dk, dk + size};
                    backward_tile(all[range], tile, keys, t * kTile, job.scale, D);
                }
            for (int64_t i = 0; i < rows; ++i) {
                auto* to = static_cast<ElementOf<Type>*>(call.dq) + ((share.b * job.Lq + query + i) * job.H + h) * D;
                for (int64_t d = 0; d < D; d += W) store<Type>(to, d, load<RW_FLOAT32>(tile.dq, i * D + d) * job.scale);
            }
        }
    }
}

void backward_float(const AttentionBackward& call, const AttentionShare& share, float* sums) {
    call.job.dtype == RW_FLOAT32 ? backward_of<RW_FLOAT32>(call, share, sums)
                                 : backward_of<RW_BFLOAT16>(call, share, sums);
}

template <int Type>
void finish_of(const AttentionBackward& call, int64_t b, int64_t head, float* sums, int64_t shares) {
    const AttentionJob& job = call.job;
    const int64_t size = sums_size_float(job), D = job.D;
    for (int64_t s = 1; s < shares; ++s)
        for (int64_t i = 0; i < size; i += W)
            store<RW_FLOAT32>(sums, i, load<RW_FLOAT32>(sums, i) + load<RW_FLOAT32>(sums, s * size + i));
    for (int64_t key = 0; key < job.Lk; ++key) {
        const int64_t at = 2 * (key / kTile) * kTile * D + key % kTile * D,
                      to = ((b * job.Lk + key) * job.Hkv + head) * D;
        for (int64_t d = 0; d < D; d += W) {
            store<Type>(call.dk, to + d, load<RW_FLOAT32>(sums, at + d) * job.scale);
            store<Type>(call.dv, to + d, load<RW_FLOAT32>(sums, at + kTile * D + d));
        }
    }
}

void finish_float(const AttentionBackward& call, int64_t b, int64_t head, float* sums, int64_t shares) {
    call.job.dtype == RW_FLOAT32 ? finish_of<RW_FLOAT32>(call, b, head, sums, shares)
                                 : finish_of<RW_BFLOAT16>(call, b, head, sums, shares);
}

}  // namespace
}  // namespace rankwise::RW_ISA
