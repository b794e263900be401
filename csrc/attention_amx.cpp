// Compiled with AVX-512 BF16 and AMX; empty for other targets.
#include "attention.hpp"

#if defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include "attention_amx.hpp"

namespace rankwise {
namespace {

void forward_amx(const AttentionForward& call, const AttentionShare& share) {
    const Amx tiles;
    forward<forward_tile_amx>(call, share);
}

void backward_amx(const AttentionBackward& call, const AttentionShare& share, float* sums) {
    const Amx tiles;
    backward<backward_tile_amx>(call, share, sums);
}

}  // namespace

const AttentionKernels* attention_amx() {
    static const AttentionKernels kernels = {forward_amx, backward_amx, sums_size, finish};
    static const bool is_usable = amx_is_usable();
    return is_usable ? &kernels : nullptr;
}
}  // namespace rankwise
#else
namespace rankwise {
const AttentionKernels* attention_amx() { return nullptr; }
}  // namespace rankwise
#endif
