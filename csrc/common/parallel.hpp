// Shares a loop among threads: on the OpenMP runtime that the process already has, else on threads started for the
// call.
#pragma once

#include <cstdint>

namespace rankwise {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(context, i) for each i in [0, tasks), each once, in any order.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

template <class Body>
void parallel(int64_t tasks, int threads, Body&& body) {
    const auto call = [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); };
    parallel_for(tasks, threads, call, &body);
}

}  // namespace rankwise
