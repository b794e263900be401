// Attention of bfloat16 tensors, on AVX2 also of float32 ones: one table of kernels for each level that has it. AVX2
// computes in float32; AVX-512 with BF16, and AMX on top of it, in bfloat16.
//
// Legend: B batch, R ranges of keys of each query, Lq queries, Lk keys, H query heads, Hkv key heads, G = H / Hkv heads that share a key head, D size
// of a head.
#pragma once

#include <cstdint>

#include "common/inline.hpp"
#include "rankwise_native.h"

namespace rankwise {

// A (B, L, heads, D) tensor whose elements of a head lie side by side; strides in elements.
struct Heads {
    const void* data;
    int64_t batch, token, head;

    template <class Element = uint16_t>
    RW_INLINED const Element* row(int64_t b, int64_t i, int64_t h) const {
        return static_cast<const Element*>(data) + b * batch + i * token + h * head;
    }
};

struct AttentionJob {
    int64_t B, R, Lq, Lk, H, Hkv, D;
    Heads q, k, v;
    const int32_t *start, *end;  // (B, R, Lq), or null
    float scale;
    int dtype;

    RW_INLINED int64_t group() const { return H / Hkv; }
    RW_INLINED int64_t clamped(int64_t j) const { return j < 0 ? 0 : j < Lk ? j : Lk; }
    // In its range r, query i of batch b sees the keys from first_key on, before last_key.
    RW_INLINED int64_t first_key(int64_t b, int64_t r, int64_t i) const {
        return start ? clamped(start[(b * R + r) * Lq + i]) : 0;
    }
    RW_INLINED int64_t last_key(int64_t b, int64_t r, int64_t i) const {
        return clamped(end ? end[(b * R + r) * Lq + i] : i + 1 + Lk - Lq);
    }
};

struct AttentionForward {
    AttentionJob job;
    void* out;   // (B, Lq, H, D)
    float* lse;  // (B, H, Lq)
};

struct AttentionBackward {
    AttentionJob job;
    const void* out;
    const float* lse;
    Heads grad;
    void *dq, *dk, *dv;  // (B, L, heads, D)
};

// The queries of the heads that share one key head, as one thread takes them: tiles [first, last) of `kAttentionTile`
// queries.
struct AttentionShare {
    int64_t b, head, first, last;
};

constexpr int64_t kAttentionTile = 64;

struct AttentionKernels {
    void (*forward)(const AttentionForward& call, const AttentionShare& share);
    // Writes dq; leaves the share's part of dk and dv in `sums`, sums_size floats.
    void (*backward)(const AttentionBackward& call, const AttentionShare& share, float* sums);
    int64_t (*sums_size)(const AttentionJob& job);
    // Adds up the sums of `shares` shares in order and writes dk and dv of one key head.
    void (*finish)(const AttentionBackward& call, int64_t b, int64_t head, float* sums, int64_t shares);
    bool takes_float32;  // besides bfloat16
};

}  // namespace rankwise
