// Runs sums of products over odd shapes and strides in exactly sized buffers, for the sanitizers, against plain loops.
#include <cmath>
#include <memory>
#include <vector>

#include "common/convert.hpp"
#include "rankwise_native.h"
#include "sanitize/random.hpp"

namespace {

// `rows` rows of `columns` elements, bfloat16 or float32, `stride` apart, with nothing behind the last one.
struct Matrix {
    int dtype;
    int64_t rows, columns, stride, elements;
    std::unique_ptr<char[]> data;
    Matrix(int dtype, int64_t rows, int64_t columns, int64_t gap)
        : dtype(dtype),
          rows(rows),
          columns(columns),
          stride(columns + gap),
          elements((rows - 1) * (columns + gap) + columns),
          data(new char[static_cast<size_t>(elements * (dtype == RW_FLOAT32 ? 4 : 2))]) {
        for (int64_t i = 0; i < elements; ++i)
            if (dtype == RW_FLOAT32) rankwise::store_float<RW_FLOAT32>(data.get(), i, next_float());
            else rankwise::store_float<RW_BFLOAT16>(data.get(), i, next_float());
    }
    float at(int64_t row, int64_t column) const {
        const int64_t i = row * stride + column;
        return dtype == RW_FLOAT32 ? rankwise::load_as_float<RW_FLOAT32>(data.get(), i)
                                   : rankwise::load_as_float<RW_BFLOAT16>(data.get(), i);
    }
};

std::vector<float> random_floats(int64_t count) {
    std::vector<float> made;
    for (int64_t i = 0; i < count; ++i) made.push_back(next_float());
    return made;
}

// Up to the roundings of `terms` products, of the weights among them.
bool is_near(double found, double expected, int64_t terms) {
    return std::fabs(found - expected) <= 0.01 * (std::sqrt(static_cast<double>(terms)) + std::fabs(expected));
}

// A frozen weight (length, N or N, length) with a gain, and a float32 one of rank R; with gaps between rows the second
// is exact.
bool products(int dtype, int64_t T, int64_t N, int64_t length, int64_t R, int64_t gap, bool across, int threads) {
    const Matrix a(dtype, T, length, gap), u(dtype, T, R, gap), u_rest(dtype, T, R, gap);
    const Matrix w(dtype, across ? length : N, across ? N : length, gap);
    // What rounding left of a row is there for bfloat16 alone.
    const bool some = gap != 0, rests = some && dtype == RW_BFLOAT16;
    const std::vector<float> B = random_floats(N * R), gain = random_floats(length), g = random_floats(N),
                             bias = random_floats(N);
    Matrix out(dtype, T, N, gap), rest(dtype, T, N, gap);
    const rw_term terms[] = {
        {a.data.get(), a.stride, length, w.data.get(), w.stride, nullptr, some ? gain.data() : nullptr, 1.0f, dtype,
         across, nullptr, 0, nullptr},
        {u.data.get(), u.stride, R, B.data(), R, nullptr, nullptr, 0.5f, RW_FLOAT32, 0,
         rests ? u_rest.data.get() : nullptr, rests, nullptr},
    };
    rw_products(terms, 2, dtype, T, N, some ? g.data() : nullptr, some ? bias.data() : nullptr, out.data.get(),
                rests ? rest.data.get() : nullptr, out.stride, threads);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < length; ++k) {
                const double weight = across ? w.at(k, n) : w.at(n, k);
                sum += static_cast<double>(a.at(t, k)) * weight *
                       (some ? static_cast<double>(gain[static_cast<size_t>(k)]) : 1.0);
            }
            for (int64_t r = 0; r < R; ++r) {
                const double left =
                    static_cast<double>(u.at(t, r)) + (rests ? static_cast<double>(u_rest.at(t, r)) : 0.0);
                sum += 0.5 * left * static_cast<double>(B[static_cast<size_t>(n * R + r)]);
            }
            if (some)
                sum = sum * static_cast<double>(g[static_cast<size_t>(n)]) +
                      static_cast<double>(bias[static_cast<size_t>(n)]);
            const double found = static_cast<double>(out.at(t, n)) + (rests ? static_cast<double>(rest.at(t, n)) : 0.0);
            if (!is_near(found, sum, length + R)) return false;
        }
    return true;
}

