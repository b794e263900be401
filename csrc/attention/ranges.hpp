// Which keys the queries of a tile, and of a share, see.
#pragma once

#include <cstring>

#include "attention/kernels.hpp"
#include "common/scratch.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kTile = kAttentionTile;
constexpr int kGroup = 4;  // queries multiplied at once: with AVX-512, 4 x 4 sums keep both multipliers busy
constexpr int kVectors = kTile / 16;

constexpr int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The keys that the queries of a tile see in one of their ranges: of each query, and of each group of kGroup queries.
struct Ranges {
    int64_t first[kTile], last[kTile];
    int64_t group_first[kTile / kGroup], group_last[kTile / kGroup];  // that some query of the group sees
    int64_t all_first[kTile / kGroup], all_last[kTile / kGroup];      // that every one sees
    int64_t least, most;

    Ranges(const AttentionJob& job, int64_t b, int64_t range, int64_t query) {
        least = job.Lk, most = 0;
        for (int64_t g = 0; g < kTile / kGroup; ++g) {
            group_first[g] = job.Lk, group_last[g] = 0, all_first[g] = 0, all_last[g] = job.Lk;
            for (int64_t r = kGroup * g; r < kGroup * (g + 1); ++r) {
                const bool real = query + r < job.Lq;
                first[r] = real ? job.first_key(b, range, query + r) : 0;
                last[r] = real ? job.last_key(b, range, query + r) : 0;
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

// The R ranges of a tile of queries.
static Ranges* all_ranges(const AttentionJob& job, int64_t b, int64_t query) {
    auto* found = scratch<Ranges, Ranges, 0>(job.R);
    for (int64_t r = 0; r < job.R; ++r) found[r] = Ranges(job, b, r, query);
    return found;
}

// The keys that the queries of a share see, in whole tiles: some of [first, last).
struct KeyTiles {
    int64_t first = 0, last = 0;
    uint8_t* seen;  // whether any query sees a key of tile t

    KeyTiles(const AttentionJob& job, const AttentionShare& share) {
        const int64_t all = (job.Lk + kTile - 1) / kTile;
        seen = scratch<KeyTiles, uint8_t, 0>(all);
        std::memset(seen, 0, static_cast<std::size_t>(all));
        for (int64_t tile = share.first; tile < share.last; ++tile)
            for (int64_t r = 0; r < job.R; ++r) {
                const Ranges ranges(job, share.b, r, tile * kTile);
                for (int64_t t = ranges.first_tile(); t < ranges.last_tile(); ++t) seen[t] = 1;
            }
        for (int64_t t = all; t-- > 0;)
            if (seen[t]) first = t, last = last ? last : t + 1;
    }
    int64_t count() const { return last - first; }
};

}  // namespace rankwise::RW_ISA
