// The terms of a sum of products in float32 or in integers: what is read of them, and how a result is written.
#pragma once

#include "common/vector.hpp"
#include "products/integers.hpp"

namespace rankwise::RW_ISA {
namespace {

constexpr int64_t kFloatStep = 8;

// The part of a term within the steps that are multiplied at once, in elements that are summed over: [from, to) of the
// term. In the packed strips it begins at word `at`: a float, or some integers.
struct Segment {
    const rw_term* term;
    int64_t from, to, at;
};

struct Segments {
    Segment of[kMostTerms];
    int integers = 0;  // the first of them
    int count = 0;
    int64_t integer_words = 0, words = 0;

    // Steps [first, last) of all steps of the job.
    Segments(const ProductJob& job, int64_t first, int64_t last) {
        int64_t begin = 0;
        for (int i = 0; i < job.count; begin += job.terms[i].steps, ++i) {
            const ProductTerm& term = job.terms[i];
            const int64_t from = first > begin ? first - begin : 0,
                          to = last - begin < term.steps ? last - begin : term.steps;
            if (from >= to) continue;
            const bool is_float = !term.source.eight_bit;
            const int64_t step = is_float ? kFloatStep : kStepIntegers;
            const int64_t end = to * step < term.source.length ? to * step : term.source.length;
            of[count++] = {&term.source, from * step, end, words};
            words += is_float ? end - from * step : (end - from * step) / Integers::kPerWord;
            if (!is_float) integers = count, integer_words = words;
        }
    }
};

// Elements [column, column + count) of a row of the weight, times scale and gain. Of 4 bits it is rounded to D.
template <int D>
void fetch_floats(const rw_term& term, int64_t row, int64_t column, int64_t count, float* out) {
    const int64_t at = row * term.w_stride + column;
    const bool scaled = term.gain || term.scale != 1.0f;
    if (term.packed) decode<Avx2, D>(*term.packed, term.w_first + at, count, out);
    const Floats scale = all(term.across && term.gain ? term.scale * term.gain[row] : term.scale);
    const float* gain = term.across ? nullptr : term.gain;
    if (term.packed && !scaled) return;
    each_vector(count, [&](int64_t i, auto part) RW_INLINED {
        Floats w = term.packed                   ? load<RW_FLOAT32>(out, i, part)
                   : term.w_dtype == RW_BFLOAT16 ? load<RW_BFLOAT16>(term.w, at + i, part)
                                                 : load<RW_FLOAT32>(term.w, at + i, part);
        if (scaled) w *= gain ? scale * load<RW_FLOAT32>(gain, column + i, part) : scale;
        store<RW_FLOAT32>(out, i, w, part);
    });
}

// Rows [row, row + count) of a, widened, with what their rounding left; those of integers stay as they are.
template <int D>
void widen_rows(const Segments& segments, int64_t row, int64_t count, float* out, int64_t stride) {
    for (int64_t r = 0; r < count; ++r, out += stride)
        for (int i = segments.integers; i < segments.count; ++i) {
            const Segment& segment = segments.of[i];
            const int64_t at = (row + r) * segment.term->a_stride + segment.from;
            const void *a = segment.term->a, *rest = segment.term->a_rest;
            each_vector(segment.to - segment.from, [&](int64_t k, auto part) RW_INLINED {
                Floats x = load<D>(a, at + k, part);
                if (rest) x += load<D>(rest, at + k, part);
                store<RW_FLOAT32>(out + segment.at - segments.integer_words, k, x, part);
            });
        }
}

template <int D, class Part>
RW_INLINE void store_product(const ProductJob& job, int64_t at, int64_t n, Floats sum, Part part) {
    const Floats g = job.g ? load<RW_FLOAT32>(job.g, n, part) : all(1.0f),
                 bias = job.bias ? load<RW_FLOAT32>(job.bias, n, part) : Floats{};
    const Floats value = madd(sum, g, bias);
    store<D>(job.out, at, value, part);
    if (job.rest) store<D>(job.rest, at, value - rounded_to<D>(value), part);
}

}  // namespace
}  // namespace rankwise::RW_ISA
