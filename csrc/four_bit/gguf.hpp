// The blocks of GGUF files, as ggml lays them out, and of MXFP4. A block of 32 or 256 elements consists of parts of 32:
//
//     w_i = scale * q_i - least       of Q6_K one scale for 16 elements
//
// The product and the difference are rounded one after the other, as the gguf package does it.
#pragma once

#include "common/vector.hpp"

namespace rankwise::RW_ISA {

constexpr int64_t kPart = 32;

struct Part {
    alignas(64) int8_t q[kPart];
    float scale[2];
    float least;
};

static inline float half_at(const uint8_t* data) {
    uint16_t half;
    std::memcpy(&half, data, 2);
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    return from_float16(half);
#endif
}

// Bits [Shift, Shift + Bits) of 32 bytes. Constant shifts of whole vectors.
template <int Shift, int Bits>
RW_INLINE void bits_at(const uint8_t* data, uint8_t* out) {
    for (int i = 0; i < kPart; ++i) out[i] = (data[i] >> Shift) & ((1 << Bits) - 1);
}

template <int Bits>
RW_INLINE void bits_at(const uint8_t* data, int shift, uint8_t* out) {
    switch (shift) {
        case 0: return bits_at<0, Bits>(data, out);
        case 2: return bits_at<2, Bits>(data, out);
        case 4: return bits_at<4, Bits>(data, out);
        default: return bits_at<6, Bits>(data, out);
    }
}

// 16 bytes hold elements 0 to 15 in their low halves and 16 to 31 in their high ones.
RW_INLINE void halves_of(const uint8_t* data, int8_t* q, int less) {
#ifdef __AVX2__
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data)), mask = _mm_set1_epi8(15);
    const __m256i both = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(codes, 4), mask), _mm_and_si128(codes, mask));
    _mm256_store_si256(reinterpret_cast<__m256i*>(q), _mm256_sub_epi8(both, _mm256_set1_epi8(static_cast<char>(less))));
#else
    for (int i = 0; i < 16; ++i) q[i] = static_cast<int8_t>((data[i] & 15) - less);
    for (int i = 0; i < 16; ++i) q[16 + i] = static_cast<int8_t>((data[i] >> 4) - less);
#endif
}

// Adds 16 where element i's bit of the 32 is set.
RW_INLINE void add_fifth_bits(const uint8_t* data, int8_t* q) {
#ifdef __AVX2__
    int word;
    std::memcpy(&word, data, 4);
    // Byte i / 8 of the four at element i, and there bit i % 8.
    const __m256i place = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0),
                  bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201)),
                  spread = _mm256_shuffle_epi8(_mm256_set1_epi32(word), place),
                  is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    auto* out = reinterpret_cast<__m256i*>(q);
    _mm256_store_si256(out, _mm256_add_epi8(_mm256_load_si256(out), _mm256_and_si256(is_set, _mm256_set1_epi8(16))));
#else
    for (int i = 0; i < kPart; ++i) q[i] = static_cast<int8_t>(q[i] + 16 * ((data[i / 8] >> (i % 8)) & 1));
#endif
}

RW_INLINE void set_scale(Part& part, float scale, float least) {
    part.scale[0] = part.scale[1] = scale;
    part.least = least;
}

// Scale and least of part j of a block of Q4_K or Q5_K: six bits each, packed into 12 bytes.
RW_INLINE void set_packed_scale(const uint8_t* block, int j, Part& part) {
    const uint8_t* s = block + 4;
    const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 2) & 0x30),
              least = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 2) & 0x30);
    set_scale(part, half_at(block) * static_cast<float>(scale), half_at(block + 2) * static_cast<float>(least));
}

// Element i of a part: four bits of byte i of its pair of parts.
RW_INLINE void set_nibbles(const uint8_t* pairs, int j, Part& part) {
    bits_at<4>(pairs + 32 * (j / 2), 4 * (j % 2), reinterpret_cast<uint8_t*>(part.q));
}

template <int Type>
struct Blocks;

