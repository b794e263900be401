// What the element-wise kernels of a training step are given, and the table of them that each level offers. Each
// function works on one thread's share of the rows. Strides are in elements.
//
// Legend: T rows, N and D columns, R rank, V vocabulary; B, H, L batch, heads, positions. Formulas:
// src/rankwise/ops/reference.py.
#pragma once

#include <cstdint>

#include "rankwise_native.h"

namespace rankwise {

struct LowRankJob {
    void* y;
    int64_t y_stride;
    const void* u;
    int64_t u_stride;
    const void* B;  // (N, R)
    float scale;
    const float *g, *bias;  // or null
    int64_t T, N, R;
    int dtype;
    uint32_t* packed;  // B as `low_rank_pack` leaves it
};

struct ScaledGradJob {
    const void* dy;
    int64_t dy_stride;
    const void* y;  // or null
    int64_t y_stride;
    const float* g;
    void* dz;
    int64_t T, N;
    int dtype;
    float* partial;  // (row blocks, N)
};

struct NormJob {
    const void* x;
    int64_t x_stride;
    const void* w;
    float eps;
    int offset, cast_first;
    void* y;
    float* rstd;
    int64_t T, D;
    int dtype;
};

struct NormBackwardJob {
    const void* dy;
    int64_t dy_stride;
    const void* x;
    int64_t x_stride;
    const void* w;
    const float* rstd;
    int offset;
    const void* residual;  // or null
    int64_t residual_stride;
    void* dx;
    int64_t T, D;
    int dtype;
};

struct GluJob {
    const void* dout;  // null: forward
    int64_t dout_stride;
    const void* gate;
    int64_t gate_stride;
    const void* up;
    int64_t up_stride;
    int act;
    void *dgate, *dup;
    void* product;  // or null
    int64_t T, N;
    int dtype;
};

struct RopeJob {
    const void* q;
    int64_t q_stride[3];  // of b, h, l
    const void *cos, *sin;
    int64_t batch_stride;  // of cos and sin: 0 or L rotary
    int inverse;
    void* out;
    int64_t out_stride[3];
    int64_t B, H, L, D, rotary;
    int dtype, table_dtype;
};

struct CrossEntropyJob {
    void* logits;
    int64_t stride;
    const int64_t* targets;
    int64_t C, V;
    float scale, label_smoothing, softcap, multiplier;  // softcap 0: none
    int want_grad, want_entropy, want_correct;
    double* row;  // (C, 3): loss, entropy, correct
    int dtype;
};

struct DropoutJob {
    const void* z;
    void* out;
    int add;  // whether out grows by the result
    float factor;
    uint32_t threshold, before, middle;
    int64_t n;
    int dtype;
};

struct RowCrossJob {
    const void* W;   // (N, K)
    const float* A;  // (R, K)
    const float* B;  // (N, R)
    float* cross;    // (N,)
    int64_t N, K, R;
    int dtype;  // of W
};

// Rows whose products are summed together by `scaled_grad`: fixed, so that no number of threads changes a sum.
constexpr int64_t kGradRows = 64;

constexpr int64_t kIgnored = -100;

struct ElementwiseKernels {
    int64_t (*low_rank_packed_size)(int64_t N, int64_t R, int dtype);
    void (*low_rank_pack)(const LowRankJob& job);
    void (*low_rank_add)(const LowRankJob& job, int64_t first, int64_t last);
    void (*scaled_grad)(const ScaledGradJob& job, int64_t first, int64_t last);  // row blocks
    void (*rms_norm)(const NormJob& job, int64_t first, int64_t last);
    void (*rms_norm_backward)(const NormBackwardJob& job, int64_t first, int64_t last);
    void (*glu)(const GluJob& job, int64_t first, int64_t last);
    void (*rope)(const RopeJob& job, int64_t first, int64_t last);  // positions of all batches
    void (*cross_entropy)(const CrossEntropyJob& job, int64_t first, int64_t last);
    void (*dropout)(const DropoutJob& job, int64_t first, int64_t last);     // elements
    void (*row_cross)(const RowCrossJob& job, int64_t first, int64_t last);  // rows of W
};

}  // namespace rankwise
