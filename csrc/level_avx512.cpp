// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl; empty for other targets.
#include "kernels.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "isa_avx512.hpp"
#include "level.hpp"

namespace rankwise {
const Kernels* avx512_kernels() { return kernels_of<Avx512<false>>(); }
}  // namespace rankwise
#else
namespace rankwise {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace rankwise
#endif
