// The 4-bit kernels of one instruction set.
#include "four_bit/kernels.hpp"

#include "four_bit/arrange.hpp"
#include "four_bit/linear.hpp"
#include "four_bit/quantize.hpp"
#include "four_bit/row_norms.hpp"

#if defined(__AVX512F__)
#include "four_bit/isa_avx512.hpp"
#elif defined(__AVX2__)
#include "four_bit/isa_avx2.hpp"
#include "four_bit/one_row_avx2.hpp"
#else
#include "four_bit/isa_portable.hpp"
#endif

namespace rankwise::RW_ISA {

extern const FourBitKernels four_bit;

#if defined(__AVX512F__)
using Isa = Avx512;
#elif defined(__AVX2__)
using Isa = Avx2;
#else
using Isa = Portable;
#endif

constexpr FourBitKernels four_bit = {
    quantize<Isa>, dequantize<Isa>,          linear<Isa>,     row_norms<Isa>, arrange<Isa>,
    group_of<Isa>, Isa::multiplies_bfloat16, Isa::fused_rows,
#if defined(__AVX2__) && !defined(__AVX512F__)
    one_row<Isa>,  arrange_one_row,
#else
    nullptr,
    nullptr,
#endif
};

}  // namespace rankwise::RW_ISA
