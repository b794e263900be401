// Sums of products where instructions multiply pairs of bfloat16: blocks of 32 rows by 32 columns over packed panels
// that stay in the second-level cache. A Unit multiplies a block: on AMX tiles, or with AVX-512's dot products of
// pairs.
//
// A Unit has a Session, which lives while a task multiplies, and
//     multiply_panel<Add>(block, first, b, narrow, sums, stride): sums (32, 32), `stride` apart, = or += the block's
//         rows of segments [first, ...) times a panel. Sums past the rows, and the second half of each row of a narrow
//         panel, are unspecified;
//     multiply_bytes<Add>(segment, columns, b, rows, sums, stride): the same of one segment of bytes;
//     multiply_pairs(left, right, steps, out): out (16 ranks, 64 columns) = sums over the steps of a chunk.
#pragma once

#include "products/pack_bytes.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kStreamElements = int64_t{1} << 18;

// A part of a term within the steps that are multiplied at once.
struct PairSegment {
    const uint16_t* a;
    int64_t stride, steps;
    int64_t pairs;         // of its words: the last step may have fewer than the others
    const float* a_scale;  // of the rows, or null where they are not bytes
};

struct Block {
    PairSegment segments[kMostTerms];
    int count;
    int64_t rows;
};

// The parts of the terms in steps [first, last) of all steps, at rows from `row` on. A block without all its rows is
// read from `edge`.
static Block block_at(const ProductJob& job, int64_t row, int64_t rows, int64_t first, int64_t last, uint16_t* edge) {
    Block block;
    block.count = 0;
    block.rows = rows;
    int64_t begin = 0;
    for (int i = 0; i < job.count; begin += job.terms[i].steps, ++i) {
        const ProductTerm& term = job.terms[i];
        const int64_t from = first > begin ? first - begin : 0,
                      to = last - begin < term.steps ? last - begin : term.steps;
        if (from >= to) continue;
        PairSegment& segment = block.segments[block.count++];
        const int64_t end = to * kTileStep < term.words ? to * kTileStep : term.words;
        const rw_eight_bit* bytes = term.source.eight_bit;
        segment = {term.a + row * term.a_stride + from * kTileStep, term.a_stride, to - from,
                   (end - from * kTileStep + 1) / 2, bytes ? bytes->a_scale + row : nullptr};
        if (rows == kRowBlock) continue;
        const int64_t length = segment.steps * kTileStep;
        for (int64_t r = 0; r < kRowBlock; ++r) {
            if (r < rows)
                std::memcpy(edge + r * length, segment.a + r * segment.stride, 2 * static_cast<std::size_t>(length));
            else std::memset(edge + r * length, 0, 2 * static_cast<std::size_t>(length));
        }
        segment.a = edge, segment.stride = length;
        edge += kRowBlock * length;
    }
    return block;
}

// Panels [panel, end) of the weights of all terms in steps [first, last). columns: (panels, terms).
static void pack_panels(const ProductJob& job, int64_t panel, int64_t end, int64_t first, int64_t last,
                        uint32_t* packed, ByteColumns* columns) {
    const int64_t panel_words = (last - first) * kStepWords;
    int64_t begin = 0;
    for (int i = 0; i < job.count; begin += job.terms[i].steps, ++i) {
        const ProductTerm& term = job.terms[i];
        const int64_t from = first > begin ? first - begin : 0,
                      to = last - begin < term.steps ? last - begin : term.steps;
        if (from >= to) continue;
        uint32_t* out = packed + (begin + from - first) * kStepWords;
        if (term.source.eight_bit) {
            pack_bytes(term.source, panel, end, from, to, out, panel_words, columns++, job.count);
        } else if (term.source.across) {
            pack_across(term.source, job.N, panel, end, from, to, out, panel_words);
        } else {
            for (int64_t p = panel; p < end; ++p, out += panel_words) pack_outputs(term, job.N, p, from, to, out);
        }
    }
}

