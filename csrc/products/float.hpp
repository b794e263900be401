// Sums of products where no instruction multiplies bfloat16: everything is widened to float32 and multiplied by fused
// multiply-adds, so that weights, factors and what rounding left of a row count unrounded. Terms in 8 bits are
// multiplied as integers. Blocks of 6 rows by two vectors of columns, over packed strips that stay in the second-level
// cache. D: the dtype of the rows.
#pragma once

#include "common/multiply_float.hpp"
#include "common/scratch.hpp"
#include "products/terms.hpp"

namespace rankwise::RW_ISA {
namespace {

// Rows of the weight are columns of the result: a strip of them, [from, to) of what is summed over.
template <int D>
void pack_strip_of_outputs(const Segment& segment, int64_t N, int64_t n, float* strip) {
    struct Owner {};
    const rw_term& term = *segment.term;
    const int64_t count = N - n < kStrip ? N - n : kStrip;
    float* rows = scratch<Owner, float, 0>(kStrip * kPieceElements);
    std::memset(rows + count * kPieceElements, 0, static_cast<std::size_t>((kStrip - count) * kPieceElements * 4));
    for (int64_t k = segment.from; k < segment.to; k += kPieceElements) {
        const int64_t length = segment.to - k < kPieceElements ? segment.to - k : kPieceElements;
        for (int64_t i = 0; i < count; ++i) fetch_floats<D>(term, n + i, k, length, rows + i * kPieceElements);
        transpose_strip(rows, kPieceElements, length, strip + (k - segment.from) * kStrip);
    }
}

// Rows of the weight are summed over: columns [n, n + columns) of them into strips `strip_floats` apart.
template <int D>
void pack_strips_across(const Segment& segment, int64_t n, int64_t columns, float* strips, int64_t strip_floats) {
    struct Owner {};
    const rw_term& term = *segment.term;
    float* fetched = scratch<Owner, float, 0>(columns + kStrip);
    std::memset(fetched + columns, 0, sizeof(float) * kStrip);
    for (int64_t k = segment.from; k < segment.to; ++k, strips += kStrip) {
        if (!term.packed) {
            // Each row may lie in another page, where the hardware's own prefetching ends.
            const int64_t size = term.w_dtype == RW_FLOAT32 ? 4 : 2;
            const char* ahead = static_cast<const char*>(term.w) + ((k + 8) * term.w_stride + n) * size;
            for (int64_t i = 0; i < columns * size; i += 64) __builtin_prefetch(ahead + i);
        }
        fetch_floats<D>(term, k, n, columns, fetched);
        float* to = strips;
        for (int64_t c = 0; c < columns; c += kStrip, to += strip_floats) {
            store<RW_FLOAT32>(to, 0, load<RW_FLOAT32>(fetched, c));
            store<RW_FLOAT32>(to, W, load<RW_FLOAT32>(fetched, c + W));
        }
    }
}

// The strips of columns [n, end) of all segments. start (segments of integers, columns): see `pack_integers`.
template <int D>
void pack_strips(const Segments& segments, int64_t N, int64_t n, int64_t end, float* strips, int32_t* start) {
    const int64_t strip_floats = segments.words * kStrip;
    for (int i = 0; i < segments.count; ++i) {
        const Segment& segment = segments.of[i];
        float* out = strips + segment.at * kStrip;
        if (i < segments.integers) {
            const int dtype = segment.term->packed ? RW_FLOAT32 : segment.term->w_dtype;
            const auto pack = dtype == RW_FLOAT32 ? pack_integers<D, RW_FLOAT32>
                              : dtype == RW_INT8  ? pack_integers<D, RW_INT8>
                                                  : pack_integers<D, RW_BFLOAT16>;
            pack(*segment.term, n, end, segment.from, segment.to, reinterpret_cast<int32_t*>(out), strip_floats,
                 start + i * (end - n));
        } else if (segment.term->across) pack_strips_across<D>(segment, n, end - n, out, strip_floats);
        else
            for (int64_t c = n; c < end; c += kStrip, out += strip_floats) pack_strip_of_outputs<D>(segment, N, c, out);
    }
}

// One block of at most kBlockRows rows against the strips of columns [n, end). Sums are kept in `kept`, of all steps at
// once in a place of its own.
template <int D>
struct BlockOfRows {
    const ProductJob* job;
    const Segments* segments;
    int64_t row, n, end;
    bool is_first, is_last;
    const float *rows, *strips;
    const int32_t* start;
    float* kept;  // (rows, strips * kStrip), or null
    int64_t kept_stride;

