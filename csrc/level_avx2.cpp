// Compiled with -mavx2 -mfma -mf16c; empty for other targets.
#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx2.hpp"
#include "level.hpp"
#include "one_row_avx2.hpp"

namespace rankwise {

const Kernels* avx2_kernels() {
    static const Kernels kernels = [] {
        Kernels with_one_row = *kernels_of<Avx2>();
        with_one_row.one_row = one_row<Avx2>, with_one_row.arrange_one_row = arrange_one_row;
        return with_one_row;
    }();
    return &kernels;
}

}  // namespace rankwise
#else
namespace rankwise {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace rankwise
#endif
