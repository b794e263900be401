// Which keys the queries of a tile, and of a share, see.
#pragma once

#include "attention/kernels.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kTile = kAttentionTile;
constexpr int kGroup = 4;  // queries multiplied at once: with AVX-512, 4 x 4 sums keep both multipliers busy
constexpr int kVectors = kTile / 16;

constexpr int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The keys that the queries of a tile see: of each query, and of each group of kGroup queries.
struct Ranges {
    int64_t first[kTile], last[kTile];
    int64_t group_first[kTile / kGroup], group_last[kTile / kGroup];  // that some query of the group sees
    int64_t all_first[kTile / kGroup], all_last[kTile / kGroup];      // that every one sees
    int64_t least, most;

    Ranges(const AttentionJob& job, int64_t b, int64_t query) {
        least = job.Lk, most = 0;
        for (int64_t g = 0; g < kTile / kGroup; ++g) {
            group_first[g] = job.Lk, group_last[g] = 0, all_first[g] = 0, all_last[g] = job.Lk;
            for (int64_t r = kGroup * g; r < kGroup * (g + 1); ++r) {
                const bool real = query + r < job.Lq;
                first[r] = real ? job.first_key(b, query + r) : 0;
                last[r] = real ? job.last_key(b, query + r) : 0;
                if (first[r] < last[r]) {
                    group_first[g] = first[r] < group_first[g] ? first[r] : group_first[g];
                    group_last[g] = last[r] > group_last[g] ? last[r] : group_last[g];
                }
                all_first[g] = first[r] > all_first[g] ? first[r] : all_first[g];
                all_last[g] = last[r] < all_last[g] ? last[r] : all_last[g];
            }
            least = group_first[g] < least ? group_first[g] : least;
            most = group_last[g] > most ? group_last[g] : most;
        }
    }

    int64_t first_tile() const { return least / kTile; }
    int64_t last_tile() const { return most > least ? (most + kTile - 1) / kTile : first_tile(); }

    // The vectors of 16 keys of the tile from `key` on that group g needs: [from, to).
    struct Span {
        int from, to;
        bool whole;  // every query sees all of them
    };
    Span span(int64_t g, int64_t key) const {
        const int64_t a = group_first[g] > key ? group_first[g] - key : 0;
        const int64_t b = group_last[g] < key + kTile ? group_last[g] - key : kTile;
        if (a >= b) return {0, 0, false};
        const int from = static_cast<int>(a / 16), to = static_cast<int>((b + 15) / 16);
        return {from, to, all_first[g] <= key + 16 * from && all_last[g] >= key + 16 * to};
    }
};

// The keys that the queries of a share see, in whole tiles: [first, last).
struct KeyTiles {
    int64_t first, last;

    KeyTiles(const AttentionJob& job, const AttentionShare& share) {
        int64_t least = job.Lk, most = 0;
        const int64_t end = share.last * kTile < job.Lq ? share.last * kTile : job.Lq;
        for (int64_t i = share.first * kTile; i < end; ++i) {
            const int64_t a = job.first_key(share.b, i), b = job.last_key(share.b, i);
            if (a >= b) continue;
            least = a < least ? a : least;
            most = b > most ? b : most;
        }
        first = least / kTile;
        last = most > least ? (most + kTile - 1) / kTile : first;
    }
    int64_t count() const { return last - first; }
};

}  // namespace rankwise::RW_ISA
