// Compiled with the options of level_avx2.cpp; empty for other targets.
#include "products.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "products_float.hpp"

namespace rankwise {

const ProductKernels* products_avx2() {
    static const ProductKernels kernels = {product_float, row_product_float, finish_row_product_float, nullptr, nullptr,
                                           {kFloatStep, 80, 4 * kFloatStep * kPanel, int64_t{256} << 10, false}};
    return &kernels;
}

}  // namespace rankwise
#else
namespace rankwise {
const ProductKernels* products_avx2() { return nullptr; }
}  // namespace rankwise
#endif
