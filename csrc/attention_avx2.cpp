// Compiled with the options of level_avx2.cpp; empty for other targets.
#include "attention.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "attention_float.hpp"

namespace rankwise {
const AttentionKernels* attention_avx2() {
    static const AttentionKernels kernels = {forward_float, backward_float, sums_size_float, finish_float};
    return &kernels;
}
}  // namespace rankwise
#else
namespace rankwise {
const AttentionKernels* attention_avx2() { return nullptr; }
}  // namespace rankwise
#endif
