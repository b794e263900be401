// C interface of the native library. It is called through ctypes and knows nothing of torch.
//
// Legend: n elements in row-major order, b a block of block_size of them; T rows of x, K in features, N out features.
// The caller has checked every size: see checks.py and elementwise_checks.py in src/rankwise/ops.
#pragma once

#include <stdint.h>

#ifdef _WIN32
#define RW_EXPORT __declspec(dllexport)
#else
#define RW_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum rw_dtype { RW_FLOAT32 = 0, RW_BFLOAT16 = 1, RW_FLOAT16 = 2, RW_INT8 = 3 };
// From slow to fast. A processor has a set of them: AVX-512 does not imply AVX-VNNI.
enum rw_level_number {
    RW_PORTABLE = 0,
    RW_AVX2 = 1,
    RW_AVX_VNNI = 2,
    RW_AVX512 = 3,
    RW_AVX512_BF16 = 4,
    RW_AMX = 5
};
// The block types of GGUF files, by ggml's numbers; and MXFP4 as gpt-oss' files have it, codes and exponents apart.
enum rw_ggml_type {
    RW_Q4_0 = 2,
    RW_Q4_1 = 3,
    RW_Q5_0 = 6,
    RW_Q5_1 = 7,
    RW_Q8_0 = 8,
    RW_Q4_K = 12,
    RW_Q5_K = 13,
    RW_Q6_K = 14,
    RW_MXFP4 = 39
};

// w'_i = value[code_i] * absmax_b, or with nested_absmax: absmax_b = dynamic_map[absmax[b]] * nested_absmax[b / 256] +
// offset.
typedef struct rw_weight {
    const uint8_t* packed;       // code of element 2j in the high nibble of byte j
    const void* absmax;          // float per block, or uint8_t per block when nested_absmax is given
    const float* nested_absmax;  // or null
    const float* offset;         // one float, or null
    const float* value;          // 16
    const float* dynamic_map;    // 256, or null
    int64_t elements;            // n
    int64_t block_size;
    // Of a weight in the blocks of a file, else 0: its type, columns, bytes of a row, and for each row its place in
    // packed, or null. The fields between packed and elements are then null, but absmax of MXFP4: uint8_t per block.
    int64_t ggml_type, columns, row_bytes;
    const int32_t* order;
} rw_weight;

RW_EXPORT int rw_interface(void);
RW_EXPORT int rw_levels(void);  // of this CPU and build: bit n for level n
RW_EXPORT int rw_level(void);
RW_EXPORT void rw_set_level(int level);

// GOMP_parallel of the OpenMP runtime to share; null: threads are started per call.
RW_EXPORT void rw_share_threads(void* gomp_parallel);

// Requests huge pages for memory that is not touched yet. If the system refuses, only the speed changes.
RW_EXPORT void rw_use_huge_pages(void* data, int64_t bytes);

// Returns -1, or the first block that holds NaN or Inf (packed and absmax are then garbage).
// bound: 15 midpoints of the sorted values; order: 16 codes in ascending order of their values.
RW_EXPORT int64_t rw_quantize_4bit(const void* w, int dtype, int64_t n, int64_t block_size, const float* bound,
                                   const uint8_t* order, uint8_t* packed, float* absmax, int threads);

// Elements [first, first + count) of the weight.
RW_EXPORT void rw_dequantize_4bit(const rw_weight* weight, int64_t first, int64_t count, int dtype, void* out,
                                  int threads);

// y (T, N) = x (T, K) W'^T + bias (N, or null); W' rounded to dtype, sums in float32.
RW_EXPORT void rw_linear_4bit(const rw_weight* weight, const void* x, int64_t T, int64_t N, int64_t K, int dtype,
                              const void* bias, void* y, int threads);

// ||W'_n|| of W' rounded to dtype, sums in float32.
RW_EXPORT void rw_row_norms_4bit(const rw_weight* weight, int64_t N, int64_t K, int dtype, float* norms, int threads);

// A tensor (B, L, heads, D) whose last stride is 1; the others in elements.
typedef struct rw_heads {
    const void* data;
    int64_t batch, token, head;
} rw_heads;

// Query i of batch b sees the keys j with start[b, r, i] <= j < end[b, r, i] for some r; null: start 0, end
// i + 1 + Lk - Lq. The ranges of a query are disjoint.
typedef struct rw_attention {
    int64_t B, Lq, Lk, H, Hkv, D;  // H a multiple of Hkv; D a multiple of 16, at most 256
    rw_heads q, k, v;
    const int32_t* start;  // (B, R, Lq), or null
    const int32_t* end;    // (B, R, Lq), or null
    float scale;           // positive
    int dtype;             // of q, k, v and all results but lse: bfloat16 or, where the level takes it, float32
    int64_t R;             // ranges of a query, 1 for null
} rw_attention;

