#include "training_level.hpp"

namespace rankwise {
const TrainingKernels* portable_training() { return &kTraining; }
}  // namespace rankwise
