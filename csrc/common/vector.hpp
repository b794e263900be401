// Vectors of floats as wide as the level's registers, in GCC's and Clang's vector notation, with conversions from and
// to bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common/convert.hpp"
#include "common/inline.hpp"

namespace rankwise::RW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

// How much of a vector a row still fills.
struct Whole {};
struct Some {
    int count;
};

RW_INLINE Floats all(float value) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_set1_ps(value));
#elif defined(__AVX2__)
    return reinterpret_cast<Floats>(_mm256_set1_ps(value));
#else
    return Floats{value, value, value, value};
#endif
}

RW_INLINE Words all(uint32_t value) { return reinterpret_cast<Words>(all(float_of(value))); }

using rankwise::bits_of;

RW_INLINE Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }

RW_INLINE Floats floats_of(Words x) { return reinterpret_cast<Floats>(x); }

// a * b + c, rounded once where the level can.
RW_INLINE Floats madd(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
    return reinterpret_cast<Floats>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// a > b ? a : b and a < b ? a : b, so b where one of them is NaN.
RW_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Floats>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}

RW_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Floats>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a < b ? a : b;
#endif
}

// 1 / x for x from 1 on. On AVX-512 an estimate of 14 bits and one step of Newton's, several times faster than the
// division.
RW_INLINE Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
    const Floats estimate = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
    return madd(estimate, madd(-x, estimate, all(1.0f)), estimate);
#else
    return 1.0f / x;
#endif
}

// x * 2^n for an integer n in [-126, 127], given as n + 1.5 * 2^23.
RW_INLINE Floats times_power(Floats x, Floats shifted) {
#if defined(__AVX512F__)
    const Floats n = shifted - 12582912.0f;
    return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
#else
    return x * floats_of((bits_of(shifted) + 127u) << 23);
#endif
}

// In intrinsics, because GCC 12 puts a 512-bit conversion together from halves.
RW_INLINE Floats widened(Halves x) {
#if defined(__AVX512F__)
    return floats_of(reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x))) << 16);
#else
    return floats_of(__builtin_convertvector(x, Words) << 16);
#endif
}

// Rounded to nearest even. AVX512_BF16 turns subnormal numbers to zero, as its products do.
RW_INLINE Halves narrowed(Floats x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const Words bits = bits_of(x), half_up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words half = x == x ? half_up : all(0x7fc0u);
#if defined(__AVX512F__)
    return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(half)));
#else
    return __builtin_convertvector(half, Halves);
#endif
#endif
}

template <int D>
RW_INLINE Floats load(const void* data, int64_t i, Whole = {}) {
    if constexpr (D == RW_FLOAT32) {
        Floats x;
        std::memcpy(&x, static_cast<const float*>(data) + i, sizeof(x));
        return x;
    } else {
        Halves x;
        std::memcpy(&x, static_cast<const uint16_t*>(data) + i, sizeof(x));
        return widened(x);
    }
}

// Lanes past the count are zero.
template <int D>
RW_INLINE Floats load(const void* data, int64_t i, Some some) {
    if constexpr (D == RW_FLOAT32) {
        Floats x = {};
        std::memcpy(&x, static_cast<const float*>(data) + i, sizeof(float) * static_cast<std::size_t>(some.count));
        return x;
    } else {
        Halves x = {};
        std::memcpy(&x, static_cast<const uint16_t*>(data) + i,
                    sizeof(uint16_t) * static_cast<std::size_t>(some.count));
        return widened(x);
    }
}

template <int D>
RW_INLINE void store(void* data, int64_t i, Floats x, Whole = {}) {
    if constexpr (D == RW_FLOAT32) {
        std::memcpy(static_cast<float*>(data) + i, &x, sizeof(x));
    } else {
        const Halves half = narrowed(x);
        std::memcpy(static_cast<uint16_t*>(data) + i, &half, sizeof(half));
    }
}

template <int D>
RW_INLINE void store(void* data, int64_t i, Floats x, Some some) {
    if constexpr (D == RW_FLOAT32) {
        std::memcpy(static_cast<float*>(data) + i, &x, sizeof(float) * static_cast<std::size_t>(some.count));
    } else {
        const Halves half = narrowed(x);
        std::memcpy(static_cast<uint16_t*>(data) + i, &half, sizeof(uint16_t) * static_cast<std::size_t>(some.count));
    }
}

// Past the caches, where `i` is a multiple of a vector and the data are aligned to 64 bytes: reading each line of a
// large result before it is overwritten costs more than it saves. After the last one, `fence`.
template <int D>
RW_INLINE void store_past(void* data, int64_t i, Floats x, Whole whole = {}) {
#if defined(__AVX512F__)
    if constexpr (D == RW_BFLOAT16) {
        const Halves half = narrowed(x);
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + i),
                                   reinterpret_cast<__m256i>(half));
    }
#endif
    store<D>(data, i, x, whole);
}

template <int D>
RW_INLINE void store_past(void* data, int64_t i, Floats x, Some some) {
    store<D>(data, i, x, some);
}

inline void fence() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// Whether a result of so many elements, in rows of N, is better stored past the caches.
inline bool is_large(const void* data, int64_t T, int64_t N) {
    return T * N >= int64_t{1} << 18 && N % 32 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0;
}

// The nearest numbers of type D.
template <int D>
RW_INLINE Floats rounded_to(Floats x) {
    return D == RW_FLOAT32 ? x : widened(narrowed(x));
}

// body(i, part) for the vectors of a row: part is Whole, at the end Some.
template <class Body>
RW_INLINE void each_vector(int64_t count, const Body& body) {
    int64_t i = 0;
    for (; i + W <= count; i += W) body(i, Whole{});
    if (i < count) body(i, Some{static_cast<int>(count - i)});
}

RW_INLINE float total(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
    float sum = 0.0f;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
#endif
}

}  // namespace
}  // namespace rankwise::RW_ISA
