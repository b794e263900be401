// Compiled with -mavx2 -mfma -mf16c; empty for other targets.
#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx2.hpp"
#include "level.hpp"

namespace rankwise {
const Kernels* avx2_kernels() { return kernels_of<Avx2>(); }
}  // namespace rankwise
#else
namespace rankwise {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace rankwise
#endif
