// All kernel families of one instruction set, as the table that native.cpp calls through.
#pragma once

#include "linear.hpp"
#include "quantize.hpp"
#include "row_norms.hpp"

namespace rankwise {

template <class Isa>
static void widen(const void* in, int dtype, int64_t count, float* out) {
    if (dtype == RW_BFLOAT16) {
        for (int64_t i = 0; i < count; ++i) out[i] = load_as_float<RW_BFLOAT16>(in, i);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = load_as_float<RW_FLOAT16>(in, i);
    }
}

template <class Isa>
static const Kernels* kernels_of() {
    static const Kernels kernels = {quantize<Isa>,  dequantize<Isa>, linear<Isa>,
                                    row_norms<Isa>, widen<Isa>,      Isa::multiplies_bfloat16};
    return &kernels;
}

}  // namespace rankwise
