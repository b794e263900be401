// Runs every function of the native library, at every level of this CPU, over odd shapes in exactly sized buffers, so
// that the address and undefined-behaviour sanitizers see each access. The sums of codes, dequantized bytes and norms
// must not depend on the level.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "rankwise_native.h"

namespace {

uint32_t state = 1;

uint32_t next_random() {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

float next_float() { return static_cast<float>(next_random()) / 8388608.0f - 1.0f; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t size_of(int dtype) { return dtype == RW_FLOAT32 ? 4 : 2; }

// Heap memory of exactly so many bytes, aligned as torch's is.
struct Free {
    void operator()(uint8_t* data) const { ::operator delete[](data, std::align_val_t{64}); }
};
using Bytes = std::unique_ptr<uint8_t[], Free>;
Bytes bytes(int64_t count) { return Bytes(new (std::align_val_t{64}) uint8_t[static_cast<size_t>(count)]); }

struct Tables {
    std::vector<float> value, bound, dynamic_map;
    std::vector<uint8_t> order;
    Tables() {
        for (int c = 0; c < 16; ++c) {
            value.push_back(static_cast<float>(c) / 7.5f - 1.0f);
            order.push_back(static_cast<uint8_t>(c));
        }
        for (int c = 0; c < 15; ++c) bound.push_back((value[c] + value[c + 1]) / 2);
        for (int c = 0; c < 256; ++c) dynamic_map.push_back(static_cast<float>(c) / 127.5f - 1.0f);
    }
};

void fill(uint8_t* data, int dtype, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = next_float();
        uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        if (dtype == RW_FLOAT32) __builtin_memcpy(data + 4 * i, &bits, 4);
        const uint16_t half = static_cast<uint16_t>(dtype == RW_BFLOAT16 ? bits >> 16 : next_random() & 0xbbff);
        if (dtype != RW_FLOAT32) __builtin_memcpy(data + 2 * i, &half, 2);
    }
}

double checksum = 0;

void run(const Tables& tables, int64_t N, int64_t K, int64_t block, int64_t T, int dtype, bool nested) {
    const int64_t n = N * K, blocks = ceil_div(n, block), nested_blocks = ceil_div(blocks, 256);
    const Bytes w = bytes(n * size_of(dtype)), packed = bytes(ceil_div(n, 2)), x = bytes(T * K * size_of(dtype));
    const Bytes y = bytes(T * N * size_of(dtype)), bias = bytes(N * size_of(dtype)), codes = bytes(blocks);
    const Bytes out = bytes(n * 4);
    fill(w.get(), dtype, n);
    fill(x.get(), dtype, T * K);
    fill(bias.get(), dtype, N);
    std::vector<float> absmax(static_cast<size_t>(blocks)), scales(static_cast<size_t>(nested_blocks), 0.5f),
        norms(static_cast<size_t>(N));
    const float offset = 1.0f;
    if (rw_quantize_4bit(w.get(), dtype, n, block, tables.bound.data(), tables.order.data(), packed.get(),
                         absmax.data(), 2) != -1)
        std::abort();
    for (int64_t b = 0; b < blocks; ++b) codes[static_cast<size_t>(b)] = static_cast<uint8_t>(b * 37);
    const rw_weight plain = {packed.get(), absmax.data(), nullptr, nullptr, tables.value.data(), nullptr, n, block};
    const rw_weight doubled = {
        packed.get(), codes.get(), scales.data(), &offset, tables.value.data(), tables.dynamic_map.data(), n, block};
    const rw_weight* weight = nested ? &doubled : &plain;
    for (int to : {RW_FLOAT32, RW_BFLOAT16, RW_FLOAT16}) {
        const Bytes exact = bytes(n * size_of(to));
        rw_dequantize_4bit(weight, 0, n, to, exact.get(), 2);
        for (int64_t i = 0; i < n * size_of(to); ++i) checksum += exact[static_cast<size_t>(i)];
        if (n > 3) rw_dequantize_4bit(weight, 3, n - 3, to, exact.get(), 1);
    }
    rw_linear_4bit(weight, x.get(), T, N, K, dtype, nested ? bias.get() : nullptr, y.get(), 2);
    const bool has_products = dtype == RW_BFLOAT16 || (dtype == RW_FLOAT32 && !rw_products_are_tiles());
    if (rw_products_available() && T > 0 && N > 0 && has_products) {
        const Bytes back = bytes(T * K * size_of(dtype));
        const rw_term forward = {x.get(), K, K, nullptr, K, weight, nullptr, 1.0f, RW_BFLOAT16, 0, nullptr, 0};
        rw_products(&forward, 1, dtype, T, N, nullptr, nullptr, y.get(), nullptr, N, 2);
        const rw_term backward = {y.get(), N, N, nullptr, K, weight, norms.data(), 0.5f, RW_BFLOAT16, 1, nullptr, 0};
        rw_products(&backward, 1, dtype, T, K, nullptr, nullptr, back.get(), nullptr, K, 2);
    }
    rw_row_norms_4bit(weight, N, K, dtype, norms.data(), 2);
    for (float norm : norms) checksum += norm;
    for (int64_t b = 0; b < blocks; ++b) checksum += absmax[static_cast<size_t>(b)];
    for (int64_t j = 0; j < ceil_div(n, 2); ++j) checksum += packed[static_cast<size_t>(j)];
}

// A weight in the blocks of a file, its rows stored last to first; any bytes are such a weight.
void run_blocks(int type, int64_t elements, int64_t block_bytes, int64_t T, int dtype) {
    const int64_t N = 19, K = 3 * elements, row_bytes = 3 * block_bytes, n = N * K;
    const Bytes packed = bytes(N * row_bytes), x = bytes(T * K * size_of(dtype)), y = bytes(T * N * size_of(dtype));
    fill(packed.get(), RW_FLOAT16, N * row_bytes / 2);
    fill(x.get(), dtype, T * K);
    std::vector<int32_t> order;
    for (int64_t row = N; row > 0; --row) order.push_back(static_cast<int32_t>(row - 1));
    rw_weight weight = {packed.get(), nullptr, nullptr, nullptr, nullptr, nullptr, n, elements};
    const std::vector<uint8_t> exponents(static_cast<size_t>(n / 32), 120);
    if (type == RW_MXFP4) weight.absmax = exponents.data();
    weight.ggml_type = type, weight.columns = K, weight.row_bytes = row_bytes, weight.order = order.data();
    const Bytes out = bytes(n * size_of(dtype)), back = bytes(T * K * size_of(dtype));
    rw_dequantize_4bit(&weight, 5, n - 5, dtype, out.get(), 2);
    rw_linear_4bit(&weight, x.get(), T, N, K, dtype, nullptr, y.get(), 2);
    std::vector<float> norms(static_cast<size_t>(N));
    rw_row_norms_4bit(&weight, N, K, dtype, norms.data(), 2);
    if (!rw_products_available() || dtype != RW_BFLOAT16) return;
    const rw_term across = {y.get(), N, N, nullptr, K, &weight, nullptr, 1.0f, RW_BFLOAT16, 1, nullptr, 0};
    rw_products(&across, 1, dtype, T, K, nullptr, nullptr, back.get(), nullptr, K, 2);
}

double run_all(const Tables& tables) {
    state = 1;
    checksum = 0;
    const int64_t types[][3] = {{RW_Q4_0, 32, 18},   {RW_Q4_1, 32, 20},   {RW_Q5_0, 32, 22},   {RW_Q5_1, 32, 24},
                                {RW_Q8_0, 32, 34},   {RW_MXFP4, 32, 16},  {RW_Q4_K, 256, 144}, {RW_Q5_K, 256, 176}, {RW_Q6_K, 256, 210}};
    for (const auto& type : types)
        for (int dtype : {RW_FLOAT32, RW_BFLOAT16, RW_FLOAT16})
            for (int64_t T : {1, 7, 70}) run_blocks(static_cast<int>(type[0]), type[1], type[2], T, dtype);
    for (int64_t N : {0, 1, 3, 4, 17})
        for (int64_t K : {1, 7, 64, 129, 256})
            for (int64_t block : {32, 64, 4096})
                for (int64_t T : {0, 1, 2, 4, 5, 13})
                    for (int dtype : {RW_FLOAT32, RW_BFLOAT16, RW_FLOAT16})
                        for (bool nested : {false, true}) run(tables, N, K, block, T, dtype, nested);
    run(tables, 70, 4096, 64, 16, RW_BFLOAT16, true);
    run(tables, 70, 4096, 64, 40, RW_BFLOAT16, false);
    run(tables, 1030, 8200, 64, 1, RW_BFLOAT16, false);  // large enough to write past the caches
    return checksum;
}

// A tensor (B, L, heads, D) whose tokens are `gap` elements further apart than they need be.
struct Tensor {
    Bytes data;
    rw_heads heads;
    int64_t size;
    Tensor(int dtype, int64_t B, int64_t L, int64_t n, int64_t D, int64_t gap)
        : data(bytes(size_of(dtype) * (B * L * n * D + (B * L > 0 ? B * L - 1 : 0) * gap))),
          heads{data.get(), L * (n * D + gap), n * D + gap, D},
          size(size_of(dtype) * B * L * n * D) {
        fill(data.get(), dtype, B * L * n * D + (B * L > 0 ? B * L - 1 : 0) * gap);
    }
};

// Returns the bits of all results, so that threads can be compared.
std::vector<uint8_t> attend(int dtype, int64_t B, int64_t Lq, int64_t Lk, int64_t H, int64_t Hkv, int64_t D,
                            bool ranges, int threads) {
    const int64_t gap = ranges ? 6 : 0;
    state = 7;
    Tensor q(dtype, B, Lq, H, D, gap), k(dtype, B, Lk, Hkv, D, gap), v(dtype, B, Lk, Hkv, D, gap),
        grad(dtype, B, Lq, H, D, gap);
    Tensor out(dtype, B, Lq, H, D, 0), dq(dtype, B, Lq, H, D, 0), dk(dtype, B, Lk, Hkv, D, 0),
        dv(dtype, B, Lk, Hkv, D, 0);
    std::vector<float> lse(static_cast<size_t>(B * H * Lq));
    std::vector<int32_t> start, end;
    const int64_t R = ranges ? 2 : 1;
    for (int64_t i = 0; i < B * R * Lq; ++i) {
        start.push_back(static_cast<int32_t>(next_random() % (Lk + 8)) - 4);
        end.push_back(static_cast<int32_t>(next_random() % (Lk + 8)) - 4);
    }
    const rw_attention call = {B,
                               Lq,
                               Lk,
                               H,
                               Hkv,
                               D,
                               q.heads,
                               k.heads,
                               v.heads,
                               ranges ? start.data() : nullptr,
                               ranges ? end.data() : nullptr,
                               0.125f,
                               dtype,
                               R};
    rw_attention_forward(&call, out.data.get(), lse.data(), threads);
    rw_attention_backward(&call, out.data.get(), lse.data(), &grad.heads, dq.data.get(), dk.data.get(), dv.data.get(),
                          threads);
    std::vector<uint8_t> all;
    for (const Tensor* made : {&out, &dq, &dk, &dv})
        all.insert(all.end(), made->data.get(), made->data.get() + made->size);
    return all;
}

bool attention_is_sound() {
    if (!rw_attention_available()) return true;
    for (int64_t D : {16, 64, 80, 112, 256})
        for (int64_t Lq : {0, 1, 63, 64, 130})
            for (int64_t Lk : {1, 64, 131})
                for (bool ranges : {false, true})
                    for (int dtype : {RW_BFLOAT16, RW_FLOAT32}) {
                        if (dtype == RW_FLOAT32 && !rw_attention_takes_float32()) continue;
                        if (attend(dtype, 2, Lq, Lk, 4, 2, D, ranges, 1) !=
                            attend(dtype, 2, Lq, Lk, 4, 2, D, ranges, 3))
                            return false;
                    }
    std::printf("attention\n");
    return true;
}

}  // namespace

double elementwise_sum();   // sanitize/elementwise.cpp
bool products_are_sound();  // sanitize/products.cpp

bool elementwise_is_sound() {
    rw_set_level(RW_PORTABLE);
    const double expected = elementwise_sum();
    for (int level = RW_PORTABLE; level <= RW_AMX; ++level) {
        if (!(rw_levels() >> level & 1)) continue;
        rw_set_level(level);
        const double found = elementwise_sum();
        std::printf("element-wise, level %d: %.6f\n", level, found);
        // Sums of bfloat16 roundings differ a little more than those of codes.
        if (!(std::fabs(found - expected) <= 1e-4 * std::fabs(expected))) return false;
    }
    return true;
}

int main() {
    const Tables tables;
    rw_set_level(RW_PORTABLE);
    const double expected = run_all(tables);
    for (int level = RW_PORTABLE; level <= RW_AMX; ++level) {
        if (!(rw_levels() >> level & 1)) continue;
        rw_set_level(level);
        const double found = run_all(tables);
        std::printf("level %d: %.6f\n", level, found);
        if (std::fabs(found - expected) > 1e-5 * std::fabs(expected) || !products_are_sound()) return 1;
    }
    if (!attention_is_sound() || !elementwise_is_sound()) return 1;
    std::printf("products\n");
    return 0;
}
