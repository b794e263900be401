// AMX: eight tiles of 16 rows of 64 bytes. Only for files that are compiled with it.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace rankwise {

// Whether the processor has the instructions and the system gives this process their registers.
static inline bool amx_is_usable() {
    constexpr long request_permission = 0x1023, tile_data = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned needed = (1u << 22) | (1u << 24);  // AMX-BF16, AMX-TILE
    return (d & needed) == needed && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// All tiles at their full size; released so that whoever else uses tiles on this thread finds none configured.
class Amx {
public:
    Amx() {
        alignas(64) unsigned char config[64] = {};
        config[0] = 1;
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        _tile_loadconfig(config);
    }
    ~Amx() { _tile_release(); }
    Amx(const Amx&) = delete;
    Amx& operator=(const Amx&) = delete;
};

}  // namespace rankwise
