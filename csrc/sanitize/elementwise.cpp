// Runs the element-wise functions at the current level over odd shapes and strides in exactly sized buffers, for the
// sanitizers. Returns a sum over all results, which must depend on the level by roundings only.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "common/convert.hpp"
#include "rankwise_native.h"
#include "sanitize/random.hpp"

namespace {

// T rows of N elements, `stride` apart, with nothing behind the last one.
struct Rows {
    int dtype;
    int64_t T, N, stride, elements;
    std::unique_ptr<uint8_t[]> data;
    Rows(int dtype, int64_t T, int64_t N, int64_t gap = 0)
        : dtype(dtype),
          T(T),
          N(N),
          stride(N + gap),
          elements(T > 0 ? (T - 1) * (N + gap) + N : 0),
          data(new uint8_t[static_cast<size_t>(elements * (dtype == RW_FLOAT32 ? 4 : 2))]) {
        for (int64_t i = 0; i < elements; ++i) set(i, next_float());
    }
    void set(int64_t i, float value) {
        dtype == RW_FLOAT32 ? rankwise::store_float<RW_FLOAT32>(data.get(), i, value)
                            : rankwise::store_float<RW_BFLOAT16>(data.get(), i, value);
    }
    float get(int64_t i) const {
        return dtype == RW_FLOAT32 ? rankwise::load_as_float<RW_FLOAT32>(data.get(), i)
                                   : rankwise::load_as_float<RW_BFLOAT16>(data.get(), i);
    }
    double sum() const {
        double sum = 0;
        for (int64_t t = 0; t < T; ++t)
            for (int64_t n = 0; n < N; ++n) sum += std::fabs(static_cast<double>(get(t * stride + n)));
        return sum;
    }
    void* operator*() { return data.get(); }
};

double low_rank(int64_t T, int64_t N, int dtype, int64_t gap) {
    double sum = 0;
    for (int64_t R : {1, 2, 5, 16, 33}) {
        Rows y(dtype, T, N, gap), u(dtype, T, R, gap), B(dtype, N, R), g(RW_FLOAT32, 1, N), bias(RW_FLOAT32, 1, N);
        rw_low_rank_add(*y, y.stride, *u, u.stride, *B, 0.5f, static_cast<float*>(*g),
                        gap ? static_cast<float*>(*bias) : nullptr, T, N, R, dtype, 2);
        sum += y.sum();
    }
    return sum;
}

double gradients_and_norms(int64_t T, int64_t N, int dtype, int64_t gap) {
    Rows x(dtype, T, N, gap), dy(dtype, T, N, gap), w(dtype, 1, N), g(RW_FLOAT32, 1, N), out(dtype, T, N),
        dot(RW_FLOAT32, 1, N);
    Rows rstd(RW_FLOAT32, 1, T), residual(dtype, T, N, gap);
    auto* scales = static_cast<float*>(*rstd);
    rw_scaled_grad(*dy, dy.stride, gap ? *x : nullptr, x.stride, static_cast<float*>(*g), *out,
                   gap ? static_cast<float*>(*dot) : nullptr, T, N, dtype, 2);
    double sum = out.sum() + (gap ? dot.sum() : 0.0);
    for (int form : {0, 1}) {
        rw_rms_norm(*x, x.stride, *w, 1e-5f, form, 1 - form, *out, scales, T, N, dtype, 2);
        sum += out.sum() + rstd.sum();
        rw_rms_norm_backward(*dy, dy.stride, *x, x.stride, *w, scales, form, form ? *residual : nullptr,
                             residual.stride, *out, T, N, dtype, 2);
        sum += out.sum();
    }
    return sum;
}

double activations(int64_t T, int64_t N, int dtype, int64_t gap) {
    double sum = 0;
    Rows gate(dtype, T, N, gap), up(dtype, T, N, gap), dout(dtype, T, N, gap), dgate(dtype, T, N), dup(dtype, T, N),
        product(dtype, T, N);
    for (int act : {RW_SILU, RW_GELU_TANH, RW_GELU}) {
        rw_glu(nullptr, 0, *gate, gate.stride, *up, up.stride, act, nullptr, nullptr, *product, T, N, dtype, 2);
        sum += product.sum();
        rw_glu(*dout, dout.stride, *gate, gate.stride, *up, up.stride, act, *dgate, *dup, gap ? *product : nullptr, T,
               N, dtype, 2);
        sum += dgate.sum() + dup.sum();
    }
    for (int add : {0, 1}) {
        Rows z(dtype, 1, T * N), to(dtype, 1, T * N);
        rw_dropout(*z, *to, add, 1.25f, 0x33333333u, 17u, 23u, T * N, dtype, 2);
        sum += to.sum();
    }
    return sum;
}

double losses(int64_t C, int64_t V, int dtype, int64_t gap) {
    double sum = 0;
    for (float softcap : {0.0f, 2.0f}) {
        Rows logits(dtype, C, V, gap);
        const std::unique_ptr<int64_t[]> targets(new int64_t[static_cast<size_t>(C)]);
        for (int64_t t = 0; t < C; ++t) targets[static_cast<size_t>(t)] = t % 4 == 2 ? -100 : t * 7 % V;
        double sums[3];
        const float smoothing = gap ? 0.1f : 0.0f;
        if (rw_cross_entropy(*logits, logits.stride, targets.get(), C, V, 1.0f, smoothing, softcap, 1.5f, 1, 1, 1, sums,
                             dtype, 2) != -1)
            return NAN;
        sum += sums[0] + sums[1] + sums[2] + logits.sum();
    }
    return sum;
}

double turns(int64_t H, int64_t D, int64_t rotary, int dtype, int table_dtype) {
    constexpr int64_t B = 2, L = 3;
    double sum = 0;
    for (int inverse : {0, 1}) {
        Rows q(dtype, B * L, H * D), out(dtype, B * L, H * D), cos(table_dtype, B * L, rotary),
            sin(table_dtype, B * L, rotary);
        const int64_t strides[] = {L * H * D, D, H * D}, sizes[] = {B, H, L, D, rotary};
        rw_rope(*q, strides, *cos, *sin, L * rotary, inverse, *out, strides, sizes, dtype, table_dtype, 2);
        rw_rope(*q, strides, *cos, *sin, 0, inverse, *q, strides, sizes, dtype, table_dtype, 2);
        sum += q.sum() + out.sum();
    }
    return sum;
}

}  // namespace

double elementwise_sum() {
    state = 1;
    double sum = 0;
    for (int dtype : {RW_FLOAT32, RW_BFLOAT16}) {
        for (int64_t T : {0, 1, 3, 9, 130})
            for (int64_t N : {1, 7, 16, 33, 100})
                for (int64_t gap : {0, 5})
                    sum += low_rank(T, N, dtype, gap) + gradients_and_norms(T, N, dtype, gap) +
                           activations(T, N, dtype, gap) + losses(T, N, dtype, gap);
        sum += losses(5, 3001, dtype, 3) + activations(70, 600, dtype, 1) + gradients_and_norms(140, 600, dtype, 1);
        for (int64_t D : {2, 7, 40, 64})
            for (int64_t rotary : {int64_t{0}, int64_t{2}, D / 2 * 2})
                for (int table : {RW_FLOAT32, RW_BFLOAT16}) sum += turns(3, D, rotary, dtype, table);
    }
    return sum;
}
