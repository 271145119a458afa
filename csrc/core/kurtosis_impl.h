// Kurtosis of a row and its gradient, in sweeps over a row that stays in the first cache. Included inside a target
// region, after rowwise_impl.h.
#pragma once

namespace ocsquant {
namespace {

struct Total {
  LaneSum sum;
  OCSQ_INLINE Total() : sum() {}
  OCSQ_INLINE void operator()(const float* p, int64_t) {
    for (int v = 0; v < kVectors; ++v) sum.lane[v] = Simd::add(sum.lane[v], Simd::load(p + v * Simd::W));
  }
};

// Fetches the next row too, for which memory would have nothing to do meanwhile.
struct SquaresAround {
  int64_t d;
  Simd::F mean;
  LaneSum sum;
  OCSQ_INLINE SquaresAround(int64_t count, float m) : d(count), mean(Simd::set1(m)), sum() {}
  OCSQ_INLINE void operator()(const float* p, int64_t) {
    for (int line = 0; line < kLanes; line += 16) __builtin_prefetch(p + d + line, 0, 1);
    for (int v = 0; v < kVectors; ++v) {
      const Simd::F z = Simd::sub(Simd::load(p + v * Simd::W), mean);
      sum.lane[v] = Simd::add(sum.lane[v], Simd::mul(z, z));
    }
  }
};

// Powers of w = (y - mean) / deviation: nothing overflows, whatever the size of y. The gradient alone needs the cubes.
template <bool kCubes>
struct HigherPowers {
  Simd::F mean, inverse;
  LaneSum cubes, fourths;
  OCSQ_INLINE HigherPowers(float m, float r) : mean(Simd::set1(m)), inverse(Simd::set1(r)), cubes(), fourths() {}
  OCSQ_INLINE void operator()(const float* p, int64_t) {
    for (int v = 0; v < kVectors; ++v) {
      const Simd::F w = Simd::mul(Simd::sub(Simd::load(p + v * Simd::W), mean), inverse), w2 = Simd::mul(w, w);
      if (kCubes) cubes.lane[v] = Simd::add(cubes.lane[v], Simd::mul(w2, w));
      fourths.lane[v] = Simd::add(fourths.lane[v], Simd::mul(w2, w2));
    }
  }
};

struct Moments {
  float mean;
  float inverse;   // one over the standard deviation; 0: the row has none, and no kurtosis
  float skewness;  // of w
  float kurtosis;
};

template <bool kSkewness>
inline Moments moments_of(const float* y, int64_t d) {
  const float count = static_cast<float>(d);
  Total total;
  for_blocks(y, d, total);
  const float mean = total.sum.total() / count;
  SquaresAround squares(d, mean);
  for_blocks(y, d, squares, mean);
  const float variance = squares.sum.total() / count;
  if (!(variance <= std::numeric_limits<float>::max())) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {mean, nan, nan, nan};
  }
  const float deviation = std::sqrt(variance);
  // What rounding leaves of a constant row is not its shape: m2 <= 1e-10 of the mean square.
  if (d == 1 || deviation <= 1e-5f * std::fabs(mean) || variance < 0x1p-100f) return {mean, 0.0f, 0.0f, 0.0f};
  const float inverse = 1.0f / deviation;
  HigherPowers<kSkewness> powers(mean, inverse);
  for_blocks(y, d, powers, mean);
  return {mean, inverse, powers.cubes.total() / count, powers.fourths.total() / count};
}

inline float kurtosis(const float* y, int64_t d) { return moments_of<false>(y, d).kurtosis; }

// out = grad + c (w^3 - skewness - K w)
template <bool kGrad>
struct KurtosisGradient {
  const float* grad;
  float* out;
  int64_t d;
  Simd::F mean, inverse, skewness, kurtosis, factor;
  OCSQ_INLINE KurtosisGradient(const float* g, float* o, int64_t count, const Moments& m, float c)
      : grad(g),
        out(o),
        d(count),
        mean(Simd::set1(m.mean)),
        inverse(Simd::set1(m.inverse)),
        skewness(Simd::set1(m.skewness)),
        kurtosis(Simd::set1(m.kurtosis)),
        factor(Simd::set1(c)) {}
  OCSQ_INLINE void full(const float* g, const float* p, float* o) const {
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * Simd::W;
      const Simd::F w = Simd::mul(Simd::sub(Simd::load(p + at), mean), inverse);
      const Simd::F shape = Simd::sub(Simd::mul(w, Simd::sub(Simd::mul(w, w), kurtosis)), skewness);
      const Simd::F slope = Simd::mul(factor, shape);
      Simd::store(o + at, kGrad ? Simd::add(Simd::load(g + at), slope) : slope);
    }
  }
  OCSQ_INLINE void operator()(const float* p, int64_t j) const {
    if (j + kLanes <= d) return full(kGrad ? grad + j : p, p, out + j);
    float g[kLanes] = {}, o[kLanes];
    const size_t bytes = (d - j) * sizeof(float);
    if (kGrad) std::memcpy(g, grad + j, bytes);
    full(g, p, o);
    std::memcpy(out + j, o, bytes);
  }
};

inline float add_kurtosis_gradient(const float* grad, const float* y, int64_t d, float factor, float target,
                                   float* out) {
  const Moments m = moments_of<true>(y, d);
  // Not the other way round: a row with NaN must not lose it here.
  if (m.inverse == 0.0f || m.kurtosis <= target || factor == 0.0f) {
    if (grad != nullptr) {
      std::memmove(out, grad, d * sizeof(float));
    } else {
      std::memset(out, 0, d * sizeof(float));
    }
    return m.kurtosis;
  }
  const float c = factor * 4.0f / static_cast<float>(d) * m.inverse;
  if (grad != nullptr) {
    const KurtosisGradient<true> block(grad, out, d, m, c);
    for_blocks(y, d, block);
  } else {
    const KurtosisGradient<false> block(grad, out, d, m, c);
    for_blocks(y, d, block);
  }
  return m.kurtosis;
}

}  // namespace
}  // namespace ocsquant
