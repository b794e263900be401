// Numbers in [-1, 1), the same in every run, for what the sanitizers run.
#pragma once

#include <cstdint>

namespace {

uint32_t state = 1;

float next_float() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

}  // namespace
