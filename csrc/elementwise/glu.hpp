// act(gate) * up and its gradients. Every activation is x P(x) with P the logistic or the normal distribution, so that
// act'(x) = P(x) + x P'(x), and nothing cancels.
#pragma once

#include "common/functions.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

struct Silu {
    static RW_INLINE Floats share(Floats x) { return sigmoid(x); }
    static RW_INLINE void share_and_slope(Floats x, Floats& share, Floats& slope) {
        share = sigmoid(x);
        slope = madd(x * share, 1.0f - share, share);
    }
};

// tanh(z) = 2 sigmoid(2 z) - 1.
struct GeluTanh {
    static constexpr float k = 1.59576912f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
    static RW_INLINE Floats share(Floats x) {
        return sigmoid(x * madd(smaller(all(1e4f), x * x), all(k * cubic), all(k)));
    }
    static RW_INLINE void share_and_slope(Floats x, Floats& share, Floats& slope) {
        // Past 1e4 the share is 0 or 1, and the factor must not become infinite.
        const Floats square = smaller(all(1e4f), x * x);
        share = sigmoid(x * madd(square, all(k * cubic), all(k)));
        slope = madd(x * share * (1.0f - share), madd(square, all(3 * k * cubic), all(k)), share);
    }
};

struct Gelu {
    static RW_INLINE Floats share(Floats x) { return normal(x).below; }
    static RW_INLINE void share_and_slope(Floats x, Floats& share, Floats& slope) {
        const Normal at = normal(x);
        share = at.below;
        slope = madd(x, at.density, at.below);
    }
};

template <int D, bool Past, class Part>
RW_INLINE void put(void* data, int64_t i, Floats x, Part part) {
    Past ? store_past<D>(data, i, x, part) : store<D>(data, i, x, part);
}

template <int D, class Act, bool Past>
void glu_rows(const GluJob job, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
        each_vector(job.N, [&](int64_t n, auto part) RW_INLINED {
            const Floats gate = load<D>(job.gate, t * job.gate_stride + n, part);
            put<D, Past>(job.product, t * job.N + n,
                         gate * Act::share(gate) * load<D>(job.up, t * job.up_stride + n, part), part);
        });
}

template <int D, class Act, bool Past, bool Product>
void glu_backward_rows(const GluJob job, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
        each_vector(job.N, [&](int64_t n, auto part) RW_INLINED {
            const Floats gate = load<D>(job.gate, t * job.gate_stride + n, part),
                         up = load<D>(job.up, t * job.up_stride + n, part);
            const Floats dout = load<D>(job.dout, t * job.dout_stride + n, part);
            Floats share, slope;
            Act::share_and_slope(gate, share, slope);
            const Floats active = gate * share;
            put<D, Past>(job.dgate, t * job.N + n, dout * up * slope, part);
            put<D, Past>(job.dup, t * job.N + n, dout * active, part);
            if (Product) put<D, Past>(job.product, t * job.N + n, active * up, part);
        });
}

template <int D, class Act, bool Past>
void glu_past(const GluJob& job, int64_t first, int64_t last) {
    if (!job.dout) return glu_rows<D, Act, Past>(job, first, last);
    job.product ? glu_backward_rows<D, Act, Past, true>(job, first, last)
                : glu_backward_rows<D, Act, Past, false>(job, first, last);
}

template <int D, class Act>
void glu_with(const GluJob& job, int64_t first, int64_t last) {
    const void* others[] = {job.dout ? job.dgate : job.product, job.dout ? job.dup : job.product,
                            job.product ? job.product : job.dup};
    bool past = true;
    for (const void* data : others) past = past && is_large(data, job.T, job.N);
    past ? glu_past<D, Act, true>(job, first, last) : glu_past<D, Act, false>(job, first, last);
    if (past) fence();
}

template <int D>
void glu_of(const GluJob& job, int64_t first, int64_t last) {
    switch (job.act) {
        case RW_SILU: return glu_with<D, Silu>(job, first, last);
        case RW_GELU_TANH: return glu_with<D, GeluTanh>(job, first, last);
        default: return glu_with<D, Gelu>(job, first, last);
    }
}

inline void glu(const GluJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? glu_of<RW_FLOAT32>(job, first, last) : glu_of<RW_BFLOAT16>(job, first, last);
}

}  // namespace
}  // namespace rankwise::RW_ISA
