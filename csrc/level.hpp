// All kernel families of one instruction set, as the table that native.cpp calls through.
#pragma once

#include "linear.hpp"
#include "quantize.hpp"
#include "row_norms.hpp"

namespace rankwise {

template <class Isa, int D>
static void arrange_as(const void* x, int64_t T, int64_t K, int64_t k, int64_t count, void* out) {
    for (int64_t t = 0; t < T; ++t) {
        if (D == RW_FLOAT32 || (D == RW_BFLOAT16 && Isa::multiplies_bfloat16)) {
            const std::size_t size = D == RW_FLOAT32 ? 4 : 2, bytes = static_cast<std::size_t>(count) * size;
            std::memcpy(static_cast<char*>(out) + static_cast<std::size_t>(t) * bytes,
                        static_cast<const char*>(x) + static_cast<std::size_t>(t * K + k) * size, bytes);
        } else {
            for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[t * count + i] = load_as_float<D>(x, t * K + k + i);
        }
    }
}

template <class Isa>
static void arrange(const void* x, int dtype, int64_t T, int64_t K, int64_t k, int64_t count, void* out) {
    switch (dtype) {
        case RW_FLOAT32: return arrange_as<Isa, RW_FLOAT32>(x, T, K, k, count, out);
        case RW_BFLOAT16: return arrange_as<Isa, RW_BFLOAT16>(x, T, K, k, count, out);
        default: return arrange_as<Isa, RW_FLOAT16>(x, T, K, k, count, out);
    }
}

template <class Isa>
static const Kernels* kernels_of() {
    static const Kernels kernels = {quantize<Isa>, dequantize<Isa>,          linear<Isa>,     row_norms<Isa>,
                                    arrange<Isa>,  Isa::multiplies_bfloat16, Isa::fused_rows};
    return &kernels;
}

}  // namespace rankwise
