// Weights to codes: code = order[number of bounds below w / absmax]. A full block is multiplied by the reciprocal of
// absmax, a partial last one divided by it: bitsandbytes does so, and the last bit of a few elements depends on it.
#pragma once

#include "common/convert.hpp"
#include "four_bit/kernels.hpp"

namespace rankwise::RW_ISA {

constexpr float kLeastAbsmax = 1e-38f;

static inline uint8_t code_of(float normal, const QuantizeJob& job) {
    int below = 0;
    for (int k = 0; k < 15; ++k) below += job.bound[k] < normal;
    return job.order[below];
}

template <int D>
static void quantize_last_block(const QuantizeJob& job, int64_t first, float absmax) {
    absmax = absmax < kLeastAbsmax ? kLeastAbsmax : absmax;
    job.absmax[first / job.block_size] = absmax;
    for (int64_t i = first; i < job.n; i += 2) {
        const uint8_t high = code_of(load_as_float<D>(job.w, i) / absmax, job);
        const uint8_t low = code_of(i + 1 < job.n ? load_as_float<D>(job.w, i + 1) / absmax : 0.0f, job);
        job.packed[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
}

template <class Isa, int D>
static int64_t quantize_blocks(const QuantizeJob& job, int64_t first, int64_t last) {
    constexpr int64_t size = D == RW_FLOAT32 ? 4 : 2;
    const char* w = static_cast<const char*>(job.w);
    const typename Isa::Bounds bounds(job);
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * job.block_size;
        const int64_t count = job.n - begin < job.block_size ? job.n - begin : job.block_size;
        // The bits of |w| order like its values, with Inf and NaN above all of them.
        const uint32_t bits = Isa::template absmax_bits<D>(w + begin * size, count);
        if (bits >= 0x7f800000u) return block;
        const float absmax = float_of(bits);
        if (count < job.block_size) {
            quantize_last_block<D>(job, begin, absmax);
            continue;
        }
        job.absmax[block] = absmax;
        const float inverse = 1.0f / (absmax < kLeastAbsmax ? kLeastAbsmax : absmax);
        Isa::template encode<D>(w + begin * size, count, inverse, bounds, job.packed + begin / 2);
    }
    return -1;
}

template <class Isa>
static int64_t quantize(const QuantizeJob& job, int64_t first, int64_t last) {
    switch (job.dtype) {
        case RW_FLOAT32: return quantize_blocks<Isa, RW_FLOAT32>(job, first, last);
        case RW_BFLOAT16: return quantize_blocks<Isa, RW_BFLOAT16>(job, first, last);
        default: return quantize_blocks<Isa, RW_FLOAT16>(job, first, last);
    }
}

}  // namespace rankwise::RW_ISA
