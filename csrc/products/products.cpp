// The C interface of sums of products: prepares operands, cuts the result into shares.
#include <atomic>
#include <cstring>
#include <vector>

#include "common/level.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace {

using namespace rankwise;

// Rows of one task where sums are kept between parts of the steps.
constexpr int64_t kKeptRows = 2048;
constexpr int64_t kLeastRows = 128;
// Sums over a vocabulary have more elements than this, and each task would read all rows for few columns. In parts of so
// many steps a task has more columns, and a part of all its rows stays in the cache: 1.2 to 1.5 times as fast on Zen 5.
constexpr int64_t kLong = 1 << 14, kLongSteps = 16;

// A switch for tests: 0, 1 or a way of `pairs_asked`.
std::atomic<int> allowed{1};

// Whether tiles can be read from rows at this distance: the rows have whole steps, and the stride causes no cache-set
// conflicts.
bool is_readable(int64_t length, int64_t stride) {
    if (length % kTileStep != 0) return false;
    const int64_t bytes = 2 * stride;
    return bytes % 64 != 0 || bytes / 64 % 32 != 0;
}

int64_t padded_stride(int64_t length) {
    const int64_t stride = ceil_div(length, kTileStep) * kTileStep;
    return is_readable(stride, stride) ? stride : stride + kTileStep;
}

// Whether a term's rows are copied: to where tiles can be read from, or beside what their rounding left.
bool is_copied(const rw_term& term) {
    return !term.eight_bit && (term.a_rest || !is_readable(term.length, term.a_stride));
}

// Rows [first, last) of a, and of what its rounding left, side by side.
void copy_rows(const rw_term& term, int64_t first, int64_t last, int64_t stride, uint16_t* out) {
    const auto *a = static_cast<const uint16_t*>(term.a), *rest = static_cast<const uint16_t*>(term.a_rest);
    const auto bytes = 2 * static_cast<std::size_t>(term.length);
    const int64_t length = rest ? 2 * term.length : term.length;
    for (int64_t t = first; t < last; ++t) {
        uint16_t* row = out + t * stride;
        std::memcpy(row, a + t * term.a_stride, bytes);
        if (rest) std::memcpy(row + term.length, rest + t * term.a_stride, bytes);
        std::memset(row + length, 0, 2 * static_cast<std::size_t>(stride - length));
    }
}

// Elements of the copies of one row of all terms.
int64_t copied_per_row(const rw_term* terms, int count) {
    int64_t elements = 0;
    for (int i = 0; i < count; ++i)
        if (is_copied(terms[i])) elements += padded_stride((terms[i].a_rest ? 2 : 1) * terms[i].length);
    return elements;
}

// Makes terms whose rows tiles can read, and returns how many. An exact term becomes two: all of a times the rounded
// weight, and the rounded a times the weight's rest. The product of both rests is below the precision of float32 sums.
// copy: room for `copied_per_row` elements of each row.
int prepare_for_tiles(const rw_term* terms, int count, int64_t T, int threads, uint16_t* copy, ProductTerm* prepared) {
    int made = 0;
    for (int i = 0; i < count; ++i) {
        const rw_term& term = terms[i];
        ProductTerm& whole = prepared[made++];
        const auto* a = static_cast<const uint16_t*>(term.a);
        const int64_t length = (term.a_rest ? 2 : 1) * term.length;
        const int64_t words = term.eight_bit ? ceil_div(length, 2) : length;
        const int64_t stride = term.eight_bit ? term.a_stride / 2 : term.a_stride;
        whole = {term, a, stride, ceil_div(words, kTileStep), words, term.length, false};
        whole.source.length = length;
        if (is_copied(term)) {
            const int64_t stride = padded_stride(length), per_task = ceil_div(int64_t{1} << 17, stride);
            parallel(ceil_div(T, per_task), threads, [&](int64_t task) {
                copy_rows(term, task * per_task, (task + 1) * per_task < T ? (task + 1) * per_task : T, stride, copy);
            });
            whole.a = copy, whole.a_stride = stride;
            copy += T * stride;
        }
        if (!term.exact) continue;
        // What of a row lies past the term's own length meets zeros of the packed weight.
        ProductTerm& rest = prepared[made++];
        rest = whole;
        rest.source.length = rest.words = term.length;
        rest.steps = ceil_div(term.length, kTileStep), rest.is_rest = true;
    }
    return made;
}

