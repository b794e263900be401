// Compiled with the options of level_avx512.cpp; empty for other targets.
#include "training.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "training_level.hpp"

namespace rankwise {
const TrainingKernels* avx512_training() { return &kTraining; }
}  // namespace rankwise
#else
namespace rankwise {
const TrainingKernels* avx512_training() { return nullptr; }
}  // namespace rankwise
#endif
