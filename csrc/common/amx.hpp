// AMX: eight tiles of 16 rows of 64 bytes. Only for files that are compiled with it.
#pragma once

#include <immintrin.h>

namespace rankwise::RW_ISA {

// Configures all tiles at their full size, and releases them so that other users of tiles on this thread find none.
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

}  // namespace rankwise::RW_ISA
