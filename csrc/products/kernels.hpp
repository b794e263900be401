// Sums of products of bfloat16 or float32 matrices: out (T, N) = g * sum_i a_i W_i^T + bias, rounded once. A frozen
// weight, dense or of 4 bits, and its low-rank branch are two terms of one sum.
//
// Legend: T rows, N columns of the result; a step is some of the elements that are summed over (`ProductLayout`), a
// panel 32 columns of the result.
#pragma once

#include <cstdint>

#include "four_bit/kernels.hpp"

namespace rankwise {

constexpr int64_t kPanel = 32;
// Elements in a row of a tile, and of 8 bits.
constexpr int64_t kTileStep = 32, kByteStep = 64;
constexpr int kLargestByte = 127;
constexpr int64_t kRowBlock = 32;
// An exact term becomes two.
constexpr int64_t kMostTerms = 32;
// Rows whose products `row_products` sums before the sums of all such chunks are added up: fixed, so that no number of
// threads changes a result.
constexpr int64_t kChunkRows = 256;
constexpr int64_t kChunkColumns = 2048;

struct ProductTerm {
    rw_term source;
    const uint16_t* a;  // for tiles: rows of whole steps
    int64_t a_stride;
    int64_t steps;
    int64_t words;   // of 16 bits in a row of a: elements, or pairs of bytes
    int64_t period;  // elements of a row of the weight, which repeat up to the source's length
    bool is_rest;    // of the weight what rounding it to bfloat16 leaves
};

struct ProductJob {
    const ProductTerm* terms;
    int count;
    int64_t steps_at_once;  // what lies between two of them is kept in float32
    int64_t T, N;
    const float *g, *bias;  // or null
    int dtype;              // of every a, of out and of rest
    void* out;
    void* rest;  // or null
    int64_t out_stride;
};

// What one task computes: panels [first, last) of rows [from, to).
struct ProductShare {
    int64_t first, last, from, to;
};

struct RowProductJob {
    int dtype;  // of q, m and y
    const void* q;
    int64_t q_stride;
    const void* m;
    int64_t m_stride;
    const void* y;  // or null
    int64_t y_stride;
    int64_t T, R, C;
    float* sums;  // (chunks, 16 ceil(R / 16), C)
    float* dots;  // (chunks, C), or null
    float scale;
    const float* gain;  // (C), or null
    int by_column, out_dtype;
    void* out;
    const float* divisor;  // (C), or null
    float* dot;            // (C), or null
};

// Most rows that `few_rows` takes.
constexpr int64_t kFewRowsOfTiles = 64;

// How a level cuts its work.
struct ProductLayout {
    int64_t step;              // elements
    int64_t most_steps;        // that are multiplied at once, in equal parts
    int64_t panel_step_bytes;  // of one packed panel
    int64_t packed_bytes;      // panels of one task: what the second-level cache holds beside the rows
    bool reads_tiles;          // bfloat16 in rows of whole steps, rounded weights: an exact term becomes two
    int largest;               // integer that a row or a weight of a term in 8 bits is rounded to
    int64_t integer_step;      // elements of such a term
};

struct ProductKernels {
    void (*product)(const ProductJob& job, const ProductShare& share);
    // Columns [first, last) of a chunk of rows.
    void (*row_product)(const RowProductJob& job, int64_t chunk, int64_t first, int64_t last);
    void (*finish_row_product)(const RowProductJob& job, int64_t first, int64_t last);
    ProductLayout layout;
    // `rw_quantize_rows` of T rows on one thread. dither: the first of dithered rows, else -1.
    void (*quantize_rows)(const void* x, int dtype, int64_t x_stride, const float* factor, int64_t T, int64_t K,
                          uint8_t* q, int64_t q_stride_bytes, float* scale, int64_t dither);
    // `FourBitKernels::linear` for at most kFewRowsOfTiles rows of bfloat16 in groups of 64, apart, as `pack_few_rows`
    // leaves them. Or null.
    void (*few_rows)(const LinearJob& job, int64_t first, int64_t last) = nullptr;
    void (*pack_few_rows)(const uint16_t* arranged, int64_t T, int64_t K, uint32_t* packed) = nullptr;
};

// Before it is rounded, element k of a dithered row t gets (h + 1/2) / 2^kDitherBits - 1/2, where h are the upper bits of
// this Weyl sequence: so rounding has no bias, however small the elements are.
constexpr int kDitherBits = 12;
constexpr float kDitherStep = 1.0f / (1 << kDitherBits);
constexpr uint32_t dither_at(int64_t t, int64_t k) {
    return static_cast<uint32_t>(t) * 2246822519u + static_cast<uint32_t>(k) * 2654435769u;
}

// How pairs of bfloat16 are multiplied without tiles: 0 as it was measured, else one way, for tests.
constexpr int kWidened = 2, kDotProducts = 3;
int pairs_asked();

// Those of the current level, or null where it has none or they are switched off.
const ProductKernels* current_products();

}  // namespace rankwise
