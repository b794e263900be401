// All element-wise kernel families at the instruction set that the including file is compiled for.
#pragma once

#include "cross_entropy.hpp"
#include "dropout.hpp"
#include "glu.hpp"
#include "low_rank.hpp"
#include "rms_norm.hpp"
#include "rope.hpp"
#include "row_cross.hpp"
#include "scaled_grad.hpp"

namespace rankwise {
namespace {

const TrainingKernels kTraining = {low_rank_packed_size, low_rank_pack,     low_rank_add, scaled_grad,   rms_norm,
                                   rms_norm_backward,    glu,               rope,         cross_entropy, dropout,
                                   row_cross};

}  // namespace
}  // namespace rankwise