template <>
struct Blocks<RW_Q4_0> {
    static constexpr int64_t elements = 32, bytes = 18;
    RW_INLINE static void read(const uint8_t* block, int, Part& part) {
        halves_of(block + 2, part.q, 8);
        set_scale(part, half_at(block), 0.0f);
    }
};

template <>
struct Blocks<RW_Q4_1> {
    static constexpr int64_t elements = 32, bytes = 20;
    RW_INLINE static void read(const uint8_t* block, int, Part& part) {
        halves_of(block + 4, part.q, 0);
        set_scale(part, half_at(block), -half_at(block + 2));
    }
};

template <>
struct Blocks<RW_Q5_0> {
    static constexpr int64_t elements = 32, bytes = 22;
    RW_INLINE static void read(const uint8_t* block, int, Part& part) {
        halves_of(block + 6, part.q, 16);
        add_fifth_bits(block + 2, part.q);
        set_scale(part, half_at(block), 0.0f);
    }
};

template <>
struct Blocks<RW_Q5_1> {
    static constexpr int64_t elements = 32, bytes = 24;
    RW_INLINE static void read(const uint8_t* block, int, Part& part) {
        halves_of(block + 8, part.q, 0);
        add_fifth_bits(block + 4, part.q);
        set_scale(part, half_at(block), -half_at(block + 2));
    }
};

template <>
struct Blocks<RW_Q8_0> {
    static constexpr int64_t elements = 32, bytes = 34;
    RW_INLINE static void read(const uint8_t* block, int, Part& part) {
        std::memcpy(part.q, block + 2, kPart);
        set_scale(part, half_at(block), 0.0f);
    }
};

template <>
struct Blocks<RW_Q4_K> {
    static constexpr int64_t elements = 256, bytes = 144;
    RW_INLINE static void read(const uint8_t* block, int j, Part& part) {
        set_nibbles(block + 16, j, part);
        set_packed_scale(block, j, part);
    }
};

template <>
struct Blocks<RW_Q5_K> {
    static constexpr int64_t elements = 256, bytes = 176;
    RW_INLINE static void read(const uint8_t* block, int j, Part& part) {
        set_nibbles(block + 48, j, part);
        const uint8_t mask = static_cast<uint8_t>(1 << j);
        // Element i: bit j of byte i.
        for (int i = 0; i < kPart; ++i) part.q[i] = static_cast<int8_t>(part.q[i] | (block[16 + i] & mask ? 16 : 0));
        set_packed_scale(block, j, part);
    }
};

template <>
struct Blocks<RW_Q6_K> {
    static constexpr int64_t elements = 256, bytes = 210;
    RW_INLINE static void read(const uint8_t* block, int j, Part& part) {
        const int half = j / 4, quarter = j % 4;
        uint8_t low[kPart], high[kPart];
        bits_at<4>(block + 64 * half + 32 * (quarter % 2), 4 * (quarter / 2), low);
        bits_at<2>(block + 128 + 32 * half, 2 * quarter, high);
        for (int i = 0; i < kPart; ++i) part.q[i] = static_cast<int8_t>((low[i] | high[i] << 4) - 32);
        const auto* scales = reinterpret_cast<const int8_t*>(block + 192) + 2 * j;
        const float d = half_at(block + 208);
        for (int i = 0; i < 2; ++i) part.scale[i] = d * static_cast<float>(scales[i]);
        part.least = 0.0f;
    }
};

// E2M1 times two: byte i holds elements 2 i, in its low half, and 2 i + 1. Exponents lie apart.
template <>
struct Blocks<RW_MXFP4> {
    static constexpr int64_t elements = 32, bytes = 16;
    RW_INLINE static void read(const uint8_t* block, int, Part& part) {
        alignas(16) static constexpr int8_t values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#ifdef __AVX2__
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block)), mask = _mm_set1_epi8(15),
                      table = _mm_load_si128(reinterpret_cast<const __m128i*>(values)),
                      low = _mm_shuffle_epi8(table, _mm_and_si128(codes, mask)),
                      high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(codes, 4), mask));
        auto* out = reinterpret_cast<__m128i*>(part.q);
        _mm_store_si128(out, _mm_unpacklo_epi8(low, high));
        _mm_store_si128(out + 1, _mm_unpackhi_epi8(low, high));
