// Rounding between float and the 16-bit types, to nearest even, as torch does. The functions have internal linkage, so
// that each instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "rankwise_native.h"

namespace rankwise {

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

static inline uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return sign | 0x7e00;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds past 65504
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the result, rounded to nearest even by the hardware, in the low bits.
        return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
    }
    return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

static inline float from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
    return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

template <int D>
static inline float load_as_float(const void* data, int64_t i) {
    if (D == RW_FLOAT32) return static_cast<const float*>(data)[i];
    const uint16_t half = static_cast<const uint16_t*>(data)[i];
    return D == RW_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

template <int D>
static inline void store_float(void* data, int64_t i, float value) {
    if (D == RW_FLOAT32) {
        static_cast<float*>(data)[i] = value;
    } else {
        static_cast<uint16_t*>(data)[i] = D == RW_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
    }
}

// The nearest number of type D.
template <int D>
static inline float rounded(float value) {
    if (D == RW_BFLOAT16) return from_bfloat16(to_bfloat16(value));
    if (D == RW_FLOAT16) return from_float16(to_float16(value));
    return value;
}

}  // namespace rankwise
