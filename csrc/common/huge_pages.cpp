#include <cstdint>

#include "rankwise_native.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

extern "C" void rw_use_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}