    // Terms of integers times the strip at column c: out = or += their sums. Returns whether there are sums.
    template <int Rows>
    bool multiply_integer_terms(int64_t c, const float* strip, float* out, int64_t stride) const {
        bool add = !is_first;
        for (int i = 0; i < segments->integers; ++i, add = true) {
            const Segment& segment = segments->of[i];
            const rw_term& term = *segment.term;
            const auto* a = static_cast<const Integers::Element*>(term.a) + row * term.a_stride + segment.from;
            const IntegerStrip columns = {reinterpret_cast<const int32_t*>(strip + segment.at * kStrip),
                                          start + i * (end - n) + (c - n), term.eight_bit->out_scale + c};
            const auto multiply = add ? multiply_integers<Rows, true> : multiply_integers<Rows, false>;
            multiply(a, term.a_stride, term.eight_bit->a_scale + row, columns,
                     (segment.to - segment.from) / Integers::kPerWord, out, stride);
        }
        return add;
    }

    template <int Rows>
    __attribute__((noinline)) void multiply() const {
        alignas(64) float own[kBlockRows * kStrip];
        const int64_t begin = segments->integer_words, length = segments->words - begin,
                      stride = kept ? kept_stride : kStrip;
        const float* strip = strips;
        for (int64_t c = n; c < end; c += kStrip, strip += segments->words * kStrip) {
            float* at = kept ? kept + (c - n) : own;
            const bool add = multiply_integer_terms<Rows>(c, strip, at, stride);
            Floats sums[Rows][2] = {};
            if (add) load_sums<Rows>(at, stride, sums);
            multiply_add<Rows>(rows, length, 1, strip + begin * kStrip, kStrip, length, sums);
            if (!is_last) {
                store_sums<Rows>(sums, at, stride);
                continue;
            }
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const int64_t to = (row + r) * job->out_stride + c, rest = job->N - c;
                if (rest >= kStrip) {
                    store_product<D>(*job, to, c, sums[r][0], Whole{});
                    store_product<D>(*job, to + W, c + W, sums[r][1], Whole{});
                } else {
                    store_product<D>(*job, to, c, sums[r][0], Some{static_cast<int>(rest < W ? rest : W)});
                    if (rest > W) store_product<D>(*job, to + W, c + W, sums[r][1], Some{static_cast<int>(rest - W)});
                }
            }
        }
    }
};

template <int D>
void product_of_rows(const ProductJob& job, const ProductShare& share) {
    struct Owner {};
    int64_t steps = 0;
    for (int i = 0; i < job.count; ++i) steps += job.terms[i].steps;
    const int64_t at_once = job.steps_at_once, n = share.first * kPanel,
                  end = share.last * kPanel < job.N ? share.last * kPanel : job.N;
    const int64_t width = (end - n + kStrip - 1) / kStrip * kStrip, rows = share.to - share.from;
    float* strips = scratch<Owner, float, 0>(width * at_once * kFloatStep);
    float* wide = scratch<Owner, float, 1>(kBlockRows * at_once * kFloatStep);
    float* kept = at_once >= steps ? nullptr : scratch<Owner, float, 2>(rows * width);
    int32_t* start = scratch<Owner, int32_t, 3>(job.count * width);
    for (int64_t first = 0; first < steps; first += at_once) {
        const Segments segments(job, first, first + at_once < steps ? first + at_once : steps);
        pack_strips<D>(segments, job.N, n, end, strips, start);
        for (int64_t row = share.from; row < share.to; row += kBlockRows) {
            const int64_t count = share.to - row < kBlockRows ? share.to - row : kBlockRows;
            widen_rows<D>(segments, row, count, wide, segments.words - segments.integer_words);
            float* sums = kept ? kept + (row - share.from) * width : nullptr;
            const bool is_last = first + at_once >= steps;
            const BlockOfRows<D> block = {&job, &segments, row, n, end, !first, is_last, wide, strips, start, sums,
                                          width};
            with_rows(count, [&](auto rows_of_block) { block.template multiply<decltype(rows_of_block)::value>(); });
        }
    }
}

void product_float(const ProductJob& job, const ProductShare& share) {
    job.dtype == RW_FLOAT32 ? product_of_rows<RW_FLOAT32>(job, share) : product_of_rows<RW_BFLOAT16>(job, share);
}

// q of a chunk, transposed and widened: (R, stride).
template <int D>
void widen_left(const RowProductJob& job, int64_t row, int64_t rows, float* left, int64_t stride) {
    for (int64_t t = 0; t < rows; ++t)
        for (int64_t r = 0; r < job.R; ++r)
            left[r * stride + t] = load_as_float<D>(job.q, (row + t) * job.q_stride + r);
}

// Columns [c, c + part) of the chunk's rows of m to a strip, and their sums of m * y.
template <int D, class Part>
RW_INLINE void widen_strip(const RowProductJob& job, int64_t chunk, int64_t row, int64_t rows, int64_t c, Part part,
                           float* strip) {
    Floats dot[2] = {};
    for (int64_t t = 0; t < rows; ++t) {
        const Floats m = load<D>(job.m, (row + t) * job.m_stride + c, part);
        store<RW_FLOAT32>(strip, t * kStrip, m);
        if (job.dots) dot[t % 2] = madd(m, load<D>(job.y, (row + t) * job.y_stride + c, part), dot[t % 2]);
    }
    if (job.dots) store<RW_FLOAT32>(job.dots, chunk * job.C + c, dot[0] + dot[1], part);
}

template <int D>
void row_product_of(const RowProductJob& job, int64_t chunk, int64_t first, int64_t last) {
    struct Owner {};
    constexpr int64_t stride = kChunkRows + 16;  // not a power of two, whose rows would fall into few sets of the cache
    const int64_t row = chunk * kChunkRows, rows = job.T - row < kChunkRows ? job.T - row : kChunkRows,
                  ranks = (job.R + 15) / 16 * 16;
    float* left = scratch<Owner, float, 0>(job.R * stride);
    alignas(64) float strip[kChunkRows * kStrip];
    widen_left<D>(job, row, rows, left, stride);
    for (int64_t c = first; c < last; c += kStrip) {
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t some = last - c - half * W;
            if (some >= W) widen_strip<D>(job, chunk, row, rows, c + half * W, Whole{}, strip + half * W);
            else if (some > 0)
                widen_strip<D>(job, chunk, row, rows, c + half * W, Some{static_cast<int>(some)}, strip + half * W);
            else
                for (int64_t t = 0; t < rows; ++t) store<RW_FLOAT32>(strip, t * kStrip + half * W, Floats{});
        }
        for (int64_t r = 0; r < job.R; r += kBlockRows) {
            const int64_t count = job.R - r < kBlockRows ? job.R - r : kBlockRows;
            alignas(64) float sums[kBlockRows * kStrip];
            with_rows(count, [&](auto rows_of_block) {
                constexpr int Rows = decltype(rows_of_block)::value;
                multiply_block<Rows>(left + r * stride, stride, strip, rows, sums);
            });
            float* to = job.sums + (chunk * ranks + r) * job.C + c;
            const auto bytes = sizeof(float) * static_cast<std::size_t>(last - c < kStrip ? last - c : kStrip);
            for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * job.C, sums + i * kStrip, bytes);
        }
    }
}