// The terms as the level multiplies them.
int prepare(const rw_term* terms, int count, const ProductLayout& layout, int64_t T, int threads, uint16_t* copy,
            ProductTerm* prepared) {
    if (layout.reads_tiles) return prepare_for_tiles(terms, count, T, threads, copy, prepared);
    for (int i = 0; i < count; ++i) {
        const int64_t length = terms[i].length;
        const auto* a = static_cast<const uint16_t*>(terms[i].a);
        const int64_t step = terms[i].eight_bit ? layout.integer_step : layout.step;
        prepared[i] = {terms[i], a, terms[i].a_stride, ceil_div(length, step), length, length, false};
    }
    return count;
}

// What fits into the cache at once: steps of all terms, and panels.
struct Portion {
    int64_t all_steps = 0, steps, panels;

    Portion(const ProductTerm* terms, int count, const ProductLayout& layout) {
        int64_t elements = 0;
        for (int i = 0; i < count; ++i) all_steps += terms[i].steps, elements += terms[i].source.length;
        const int64_t most = elements > kLong ? kLongSteps : layout.most_steps;
        steps = ceil_div(all_steps, ceil_div(all_steps, most));
        panels = layout.packed_bytes / (steps * layout.panel_step_bytes);
        if (panels < 1) panels = 1;
    }
};

// Parts of the panels: a multiple of the threads, chosen so that no thread ends much later than another.
int64_t panel_parts(int64_t panels, int64_t most, int64_t threads) {
    const int64_t least = ceil_div(ceil_div(panels, most), threads) * threads;
    int64_t best = least, best_load = 0;
    for (int64_t parts = least; parts <= 3 * least && parts <= panels; parts += threads) {
        const int64_t load = parts / threads * ceil_div(panels, parts);
        if (best_load == 0 || load < best_load) best = parts, best_load = load;
    }
    return best < panels ? best : panels;
}

// Rows [first, first + rows) of one group.
struct RowGroup {
    int64_t index, first, rows;
};

std::vector<RowGroup> groups_with_rows(const int64_t* sizes, int64_t groups) {
    std::vector<RowGroup> filled;
    for (int64_t i = 0, first = 0; i < groups; first += sizes[i++])
        if (sizes[i]) filled.push_back({i, first, sizes[i]});
    return filled;
}

}  // namespace

int rankwise::pairs_asked() { return allowed > 1 ? allowed.load() : 0; }

const ProductKernels* rankwise::current_products() { return allowed ? level().products : nullptr; }

