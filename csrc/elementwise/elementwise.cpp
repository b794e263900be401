// The C interface of the element-wise kernels of a training step: cuts rows into tasks.
#include "common/level.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace {

using namespace rankwise;

// Fewer elements than this are done before a second thread has woken up.
constexpr int64_t kAlone = int64_t{1} << 15;
constexpr int64_t kTaskElements = int64_t{1} << 14;

// Runs body(first, last) over `rows` rows of `columns` elements, tasks beginning at multiples of `multiple`.
template <class Body>
void over_rows(int64_t rows, int64_t columns, int64_t multiple, int threads, const Body& body) {
    if (rows * columns < kAlone || threads <= 1) {
        if (rows > 0) body(int64_t{0}, rows);
        return;
    }
    const int64_t enough = ceil_div(kTaskElements, columns), share = ceil_div(rows, int64_t{4} * threads);
    const int64_t step = ceil_div(share > enough ? share : enough, multiple) * multiple;
    parallel(ceil_div(rows, step), threads, [&](int64_t task) {
        const int64_t first = task * step, last = first + step < rows ? first + step : rows;
        body(first, last);
    });
}

}  // namespace

extern "C" {

void rw_low_rank_add(void* y, int64_t y_stride, const void* u, int64_t u_stride, const void* B, float scale,
                     const float* g, const float* bias, int64_t T, int64_t N, int64_t R, int dtype, int threads) {
    struct Owner {};
    const ElementwiseKernels& kernels = *level().elementwise;
    uint32_t* packed = scratch<Owner, uint32_t, 0>(kernels.low_rank_packed_size(N, R, dtype));
    const LowRankJob job = {y, y_stride, u, u_stride, B, scale, g, bias, T, N, R, dtype, packed};
    kernels.low_rank_pack(job);
    over_rows(T, N, 8, threads, [&](int64_t first, int64_t last) { kernels.low_rank_add(job, first, last); });
}

void rw_scaled_grad(const void* dy, int64_t dy_stride, const void* y, int64_t y_stride, const float* g, void* dz,
                    float* dot, int64_t T, int64_t N, int dtype, int threads) {
    struct Owner {};
    const ElementwiseKernels& kernels = *level().elementwise;
    const int64_t blocks = ceil_div(T, kGradRows);
    float* partial = dot ? scratch<Owner, float, 0>(blocks * N) : nullptr;
    const ScaledGradJob job = {dy, dy_stride, y, y_stride, g, dz, T, N, dtype, partial};
    over_rows(blocks, kGradRows * N, 1, threads,
              [&](int64_t first, int64_t last) { kernels.scaled_grad(job, first, last); });
    if (!dot) return;
    for (int64_t n = 0; n < N; ++n) dot[n] = 0.0f;
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t n = 0; n < N; ++n) dot[n] += partial[block * N + n];
}

void rw_rms_norm(const void* x, int64_t x_stride, const void* w, float eps, int offset, int cast_first, void* y,
                 float* rstd, int64_t T, int64_t D, int dtype, int threads) {
    const NormJob job = {x, x_stride, w, eps, offset, cast_first, y, rstd, T, D, dtype};
    over_rows(T, D, 1, threads, [&](int64_t first, int64_t last) { level().elementwise->rms_norm(job, first, last); });
}

void rw_rms_norm_backward(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* w,
                          const float* rstd, int offset, const void* residual, int64_t residual_stride, void* dx,
                          int64_t T, int64_t D, int dtype, int threads) {
    const NormBackwardJob job = {dy,       dy_stride,       x,  x_stride, w, rstd, offset,
                                 residual, residual_stride, dx, T,        D, dtype};
    over_rows(T, D, 1, threads,
              [&](int64_t first, int64_t last) { level().elementwise->rms_norm_backward(job, first, last); });
}

void rw_glu(const void* dout, int64_t dout_stride, const void* gate, int64_t gate_stride, const void* up,
            int64_t up_stride, int act, void* dgate, void* dup, void* product, int64_t T, int64_t N, int dtype,
            int threads) {
    const GluJob job = {dout, dout_stride, gate, gate_stride, up, up_stride, act, dgate, dup, product, T, N, dtype};
    over_rows(T, N, 1, threads, [&](int64_t first, int64_t last) { level().elementwise->glu(job, first, last); });
}

void rw_rope(const void* q, const int64_t* q_stride, const void* cos, const void* sin, int64_t batch_stride,
             int inverse, void* out, const int64_t* out_stride, const int64_t* sizes, int dtype, int table_dtype,
             int threads) {
    const RopeJob job = {q,
                         {q_stride[0], q_stride[1], q_stride[2]},
                         cos,
                         sin,
                         batch_stride,
                         inverse,
                         out,
                         {out_stride[0], out_stride[1], out_stride[2]},
                         sizes[0],
                         sizes[1],
                         sizes[2],
                         sizes[3],
                         sizes[4],
                         dtype,
                         table_dtype};
    over_rows(job.B * job.L, job.H * job.D, 1, threads,
              [&](int64_t first, int64_t last) { level().elementwise->rope(job, first, last); });
}

int64_t rw_cross_entropy(void* logits, int64_t stride, const int64_t* targets, int64_t C, int64_t V, float scale,
                         float label_smoothing, float softcap, float multiplier, int want_grad, int want_entropy,
                         int want_correct, double* sums, int dtype, int threads) {
    struct Owner {};
    for (int64_t t = 0; t < C; ++t)
        if (targets[t] != kIgnored && (targets[t] < 0 || targets[t] >= V)) return t;
    double* row = scratch<Owner, double, 0>(3 * C);
    const CrossEntropyJob job = {logits,       stride,          targets, C,          V,
                                 scale,        label_smoothing, softcap, multiplier, want_grad,
                                 want_entropy, want_correct,    row,     dtype};
    over_rows(C, V, 1, threads,
              [&](int64_t first, int64_t last) { level().elementwise->cross_entropy(job, first, last); });
    for (int k = 0; k < 3; ++k) sums[k] = 0.0;
    for (int64_t t = 0; t < C; ++t)
        for (int k = 0; k < 3; ++k) sums[k] += row[3 * t + k];
    return -1;
}

void rw_dropout(const void* z, void* out, int add, float factor, uint32_t threshold, uint32_t before, uint32_t middle,
                int64_t n, int dtype, int threads) {
    const DropoutJob job = {z, out, add, factor, threshold, before, middle, n, dtype};
    over_rows(n, 1, 1 << 10, threads,
              [&](int64_t first, int64_t last) { level().elementwise->dropout(job, first, last); });
}

void rw_row_cross(const void* W, const float* A, const float* B, float* cross, int64_t N, int64_t K, int64_t R,
                  int dtype, int threads) {
    const RowCrossJob job = {W, A, B, cross, N, K, R, dtype};
    over_rows(N, K * R, 4, threads,
              [&](int64_t first, int64_t last) { level().elementwise->row_cross(job, first, last); });
}

}  // extern "C"