void row_product_float(const RowProductJob& job, int64_t chunk, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? row_product_of<RW_FLOAT32>(job, chunk, first, last)
                            : row_product_of<RW_BFLOAT16>(job, chunk, first, last);
}

// Adds up the chunks of columns [first, last), in order, and writes them as the caller wants them.
void finish_row_product_float(const RowProductJob& job, int64_t first, int64_t last) {
    const int64_t chunks = (job.T + kChunkRows - 1) / kChunkRows, ranks = (job.R + 15) / 16 * 16;
    each_vector(last - first, [&](int64_t i, auto part) RW_INLINED {
        const int64_t c = first + i;
        if (job.dot) {
            Floats sum = {};
            for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load<RW_FLOAT32>(job.dots, chunk * job.C + c, part);
            if (job.divisor) {
                const Floats divisor = load<RW_FLOAT32>(job.divisor, c, part);
                sum = divisor != 0.0f ? sum / divisor : Floats{};
            }
            store<RW_FLOAT32>(job.dot, c, sum, part);
        }
        Floats factor = all(job.scale);
        if (job.gain) factor *= load<RW_FLOAT32>(job.gain, c, part);
        for (int64_t r = 0; r < job.R; ++r) {
            Floats sum = {};
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                sum += load<RW_FLOAT32>(job.sums, (chunk * ranks + r) * job.C + c, part);
            sum *= factor;
            if (!job.by_column) {
                job.out_dtype == RW_FLOAT32 ? store<RW_FLOAT32>(job.out, r * job.C + c, sum, part)
                                            : store<RW_BFLOAT16>(job.out, r * job.C + c, sum, part);
                continue;
            }
            for (int64_t n = 0; n < W && c + n < last; ++n) {
                const int64_t at = (c + n) * job.R + r;
                job.out_dtype == RW_FLOAT32 ? store_float<RW_FLOAT32>(job.out, at, sum[n])
                                            : store_float<RW_BFLOAT16>(job.out, at, sum[n]);
            }
        }
    });
}

}  // namespace
}  // namespace rankwise::RW_ISA