// Whether the current level has attention, and attention in float32; the two functions below must not be called where
// it has not.
RW_EXPORT int rw_attention_available(void);
RW_EXPORT int rw_attention_takes_float32(void);

// out (B, Lq, H, D) = softmax(scale q k^T) v; lse float (B, H, Lq), the logarithm of the sum of exponentials. A query
// that sees no key gets zeros and -inf.
RW_EXPORT void rw_attention_forward(const rw_attention* attention, void* out, float* lse, int threads);

// Contiguous dq (B, Lq, H, D), dk and dv (B, Lk, Hkv, D) of grad (B, Lq, H, D), given the results of the forward
// function.
RW_EXPORT void rw_attention_backward(const rw_attention* attention, const void* out, const float* lse,
                                     const rw_heads* grad, void* dq, void* dk, void* dv, int threads);

// The element-wise parts of a training step, in float32 or bfloat16; strides of rows in elements, rows dense. What each
// computes stands in src/rankwise/ops/reference.py.
enum rw_activation { RW_SILU = 0, RW_GELU_TANH = 1, RW_GELU = 2 };

// y (T, N) <- g * (y + scale * u B^T) + bias; u (T, R), B (N, R), g and bias (N) or null.
RW_EXPORT void rw_low_rank_add(void* y, int64_t y_stride, const void* u, int64_t u_stride, const void* B, float scale,
                               const float* g, const float* bias, int64_t T, int64_t N, int64_t R, int dtype,
                               int threads);

// cross_n = <W_n A^T, B_n>: W (N, K) of dtype, A (R, K) and B (N, R) float.
RW_EXPORT void rw_row_cross(const void* W, const float* A, const float* B, float* cross, int64_t N, int64_t K,
                            int64_t R, int dtype, int threads);

// dz = dy * g, and dot = sum_T dy * y unless y is null.
RW_EXPORT void rw_scaled_grad(const void* dy, int64_t dy_stride, const void* y, int64_t y_stride, const float* g,
                              void* dz, float* dot, int64_t T, int64_t N, int dtype, int threads);

RW_EXPORT void rw_rms_norm(const void* x, int64_t x_stride, const void* w, float eps, int offset, int cast_first,
                           void* y, float* rstd, int64_t T, int64_t D, int dtype, int threads);

// residual may be null.
RW_EXPORT void rw_rms_norm_backward(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const void* w,
                                    const float* rstd, int offset, const void* residual, int64_t residual_stride,
                                    void* dx, int64_t T, int64_t D, int dtype, int threads);

// product = act(gate) * up; with dout also dgate and dup, and product may then be null.
RW_EXPORT void rw_glu(const void* dout, int64_t dout_stride, const void* gate, int64_t gate_stride, const void* up,
                      int64_t up_stride, int act, void* dgate, void* dup, void* product, int64_t T, int64_t N,
                      int dtype, int threads);

// strides: of batch, head and position; sizes: B, H, L, D and the columns that turn. cos and sin (L, rotary),
// batch_stride apart.
RW_EXPORT void rw_rope(const void* q, const int64_t* q_stride, const void* cos, const void* sin, int64_t batch_stride,
                       int inverse, void* out, const int64_t* out_stride, const int64_t* sizes, int dtype,
                       int table_dtype, int threads);

// sums: loss, entropy, rows predicted right. softcap 0: none. Returns -1, or the first row whose target is out of
// range.
RW_EXPORT int64_t rw_cross_entropy(void* logits, int64_t stride, const int64_t* targets, int64_t C, int64_t V,
                                   float scale, float label_smoothing, float softcap, float multiplier, int want_grad,
                                   int want_entropy, int want_correct, double* sums, int dtype, int threads);

// out = z * factor where the hash of the index is at least the threshold, else 0; with `add`, out grows by it.
RW_EXPORT void rw_dropout(const void* z, void* out, int add, float factor, uint32_t threshold, uint32_t before,
                          uint32_t middle, int64_t n, int dtype, int threads);

// How a term is multiplied in integers up to rw_products_largest. Its a is what rw_quantize_rows made; its weight is
// rounded while it is packed: W_q = round(W * by_column * by_row), or is W_q itself in RW_INT8, where the largest is 127.
// Both sizes of the weight are multiples of 32. Sums are exact.
typedef struct rw_eight_bit {
    const float* a_scale;             // (T), readable up to a multiple of 32 rows
    const float *by_row, *by_column;  // of the weight as it lies
    const float* out_scale;           // (N), times the sums
} rw_eight_bit;

