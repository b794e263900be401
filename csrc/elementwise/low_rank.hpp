// y = g * (y + scale * u B^T) + bias: products of a few rows of u with all of B, added to y on its one way through the
// registers.
//
// B is packed in tiles of 2 W columns, step by step: a step is one column of u in float32, or, where the level
// multiplies bfloat16, a pair of them.
#pragma once

#include "common/scratch.hpp"
#include "common/vector.hpp"
#include "elementwise/kernels.hpp"

namespace rankwise::RW_ISA {
namespace {

constexpr int kLowRankColumns = 2 * W;
constexpr int kLowRankRows = W == 16 ? 8 : 4;  // 2 sums per row fill half of the registers

struct FloatSteps {
    static constexpr int64_t ranks = 1;
    template <int D>
    static uint32_t step(const void* row, int64_t r, int64_t) {
        return rankwise::bits_of(load_as_float<D>(row, r));
    }
    static RW_INLINE Floats multiply_add(Floats sum, Words b, uint32_t u) {
        return madd(floats_of(b), floats_of(all(u)), sum);
    }
};

#ifdef __AVX512BF16__
struct Bfloat16Steps {
    static constexpr int64_t ranks = 2;
    template <int D>
    static uint32_t step(const void* row, int64_t r, int64_t R) {
        uint32_t pair = 0;
        std::memcpy(&pair, static_cast<const uint16_t*>(row) + r, r + 1 < R ? 4 : 2);
        return pair;
    }
    static RW_INLINE Floats multiply_add(Floats sum, Words b, uint32_t u) {
        return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(b),
                                                         reinterpret_cast<__m512bh>(all(u))));
    }
};
#endif

template <int D>
constexpr auto steps_of() {
#ifdef __AVX512BF16__
    if constexpr (D == RW_BFLOAT16) return Bfloat16Steps{};
    else
#endif
        return FloatSteps{};
}

template <int D>
using StepsOf = decltype(steps_of<D>());

template <int D>
int64_t step_count(int64_t R) {
    return (R + StepsOf<D>::ranks - 1) / StepsOf<D>::ranks;
}

template <int D>
const char* row_of(const void* data, int64_t row, int64_t stride) {
    return static_cast<const char*>(data) + row * stride * (D == RW_FLOAT32 ? 4 : 2);
}

template <int D>
char* row_of(void* data, int64_t row, int64_t stride) {
    return static_cast<char*>(data) + row * stride * (D == RW_FLOAT32 ? 4 : 2);
}

template <int D>
void pack_B(const LowRankJob& job) {
    const int64_t S = step_count<D>(job.R), tiles = (job.N + kLowRankColumns - 1) / kLowRankColumns;
    uint32_t* out = job.packed;
    for (int64_t tile = 0; tile < tiles; ++tile, out += S * kLowRankColumns)
        for (int64_t c = 0; c < kLowRankColumns; ++c) {
            const int64_t n = tile * kLowRankColumns + c;
            for (int64_t s = 0; s < S; ++s)
                out[s * kLowRankColumns + c] =
                    n < job.N ? StepsOf<D>::template step<D>(row_of<D>(job.B, n, job.R), s * StepsOf<D>::ranks, job.R)
                              : 0u;
        }
}

// One row's columns from n on.
template <int D, class Part>
RW_INLINE void add_to_row(const LowRankJob& job, char* y, int64_t n, Floats sum, Part part) {
    Floats z = madd(sum, all(job.scale), load<D>(y, n, part));
    if (job.g) z = z * load<RW_FLOAT32>(job.g, n, part);
    if (job.bias) z = z + load<RW_FLOAT32>(job.bias, n, part);
    store<D>(y, n, z, part);
}

// The products of Rows rows of u with one tile of B.
template <int D, int Rows>
RW_INLINE void multiply_tile(const uint32_t* b, const uint32_t* u, int64_t S, Floats (&left)[Rows],
                             Floats (&right)[Rows]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) left[r] = right[r] = Floats{};
    for (int64_t s = 0; s < S; ++s, b += kLowRankColumns, u += Rows) {
        Words first, second;
        std::memcpy(&first, b, sizeof(first));
        std::memcpy(&second, b + W, sizeof(second));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            left[r] = StepsOf<D>::multiply_add(left[r], first, u[r]);
            right[r] = StepsOf<D>::multiply_add(right[r], second, u[r]);
        }
    }
}

