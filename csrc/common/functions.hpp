// exp, tanh and the normal distribution on vectors, with relative errors of about 1e-7. The coefficients are minimax
// fits on the ranges stated.
#pragma once

#include "common/vector.hpp"

namespace rankwise::RW_ISA {
namespace {

template <int Count>
RW_INLINE Floats polynomial(Floats x, const float (&coefficient)[Count]) {
    Floats sum = all(coefficient[Count - 1]);
#pragma GCC unroll 16
    for (int i = Count - 2; i >= 0; --i) sum = madd(sum, x, all(coefficient[i]));
    return sum;
}

// e^x for x in [-87, 88]; e^-87 below, e^88 above. NaN stays NaN.
RW_INLINE Floats exp_bounded(Floats x) {
    const float q[] = {4.999922881e-01f, 1.666711631e-01f, 4.189055232e-02f, 8.312478635e-03f};
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    const Floats bounded = larger(all(-87.0f), smaller(all(88.0f), x));
    const Floats shifted = madd(bounded, all(1.44269504f), all(shift)), n = shifted - shift;
    const Floats r = madd(n, all(2.12194440e-4f), madd(n, all(-0.693359375f), bounded));  // ln 2 in two parts
    const Floats fraction = madd(r * r, polynomial(r, q), r) + 1.0f;
    return times_power(fraction, shifted);
}

// The same, but 0 below -87.
RW_INLINE Floats exp_of(Floats x) { return x < -87.0f ? Floats{} : exp_bounded(x); }

// 0 below -87, so that x sigmoid(x) ends at 0 for the largest negative x too.
RW_INLINE Floats sigmoid(Floats x) { return x < -87.0f ? Floats{} : reciprocal(exp_bounded(-x) + 1.0f); }

// A polynomial below 0.6, where 1 - 2 / (e^2x + 1) cancels.
RW_INLINE Floats tanh_of(Floats x) {
    const float q[] = {-3.333329927e-01f, 1.333195823e-01f, -5.378668220e-02f, 2.080537985e-02f, -5.905862775e-03f};
    const Floats square = x * x, small = madd(x * square, polynomial(square, q), x);
    const Floats large = madd(all(-2.0f), reciprocal(exp_bounded(x + x) + 1.0f), all(1.0f));
    return square < 0.36f ? small : large;
}

struct Normal {
    Floats below;    // P(X <= x)
    Floats density;  // e^(-x^2 / 2) / sqrt(2 pi)
};

// P(X > |x|) = e^(-z^2) t Q(t) / 2 with z = |x| / sqrt(2), t = 1 / (1 + 0.47 z).
RW_INLINE Normal normal(Floats x) {
    const float q[] = {2.650949272e-01f, 2.667769703e-01f,  2.210597125e-01f, 2.534371133e-01f, -1.397580412e-01f,
                       4.889376858e-01f, -5.838278660e-01f, 2.773253468e-01f, -4.904584170e-02f};
    const Floats z = floats_of(bits_of(x) & 0x7fffffffu) * 0.70710678f, t = reciprocal(madd(z, all(0.47f), all(1.0f)));
    const Floats bell = exp_of(x * x * -0.5f), tail = 0.5f * bell * t * polynomial(t, q);
    return {x < 0.0f ? tail : 1.0f - tail, bell * 0.39894228f};
}

}  // namespace
}  // namespace rankwise::RW_ISA
