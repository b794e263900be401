// Compiled as level_avx512_bf16.cpp; empty for other targets.
#include "products.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include "products_avx512_bf16.hpp"

namespace rankwise {

const ProductKernels* products_avx512_bf16() {
    // Long sums stay in registers: taking them to memory and back every 20 steps, as AMX does, made products of 1,536 elements 7 % slower.
    static const ProductKernels kernels = {product_of_pairs<VectorUnit>, row_product_of_pairs<VectorUnit>, finish_row_product_of_pairs,
                                           nullptr, nullptr,
                                           {kStep, 128, 4 * kStepWords, int64_t{512} << 10, true}};
    return &kernels;
}

}  // namespace rankwise
#else
namespace rankwise {
const ProductKernels* products_avx512_bf16() { return nullptr; }
}  // namespace rankwise
#endif