// A panel's sums that wait to be rounded, while the next panel is multiplied: AMX leaves the vector units free for it.
struct Waiting {
    int64_t row, rows, panel, stride;
    const float* sums;
};

static inline void store_panel(const ProductJob& job, const Waiting& done) {
    const int64_t n = done.panel * kPanel, left = job.N - n;
    const __mmask32 some = first_of_32(left);
    const __mmask16 low = first_of_16(left), high = first_of_16(left - 16);
    __m512 g[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)}, bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (job.g) g[0] = _mm512_maskz_loadu_ps(low, job.g + n), g[1] = _mm512_maskz_loadu_ps(high, job.g + n + 16);
    if (job.bias)
        bias[0] = _mm512_maskz_loadu_ps(low, job.bias + n), bias[1] = _mm512_maskz_loadu_ps(high, job.bias + n + 16);
    const int64_t at = done.row * job.out_stride + n;
    uint16_t *out = static_cast<uint16_t*>(job.out) + at,
             *rest = job.rest ? static_cast<uint16_t*>(job.rest) + at : nullptr;
    const float* sums = done.sums;
    // Whole lines of a large result go past the caches: reading each before it is overwritten costs more than it saves.
    const bool stream = left >= kPanel && job.T * job.N >= kStreamElements;
    for (int64_t r = 0; r < done.rows; ++r, out += job.out_stride, sums += done.stride) {
        __m512 first = _mm512_loadu_ps(sums), second = _mm512_loadu_ps(sums + 16);
        if (!is_narrow(left)) in_order(first, second);
        first = _mm512_fmadd_ps(first, g[0], bias[0]), second = _mm512_fmadd_ps(second, g[1], bias[1]);
        const __m512i words = rounded(first, second);
        if (rest) _mm512_mask_storeu_epi16(rest + r * job.out_stride, some, rounded(rest_of(first), rest_of(second)));
        if (stream && reinterpret_cast<uintptr_t>(out) % 64 == 0)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out), words);
        else _mm512_mask_storeu_epi16(out, some, words);
    }
}

// to = or += totals * a_scale * scale, of 16 columns.
template <bool Add>
static inline void store_byte_sums(__m512i totals, float a_scale, const float* scale, float* to) {
    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(a_scale), _mm512_load_ps(scale)),
                 value = _mm512_mul_ps(_mm512_cvtepi32_ps(totals), factor);
    _mm512_storeu_ps(to, Add ? _mm512_add_ps(value, _mm512_loadu_ps(to)) : value);
}

// Segments of bytes, then the others.
template <class Unit>
static inline void multiply_block(const Block& block, const ByteColumns* columns, const uint32_t* b, bool narrow,
                                  bool add, float* sums, int64_t stride) {
    int i = 0;
    for (; i < block.count && block.segments[i].a_scale; b += block.segments[i++].steps * kStepWords, add = true) {
        const auto multiply = add ? Unit::template multiply_bytes<true> : Unit::template multiply_bytes<false>;
        multiply(block.segments[i], columns[i], b, block.rows, sums, stride);
    }
    if (i == block.count) return;
    if (add) Unit::template multiply_panel<true>(block, i, b, narrow, sums, stride);
    else Unit::template multiply_panel<false>(block, i, b, narrow, sums, stride);
}