#else
        for (int i = 0; i < 16; ++i) part.q[2 * i] = values[block[i] & 15], part.q[2 * i + 1] = values[block[i] >> 4];
#endif
    }
};

// 2^(exponent - 128), half of what E8M0 means; subnormal below 2.
RW_INLINE float half_of_power(uint8_t exponent) {
    const uint32_t bits = exponent < 2 ? uint32_t{0x200000} << exponent : (uint32_t{exponent} - 1) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return power;
}

RW_INLINE Floats floats_at(const int8_t* q) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(q));
    return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
    return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    Floats out;
    for (int i = 0; i < W; ++i) out[i] = q[i];
    return out;
#endif
}

// The elements of a part rounded to D, as Out: float, or uint16_t holding the bits of D.
template <int D, class Out>
RW_INLINE void write_part(const Part& part, Out* out) {
    for (int i = 0; i < kPart; i += W) {
        const Floats w = floats_at(part.q + i) * all(part.scale[i / 16]) - all(part.least);
        if constexpr (D == RW_FLOAT16) {
            for (int k = 0; k < W; ++k) {
                const uint16_t half = to_float16(w[k]);
                if constexpr (sizeof(Out) == 2) out[i + k] = half;
                else out[i + k] = from_float16(half);
            }
        } else if constexpr (sizeof(Out) == 2) {
            store<D>(out, i, w);
        } else {
            store<RW_FLOAT32>(out, i, rounded_to<D>(w));
        }
    }
}

// Elements [column, end) of a row. exponents: of MXFP4.
template <int Type, int D, class Out>
static void decode_row(const uint8_t* row, int64_t column, int64_t end, Out* out, const uint8_t* exponents = nullptr) {
    using Of = Blocks<Type>;
    Part part;
    while (column < end) {
        const int64_t from = column % kPart, some = kPart - from < end - column ? kPart - from : end - column;
        const uint8_t* block = row + column / Of::elements * Of::bytes;
        __builtin_prefetch(block + 8 * Of::bytes);
        Of::read(block, static_cast<int>(column % Of::elements / kPart), part);
        if constexpr (Type == RW_MXFP4) set_scale(part, half_of_power(exponents[column / kPart]), 0.0f);
        if (some == kPart) {
            write_part<D>(part, out);
        } else {
            alignas(64) Out whole[kPart];
            write_part<D>(part, whole);
            std::memcpy(out, whole + from, sizeof(Out) * static_cast<std::size_t>(some));
        }
        column += some, out += some;
    }
}

// Elements [first, first + count) of a weight in the blocks of a file.
template <int D, class Out>
static void decode_blocks(const rw_weight& weight, int64_t first, int64_t count, Out* out) {
    while (count > 0) {
        const int64_t n = first / weight.columns, column = first % weight.columns,
                      left = weight.columns - column, some = left < count ? left : count;
        const uint8_t* row = weight.packed + (weight.order ? weight.order[n] : n) * weight.row_bytes;
        switch (weight.ggml_type) {
            case RW_MXFP4:
                decode_row<RW_MXFP4, D>(row, column, column + some, out,
                                        static_cast<const uint8_t*>(weight.absmax) + n * (weight.columns / kPart));
                break;
            case RW_Q4_0: decode_row<RW_Q4_0, D>(row, column, column + some, out); break;
            case RW_Q4_1: decode_row<RW_Q4_1, D>(row, column, column + some, out); break;
            case RW_Q5_0: decode_row<RW_Q5_0, D>(row, column, column + some, out); break;
            case RW_Q5_1: decode_row<RW_Q5_1, D>(row, column, column + some, out); break;
            case RW_Q8_0: decode_row<RW_Q8_0, D>(row, column, column + some, out); break;
            case RW_Q4_K: decode_row<RW_Q4_K, D>(row, column, column + some, out); break;
            case RW_Q5_K: decode_row<RW_Q5_K, D>(row, column, column + some, out); break;
            default: decode_row<RW_Q6_K, D>(row, column, column + some, out); break;
        }
        first += some, count -= some, out += some;
    }
}

}  // namespace rankwise::RW_ISA
