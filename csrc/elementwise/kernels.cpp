// The element-wise kernels of one instruction set.
#include "elementwise/kernels.hpp"

#include "elementwise/cross_entropy.hpp"
#include "elementwise/dropout.hpp"
#include "elementwise/glu.hpp"
#include "elementwise/low_rank.hpp"
#include "elementwise/rms_norm.hpp"
#include "elementwise/rope.hpp"
#include "elementwise/row_cross.hpp"
#include "elementwise/scaled_grad.hpp"

namespace rankwise::RW_ISA {

extern const ElementwiseKernels elementwise;

constexpr ElementwiseKernels elementwise = {
    low_rank_packed_size, low_rank_pack, low_rank_add, scaled_grad, rms_norm, rms_norm_backward, glu, rope,
    cross_entropy,        dropout,       row_cross};

}  // namespace rankwise::RW_ISA