extern "C" {

int rw_products_available(void) { return current_products() != nullptr; }

int rw_products_are_tiles(void) { return current_products() != nullptr && current_products()->layout.reads_tiles; }

int rw_products_largest(void) { return current_products() ? current_products()->layout.largest : 0; }

void rw_products_allow(int allow) { allowed = allow; }

void rw_quantize_rows(const void* x, int dtype, int64_t x_stride, const float* factor, int64_t T, int64_t K,
                      uint8_t* q, int64_t q_stride_bytes, float* scale, int dither, int threads) {
    const int64_t per_task = ceil_div(int64_t{1} << 16, K), row_bytes = x_stride * (dtype == RW_FLOAT32 ? 4 : 2);
    parallel(ceil_div(T, per_task), threads, [&](int64_t task) {
        const int64_t t = task * per_task, count = T - t < per_task ? T - t : per_task;
        current_products()->quantize_rows(static_cast<const char*>(x) + t * row_bytes, dtype, x_stride, factor, count,
                                          K, q + t * q_stride_bytes, q_stride_bytes, scale + t, dither ? t : -1);
    });
}

void rw_grouped_quantize_rows(const void* x, int dtype, int64_t x_stride, const float* factor, const int64_t* sizes,
                              int64_t groups, int64_t K, uint8_t* q, int64_t q_stride_bytes, float* scale, int dither,
                              int threads) {
    const std::vector<RowGroup> filled = groups_with_rows(sizes, groups);
    const int64_t row_bytes = x_stride * (dtype == RW_FLOAT32 ? 4 : 2);
    parallel(static_cast<int64_t>(filled.size()), threads, [&](int64_t i) {
        const RowGroup& group = filled[static_cast<std::size_t>(i)];
        current_products()->quantize_rows(static_cast<const char*>(x) + group.first * row_bytes, dtype, x_stride,
                                          factor + group.index * K, group.rows, K, q + group.first * q_stride_bytes,
                                          q_stride_bytes, scale + group.first, dither ? 0 : -1);
    });
}

void rw_products(const rw_term* terms, int count, int dtype, int64_t T, int64_t N, const float* g, const float* bias,
                 void* out, void* rest, int64_t out_stride, int threads) {
    if (T == 0 || N == 0) return;
    threads = threads > 0 ? threads : 1;
    const ProductKernels* kernels = current_products();
    const ProductLayout& layout = kernels->layout;
    struct Owner {};
    uint16_t* copy = layout.reads_tiles ? scratch<Owner, uint16_t, 0>(T * copied_per_row(terms, count)) : nullptr;
    ProductTerm prepared[kMostTerms];
    const int made = prepare(terms, count, layout, T, threads, copy, prepared);
    const Portion at_once(prepared, made, layout);
    const ProductJob job = {prepared, made, at_once.steps, T, N, g, bias, dtype, out, rest, out_stride};
    const int64_t panels = ceil_div(N, kPanel), columns = ceil_div(panels, panel_parts(panels, at_once.panels, threads)),
                  parts = ceil_div(panels, columns);
    int64_t row_parts = at_once.steps == at_once.all_steps ? 1 : ceil_div(T, kKeptRows);
    while (parts * row_parts < threads && T / row_parts > kLeastRows) ++row_parts;
    const int64_t rows = ceil_div(ceil_div(T, row_parts), kRowBlock) * kRowBlock;
    row_parts = ceil_div(T, rows);
    parallel(parts * row_parts, threads, [&](int64_t task) {
        const int64_t part = task % parts, row = task / parts * rows;
        const int64_t last = (part + 1) * columns < panels ? (part + 1) * columns : panels;
        kernels->product(job, {part * columns, last, row, row + rows < T ? row + rows : T});
    });
}

void rw_grouped_products(const rw_term* terms, const int64_t* apart, int count, const int64_t* sizes, int64_t groups,
                         int dtype, int64_t N, const float* bias, void* out, int64_t out_stride, int threads) {
    struct Owner {};
    const ProductKernels* kernels = current_products();
    const ProductLayout& layout = kernels->layout;
    const std::vector<RowGroup> filled = groups_with_rows(sizes, groups);
    if (filled.empty() || N == 0) return;
    const int64_t size = dtype == RW_FLOAT32 ? 4 : 2, copied = layout.reads_tiles ? copied_per_row(terms, count) : 0;
    uint16_t* copy = scratch<Owner, uint16_t, 0>((filled.back().first + filled.back().rows) * copied);
    std::vector<ProductTerm> prepared(filled.size() * static_cast<std::size_t>(2 * count));
    std::vector<rw_eight_bit> scales(filled.size() * static_cast<std::size_t>(count));
    std::vector<ProductJob> jobs(filled.size());
    parallel(static_cast<int64_t>(filled.size()), threads, [&](int64_t i) {
        const RowGroup& group = filled[static_cast<std::size_t>(i)];
        rw_term own[kMostTerms / 2];
        for (int j = 0; j < count; ++j) {
            own[j] = terms[j];
            const bool is_bytes = terms[j].eight_bit && layout.largest <= kLargestByte;
            const int64_t a_size = is_bytes ? 1 : terms[j].eight_bit ? 2 : size, before = group.index * apart[j];
            own[j].a = static_cast<const char*>(terms[j].a) + group.first * terms[j].a_stride * a_size;
            if (own[j].packed) own[j].w_first += before;
            else own[j].w = static_cast<const char*>(terms[j].w) + before * (terms[j].w_dtype == RW_FLOAT32 ? 4 : 2);
            if (!terms[j].eight_bit) continue;
            rw_eight_bit& mine = scales[static_cast<std::size_t>(count * i + j)];
            mine = *terms[j].eight_bit;
            mine.a_scale += group.first;
            mine.by_row += group.index * (terms[j].across ? terms[j].length : N);
            if (!terms[j].across) mine.out_scale += group.index * N;
            own[j].eight_bit = &mine;
        }
        ProductTerm* mine = &prepared[static_cast<std::size_t>(2 * count * i)];
        const int made = prepare(own, count, layout, group.rows, 1, copy + group.first * copied, mine);
        jobs[static_cast<std::size_t>(i)] = {mine, made, 0, group.rows, N, nullptr, bias ? bias + group.index * N : nullptr,
                                             dtype, static_cast<char*>(out) + group.first * out_stride * size, nullptr,
                                             out_stride};
    });
    const Portion at_once(jobs[0].terms, jobs[0].count, layout);
    const int64_t panels = ceil_div(N, kPanel), columns = ceil_div(panels, ceil_div(panels, at_once.panels)),
                  parts = ceil_div(panels, columns);
    parallel(static_cast<int64_t>(filled.size()) * parts, threads, [&](int64_t task) {
        ProductJob job = jobs[static_cast<std::size_t>(task / parts)];
        job.steps_at_once = at_once.steps;
        const int64_t first = task % parts * columns, last = first + columns < panels ? first + columns : panels;
        for (int64_t row = 0; row < job.T; row += kKeptRows)
            kernels->product(job, {first, last, row, row + kKeptRows < job.T ? row + kKeptRows : job.T});
    });
}

void rw_row_product(int dtype, const void* q, int64_t q_stride, const void* m, int64_t m_stride, const void* y,
                    int64_t y_stride, int64_t T, int64_t R, int64_t C, float scale, const float* gain, int by_column,
                    void* out, int out_dtype, const float* divisor, float* dot, int threads) {
    struct Owner {};
    const int64_t chunks = ceil_div(T, kChunkRows), ranks = ceil_div(R, 16) * 16, parts = ceil_div(C, kChunkColumns);
    float* sums = scratch<Owner, float, 0>(chunks * ranks * C);
    float* dots = dot ? scratch<Owner, float, 1>(chunks * C) : nullptr;
    const RowProductJob job = {dtype, q,    q_stride, m,    m_stride,  y,         y_stride, T,       R,  C,
                               sums,  dots, scale,    gain, by_column, out_dtype, out,      divisor, dot};
    const ProductKernels* kernels = current_products();
    const auto last_of = [&](int64_t part) { return (part + 1) * kChunkColumns < C ? (part + 1) * kChunkColumns : C; };
    parallel(chunks * parts, threads, [&](int64_t task) {
        const int64_t part = task % parts;
        kernels->row_product(job, task / parts, part * kChunkColumns, last_of(part));
    });
    parallel(parts, threads,
             [&](int64_t part) { kernels->finish_row_product(job, part * kChunkColumns, last_of(part)); });
}

void rw_grouped_row_product(int dtype, const void* q, int64_t q_stride, const void* m, int64_t m_stride,
                            const int64_t* sizes, int64_t groups, int64_t R, int64_t C, float scale, int by_column,
                            void* out, int out_dtype, int threads) {
    const ProductKernels* kernels = current_products();
    const int64_t size = dtype == RW_FLOAT32 ? 4 : 2, out_bytes = R * C * (out_dtype == RW_FLOAT32 ? 4 : 2);
    const int64_t ranks = ceil_div(R, 16) * 16, parts = ceil_div(C, kChunkColumns);
    const std::vector<RowGroup> filled = groups_with_rows(sizes, groups);
    parallel(static_cast<int64_t>(filled.size()) * parts, threads, [&](int64_t task) {
        struct Owner {};
        const RowGroup& group = filled[static_cast<std::size_t>(task / parts)];
        const int64_t chunks = ceil_div(group.rows, kChunkRows), first = task % parts * kChunkColumns,
                      last = first + kChunkColumns < C ? first + kChunkColumns : C;
        const RowProductJob job = {dtype,
                                   static_cast<const char*>(q) + group.first * q_stride * size,
                                   q_stride,
                                   static_cast<const char*>(m) + group.first * m_stride * size,
                                   m_stride,
                                   nullptr,
                                   0,
                                   group.rows,
                                   R,
                                   C,
                                   scratch<Owner, float, 0>(chunks * ranks * C),
                                   nullptr,
                                   scale,
                                   nullptr,
                                   by_column,
                                   out_dtype,
                                   static_cast<char*>(out) + group.index * out_bytes,
                                   nullptr,
                                   nullptr};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) kernels->row_product(job, chunk, first, last);
        kernels->finish_row_product(job, first, last);
    });
}

}  // extern "C"