// Never inlined: among the registers of a larger function GCC keeps a sum in memory.
template <int D, int Rows>
__attribute__((noinline)) void add_tile(const LowRankJob& job, int64_t t, int64_t n, const uint32_t* u, int64_t S) {
    Floats left[Rows], right[Rows];
    multiply_tile<D, Rows>(job.packed + n * S, u, S, left, right);
    char* y = row_of<D>(job.y, t, job.y_stride);
    const int64_t step = job.y_stride * (D == RW_FLOAT32 ? 4 : 2);
    const Floats scale = all(job.scale);
    Floats g[2] = {all(1.0f), all(1.0f)}, bias[2] = {};
    if (job.g) g[0] = load<RW_FLOAT32>(job.g, n), g[1] = load<RW_FLOAT32>(job.g, n + W);
    if (job.bias) bias[0] = load<RW_FLOAT32>(job.bias, n), bias[1] = load<RW_FLOAT32>(job.bias, n + W);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r, y += step) {
        store<D>(y, n, madd(madd(left[r], scale, load<D>(y, n)), g[0], bias[0]));
        store<D>(y, n + W, madd(madd(right[r], scale, load<D>(y, n + W)), g[1], bias[1]));
    }
}

template <int D, int Rows>
__attribute__((noinline)) void add_last_tile(const LowRankJob& job, int64_t t, int64_t n, const uint32_t* u,
                                             int64_t S) {
    Floats left[Rows], right[Rows];
    multiply_tile<D, Rows>(job.packed + n * S, u, S, left, right);
    for (int r = 0; r < Rows; ++r) {
        char* y = row_of<D>(job.y, t + r, job.y_stride);
        const int rest = static_cast<int>(job.N - n);
        add_to_row<D>(job, y, n, left[r], Some{rest < W ? rest : W});
        if (rest > W) add_to_row<D>(job, y, n + W, right[r], Some{rest - W});
    }
}

template <int D, int Rows>
void add_to_rows(const LowRankJob& job, int64_t t, const uint32_t* u, int64_t S) {
    int64_t n = 0;
    for (; n + kLowRankColumns <= job.N; n += kLowRankColumns) add_tile<D, Rows>(job, t, n, u, S);
    if (n < job.N) add_last_tile<D, Rows>(job, t, n, u, S);
}

template <int D, int Rows>
void add_rows_from(const LowRankJob& job, int64_t t, uint32_t* u, int64_t S) {
    for (int r = 0; r < Rows; ++r) {
        const char* row = row_of<D>(job.u, t + r, job.u_stride);
        for (int64_t s = 0; s < S; ++s)
            u[s * Rows + r] = StepsOf<D>::template step<D>(row, s * StepsOf<D>::ranks, job.R);
    }
    add_to_rows<D, Rows>(job, t, u, S);
}

template <int D>
void low_rank_rows(const LowRankJob& job, int64_t first, int64_t last) {
    struct Owner {};
    const int64_t S = step_count<D>(job.R);
    uint32_t* u = scratch<Owner, uint32_t, 0>(S * kLowRankRows);
    int64_t t = first;
    for (; t + kLowRankRows <= last; t += kLowRankRows) add_rows_from<D, kLowRankRows>(job, t, u, S);
    for (; t < last; ++t) add_rows_from<D, 1>(job, t, u, S);
}

inline void low_rank_add(const LowRankJob& job, int64_t first, int64_t last) {
    job.dtype == RW_FLOAT32 ? low_rank_rows<RW_FLOAT32>(job, first, last)
                            : low_rank_rows<RW_BFLOAT16>(job, first, last);
}

inline void low_rank_pack(const LowRankJob& job) {
    job.dtype == RW_FLOAT32 ? pack_B<RW_FLOAT32>(job) : pack_B<RW_BFLOAT16>(job);
}

inline int64_t low_rank_packed_size(int64_t N, int64_t R, int dtype) {
    const int64_t S = dtype == RW_FLOAT32 ? step_count<RW_FLOAT32>(R) : step_count<RW_BFLOAT16>(R);
    return (N + kLowRankColumns - 1) / kLowRankColumns * kLowRankColumns * S;
}

}  // namespace
}  // namespace rankwise::RW_ISA
