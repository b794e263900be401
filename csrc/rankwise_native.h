// C interface of the native 4-bit kernels. Called through ctypes; knows nothing of torch.
//
// Legend: n elements in row-major order, b a block of block_size of them; T rows of x, K in features, N out features.
// The caller has checked every size: see src/rankwise/ops/checks.py.
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

enum rw_dtype { RW_FLOAT32 = 0, RW_BFLOAT16 = 1, RW_FLOAT16 = 2 };
enum rw_level_number { RW_PORTABLE = 0, RW_AVX2 = 1, RW_AVX512 = 2 };

// w'_i = value[code_i] * absmax_b, or with nested_absmax: absmax_b = dynamic_map[absmax[b]] * nested_absmax[b / 256] + offset.
typedef struct rw_weight {
    const uint8_t* packed;       // code of element 2j in the high nibble of byte j
    const void* absmax;          // float per block, or uint8_t per block when nested_absmax is given
    const float* nested_absmax;  // or null
    const float* offset;         // one float, or null
    const float* value;          // 16
    const float* dynamic_map;    // 256, or null
    int64_t elements;            // n
    int64_t block_size;
} rw_weight;

RW_EXPORT int rw_interface(void);
RW_EXPORT int rw_best_level(void);  // of this CPU and build
RW_EXPORT int rw_level(void);
RW_EXPORT void rw_set_level(int level);

// GOMP_parallel of the OpenMP runtime to share; null: threads are started per call.
RW_EXPORT void rw_share_threads(void* gomp_parallel);

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

#ifdef __cplusplus
}
#endif
