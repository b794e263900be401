// Codes to weights. A block has only 16 possible weights: value[c] * absmax, rounded to the wanted type once per block
// and then looked up, so every kernel sees exactly the numbers that dequantization gives.
#pragma once

#include "common/convert.hpp"
#include "four_bit/gguf.hpp"

namespace rankwise::RW_ISA {

static inline float block_scale(const rw_weight& weight, int64_t block) {
    if (!weight.nested_absmax) return static_cast<const float*>(weight.absmax)[block];
    const uint8_t code = static_cast<const uint8_t*>(weight.absmax)[block];
    return weight.dynamic_map[code] * weight.nested_absmax[block >> 8] + *weight.offset;
}

// The scales of `count` blocks. True if Isa may make their tables the quick way; here there is none.
static inline bool scales_one_by_one(const rw_weight& weight, int64_t first, int64_t count, float* scales) {
    for (int64_t i = 0; i < count; ++i) scales[i] = block_scale(weight, first + i);
    return true;
}

// Asks for the scales of blocks that come next; past the last one this is harmless.
static inline void prefetch_scales(const rw_weight& weight, int64_t first, int64_t count) {
    if (weight.ggml_type) return;
    const int64_t size = weight.nested_absmax ? 1 : 4;
    for (int64_t i = first * size; i < (first + count) * size; i += 64)
        __builtin_prefetch(static_cast<const char*>(weight.absmax) + i);
}

// Rows that are read side by side lie one after the other in memory. Asked for in that order, each line once and into
// the second-level cache, they arrive as one long stream, where several short ones are too many for the hardware's own
// prefetching.
//
// Where to begin when `bytes` are read next, side by side: all of them are there before the first is needed.
static inline const uint8_t* next_codes(const uint8_t* packed, int64_t bytes) {
    constexpr int64_t least = 8192;
    return packed + (bytes > least ? bytes : least);
}

// The next `bytes` of the stream; past the end of the weight this is harmless.
template <int64_t bytes>
static inline __attribute__((always_inline)) void prefetch_next(const uint8_t*& ahead) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    ahead += bytes;
}

// The 16 weights of a block, as Isa keeps a table of Out.
template <class Isa, int D, class Out>
static inline auto table_of(const rw_weight& weight, int64_t block) {
    return Isa::template table<D, false>(weight.value, block_scale(weight, block), static_cast<Out*>(nullptr));
}

// Elements [first, first + count) of the weight, rounded to D, as Out: float, or uint16_t holding the bits of D.
// Any range: it may begin and end inside a block and inside a byte.
template <class Isa, int D, class Out, bool Stream = false>
static void decode(const rw_weight& weight, int64_t first, int64_t count, Out* out) {
    if (weight.ggml_type) return decode_blocks<D>(weight, first, count, out);
    const int64_t end = first + count;
    int64_t i = first, block = first / weight.block_size;
    if (i == block * weight.block_size) {
        const int64_t half = weight.block_size / 2;
        const uint8_t* packed = weight.packed + i / 2;
        for (; i + weight.block_size <= end; i += weight.block_size, packed += half, out += 2 * half, ++block)
            Isa::template expand_block<Stream>(table_of<Isa, D, Out>(weight, block), packed, half, out);
    }
    while (i < end) {
        const int64_t block_end = (block + 1) * weight.block_size, stop = block_end < end ? block_end : end;
        const auto table = table_of<Isa, D, Out>(weight, block);
        if (i & 1) {
            *out++ = Isa::entry(table, weight.packed[i / 2] & 15);
            ++i;
        }
        const int64_t bytes = (stop - i) / 2;
        Isa::template expand<Stream>(table, weight.packed + i / 2, bytes, out);
        out += 2 * bytes;
        i += 2 * bytes;
        if (i < stop) {
            *out++ = Isa::entry(table, weight.packed[i / 2] >> 4);
            ++i;
        }
        ++block;
    }
}

template <class Isa, int D, class Out>
static void decode_to(const rw_weight& weight, int64_t first, int64_t count, void* out, bool stream) {
    if (stream) {
        decode<Isa, D, Out, true>(weight, first, count, static_cast<Out*>(out));
        Isa::fence();
    } else {
        decode<Isa, D, Out, false>(weight, first, count, static_cast<Out*>(out));
    }
}

template <class Isa>
static void dequantize(const rw_weight& weight, int64_t first, int64_t count, int dtype, void* out) {
    // Beyond the caches, writing past them saves reading each line before it is overwritten.
    const int64_t bytes = weight.elements * (dtype == RW_FLOAT32 ? 4 : 2);
    const bool stream =
        bytes >= Isa::stream_bytes && reinterpret_cast<uintptr_t>(out) % 64 == 0 && first % weight.block_size == 0;
    switch (dtype) {
        case RW_FLOAT32: return decode_to<Isa, RW_FLOAT32, float>(weight, first, count, out, stream);
        case RW_BFLOAT16: return decode_to<Isa, RW_BFLOAT16, uint16_t>(weight, first, count, out, stream);
        default: return decode_to<Isa, RW_FLOAT16, uint16_t>(weight, first, count, out, stream);
    }
}

}  // namespace rankwise::RW_ISA
