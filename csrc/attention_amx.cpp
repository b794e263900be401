// Compiled with AVX-512 BF16 and AMX; empty for other targets.
#include "attention.hpp"

#if defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attention_amx.hpp"

namespace rankwise {
namespace {

constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

// Whether the processor has the instructions and the system gives this process their registers.
bool usable() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned needed = (1u << 22) | (1u << 24);  // AMX-BF16, AMX-TILE
    return (d & needed) == needed && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

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
    static const bool is_usable = usable();
    return is_usable ? &kernels : nullptr;
}
}  // namespace rankwise
#else
namespace rankwise {
const AttentionKernels* attention_amx() { return nullptr; }
}  // namespace rankwise
#endif
