// y = x W'^T + b for few rows of x: pieces of a few weight rows are decoded into the first-level cache and multiplied
// with the same piece of every row of x while both are there.
#pragma once

#include "common/scratch.hpp"
#include "four_bit/decode.hpp"
#include "four_bit/tile.hpp"

namespace rankwise::RW_ISA {

constexpr int kOpenRows = 16;  // weight rows whose sums are open at once

// What one thread works with: a piece of kRows decoded rows, their scales, the open sums of kOpenRows rows.
template <class Lane>
struct Workspace {
    typename Lane::Element* w;
    float* scales;
    typename Lane::Sum* sums;
    int64_t
        ahead;  // bytes from these codes to those needed next, which the hardware's own prefetching does not foresee
};

// Decodes `count` elements of R rows from n and k on, in the order of x, and multiplies them with the first C
// rows of x on the way.
template <class Isa, class Lane, int D, int R, int C, bool Plain>
static void decode_and_multiply(const LinearJob& job, const typename Lane::Element* x, int64_t n, int64_t k,
                                int64_t count, const Workspace<Lane>& space, typename Lane::Sum* sums) {
    using Element = typename Lane::Element;
    constexpr int64_t group = group_size<Isa, Lane, D>();
    const rw_weight& weight = *job.weight;
    const int64_t row_bytes = job.K / 2;
    const uint8_t* packed = weight.packed + (n * job.K + k) / 2;
    // Blocks and pieces are powers of two: a piece holds whole blocks or lies in one.
    const int64_t step = weight.block_size < count ? weight.block_size : count, blocks = count / step;
    typename Lane::Sum sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = sums[r * job.T + c];
    for (int64_t block = 0, done = 0; block < blocks; ++block) {
        TableOf<Isa, Lane, D, Plain> tables[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            tables[r] = Isa::template table<D, Plain>(weight.value, space.scales[r * blocks + block],
                                                      static_cast<Element*>(nullptr));
        for (const int64_t end = done + step; done < end; done += group, packed += group / 2) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) __builtin_prefetch(packed + r * row_bytes + space.ahead, 0, 2);
            multiply_group<Isa, Lane, R, C>(tables, packed, row_bytes, x + done, count, sum, space.w + done, count);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r * job.T + c] = sum[r][c];
}

// Leaves elements [k, k + count) of R rows in w; returns the number of rows of x that they have been multiplied with.
template <class Isa, class Lane, int D, int R>
static int64_t decode_piece(const LinearJob& job, const typename Lane::Element* x, int64_t n, int64_t k, int64_t count,
                            const Workspace<Lane>& space, typename Lane::Sum* sums) {
    const rw_weight& weight = *job.weight;
    if (!job.apart || job.T < Isa::fused_rows) {
        for (int r = 0; r < R; ++r) decode<Isa, D>(weight, (n + r) * job.K + k, count, space.w + r * count);
        return 0;
    }
    const int64_t blocks = (count + weight.block_size - 1) / weight.block_size;
    bool plain = true;
    for (int r = 0; r < R; ++r)
        plain =
            Isa::scales(weight, ((n + r) * job.K + k) / weight.block_size, blocks, space.scales + r * blocks) && plain;
    if (plain) {
        decode_and_multiply<Isa, Lane, D, R, Isa::fused_rows, true>(job, x, n, k, count, space, sums);
    } else {
        decode_and_multiply<Isa, Lane, D, R, Isa::fused_rows, false>(job, x, n, k, count, space, sums);
    }
    return Isa::fused_rows;
}

// Elements [k, k + count) of R weight rows from n on, times the same elements of every row of x.
template <class Isa, class Lane, int D, int R>
static void piece_of_rows(const LinearJob& job, const typename Lane::Element* x, int64_t n, int64_t k, int64_t count,
                          const Workspace<Lane>& space, typename Lane::Sum* sum) {
    x += k * job.T;
    for (int64_t t = decode_piece<Isa, Lane, D, R>(job, x, n, k, count, space, sum); t < job.T;) {
        // Tiles of nearly equal width: 16 is 6 + 5 + 5, not 6 + 6 + 4.
        const int64_t left = job.T - t, tiles = (left + Isa::columns - 1) / Isa::columns;
        const int columns = static_cast<int>((left + tiles - 1) / tiles);
        tile_of<Lane, R, Isa::columns>(columns, space.w, count, x + t * count, count, count, sum + t, job.T);
        t += columns;
    }
}

template <class Isa, class Lane, int D>
static void decoded_group(const LinearJob& job, Workspace<Lane>& space, int64_t first, int64_t last) {
    const auto* x = static_cast<const typename Lane::Element*>(job.x);
    prefetch_scales(*job.weight, last * job.K / job.weight->block_size,
                    (last - first) * job.K / job.weight->block_size);
    typename Lane::Sum* sums = space.sums;
    for (int64_t i = 0, count = (last - first) * job.T; i < count; ++i) sums[i] = Lane::zero();
    for (int64_t k = 0; k < job.K; k += job.piece) {
        const int64_t count = job.K - k < job.piece ? job.K - k : job.piece;
        int64_t n = first;
        for (; n + kRows <= last; n += kRows) {
            const bool more_rows = n + kRows < last || k + count == job.K;
            space.ahead = more_rows ? kRows * job.K / 2 : ((first - n) * job.K + count) / 2;
            piece_of_rows<Isa, Lane, D, kRows>(job, x, n, k, count, space, sums + (n - first) * job.T);
        }
        space.ahead = job.K / 2;
        for (; n < last; ++n) piece_of_rows<Isa, Lane, D, 1>(job, x, n, k, count, space, sums + (n - first) * job.T);
    }
    for (int64_t t = 0; t < job.T; ++t) {
        float totals[kOpenRows];
        if (last - first == kOpenRows) {
            Lane::totals(sums + t, job.T, totals);
        } else {
            for (int64_t n = first; n < last; ++n) totals[n - first] = Lane::total(sums[(n - first) * job.T + t]);
        }
        store_sums<D>(job, first, last - first, t, totals);
    }
}

template <class Isa, class Lane, int D>
static void decoded(const LinearJob& job, int64_t first, int64_t last) {
    using Element = typename Lane::Element;
    // Avoids 4K aliasing: a load that follows a store to the same offset in another page waits for that store.
    constexpr int64_t half_page = kPage / 2 / static_cast<int64_t>(sizeof(Element));
    Workspace<Lane> space = {scratch<Isa, Element, 0>(kRows * job.piece + half_page) + half_page,
                             scratch<Isa, float, 2>(kRows * (job.piece / job.weight->block_size + 1)),
                             scratch<Isa, typename Lane::Sum, 1>(kOpenRows * job.T), 0};
    for (int64_t n = first; n < last; n += kOpenRows)
        decoded_group<Isa, Lane, D>(job, space, n, n + kOpenRows < last ? n + kOpenRows : last);
}

}  // namespace rankwise::RW_ISA
