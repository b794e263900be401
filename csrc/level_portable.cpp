#include "isa_portable.hpp"
#include "level.hpp"

namespace rankwise {
const Kernels* portable_kernels() { return kernels_of<Portable>(); }
}  // namespace rankwise
