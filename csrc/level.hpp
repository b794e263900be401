// All kernel families of one instruction set, as the table that native.cpp calls through.
#pragma once

#include "linear.hpp"
#include "quantize.hpp"
#include "row_norms.hpp"

namespace rankwise {

template <int D, class Element>
static Element as_element(const void* x, int64_t i) {
    if constexpr (sizeof(Element) == 2) {
        return static_cast<const uint16_t*>(x)[i];
    } else {
        return load_as_float<D>(x, i);
    }
}

template <int D, class Element>
static void arrange_as(const void* x, int64_t T, int64_t K, int64_t k, int64_t count, int64_t group, Element* out) {
    for (int64_t t = 0; t < T; ++t) {
        const int64_t first = t * K + k;
        if (group == 0) {
            for (int64_t i = 0; i < count; ++i) *out++ = as_element<D, Element>(x, first + i);
            continue;
        }
        for (int64_t g = 0; g < count; g += group, out += group)
            for (int64_t i = 0; i < group / 2; ++i) {
                out[i] = as_element<D, Element>(x, first + g + 2 * i);
                out[group / 2 + i] = as_element<D, Element>(x, first + g + 2 * i + 1);
            }
    }
}

template <class Isa>
static void arrange(const void* x, int dtype, int64_t T, int64_t K, int64_t k, int64_t count, int64_t group, void* out) {
    using Bfloat16 = typename decltype(bfloat16_lane<Isa>())::Element;
    switch (dtype) {
        case RW_FLOAT32: return arrange_as<RW_FLOAT32>(x, T, K, k, count, group, static_cast<float*>(out));
        case RW_BFLOAT16: return arrange_as<RW_BFLOAT16>(x, T, K, k, count, group, static_cast<Bfloat16*>(out));
        default: return arrange_as<RW_FLOAT16>(x, T, K, k, count, group, static_cast<float*>(out));
    }
}

template <class Isa>
static const Kernels* kernels_of() {
    static const Kernels kernels = {quantize<Isa>, dequantize<Isa>, linear<Isa>,
                                    row_norms<Isa>, arrange<Isa>, group_of<Isa>,
                                    Isa::multiplies_bfloat16, Isa::fused_rows};
    return &kernels;
}

}  // namespace rankwise
