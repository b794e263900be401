// Attention's kernels of one instruction set.
#include "attention/kernels.hpp"

#if defined(__AMX_TILE__)
#include "attention/amx.hpp"
#elif defined(__AVX512BF16__)
#include "attention/backward.hpp"
#else
#include "attention/float.hpp"
#endif

namespace rankwise::RW_ISA {

extern const AttentionKernels attention;

#if defined(__AMX_TILE__)
static void forward_amx(const AttentionForward& call, const AttentionShare& share) {
    const Amx tiles;
    forward<forward_tile_amx>(call, share);
}

static void backward_amx(const AttentionBackward& call, const AttentionShare& share, float* sums) {
    const Amx tiles;
    backward<backward_tile_amx>(call, share, sums);
}

constexpr AttentionKernels attention = {forward_amx, backward_amx, sums_size, finish, false};
#elif defined(__AVX512BF16__)
constexpr AttentionKernels attention = {forward<forward_tile>, backward<backward_tile>, sums_size, finish, false};
#else
constexpr AttentionKernels attention = {forward_float, backward_float, sums_size_float, finish_float, true};
#endif

}  // namespace rankwise::RW_ISA
