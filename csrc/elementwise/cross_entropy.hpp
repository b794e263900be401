// Loss, entropy and gradient of a row of logits in two passes: the first finds the largest logit and the sums of
// exponentials together, the second, where gradients are wanted, writes them over the logits, which are still in the
// cache.
#pragma once

#include <cmath>

#include "common/functions.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

struct RowSums {
    float largest;
    double exps;      // sum e^(z - largest)
    double products;  // sum e^(z - largest) (z - largest)
    double values;    // sum z
};

constexpr float kLowest = -3.0e38f;

template <bool Cap>
RW_INLINE Floats logit_of(const CrossEntropyJob& job, Floats x) {
    const Floats z = x * job.multiplier;
    return Cap ? tanh_of(z * (1.0f / job.softcap)) * job.softcap : z;
}

// One lane each of what a row has summed so far. The sums are relative to the lane's largest logit, and scaled when
// that grows.
template <bool Cap, bool Extra>
struct LaneSums {
    Floats largest = all(kLowest), exps = {}, products = {}, values = {};

    RW_INLINE void grow(Floats limit) {
        const Floats change = largest - limit, factor = exp_of(change);
        if (Extra) products = factor * madd(exps, change < -87.0f ? Floats{} : change, products);
        exps = exps * factor;
        largest = limit;
    }
    RW_INLINE void add(Floats z) {
        const Floats below = z - largest, e = exp_of(below);
        exps = exps + e;
        if (Extra) {
            products = madd(e, below < -87.0f ? Floats{} : below, products);
            values = values + z;
        }
    }
};

template <int D, bool Cap, bool Extra>
RowSums sums_of(const CrossEntropyJob job, const char* row) {
    constexpr int block = 8;
    LaneSums<Cap, Extra> lanes;
    int64_t i = 0;
    for (; i + block * W <= job.V; i += block * W) {
        Floats z[block];
#pragma GCC unroll 8
        for (int k = 0; k < block; ++k) z[k] = logit_of<Cap>(job, load<D>(row, i + k * W));
        Floats limit = lanes.largest;
#pragma GCC unroll 8
        for (int k = 0; k < block; ++k) limit = larger(z[k], limit);
        lanes.grow(limit);
#pragma GCC unroll 8
        for (int k = 0; k < block; ++k) lanes.add(z[k]);
    }
    for (; i + W <= job.V; i += W) {
        const Floats z = logit_of<Cap>(job, load<D>(row, i));
        lanes.grow(larger(z, lanes.largest));
        lanes.add(z);
    }
    RowSums sums = {kLowest, 0.0, 0.0, 0.0};
    Floats rest = all(kLowest);
    const int64_t left = job.V - i;
    if (left > 0) {
        const Floats z = logit_of<Cap>(job, load<D>(row, i, Some{static_cast<int>(left)}));
        for (int lane = 0; lane < left; ++lane) rest[lane] = z[lane];
    }
    for (int lane = 0; lane < W; ++lane) {
        // NaN wins: the row's loss is then NaN, as it should be.
        sums.largest = lanes.largest[lane] > sums.largest ? lanes.largest[lane] : sums.largest;
        if (lane < left) sums.largest = rest[lane] > sums.largest ? rest[lane] : sums.largest;
    }
    const auto add = [&](float largest, double exps, double products, double values) {
        const double change = static_cast<double>(largest) - sums.largest, factor = std::exp(change);
        sums.exps += factor * exps;
        if (Extra) sums.products += factor > 0.0 ? factor * (products + exps * change) : 0.0;
        sums.values += values;
    };
    for (int lane = 0; lane < W; ++lane) {
        add(lanes.largest[lane], lanes.exps[lane], lanes.products[lane], lanes.values[lane]);
        if (lane < left) add(rest[lane], 1.0, 0.0, rest[lane]);
    }
    return sums;
}

// Whether no logit is larger than that of the target, and none before it as large.
template <int D>
bool is_first_largest(const char* row, int64_t V, int64_t target) {
    const float best = load_as_float<D>(row, target);
    for (int64_t i = 0; i < target; ++i)
        if (load_as_float<D>(row, i) >= best) return false;
    for (int64_t i = target + 1; i < V; ++i)
        if (load_as_float<D>(row, i) > best) return false;
    return true;
}

template <bool Cap>
RW_INLINE Floats slope_of(const CrossEntropyJob& job, Floats z) {
    const float slope = job.scale * job.multiplier;
    if (!Cap) return all(slope);
    const Floats tanh = z * (1.0f / job.softcap);
    return (1.0f - tanh * tanh) * slope;
}

template <int D, bool Cap>
void write_gradient(const CrossEntropyJob job, char* row, int64_t target, const RowSums& sums) {
    const float inverse = static_cast<float>(1.0 / sums.exps), smooth = job.label_smoothing / static_cast<float>(job.V);
    const Floats at_target = logit_of<Cap>(job, all(load_as_float<D>(row, target)));
    each_vector(job.V, [&](int64_t i, auto part) RW_INLINED {
        const Floats z = logit_of<Cap>(job, load<D>(row, i, part));
        store<D>(row, i, madd(exp_of(z - sums.largest), all(inverse), all(-smooth)) * slope_of<Cap>(job, z), part);
    });
    const Floats p = madd(exp_of(at_target - sums.largest), all(inverse), all(-smooth)) - (1.0f - job.label_smoothing);
    store_float<D>(row, target, (p * slope_of<Cap>(job, at_target))[0]);
}

template <int D, bool Cap>
void loss_of_row(const CrossEntropyJob job, int64_t t) {
    constexpr int64_t size = D == RW_FLOAT32 ? 4 : 2;
    char* row = static_cast<char*>(job.logits) + t * job.stride * size;
    const int64_t target = job.targets[t];
    double* out = job.row + 3 * t;
    out[0] = out[1] = out[2] = 0.0;
    if (target == kIgnored) {
        if (job.want_grad) std::memset(row, 0, static_cast<std::size_t>(job.V * size));
        return;
    }
    const bool extra = job.want_entropy || job.label_smoothing != 0.0f;
    const RowSums sums = extra ? sums_of<D, Cap, true>(job, row) : sums_of<D, Cap, false>(job, row);
    const double log_sum = std::log(sums.exps), lse = static_cast<double>(sums.largest) + log_sum;
    const double at_target = logit_of<Cap>(job, all(load_as_float<D>(row, target)))[0],
                 smoothing = static_cast<double>(job.label_smoothing);
    out[0] = (1.0 - smoothing) * (lse - at_target);
    if (smoothing != 0.0) out[0] += smoothing * (lse - sums.values / static_cast<double>(job.V));
    if (job.want_entropy) out[1] = log_sum - sums.products / sums.exps;
    if (job.want_correct) out[2] = is_first_largest<D>(row, job.V, target) ? 1.0 : 0.0;
    if (job.want_grad) write_gradient<D, Cap>(job, row, target, sums);
}

template <int D>
void cross_entropy_of(const CrossEntropyJob& job, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
        job.softcap > 0.0f ? loss_of_row<D, true>(job, t) : loss_of_row<D, false>(job, t);
}

inline void cross_entropy(const CrossEntropyJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? cross_entropy_of<RW_FLOAT32>(job, first, last)
                            : cross_entropy_of<RW_BFLOAT16>(job, first, last);
}

}  // namespace
}  // namespace rankwise::RW_ISA