// One term of a sum of products: a W^T, or, with `across`, a W. Terms in 8 bits come before the others.
typedef struct rw_term {
    const void* a;  // (T, length) of the call's dtype, rows a_stride apart
    int64_t a_stride;
    int64_t length;  // what is summed over
    const void* w;   // rows of w_stride elements: the columns of the result or, with `across`, what is summed over
    int64_t w_stride;
    const rw_weight* packed;  // a weight of 4 bits in place of w, or null
    const float* gain;        // (length,) or null: times the elements that are summed over
    float scale;              // of w; w, gain and scale are multiplied in float32 and, for tiles, rounded once
    int w_dtype;              // float32, bfloat16 or, in 8 bits and not of groups, int8
    int across;
    const void* a_rest;  // what rounding a to bfloat16 left, as a lies, or null; only with exact
    int exact;  // on tiles a float32 w without `across` counts as two bfloat16 numbers, its rounded value and the rest
    const rw_eight_bit* eight_bit;  // or null
    int64_t w_first;                // of a packed weight, the elements before this term's
} rw_term;

// Whether the current level has sums of products; the functions below must not be called where it has not. And a switch
// for them.
RW_EXPORT int rw_products_available(void);
// Whether they multiply tiles of bfloat16 pairs; otherwise they compute in float32, where PyTorch's own bfloat16
// products find no instruction either.
RW_EXPORT int rw_products_are_tiles(void);
// The largest integer of their terms: 127, or 1,023 where instructions multiply integers of 16 bits only; 0 without them.
RW_EXPORT int rw_products_largest(void);
// 0: none; 1: allowed; with 2 and 3 AVX-512 multiplies pairs of bfloat16 in float32, or by dot products.
RW_EXPORT void rw_products_allow(int allowed);

// q (T, K) = round(x * factor / scale), scale (T) = max |x * factor| / rw_products_largest of each row of x (T, K), of
// dtype as above. q is int16_t, or uint8_t with 128 added where the largest is 127; q_stride_bytes is a multiple of 64.
// dither: whether each quotient is rounded up or down with no bias, as a fixed sequence of numbers says.
RW_EXPORT void rw_quantize_rows(const void* x, int dtype, int64_t x_stride, const float* factor, int64_t T, int64_t K,
                                uint8_t* q, int64_t q_stride_bytes, float* scale, int dither, int threads);

// The same of groups of rows, each with a factor of its own (groups, K).
RW_EXPORT void rw_grouped_quantize_rows(const void* x, int dtype, int64_t x_stride, const float* factor,
                                        const int64_t* sizes, int64_t groups, int64_t K, uint8_t* q,
                                        int64_t q_stride_bytes, float* scale, int dither, int threads);

// out (T, N) = g * (sum of at most 16 terms) + bias, rounded once; g and bias (N) or null. rest: what rounding to
// bfloat16 left, as out lies, or null. dtype, of every a, of out and of rest: bfloat16 or, without tiles, float32.
RW_EXPORT void rw_products(const rw_term* terms, int count, int dtype, int64_t T, int64_t N, const float* g,
                           const float* bias, void* out, void* rest, int64_t out_stride, int threads);

// The same of groups of rows, each with weights of its own, without g and rest: sizes[i] rows belong to group i, whose
// weight of term j lies i * apart[j] elements after that of the term; bias (groups, N) or null. In 8 bits, all groups
// have the same by_column; the scales of the weight's rows are (groups, rows).
RW_EXPORT void rw_grouped_products(const rw_term* terms, const int64_t* apart, int count, const int64_t* sizes,
                                   int64_t groups, int dtype, int64_t N, const float* bias, void* out,
                                   int64_t out_stride, int threads);

// out (R, C), or (C, R) with by_column, = scale * gain * q^T m of q (T, R) and m (T, C), of dtype as above; gain (C) or
// null. out is float32 or bfloat16. dot (C) = sum_T m * y, unless null; with divisor (C) divided by it, and 0 where
// that is 0.
RW_EXPORT void rw_row_product(int dtype, const void* q, int64_t q_stride, const void* m, int64_t m_stride,
                              const void* y, int64_t y_stride, int64_t T, int64_t R, int64_t C, float scale,
                              const float* gain, int by_column, void* out, int out_dtype, const float* divisor,
                              float* dot, int threads);

// The first of it for each group of rows, to out (groups, R, C) or (groups, C, R); a group without rows is left as it is.
RW_EXPORT void rw_grouped_row_product(int dtype, const void* q, int64_t q_stride, const void* m, int64_t m_stride,
                                      const int64_t* sizes, int64_t groups, int64_t R, int64_t C, float scale,
                                      int by_column, void* out, int out_dtype, int threads);

#ifdef __cplusplus
}
#endif
