// Compiled as level_avx512.cpp and with -mavx512bf16; empty for other targets.
#include "kernels.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include "isa_avx512.hpp"
#include "level.hpp"

namespace rankwise {
const Kernels* avx512_bf16_kernels() { return kernels_of<Avx512<true>>(); }
}  // namespace rankwise
#else
namespace rankwise {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace rankwise
#endif