template <class Unit>
static void multiply_panels(const ProductJob& job, const ProductShare& share, int64_t first, int64_t last,
                            bool is_first, bool is_last, const uint32_t* packed, const ByteColumns* columns,
                            float* kept, uint16_t* edge) {
    alignas(64) float sums[2][kRowBlock * kPanel];
    const int64_t panel_words = (last - first) * kStepWords, width = (share.last - share.first) * kPanel;
    Waiting waiting = {0, 0, 0, 0, nullptr};
    int next = 0;
    for (int64_t row = share.from; row < share.to; row += kRowBlock) {
        const int64_t rows = share.to - row < kRowBlock ? share.to - row : kRowBlock;
        const Block block = block_at(job, row, rows, first, last, edge);
        const uint32_t* b = packed;
        for (int64_t panel = share.first; panel < share.last; ++panel, b += panel_words) {
            float* to =
                is_first && is_last ? sums[next] : kept + (row - share.from) * width + (panel - share.first) * kPanel;
            const int64_t stride = is_first && is_last ? kPanel : width;
            multiply_block<Unit>(block, columns + (panel - share.first) * job.count, b,
                                 is_narrow(job.N - panel * kPanel), !is_first, to, stride);
            if (!is_last) continue;
            store_panel(job, waiting);
            waiting = {row, rows, panel, stride, to};
            next = 1 - next;
        }
    }
    if (is_last) store_panel(job, waiting);
}

template <class Unit>
static void product_of_pairs(const ProductJob& job, const ProductShare& share) {
    struct Owner {};
    const typename Unit::Session session;
    int64_t steps = 0;
    for (int i = 0; i < job.count; ++i) steps += job.terms[i].steps;
    const int64_t at_once = job.steps_at_once, panels = share.last - share.first;
    uint32_t* packed = scratch<Owner, uint32_t, 0>(panels * at_once * kStepWords);
    ByteColumns* columns = scratch<Owner, ByteColumns, 3>(panels * job.count);
    uint16_t* edge = scratch<Owner, uint16_t, 1>(kRowBlock * at_once * kTileStep);
    const int64_t row_blocks = (share.to - share.from + kRowBlock - 1) / kRowBlock;
    float* kept = at_once == steps ? nullptr : scratch<Owner, float, 2>(row_blocks * kRowBlock * panels * kPanel);
    for (int64_t first = 0; first < steps; first += at_once) {
        const int64_t last = first + at_once < steps ? first + at_once : steps;
        pack_panels(job, share.first, share.last, first, last, packed, columns);
        multiply_panels<Unit>(job, share, first, last, first == 0, last == steps, packed, columns, kept, edge);
    }
    _mm_sfence();
}

// Prefetches columns [first, last) of rows into the second-level cache, row by row, the fastest order for memory.
static inline void prefetch_rows(const uint16_t* m, int64_t stride, int64_t rows, int64_t first, int64_t last) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = first; c < last; c += 32)
            _mm_prefetch(reinterpret_cast<const char*>(m + r * stride + c), _MM_HINT_T1);
}

// A block of 32 rows and a panel of their columns as two tiles of pairs. What lies past the last row or column is zero.
template <bool Whole>
static inline __attribute__((always_inline)) __m512i row_of_block(const uint16_t* m, int64_t stride, int64_t row,
                                                                  int64_t rows, __mmask32 some) {
    if (Whole) return _mm512_loadu_si512(m + row * stride);
    return row < rows ? _mm512_maskz_loadu_epi16(some, m + row * stride) : _mm512_setzero_si512();
}

template <bool Whole>
static inline __attribute__((always_inline)) void pair_rows(const uint16_t* m, int64_t stride, int64_t rows,
                                                            __mmask32 some, uint32_t* out) {
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < 16; ++pair) {
        __m512i tiles[2];
        interleave(row_of_block<Whole>(m, stride, 2 * pair, rows, some),
                   row_of_block<Whole>(m, stride, 2 * pair + 1, rows, some), tiles[0], tiles[1]);
        _mm512_store_si512(out + 16 * pair, tiles[0]);
        _mm512_store_si512(out + kTileWords + 16 * pair, tiles[1]);
    }
}

static inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// dots[tile] += the sums of m * y over the rows of a block that has been paired.
template <bool Whole>
static inline void dot_rows(const uint32_t* paired, const uint16_t* y, int64_t stride, int64_t rows, __mmask32 some,
                            __m512 (&dots)[2][2]) {
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < 16; ++pair) {
        __m512i tiles[2];
        interleave(row_of_block<Whole>(y, stride, 2 * pair, rows, some),
                   row_of_block<Whole>(y, stride, 2 * pair + 1, rows, some), tiles[0], tiles[1]);
        // Two sums in turn: an addition waits for the one before it.
        __m512(&sum)[2] = dots[pair % 2];
        sum[0] = dot_pairs(sum[0], _mm512_load_si512(paired + 16 * pair), tiles[0]);
        sum[1] = dot_pairs(sum[1], _mm512_load_si512(paired + kTileWords + 16 * pair), tiles[1]);
    }
}

// The rows of q in a chunk, transposed: per tile of ranks and step, 16 ranks by 16 pairs.
static void pack_left(const RowProductJob& job, int64_t row, int64_t rows, uint32_t* left) {
    const int64_t steps = (rows + kTileStep - 1) / kTileStep, ranks = (job.R + 15) / 16;
    for (int64_t rank = 0; rank < ranks; ++rank)
        for (int64_t step = 0; step < steps; ++step, left += kTileWords) {
            const __mmask16 some = first_of_16(job.R - 16 * rank);
            __m512i r[16];
            for (int64_t pair = 0; pair < 16; ++pair) {
                const int64_t t = step * kTileStep + 2 * pair;
                const uint16_t* q = static_cast<const uint16_t*>(job.q) + (row + t) * job.q_stride + 16 * rank;
                const __m256i a = t < rows ? _mm256_maskz_loadu_epi16(some, q) : _mm256_setzero_si256();
                const __m256i b =
                    t + 1 < rows ? _mm256_maskz_loadu_epi16(some, q + job.q_stride) : _mm256_setzero_si256();
                r[pair] = in_turns(a, b);
            }
            transpose(r);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(left + 16 * i, r[i]);
        }
}

