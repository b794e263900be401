// Plain C++ that compilers vectorize, with NEON table lookups where the compiler targets 64-bit Arm.
#pragma once

#include "common/convert.hpp"
#include "four_bit/decode.hpp"
#include "four_bit/kernels.hpp"

#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

namespace rankwise::RW_ISA {

struct Portable {
    static constexpr bool multiplies_bfloat16 = false;
    static constexpr int columns = 2;
    static constexpr int64_t fused_rows = 2;
    static constexpr int64_t stream_bytes = INT64_MAX;

    struct FloatLane {
        using Element = float;
        static constexpr int width = 8;
        struct Vector {
            float lane[width];
        };
        using Sum = Vector;
        static Sum zero() { return {}; }
        static Vector load(const float* p) { return load_some(p, width); }
        static Vector load_some(const float* p, int count) {
            Vector v = {};
            for (int i = 0; i < count; ++i) v.lane[i] = p[i];
            return v;
        }
        static void store(float* p, const Vector& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
        static Sum multiply_add(const Vector& a, const Vector& b, Sum sum) {
            for (int i = 0; i < width; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
            return sum;
        }
        static Sum add(Sum a, const Sum& b) {
            for (int i = 0; i < width; ++i) a.lane[i] += b.lane[i];
            return a;
        }
        static float total(const Sum& sum) {
            float total = 0;
            for (float lane : sum.lane) total += lane;
            return total;
        }
        static void totals(const Sum* sum, int64_t stride, float* out) {
            for (int i = 0; i < 16; ++i) out[i] = total(sum[i * stride]);
        }
    };

    template <class Out>
    struct Table {
        static constexpr int vectors = 2;
        Out entries[16];
    };

    template <int D, bool Plain>
    static Table<uint16_t> table(const float* value, float scale, uint16_t*) {
        Table<uint16_t> table;
        for (int c = 0; c < 16; ++c) store_float<D>(table.entries, c, value[c] * scale);
        return table;
    }

    template <int D, bool Plain>
    static Table<float> table(const float* value, float scale, float*) {
        Table<float> table;
        for (int c = 0; c < 16; ++c) table.entries[c] = rounded<D>(value[c] * scale);
        return table;
    }

    template <class Out>
    static Out entry(const Table<Out>& table, int code) {
        return table.entries[code];
    }

    // The next two vectors of weights, even and odd elements apart.
    static void unpack(const Table<float>& table, const uint8_t* packed, FloatLane::Vector (&w)[2]) {
        for (int j = 0; j < FloatLane::width; ++j) {
            w[0].lane[j] = table.entries[packed[j] >> 4];
            w[1].lane[j] = table.entries[packed[j] & 15];
        }
    }

    // The element of a group that stands at i.
    template <int64_t Group>
    static constexpr int64_t element_at(int64_t i) {
        return i < Group / 2 ? 2 * i : 2 * i - Group + 1;
    }

    static bool scales(const rw_weight& weight, int64_t first, int64_t count, float* scales) {
        return scales_one_by_one(weight, first, count, scales);
    }

    template <bool Stream, class Out>
    static void expand(const Table<Out>& table, const uint8_t* packed, int64_t bytes, Out* out) {
        for (int64_t j = expand_vectors(table, packed, bytes, out); j < bytes; ++j) {
            out[2 * j] = table.entries[packed[j] >> 4];
            out[2 * j + 1] = table.entries[packed[j] & 15];
        }
    }

    // The number of bytes done by vector instructions.
    template <class Out>
    static int64_t expand_vectors(const Table<Out>&, const uint8_t*, int64_t, Out*) {
        return 0;
    }

#if defined(__ARM_NEON) && defined(__aarch64__)
    static int64_t expand_vectors(const Table<uint16_t>& table, const uint8_t* packed, int64_t bytes, uint16_t* out) {
        // Low bytes and high bytes of the 16 words, as two tables of bytes.
        const uint8x16x2_t halves = vld2q_u8(reinterpret_cast<const uint8_t*>(table.entries));
        int64_t j = 0;
        for (; j + 8 <= bytes; j += 8) {
            const uint8x8_t b = vld1_u8(packed + j);
            const uint8x8x2_t pair = vzip_u8(vshr_n_u8(b, 4), vand_u8(b, vdup_n_u8(15)));
            const uint8x16_t codes = vcombine_u8(pair.val[0], pair.val[1]);
            const uint8x16x2_t words = {{vqtbl1q_u8(halves.val[0], codes), vqtbl1q_u8(halves.val[1], codes)}};
            vst2q_u8(reinterpret_cast<uint8_t*>(out + 2 * j), words);
        }
        return j;
    }
#endif

    template <bool Stream, class Out>
    static void expand_block(const Table<Out>& table, const uint8_t* packed, int64_t bytes, Out* out) {
        expand<Stream>(table, packed, bytes, out);
    }

    static void fence() {}

    template <int D>
    static uint32_t absmax_bits(const void* data, int64_t count) {
        uint32_t bits = 0;
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t one = bits_of(load_as_float<D>(data, i)) & 0x7fffffffu;
            bits = one > bits ? one : bits;
        }
        return bits;
    }

    struct Bounds {
        float bound[15];
        uint8_t order[16];
        explicit Bounds(const QuantizeJob& job) {
            std::memcpy(bound, job.bound, sizeof(bound));
            std::memcpy(order, job.order, sizeof(order));
        }
    };

    template <int D>
    static void encode(const void* data, int64_t count, float inverse, const Bounds& bounds, uint8_t* packed) {
        constexpr int step = 32;  // divides every block
        for (int64_t i = 0; i < count; i += step) {
            float normal[step];
            int32_t below[step] = {};
            for (int e = 0; e < step; ++e) normal[e] = load_as_float<D>(data, i + e) * inverse;
            for (int k = 0; k < 15; ++k)
                for (int e = 0; e < step; ++e) below[e] += bounds.bound[k] < normal[e];
            for (int e = 0; e < step; e += 2)
                packed[(i + e) / 2] = static_cast<uint8_t>(bounds.order[below[e]] << 4 | bounds.order[below[e + 1]]);
        }
    }
};

}  // namespace rankwise::RW_ISA
