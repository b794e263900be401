// Compiled as level_avx512_bf16.cpp is; empty for other targets.
#include "attention.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include "attention_backward.hpp"

namespace rankwise {
const AttentionKernels* attention_avx512_bf16() {
    static const AttentionKernels kernels = {forward<forward_tile>, backward<backward_tile>, sums_size, finish};
    return &kernels;
}
}  // namespace rankwise
#else
namespace rankwise {
const AttentionKernels* attention_avx512_bf16() { return nullptr; }
}  // namespace rankwise
#endif