bool row_product(int dtype, int64_t T, int64_t R, int64_t C, int64_t gap, int by_column, int threads) {
    const Matrix q(dtype, T, R, gap), m(dtype, T, C, gap), y(dtype, T, C, gap);
    const std::vector<float> gain = random_floats(C), divisor = random_floats(C);
    std::vector<float> out(static_cast<size_t>(R * C)), dot(static_cast<size_t>(C));
    rw_row_product(dtype, q.data.get(), q.stride, m.data.get(), m.stride, y.data.get(), y.stride, T, R, C, 0.5f,
                   gain.data(), by_column, out.data(), RW_FLOAT32, divisor.data(), dot.data(), threads);
    for (int64_t c = 0; c < C; ++c) {
        double sum = 0;
        for (int64_t t = 0; t < T; ++t) sum += static_cast<double>(m.at(t, c)) * static_cast<double>(y.at(t, c));
        const double factor = static_cast<double>(divisor[static_cast<size_t>(c)]);
        if (!is_near(static_cast<double>(dot[static_cast<size_t>(c)]) * factor, sum, T)) return false;
        for (int64_t r = 0; r < R; ++r) {
            sum = 0;
            for (int64_t t = 0; t < T; ++t) sum += static_cast<double>(q.at(t, r)) * static_cast<double>(m.at(t, c));
            sum *= 0.5 * static_cast<double>(gain[static_cast<size_t>(c)]);
            if (!is_near(static_cast<double>(out[static_cast<size_t>(by_column ? c * R + r : r * C + c)]), sum, T))
                return false;
        }
    }
    return true;
}

// A frozen weight in 8 bits, rounded before or while it is packed. Its numbers are compared in the tests of the Python
// package.
bool integers(int dtype, int64_t T, int64_t N, int64_t length, bool across, bool is_rounded) {
    const Matrix x(dtype, T, length, 3), w(dtype, across ? length : N, across ? N : length, 5);
    const std::vector<int8_t> rounded(static_cast<size_t>(N * length), 3);
    const Matrix out(dtype, T, N, 1);
    const std::vector<float> ones(static_cast<size_t>(N > length ? N : length), 1.0f);
    const int64_t stride = (length + 63) / 64 * 64, size = rw_products_largest() > 127 ? 2 : 1;
    std::vector<uint8_t> q(static_cast<size_t>(T * stride * size));
    std::vector<float> scale(static_cast<size_t>((T + 31) / 32 * 32));
    rw_quantize_rows(x.data.get(), dtype, x.stride, ones.data(), T, length, q.data(), stride * size, scale.data(),
                     across, 2);
    const rw_eight_bit eight = {scale.data(), ones.data(), ones.data(), ones.data()};
    rw_term term = {q.data(), stride, length, w.data.get(), w.stride, nullptr, nullptr,
                    1.0f,     dtype,  across, nullptr,      0,        &eight};
    if (is_rounded) term.w = rounded.data(), term.w_stride = across ? N : length, term.w_dtype = RW_INT8;
    rw_products(&term, 1, dtype, T, N, nullptr, nullptr, out.data.get(), nullptr, out.stride, 2);
    return std::isfinite(out.at(T - 1, N - 1));
}

bool are_sound(int dtype) {
    for (int64_t T : {1, 31, 100})
        for (int64_t N : {1, 40, 96})
            for (int64_t length : {2, 64, 700})
                for (int64_t gap : {0, 5})
                    for (bool across : {false, true})
                        if (!products(dtype, T, N, length, 3, gap, across, 1) ||
                            !products(dtype, T, N, length, 33, gap, across, 3))
                            return false;
    for (int64_t T : {1, 31, 100})
        for (int64_t N : {32, 96})
            for (int64_t length : {32, 672, 8352})
                for (bool across : {false, true})
                    if (!integers(dtype, T, N, length, across, false) ||
                        (rw_products_largest() == 127 && !integers(dtype, T, N, length, across, true)))
                        return false;
    // Summed in three parts wherever sums are cut.
    for (bool across : {false, true})
        if (!products(dtype, 31, 40, 8300, 3, 0, across, 1)) return false;
    for (int64_t T : {1, 30, 300})
        for (int64_t R : {1, 16, 33})
            for (int64_t C : {1, 47, 128, 2100})
                for (int by_column : {0, 1})
                    if (!row_product(dtype, T, R, C, 0, by_column, 1) || !row_product(dtype, T, R, C, 5, by_column, 3))
                        return false;
    return true;
}

}  // namespace

bool products_are_sound() {
    if (!rw_products_available()) return true;
    for (int pairs : {2, 3}) {
        rw_products_allow(pairs);
        if (!are_sound(RW_BFLOAT16)) return false;
    }
    rw_products_allow(1);
    return rw_products_are_tiles() || are_sound(RW_FLOAT32);
}
