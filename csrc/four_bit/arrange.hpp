// Rows of x in the order in which `linear` reads them.
#pragma once

#include "four_bit/linear.hpp"

namespace rankwise::RW_ISA {

template <int D, class Element>
static Element as_element(const void* x, int64_t i) {
    if constexpr (sizeof(Element) == 2) {
        return static_cast<const uint16_t*>(x)[i];
    } else {
        return load_as_float<D>(x, i);
    }
}

// The group is a constant here, so that the compiler puts its elements in order with vector instructions.
template <class Isa, class Lane, int D>
static void arrange_as(const void* x, int64_t T, int64_t K, int64_t k, int64_t count, bool apart, void* to) {
    using Element = typename Lane::Element;
    constexpr int64_t group = group_size<Isa, Lane, D>();
    auto* out = static_cast<Element*>(to);
    for (int64_t t = 0; t < T; ++t) {
        const int64_t first = t * K + k;
        if (!apart) {
            for (int64_t i = 0; i < count; ++i) *out++ = as_element<D, Element>(x, first + i);
            continue;
        }
        for (int64_t g = 0; g < count; g += group, out += group)
            for (int i = 0; i < group; ++i)
                out[i] = as_element<D, Element>(x, first + g + Isa::template element_at<group>(i));
    }
}

template <class Isa>
static void arrange(const void* x, int dtype, int64_t T, int64_t K, int64_t k, int64_t count, bool apart, void* out) {
    switch (dtype) {
        case RW_FLOAT32: return arrange_as<Isa, typename Isa::FloatLane, RW_FLOAT32>(x, T, K, k, count, apart, out);
        case RW_BFLOAT16:
            return arrange_as<Isa, decltype(bfloat16_lane<Isa>()), RW_BFLOAT16>(x, T, K, k, count, apart, out);
        default: return arrange_as<Isa, typename Isa::FloatLane, RW_FLOAT16>(x, T, K, k, count, apart, out);
    }
}

}  // namespace rankwise::RW_ISA
