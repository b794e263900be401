// Compiled with the options of level_avx512_bf16.cpp; empty for other targets.
#include "training.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#include "training_level.hpp"

namespace rankwise {
const TrainingKernels* avx512_bf16_training() { return &kTraining; }
}  // namespace rankwise
#else
namespace rankwise {
const TrainingKernels* avx512_bf16_training() { return nullptr; }
}  // namespace rankwise
#endif
