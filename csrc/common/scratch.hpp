// Working memory of one thread, kept between calls and aligned to pages: one buffer for each Owner, type and Use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace rankwise {

constexpr int64_t kPage = 4096;

template <class Owner, class E, int Use>
static E* scratch(int64_t elements) {
    struct Buffer {
        void* data = nullptr;
        int64_t bytes = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(E)) + kPage;
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer.data = std::malloc(static_cast<std::size_t>(bytes));
        buffer.bytes = buffer.data ? bytes : 0;
        if (!buffer.data) throw std::bad_alloc();
    }
    return reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(buffer.data) + kPage - 1) / kPage * kPage);
}

}  // namespace rankwise
