// Pairs of bfloat16 multiplied on AMX tiles: four tiles of sums.
#pragma once

#include "common/amx.hpp"
#include "products/pairs.hpp"

namespace rankwise::RW_ISA {

struct TileUnit {
    using Session = Amx;

    static inline __attribute__((always_inline)) void clear_sums() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }

    template <bool Add>
    static inline __attribute__((always_inline)) void multiply_panel(const Block& block, int first, const uint32_t* b,
                                                                     bool narrow, float* sums, int64_t stride) {
        if (Add) {
            _tile_loadd(0, sums, 4 * stride);
            _tile_loadd(1, sums + 16, 4 * stride);
            _tile_loadd(2, sums + 16 * stride, 4 * stride);
            _tile_loadd(3, sums + 16 * stride + 16, 4 * stride);
        } else {
            clear_sums();
        }
        for (int i = first; i < block.count; ++i) {
            const PairSegment& segment = block.segments[i];
            const uint16_t *upper = segment.a, *lower = upper + 16 * segment.stride;
            for (int64_t step = 0; step < segment.steps;
                 ++step, upper += kTileStep, lower += kTileStep, b += kStepWords) {
                _tile_loadd(4, upper, 2 * segment.stride);
                _tile_stream_loadd(6, b, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, lower, 2 * segment.stride);
                if (narrow) {
                    _tile_dpbf16ps(2, 5, 6);
                    continue;
                }
                _tile_stream_loadd(7, b + kTileWords, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums, 4 * stride);
        _tile_stored(1, sums + 16, 4 * stride);
        _tile_stored(2, sums + 16 * stride, 4 * stride);
        _tile_stored(3, sums + 16 * stride + 16, 4 * stride);
    }

    template <bool Add>
    static void multiply_bytes(const PairSegment& segment, const ByteColumns& columns, const uint32_t* b, int64_t rows,
                               float* sums, int64_t stride) {
        alignas(64) int32_t totals[kRowBlock * kPanel];
        clear_sums();
        const uint16_t *upper = segment.a, *lower = upper + 16 * segment.stride;
        for (int64_t step = 0; step < segment.steps; ++step, upper += kTileStep, lower += kTileStep, b += kStepWords) {
            _tile_loadd(4, upper, 2 * segment.stride);
            _tile_stream_loadd(6, b, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(5, lower, 2 * segment.stride);
            _tile_dpbusd(2, 5, 6);
            _tile_stream_loadd(7, b + kTileWords, 64);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
        _tile_stored(0, totals, 4 * kPanel);
        _tile_stored(1, totals + 16, 4 * kPanel);
        _tile_stored(2, totals + 16 * kPanel, 4 * kPanel);
        _tile_stored(3, totals + 16 * kPanel + 16, 4 * kPanel);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t v = 0; v < kPanel; v += 16)
                store_byte_sums<Add>(
                    _mm512_add_epi32(_mm512_load_si512(totals + r * kPanel + v), _mm512_load_si512(columns.start + v)),
                    segment.a_scale[r], columns.scale + v, sums + r * stride + v);
    }

    // Four tiles, so that no product waits for the one before it.
    static inline void multiply_pairs(const uint32_t* left, const uint32_t* right, int64_t steps, float* out) {
        clear_sums();
        for (int64_t step = 0; step < steps; ++step, left += kTileWords, right += 2 * kStepWords) {
            _tile_loadd(4, left, 64);
            _tile_loadd(5, right, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, right + kTileWords, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, right + 2 * kTileWords, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, right + 3 * kTileWords, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, out, 256);
        _tile_stored(1, out + 16, 256);
        _tile_stored(2, out + 32, 256);
        _tile_stored(3, out + 48, 256);
    }
};

}  // namespace rankwise::RW_ISA
