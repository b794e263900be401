// Finds out once what the processor can do, and keeps one table of kernels for each level.
#include "common/level.hpp"

#include <atomic>

#if defined(RW_HAS_avx2)
#include <cpuid.h>
#endif
#if defined(RW_HAS_amx) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rankwise {

// Of csrc/levels.txt. The build defines RW_HAS_... for each instruction set that the compiler could target.
#define RW_FAMILIES(ISA)                         \
    namespace ISA {                              \
    extern const FourBitKernels four_bit;        \
    extern const ElementwiseKernels elementwise; \
    extern const AttentionKernels attention;     \
    extern const ProductKernels products;        \
    }
RW_FAMILIES(portable)
RW_FAMILIES(avx2)
RW_FAMILIES(avx_vnni)
RW_FAMILIES(avx512)
RW_FAMILIES(avx512_bf16)
RW_FAMILIES(amx)

namespace {

constexpr int kInterface = 16;

#if defined(RW_HAS_avx2)
// What the processor has and the system keeps registers for. Not by __builtin_cpu_supports: zig's runtime denies all.
struct Cpu {
    unsigned c1 = 0, b7 = 0, c7 = 0, a71 = 0;  // CPUID 1 ECX, 7.0 EBX and ECX, 7.1 EAX
    uint64_t kept = 0;                         // XCR0

    Cpu() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (!__get_cpuid(1, &a, &b, &c1, &d)) return;
        if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d) && a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
        if (c1 >> 27 & 1) {  // OSXSAVE: xgetbv is there
            unsigned low = 0, high = 0;
            __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
            kept = static_cast<uint64_t>(high) << 32 | low;
        }
    }

    static bool all(uint64_t have, uint64_t bits) { return (have & bits) == bits; }
    // FMA, AVX, F16C; AVX2.
    bool avx2() const { return all(kept, 0x6) && all(c1, 1u << 12 | 1u << 28 | 1u << 29) && all(b7, 1u << 5); }
    bool avx_vnni() const { return all(a71, 1u << 4); }
    // F, DQ, BW, VL.
    bool avx512() const { return all(kept, 0xe6) && all(b7, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31); }
    bool avx512_bf16_vnni() const { return all(a71, 1u << 5) && all(c7, 1u << 11); }
};
#endif

#if defined(RW_HAS_amx) && defined(__linux__)
// Whether the processor has the instructions and the system gives this process their registers.
bool amx_is_usable() {
    constexpr long request_permission = 0x1023, tile_data = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned needed = (1u << 22) | (1u << 24) | (1u << 25);  // AMX-BF16, AMX-TILE, AMX-INT8
    return (d & needed) == needed && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

struct Levels {
    Level at[RW_AMX + 1];
    int usable = 0;  // bit n for level n

    void add(int number, const Level& level) {
        at[number] = level;
        usable |= 1 << number;
    }

    Levels() {
        add(RW_PORTABLE, {&portable::four_bit, &portable::elementwise, nullptr, nullptr, nullptr});
#ifdef RW_HAS_avx2
        const Cpu cpu;
        if (!cpu.avx2()) return;
        const Level with_avx2 = {&avx2::four_bit, &avx2::elementwise, &avx2::attention, nullptr, &avx2::products};
        add(RW_AVX2, with_avx2);
#ifdef RW_HAS_avx_vnni
        // Processors with AVX-512 may have it or not, and those without AVX-512 too.
        if (cpu.avx_vnni()) {
            add(RW_AVX_VNNI, with_avx2);
            at[RW_AVX_VNNI].products = &avx_vnni::products;
        }
#endif
#ifdef RW_HAS_avx512
        if (!cpu.avx512()) return;
        // Attention and products stay AVX2's where AVX-512 cannot multiply bfloat16.
        add(RW_AVX512, {&avx512::four_bit, &avx512::elementwise, &avx2::attention, nullptr, &avx2::products});
#ifdef RW_HAS_avx512_bf16
        if (!cpu.avx512_bf16_vnni()) return;
        const Level with_bf16 = {&avx512_bf16::four_bit, &avx512_bf16::elementwise, &avx512_bf16::attention, nullptr,
                                 &avx512_bf16::products};
        add(RW_AVX512_BF16, with_bf16);
#if defined(RW_HAS_amx) && defined(__linux__)
        if (!amx_is_usable()) return;
        add(RW_AMX, with_bf16);
        at[RW_AMX].attention_on_amx = &amx::attention, at[RW_AMX].products = &amx::products;
#endif
#endif
#endif
#endif
    }
};

const Levels& levels() {
    static const Levels made;
    return made;
}

std::atomic<int> current{RW_PORTABLE};

}  // namespace

const Level& level() { return levels().at[current.load(std::memory_order_relaxed)]; }

}  // namespace rankwise

extern "C" {

int rw_interface(void) { return rankwise::kInterface; }

int rw_levels(void) { return rankwise::levels().usable; }

int rw_level(void) { return rankwise::current; }

void rw_set_level(int number) {
    if (number >= RW_PORTABLE && number <= RW_AMX && (rankwise::levels().usable >> number & 1) != 0)
        rankwise::current = number;
}

}  // extern "C"
