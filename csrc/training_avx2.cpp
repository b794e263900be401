// Compiled with the options of level_avx2.cpp; empty for other targets.
#include "training.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "training_level.hpp"

namespace rankwise {
const TrainingKernels* avx2_training() { return &kTraining; }
}  // namespace rankwise
#else
namespace rankwise {
const TrainingKernels* avx2_training() { return nullptr; }
}  // namespace rankwise
#endif
