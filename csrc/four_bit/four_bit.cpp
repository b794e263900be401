// The C interface of four bits: cuts the work into tasks.
#include <atomic>
#include <cstddef>

#include "common/level.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"

namespace {

using namespace rankwise;

// Elements of a weight per task: some ten microseconds of work.
constexpr int64_t kTaskElements = int64_t{1} << 16;
// Bytes of each row of x and of the weight that are multiplied while they are in the first-level cache.
constexpr int64_t kPieceBytes = 8192;

// Runs body(first, last) over [0, total) in tasks of `step`.
template <class Body>
void split(int64_t total, int64_t step, int threads, const Body& body) {
    parallel(ceil_div(total, step), threads, [&](int64_t task) {
        const int64_t first = task * step, last = first + step < total ? first + step : total;
        body(first, last);
    });
}

// Items per task, a multiple of `least`. Each thread gets several tasks, so that others take over those of a delayed
// thread, but few, so that each reads a long run of memory.
int64_t task_step(int64_t total, int64_t least, int threads) {
    const int64_t step = ceil_div(ceil_div(total, 6 * int64_t{threads > 0 ? threads : 1}), least) * least;
    return step > least ? step : least;
}

// The least number of rows per task: a multiple of the 16 whose sums are open at once, unless rows are long.
int64_t least_rows(int64_t K) { return K >= kTaskElements ? 4 : ceil_div(kTaskElements / (K > 0 ? K : 1), 16) * 16; }

}  // namespace

extern "C" {

int64_t rw_quantize_4bit(const void* w, int dtype, int64_t n, int64_t block_size, const float* bound,
                         const uint8_t* order, uint8_t* packed, float* absmax, int threads) {
    const QuantizeJob job = {w, dtype, n, block_size, bound, order, packed, absmax};
    const int64_t blocks = ceil_div(n, block_size);
    std::atomic<int64_t> bad{blocks};
    split(blocks, task_step(blocks, ceil_div(kTaskElements, block_size), threads), threads,
          [&](int64_t first, int64_t last) {
              const int64_t found = level().four_bit->quantize(job, first, last);
              int64_t least = bad;
              while (found >= 0 && found < least && !bad.compare_exchange_weak(least, found)) {
              }
          });
    return bad == blocks ? -1 : bad.load();
}

void rw_dequantize_4bit(const rw_weight* weight, int64_t first, int64_t count, int dtype, void* out, int threads) {
    const int64_t size = dtype == RW_FLOAT32 ? 4 : 2;
    split(count, task_step(count, kTaskElements, threads), threads, [&](int64_t begin, int64_t end) {
        level().four_bit->dequantize(*weight, first + begin, end - begin, dtype,
                                     static_cast<char*>(out) + begin * size);
    });
}

void rw_linear_4bit(const rw_weight* weight, const void* x, int64_t T, int64_t N, int64_t K, int dtype,
                    const void* bias, void* y, int threads) {
    if (T == 0 || N == 0) return;
    const FourBitKernels& kernels = *level().four_bit;
    const int64_t size = dtype == RW_BFLOAT16 && kernels.multiplies_bfloat16 ? 2 : 4, group = kernels.group(dtype);
    const bool has_codes = !weight->ggml_type,
               apart = has_codes && K % weight->block_size == 0 && weight->block_size % group == 0,
               fused = apart && T <= kernels.fused_rows;
    if (T == 1 && kernels.one_row && has_codes && dtype != RW_FLOAT16 && K % weight->block_size == 0) {
        float* in_order = scratch<FourBitKernels, float, 0>(K);
        kernels.arrange_one_row(x, dtype, K, in_order);
        const LinearJob job = {weight, in_order, K, true, true, T, N, K, dtype, bias, y};
        return split(N, task_step(N, least_rows(K), threads), threads,
                     [&](int64_t first, int64_t last) { kernels.one_row(job, first, last); });
    }
    // On tiles, 16 rows cost as much as one: from 5 on they win.
    const ProductKernels* tiles =
        apart && !fused && dtype == RW_BFLOAT16 && T <= kFewRowsOfTiles ? current_products() : nullptr;
    if (tiles && !tiles->few_rows) tiles = nullptr;
    const int64_t piece = fused || tiles ? group : kPieceBytes / size;
    char* arranged = scratch<FourBitKernels, char, 0>(T * K * size);
    // A second wake-up of the threads would cost more than this copy.
    for (int64_t k = 0; k < K; k += piece)
        kernels.arrange(x, dtype, T, K, k, K - k < piece ? K - k : piece, apart, arranged + T * k * size);
    LinearJob job = {weight, arranged, piece, apart, fused, T, N, K, dtype, bias, y};
    if (tiles) {
        const int64_t rows = T <= 16 ? 16 : T <= 32 ? 32 : 64;
        uint32_t* packed = scratch<FourBitKernels, uint32_t, 1>(rows * K / 2);
        tiles->pack_few_rows(reinterpret_cast<const uint16_t*>(arranged), T, K, packed);
        job.x = packed;
        split(N, task_step(N, least_rows(K), threads), threads,
              [&](int64_t first, int64_t last) { tiles->few_rows(job, first, last); });
        return;
    }
    split(N, task_step(N, least_rows(K), threads), threads,
          [&](int64_t first, int64_t last) { kernels.linear(job, first, last); });
}

void rw_row_norms_4bit(const rw_weight* weight, int64_t N, int64_t K, int dtype, float* norms, int threads) {
    const FourBitKernels& kernels = *level().four_bit;
    split(N, task_step(N, least_rows(K), threads), threads,
          [&](int64_t first, int64_t last) { kernels.row_norms(*weight, K, dtype, first, last, norms); });
}

}  // extern "C"
