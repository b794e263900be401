// Compiled with AVX-512 BF16 and AMX; empty for other targets.
#include "products.hpp"

#if defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include "products_amx.hpp"
#include "few_rows_amx.hpp"

namespace rankwise {

const ProductKernels* products_amx() {
    static const ProductKernels kernels = {product_of_pairs<TileUnit>, row_product_of_pairs<TileUnit>, finish_row_product_of_pairs,
                                           few_rows_amx, pack_few_rows_amx,
                                           {kStep, 20, 4 * kStepWords, int64_t{640} << 10, true}};
    static const bool is_usable = amx_is_usable();
    return is_usable ? &kernels : nullptr;
}

}  // namespace rankwise
#else
namespace rankwise {
const ProductKernels* products_amx() { return nullptr; }
}  // namespace rankwise
#endif
