// The C interface of attention: cuts the work into shares.
#include <memory>

#include "common/level.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace {

using namespace rankwise;

// Shares of a whole backward pass, where there are fewer key heads. Every share has sums of its own that must be added
// up in the end. Not a function of the number of threads: the result must not be either.
constexpr int64_t kBackwardShares = 8;

// For heads of size D, or null.
const AttentionKernels* kernels(int64_t D) {
    const Level& current = level();
    return current.attention_on_amx && D % 32 == 0 ? current.attention_on_amx : current.attention;
}

Heads heads(const rw_heads& x) { return {x.data, x.batch, x.token, x.head}; }

AttentionJob job_of(const rw_attention& a) {
    return {a.B,        a.R,        a.Lq,       a.Lk,    a.H,   a.Hkv,   a.D,
            heads(a.q), heads(a.k), heads(a.v), a.start, a.end, a.scale, a.dtype};
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
    const int64_t units = job.B * job.Hkv, tiles = ceil_div(job.Lq, kAttentionTile),
                  wanted = units > 0 ? ceil_div(shares, units) : 1;
    return wanted < tiles ? wanted : tiles > 0 ? tiles : 1;
}

}  // namespace

extern "C" {

int rw_attention_available(void) { return level().attention != nullptr; }

int rw_attention_takes_float32(void) { return rw_attention_available() && level().attention->takes_float32; }

void rw_attention_forward(const rw_attention* a, void* out, float* lse, int threads) {
    const AttentionForward call = {job_of(*a), out, lse};
    const AttentionKernels* chosen = kernels(call.job.D);
    each_share(call.job, parts_for(call.job, 4 * int64_t{threads}), threads,
               [&](const AttentionShare& share, int64_t) { chosen->forward(call, share); });
}

void rw_attention_backward(const rw_attention* a, const void* out, const float* lse, const rw_heads* grad, void* dq,
                           void* dk, void* dv, int threads) {
    const AttentionBackward call = {job_of(*a), out, lse, heads(*grad), dq, dk, dv};
    const AttentionJob& job = call.job;
    const AttentionKernels* chosen = kernels(job.D);
    const int64_t parts = parts_for(job, kBackwardShares), size = chosen->sums_size(job);
    if (parts == 1) {
        return each_share(job, 1, threads, [&](const AttentionShare& share, int64_t) {
            auto* sums = scratch<AttentionJob, float, 0>(size);
            chosen->backward(call, share, sums);
            chosen->finish(call, share.b, share.head, sums, 1);
        });
    }
    const std::unique_ptr<float[]> sums(new float[static_cast<std::size_t>(job.B * job.Hkv * parts * size)]);
    each_share(job, parts, threads, [&](const AttentionShare& share, int64_t task) {
        chosen->backward(call, share, sums.get() + task * size);
    });
    parallel(job.B * job.Hkv, threads, [&](int64_t unit) {
        chosen->finish(call, unit / job.Hkv, unit % job.Hkv, sums.get() + unit * parts * size, parts);
    });
}

}  // extern "C"
