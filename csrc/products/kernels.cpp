// The sums of products of one instruction set.
#include "products/kernels.hpp"

#if defined(__AMX_TILE__)
#include "products/amx.hpp"
#include "products/few_rows_amx.hpp"
#elif defined(__AVX512BF16__)
#include "products/avx512_bf16.hpp"
#else
#include "products/float.hpp"
#endif

namespace rankwise::RW_ISA {

extern const ProductKernels products;

#if defined(__AMX_TILE__)
constexpr ProductKernels products = {product_of_pairs<TileUnit>,
                                     row_product_of_pairs<TileUnit>,
                                     finish_row_product_of_pairs,
                                     {kTileStep, 20, 4 * kStepWords, int64_t{640} << 10, true, kLargestByte, kByteStep},
                                     quantize_rows,
                                     few_rows_amx,
                                     pack_few_rows_amx};
#elif defined(__AVX512BF16__)
// Long sums stay in registers: taking them to memory and back every 20 steps, as AMX does, made products of 1,536
// elements 7 % slower.
constexpr ProductLayout layout = {kTileStep,           128,  4 * kStepWords,
                                  int64_t{512} << 10, true, kLargestByte,   kByteStep};
constexpr ProductKernels products = {product_of_vectors, row_product_of_vectors,
                                     finish_row_product_of_pairs, layout, quantize_rows};
#else
constexpr ProductLayout layout = {kFloatStep,           80,    4 * kFloatStep* kPanel,
                                  int64_t{256} << 10, false, Integers::kLargest,   kStepIntegers};
constexpr ProductKernels products = {product_float, row_product_float, finish_row_product_float, layout,
                                     quantize_integer_rows};
#endif

}  // namespace rankwise::RW_ISA
