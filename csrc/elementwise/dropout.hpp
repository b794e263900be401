// x * mask / (1 - p), the mask a hash of the key and the element's index: see keep_mask in
// src/rankwise/ops/reference.py.
#pragma once

#include "common/vector.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

RW_INLINE Words hash_of(Words index, uint32_t before, uint32_t middle) {
    Words h = index + before;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) ^ middle;
    h = h * 0x846ca68bu;
    return h ^ (h >> 16);
}

template <int D, bool Add>
void drop_elements(const DropoutJob job, int64_t first, int64_t last) {
    Words lane;
    for (int i = 0; i < W; ++i) lane[i] = static_cast<uint32_t>(i);
    each_vector(last - first, [&](int64_t offset, auto part) RW_INLINED {
        const int64_t i = first + offset;
        // A vector does not straddle a multiple of 2^32: `first` and W divide it.
        const uint32_t upper = static_cast<uint32_t>(i >> 32) * 0x9e3779b9u;
        const Words hash = hash_of(lane + static_cast<uint32_t>(i), job.before + upper, job.middle + upper);
        const Floats z = load<D>(job.z, i, part) * job.factor;
        if (Add) {
            const Floats dx = load<D>(job.out, i, part);
            store<D>(job.out, i, hash >= job.threshold ? dx + z : dx, part);
        } else {
            store<D>(job.out, i, hash >= job.threshold ? z : Floats{}, part);
        }
    });
}

template <int D>
void dropout_of(const DropoutJob& job, int64_t first, int64_t last) {
    job.add ? drop_elements<D, true>(job, first, last) : drop_elements<D, false>(job, first, last);
}

inline void dropout(const DropoutJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? dropout_of<RW_FLOAT32>(job, first, last) : dropout_of<RW_BFLOAT16>(job, first, last);
}

}  // namespace
}  // namespace rankwise::RW_ISA