// One panel of a chunk's columns: its tiles of pairs, and the sums of m * y.
template <bool Whole>
static void pair_panel(const RowProductJob& job, int64_t chunk, int64_t row, int64_t rows, int64_t column, int64_t last,
                       uint32_t* right) {
    const __mmask32 some = first_of_32(last - column);
    __m512 dots[2][2] = {{_mm512_setzero_ps(), _mm512_setzero_ps()}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    const auto *m = static_cast<const uint16_t*>(job.m), *y = static_cast<const uint16_t*>(job.y);
    for (int64_t t = 0; t < rows; t += kTileStep, right += 2 * kStepWords) {
        pair_rows<Whole>(m + (row + t) * job.m_stride + column, job.m_stride, rows - t, some, right);
        if (job.dots) dot_rows<Whole>(right, y + (row + t) * job.y_stride + column, job.y_stride, rows - t, some, dots);
    }
    if (!job.dots) return;
    __m512 low = _mm512_add_ps(dots[0][0], dots[1][0]), high = _mm512_add_ps(dots[0][1], dots[1][1]);
    in_order(low, high);
    _mm512_mask_storeu_ps(job.dots + chunk * job.C + column, first_of_16(last - column), low);
    _mm512_mask_storeu_ps(job.dots + chunk * job.C + column + 16, first_of_16(last - column - 16), high);
}

// sums (R, columns) = q^T m over the rows of a chunk: q as the left operand, transposed once for all columns.
template <class Unit>
static void row_product_of_pairs(const RowProductJob& job, int64_t chunk, int64_t first, int64_t last) {
    struct Owner {};
    const typename Unit::Session session;
    constexpr int64_t chunk_steps = kChunkRows / kTileStep;
    const int64_t row = chunk * kChunkRows, rows = job.T - row < kChunkRows ? job.T - row : kChunkRows;
    const int64_t steps = (rows + kTileStep - 1) / kTileStep, ranks = (job.R + 15) / 16;
    prefetch_rows(static_cast<const uint16_t*>(job.m) + row * job.m_stride, job.m_stride, rows, first, last);
    if (job.dots)
        prefetch_rows(static_cast<const uint16_t*>(job.y) + row * job.y_stride, job.y_stride, rows, first, last);
    uint32_t* left = scratch<Owner, uint32_t, 0>(ranks * chunk_steps * kTileWords);
    uint32_t* right = scratch<Owner, uint32_t, 1>(2 * chunk_steps * kStepWords);
    pack_left(job, row, rows, left);
    alignas(64) float sums[16 * 2 * kPanel];
    for (int64_t column = first; column < last; column += 2 * kPanel) {
        for (int64_t panel = 0; panel < 2; ++panel) {
            const int64_t begin = column + panel * kPanel;
            if (rows % kTileStep == 0 && begin + kPanel <= last)
                pair_panel<true>(job, chunk, row, rows, begin, last, right + panel * kStepWords);
            else if (begin < last) pair_panel<false>(job, chunk, row, rows, begin, last, right + panel * kStepWords);
        }
        for (int64_t rank = 0; rank < ranks; ++rank) {
            Unit::multiply_pairs(left + rank * steps * kTileWords, right, steps, sums);
            for (int64_t begin = column, part = 0; begin < last && part < 2; begin += kPanel, ++part) {
                const __mmask16 low = first_of_16(last - begin), high = first_of_16(last - begin - 16);
                float* out = job.sums + (chunk * ranks + rank) * 16 * job.C + begin;
                for (int64_t r = 0; r < 16; ++r, out += job.C) {
                    __m512 a = _mm512_load_ps(sums + 64 * r + kPanel * part),
                           b = _mm512_load_ps(sums + 64 * r + kPanel * part + 16);
                    in_order(a, b);
                    _mm512_mask_storeu_ps(out, low, a);
                    _mm512_mask_storeu_ps(out + 16, high, b);
                }
            }
        }
    }
}

// Adds up the chunks of columns [first, last), in order, and writes them as the caller wants them.
static void finish_row_product_of_pairs(const RowProductJob& job, int64_t first, int64_t last) {
    const int64_t chunks = (job.T + kChunkRows - 1) / kChunkRows, ranks = (job.R + 15) / 16;
    for (int64_t column = first; column < last; column += 16) {
        const __mmask16 some = first_of_16(last - column);
        if (job.dot) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, job.dots + chunk * job.C + column));
            if (job.divisor) {
                const __m512 divisor = _mm512_maskz_loadu_ps(some, job.divisor + column);
                sum = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(divisor, _mm512_setzero_ps(), _CMP_NEQ_UQ), sum, divisor);
            }
            _mm512_mask_storeu_ps(job.dot + column, some, sum);
        }
        __m512 factor = _mm512_set1_ps(job.scale);
        if (job.gain) factor = _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(some, job.gain + column));
        for (int64_t rank = 0; rank < ranks; ++rank) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t chunk = 0; chunk < chunks; ++chunk)
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(
                                                 some, job.sums + ((chunk * ranks + rank) * 16 + i) * job.C + column));
                r[i] = _mm512_castps_si512(_mm512_mul_ps(sum, factor));
            }
            if (job.by_column) transpose(r);
            const int64_t left = job.R - 16 * rank, rows = job.by_column ? last - column : left;
            const __mmask16 kept = job.by_column ? first_of_16(left) : some;
            for (int64_t i = 0; i < 16 && i < rows; ++i) {
                const int64_t at = job.by_column ? (column + i) * job.R + 16 * rank : (16 * rank + i) * job.C + column;
                const __m512 value = _mm512_castsi512_ps(r[i]);
                if (job.out_dtype == RW_FLOAT32) {
                    _mm512_mask_storeu_ps(static_cast<float*>(job.out) + at, kept, value);
                } else {
                    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.out) + at, kept,
                                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
                }
            }
        }
    }
}

}  // namespace rankwise::RW_ISA
