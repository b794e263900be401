// The C interface of attention: picks the level, cuts the work into shares.
#include "attention.hpp"

#include <atomic>
#include <memory>

#include "parallel.hpp"
#include "scratch.hpp"

namespace {

using namespace rankwise;

// Shares of a whole backward pass, where there are fewer key heads. Every share has sums of its own that must be added up in the end.
// Not a function of the number of threads: the result must not be either.
constexpr int64_t kBackwardShares = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// -1: whatever is there; 0: without AMX, for tests.
std::atomic<int> amx_choice{-1};

// For heads of size D; D = 0 asks for any.
const AttentionKernels* kernels(int64_t D) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (rw_level() == RW_AVX512 && __builtin_cpu_supports("avx512bf16")) {
        const AttentionKernels* amx = D % 32 == 0 && amx_choice != 0 ? attention_amx() : nullptr;
        return amx ? amx : attention_avx512_bf16();
    }
    if (rw_level() != RW_PORTABLE) return attention_avx2();
#else
    (void)D;
#endif
    return nullptr;
}

Heads heads(const rw_heads& x) { return {x.data, x.batch, x.token, x.head}; }

AttentionJob job_of(const rw_attention& a) {
    return {a.B, a.Lq, a.Lk, a.H, a.Hkv, a.D, heads(a.q), heads(a.k), heads(a.v), a.start, a.end, a.scale, a.dtype};
}

// Calls body(share, number of the share) for `parts` shares of each key head.
template <class Body>
void each_share(const AttentionJob& job, int64_t parts, int threads, const Body& body) {
    const int64_t tiles = ceil_div(job.Lq, kAttentionTile);
    parallel(job.B * job.Hkv * parts, threads, [&](int64_t task) {
        const int64_t unit = task / parts, part = task % parts;
        body(AttentionShare{unit / job.Hkv, unit % job.Hkv, tiles * part / parts, tiles * (part + 1) / parts}, task);
    });
}

int64_t parts_for(const AttentionJob& job, int64_t shares) {
    const int64_t units = job.B * job.Hkv, tiles = ceil_div(job.Lq, kAttentionTile), wanted = units > 0 ? ceil_div(shares, units) : 1;
    return wanted < tiles ? wanted : tiles > 0 ? tiles : 1;
}

}  // namespace

extern "C" {

int rw_attention_available(void) { return kernels(1) != nullptr; }

int rw_attention_takes_float32(void) { return kernels(1) != nullptr && kernels(1) == attention_avx2(); }

int rw_attention_uses_amx(void) { return kernels(0) != nullptr && kernels(0) == attention_amx(); }

void rw_attention_allow_amx(int allowed) { amx_choice = allowed ? -1 : 0; }

void rw_attention_forward(const rw_attention* a, void* out, float* lse, int threads) {
    const AttentionForward call = {job_of(*a), out, lse};
    const AttentionKernels* level = kernels(call.job.D);
    each_share(call.job, parts_for(call.job, 4 * int64_t{threads}), threads,
               [&](const AttentionShare& share, int64_t) { level->forward(call, share); });
}

void rw_attention_backward(const rw_attention* a, const void* out, const float* lse, const rw_heads* grad, void* dq, void* dk, void* dv,
                           int threads) {
    const AttentionBackward call = {job_of(*a), out, lse, heads(*grad), dq, dk, dv};
    const AttentionJob& job = call.job;
    const AttentionKernels* level = kernels(job.D);
    const int64_t parts = parts_for(job, kBackwardShares), size = level->sums_size(job);
    if (parts == 1) {
        return each_share(job, 1, threads, [&](const AttentionShare& share, int64_t) {
            auto* sums = scratch<AttentionJob, float, 0>(size);
            level->backward(call, share, sums);
            level->finish(call, share.b, share.head, sums, 1);
        });
    }
    const std::unique_ptr<float[]> sums(new float[static_cast<std::size_t>(job.B * job.Hkv * parts * size)]);
    each_share(job, parts, threads,
               [&](const AttentionShare& share, int64_t task) { level->backward(call, share, sums.get() + task * size); });
    parallel(job.B * job.Hkv, threads, [&](int64_t unit) {
        level->finish(call, unit / job.Hkv, unit % job.Hkv, sums.get() + unit * parts * size, parts);
    });
}

}  // extern "C"
