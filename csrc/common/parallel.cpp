#include "common/parallel.hpp"

#include <atomic>
#include <thread>
#include <vector>

#include "rankwise_native.h"

namespace rankwise {
namespace {

// libgomp's stable entry point, which LLVM's and Intel's runtimes offer too.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

std::atomic<GompParallel> shared_start{nullptr};

struct Loop {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    void (*body)(void*, int64_t);
    void* context;
};

// Every thread takes the next task until none is left, so a thread needs neither its number nor the thread count.
void work(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    for (int64_t task; (task = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;)
        loop.body(loop.context, task);
}

void work_on_new_threads(Loop& loop, int threads) {
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &loop);
    work(&loop);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context) {
    if (tasks < threads) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(context, task);
        return;
    }
    Loop loop;
    loop.tasks = tasks;
    loop.body = body;
    loop.context = context;
    if (const GompParallel start = shared_start) {
        start(work, &loop, static_cast<unsigned>(threads), 0);
    } else {
        work_on_new_threads(loop, threads);
    }
}

}  // namespace rankwise

extern "C" void rw_share_threads(void* gomp_parallel) {
    rankwise::shared_start = reinterpret_cast<rankwise::GompParallel>(gomp_parallel);
}
