// How far two cores are from one another, and how fast they write to memory: one alone, and both.
//
//     g++ -O2 -pthread benchmarks/cores.cpp -o /tmp/cores && /tmp/cores
//
// A virtual machine's cores may lie on one chiplet of the processor or on two, and move: a message there and back then takes several
// times as long, and both together write twice as fast as one. Prints one line a second, five times. Linux on x86.
#include <emmintrin.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace {

constexpr int kMessages = 20000, kRepeats = 9, kLines = 5;
// More than the caches hold.
constexpr std::int64_t kBytes = std::int64_t{256} << 20;

alignas(128) std::atomic<int> message{0};
alignas(128) std::atomic<int> arrived{0};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void pin(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

void meet() {
    const int all = (arrived.fetch_add(1) / 2 + 1) * 2;
    while (arrived.load() < all) {
    }
}

// Nanoseconds for a message there and back.
double round_trip(int core) {
    if (core == 0) message = 0;
    meet();
    const double start = now();
    for (int i = 0; i < 2 * kMessages; i += 2) {
        while (message.load(std::memory_order_acquire) != i + core) {
        }
        message.store(i + core + 1, std::memory_order_release);
    }
    return (now() - start) / kMessages * 1e9;
}

// GB/s, the median, at which the first core stores kBytes past the caches, or each of both a half.
double storing(int core, bool both, char* memory) {
    // Zeros would not do: lines of nothing else travel twice as fast on a Zen 4.
    const __m128i value = _mm_set1_epi32(0x5bd1e995);
    double times[kRepeats];
    for (double& time : times) {
        meet();
        const double start = now();
        const std::int64_t share = both ? kBytes / 2 : core == 0 ? kBytes : 0;
        char* to = memory + (both ? core * share : 0);
        for (std::int64_t i = 0; i < share; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), value);
        _mm_sfence();
        meet();
        time = now() - start;
    }
    std::nth_element(times, times + kRepeats / 2, times + kRepeats);
    return static_cast<double>(kBytes) / times[kRepeats / 2] / 1e9;
}

void measure(int core, char* memory) {
    pin(core);
    for (int line = 0; line < kLines; ++line) {
        const double trip = round_trip(core), one = storing(core, false, memory), two = storing(core, true, memory);
        if (core == 0) {
            std::printf("round trip %.0f ns; one core writes %.0f GB/s, both %.0f\n", trip, one, two);
            std::fflush(stdout);
            sleep(1);
        }
        meet();
    }
}

}  // namespace

int main() {
    char* memory = static_cast<char*>(std::aligned_alloc(64, static_cast<std::size_t>(kBytes)));
    if (!memory) return 1;
    std::memset(memory, 1, static_cast<std::size_t>(kBytes));
    std::thread other(measure, 1, memory);
    measure(0, memory);
    other.join();
    std::free(memory);
}
