// The kernels of all families for the instruction set in use.
#pragma once

#include "attention/kernels.hpp"
#include "elementwise/kernels.hpp"
#include "four_bit/kernels.hpp"
#include "products/kernels.hpp"

namespace rankwise {

struct Level {
    const FourBitKernels* four_bit;
    const ElementwiseKernels* elementwise;
    // The others are null where a level has none. On AMX: for heads whose size is a multiple of 32.
    const AttentionKernels *attention, *attention_on_amx;
    const ProductKernels* products;
};

// That of rw_level().
const Level& level();

}  // namespace rankwise
