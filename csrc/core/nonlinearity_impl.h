// Elementary functions over Simd, and the nonlinearities that may follow a layer. Included inside a target region,
// after simd_*.h.
#pragma once

namespace ocsquant {
namespace {

// e^x within 2 ulp, 0 < result < Inf: beyond +-87 it stays what it is there. NaN stays NaN.
OCSQ_INLINE Simd::F exponential(Simd::F x) {
  const Simd::F bounded = Simd::max(Simd::set1(-87.0f), Simd::min(Simd::set1(87.0f), x));
  const Simd::F n = Simd::rint(Simd::mul(bounded, Simd::set1(1.44269504f)));
  // ln 2 in two parts, the first short enough for its product to be exact.
  Simd::F r = Simd::sub(bounded, Simd::mul(n, Simd::set1(0.693359375f)));
  r = Simd::sub(r, Simd::mul(n, Simd::set1(-2.12194440e-4f)));
  Simd::F p = Simd::set1(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = Simd::add(Simd::mul(p, r), Simd::set1(c));
  }
  return Simd::mul(p, Simd::power_of_two(n));
}

OCSQ_INLINE Simd::F sigmoid(Simd::F x) {
  const Simd::F one = Simd::set1(1.0f);
  return Simd::div(one, Simd::add(one, exponential(Simd::sub(Simd::set1(0.0f), x))));
}

OCSQ_INLINE Simd::F hyperbolic_tangent(Simd::F x) {
  const Simd::F one = Simd::set1(1.0f), e = exponential(Simd::mul(x, Simd::set1(-2.0f)));
  const Simd::F far = Simd::div(Simd::sub(one, e), Simd::add(one, e));
  // Near 0 the difference above loses its digits; the series to x^11 has them all.
  const Simd::F x2 = Simd::mul(x, x);
  Simd::F p = Simd::set1(-1382.0f / 155925);
  for (const float c : {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) {
    p = Simd::add(Simd::mul(p, x2), Simd::set1(c));
  }
  return Simd::select_beyond(x, Simd::set1(0.3f), far, Simd::mul(x, p));
}

// c[0] + c[1] x + ... + c[5] x^5, in pairs: one after the other they would wait for each other.
OCSQ_INLINE Simd::F quintic(Simd::F x, const float (&c)[6]) {
  const auto pair = [&](int i) __attribute__((always_inline)) {
    return Simd::add(Simd::set1(c[i]), Simd::mul(Simd::set1(c[i + 1]), x));
  };
  const Simd::F x2 = Simd::mul(x, x), x4 = Simd::mul(x2, x2);
  return Simd::add(Simd::add(pair(0), Simd::mul(x2, pair(2))), Simd::mul(x4, pair(4)));
}

OCSQ_INLINE Simd::F relu(Simd::F x) {
  const Simd::F zero = Simd::set1(0.0f);
  return Simd::max(zero, x);  // the second of max() where one is NaN
}

// x Phi(x). Phi(x) - 1/2 is odd: x P(x^2) / Q(x^2) within 1e-8 up to 5.6, where float32 has no more of it than 1/2.
OCSQ_INLINE Simd::F gelu(Simd::F x) {
  static constexpr float kP[] = {0.398942232f,    0.0343756862f,   0.00470723119f,
                                 0.000173845954f, 6.35645347e-06f, 2.2145386e-08f};
  static constexpr float kQ[] = {1.0f, 0.25283277f, 0.0289398395f, 0.00191295217f, 7.5100128e-05f, 1.18020807e-06f};
  const Simd::F half = Simd::set1(0.5f), near = Simd::max(Simd::set1(-5.6f), Simd::min(Simd::set1(5.6f), x));
  const Simd::F square = Simd::mul(near, near);
  const Simd::F odd = Simd::div(Simd::mul(near, quintic(square, kP)), quintic(square, kQ));
  return Simd::mul(x, Simd::add(half, Simd::max(Simd::set1(-0.5f), Simd::min(half, odd))));
}

OCSQ_INLINE Simd::F silu(Simd::F x) {
  return Simd::div(x, Simd::add(Simd::set1(1.0f), exponential(Simd::sub(Simd::set1(0.0f), x))));
}

// x / 2 (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
OCSQ_INLINE Simd::F gelu_tanh(Simd::F x) {
  const Simd::F cubic = Simd::add(Simd::set1(1.0f), Simd::mul(Simd::set1(0.044715f), Simd::mul(x, x)));
  const Simd::F minus = Simd::mul(Simd::set1(-1.59576912f), Simd::mul(x, cubic));
  return Simd::div(x, Simd::add(Simd::set1(1.0f), exponential(minus)));
}

// y[n] in place, up to a whole vector.
template <class Function>
OCSQ_INLINE void over_vectors(int64_t n, float* y, const Function& function) {
  for (int64_t j = 0; j < n; j += Simd::W) Simd::store(y + j, function(Simd::load(y + j)));
}

// y[n] in place, with what is behind it up to a whole vector.
__attribute__((noinline)) inline void nonlinear(Nonlinearity which, int64_t n, float* y) {
  switch (which) {
    case Nonlinearity::none:
      return;
    case Nonlinearity::relu:
      return over_vectors(n, y, relu);
    case Nonlinearity::gelu:
      return over_vectors(n, y, gelu);
    case Nonlinearity::gelu_tanh:
      return over_vectors(n, y, gelu_tanh);
    case Nonlinearity::silu:
      return over_vectors(n, y, silu);
    case Nonlinearity::sigmoid:
      return over_vectors(n, y, sigmoid);
    case Nonlinearity::tanh:
      return over_vectors(n, y, hyperbolic_tangent);
  }
}

}  // namespace
}  // namespace ocsquant
